"""The commands that measure one model, and show what was measured: evaluate and report."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..defaults import MAX_NEW_TOKENS
from .asking import (
    BatchSize,
    Benign,
    HarmJudge,
    Limit,
    Lookalike,
    Safety,
    Seen,
    Task,
    Template,
    Tokens,
    asked_of,
)
from .loading import ModelOptions, load, read_rows
from .options import (
    REFUSES,
    ConfigFile,
    Device,
    Dtype,
    Json,
    JudgeName,
    NeededBase,
    TokenizerName,
    TrustRemoteCode,
    UnmetError,
    command,
    judge_of,
    require_file,
    say,
    show,
    table,
    usage_error,
    write_new_text,
    wrote,
)

if TYPE_CHECKING:
    from ..evaluation import Evaluation
    from ..measuring import EvaluationSettings
    from ..report import SafetyReport


def evaluate(
    base: NeededBase,
    adapter: Annotated[
        str | None, typer.Argument(help="Folder or Hub id of an adapter; without one the base model answers.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file for the evaluation.")] = None,
    label: Annotated[str | None, typer.Option(help="Of the model in reports; else the adapter's name.")] = None,
    require: Annotated[
        list[str],
        typer.Option(metavar="METRIC<=NUMBER", help="Exit with 3 unless it holds, like harm_rate<=0.05; repeatable."),
    ] = [],  # noqa: B006  typer copies it
    safety: Safety = None,
    lookalike: Lookalike = None,
    benign: Benign = None,
    task: Task = None,
    limit: Limit = None,
    seen: Seen = [],  # noqa: B006  typer copies it
    judge: JudgeName = REFUSES,
    harm_judge: HarmJudge = None,
    second_harm_judge: HarmJudge = None,
    max_new_tokens: Tokens = MAX_NEW_TOKENS,
    batch_size: BatchSize = 16,
    template: Template = None,
    resume: Annotated[
        Path | None, typer.Option(help="JSONL file for finished answers, to go on after Ctrl-C. Holds model output.")
    ] = None,
    config_file: ConfigFile = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    tokenizer: TokenizerName = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Measure harm, refusals, over-refusal, coherence and task accuracy of a model, each with its 95% interval.

    Example: peft-nlsr evaluate ./my-adapter --base org/model -o before.json --require "harm_rate<=0.05"
    """
    from .. import evaluation

    require_file(output)
    limits = [_limit(text) for text in require]
    sources = (safety, lookalike, benign, task, limit)
    asked = asked_of(sources, judge, harm_judge, max_new_tokens, batch_size, template)
    _require_measured(limits, asked, second_harm_judge is not None)
    second = None if second_harm_judge is None else judge_of(second_harm_judge)
    used = [row for source in seen for row in read_rows(source)]
    loaded = load(ModelOptions(base, device, dtype, trust_remote_code, tokenizer), adapter)
    found = evaluation.evaluate(
        loaded.model,
        loaded.tokenizer,
        label=label or Path(adapter or base).name,
        prompts=asked.prompts,
        judge=asked.judge,
        harm_judge=asked.harm_judge,
        second_harm_judge=second,
        task=asked.task,
        seen=used if seen else None,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        template=template,
        resume=resume,
    )
    if output is not None:
        write_new_text(output, json.dumps(found.to_dict(), indent=2, sort_keys=True) + "\n")
    show(as_json, found.to_dict(), *_rates(found))
    if output is not None:
        wrote(output, f"Next: {command('report', 'REALIGNED', '--before', output, '--after', 'AFTER.json')}")
    _require(limits, found)


def _rates(found: Evaluation) -> list[Any]:
    from ..report import metric, say_interval, say_n, say_value

    rows = (
        (metric(name).label, say_value(rate), say_interval(rate), say_n(rate)) for name, rate in found.rates.items()
    )
    sets = ", ".join(f"{each['n']} {each['kind']}" for each in found.prompt_sets)
    title = f"{found.label}: {sets} prompts"
    said = [f"judge of {judge}" for judge in found.judges]
    cut = found.settings["answers_cut"]
    said += [f"note: {cut} answers were cut at {found.settings['max_new_tokens']} tokens"] if cut else []
    return [table(title, "metric", "value", "95% interval", "count", rows=rows), "\n".join(said)]


_Limit = tuple[str, str, float]
_LIMIT = re.compile(r"\s*(\w+)\s*(<=|>=)\s*([0-9.eE+-]+)\s*")


def _limit(text: str) -> _Limit:
    """Metric, direction and number of a ``--require``."""
    found = _LIMIT.fullmatch(text)
    try:
        if found is not None:
            return found[1], found[2], float(found[3])
    except ValueError:
        pass
    usage_error(f"--require {text!r}: expected METRIC<=NUMBER or METRIC>=NUMBER, like 'harm_rate<=0.05'")


def _require_measured(limits: list[_Limit], asked: EvaluationSettings, second: bool) -> None:
    """Every metric that something is required of will be measured, said before the model is loaded."""
    from ..evaluation import metrics_of

    known = metrics_of({each.kind for each in asked.all_sets()}, second=second)
    for name, _, _ in limits:
        if name not in known:
            usage_error(f"--require {name}: will not be measured; with these prompts there are {', '.join(known)}")


def _require(limits: list[_Limit], found: Evaluation) -> None:
    broken = []
    for name, direction, number in limits:
        value = found.rates[name].value
        if value > number if direction == "<=" else value < number:
            broken.append(f"{name} is {value:.3f}, required {direction} {number:g}")
    if broken:
        raise UnmetError("; ".join(broken))


def report(
    adapter: Annotated[Path, typer.Argument(help="Folder of a realigned adapter.")],
    before: Annotated[Path | None, typer.Option(help="Evaluation of the adapter before, from `evaluate -o`.")] = None,
    after: Annotated[Path | None, typer.Option(help="Evaluation of the realigned adapter, the same way.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write one self-contained page.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Folder for the pictures, as PNG and SVG.")] = None,
    save: Annotated[
        bool, typer.Option("--save", help="Keep --before and --after as the adapter's report, and in its card.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show what a realignment changed and what was measured, in the terminal, as a page, as pictures.

    Example: peft-nlsr report ./my-adapter-realigned --html report.html --plots ./plots
    """
    from ..report import to_terminal

    found = _report_of(adapter, before, after)
    if save and before is None and after is None:
        usage_error("--save keeps new evaluations: give --before and --after")
    page = None if html is None else _page(found)
    if save:
        card = _save_report(adapter, found)
        say(f"Wrote {adapter / 'safety_report.json'}{' and the card' if card else '; the card was left as it is'}.")
    if html is not None and page is not None:
        write_new_text(html, page)
        say(f"Wrote {html}.")
    if plots is not None:
        from ..plots import save_plots

        say(f"Wrote {', '.join(save_plots(found, plots))} to {plots}.")
    show(as_json, found.to_dict(), *([] if as_json else [to_terminal(found)]))
    say(f"Next: {command('verify', adapter)}")


def _page(found: SafetyReport) -> str:
    from ..plots import to_html

    return to_html(found)


def _report_of(adapter: Path, before: Path | None, after: Path | None) -> SafetyReport:
    """The folder's report with the given evaluations in it; one of the record alone where there is none."""
    from ..adapter_folder import AdapterFolder
    from ..claims import Claim
    from ..config import CONFIG_NAME
    from ..errors import PeftNLSRError
    from ..report import SafetyReport

    if not adapter.is_dir():
        raise PeftNLSRError(f"{adapter} is not a folder; give the folder of a realigned adapter")
    claim = Claim.read(adapter)
    if claim is None:
        raise PeftNLSRError(f"{adapter} holds no record of a realignment ({CONFIG_NAME}); realign the adapter first")
    claim = claim.about(AdapterFolder(adapter)) or claim  # the saved form may have another dtype, and fingerprint
    found = claim.report or SafetyReport(claim.record, claim.config, None, None)
    given = {"before": before, "after": after}
    read = {side: (path, _evaluation(path)) for side, path in given.items() if path is not None}
    for side, (path, evaluation) in read.items():
        _require_of(side, path, evaluation, claim.record)
    return replace(found, **{side: evaluation for side, (_, evaluation) in read.items()})


def _require_of(side: str, path: Path, evaluation: Evaluation, record: dict[str, Any]) -> None:
    """Raise IncompatibleError unless the evaluation is of the adapter on that side of the realignment."""
    from ..errors import IncompatibleError

    expected, found = record[f"fingerprint_{side}"], evaluation.settings.get("fingerprint")
    if found == expected:
        return
    other = "after" if side == "before" else "before"
    if found == record[f"fingerprint_{other}"]:
        of_what = f"the adapter {other} the realignment; exchange --before and --after"
    else:
        of_what = f"adapter {found}" if found else "no adapter that it names (the base model, or an older file?)"
        of_what += f", expected {expected}; write it with: peft-nlsr evaluate ADAPTER -o {path}"
    raise IncompatibleError(f"--{side} {path} is an evaluation of {of_what}")


def _evaluation(path: Path) -> Any:
    from ..errors import CorruptFileError, PeftNLSRError
    from ..evaluation import Evaluation
    from ..files import read_json

    if not path.is_file():
        raise PeftNLSRError(f"the evaluation {path} does not exist; write one with: peft-nlsr evaluate ... -o {path}")
    try:
        return Evaluation.from_dict(read_json(path))
    except (KeyError, TypeError, AttributeError) as error:
        raise CorruptFileError(
            f"{path} is no evaluation ({error!r}); write it again with: peft-nlsr evaluate"
        ) from error


def _save_report(adapter: Path, found: SafetyReport) -> bool:
    """Put a report beside the weights that it is about, and into their card; whether the card could be written.

    Raises:
        PeftNLSRError: the weights are not those of the record.
    """
    from ..adapter_folder import AdapterFolder
    from ..claims import Claim, readme_of, write_claim
    from ..errors import PeftNLSRError

    claim = Claim.read(adapter)
    true = None if claim is None else claim.about(AdapterFolder(adapter))
    if true is None:
        raise PeftNLSRError(f"the weights in {adapter} are not those of its record, so no report was written")
    readme = readme_of(adapter, true.record["adapter_name"])
    return write_claim(adapter, replace(true, report=replace(found, record=true.record)), readme)
