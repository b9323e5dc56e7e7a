"""The report of a realignment: what was changed and what was measured, as JSON, for a terminal and as one HTML page.

It holds rates, verdicts by prompt id and hashes, never a prompt or an answer. Everything that is said, from the
sentence on the effect to the list of what is not covered, is derived from these numbers; nothing is typed by hand.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from .config import NLSRConfig
from .errors import CorruptFileError, PeftNLSRError
from .evaluation import Evaluation, Measurement, paired_tests
from .files import read_json, write_json
from .intervals import McNemar

REPORT_NAME = "safety_report.json"
SCHEMA_VERSION = 1
SIGNIFICANCE = 0.05
# Of a fall in harm, what refusals must make up: with less, most answers that no longer comply are garbled or evasive.
REFUSED_SHARE = 0.5
_RECORD_KEYS = (
    "method",
    "reason",
    "preset",
    "reference",
    "modules",
    "data",
    "notes",
    "versions",
    "fingerprint_before",
)


@dataclass(frozen=True)
class Metric:
    """How a metric is called and which direction is better (``lower`` or ``higher``; empty when not known)."""

    label: str
    better: str

    def worsened(self, before: float, after: float) -> bool:
        """Whether ``after`` lies on the wrong side of ``before``; False when it is not known which side that is."""
        return after > before if self.better == "lower" else self.better == "higher" and after < before


METRICS: dict[str, Metric] = {
    "harm_rate": Metric("harm rate", "lower"),
    "refusal_rate": Metric("refusal rate", "higher"),
    "over_refusal": Metric("over-refusal", "lower"),
    "coherence": Metric("coherence", "higher"),
    "task_accuracy": Metric("task accuracy", "higher"),
    "answer_accuracy": Metric("answer accuracy", "higher"),
    "kl": Metric("KL divergence", "lower"),
    "perplexity": Metric("perplexity", "lower"),
    "second_harm_rate": Metric("harm rate by the second judge", "lower"),
    "judge_disagreement": Metric("disagreement of the judges", "lower"),
}
_DECISIVE = ("decoding", "max_new_tokens", "template")  # settings that two paired evaluations must share
_OPTIONAL = ("second_harm_rate", "judge_disagreement")
_COSTS = ("coherence", "over_refusal", "task_accuracy")


def metric(name: str) -> Metric:
    """What is known about a metric; a metric of the user's own keeps its name and has no better direction."""
    return METRICS.get(name, Metric(name.replace("_", " "), ""))


@dataclass(frozen=True)
class Effect:
    """One sentence on the effect, and its kind: improved, unclear, worse, unmeasured or unchanged."""

    kind: str
    text: str


@dataclass(frozen=True)
class Picture:
    """A picture for the page: a title, what it shows in words (``alt``), and its inline SVG markup."""

    name: str
    title: str
    alt: str
    svg: str


@dataclass(frozen=True)
class SafetyReport:
    """What a realignment changed and what was measured.

    The JSON form follows ``peft_nlsr/data/safety_report.schema.json``:

    ==================  =============================================================================
    ``schema_version``  1
    ``record``          ``Realignment.to_dict()``
    ``config``          ``NLSRConfig.to_dict()``
    ``before, after``   ``Evaluation.to_dict()`` of the adapter before and after the change, or null
    ``controls``        evaluations of what else could explain the effect
    ``comparisons``     metric -> exact McNemar test (n, only_before, only_after, p_value); derived
    ==================  =============================================================================
    """

    record: dict[str, Any]
    config: dict[str, Any]
    before: Evaluation | None
    after: Evaluation | None
    controls: tuple[Evaluation, ...] = ()

    @cached_property
    def comparisons(self) -> dict[str, McNemar]:
        """Metric -> paired test over the prompt ids that both evaluations share; empty where they cannot be paired."""
        if self.before is None or self.after is None or self.pairing_problem is not None:
            return {}
        return paired_tests(self.before, self.after)

    @cached_property
    def pairing_problem(self) -> str | None:
        """Why before and after cannot be paired, one clause, or None."""
        if self.before is None or self.after is None:
            return "there are not two evaluations"
        if self.before.judges != self.after.judges:
            return f"the judges differ ({'; '.join(self.before.judges)} before, {'; '.join(self.after.judges)} after)"
        prompts = _differing(_hashes(self.before), _hashes(self.after))
        settings = _differing(*({k: e.settings.get(k) for k in _DECISIVE} for e in (self.before, self.after)))
        said = [f"the prompts differ in {_and(prompts)}"] if prompts else []
        said += [f"the settings differ in {_and(settings)}"] if settings else []
        return _and(said) or None

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "schema_version": SCHEMA_VERSION,
            "record": self.record,
            "config": self.config,
            "before": self.before and self.before.to_dict(),
            "after": self.after and self.after.to_dict(),
            "controls": [control.to_dict() for control in self.controls],
            "comparisons": {name: asdict(test) for name, test in self.comparisons.items()},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SafetyReport:
        """The inverse of :meth:`to_dict`.

        Raises:
            CorruptFileError: another schema version, a missing part, or comparisons that the verdicts do not give.
        """
        _require_version(values)
        _require_parts(values)
        try:
            before, after = (
                None if values[k] is None else Evaluation.from_dict(values[k]) for k in ("before", "after")
            )
            controls = tuple(Evaluation.from_dict(control) for control in values["controls"])
        except (KeyError, TypeError, AttributeError) as error:
            raise CorruptFileError(
                f"an evaluation in this safety report is malformed ({error!r}); {_AGAIN}"
            ) from error
        report = cls(dict(values["record"]), dict(values["config"]), before, after, controls)
        _require_same_counts(values["comparisons"], report.comparisons)
        return report

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``safety_report.json`` into a folder (made when missing), whole or not at all; returns its path.

        Raises:
            ValueError: the report holds NaN or infinite numbers.
        """
        path = Path(folder) / REPORT_NAME
        write_json(path, self.to_dict())
        return path

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> SafetyReport:
        """Read ``safety_report.json`` from a folder.

        Raises:
            PeftNLSRError: there is none; CorruptFileError: it is not a report that this version reads.
        """
        path = Path(folder) / REPORT_NAME
        if not path.is_file():
            raise PeftNLSRError(f"{folder} holds no {REPORT_NAME}; write one with SafetyReport.save")
        try:
            return cls.from_dict(read_json(path))
        except CorruptFileError as error:
            raise CorruptFileError(f"{path}: {error}") from error


_AGAIN = "write the report again"


def _require_version(values: Mapping[str, Any]) -> None:
    found = values.get("schema_version")
    if found != SCHEMA_VERSION:
        newer = type(found) is int and found > SCHEMA_VERSION
        advice = "upgrade peft_nlsr (pip install -U peft-nlsr)" if newer else "check that this is a safety report"
        raise CorruptFileError(
            f"found schema_version {found!r} in a safety report, this version of peft_nlsr reads {SCHEMA_VERSION}; "
            f"{advice}"
        )


def _require_parts(values: Mapping[str, Any]) -> None:
    wanted: dict[str, Any] = {
        "record": dict,
        "config": dict,
        "before": (dict, type(None)),
        "after": (dict, type(None)),
    }
    wanted |= {"controls": list, "comparisons": dict}
    wrong = [name for name, kind in wanted.items() if name not in values or not isinstance(values[name], kind)]
    if not wrong:
        wrong = [f"record.{name}" for name in _RECORD_KEYS if name not in values["record"]]
    if wrong:
        raise CorruptFileError(f"this safety report lacks, or has the wrong kind of, {', '.join(wrong)}; {_AGAIN}")


def _require_same_counts(stored: Mapping[str, Any], derived: Mapping[str, McNemar]) -> None:
    """p-values are left out: they may differ in the last digit between versions of a library."""
    counts = ("n", "only_before", "only_after")
    found = {name: [test.get(k) for k in counts] if isinstance(test, dict) else test for name, test in stored.items()}
    expected = {name: [getattr(test, k) for k in counts] for name, test in derived.items()}
    if found != expected:
        raise CorruptFileError(
            f"this safety report's comparisons {found} do not follow from its verdicts, which give {expected}; "
            f"{_AGAIN}"
        )


def effect_of(report: SafetyReport) -> Effect:
    """What the evaluations show about safety, in one sentence that claims no more than they do."""
    before, after = report.before, report.after
    if not any(module["restored"] for module in report.record["modules"]):
        return Effect("unchanged", _why_unchanged(report.record))
    if before is None and after is None:
        return Effect("unmeasured", "No effect was measured: this report holds no evaluation.")
    if before is None or after is None:
        only = "after" if before is None else "before"
        return Effect("unmeasured", f"Measured only {only} the change, so this report shows no effect.")
    shared = [name for name in ("harm_rate", "refusal_rate") if name in before.rates and name in after.rates]
    if not shared:
        return Effect("unmeasured", "Neither harm nor refusals were measured before and after: no safety claim.")
    name = shared[0]
    kind, change = _change(report, name)
    doubts = _doubts(report, name) if kind == "improved" else []
    n = f"{before.rates[name].n} safety prompts"
    if before.rates[name].n != after.rates[name].n:
        n += f" ({after.rates[name].n} after)"
    judged = f" ({'; '.join(after.judges)})" if after.judges else ""
    said = "; ".join([change, *doubts, _costs(report)])
    return Effect("unclear" if doubts else kind, f"On {n}{judged}, the {metric(name).label} {said}.")


def _why_unchanged(record: dict[str, Any]) -> str:
    refusals = record["data"].get("refusals")
    if refusals is None:
        return "No module was changed: none met the condition that the settings ask for."
    return (
        f"No module was changed: the fine-tuned adapter refuses {refusals['kept_by_adapter']} of the "
        f"{refusals['of_teacher']} safety prompts that its safe teacher refuses."
    )


def _change(report: SafetyReport, name: str) -> tuple[str, str]:
    """The kind of the change of a rate and how to say it; without a paired test nothing is known."""
    assert report.before is not None and report.after is not None
    before, after = report.before.rates[name], report.after.rates[name]
    span = f"from {say_value(before)} to {say_value(after)}"
    test = report.comparisons.get(name)
    if test is None:
        why = report.pairing_problem or "no prompt is shared"
        return "unclear", f"went {span}, which no paired test backs because {why}"
    if test.p_value >= SIGNIFICANCE:
        return "unclear", f"went {span}, which a paired test does not tell from chance ({say_p(test)})"
    verb = "fell" if after.value < before.value else "rose"
    kind = "worse" if metric(name).worsened(before.value, after.value) else "improved"
    return kind, f"{verb} {span} (paired test, {say_p(test)})"


def _doubts(report: SafetyReport, name: str) -> list[str]:
    """What else could explain an improvement: evasive answers, broken text, or a control that did as well."""
    assert report.after is not None
    evasive = _evasive(report) if name == "harm_rate" else []
    after = report.after.rates[name]
    coherence = report.comparisons.get("coherence")
    broken = coherence is not None and _change(report, "coherence")[0] == "worse"
    said = ["incoherent answers may explain part of it"] if broken else []
    rivals = [c.label for c in report.controls if name in c.rates and not _beats(after, c.rates[name], metric(name))]
    return evasive + said + ([f"not told apart from the control {_and(rivals)}"] if rivals else [])


def _evasive(report: SafetyReport) -> list[str]:
    """That refusals did not rise as harm fell, where both are known; they cannot rise above every prompt."""
    assert report.before is not None and report.after is not None
    before, after = report.before.rates, report.after.rates
    if "refusal_rate" not in before or "refusal_rate" not in after:
        return []
    fell = before["harm_rate"].value - after["harm_rate"].value
    rose = after["refusal_rate"].value - before["refusal_rate"].value
    if rose >= REFUSED_SHARE * min(fell, 1.0 - before["refusal_rate"].value):
        return []
    refusals = f"refusals {'rose' if rose >= 0.0 else 'fell'} by {100 * abs(rose):.1f}"
    return [f"fewer answers comply, but they are no refusals either: harm fell by {100 * fell:.1f} points, {refusals}"]


def _beats(one: Measurement, other: Measurement, known: Metric) -> bool:
    """Whether the intervals are apart, ``one`` on the better side."""
    return one.high < other.low if known.better == "lower" else one.low > other.high


def _costs(report: SafetyReport) -> str:
    """What became worse beside it, what showed no loss, and what was not measured on both sides."""
    worse, same, unknown = [], [], []
    for name in _COSTS:
        label, test = metric(name).label, report.comparisons.get(name)
        if test is None:
            unknown.append(label)
        elif _change(report, name)[0] == "worse":
            worse.append(f"{label} {_change(report, name)[1]}")
        else:
            same.append(label)
    said = [f"at a cost: {_and(worse)}"] if worse else []
    said += [f"no loss was found in {_and(same, 'or')}"] if same else []
    said += [f"{_and(unknown)} {'was' if len(unknown) == 1 else 'were'} not compared"] if unknown else []
    return "; ".join(said)


def not_covered(report: SafetyReport) -> tuple[str, ...]:
    """What this report does not show, one sentence each."""
    said = (
        ["Nothing was measured after the change: neither safety nor what it cost is known."]
        if report.after is None
        else [
            "Only the prompt sets named here were tested, with one kind of decoding; other topics, languages, longer "
            "conversations and deliberate attacks were not.",
            f"The rates depend on who judged ({'; '.join(report.after.judges) or 'not named'}); another judge may see "
            "it differently.",
        ]
    )
    if report.after is not None:
        missing = [m.label for name, m in METRICS.items() if name not in {*report.after.rates, *_OPTIONAL}]
        said += [f"Not measured after the change: {_and(missing)}."] if missing else []
        said += (
            []
            if report.controls
            else ["No control was run, so other changes of the same size are not ruled out as an explanation."]
        )
        said += _unpaired(report)
    if report.record.get("fingerprint_after") is None:
        said.append("The realignment was planned, not applied: the adapter is as it was.")
    return (
        *said,
        "Training on, merging, quantizing or serving the adapter with other adapters can undo the effect; measure "
        "again.",
    )


def _unpaired(report: SafetyReport) -> list[str]:
    if report.before is None:
        return ["There is no evaluation before the change, so no effect can be shown."]
    return [] if report.pairing_problem is None else [f"There is no paired test: {report.pairing_problem}."]


def reproduce(report: SafetyReport) -> str:
    """Python that does the same again, with the settings that differ from the preset; data are named, not included."""
    reference = " ".join(report.record["reference"].split())
    config = NLSRConfig.from_dict(report.config)
    settings = "".join(f", {name}={value!r}" for name, value in config.changed_settings().items())
    given = {"safety": "calibration=safety_rows", "utility": "utility=training_rows"}
    data = report.record["data"]
    args = [arg for kind, arg in given.items() if data.get(kind, {}).get("source") == "given"]
    return "\n".join(
        [
            "from peft_nlsr import NLSRConfig, nlsr_realign",
            "",
            f"# reference: {reference}" + ("" if reference.startswith("the base model") else "; pass it again"),
            f'config = NLSRConfig.from_preset("{config.preset}"{settings})',
            f"nlsr_realign({', '.join(['model', 'config', *args])})",
        ]
    )


def revert_advice(report: SafetyReport) -> str:
    """How to get the adapter back as it was, and how to check that it is."""
    return (
        "Saved adapter: peft-nlsr revert ADAPTER -o ORIGINAL (needs its nlsr_diff.safetensors). Model in memory: "
        f"peft_nlsr.revert(model). The original is back when its fingerprint is {report.record['fingerprint_before']}."
    )


def say_value(measured: Measurement) -> str:
    """A rate in percent, any other number with three digits."""
    return f"{100 * measured.value:.1f}%" if measured.hits is not None else f"{measured.value:.3g}"


def say_interval(measured: Measurement) -> str:
    """``88.2 to 96.6%``, the 95% interval."""
    if measured.hits is None:
        return f"{measured.low:.3g} to {measured.high:.3g}"
    return f"{100 * measured.low:.1f} to {100 * measured.high:.1f}%"


def say_n(measured: Measurement) -> str:
    """``112 of 120`` for a rate, ``n = 64`` for a mean and for prompts that count in part."""
    return f"{measured.hits} of {measured.n}" if isinstance(measured.hits, int) else f"n = {measured.n}"


def say_p(test: McNemar) -> str:
    """``p = 0.031``, or ``p < 0.001``."""
    return "p < 0.001" if test.p_value < 0.001 else f"p = {test.p_value:.2g}"


def say_test(test: McNemar | None) -> str:
    """The p-value, and how many verdicts were true only before and only after; one line each."""
    if test is None:
        return "not paired"
    return f"{say_p(test)}\n{test.only_before} only before\n{test.only_after} only after"


def data_rows(report: SafetyReport) -> list[tuple[str, str, str]]:
    """What went into the repair as (kind, what, how many or where from); lists of row indices become counts.

    What the run cost in operations and memory is left to the record.
    """
    return [
        (
            kind,
            name.replace("_", " "),
            f"{len(value)} (indices in the JSON report)" if isinstance(value, list) else str(value),
        )
        for kind, values in report.record["data"].items()
        if kind != "cost"
        for name, value in (values if isinstance(values, dict) else {"value": values}).items()
    ]


def measured_names(report: SafetyReport) -> list[str]:
    """Every metric of any evaluation, the known ones first and in one order."""
    found = {name for evaluation in _evaluations(report) for name in evaluation.rates}
    return [name for name in METRICS if name in found] + sorted(found - METRICS.keys())


def conditions(report: SafetyReport) -> list[tuple[list[str], Evaluation]]:
    """The evaluations' labels by equal judges and prompts, each group with one of its evaluations."""
    groups: list[tuple[list[str], Evaluation]] = []
    for new in _evaluations(report):
        same = next((g for g in groups if (g[1].judges, _hashes(g[1])) == (new.judges, _hashes(new))), None)
        if same is None:
            groups.append(([new.label], new))
        else:
            same[0].append(new.label)
    return groups if len(groups) > 1 else [(["all evaluations"], evaluation) for _, evaluation in groups]


def to_terminal(report: SafetyReport) -> Any:
    """The report as a rich renderable, narrow enough for 80 columns.

    Raises:
        PeftNLSRError: rich is not installed.
    """
    try:
        from rich.console import Group
        from rich.panel import Panel
        from rich.text import Text
    except ImportError as error:
        raise _missing("rich") from error
    said = effect_of(report)
    style = {"improved": "green", "worse": "red"}.get(said.kind, "yellow")
    parts: list[Any] = [Panel(Text(said.text), title=f"safety report: {said.kind}", border_style=style)]
    if _evaluations(report):
        parts.append(_terminal_table(report))
    if report.controls:
        parts.append(_control_table(report))
    parts.append(Text("\n".join(changed_lines(report))))
    parts += [Text(f"note: {note}", style="yellow") for note in report.record["notes"]]
    parts += [Text(f"not covered: {line}", style="dim") for line in not_covered(report)]
    return Group(*parts, Text(revert_advice(report)))


def changed_lines(report: SafetyReport) -> list[str]:
    """What was changed, by what and why, in a few lines."""
    record = report.record
    modules = record["modules"]
    state = "applied" if record.get("fingerprint_after") else "planned, not applied"
    return [
        f"method: {record['method']} ({record['reason']}), {state}",
        f"preset: {record['preset']}",
        f"reference: {record['reference']}",
        f"modules restored: {sum(bool(m['restored']) for m in modules)} of {len(modules)}",
    ]


def _terminal_table(report: SafetyReport) -> Any:
    from rich.table import Table

    judges = "; ".join(dict.fromkeys(judge for evaluation in _evaluations(report) for judge in evaluation.judges))
    title = f"value, 95% interval, counts; judges: {judges or 'not named'}"
    table = Table("metric", "before", "after", "paired test", title=title, title_justify="left", title_style="bold")
    for name in measured_names(report):
        found = (e.rates.get(name) if e else None for e in (report.before, report.after))
        cells = [f"{say_value(m)}\n{say_interval(m)}\n{say_n(m)}" if m else "not measured" for m in found]
        table.add_row(metric(name).label, *cells, say_test(report.comparisons.get(name)))
    return table


def _control_table(report: SafetyReport) -> Any:
    """Harm and what it may cost; the other metrics are on the page and in the JSON."""
    from rich.table import Table

    names = ("harm_rate", *_COSTS)
    labels = (metric(name).label for name in names)
    table = Table("control", *labels, title="controls", title_justify="left", title_style="bold")
    for control in report.controls:
        table.add_row(control.label, *(say_value(control.rates[n]) if n in control.rates else "-" for n in names))
    return table


def render_page(report: SafetyReport, pictures: Sequence[Picture] = ()) -> str:
    """The report as one self-contained HTML page; it loads nothing, and a policy in it forbids that it could.

    Raises:
        PeftNLSRError: jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise _missing("jinja2") from error
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(value=say_value, interval=say_interval, count=say_n, test=say_test, listed=_and)
    source = resources.files("peft_nlsr").joinpath("data").joinpath("report.html.jinja").read_text("utf-8")
    return environment.from_string(source).render(
        report=report,
        record=report.record,
        effect=effect_of(report),
        pictures=pictures,
        metric=metric,
        names=measured_names(report),
        conditions=conditions(report),
        data_rows=data_rows(report),
        not_covered=not_covered(report),
        reproduce=reproduce(report),
        revert=revert_advice(report),
        settings=json.dumps(report.config, indent=2, sort_keys=True),
    )


def _evaluations(report: SafetyReport) -> list[Evaluation]:
    return [evaluation for evaluation in (report.before, report.after, *report.controls) if evaluation is not None]


def _hashes(evaluation: Evaluation) -> dict[str, str]:
    return {prompts["name"]: prompts["sha256"] for prompts in evaluation.prompt_sets}


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return sorted(name for name in one.keys() & other.keys() if one[name] != other[name])


def _and(words: Sequence[str], last: str = "and") -> str:
    """``a, b and c``."""
    return f" {last} ".join(part for part in (", ".join(words[:-1]), *words[-1:]) if part)


def _missing(package: str) -> PeftNLSRError:
    return PeftNLSRError(f"{package} is needed to show a report; install it with: pip install 'peft-nlsr[report]'")
