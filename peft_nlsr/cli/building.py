"""The commands that make what a repair is made from: safety patches, references, calibration statistics."""

from __future__ import annotations

import statistics
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .loading import ModelOptions, load, read_rows
from .options import (
    EPILOG,
    REFUSES,
    Base,
    Calibration,
    ConfigFile,
    Device,
    DryRun,
    Dtype,
    Json,
    JudgeName,
    NeededBase,
    Output,
    Preset,
    Settings,
    TokenizerName,
    TrustRemoteCode,
    Weak,
    command,
    judge_of,
    key_values,
    percent,
    refuse_unread,
    require_new,
    say,
    settings_of,
    show,
    table,
    usage_error,
    wrote,
)

if TYPE_CHECKING:
    from ..adapter_folder import AdapterFolder
    from ..config import NLSRConfig
    from ..patch import SafetyPatch

patch_app = typer.Typer(help="Build safety patches and look into them.", no_args_is_help=True)
reference_app = typer.Typer(help="Make safety references.", no_args_is_help=True)


@patch_app.command("build", epilog=EPILOG)
def build_patch(
    ctx: typer.Context,
    aligned: Annotated[str, typer.Argument(help="Folder or Hub id of the aligned adapter that users start from.")],
    base: Base = None,
    collected: Annotated[
        str | None, typer.Option("--statistics", help="Folder that `calibrate` wrote; then no base model is needed.")
    ] = None,
    output: Output = None,
    weak: Weak = None,
    calibration: Calibration = None,
    judge: JudgeName = REFUSES,
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
    """Build a safety patch: once per aligned adapter, then applied to every adapter trained from it.

    Example: peft-nlsr patch build ./aligned --base org/model -o ./patch
    """
    config = settings_of(ctx, preset, settings)
    target = require_new(output, dry_run, aligned, collected)
    _refuse_unread(ctx, base, collected, config)
    if base is not None and collected is None:
        from ..building import build_safety_patch

        loaded = load(ModelOptions(base, device, dtype, trust_remote_code, tokenizer), aligned)
        built = build_safety_patch(
            loaded.model,
            config,
            weak=weak,
            calibration=read_rows(calibration),
            tokenizer=loaded.tokenizer,
            judge=judge_of(judge),
        )
    else:
        built = _patch_from_files(aligned, collected, weak, config)
    _finish_patch(built, target, as_json)


def _refuse_unread(ctx: typer.Context, base: str | None, collected: str | None, config: NLSRConfig) -> None:
    from ..nlsr import UNCALIBRATED

    data, model = ("calibration", "judge"), ("device", "dtype", "tokenizer", "trust_remote_code")
    if collected is not None:
        refuse_unread(ctx, "--statistics leaves nothing for {} to do; leave it out", "base", *data, *model)
    if config.score in UNCALIBRATED:
        refuse_unread(ctx, f"score={config.score} needs no data, so leave out {{}}", *data)
    if base is None:
        refuse_unread(ctx, "{} needs the base model: give --base MODEL", *data, *model)


def _patch_from_files(aligned: str, collected: str | None, weak: str | None, config: NLSRConfig) -> SafetyPatch:
    from ..adapter_folder import open_adapter
    from ..building import amplified
    from ..calibration import SafetyStatistics
    from ..nlsr import UNCALIBRATED, build_nlsr_patch

    if collected is None and config.score not in UNCALIBRATED:
        usage_error(
            f"score={config.score} needs activations: give --base MODEL, or --statistics FOLDER from `calibrate`, or "
            f"--set score={UNCALIBRATED[0]}"
        )
    found = None if collected is None else SafetyStatistics.load(collected)
    return build_nlsr_patch(amplified(open_adapter(aligned), weak, config), found, config)


def _finish_patch(built: SafetyPatch, target: Path | None, as_json: bool) -> None:
    from ..storage import replace_folder

    if target is not None:
        replace_folder(target, built.save)
    show(as_json, built.record, *_described(built.record))
    if target is None:
        say("Nothing was written (dry run).")
    else:
        wrote(target, f"Next: {command('realign', 'ADAPTER', '--patch', target, '-o', 'OUT')}")


@patch_app.command("show", epilog=EPILOG)
def show_patch(
    patch: Annotated[str, typer.Argument(help="Folder or Hub id of a safety patch.")],
    as_json: Json = False,
) -> None:
    """Show what a safety patch holds.

    Example: peft-nlsr patch show ./patch
    """
    from ..patch import SafetyPatch

    record = SafetyPatch.from_pretrained(patch).record
    show(as_json, record, *_described(record))
    say(f"Next: {command('realign', 'ADAPTER', '--patch', patch, '-o', 'OUT')}")


def _described(record: dict[str, Any]) -> list[Any]:
    """A patch's record as two tables: what it is for, and its modules grouped by name without their layer."""
    from ..selection import block_of

    config = record["config"]
    modules = record["modules"]
    facts = {
        "base model": record.get("base_model") or "unknown (a local path)",
        "reference": record["reference"]["description"],
        "score": f"{config['score']}, sparsity {config['sparsity']}, preset {config['preset']}",
        "modules": len(modules),
        "cut of the sum": _cut(modules.values()),
        "ranks": ", ".join(map(str, sorted({g["rank"] for g in modules.values()}))),
    }
    kinds: dict[str, list[Any]] = {}
    for name, geometry in modules.items():
        kinds.setdefault(name.removeprefix(f"{block_of(name)}."), []).append(geometry)
    rows = ((kind, str(len(found)), _kept(found, "A"), _kept(found, "B")) for kind, found in kinds.items())
    columns = ("module", "layers", "entries of A kept", "of B kept")
    return [key_values("safety patch", facts), table("safety-critical entries", *columns, rows=rows)]


def _cut(geometries: Collection[Any]) -> str:
    """By what a sum is cut to the adapter's rank with this patch."""
    seen = sum(bool(geometry["inputs"]) for geometry in geometries)
    if seen == len(geometries):
        return "by what matters for the calibration inputs"
    return f"by size alone in {len(geometries) - seen} modules: the patch has no calibration inputs for them"


def _kept(geometries: list[Any], factor: str) -> str:
    sizes = [g["rank"] * g["shape"][1 if factor == "A" else 0] for g in geometries]
    return percent(sum(g[f"kept_{factor}"] for g in geometries) / sum(sizes))


@reference_app.command("extract", epilog=EPILOG)
def extract(
    aligned: Annotated[str, typer.Option(help="Folder or Hub id of the aligned (instruct, chat) model.")],
    base: Annotated[str, typer.Option(help="Folder or Hub id of the same model before alignment.")],
    output: Output = None,
    rank: Annotated[int, typer.Option(min=1, help="Directions kept per module; more capture more.")] = 64,
    modules: Annotated[
        list[str], typer.Option("--module", help="Name or end of a name, as in target_modules; repeat for more.")
    ] = ["all-linear"],  # noqa: B006  typer copies it
    resume: Annotated[
        bool, typer.Option(help="Go on with an interrupted run of the same models and settings.")
    ] = True,
    config_file: ConfigFile = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Extract what alignment changed, from two checkpoints, as a reference adapter.

    An interrupted run is kept beside the output and goes on when the command is given again.

    Example: peft-nlsr reference extract --aligned org/model-instruct --base org/model -o ./reference --rank 64
    """
    from ..checkpoints import extract_reference

    target = require_new(output, dry_run, aligned, base)
    if target is None:
        _preview_extraction(aligned, base, rank, modules, as_json)
        return
    record = extract_reference(aligned, base, target, rank=rank, modules=modules, resume=resume)
    captured = [module.captured for module in record.modules]
    worst = sorted(record.modules, key=lambda module: module.captured)[:5]
    rows = ((module.module, f"{module.norm:.3g}", percent(module.captured)) for module in worst)
    facts = f"{len(captured)} modules at rank {rank}; captured share: median {percent(statistics.median(captured))}"
    said = [facts, *(f"note: {note}" for note in record.notes)]
    show(as_json, record.to_dict(), *said, table("least captured", "module", "norm", "captured", rows=rows))
    wrote(target, f"Next: {command('realign', 'ADAPTER', '--base', base, '--reference', target, '-o', 'OUT')}")


def _preview_extraction(aligned: str, base: str, rank: int, modules: list[str], as_json: bool) -> None:
    from ..checkpoints import Checkpoint, pair_up, require_same_geometry

    pair = Checkpoint(aligned), Checkpoint(base)
    require_same_geometry(*pair)
    paired, notes = pair_up(*pair, modules)
    values = sum(rank * sum(pair[0][weight][1][:2]) for weight, _ in paired.values())
    said = f"{len(paired)} modules at rank {rank}, {values:,} values"
    result = {"modules": list(paired), "rank": rank, "values": values, "notes": list(notes)}
    show(as_json, result, said, *(f"note: {note}" for note in notes))
    say("Nothing was written (dry run).")


@reference_app.command("extrapolate", epilog=EPILOG)
def extrapolate_reference(
    strong: Annotated[str, typer.Argument(help="Folder or Hub id of the aligned adapter.")],
    output: Output = None,
    weak: Weak = None,
    beta: Annotated[float, typer.Option(min=0.0, help="Strength; 0 gives the aligned adapter itself.")] = 0.9,
    form: Annotated[str, typer.Option(help="exact, or released (both factors times 2 beta).")] = "exact",
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Amplify what an aligned adapter does: dW_e = (1 + beta) dW_strong - beta dW_weak.

    Example: peft-nlsr reference extrapolate ./aligned --weak ./sft -o ./amplified
    """
    from ..adapter_folder import open_adapter
    from ..claims import withdraw_copied
    from ..config import CHOICES
    from ..reference import extrapolate

    if form not in CHOICES["extrapolation"]:
        usage_error(f"--form {form} is not one of {', '.join(CHOICES['extrapolation'])}")
    target = require_new(output, dry_run, strong, weak)
    source: AdapterFolder | Any = open_adapter(strong)
    weaker = None if weak is None else open_adapter(weak)
    updates, errors = extrapolate(source, weaker, beta=beta, form=form)
    if target is not None:
        source.save_as(target, updates, finish=withdraw_copied)
    worst = max(errors, key=lambda name: errors[name])
    result = {"modules": len(updates), "beta": beta, "form": form, "truncation_errors": errors}
    said = f"{len(updates)} modules amplified with beta {beta} ({form}); largest truncation error {errors[worst]:.4f}"
    show(as_json, result, said)
    if target is None:
        say("Nothing was written (dry run).")
    else:
        build = command("patch", "build", target, "--base", "MODEL", "--set", "beta=0", "-o", "PATCH")
        wrote(target, f"Next: {build}")


def calibrate(
    ctx: typer.Context,
    aligned: Annotated[str, typer.Argument(help="Folder or Hub id of the aligned adapter.")],
    base: NeededBase,
    output: Output = None,
    calibration: Calibration = None,
    weak: Weak = None,
    judge: JudgeName = REFUSES,
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
    """Collect safety statistics of an aligned adapter, from which patches of any sparsity are built without a model.

    Example: peft-nlsr calibrate ./aligned --base org/model -o ./statistics
    """
    from ..building import collect_safety_statistics
    from ..storage import replace_folder

    config = settings_of(ctx, preset, settings)
    target = require_new(output, dry_run, aligned)
    loaded = load(ModelOptions(base, device, dtype, trust_remote_code, tokenizer), aligned)
    found = collect_safety_statistics(
        loaded.model,
        config,
        weak=weak,
        calibration=read_rows(calibration),
        tokenizer=loaded.tokenizer,
        judge=judge_of(judge),
    )
    if target is not None:
        replace_folder(target, found.save)
    tokens = [module.tokens for module in found.values()]
    known = {key: value for key, value in found.record.items() if value is not None and key != "schema_version"}
    facts = {key.replace("_", " "): value for key, value in known.items()} | {"modules": len(found)}
    facts["tokens per module"] = " to ".join(str(n) for n in sorted({min(tokens), max(tokens)}))
    result = {**found.record, "modules": {name: module.tokens for name, module in found.items()}}
    show(as_json, result, key_values("safety statistics", facts))
    if target is None:
        say("Nothing was written (dry run).")
    else:
        wrote(target, f"Next: {command('patch', 'build', aligned, '--statistics', target, '-o', 'PATCH')}")
