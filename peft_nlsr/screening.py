"""Prepares the two kinds of data of the two-teacher form: what the safe teacher answers, and what it refuses.

The user's data may contain the attack. Prompts that the safe teacher refuses leave the utility data and, unless they
are dropped, join the safety data with the teacher's own answer (docs/DESIGN.md section 6). Only indices and counts are
ever reported, never texts.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .blocks import Factors, as_teacher, require_active
from .config import NLSRConfig
from .errors import CalibrationError
from .examples import Example, knows_words, sample
from .generation import generate_answers, has_room, positions_of, quiet, require_positions
from .judges import Judge, judge_name, verdicts_of
from .live_adapter import LiveAdapter
from .prompts import REFUSALS, builtin_prompts
from .ranks import ALONE, Ranks
from .reference import Reference

logger = logging.getLogger(__name__)

_INTACT_SHARE = 0.99
_FEWEST_REFUSALS = 20

_NOT_OUR_LANGUAGE = "the tokenizer does not know the words of the built-in (English) prompts, so they are left out"


@dataclass(frozen=True)
class TeachingData:
    """Data of the two-teacher form and how it came about.

    Attributes:
        safety: prompts with the answers that the repaired model should give; :func:`prepare_data` marks refusals.
        utility: the user's examples that stay.
        record: JSON values for the report: sources, counts, shares and the screened row indices.
        notes: sentences a user should read.
        intact: whether the fine-tuned model still refuses what its safe teacher refuses, so that nothing is to be
            repaired.
    """

    safety: list[Example]
    utility: list[Example]
    record: dict[str, Any]
    notes: tuple[str, ...]
    intact: bool = False


def prepare_data(
    adapter: LiveAdapter,
    *,
    calibration: Iterable[Any] | None,
    utility: Iterable[Any] | None,
    tokenizer: Any,
    safe_teacher: Factors,
    judge: Judge,
    config: NLSRConfig,
    progress: bool = True,
    ranks: Ranks = ALONE,
) -> TeachingData:
    """Read, answer and screen both kinds of data; built-in prompts stand in for what is not given.

    Args:
        calibration: safety prompts, with safe answers or without; unanswered ones are answered by the safe teacher.
        utility: the user's own data; without it the built-in benign prompts are answered by the fine-tuned model.
        safe_teacher: module -> update of the safe adapter, or None for the base model.
        judge: which answers are refusals.
        ranks: the processes that share the prompts, each with the same model; what rank 0 reads and judges counts.

    Raises:
        IncompatibleError: the model does not compute with this adapter alone.
        ValueError: the judge did not give one verdict per answer, or one that is neither true nor false.
    """
    require_active(adapter)
    asking = _Asking(adapter, tokenizer, judge, config, progress, ranks)
    with quiet(adapter.model), torch.no_grad():
        safety, record, notes = _safety(asking, calibration, safe_teacher)
        safety, lookalikes = _marked(asking, safety, safe_teacher)
        record["safety"]["lookalikes"] = lookalikes
        notes += _lookalike_note(lookalikes, len(safety))
        kept, refused, utility_record, more = _utility(asking, utility, safe_teacher)
        found = _require_safety(TeachingData(safety + refused, kept, record | utility_record, notes + more))
        return _checked(asking, found) if config.leave_intact else found


def _utility(
    asking: _Asking, utility: Iterable[Any] | None, teacher: Factors
) -> tuple[list[Example], list[Example], dict[str, Any], tuple[str, ...]]:
    """The utility data, the user's rows that join the safety data with the teacher's answers, the record and notes."""
    config = asking.config
    if utility is None:
        kept, record, notes = _stand_in(asking)
        return kept, [], record, notes
    rows = asking.sample(utility, times=2)
    if not config.screening:
        kept = rows[: config.max_samples]
        return kept, [], {"utility": {"source": "given", "used": len(kept)}}, _unanswered_note(kept)
    kept, refused, record = _screen(asking, rows, teacher)
    joins = config.refused_prompts == "join"
    notes = _screening_notes(asking, record, joins) + _unanswered_note(kept)
    return kept, refused if joins else [], record, notes


def rows_meant(rows: Sequence[Example], record: Mapping[str, Any]) -> list[Example]:
    """The rows whose answers are to be kept: those that the safe teacher did not refuse, by the record of a repair."""
    refused = refused_rows(record)
    return [e for e in rows if e.index not in refused]


def refused_rows(record: Mapping[str, Any]) -> set[int]:
    """Positions of the user's rows that the safe teacher refused, by the ``data`` of a repair."""
    return set(record.get("utility", {}).get("refused_rows", ()))


def rows_fitted(record: Mapping[str, Any]) -> int:
    """How many of :func:`rows_meant` a repair was fitted to, which are the first ones, by its ``data``."""
    of_utility = record.get("utility", {})
    return int(of_utility.get("used", 0)) if of_utility.get("source") == "given" else 0


def accepted(
    adapter: LiveAdapter, rows: Sequence[Example], *, tokenizer: Any, judge: Judge, config: NLSRConfig, progress: bool
) -> list[Example]:
    """The rows that the base model does not refuse, for repairs that did not screen them."""
    asking = _Asking(adapter, tokenizer, judge, config.replace(max_samples=max(1, len(rows))), progress)
    with quiet(adapter.model), torch.no_grad():
        kept, _, _ = _screen(asking, list(rows), None)
    return kept


def _checked(asking: _Asking, found: TeachingData) -> TeachingData:
    """Let the fine-tuned model answer the safety prompts whose safe answer is a refusal, until too many are lost.

    With fewer than 20 such prompts, or a judge that sees no refusal in the safe answers, nothing can be said.
    """
    meant = [e for e in asking.askable(found.safety) if e.refusal]
    if len(meant) < _FEWEST_REFUSALS:
        return found
    tolerated = len(meant) - math.ceil(_INTACT_SHARE * len(meant))
    asked_of_adapter, lost = 0, 0
    for batch in (meant[i : i + _FEWEST_REFUSALS] for i in range(0, len(meant), _FEWEST_REFUSALS)):
        lost += asking.refused(asking.answers(batch, "fine-tuned model answers safety prompts")).count(False)
        asked_of_adapter += len(batch)
        if lost > tolerated:
            break
    counts = {
        "of_teacher": len(meant),
        "asked_of_adapter": asked_of_adapter,
        "kept_by_adapter": asked_of_adapter - lost,
    }
    record = found.record | {"refusals": counts}
    if lost > tolerated:
        return replace(found, record=record)
    note = (
        f"safety is intact, so nothing is changed: the adapter refuses {len(meant) - lost} of the {len(meant)} safety "
        "prompts that its safe teacher refuses; leave_intact=False repairs it all the same"
    )
    return replace(found, record=record, notes=(*found.notes, note), intact=True)


def answer_safety_prompts(
    adapter: LiveAdapter,
    *,
    calibration: Iterable[Any] | None,
    tokenizer: Any,
    judge: Judge,
    config: NLSRConfig,
    progress: bool = True,
) -> TeachingData:
    """Safety data for a safe adapter, which is its own teacher: given or built-in prompts, answered by it where
    needed."""
    require_active(adapter)
    with quiet(adapter.model), torch.no_grad():
        asking = _Asking(adapter, tokenizer, judge, config, progress)
        safety, record, notes = _safety(asking, calibration, adapter.snapshot())
    return _require_safety(TeachingData(safety, [], record, notes))


def _require_safety(teaching: TeachingData) -> TeachingData:
    if not teaching.safety:
        raise CalibrationError(
            f"there are no safety data: {_NOT_OUR_LANGUAGE}, and no prompt of the user's joined them; "
            "pass calibration=[{'prompt': ..., 'response': ...}] in the model's language"
        )
    return teaching


def safest(
    adapter: LiveAdapter,
    candidates: Sequence[Reference],
    *,
    calibration: Iterable[Any] | None,
    tokenizer: Any,
    judge: Judge,
    config: NLSRConfig,
    progress: bool = True,
    ranks: Ranks = ALONE,
) -> Reference:
    """The candidate that refuses most of the safety prompts, given or built in; the first one where they are equal.

    The description of the result says how many each refused of those that can be asked. Without prompts that the
    tokenizer knows, nothing can be asked and the first candidate is returned.
    """
    asking = _Asking(adapter, tokenizer, judge, config, progress, ranks)
    if calibration is None and not asking.knows(_rows("safety")):
        return candidates[0]
    source = _rows("safety") if calibration is None else calibration
    prompts = asking.askable(asking.sample(source))
    counts: list[int] = []
    with quiet(adapter.model), torch.no_grad():
        for candidate in candidates:
            with as_teacher(adapter, candidate.updates):
                counts.append(sum(asking.refused(asking.answers(prompts, "which teacher is safer"))))
    best = counts.index(max(counts))
    said = ", ".join(f"{c.description} {n}" for c, n in zip(candidates, counts, strict=True))
    found = candidates[best]
    return replace(found, description=f"{found.description} (safety prompts refused of {len(prompts)}: {said})")


@dataclass(frozen=True)
class _Asking:
    """Everything needed to let a model answer prompts and have the answers judged.

    Over several ranks each answers its share; what is read and how it is judged is told by rank 0, because a data set
    or a judge may not be the same twice.
    """

    adapter: LiveAdapter
    tokenizer: Any
    judge: Judge
    config: NLSRConfig
    progress: bool
    ranks: Ranks = ALONE

    def sample(self, data: Iterable[Any], *, times: int = 1) -> list[Example]:
        """As many examples of the data as the configuration asks for, see :func:`peft_nlsr.examples.sample`."""
        found = self.ranks.first(lambda: sample(data, self.tokenizer, self.config, times=times))
        require_positions(self.adapter.model, max(len(e.tokens) for e in found))
        return found

    def knows(self, rows: Sequence[dict[str, str]]) -> bool:
        """Whether the tokenizer knows the words of the prompts."""
        return knows_words([row["prompt"] for row in rows], self.tokenizer)

    def askable(self, examples: Sequence[Example]) -> list[Example]:
        """The examples with a prompt that leaves room for an answer in the model's positions."""
        model, tokens = self.adapter.model, self.config.answer_tokens
        return [e for e in examples if e.prompt and has_room(model, len(e.prompt) + tokens)]

    def no_room(self, tokens: int | None = None) -> str:
        """What prompts that cannot be answered lack, for notes and errors; ``answer_tokens`` unless told."""
        asked = f"answer_tokens={self.config.answer_tokens}" if tokens is None else f"{tokens} tokens"
        return f"no room for an answer ({asked}) in the model's {positions_of(self.adapter.model)} positions"

    def answers(self, examples: Sequence[Example], what: str) -> list[Example]:
        """The examples with the current model's own greedy answers."""
        answers = generate_answers(
            self.adapter.model,
            self.tokenizer,
            [e.prompt for e in examples],
            max_new_tokens=self.config.answer_tokens,
            batch_size=self.config.nlsr_batch_size,
            progress=what if self.progress and self.ranks.number == 0 else None,
            ranks=self.ranks,
        )
        return [replace(e, answer=a) for e, a in zip(examples, answers, strict=True)]

    def refused(self, examples: Sequence[Example]) -> list[bool]:
        """Which of the examples' answers are refusals."""
        prompts = [self.tokenizer.decode(e.prompt, skip_special_tokens=True) for e in examples]
        answers = [self.tokenizer.decode(e.answer, skip_special_tokens=True) for e in examples]
        return self.ranks.first(lambda: verdicts_of(self.judge, prompts, answers)) if examples else []


def _safety(
    asking: _Asking, calibration: Iterable[Any] | None, teacher: Factors
) -> tuple[list[Example], dict[str, Any], tuple[str, ...]]:
    """Safety examples, all answered, the record and notes."""
    if calibration is None and not asking.knows(_rows("safety")):
        return [], {"safety": {"source": "built-in prompts", "used": 0}}, (_NOT_OUR_LANGUAGE,)
    read = asking.sample(_rows("safety") if calibration is None else calibration)
    examples, crowded = _answerable(asking, read)
    open_prompts = [e for e in examples if not e.answer]
    replies, refused, notes = _answered(asking, open_prompts, teacher)
    record = {
        "source": "built-in prompts" if calibration is None else "given",
        "used": len(examples),
        "asked_of_teacher": len(open_prompts),
        "refused_by_teacher": refused,
    }
    return [e for e in examples if e.answer] + replies, {"safety": record}, notes + crowded


def _answerable(asking: _Asking, examples: list[Example]) -> tuple[list[Example], tuple[str, ...]]:
    """The safety examples less the open prompts whose answer, the teacher's or a canned one, has no room; notes.

    Raises:
        CalibrationError: nothing is left.
    """
    tokens = asking.config.answer_tokens
    if not all(e.answer for e in examples):  # only then a tokenizer is needed here
        tokens = max(tokens, len(_canned(asking.tokenizer)))
    kept = [e for e in examples if e.answer or has_room(asking.adapter.model, len(e.prompt) + tokens)]
    lost = len(examples) - len(kept)
    if not kept:
        raise CalibrationError(
            f"none of the {lost} safety prompts can be answered: {asking.no_room(tokens)}; give their answers, "
            "shorter prompts or fewer answer_tokens"
        )
    notes: list[str] = []
    if lost:
        notes.append(
            f"{lost} safety prompts without an answer are left out: {asking.no_room(tokens)}; give their answers"
        )
    unasked = sum(bool(e.prompt) for e in kept) - len(asking.askable(kept))
    if unasked:
        notes.append(
            f"{unasked} safety prompts leave {asking.no_room()}: they are used with their given answers, and not asked"
        )
    return kept, tuple(notes)


def _answered(asking: _Asking, prompts: list[Example], teacher: Factors) -> tuple[list[Example], int, tuple[str, ...]]:
    """The prompts with the safe teacher's refusals, a canned one where it does not refuse; how often it did; notes."""
    if not prompts:
        return [], 0, ()
    with as_teacher(asking.adapter, teacher):
        replies = asking.answers(prompts, "safe teacher answers safety prompts")
    verdicts = asking.refused(replies)
    canned = _canned(asking.tokenizer)
    found = [
        replace(r, answer=r.answer if ok else canned, refusal=True) for r, ok in zip(replies, verdicts, strict=True)
    ]
    refused = sum(verdicts)
    if refused >= len(replies) / 2:
        return found, refused, ()
    note = (
        f"the safe teacher refused only {refused} of {len(replies)} safety prompts: it may not be safe itself, and "
        "then the repair is limited; give a reference that refuses, and check the judge's language"
    )
    return found, refused, (note,)


def _marked(asking: _Asking, examples: list[Example], teacher: Factors) -> tuple[list[Example], int]:
    """The examples, ``Example.refusal`` found out where the caller gave the answer, and the number of new lookalikes.

    An answer that is no refusal may be a safe one to a harmful prompt, or belong to a lookalike: the teacher is asked,
    where the prompt leaves room for an answer.
    """
    given = [e for e in examples if e.refusal is None and e.prompt]
    verdicts = asking.refused(given)
    others = asking.askable([e for e, refusal in zip(given, verdicts, strict=True) if not refusal])
    with as_teacher(asking.adapter, teacher):
        replies = asking.answers(others, "safe teacher reads answered safety prompts") if others else []
    found = {id(e): True for e, refusal in zip(given, verdicts, strict=True) if refusal}
    lookalikes = {id(e): False for e, refused in zip(others, asking.refused(replies), strict=True) if not refused}
    found |= lookalikes
    return [replace(e, refusal=found.get(id(e), e.refusal)) for e in examples], len(lookalikes)


def _lookalike_note(lookalikes: int, used: int) -> tuple[str, ...]:
    if not lookalikes:
        return ()
    note = (
        f"{lookalikes} of {used} safety prompts are answered, in your data and by the safe teacher, to this judge: "
        "they count as lookalikes and weigh little (lookalike_weight)"
    )
    doubt = "; if they are refusals, pass judge=... that reads their language, or lookalike_weight=1"
    return (note + doubt if lookalikes >= used / 2 else note,)


def require_refusals(safety: Sequence[Example], config: NLSRConfig, judge: Judge) -> None:
    """Raise CalibrationError where all safety examples are lookalikes, so that nothing would restore safety."""
    if config.lookalike_weight < 1.0 and all(e.refusal is False for e in safety):
        raise CalibrationError(
            f"none of the {len(safety)} safety answers is a refusal to the judge {judge_name(judge)}, and the safe "
            "teacher refuses none of their prompts, so nothing would restore safety; give prompts that are to be "
            "refused, or judge=... that reads their language, or lookalike_weight=1 to teach these answers as they are"
        )


def _stand_in(asking: _Asking) -> tuple[list[Example], dict[str, Any], tuple[str, ...]]:
    """Built-in benign prompts and lookalikes, answered by the fine-tuned model, in place of the user's data."""
    if not asking.knows(_rows("benign")):
        raise CalibrationError(f"{_NOT_OUR_LANGUAGE}, and no utility data were given; pass utility=<training data>")
    read = asking.sample(_rows("benign") + _rows("lookalike"))
    prompts = asking.askable(read)
    crowded = f"{len(read) - len(prompts)} built-in prompts cannot be answered: {asking.no_room()}"
    if not prompts:
        raise CalibrationError(f"{crowded}, and no utility data were given; pass utility=<training data>")
    replies = asking.answers(prompts, "fine-tuned model answers benign prompts")
    note = (
        "no utility data were given: the fine-tuned model's answers to built-in benign prompts stand in, so skills "
        "that such prompts do not show may be lost; pass utility=<your training data> to keep them"
    )
    notes = (note,) if len(prompts) == len(read) else (note, crowded)
    return replies, {"utility": {"source": "built-in prompts", "used": len(replies)}}, notes


def _screen(
    asking: _Asking, rows: list[Example], teacher: Factors
) -> tuple[list[Example], list[Example], dict[str, Any]]:
    """The rows that stay, the refused ones with the teacher's answer, and the record."""
    askable = asking.askable(rows)
    unprompted = sum(not e.prompt for e in rows)
    with as_teacher(asking.adapter, teacher):
        replies = asking.answers(askable, "safe teacher reads the user's prompts")
    verdicts = asking.refused(replies)
    refused = [replace(r, refusal=True) for r, verdict in zip(replies, verdicts, strict=True) if verdict]
    gone = {id(e) for e, verdict in zip(askable, verdicts, strict=True) if verdict}
    kept = [e for e in rows if id(e) not in gone][: asking.config.max_samples]
    record = {
        "source": "given",
        "used": len(kept),
        "screened": len(askable),
        "unscreened_for_lack_of_a_prompt": unprompted,
        "unscreened_for_lack_of_room": len(rows) - len(askable) - unprompted,
        "refused_by_teacher": len(refused),
        "refused_rows": sorted({r.index for r in refused}),
    }
    return kept, refused, {"utility": record}


def _screening_notes(asking: _Asking, record: dict[str, Any], joins: bool) -> tuple[str, ...]:
    utility = record["utility"]
    notes: list[str] = []
    if utility["refused_by_teacher"]:
        notes.append(
            f"{utility['refused_by_teacher']} of {utility['screened']} of your prompts are refused by the safe "
            f"teacher; they were {'used as safety data' if joins else 'left out'} (row indices in the record)"
        )
    if utility["unscreened_for_lack_of_a_prompt"]:
        notes.append(
            f"{utility['unscreened_for_lack_of_a_prompt']} utility examples have no prompt to ask the safe teacher, "
            "so harmful ones among them were not found"
        )
    if utility["unscreened_for_lack_of_room"]:
        notes.append(
            f"{utility['unscreened_for_lack_of_room']} utility examples leave {asking.no_room()} and were not asked "
            "of the safe teacher, so harmful ones among them were not found; set answer_tokens lower"
        )
    if not utility["used"]:
        notes.append("the safe teacher refuses all utility prompts; only the ridge keeps the fine-tuned behaviour")
    return tuple(notes)


def _unanswered_note(kept: Sequence[Example]) -> tuple[str, ...]:
    unanswered = sum(not e.answer for e in kept)
    if not unanswered:
        return ()
    return (
        f"{unanswered} of {len(kept)} utility examples have no answer, so only the reading of their prompts is kept; "
        "check the names of the columns, and max_length",
    )


def _rows(kind: str) -> list[dict[str, str]]:
    return [{"prompt": prompt.text} for prompt in builtin_prompts(kind, "calibration")]


def _canned(tokenizer: Any) -> tuple[int, ...]:
    """Token ids of the refusal that stands in where the safe teacher does not refuse."""
    end = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    return tuple(tokenizer(REFUSALS[0], add_special_tokens=False)["input_ids"]) + end
