"""The safety model card: a section of README.md between two markers, and what the card's YAML says.

Made from the record and the report, never typed. The author's own text stays as it is, byte for byte; whatever comes
from data is escaped; no path of this machine, no prompt and no answer gets in.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import Any, cast
from urllib.parse import quote, unquote

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from .errors import CorruptFileError
from .evaluation import Evaluation
from .hub import is_hub_id
from .report import (
    SafetyReport,
    data_rows,
    effect_of,
    measured_names,
    metric,
    not_covered,
    reproduce,
    revert_advice,
    say_interval,
    say_n,
    say_test,
    say_value,
)

SCHEMA_VERSION = 1
TAGS = ("nlsr", "safety-realigned")
PICTURES = {
    "similarity_map.png": "Similarity to the safety reference, module by module",
    "change_norms.png": "Relative change of each module",
    "before_after.png": "Rates before and after, with 95% intervals",
    "pareto.png": "Harm against cost, controls included",
}
PICTURE_FILES = tuple(f"{name.removesuffix('.png')}.{kind}" for name in PICTURES for kind in ("png", "svg"))
_OURS = "peft-nlsr"  # dataset type of this section's results in the model index
_SAFETY = ("harm_rate", "refusal_rate")
_HEADLINES = {
    "improved": "Safety improved",
    "unclear": "Effect unclear",
    "worse": "Safety got worse",
    "unmeasured": "Not measured",
    "unchanged": "Checked and left as it was",
}
_CITATION = """@inproceedings{yi2025nlsr,
  title = {{NLSR}: Neuron-Level Safety Realignment of Large Language Models Against Harmful Fine-Tuning},
  author = {Yi, Xin and Zheng, Shunfan and Wang, Linlin and de Melo, Gerard and Wang, Xiaoling and He, Liang},
  booktitle = {Proceedings of the AAAI Conference on Artificial Intelligence},
  year = {2025},
  note = {arXiv:2412.12497}
}"""
_MARKER = re.compile(r"^<!-- nlsr:(begin|end)(?: ([^\s>]+))? -->[ \t]*\r?$", re.MULTILINE)


def card_section(record: dict[str, Any], report: SafetyReport | None, *, plots: Sequence[str] = ()) -> str:
    """The safety section in Markdown, markers included, without a line end at its end.

    Args:
        record: ``Realignment.to_dict()``.
        report: what was measured; None says plainly that nothing was.
        plots: names of the pictures beside the card, out of ``PICTURES``.
    """
    known = report or SafetyReport(record, {}, None, None)
    columns = [replace(e, label=at) for at, e in (("before", known.before), ("after", known.after)) if e is not None]
    names = [name for name in measured_names(known) if any(name in evaluation.rates for evaluation in columns)]
    text = _template().render(
        record=record,
        report=known,
        effect=effect_of(known),
        columns=columns,
        paired=len(columns) == 2,
        names=measured_names(known),
        groups=_groups(names),
        metric=metric,
        changed=_changed(record),
        sets={p["sha256"]: p for evaluation in columns for p in evaluation.prompt_sets}.values(),
        harm=None if known.after is None else known.after.rates.get("harm_rate"),
        plots=[{"file": Markup(name), "alt": PICTURES[name]} for name in plots],
        data=data_rows(known),
        not_covered=[*not_covered(known), *(f"{note[:1].upper()}{note[1:].rstrip('.')}." for note in record["notes"])],
        code=None if report is None else reproduce(known),
        revert=revert_advice(known),
        citation=_CITATION,
    )
    begin, end = (_marker(side, record["adapter_name"]) for side in ("begin", "end"))
    body = re.sub(r"\n{3,}", "\n\n", text).strip()
    return f"{begin}\n{body}\n{end}"


def update_card(
    readme: str | None,
    *,
    record: dict[str, Any],
    report: SafetyReport | None,
    base_model: str | None,
    plots: Sequence[str] = (),
) -> str:
    """The whole README with the section of this record put in, in place of an earlier one or at the end, and the YAML.

    Doing it twice gives the same text. In the YAML only what this package owns is changed, and ``base_model`` with its
    tags is dropped where it is not a Hub id.

    Args:
        readme: the present text; None when there is none.
        base_model: Hub id of the base model; None keeps what the YAML says, if that is a Hub id.

    Raises:
        CorruptFileError: YAML that cannot be read, or a marker without its other half; the text says what to mend.
    """
    text = readme or ""
    card = parsed_card(text)
    _claim_in(cast(ModelCardData, card.data), record, report, base_model)
    line_end = "\r\n" if "\r\n" in text else "\n"
    section = card_section(record, report, plots=plots).replace("\n", line_end)
    card.text = _with_section(card.text, section, record["adapter_name"], line_end)
    return str(card)


def stale_card(readme: str, *, adapter_name: str | None = None) -> str:
    """The README without the section, tags and results that :func:`update_card` put in.

    Args:
        readme: the present text. Text without a section or claim comes back as it is, and so does YAML that cannot be
            read, from whose text only the section is taken.
        adapter_name: only the section of this adapter; None takes out all. Tags go with the last section.

    Raises:
        CorruptFileError: a marker without its other half.
    """
    spans = [span for span in _sections(readme) if adapter_name in (None, span.adapter_name)]
    text = _without(readme, spans)
    try:
        card = parsed_card(text)
    except CorruptFileError:
        return text
    data = cast(ModelCardData, card.data)
    return str(card) if _withdraw_in(data, adapter_name, last=not _sections(text)) else text


def _marker(side: str, adapter_name: str) -> str:
    name = "" if adapter_name == "default" else f" {quote(adapter_name, safe='')}"
    return f"<!-- nlsr:{side}{name} -->"


@dataclass(frozen=True)
class _Span:
    """Where the section of an adapter stands in a text."""

    adapter_name: str
    start: int
    stop: int


def _sections(text: str) -> list[_Span]:
    """All sections, in order; markers have to come in pairs."""
    markers = list(_MARKER.finditer(text))
    for place, marker in enumerate(markers):
        expected = "end" if place % 2 else "begin"
        if marker[1] != expected or (place % 2 and marker[2] != markers[place - 1][2]):
            raise _half_marker(text, marker)
    if len(markers) % 2:
        raise _half_marker(text, markers[-1])
    return [
        _Span(unquote(begin[2] or "default"), begin.start(), end.end() - end[0].endswith("\r"))
        for begin, end in zip(markers[::2], markers[1::2], strict=True)
    ]


def _half_marker(text: str, marker: re.Match[str]) -> CorruptFileError:
    line = text.count("\n", 0, marker.start()) + 1
    return CorruptFileError(
        f"README.md line {line}: the marker {marker[0].strip()!r} has no matching other half, so it is not clear "
        "where the safety section ends; delete the marker and the section, and write the card again"
    )


def _with_section(text: str, section: str, adapter_name: str, line_end: str) -> str:
    """The text with the section in the place of the first of this adapter, or at the end."""
    mine = [span for span in _sections(text) if span.adapter_name == adapter_name]
    if not mine:
        return f"{text}{line_end}{section}{line_end}"
    text = _without(text, mine[1:])
    return text[: mine[0].start] + section + text[mine[0].stop :]


def _without(text: str, spans: Sequence[_Span]) -> str:
    """The text without these sections and the line ends that :func:`update_card` put around them."""
    for span in reversed(spans):
        before = re.sub(r"\r?\n\Z", "", text[: span.start])
        text = before + re.sub(r"\A\r?\n", "", text[span.stop :])
    return text


def parsed_card(readme: str) -> ModelCard:
    """The card of a README; an empty YAML block stands in for a missing one."""
    try:
        return ModelCard(readme if REGEX_YAML_BLOCK.search(readme) else "---\n{}\n---\n" + readme)
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise CorruptFileError(
            f"the YAML at the top of README.md cannot be read ({' '.join(str(error).split())}); mend it, or remove "
            "the block between the two lines of ---"
        ) from error


def _tags(record: dict[str, Any]) -> tuple[str, ...]:
    """All tags for an adapter that was changed; one that was only checked is not realigned."""
    return TAGS if any(module["restored"] for module in record["modules"]) else TAGS[:1]


def _claim_in(data: ModelCardData, record: dict[str, Any], report: SafetyReport | None, base: str | None) -> None:
    """Put into the YAML what this package owns, and take out what names a place on this machine."""
    found = data.base_model if isinstance(data.base_model, list) else [data.base_model]
    bases = [name for name in ([base] if is_hub_id(base) else found) if isinstance(name, str) and is_hub_id(name)]
    data.library_name = "peft"
    data.base_model = bases if len(bases) > 1 else next(iter(bases), None)
    data["base_model_relation"] = "adapter" if bases else None
    data.tags = list(dict.fromkeys([*(tag for tag in data.tags or () if not is_tag_of_path(tag)), *_tags(record)]))
    data["nlsr"] = _mapping(data.get("nlsr"), record)
    if results := [*_results_of_others(data), *_results(report)]:
        data.eval_results = results
        data.model_name = data.model_name or (f"{bases[0].split('/')[-1]} adapter" if bases else "LoRA adapter")


def is_tag_of_path(tag: Any) -> bool:
    match = re.match(r"base_model:(?:adapter:|finetune:|merge:|quantized:)?(.*)", str(tag), re.DOTALL)
    return match is not None and not is_hub_id(match[1])


def _mapping(found: Any, record: dict[str, Any]) -> dict[str, Any]:
    """The ``nlsr`` mapping: the default adapter's values, and those of named adapters under ``adapters``."""
    kept = dict(found) if isinstance(found, dict) else {}
    values = {"method": record["method"], "preset": record["preset"], "fingerprint": record["fingerprint_after"]}
    if record["adapter_name"] != "default":
        values = {"adapters": {**kept.get("adapters", {}), record["adapter_name"]: values}}
    return {**kept, "schema_version": SCHEMA_VERSION, **values}


def _results(report: SafetyReport | None) -> list[EvalResult]:
    """The rates after the change, for the model index."""
    if report is None or report.after is None:
        return []
    prompts = ", ".join(p["name"] for p in report.after.prompt_sets) or "prompts of its user"
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=_OURS,
            dataset_name=prompts,
            metric_type=name,
            metric_name=f"{metric(name).label} (95% interval {say_interval(rate)}, {say_n(rate)})",
            metric_value=rate.value,
            metric_args={"n": rate.n, "low": rate.low, "high": rate.high},
        )
        for name, rate in report.after.rates.items()
        if all(math.isfinite(number) for number in (rate.value, rate.low, rate.high))
    ]


def _results_of_others(data: ModelCardData) -> list[EvalResult]:
    return [result for result in data.eval_results or () if result.dataset_type != _OURS]


def _withdraw_in(data: ModelCardData, adapter_name: str | None, *, last: bool) -> bool:
    """Take the claim on one adapter, or with the last one everything, out of the YAML; whether anything changed."""
    before = data.to_dict()
    found = data.pop("nlsr")
    if not last and isinstance(found, dict):
        gone = {"method", "preset", "fingerprint"} if adapter_name == "default" else set()
        adapters = {name: v for name, v in found.get("adapters", {}).items() if name != adapter_name}
        data["nlsr"] = {key: v for key, v in {**found, "adapters": adapters}.items() if key not in gone and v}
    if last:
        data.tags = [tag for tag in data.tags or () if tag not in TAGS] or None
        if data.eval_results is not None and len(others := _results_of_others(data)) < len(data.eval_results):
            data.eval_results, data.model_name = (others, data.model_name) if others else (None, None)
    return bool(data.to_dict() != before)


@cache
def _template() -> Template:
    """The section's template; what it prints is escaped unless a filter made it Markdown."""
    environment = Environment(
        autoescape=True, finalize=_finalized, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(value=say_value, interval=say_interval, count=say_n, test=say_test, judges=_judges)
    environment.filters.update(code=_code, fenced=_fenced, headline=_HEADLINES.__getitem__)
    return environment.from_string((resources.files("peft_nlsr") / "data" / "safety_card.md.jinja").read_text("utf-8"))


def _finalized(value: Any) -> Markup:
    return value if isinstance(value, Markup) else escaped(str(value))


_ENTITIES = {"\\": "&#92;", "&": "&amp;", "<": "&lt;", ">": "&gt;", "$": "&#36;", "@": "&#64;"}


def escaped(text: str) -> Markup:
    """One line of Markdown that shows ``text`` as it is: no links, no markup, no HTML, no formulas, no table cells."""
    line = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    line = re.sub(r"[\\&<>$@]", lambda match: _ENTITIES[match[0]], line)
    line = re.sub(r"([`*_\[\]|~])", r"\\\1", line)
    line = line.replace("://", "&#58;//").replace("www.", "www&#46;")
    return Markup(re.sub(r"^([#+=-]|\d+(?=[.)](?: |$)))", lambda m: f"&#{ord(m[0][0])};{m[0][1:]}", line))


def _code(value: str) -> Markup:
    """A code span, or escaped text where the value holds what could end one."""
    return Markup(f"`{value}`") if re.fullmatch(r"[\w./:,+ -]+", str(value)) else escaped(str(value))


def _fenced(text: str, language: str) -> Markup:
    return Markup(f"```{language}\n{text.replace('```', chr(39) * 3)}\n```")


def _judges(evaluations: Sequence[Evaluation]) -> str:
    names = dict.fromkeys(judge for evaluation in evaluations for judge in evaluation.judges)
    return ", ".join(names) or "an unnamed judge"


def _groups(names: Sequence[str]) -> dict[str, list[str]]:
    """The metrics by the section in which they stand."""
    utility = [name for name in names if name not in (*_SAFETY, "over_refusal")]
    safety, refusal = ([n for n in names if n in group] for group in (_SAFETY, ("over_refusal",)))
    return {"safety": safety, "over_refusal": refusal, "utility": utility}


def _changed(record: dict[str, Any]) -> dict[str, Any]:
    restored = [module for module in record["modules"] if module["restored"]]
    sizes = [m["relative_change"] for m in restored if m["relative_change"] is not None]
    return {
        "count": len(restored),
        "relative": _spread(sizes),
        "cut": _spread([module["truncation_error"] for module in restored]),
    }


def _spread(values: Sequence[float]) -> str:
    return f"median {statistics.median(values):.3g}, largest {max(values):.3g}" if values else "none"
