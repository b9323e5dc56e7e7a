"""Methods and controls side by side on one adapter: one table, one JSON file, one picture.

Every row is planned, applied, measured on the same prompts and reverted bit for bit; rows that end in the same weights
are measured once. What a row cannot do is said in the row.
"""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .applying import apply, revert
from .config import NLSRConfig
from .controls import BENIGN, CONTROLS, MATCHED, Size, as_realignment, entries_of, size_of
from .errors import CorruptFileError, PeftNLSRError
from .evaluation import Evaluation, Measurement, paired_tests
from .examples import sample
from .files import read_json, write_json
from .gate import ANSWERS, AnswerRows, drawn_answers, with_answers
from .intervals import McNemar, student_mean, wilson
from .lowrank import LowRank, fingerprint
from .measuring import EvaluationSettings
from .planning import Method, Planned, Planner, as_rows, data_digest
from .plots import pareto
from .record import Realignment, versions
from .report import metric, say_p, say_value
from .result_file import OTHERWISE, ResultFile, key_of
from .screening import refused_rows, rows_fitted, rows_meant

SCHEMA_VERSION = 1
FINE_TUNED = "fine-tuned"
REMOVED = "adapter removed"
_FEWEST_UNSEEN = 20  # rows that a repair was not fitted to, below which all are measured, as by the gate
_SHOWN = ("harm_rate", "over_refusal", "coherence", "task_accuracy", ANSWERS)


@dataclass(frozen=True)
class Row:
    """One method or control with one seed.

    Attributes:
        name: shown in tables; a control's says which method it is matched to.
        kind: "none" (the fine-tuned adapter), "method" or "control".
        seed: of its random draws.
        preset: of the method's settings.
        said: what was done, one clause.
        size: how much changed; None where nothing was done.
        evaluation: what was measured; None where the row could not be made.
        refused: why not, one sentence.
        fingerprint: of the adapter that was measured.
        seconds: for the plan, shared work included where this row came first.
    """

    name: str
    kind: str
    seed: int
    preset: str | None
    said: str
    size: Size | None
    evaluation: Evaluation | None
    refused: str | None
    fingerprint: str | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON values; :meth:`from_dict` takes them back."""
        return {**asdict(self), "evaluation": None if self.evaluation is None else self.evaluation.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Row:
        """The row that ``to_dict`` wrote."""
        size, evaluation = values["size"], values["evaluation"]
        return cls(
            **{
                **values,
                "size": None if size is None else Size(**size),
                "evaluation": None if evaluation is None else Evaluation.from_dict(evaluation),
            }
        )


@dataclass(frozen=True)
class Comparison:
    """Rows of methods and controls on one adapter; the first is the fine-tuned adapter itself.

    Attributes:
        rows: one per method or control and seed.
        settings: what all rows depend on, JSON values, and the versions of the packages.
    """

    rows: tuple[Row, ...]
    settings: dict[str, Any]

    @property
    def names(self) -> tuple[str, ...]:
        """Rows of different seeds share a name."""
        return tuple(dict.fromkeys(row.name for row in self.rows))

    def evaluation(self, name: str) -> Evaluation | None:
        """What was measured of a name: over several seeds means, with the wider of two intervals.

        These are Student's t on the seeds' rates and Wilson's on the prompts of one seed, because seeds that agree
        exactly still saw a limited number of prompts.
        """
        found = [row.evaluation for row in self._of(name) if row.evaluation is not None]
        if len(found) < 2:
            return found[0] if found else None
        shared = [m for m in found[0].rates if all(m in each.rates for each in found)]
        pooled = {m: _pooled([each.rates[m] for each in found]) for m in shared}
        return replace(found[0], rates=pooled, verdicts={}, seconds=sum(each.seconds for each in found))

    def tests(self, name: str) -> tuple[dict[str, McNemar], ...]:
        """Per seed, metric -> paired test of the fine-tuned adapter (before) against this row (after)."""
        first = self.rows[0].evaluation
        found = [row.evaluation for row in self._of(name) if row.evaluation is not None]
        return tuple({} if first is None else paired_tests(first, each) for each in found)

    def to_dict(self) -> dict[str, Any]:
        """JSON values, tests and means included; :meth:`from_dict` takes them back."""
        summary = [
            {
                "name": name,
                "rates": None if (found := self.evaluation(name)) is None else _rates(found),
                "tests": [{m: asdict(test) for m, test in each.items()} for each in self.tests(name)],
            }
            for name in self.names
        ]
        rows = [row.to_dict() for row in self.rows]
        return {"schema_version": SCHEMA_VERSION, "settings": self.settings, "summary": summary, "rows": rows}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Comparison:
        """The comparison that ``to_dict`` wrote.

        Raises:
            CorruptFileError: another schema version, or no comparison.
        """
        if values.get("schema_version") != SCHEMA_VERSION or not values.get("rows"):
            raise CorruptFileError(
                f"expected a comparison of schema version {SCHEMA_VERSION} with rows, found version "
                f"{values.get('schema_version')!r}; compare again"
            )
        try:
            return cls(tuple(Row.from_dict(row) for row in values["rows"]), dict(values["settings"]))
        except (KeyError, TypeError) as error:
            raise CorruptFileError(f"a row of this comparison is malformed ({error!r}); compare again") from error

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the comparison to a JSON file, whole or not at all; returns its path."""
        write_json(Path(path), self.to_dict())
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Comparison:
        """Read what :meth:`save` wrote."""
        return cls.from_dict(read_json(Path(path), OTHERWISE))

    def to_markdown(self) -> str:
        """The table in Markdown, and a line per row that says what was done or why not."""
        shown = self._shown()
        header = ["row", *(f"{metric(m).label}, %" for m in shown), "harm, paired", "change", "entries"]
        lines = [[name, *self._rate_cells(name, shown), *_size_cells(self._of(name)[0].size)] for name in self.names]
        table = [header, ["---", *["--:"] * (len(header) - 1)], *lines]
        text = "\n".join(f"| {' | '.join(cells)} |" for cells in table)
        said = [f"{row.name}: {row.refused or row.said}" for row in self._firsts() if row.kind != "none"]
        return "\n".join([text, "", *(f"- {line}" for line in [*self._conditions(), *said])])

    def to_terminal(self) -> Any:
        """The table as a rich renderable, narrow enough for 80 columns; controls stand below their method.

        Where the task's accuracy has a column, that on the user's answers is said below the table.

        Raises:
            PeftNLSRError: rich is not installed.
        """
        try:
            from rich.console import Group
            from rich.table import Table
            from rich.text import Text
        except ImportError as error:
            raise PeftNLSRError("rich is needed to show a table; pip install 'peft-nlsr[report]'") from error
        measured = self._shown()
        shown = [m for m in measured if m != ANSWERS or "task_accuracy" not in measured]
        title = "percent, with 95% intervals; changes in percent of the adapter's norm"
        table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 1, 0, 0))
        table.add_column("")
        for name in (*(metric(m).label for m in shown), "harm, paired"):
            table.add_column(name.replace("harm, ", "harm,\n"), justify="right")
        said = []
        for row in self._firsts():
            label = f"  {row.name.partition(', for ')[0]}" if row.kind == "control" else row.name
            table.add_row(label, *self._rate_cells(row.name, shown))
            if facts := self._facts(row, [m for m in measured if m not in shown]):
                said.append(f"{row.name}: {'; '.join(facts)}")
        return Group(table, Text("\n".join([*self._conditions(), *said])))

    def _facts(self, row: Row, beside: Sequence[str]) -> list[str]:
        """What was done or why not, how much it changed, and the metrics that have no column."""
        change, entries = _size_cells(row.size)
        found = self.evaluation(row.name)
        facts = [row.refused or row.said, f"change {change}, {entries} entries" if row.size else ""]
        if found is not None:
            facts += [f"{metric(m).label} {_rate_cell(m, found.rates[m])}" for m in beside if m in found.rates]
        return [fact for fact in facts if fact]

    def pareto(self) -> Any:
        """Harm against task accuracy, or over-refusal where there is no task, as a matplotlib figure."""
        found = [each for name in self.names if (each := self.evaluation(name)) is not None]
        against = "task_accuracy" if any("task_accuracy" in each.rates for each in found) else "over_refusal"
        return pareto(found, against=against)

    def _of(self, name: str) -> list[Row]:
        found = [row for row in self.rows if row.name == name]
        if not found:
            raise ValueError(f"no row named {name!r}; there are {', '.join(self.names)}")
        return found

    def _firsts(self) -> list[Row]:
        """The row of the first seed of every name."""
        return [self._of(name)[0] for name in self.names]

    def _shown(self) -> list[str]:
        """The metrics of the table, those that any row has."""
        measured = {m for row in self.rows if row.evaluation is not None for m in row.evaluation.rates}
        return [m for m in _SHOWN if m in measured]

    def _rate_cells(self, name: str, shown: Sequence[str]) -> list[str]:
        """Rates with intervals, and the p-value of the paired test."""
        found = self.evaluation(name)
        if found is None:
            return [*["n/a"] * len(shown), ""]
        tests = [each["harm_rate"] for each in self.tests(name) if "harm_rate" in each]
        weakest = max(tests, key=lambda test: test.p_value, default=None)
        paired = "" if weakest is None or name == FINE_TUNED else say_p(weakest)
        return [*(_rate_cell(m, found.rates[m]) if m in found.rates else "-" for m in shown), paired]

    def _conditions(self) -> list[str]:
        """What holds for all rows."""
        seeds = len({row.seed for row in self.rows})
        first = next((row.evaluation for row in self.rows if row.evaluation is not None), None)
        said = [] if first is None else [f"judges: {'; '.join(first.judges)}"]
        if first is not None and ANSWERS in first.rates:
            said.append(
                f"{metric(ANSWERS).label}: tokens of your own answers; a method and its controls without the rows "
                f"that its screening took out or that it was fitted to{self._fitted_said()}"
            )
        return said + ([f"means of {seeds} seeds; the paired test is the weakest of them"] if seeds > 1 else [])

    def _fitted_said(self) -> str:
        """Of which names answers were measured on rows that the repair was fitted to."""
        seen = AnswerRows(unseen=False).source
        names = {r.name for r in self.rows if r.evaluation and r.evaluation.settings.get("answer_rows") == seen}
        shown = [name for name in self.names if name in names]
        few = f"fewer than {_FEWEST_UNSEEN} others were left"
        return f", but of {', '.join(shown)} with the latter, because {few}" if shown else ""


def compare(
    model: Any,
    methods: Sequence[Method],
    *,
    controls: Sequence[str] = CONTROLS,
    evaluation: EvaluationSettings | None = None,
    calibration: Iterable[Any] | None = None,
    utility: Iterable[Any] | None = None,
    benign: Iterable[Any] | None = None,
    tokenizer: Any = None,
    seeds: Sequence[int] = (0,),
    resume: str | os.PathLike[str] | None = None,
    adapter_name: str | None = None,
    progress: bool = True,
) -> Comparison:
    """Measure a fine-tuned adapter, every method on it, and for every method the controls that may explain its effect.

    The model is left as it was, bit for bit. Statistics, teachers' answers and screening are shared by all rows that
    ask for the same ones. With ``utility`` every row has the accuracy on its answers. Controls of a method that all
    come to a zero adapter are one row, ``adapter removed``.

    Args:
        model: a PeftModel with the fine-tuned adapter, not realigned yet.
        methods: at least one, with different names.
        controls: names from ``CONTROLS``: "random" (a random mask with as many modules and entries), "reset" (zero
            rows), "scaled" (the adapter shrunk by the same norm), "transplant" (the reference in its place), "benign"
            (benign data in place of the safety data).
        evaluation: prompts, task, judges and generation; ``EvaluationSettings()`` when None.
        calibration, utility, tokenizer, adapter_name: see :func:`peft_nlsr.nlsr_realign`.
        benign: rows with answers, for the control of that name.
        seeds: added to each method's ``nlsr_seed``; several give means and intervals over seeds.
        resume: a JSON file for finished rows; a second call with it makes only what is missing. It holds numbers, ids
            and verdicts, no texts.

    Raises:
        ValueError: no methods, names that repeat, unknown controls, no seeds.
        IncompatibleError: prompts that are also in the data, or a ``resume`` file of another run.
    """
    evaluation = evaluation or EvaluationSettings()
    _check(methods, controls, seeds)

    def planner(safety: Sequence[Any] | None) -> Planner:
        return Planner(
            model,
            calibration=safety,
            utility=utility,
            tokenizer=tokenizer,
            judge=evaluation.judge,
            adapter_name=adapter_name,
            progress=progress,
        )

    utility, benign = as_rows(utility), as_rows(benign)
    run = _Run(planner(as_rows(calibration)), None if benign is None else planner(benign), evaluation, resume)
    rows = [run.untouched()]
    for seed in seeds:
        for method in methods:
            rows.append(run.method(method, seed))
            rows += [run.control(name, method, seed) for name in controls]
    for method in methods:
        rows = _one_removal(rows, method, controls, run.removed)
    return Comparison(tuple(rows), {**run.made_with, "seeds": list(seeds), "versions": versions()})


def _check(methods: Sequence[Method], controls: Sequence[str], seeds: Sequence[int]) -> None:
    names = [method.name for method in methods]
    if not names or len(set(names)) != len(names) or FINE_TUNED in names:
        raise ValueError(f"expected methods with names of their own, none of them {FINE_TUNED!r}, found {names}")
    unknown = sorted(set(controls) - set(CONTROLS))
    if unknown:
        raise ValueError(f"unknown controls {', '.join(unknown)}; choose from {', '.join(CONTROLS)}")
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"expected at least one seed, and none twice, found {list(seeds)}")


def _control_name(control: str, method: Method) -> str:
    return f"{control}, for {method.name}"


def _one_removal(rows: list[Row], method: Method, controls: Sequence[str], removed: str) -> list[Row]:
    """The rows with one in place of a method's controls that are the base model, with every seed."""
    made = {c: [row for row in rows if row.name == _control_name(c, method)] for c in controls}
    same = [c for c, found in made.items() if all(row.fingerprint == removed for row in found)]
    if len(same) < 2:
        return rows
    name, first, *others = (_control_name(c, method) for c in (REMOVED, *same))
    cause = "the change is larger than the adapter" if "scaled" in same else "the method changes whole modules"
    said = f"{cause}, so these controls are one ({', '.join(same)}); compare the task"
    return [_renamed(row, name, said) if row.name == first else row for row in rows if row.name not in others]


def _renamed(row: Row, name: str, said: str) -> Row:
    evaluation = None if row.evaluation is None else replace(row.evaluation, label=name)
    return replace(row, name=name, said=said, evaluation=evaluation)


class _Run:
    """One comparison: what its rows share, and how a row is made."""

    def __init__(
        self,
        planner: Planner,
        benign: Planner | None,
        evaluation: EvaluationSettings,
        resume: str | os.PathLike[str] | None,
    ) -> None:
        self.planner, self.benign, self.evaluation = planner, benign, evaluation
        self.model, self.adapter_name = planner.model, planner.adapter.info.adapter_name
        extra = None if benign is None else benign.calibration
        self.made_with: dict[str, Any] = {
            **planner.made_with(),
            "evaluation": evaluation.to_dict(),
            "benign": None if benign is None else data_digest(extra, benign.tokenizer),
            "rows_not_compared_with_prompts": evaluation.require_unseen(planner.calibration, planner.utility, extra),
        }
        self.file = ResultFile(resume, self.made_with)
        self.answers = drawn_answers(planner.utility, planner.tokenizer, NLSRConfig())
        self.removed = fingerprint(
            {n: LowRank(torch.zeros_like(u.A), torch.zeros_like(u.B), u.scale) for n, u in planner.adapter.items()}
        )
        self._planned: dict[tuple[str, int], Planned] = {}
        self._measured: dict[str, Evaluation] = {}
        self._given: dict[str, dict[str, Any]] = {}

    def untouched(self) -> Row:
        """The fine-tuned adapter as it is."""
        key = key_of([FINE_TUNED])
        if (kept := self._kept(key)) is not None:
            return kept
        found = self._measure(FINE_TUNED, self.made_with["adapter"], self.answers)
        # There is no repair yet whose rows these could be.
        found = replace(found, settings={k: v for k, v in found.settings.items() if k != "answer_rows"})
        row = Row(FINE_TUNED, "none", 0, None, "", None, found, None, self.made_with["adapter"], 0.0)
        return self._keep(key, row)

    def method(self, method: Method, seed: int) -> Row:
        """A method's row."""
        return self._row(method.name, "method", method, seed)

    def control(self, name: str, method: Method, seed: int) -> Row:
        """The row of a control that is matched to a method."""
        return self._row(_control_name(name, method), name, method, seed)

    def _row(self, label: str, what: str, method: Method, seed: int) -> Row:
        """``what`` is "method" or the name of a control."""
        if method.name not in self._given:
            self._given[method.name] = method.made_with()
        key = key_of([label, what, seed, self._given[method.name]])
        if (kept := self._kept(key)) is not None:
            return kept
        start = time.perf_counter()
        kind = "method" if what == "method" else "control"
        blank = Row(label, kind, seed, method.config.preset, "", None, None, None, None, 0.0)
        try:
            planned, entries, answers = self._plan(what, method, seed)
        except (PeftNLSRError, ValueError) as error:
            return replace(blank, refused=str(error))  # not kept, so that it is tried again
        seconds = time.perf_counter() - start
        done = apply(self.model, planned)
        try:
            found = self._measure(label, str(done.fingerprint_after), answers)
        finally:
            revert(self.model, self.adapter_name)
        said = planned.reason if kind == "control" else f"{planned.method}, reference: {planned.reference}"
        size = size_of(planned, entries)
        row = replace(blank, said=said, size=size, evaluation=found, seconds=seconds)
        return self._keep(key, replace(row, fingerprint=done.fingerprint_after))

    def _plan(self, what: str, method: Method, seed: int) -> tuple[Realignment, int, AnswerRows]:
        """The plan of a row, the entries that it decides upon, and the user's rows that it is measured on."""
        seeded = replace(method, config=method.config.replace(nlsr_seed=method.config.nlsr_seed + seed))
        benign = self._plan_benign(seeded) if what == BENIGN else None
        planned = self._plan_method(seeded, seed)
        meant = self.answers.without(refused_rows(planned.realignment.data))
        if what not in MATCHED:
            own = benign or planned
            return own.realignment, sum(map(sum, entries_of(own).values())), self._unseen(meant, own.realignment)
        generator = torch.Generator().manual_seed((seed << 32) + zlib.crc32(f"{what} {method.name}".encode()))
        control = MATCHED[what](planned, generator)
        done = as_realignment(self.planner.adapter, what, control, planned)
        return done, control.entries, self._unseen(meant, planned.realignment)

    def _unseen(self, meant: AnswerRows, planned: Realignment) -> AnswerRows:
        """The rows without those that the repair was fitted to, which differ by seed, where enough others are left."""
        count = rows_fitted(planned.data)
        if not count or not meant.rows:
            return replace(meant, unseen=True)
        drawn = sample(self.planner.utility or (), self.planner.tokenizer, planned.config, times=2)
        left = meant.without({e.index for e in rows_meant(drawn, planned.data)[:count]})
        unseen = len(left.rows) >= min(_FEWEST_UNSEEN, len(meant.rows))
        return replace(left if unseen else meant, unseen=unseen)

    def _plan_method(self, method: Method, seed: int) -> Planned:
        key = (method.name, seed)
        if key not in self._planned:
            self._planned = {key: self.planner.plan(method)}
        return self._planned[key]

    def _plan_benign(self, method: Method) -> Planned:
        if self.benign is None:
            raise PeftNLSRError("no benign data were given: pass benign=<rows with prompt and response>")
        if method.patch is not None:
            raise PeftNLSRError("the method's patch was calibrated before; give the reference that it was built from")
        config = method.config.replace(screening=False, lookalike_weight=1.0)
        planned = self.benign.plan(replace(method, config=config))
        reason = f"{planned.realignment.method} with benign data as safety data, at full weight, not screened"
        return replace(planned, realignment=replace(planned.realignment, reason=reason))

    def _measure(self, label: str, weights: str, rows: AnswerRows) -> Evaluation:
        """The model as it is now, with its accuracy on the answers of ``rows``.

        Weights that were measured before are not asked the prompts again.
        """
        if weights not in self._measured:
            self._measured[weights] = self.evaluation.evaluate(
                self.model,
                self.planner.tokenizer,
                label,
                adapter_name=self.adapter_name,
                progress=self.planner.progress,
            )
        return with_answers(
            replace(self._measured[weights], label=label),
            self.model,
            rows,
            self.planner.tokenizer,
            batch_size=self.evaluation.batch_size,
            adapter_name=self.adapter_name,
        )

    def _kept(self, key: str) -> Row | None:
        values = self.file.get(key)
        if values is None:
            return None
        row = Row.from_dict(values)
        if row.evaluation is not None and row.fingerprint is not None:
            self._measured.setdefault(row.fingerprint, row.evaluation)
        return row

    def _keep(self, key: str, row: Row) -> Row:
        self.file.add(key, row.to_dict())
        return row


def _pooled(measured: Sequence[Measurement]) -> Measurement:
    values = [m.value for m in measured]
    mean = sum(values) / len(values)
    low, high = student_mean(values)
    if any(m.hits is None for m in measured):
        return Measurement(mean, low, high, sum(m.n for m in measured), None)
    one = wilson(mean, min(m.n for m in measured))
    low, high = max(0.0, min(low, one[0])), min(1.0, max(high, one[1]))
    return Measurement(mean, low, high, sum(m.n for m in measured), sum(m.hits or 0 for m in measured))


def _rates(evaluation: Evaluation) -> dict[str, Any]:
    return {name: asdict(measured) for name, measured in evaluation.rates.items()}


def _size_cells(size: Size | None) -> list[str]:
    """Norm of the change, relative where it can be, and entries."""
    if size is None:
        return ["", ""]
    change = f"{size.norm:.2f}" if size.relative is None else f"{100 * size.relative:.0f}%"
    return [change, f"{size.entries:,}"]


def _rate_cell(name: str, measured: Measurement) -> str:
    if measured.hits is None and name != ANSWERS:
        return say_value(measured)
    return f"{100 * measured.value:.0f} ({100 * measured.low:.0f}-{100 * measured.high:.0f})"
