"""The commands that measure many settings on one adapter: compare and tune."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..defaults import MAX_NEW_TOKENS, TOLERANCE
from .asking import (
    BatchSize,
    Benign,
    HarmJudge,
    Limit,
    Lookalike,
    Patch,
    Reference,
    Resume,
    Safety,
    Task,
    Template,
    Tokens,
    Utility,
    asked_of,
)
from .loading import ModelOptions, load, read_rows
from .options import (
    REFUSES,
    Calibration,
    ConfigFile,
    Device,
    DryRun,
    Dtype,
    Json,
    JudgeName,
    NeededBase,
    Preset,
    Settings,
    TokenizerName,
    TrustRemoteCode,
    Weak,
    command,
    given_flags,
    require_file,
    require_new,
    say,
    settings_of,
    show,
    table,
    usage_error,
    wrote,
)

if TYPE_CHECKING:
    from ..config import NLSRConfig
    from ..patch import SafetyPatch
    from ..planning import Method
    from ..tuning import Tuning

METHODS: dict[str, Mapping[str, Any]] = {
    "default": {},
    "two_teacher": {"update": "least_squares"},
    "one_shot": {"update": "least_squares", "least_squares_form": "one_shot"},
    "sum": {"update": "sum"},
    "swap": {"update": "swap"},
    "paper": {"preset": "paper"},
    "released": {"preset": "released"},
    "fgsn": {"method": "fgsn"},
    "safelora": {"method": "safelora"},
    "antidote": {"method": "antidote", "score": "wanda"},
    "resta": {"method": "resta"},
}


def compare(
    ctx: typer.Context,
    adapter: Annotated[str, typer.Argument(help="Folder or Hub id of the fine-tuned adapter.")],
    base: NeededBase,
    methods: Annotated[
        list[str],
        typer.Option(
            "--method",
            metavar="NAME[:KEY=VALUE,...]",
            help=f"Repeat for more. NAME: {', '.join(METHODS)}; or any name with settings.",
        ),
    ] = ["default"],  # noqa: B006  typer copies it
    controls: Annotated[
        list[str],
        typer.Option("--control", help="random, reset, scaled, transplant, benign, or none. Else the first three."),
    ] = ["random", "reset", "scaled"],  # noqa: B006
    seeds: Annotated[int, typer.Option(min=1, help="Seeds per method and control.")] = 1,
    reference: Reference = None,
    weak: Weak = None,
    patch: Patch = None,
    utility: Utility = None,
    calibration: Calibration = None,
    benign_data: Annotated[
        str | None, typer.Option(help="Benign rows with answers, for the control benign.", rich_help_panel="Data")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file for the comparison.")] = None,
    resume: Resume = None,
    safety: Safety = None,
    lookalike: Lookalike = None,
    benign: Benign = None,
    task: Task = None,
    limit: Limit = None,
    judge: JudgeName = REFUSES,
    harm_judge: HarmJudge = None,
    max_new_tokens: Tokens = MAX_NEW_TOKENS,
    batch_size: BatchSize = 16,
    template: Template = None,
    config_file: ConfigFile = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    tokenizer: TokenizerName = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Measure methods side by side on one adapter, each with the controls that may explain its effect.

    Example: peft-nlsr compare ./my-adapter --base org/model --utility train.jsonl --method two_teacher --method
    "strong:utility_weight=0.2" -o comparison.json
    """
    from .. import comparison

    require_file(output)
    opened = _opened(patch)
    chosen = [_method(ctx, text, reference, weak, opened) for text in methods]
    sources = (safety, lookalike, benign, task, limit)
    asked = asked_of(sources, judge, harm_judge, max_new_tokens, batch_size, template)
    rows, safety_rows = read_rows(utility), read_rows(calibration)
    loaded = load(ModelOptions(base, device, dtype, trust_remote_code, tokenizer), adapter)
    found = comparison.compare(
        loaded.model,
        chosen,
        controls=[name for name in controls if name != "none"],
        evaluation=asked,
        calibration=safety_rows,
        utility=rows,
        benign=read_rows(benign_data),
        tokenizer=loaded.tokenizer,
        seeds=range(seeds),
        resume=resume,
    )
    if output is not None:
        found.save(output)
    show(as_json, found.to_dict(), *([] if as_json else [found.to_terminal()]))
    given = _same(base, reference, weak, patch, utility, calibration)
    then = f"Next: {command('realign', adapter, *given, '-o', 'OUT')}"
    wrote(output, then) if output is not None else say(then)


def _method(
    ctx: typer.Context, text: str, reference: str | None, weak: str | None, patch: SafetyPatch | None
) -> Method:
    """A method from ``NAME`` or ``NAME:KEY=VALUE,...``."""
    from ..planning import Method

    name, separator, changes = text.partition(":")
    if not separator and name not in METHODS:
        usage_error(f"--method {name}: known are {', '.join(METHODS)}; or give settings, like {name}:update=sum")
    known = dict(METHODS.get(name, {}))
    preset = str(known.pop("preset", "default"))
    assignments = [f"{key}={value}" for key, value in known.items()] + [c for c in changes.split(",") if c]
    return Method(name, settings_of(ctx, preset, assignments), reference=reference, weak=weak, patch=patch)


def tune(
    ctx: typer.Context,
    adapter: Annotated[str, typer.Argument(help="Folder or Hub id of the fine-tuned adapter.")],
    base: NeededBase,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="New folder for the chosen settings.")] = None,
    space: Annotated[
        list[str],
        typer.Option(metavar="NAME=V1,V2,...", help="Values to try for a setting; repeat for more. Else a default."),
    ] = [],  # noqa: B006  typer copies it
    trials: Annotated[int, typer.Option(min=1, help="Settings that are tried, the default included.")] = 16,
    tolerance: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="How much worse a guarded metric may become.")
    ] = TOLERANCE,
    held_out: Annotated[float, typer.Option(help="Share of the prompts that the search does not see.")] = 0.5,
    searcher: Annotated[str, typer.Option(help="auto, optuna or grid.")] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Of the order of trials.")] = 0,
    reference: Reference = None,
    weak: Weak = None,
    patch: Patch = None,
    utility: Utility = None,
    calibration: Calibration = None,
    resume: Resume = None,
    safety: Safety = None,
    lookalike: Lookalike = None,
    benign: Benign = None,
    task: Task = None,
    limit: Limit = None,
    judge: JudgeName = REFUSES,
    harm_judge: HarmJudge = None,
    max_new_tokens: Tokens = MAX_NEW_TOKENS,
    batch_size: BatchSize = 16,
    template: Template = None,
    preset: Preset = "default",
    settings: Settings = [],  # noqa: B006  typer copies it
    config_file: ConfigFile = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    tokenizer: TokenizerName = None,
    trust_remote_code: TrustRemoteCode = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Search the settings with the lowest harm rate that cost no more than the tolerance; figures on held-out prompts.

    Example: peft-nlsr tune ./my-adapter --base org/model --utility train.jsonl --resume tuning.json -o ./tuned
    """
    from .. import tuning
    from ..planning import Method

    config = settings_of(ctx, preset, settings)
    target = require_new(output, dry_run)
    values = {name: found for name, found in (_values(ctx, text, preset) for text in space)}
    sources = (safety, lookalike, benign, task, limit)
    asked = asked_of(sources, judge, harm_judge, max_new_tokens, batch_size, template)
    if target is None:
        _preview_tuning(values, config, trials, as_json)
        return
    rows, safety_rows = read_rows(utility), read_rows(calibration)
    loaded = load(ModelOptions(base, device, dtype, trust_remote_code, tokenizer), adapter)
    found = tuning.tune(
        loaded.model,
        base=Method("default", config, reference=reference, weak=weak, patch=_opened(patch)),
        space=values or None,
        trials=trials,
        tolerance=tolerance,
        held_out=held_out,
        searcher=searcher,
        evaluation=asked,
        calibration=safety_rows,
        utility=rows,
        tokenizer=loaded.tokenizer,
        seed=seed,
        resume=resume,
        output=target,
    )
    show(as_json, found.to_dict(), *_tuned(found))
    given = _same(base, reference, weak, patch, utility, calibration)
    wrote(target, f"Next: {command('realign', adapter, *given, '-c', target / 'nlsr_config.json', '-o', 'OUT')}")


def _same(
    base: str, reference: str | None, weak: str | None, patch: str | None, utility: str | None, calibration: str | None
) -> tuple[str | Path, ...]:
    """The options by which `realign` gets what was measured here; with a patch it takes no training data."""
    data = None if patch is not None else utility
    return given_flags(base=base, reference=reference, weak=weak, patch=patch, utility=data, calibration=calibration)


def _opened(patch: str | None) -> SafetyPatch | None:
    from ..patch import SafetyPatch

    return None if patch is None else SafetyPatch.from_pretrained(patch)


def _values(ctx: typer.Context, text: str, preset: str) -> tuple[str, list[Any]]:
    """A setting and the values to try, each checked and of the setting's type."""
    name, separator, values = text.partition("=")
    tried = [value.strip() for value in values.split(",") if value.strip()]
    if not separator or not tried:
        usage_error(f"--space {text}: expected NAME=VALUE,VALUE,..., like --space utility_weight=0.25,0.5,1")
    name = name.strip().replace("-", "_")
    return name, [getattr(settings_of(ctx, preset, [f"{name}={value}"]), name) for value in tried]


def _preview_tuning(values: Mapping[str, list[Any]], config: NLSRConfig, trials: int, as_json: bool) -> None:
    from ..tuning import default_space

    space = values or default_space(config)
    shown = {name: list(found) for name, found in space.items()}
    rows = ((name, ", ".join(map(str, found)), str(getattr(config, name))) for name, found in shown.items())
    result = {"space": shown, "trials": trials, "default": config.to_dict()}
    show(as_json, result, table(f"{trials} trials", "setting", "values", "default", rows=rows))
    say("Nothing was run (dry run).")


def _tuned(found: Tuning) -> list[Any]:
    """The figures on held-out prompts and the settings that differ from the default."""
    from ..report import metric, say_interval, say_value

    names = [n for n in found.held_out["fine-tuned"].rates if all(n in e.rates for e in found.held_out.values())]
    rows = (
        [metric(n).label, *(f"{say_value(e.rates[n])}\n{say_interval(e.rates[n])}" for e in found.held_out.values())]
        for n in names
    )
    default = found.trials[0].settings
    changed = [
        f"{n}={getattr(found.config, n)} (default {v})" for n, v in default.items() if getattr(found.config, n) != v
    ]
    said = f"chosen: {', '.join(changed)}" if changed else "chosen: the default settings, which nothing beat"
    refused = [trial for trial in found.trials if trial.refused is not None]
    if refused:
        said += (
            f"\nnote: {len(refused)} of {len(found.trials)} settings cannot be used here, first: {refused[0].refused}"
        )
    return [table("held-out prompts, value and 95% interval", "metric", *found.held_out, rows=rows), said]
