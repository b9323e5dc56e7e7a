"""A repair with its measurements: plan, measure before and after, and decide whether it may be kept.

Everything happens on one process and one model, which is left as it was found; the caller writes what is kept. What
decides is measured on prompts, and as far as there are enough on rows, that the repair has not seen.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .applying import apply, revert
from .blocks import as_teacher
from .config import NLSRConfig
from .defaults import TOLERANCE
from .evaluation import Evaluation, Measurement, answering
from .examples import Example, batches_of, collate, knows_words, sample
from .generation import pad_id, quiet
from .judges import Judge
from .live_adapter import LiveAdapter
from .measuring import EvaluationSettings
from .offloading import input_device
from .prompt_sets import prompt_text
from .record import Realignment
from .reference import Reference, read_reference
from .report import SafetyReport, effect_of, metric
from .screening import accepted, rows_fitted, rows_meant

logger = logging.getLogger(__name__)

ANSWERS = "answer_accuracy"
GUARDED = ("task_accuracy", ANSWERS, "coherence", "over_refusal")
_CHECKED_ROWS = 128
_FEWEST_ROWS = 20  # with fewer, one row weighs more than any tolerance
_SEEN = (
    "answer accuracy was measured on the rows of the repair, because fewer than {fewest} others were left, so it says "
    "nothing of other rows"
)


@dataclass(frozen=True)
class Verdict:
    """Whether a repair is kept.

    Attributes:
        reasons: why not, one sentence each.
        effect: what the measurements show, one sentence with the p-value of the paired test where there is one.
    """

    reasons: tuple[str, ...] = ()
    effect: str = ""

    @property
    def kept(self) -> bool:
        """Whether nothing speaks against the repair."""
        return not self.reasons


def losses(before: Mapping[str, Measurement], after: Mapping[str, Measurement]) -> dict[str, float]:
    """Guarded metric -> by how much it is worse after than before, 0 when it is not; only what was measured twice."""
    found: dict[str, float] = {}
    for name in GUARDED:
        if name in before and name in after:
            rise = after[name].value - before[name].value
            loss = rise if metric(name).better == "lower" else -rise
            found[name] = max(0.0, round(loss, 9))  # 1 - 0.98 is two points, not more
    return found


def judge_repair(before: Evaluation, after: Evaluation, *, tolerance: float = TOLERANCE) -> Verdict:
    """Closed when harm did not fall (unless there was none), or a guarded rate is worse by more than ``tolerance``.

    Harm may fall by however little; whether that is more than chance is said by the report's paired test. Coherence
    and over-refusal are guarded, because a model that babbles, or refuses everything, complies with nothing.
    """
    reasons: list[str] = []
    harm = before.rates["harm_rate"].value, after.rates["harm_rate"].value
    if harm[1] > harm[0] or harm[0] == harm[1] > 0.0:
        reasons.append(f"the harm rate did not fall: {harm[0]:.3f} before, {harm[1]:.3f} after")
    for name, loss in losses(before.rates, after.rates).items():
        if loss > tolerance:
            rate = before.rates[name].value, after.rates[name].value
            went = "rose" if rate[1] > rate[0] else "fell"
            reasons.append(f"{name} {went} by more than {tolerance:g}: {rate[0]:.3f} before, {rate[1]:.3f} after")
    return Verdict(tuple(reasons))


@torch.no_grad()
def answer_accuracy(model: Any, examples: Sequence[Example], *, batch_size: int, pad_id: int) -> Measurement:
    """Mean share of each example's answer tokens that the model predicts first, given all tokens before them.

    Raises:
        ValueError: no example has both an answer and something before it.
    """
    usable = _answered(examples)
    if not usable:
        raise ValueError(f"answer accuracy needs examples with answers, found none among {len(examples)}")
    device = input_device(model)
    shares: list[float] = []
    for batch in batches_of(usable, batch_size):
        tokens = collate(batch, pad_id, device)
        labels = tokens.pop("labels")[:, 1:]
        guesses = model(**tokens, use_cache=False).logits[:, :-1].argmax(-1)
        counted = labels != -100
        right = ((guesses == labels) & counted).sum(1)
        shares += (right / counted.sum(1).clamp_min(1)).tolist()
    return Measurement.of_shares(shares)


@dataclass(frozen=True)
class AnswerRows:
    """The user's rows that answer accuracy is measured on, and whether the repair was made without them."""

    rows: tuple[Example, ...] = ()
    unseen: bool = True

    def without(self, positions: Collection[int]) -> AnswerRows:
        """Only the rows at other positions of the user's data."""
        return replace(self, rows=tuple(row for row in self.rows if row.index not in positions))

    @property
    def source(self) -> str:
        """Where they come from, as evaluations say it."""
        return "rows that the repair did not use" if self.unseen else "rows of the repair"

    @property
    def notes(self) -> tuple[str, ...]:
        """What is to be said of them."""
        return () if self.unseen or not self.rows else (_SEEN.format(fewest=_FEWEST_ROWS),)


def answer_rows(
    model: Any, planned: Realignment, utility: Iterable[Any], *, tokenizer: Any, judge: Judge, progress: bool
) -> AnswerRows:
    """At most 128 of the user's answered rows, best such that the repair was not fitted to; none that are refused.

    Args:
        model: the one that the repair was planned for.
        utility: the same data that the repair was given; where it took none, all of them are new to it.

    The answers of refused rows are meant to be lost. Where the repair did not screen the rows, the base model is asked
    here, unless the settings say ``screening=False``.
    """
    config = planned.config
    drawn = rows_meant(sample(utility, tokenizer, config, times=2), planned.data)
    meant, left = _answered(drawn), _answered(drawn[rows_fitted(planned.data) :])
    unseen = len(left) >= min(_FEWEST_ROWS, len(meant))
    rows = (left if unseen else meant)[-_CHECKED_ROWS:]
    if rows and config.screening and "refused_rows" not in planned.data.get("utility", {}):
        adapter = LiveAdapter(model, planned.adapter_name)
        rows = accepted(adapter, rows, tokenizer=tokenizer, judge=judge, config=config, progress=progress)
    return AnswerRows(tuple(rows), unseen)


def _answered(rows: Sequence[Example]) -> list[Example]:
    return [e for e in rows if e.answer and len(e.tokens) > 1]


def drawn_answers(utility: Iterable[Any] | None, tokenizer: Any, config: NLSRConfig) -> AnswerRows:
    """At most 128 of the user's answered rows, for repairs of several kinds: the last ones of what these draw."""
    if utility is None:
        return AnswerRows()
    drawn = sample(utility, tokenizer, config, times=2)
    rows = _answered(drawn)[-_CHECKED_ROWS:]
    return AnswerRows(tuple(rows), len(drawn) - len(rows) >= config.max_samples)


def with_answers(
    found: Evaluation,
    model: Any,
    checked: AnswerRows,
    tokenizer: Any,
    *,
    batch_size: int,
    adapter_name: str | None = None,
) -> Evaluation:
    """The evaluation with the accuracy on the answers of the rows, where there are any; the named adapter answers."""
    rates = {name: rate for name, rate in found.rates.items() if name != ANSWERS}
    if not checked.rows:
        return replace(found, rates=rates)
    with answering(model, adapter_name) as speaker:
        right = answer_accuracy(speaker, checked.rows, batch_size=batch_size, pad_id=pad_id(tokenizer))
    settings = found.settings | {"answer_rows": checked.source}
    return replace(found, rates=rates | {ANSWERS: right}, settings=settings)


@dataclass(frozen=True)
class Outcome:
    """A repair that was planned and, as far as asked for, measured.

    Attributes:
        realignment: the plan; None when nothing was to be changed.
        report: its record and the measurements before and after.
        verdict: whether the repair is to be kept.
        evaluations: everything measured: fine-tuned, then realigned or (:func:`monitor`) safe teacher.
        seconds: wall time.
    """

    realignment: Realignment | None
    report: SafetyReport | None
    verdict: Verdict
    evaluations: tuple[Evaluation, ...]
    seconds: float


@dataclass(frozen=True)
class Measure:
    """How a model is measured.

    Attributes:
        asked: prompts, task, judges and generation; None does not measure.
        tokenizer: the model's.
        tolerance: how much worse a guarded rate may become.
        progress: show bars.
    """

    asked: EvaluationSettings | None
    tokenizer: Any
    tolerance: float = TOLERANCE
    progress: bool = True

    def askable(self) -> EvaluationSettings | None:
        """What to ask; None, with a warning, when the tokenizer does not know the words of the built-in prompts."""
        if self.asked is None or self.asked.prompts is not None:
            return self.asked
        texts = [prompt_text(prompt) for each in self.asked.sets() for prompt in each.prompts]
        if not knows_words(texts, self.tokenizer):
            logger.warning(
                "the tokenizer does not know the words of the built-in prompts, so nothing is measured; give prompt "
                "sets in the model's language"
            )
            return None
        return self.asked

    def of(
        self, model: Any, label: str, asked: EvaluationSettings, checked: AnswerRows, adapter_name: str | None
    ) -> Evaluation:
        """The model's rates on what is asked, and its accuracy on the answers of the rows."""
        found = asked.evaluate(model, self.tokenizer, label, adapter_name=adapter_name, progress=self.progress)
        return with_answers(
            found, model, checked, self.tokenizer, batch_size=asked.batch_size, adapter_name=adapter_name
        )


def measured(model: Any, planned: Realignment, measure: Measure, utility: Iterable[Any] | None = None) -> Outcome:
    """Measure a planned realignment: apply it, and take it back again.

    Args:
        model: the one it was planned for.
        utility: the user's data, the same that the plan was given, see :func:`answer_rows`.

    A plan that changes nothing is measured once, and its verdict is to keep it.
    """
    start = time.perf_counter()
    asked = measure.askable()
    if asked is None:
        report = SafetyReport(planned.to_dict(), planned.config.to_dict(), None, None)
        return Outcome(planned, report, Verdict(), (), 0.0)
    checked = AnswerRows()
    if utility is not None:
        checked = answer_rows(
            model,
            planned,
            utility,
            tokenizer=measure.tokenizer,
            judge=asked.judge,
            progress=measure.progress,
        )
        planned = replace(planned, notes=planned.notes + checked.notes)
    before, after = _both(model, planned, measure, asked, checked)
    report = SafetyReport(planned.to_dict(), planned.config.to_dict(), before, after)
    verdict = Verdict() if after is None else judge_repair(before, after, tolerance=measure.tolerance)
    evaluations = (before,) if after is None else (before, after)
    said = replace(verdict, effect=effect_of(report).text)
    return Outcome(planned, report, said, evaluations, time.perf_counter() - start)


def _both(
    model: Any, planned: Realignment, measure: Measure, asked: EvaluationSettings, checked: AnswerRows
) -> tuple[Evaluation, Evaluation | None]:
    """The model before and after; None in place of the second where nothing changes."""
    with quiet(model), torch.no_grad():
        before = measure.of(model, "fine-tuned", asked, checked, planned.adapter_name)
        if not planned.restored:
            return before, None
        apply(model, planned)
        try:
            return before, measure.of(model, "realigned", asked, checked, planned.adapter_name)
        finally:
            revert(model, planned.adapter_name)


def monitor(model: Any, reference: Any, measure: Measure, *, adapter_name: str | None = None) -> Outcome:
    """Measure the fine-tuned model and its safe teacher; nothing is planned or changed."""
    start = time.perf_counter()
    asked = measure.askable()
    if asked is None:
        return Outcome(None, None, Verdict(), (), 0.0)
    adapter = LiveAdapter(model, adapter_name)
    teacher: Reference = read_reference(reference, adapter)
    with quiet(model), torch.no_grad():
        tuned = measure.of(model, "fine-tuned", asked, AnswerRows(), adapter_name)
        with as_teacher(adapter, teacher.updates):
            safe = measure.of(model, "safe teacher", asked, AnswerRows(), adapter_name)
    return Outcome(None, None, Verdict(), (tuned, safe), time.perf_counter() - start)
