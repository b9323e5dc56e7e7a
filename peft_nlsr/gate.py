"""A repair with its measurements: plan, measure before and after, and decide whether it may be kept.

Everything happens on one process and one model, which is left as it was found; the caller writes what is kept.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .adapters import LiveAdapter
from .blocks import as_teacher
from .evaluation import Evaluation, Measurement, answering, evaluate
from .examples import Example, batches_of, collate, knows_words, read_examples
from .generation import pad_id, quiet
from .judges import Judge
from .offloading import input_device
from .prompt_sets import PromptSet, builtin_prompt_set
from .prompts import KINDS
from .realign import apply, revert
from .record import Realignment
from .reference import Reference, read_reference
from .report import SafetyReport

logger = logging.getLogger(__name__)

ANSWERS = "answer_accuracy"
GUARDED = ("task_accuracy", ANSWERS, "coherence")
_CHECKED_ROWS = 128


@dataclass(frozen=True)
class Verdict:
    """Whether a repair is kept, and why not: one sentence per reason."""

    reasons: tuple[str, ...] = ()

    @property
    def kept(self) -> bool:
        """Whether nothing speaks against the repair."""
        return not self.reasons


def judge_repair(before: Evaluation, after: Evaluation, *, tolerance: float) -> Verdict:
    """Closed when harm did not fall (unless there was none), or a guarded rate fell by more than ``tolerance``.

    Coherence is guarded too, because a model that babbles complies with nothing.
    """
    reasons: list[str] = []
    harm = before.rates["harm_rate"].value, after.rates["harm_rate"].value
    if harm[1] > harm[0] or harm[0] == harm[1] > 0.0:
        reasons.append(f"the harm rate did not fall: {harm[0]:.3f} before, {harm[1]:.3f} after")
    for metric in GUARDED:
        if metric in before.rates and metric in after.rates:
            rate = before.rates[metric].value, after.rates[metric].value
            if rate[0] - rate[1] > tolerance:
                reasons.append(f"{metric} fell by more than {tolerance:g}: {rate[0]:.3f} before, {rate[1]:.3f} after")
    return Verdict(tuple(reasons))


@torch.no_grad()
def answer_accuracy(model: Any, examples: Sequence[Example], *, batch_size: int, pad_id: int) -> Measurement:
    """Mean share of each example's answer tokens that the model predicts first, given all tokens before them.

    Raises:
        ValueError: no example has both an answer and something before it.
    """
    usable = [e for e in examples if e.answer and len(e.tokens) > 1]
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
    return Measurement.of_values(shares)


def answered_rows(data: Iterable[Any] | None, tokenizer: Any) -> list[Example]:
    """Some of the user's examples, those with answers, for :func:`with_answer_accuracy`."""
    if data is None:
        return []
    rows = read_examples(data, tokenizer, limit=_CHECKED_ROWS, max_length=512)
    return [row for row in rows if row.answer and len(row.tokens) > 1]


def screened_out(planned: Realignment) -> set[int]:
    """Positions of the user's rows that the safe teacher refused; their answers are meant to be lost."""
    return set(planned.data.get("utility", {}).get("refused_rows", ()))


def with_answer_accuracy(
    found: Evaluation,
    model: Any,
    rows: Sequence[Example],
    tokenizer: Any,
    *,
    batch_size: int,
    adapter_name: str | None = None,
) -> Evaluation:
    """The evaluation of a model with its accuracy on the answers of ``rows``; without it where there are none.

    The named adapter answers, or the active one.
    """
    rates = {name: rate for name, rate in found.rates.items() if name != ANSWERS}
    if any(row.answer for row in rows):
        with answering(model, adapter_name) as speaker:
            rates[ANSWERS] = answer_accuracy(speaker, rows, batch_size=batch_size, pad_id=pad_id(tokenizer))
    return replace(found, rates=rates)


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
        prompts: True for the built-in evaluation prompts, False for none, or prompt sets.
        tokenizer, judge, max_new_tokens, batch_size, progress: see :func:`peft_nlsr.evaluate`.
        tolerance: how far a guarded rate may fall.
    """

    prompts: bool | Sequence[PromptSet]
    tokenizer: Any
    judge: Judge
    max_new_tokens: int
    batch_size: int
    tolerance: float
    progress: bool = True

    def prompt_sets(self) -> Sequence[PromptSet]:
        """The sets to ask; none, with a warning, when the tokenizer does not know the built-in prompts' words."""
        if not isinstance(self.prompts, bool):
            return self.prompts
        sets = [builtin_prompt_set(kind) for kind in KINDS] if self.prompts else []
        texts = [str(prompt) for each in sets for prompt in each.prompts]
        if not knows_words(texts, self.tokenizer):
            logger.warning(
                "the tokenizer does not know the words of the built-in prompts, so nothing is measured; give prompt "
                "sets in the model's language"
            )
            return ()
        return sets

    def of(
        self, model: Any, label: str, sets: Sequence[PromptSet], rows: Sequence[Example], adapter_name: str | None
    ) -> Evaluation:
        """The model's rates on the sets, and its accuracy on the answers of ``rows``."""
        found = evaluate(
            model,
            self.tokenizer,
            label=label,
            prompts=sets,
            judge=self.judge,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            progress=self.progress,
            adapter_name=adapter_name,
        )
        return with_answer_accuracy(
            found, model, rows, self.tokenizer, batch_size=self.batch_size, adapter_name=adapter_name
        )


def measured(model: Any, planned: Realignment, measure: Measure, rows: Sequence[Example] = ()) -> Outcome:
    """Measure a planned realignment: apply it, and take it back again.

    Args:
        model: the one it was planned for.
        rows: the user's examples; those that the safe teacher refused are left out, they are meant to be lost.

    A plan that changes nothing is measured once, and its verdict is to keep it.
    """
    start = time.perf_counter()
    report = SafetyReport(planned.to_dict(), planned.config.to_dict(), None, None)
    sets = measure.prompt_sets()
    if not sets:
        return Outcome(planned, report, Verdict(), (), 0.0)
    refused = screened_out(planned)
    checked = [e for e in rows if e.index not in refused][-_CHECKED_ROWS:]
    with quiet(model), torch.no_grad():
        before = measure.of(model, "fine-tuned", sets, checked, planned.adapter_name)
        if not planned.restored:
            report = replace(report, before=before)
            return Outcome(planned, report, Verdict(), (before,), time.perf_counter() - start)
        apply(model, planned)
        try:
            after = measure.of(model, "realigned", sets, checked, planned.adapter_name)
        finally:
            revert(model, planned.adapter_name)
    verdict = judge_repair(before, after, tolerance=measure.tolerance)
    report = replace(report, before=before, after=after)
    return Outcome(planned, report, verdict, (before, after), time.perf_counter() - start)


def monitor(model: Any, reference: Any, measure: Measure, *, adapter_name: str | None = None) -> Outcome:
    """Measure the fine-tuned model and its safe teacher; nothing is planned or changed."""
    start = time.perf_counter()
    sets = measure.prompt_sets()
    if not sets:
        return Outcome(None, None, Verdict(), (), 0.0)
    adapter = LiveAdapter(model, adapter_name)
    teacher: Reference = read_reference(reference, adapter)
    with quiet(model), torch.no_grad():
        tuned = measure.of(model, "fine-tuned", sets, (), adapter_name)
        with as_teacher(adapter, teacher.updates):
            safe = measure.of(model, "safe teacher", sets, (), adapter_name)
    return Outcome(None, None, Verdict(), (tuned, safe), time.perf_counter() - start)
