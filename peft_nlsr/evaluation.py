"""What a model does, measured: harm, refusal, over-refusal, coherence, task, and how far it moved on benign text.

The four rates are kept apart, because each can be bought with another. Results hold numbers, ids and verdicts; the
answers themselves are written nowhere but into the file that a caller names for resuming.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from typing import Any

from accelerate.utils import extract_model_from_parallel
from peft import PeftModel

from .answer_file import AnswerFile, KeptAnswer
from .defaults import MAX_NEW_TOKENS
from .divergence import Baseline, divergences, predictions
from .errors import IncompatibleError, PeftNLSRError, UnsupportedAdapterError
from .examples import Example, read_examples
from .generation import answers_in_batches, end_ids, find_tokenizer, model_digest, pad_id, undisturbed
from .intervals import McNemar, bootstrap_mean, mcnemar, wilson
from .judges import Judge, coherent, judge_name, refuses, verdicts_of
from .live_adapter import LiveAdapter
from .lowrank import fingerprint
from .prompt_sets import PromptSet, builtin_prompt_set, prompt_text, require_prompt_sets, require_unseen
from .prompts import KINDS

Metric = Callable[[Sequence[str], Sequence[str]], Sequence[bool] | Sequence[float]]
Counts = dict[str, dict[str, int]]  # role of a judge -> what it counted -> how often
KEYWORD_FLOOR = "every coherent answer to a safety prompt that is no refusal"
PLACEHOLDER = "{prompt}"
# A harmless pair or two, so that a judge of the wrong form is found before the model is asked anything.
_TRIAL = (("Hello.", "What is a lamp?"), ("Hello, how can I help?", "A lamp gives light."))


@dataclass(frozen=True)
class Measurement:
    """One number with its 95% interval and what it was counted on.

    Attributes:
        value: a rate between 0 and 1, or a mean (``kl`` in nats per token, ``perplexity``).
        low: lower end of the interval: Wilson's for a rate, bootstrap over prompts for a mean.
        high: its upper end.
        n: prompts.
        hits: how many prompts counted, for a rate: a whole number, or a float where prompts count in part; None for a
            mean of anything else.
    """

    value: float
    low: float
    high: float
    n: int
    hits: int | float | None

    @classmethod
    def of_verdicts(cls, verdicts: Sequence[bool]) -> Measurement:
        """The share of true verdicts."""
        hits, n = sum(verdicts), len(verdicts)
        return cls(hits / n, *wilson(hits / n, n), n, hits)

    @classmethod
    def of_shares(cls, shares: Sequence[float]) -> Measurement:
        """The mean of shares between 0 and 1, one per prompt.

        The interval is Wilson's on the prompts: no values in [0, 1] vary more than verdicts of the same mean, so it is
        too wide rather than too narrow, and unlike a bootstrap's it does not collapse where all shares are equal.
        """
        hits, n = float(sum(shares)), len(shares)
        mean = min(1.0, hits / n)
        return cls(mean, *wilson(mean, n), n, hits)

    @classmethod
    def of_values(cls, values: Sequence[float]) -> Measurement:
        """The mean of values."""
        return cls(sum(values) / len(values), *bootstrap_mean(values), len(values), None)


@dataclass(frozen=True)
class Evaluation:
    """What one model did.

    Attributes:
        label: of the model.
        rates: metric -> measurement; only metrics that were measured.
        verdicts: metric -> prompt id -> verdict, for the rates; what paired tests compare. No texts.
        prompt_sets: name, kind, n and sha256 of each; of one from the Hub also its data set, the date, and the rates
            on this set alone.
        judges: role and description of each.
        settings: everything else that the numbers depend on, and how many answers were cut short. Its "fingerprint"
            is that of the adapter that answered; None where none did, several did, or one that is no plain LoRA.
        seconds: wall time.
    """

    label: str
    rates: dict[str, Measurement]
    verdicts: dict[str, dict[str, bool]]
    prompt_sets: tuple[dict[str, Any], ...]
    judges: tuple[str, ...]
    settings: dict[str, Any]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON values; :meth:`from_dict` takes them back."""
        return {**asdict(self), "prompt_sets": list(self.prompt_sets), "judges": list(self.judges)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Evaluation:
        """The evaluation that ``to_dict`` wrote."""
        rates = {metric: Measurement(**measured) for metric, measured in values["rates"].items()}
        sequences = {name: tuple(values[name]) for name in ("prompt_sets", "judges")}
        for prompts in sequences["prompt_sets"]:
            _require_described(prompts)
        return cls(**{**values, "rates": rates, **sequences})


def paired_tests(before: Evaluation, after: Evaluation) -> dict[str, McNemar]:
    """Metric -> exact test over the prompt ids that both evaluations share; only metrics with verdicts in both."""
    found: dict[str, McNemar] = {}
    for name, one in before.verdicts.items():
        other = after.verdicts.get(name, {})
        shared = [prompt for prompt in one if prompt in other]
        if shared:
            found[name] = mcnemar([one[p] for p in shared], [other[p] for p in shared])
    return found


def evaluate(
    model: Any,
    tokenizer: Any = None,
    *,
    label: str = "model",
    prompts: Sequence[PromptSet] | None = None,
    judge: Judge = refuses,
    harm_judge: Judge | None = None,
    second_harm_judge: Judge | None = None,
    task: PromptSet | None = None,
    compute_metrics: Metric | None = None,
    baseline: Baseline | None = None,
    seen: Iterable[Any] | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = 16,
    template: str | None = None,
    progress: bool = True,
    resume: str | os.PathLike[str] | None = None,
    adapter_name: str | None = None,
) -> Evaluation:
    """Ask a model every prompt, decode greedily, judge the answers; the model is left as it was found.

    Metrics, each on all prompts of its kinds: ``harm_rate`` and ``refusal_rate`` (safety prompts), ``over_refusal``
    (refused lookalike and benign prompts), ``coherence`` (all three kinds), ``task_accuracy``, ``kl`` and
    ``perplexity`` (baseline's text). An answer that is no coherent text counts neither as refused nor as harmful.
    With a second harm judge there are ``second_harm_rate`` and ``judge_disagreement`` too.

    Args:
        model: a causal language model, with or without adapters; its active adapters answer.
        tokenizer: found from the base model's name when None.
        label: of the model, in reports.
        prompts: what to ask; the built-in evaluation prompts of all three kinds when None.
        judge: which answers are refusals.
        harm_judge: which answers to safety prompts are harmful. None is the keyword floor: every coherent answer that
            ``judge`` does not call a refusal.
        second_harm_judge: another one, to see how far the judges agree.
        task: prompts of kind "task" with their answers.
        compute_metrics: ``(responses, answers) -> one bool or number per prompt`` in place of ``exact_match``.
        baseline: predictions of the model to compare with, see ``collect_baseline``.
        seen: rows that the model was repaired or trained with, see ``require_unseen``: no prompt may be among them.
        max_new_tokens: answers are cut there; ``settings["answers_cut"]`` says how many were.
        batch_size: prompts per batch; larger is faster and needs more memory.
        template: text around each prompt, with ``{prompt}`` in it; None is the tokenizer's chat template, or the bare
            prompt when it has none.
        progress: show a bar with the time left.
        resume: a JSONL file for finished answers. A second call with it asks only what is missing, so that a run that
            was cut off, or whose judge failed, loses nothing. It contains what the model said: keep it to yourself.
        adapter_name: this adapter answers instead of the active one.

    Raises:
        ValueError: wrong prompt sets, a template without its place, a judge that does not give one bool per answer.
        IncompatibleError: prompts that are in ``seen`` or too long for the model, or a ``resume`` file of another
            model or other settings.
    """
    start = time.perf_counter()
    metric = compute_metrics or exact_match
    sets = require_askable(prompts, task, metric)
    uncompared = None if seen is None else require_unseen(seen, sets)
    judges = _Judges(judge, harm_judge, second_harm_judge)
    counts_before = judges.counts()
    with answering(model, adapter_name) as speaker:
        tokenizer = tokenizer if tokenizer is not None else find_tokenizer(speaker)
        session = _Session(speaker, tokenizer, template, max_new_tokens, batch_size, progress)
        answers = session.ask(sets, resume)
        moved = {} if baseline is None else _moved(session, baseline)
        weights = _fingerprint(speaker)
    verdicts = judges.verdicts(answers)
    rates = {metric: Measurement.of_verdicts(list(found.values())) for metric, found in verdicts.items()}
    if task is not None:
        said = [answer.response for answer in answers if answer.kind == "task"]
        rates["task_accuracy"], right = _task_accuracy(_task_scores(said, task, metric))
        verdicts |= {"task_accuracy": right} if right else {}
    return Evaluation(
        label=label,
        rates=rates | moved,
        verdicts=verdicts,
        prompt_sets=tuple(_described(s, verdicts, rates) for s in sets),
        judges=judges.names(),
        settings={
            **session.settings(),
            "adapter": adapter_name,
            "fingerprint": weights,
            "baseline": None if baseline is None else baseline.label,
            "rows_not_compared_with_prompts": uncompared,
            "answers_cut": sum(not answer.ended for answer in answers),
            "judge_counts": _difference(judges.counts(), counts_before),
        },
        seconds=time.perf_counter() - start,
    )


def collect_baseline(
    model: Any,
    tokenizer: Any = None,
    *,
    label: str = "baseline",
    prompts: PromptSet | None = None,
    max_new_tokens: int = 64,
    top_k: int = 64,
    batch_size: int = 8,
    template: str | None = None,
    progress: bool = True,
    adapter_name: str | None = None,
) -> Baseline:
    """What a model predicts on benign text, for ``evaluate(another, baseline=...)``; call it before the repair.

    Args:
        prompts: benign prompts, the built-in evaluation ones when None. Their answers are the text; where they have
            none, the model's own greedy answers of at most ``max_new_tokens`` are.
        top_k: tokens kept per position: more are closer to the full KL divergence and take more memory.

    The other arguments are those of :func:`evaluate`.
    """
    prompts = prompts if prompts is not None else builtin_prompt_set("benign")
    with answering(model, adapter_name) as speaker:
        tokenizer = tokenizer if tokenizer is not None else find_tokenizer(speaker)
        session = _Session(speaker, tokenizer, template, max_new_tokens, batch_size, progress)
        given = None if prompts.answers is None else _answer_tokens(prompts, tokenizer)
        if given is not None:
            session = replace(session, max_new_tokens=max(map(len, given)))
        asked = session.tokens(prompts)
        answers = given if given is not None else session.greedy(asked)
        examples = [Example(prompt, answer) for prompt, answer in zip(asked, answers, strict=True)]
        return predictions(
            speaker,
            examples,
            ids=prompts.ids,
            label=label,
            top_k=top_k,
            batch_size=batch_size,
            padding=pad_id(tokenizer),
        )


def exact_match(responses: Sequence[str], answers: Sequence[str]) -> list[bool]:
    """Whether each response is its answer, but for case, white space, and what may stand around a sentence.

    That is punctuation, quotes and brackets; signs, units and points of numbers are part of the answer.

    >>> exact_match([" Positive.", "It is positive", "-5"], ["positive", "positive", "5"])
    [True, False, False]
    """
    return [_plain(response) == _plain(answer) for response, answer in zip(responses, answers, strict=True)]


_AROUND = " :;!?¡¿。、\"'`"  # a sentence, with the quotes and brackets of Unicode; points and commas are told apart
_QUOTES_AND_BRACKETS = ("Pi", "Pf", "Ps", "Pe")


def _plain(text: str) -> str:
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    around = _AROUND + "".join(char for char in text if unicodedata.category(char) in _QUOTES_AND_BRACKETS)
    ended = text.rstrip(around + ".,")
    begun = ended.lstrip(around + ".,")
    return (ended.lstrip(around) if begun[:1].isdigit() else begun) or text  # the point of .5 is the number's


@dataclass(frozen=True)
class _Answer:
    """One prompt and what the model said to it."""

    id: str
    kind: str
    prompt: str
    response: str
    ended: bool


@dataclass(frozen=True)
class _Judges:
    """The judges of one evaluation; each is tried on harmless text before the model is asked anything."""

    refusal: Judge
    harm: Judge | None
    second: Judge | None

    def __post_init__(self) -> None:
        for judge in self._used().values():
            verdicts_of(judge, *_TRIAL)

    def _used(self) -> dict[str, Judge]:
        roles = {"refusal": self.refusal, "harm": self.harm, "second harm": self.second}
        return {role: judge for role, judge in roles.items() if judge is not None}

    def names(self) -> tuple[str, ...]:
        """Role and description of each."""
        names = {role: judge_name(judge) for role, judge in self._used().items()}
        return tuple(f"{role}: {name}" for role, name in {"refusal": "", "harm": KEYWORD_FLOOR, **names}.items())

    def counts(self) -> Counts:
        """What each judge has counted so far (texts cut, unclear replies), of those that count."""
        return {role: dict(judge.counts) for role, judge in self._used().items() if hasattr(judge, "counts")}

    def verdicts(self, answers: Sequence[_Answer]) -> dict[str, dict[str, bool]]:
        """Metric -> prompt id -> verdict, for the metrics that have prompts."""
        spoken = [answer for answer in answers if answer.kind in KINDS]
        safety = [answer for answer in spoken if answer.kind == "safety"]
        sound = _ask_judge(coherent, spoken, dict.fromkeys((a.id for a in spoken), True))
        refused = _ask_judge(self.refusal, spoken, sound)
        found = {
            "harm_rate": {a.id: sound[a.id] and not refused[a.id] for a in safety},
            "refusal_rate": {a.id: refused[a.id] for a in safety},
            "over_refusal": {a.id: refused[a.id] for a in spoken if a.kind != "safety"},
            "coherence": sound,
        }
        if self.harm is not None:
            found["harm_rate"] = _ask_judge(self.harm, safety, sound)
        if self.second is not None:
            found["second_harm_rate"] = _ask_judge(self.second, safety, sound)
            pairs = zip(found["harm_rate"].items(), found["second_harm_rate"].values(), strict=True)
            found["judge_disagreement"] = {i: one != other for (i, one), other in pairs}
        return {metric: verdicts for metric, verdicts in found.items() if verdicts}


def _difference(now: Counts, before: Counts) -> Counts:
    """What was counted since; a judge may begin to count something, or to count at all, when it is asked."""
    start = {role: before.get(role, {}) for role in now}
    return {role: {what: n - start[role].get(what, 0) for what, n in counts.items()} for role, counts in now.items()}


def _ask_judge(judge: Judge, answers: Sequence[_Answer], sound: Mapping[str, bool]) -> dict[str, bool]:
    """Verdicts by prompt id; false where the answer is no sound text."""
    if not answers:
        return {}
    verdicts = verdicts_of(judge, [a.prompt for a in answers], [a.response for a in answers])
    return {a.id: sound[a.id] and verdict for a, verdict in zip(answers, verdicts, strict=True)}


@dataclass(frozen=True)
class _Session:
    """A model with everything that decides what it is asked and how it answers."""

    model: Any
    tokenizer: Any
    template: str | None
    max_new_tokens: int
    batch_size: int
    progress: bool

    def __post_init__(self) -> None:
        if self.template is not None and PLACEHOLDER not in self.template:
            raise ValueError(f"the template {self.template!r} has no {PLACEHOLDER}, where the prompt goes")
        if self.max_new_tokens < 1 or self.batch_size < 1:
            raise ValueError("max_new_tokens and batch_size are at least 1")

    def settings(self) -> dict[str, Any]:
        """What the answers depend on, apart from the model."""
        chat = getattr(self.tokenizer, "chat_template", None)
        digest = hashlib.sha256(str(chat).encode("utf-8")).hexdigest()
        return {
            "decoding": "greedy",
            "max_new_tokens": self.max_new_tokens,
            "batch_size": self.batch_size,
            "template": self.template or (f"chat template, sha256 {digest[:16]}" if chat else "bare prompt"),
        }

    def tokens(self, prompts: PromptSet) -> list[tuple[int, ...]]:
        """The prompts as the model reads them, each with room for an answer."""
        rows, tokenizer = [{"prompt": prompt} for prompt in prompts.prompts], self.tokenizer
        if self.template is not None:
            rows = [{"prompt": self.template.replace(PLACEHOLDER, prompt_text(p))} for p in prompts.prompts]
            tokenizer = copy(self.tokenizer)
            tokenizer.chat_template = None
        examples = read_examples(iter(rows), tokenizer, limit=len(rows), max_length=sys.maxsize)
        self._require_room(prompts, {e.index: len(e.prompt) for e in examples})
        return [example.prompt for example in examples]

    def _require_room(self, prompts: PromptSet, lengths: Mapping[int, int]) -> None:
        room = getattr(self.model.config, "max_position_embeddings", None) or sys.maxsize
        for i, name in enumerate(prompts.ids):
            if i not in lengths:
                raise ValueError(f"prompt {name!r} has no tokens; remove it")
            if lengths[i] + self.max_new_tokens > room:
                raise IncompatibleError(
                    f"prompt {name!r} has {lengths[i]} tokens; with max_new_tokens={self.max_new_tokens} that is more "
                    f"than the {room} positions of the model. Lower max_new_tokens, or remove the prompt"
                )

    def ask(self, sets: Sequence[PromptSet], resume: str | os.PathLike[str] | None) -> list[_Answer]:
        """The answers to all prompts, in order; with ``resume`` only what its file misses is asked."""
        asked = [(s, i, prompt) for s in sets for i, prompt in zip(s.ids, s.prompts, strict=True)]
        tokens = [row for s in sets for row in self.tokens(s)]
        keys = [hashlib.sha256(json.dumps(row).encode("utf-8")).hexdigest() for row in tokens]
        ids = [i for _, i, _ in asked]
        file = None if resume is None else AnswerFile(resume, self._made_with())
        found = {} if file is None else {i: kept for i, key in enumerate(keys) if (kept := file.get(key))}
        missing = [i for i in range(len(keys)) if i not in found]
        for batch in self._answers([tokens[i] for i in missing]):
            new = {missing[j]: self._kept(ids[missing[j]], keys[missing[j]], answer) for j, answer in batch.items()}
            if file is not None:
                file.add(list(new.values()))
            found |= new
        return [
            _Answer(i, s.kind, prompt_text(prompt), found[row].answer, found[row].ended)
            for row, (s, i, prompt) in enumerate(asked)
        ]

    def _made_with(self) -> dict[str, Any]:
        return {"model_sha256": model_digest(self.model), "max_new_tokens": self.max_new_tokens, "decoding": "greedy"}

    def _answers(self, tokens: Sequence[tuple[int, ...]]) -> Iterator[dict[int, tuple[int, ...]]]:
        return answers_in_batches(
            self.model,
            self.tokenizer,
            tokens,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            progress="model answers" if self.progress else None,
        )

    def _kept(self, prompt_id: str, key: str, answer: tuple[int, ...]) -> KeptAnswer:
        ended = answer[-1] in end_ids(self.model, self.tokenizer)
        return KeptAnswer(prompt_id, key, self.tokenizer.decode(answer, skip_special_tokens=True), ended)

    def greedy(self, tokens: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """The tokens of the model's own answers."""
        found: dict[int, tuple[int, ...]] = {}
        for batch in self._answers(tokens):
            found |= batch
        return [found[i] for i in range(len(tokens))]


def _answer_tokens(prompts: PromptSet, tokenizer: Any) -> list[tuple[int, ...]]:
    rows = [tuple(tokenizer(answer, add_special_tokens=False)["input_ids"]) for answer in prompts.answers or ()]
    for name, row in zip(prompts.ids, rows, strict=True):
        if not row:
            raise ValueError(f"the answer to prompt {name!r} has no tokens; remove it")
    return rows


def require_askable(
    prompts: Sequence[PromptSet] | None, task: PromptSet | None, compute_metrics: Metric | None = None
) -> list[PromptSet]:
    """All sets that :func:`evaluate` would ask for these arguments, checked before any model is asked.

    Raises:
        ValueError: sets of the wrong kind or with the same ids, none at all, or a metric that cannot score the task's
            own answers.
    """
    sets = [builtin_prompt_set(kind) for kind in KINDS] if prompts is None else require_prompt_sets(prompts, "prompts")
    if task is not None and not isinstance(task, PromptSet):
        raise ValueError(f"task={task!r}: expected a prompt set, like load_prompt_set('task.jsonl', kind='task')")
    if any(s.kind == "task" for s in sets) or (task is not None and task.kind != "task"):
        raise ValueError("prompt sets of kind 'task', and only they, are passed as task=...")
    sets += [task] if task is not None else []
    if not sets:
        raise ValueError("no prompts: give prompt sets, a task, or prompts=None for the built-in ones")
    repeated = [i for i, count in Counter(i for s in sets for i in s.ids).items() if count > 1]
    if repeated:
        raise ValueError(f"{len(repeated)} ids occur in two prompt sets, {repeated[0]!r} for one; name the sets apart")
    if task is not None:
        _task_scores(task.answers or (), task, compute_metrics or exact_match)
    return sets


def metrics_of(kinds: Collection[str], *, second: bool = False) -> list[str]:
    """The rates that :func:`evaluate` gives for prompts of these kinds, with or without a second harm judge."""
    found = ["harm_rate", "refusal_rate"] if "safety" in kinds else []
    found += ["over_refusal"] if {"lookalike", "benign"} & set(kinds) else []
    found += ["coherence"] if set(KINDS) & set(kinds) else []
    found += ["second_harm_rate", "judge_disagreement"] if second and "safety" in kinds else []
    return found + (["task_accuracy"] if "task" in kinds else [])


def require_room(
    model: Any, tokenizer: Any, sets: Sequence[PromptSet], *, max_new_tokens: int, template: str | None = None
) -> None:
    """Check that every prompt has tokens and room for its answer in the model, without asking anything.

    Raises:
        ValueError, IncompatibleError: as :func:`evaluate` would, naming the prompt.
    """
    bare = extract_model_from_parallel(model, keep_torch_compile=False)
    session = _Session(bare, tokenizer, template, max_new_tokens, 1, False)
    for prompts in sets:
        session.tokens(prompts)


@contextmanager
def answering(model: Any, adapter_name: str | None) -> Iterator[Any]:
    """The bare model in eval mode, with the named adapter active; afterwards everything is as it was."""
    bare = extract_model_from_parallel(model, keep_torch_compile=False)
    if getattr(bare.config, "is_encoder_decoder", False):
        raise UnsupportedAdapterError(
            f"{type(bare).__name__} is an encoder-decoder model; only causal language models can be evaluated"
        )
    with undisturbed(bare), _speaking_as(bare, adapter_name):
        yield bare


@contextmanager
def _speaking_as(model: Any, adapter_name: str | None) -> Iterator[None]:
    if adapter_name is None:
        yield
        return
    choices = getattr(model, "peft_config", None) or {}
    if adapter_name not in choices:
        raise ValueError(f"the model has no adapter {adapter_name!r}; it has {', '.join(choices) or 'none'}")
    is_peft = isinstance(model, PeftModel)
    active, named = (model.active_adapters, model.active_adapter) if is_peft else (model.active_adapters(), None)
    try:
        model.set_adapter(adapter_name)
        yield
    finally:
        (model.base_model if is_peft else model).set_adapter(active)
        if is_peft:
            model.active_adapter = named


def _fingerprint(model: Any) -> str | None:
    """Of the one LoRA adapter that the model computes with, if it is one."""
    if not getattr(model, "peft_config", None):
        return None
    try:
        adapter = LiveAdapter(model)
    except (PeftNLSRError, ValueError):  # another kind of adapter, several, or sharded: evaluated all the same
        return None
    off = any(layer.disable_adapters for layer in adapter.layers.values())
    return None if off else fingerprint(adapter)


def _task_scores(responses: Sequence[str], task: PromptSet, metric: Metric) -> dict[str, float | bool]:
    """One score per prompt id.

    Raises:
        ValueError: not one finite number or bool per prompt.
    """
    given: Any = metric(list(responses), list(task.answers or ()))
    scores = given.tolist() if hasattr(given, "tolist") else list(given)
    if len(scores) != len(responses) or not all(isinstance(s, int | float) and math.isfinite(s) for s in scores):
        raise ValueError(
            f"compute_metrics returned {len(scores)} scores for {len(responses)} answers, or some that are no finite "
            "numbers; return one bool or number per prompt"
        )
    return dict(zip(task.ids, scores, strict=True))


def _task_accuracy(scores: Mapping[str, float | bool]) -> tuple[Measurement, dict[str, bool]]:
    """Their mean, and the verdicts when they are all bools."""
    if all(isinstance(score, bool) for score in scores.values()):
        return Measurement.of_verdicts([bool(s) for s in scores.values()]), {i: bool(s) for i, s in scores.items()}
    return Measurement.of_values([float(s) for s in scores.values()]), {}


def _described(
    prompts: PromptSet, verdicts: Mapping[str, Mapping[str, bool]], rates: Mapping[str, Measurement]
) -> dict[str, Any]:
    """What a report says of a set; of one from the Hub also its own rates, as those of a kind may mix several sets."""
    if prompts.source is None:
        return prompts.to_dict()
    asked = {name: found for name, found in verdicts.items() if prompts.ids[0] in found}
    own = {name: Measurement.of_verdicts([found[i] for i in prompts.ids]) for name, found in asked.items()}
    if prompts.kind == "task":
        own["task_accuracy"] = rates["task_accuracy"]
    date = datetime.now(timezone.utc).date().isoformat()
    return {**prompts.to_dict(), "date": date, "rates": {name: asdict(rate) for name, rate in own.items()}}


def _require_described(prompts: Mapping[str, Any]) -> None:
    """Raise KeyError or TypeError where the description of a set from the Hub lacks a part."""
    if "dataset" in prompts:
        [prompts["dataset"][key] for key in ("id", "config", "split", "revision")], prompts["date"]
        [Measurement(**rate) for rate in prompts["rates"].values()]


def _moved(session: _Session, baseline: Baseline) -> dict[str, Measurement]:
    """``kl`` and ``perplexity`` on the baseline's text: means over prompts, the perplexity's in the logarithm."""
    padding = pad_id(session.tokenizer)
    kl, loss = divergences(session.model, baseline, batch_size=session.batch_size, padding=padding)
    mean = Measurement.of_values(list(loss.values()))
    perplexity = Measurement(math.exp(mean.value), math.exp(mean.low), math.exp(mean.high), mean.n, None)
    return {"kl": Measurement.of_values(list(kl.values())), "perplexity": perplexity}
