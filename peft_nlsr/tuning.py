"""Searches the settings of a method for the lowest harm rate at a utility tolerance.

Prompts are split by hash: the search sees one part, the figures that count come from the other, once, at the end. What
trials share is computed once, so a trial costs one solve and one evaluation.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import math
import os
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from .applying import apply, revert
from .config import NLSRConfig
from .defaults import TOLERANCE
from .errors import PeftNLSRError
from .evaluation import Evaluation, Measurement
from .files import write_json
from .gate import AnswerRows, answer_rows, losses, with_answers
from .generation import quiet
from .measuring import EvaluationSettings
from .planning import Method, Planner
from .prompt_sets import PromptSet, prompt_text
from .record import Realignment, versions
from .report import metric, say_interval, say_value
from .result_file import ResultFile, key_of

SCHEMA_VERSION = 1
RESULT_NAME = "nlsr_tuning.json"
SEARCHERS = ("auto", "optuna", "grid")
Space = Mapping[str, Sequence[Any]]
Settings = dict[str, Any]

SPACES: dict[str, Space] = {
    "two_teacher": {
        "utility_weight": (0.25, 0.5, 1.0, 2.0, 4.0),
        "decision_weight": (1.0, 3.0, 10.0),
        "ridge": (1e-2, 3e-2, 1e-1),
    },
    "one_shot": {
        "utility_weight": (0.25, 0.5, 1.0, 2.0, 4.0),
        "ridge": (1e-2, 3e-2, 1e-1),
    },
    "nlsr": {
        "sparsity": (0.5, 0.7, 0.8, 0.9),
        "beta": (0.0, 0.5, 0.9, 1.5),
        "score": ("low_rank", "wanda"),
    },
    "safelora": {"normaliser": ("orthogonal", "frobenius"), "kappa": (0.25, 0.5, 0.75, 1.0)},
    "fgsn": {"harmful_rows": (0.2, 0.35, 0.5), "utility_rows": (0.05, 0.1, 0.2), "kappa": (0.5, 0.75, 1.0)},
    "antidote": {"sparsity": (0.8, 0.9, 0.95, 0.99)},
    "resta": {"safety_weight": (0.5, 1.0, 1.5, 2.0), "keep_share": (0.5, 0.7, 1.0)},
}
_SELECTING = ("nlsr", "safelora")
_OF_SELECTION: dict[str, Space] = {
    "least_similar": {"restore_rate": (0.25, 0.5, 0.75, 1.0)},
    "bernoulli": {"prune_probability": (0.1, 0.3, 0.5, 0.7)},
    "bernoulli_released": {"prune_probability": (0.1, 0.3, 0.5, 0.7)},
    "threshold": {"similarity_threshold": (0.4, 0.6, 0.8, 0.9)},
    "all": {},
}
_PROPOSALS = 10


@dataclass(frozen=True)
class Trial:
    """One setting and what it gave on the search prompts.

    Attributes:
        settings: the fields that were searched, and their values.
        rates: metric -> measurement.
        losses: metric -> how far it is worse than the fine-tuned adapter's, for all that is guarded; 0 when better.
        refused: why these settings cannot be used on this adapter, one sentence; then nothing was measured.
    """

    settings: Settings
    rates: dict[str, Measurement]
    losses: dict[str, float]
    refused: str | None = None

    @property
    def harm(self) -> float | None:
        """The harm rate; None where the settings were refused."""
        return None if self.refused is not None else self.rates["harm_rate"].value

    def cost(self, tolerance: float) -> float:
        """What the search minimises: harm where no loss exceeds the tolerance, above 1 where one does, infinite where
        nothing could be measured."""
        if self.harm is None:
            return math.inf
        excess = max(0.0, max(self.losses.values(), default=0.0) - tolerance)
        return 1.0 + excess + self.harm if excess > 0.0 else self.harm


@dataclass(frozen=True)
class Tuning:
    """A finished search.

    Attributes:
        config: the chosen settings; the default ones unless others were better in the search.
        trials: in the order in which they were made, the default first.
        held_out: "fine-tuned", "default" and "chosen" -> evaluation on prompts that the search never saw.
        settings: searcher, space, tolerance, seed, split and versions, JSON values.
    """

    config: NLSRConfig
    trials: tuple[Trial, ...]
    held_out: dict[str, Evaluation]
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "schema_version": SCHEMA_VERSION,
            "config": self.config.to_dict(),
            "trials": [asdict(trial) for trial in self.trials],
            "held_out": {name: evaluation.to_dict() for name, evaluation in self.held_out.items()},
            "settings": self.settings,
        }

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``nlsr_config.json`` (the chosen settings) and ``nlsr_tuning.json`` into a folder; returns it."""
        self.config.save_pretrained(folder)
        write_json(Path(folder) / RESULT_NAME, self.to_dict())
        return Path(folder)

    def to_markdown(self) -> str:
        """The figures on held-out prompts, a column per adapter."""
        names = [
            name for name in self.held_out["fine-tuned"].rates if all(name in e.rates for e in self.held_out.values())
        ]
        lines = [["held-out prompts", *self.held_out], ["---", *["--:"] * len(self.held_out)]]
        lines += [[metric(n).label, *(_said(e.rates[n]) for e in self.held_out.values())] for n in names]
        return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def tune(
    model: Any,
    *,
    base: Method | None = None,
    space: Space | None = None,
    trials: int = 16,
    tolerance: float = TOLERANCE,
    held_out: float = 0.5,
    searcher: str = "auto",
    evaluation: EvaluationSettings | None = None,
    calibration: Iterable[Any] | None = None,
    utility: Iterable[Any] | None = None,
    tokenizer: Any = None,
    seed: int = 0,
    resume: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    adapter_name: str | None = None,
    progress: bool = True,
) -> Tuning:
    """Search settings for the lowest harm rate; the model is left as it was.

    No guarded metric (task accuracy, accuracy on the user's answers, coherence, over-refusal) may be worse than the
    fine-tuned adapter's by more than the tolerance. Answers are those of rows that the default settings do not fit
    to, the same in every trial; ``settings["answer_rows"]`` of an evaluation says so where too few were left.
    Equal arguments give equal results.

    Args:
        model: a PeftModel with the fine-tuned adapter, not realigned yet.
        base: the method to search around, its config being the default that has to be beaten;
            ``Method("default", NLSRConfig())`` when None.
        space: field -> values to try; :func:`default_space` of the settings of ``base`` when None.
        trials: settings that are tried, the default included.
        tolerance: how much worse a guarded metric may be, as a share (0.02 is two points).
        held_out: share of the prompts that the search does not see.
        searcher: "optuna" (TPE), "grid" (in an order drawn from the seed), or "auto": optuna where it is installed.
        evaluation: prompts, task, judges and generation; ``EvaluationSettings()`` when None.
        calibration, utility, tokenizer, adapter_name: see :func:`peft_nlsr.nlsr_realign`.
        seed: of the order of trials.
        resume: a JSON file for finished trials; a second call with it repeats none of them.
        output: a folder for the chosen settings, see :meth:`Tuning.save`.

    Raises:
        ValueError: an unknown field or searcher, or too few prompts to split.
        IncompatibleError: prompts that are also in the data, or a ``resume`` file of another run.
        PeftNLSRError: the default settings cannot be used on this adapter; or optuna is asked for and not installed.
    """
    base = base or Method("default", NLSRConfig())
    evaluation = evaluation or EvaluationSettings()
    space = _require_space(space, base)
    _require_trials(trials, evaluation)
    propose = _searchers(searcher)
    planner = Planner(
        model,
        calibration=calibration,
        utility=utility,
        tokenizer=tokenizer,
        judge=evaluation.judge,
        adapter_name=adapter_name,
        progress=progress,
    )
    evaluation.require_unseen(planner.calibration, planner.utility)
    search, kept_back = split(evaluation, held_out)
    bench = _Bench(planner, base, search, resume)
    found = _search(bench, space, propose, trials=trials, tolerance=tolerance, seed=seed)
    best = min(found, key=lambda trial: _preference(trial, found[0], tolerance))
    config = base.config.replace(**best.settings)
    figures = bench.final(kept_back, {"default": base.config, "chosen": config})
    asked = {"search": search.to_dict()["prompt_sets"], "held_out": kept_back.to_dict()["prompt_sets"]}
    chosen = {"trials": trials, "tolerance": tolerance, "seed": seed, "searcher": propose.__name__.strip("_")}
    said = {**chosen, "space": {k: list(v) for k, v in space.items()}, "prompt_sets": asked, "versions": versions()}
    tuning = Tuning(config, tuple(found), figures, said)
    if output is not None:
        tuning.save(output)
    return tuning


def _preference(trial: Trial, default: Trial, tolerance: float) -> tuple[float, float, int]:
    """Smallest is best: the cost, among equals the sum of losses, among these what differs least from the default."""
    differing = sum(value != default.settings[name] for name, value in trial.settings.items())
    return trial.cost(tolerance), sum(trial.losses.values()), differing


def split(evaluation: EvaluationSettings, held_out: float) -> tuple[EvaluationSettings, EvaluationSettings]:
    """The same settings with the prompts of the search, and with those held out, divided by a hash of their text.

    Equal prompts land on the same side, whatever set or order they come in.

    Raises:
        ValueError: a set that is too small to have prompts on both sides, or a share outside of 0 to 1.
    """
    if not 0.0 < held_out < 1.0:
        raise ValueError(f"held_out={held_out} must lie between 0 and 1")
    pairs = [_split_set(prompts, held_out) for prompts in evaluation.all_sets()]
    sides = []
    for side in zip(*pairs, strict=True):
        task = next((each for each in side if each.kind == "task"), None)
        sides.append(replace(evaluation, prompts=tuple(e for e in side if e.kind != "task"), task=task))
    return sides[0], sides[1]


def _split_set(prompts: PromptSet, held_out: float) -> tuple[PromptSet, PromptSet]:
    aside = [_place(prompt) < held_out for prompt in prompts.prompts]
    if all(aside) or not any(aside):
        raise ValueError(
            f"prompt set {prompts.name!r} has {len(aside)} prompts, too few to hold out a share of {held_out}; "
            "give more prompts"
        )
    return _those(prompts, [not each for each in aside]), _those(prompts, aside)


def _place(prompt: Any) -> float:
    """A number from 0 to 1 that only the words of a prompt decide."""
    text = " ".join(prompt_text(prompt).casefold().split())
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big") / 2**64


def _those(prompts: PromptSet, keep: Sequence[bool]) -> PromptSet:
    def chosen(values: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(itertools.compress(values, keep))

    answers = None if prompts.answers is None else chosen(prompts.answers)
    return replace(prompts, ids=chosen(prompts.ids), prompts=chosen(prompts.prompts), answers=answers)


class _Bench:
    """Makes and measures trials on one adapter."""

    def __init__(
        self, planner: Planner, base: Method, search: EvaluationSettings, resume: str | os.PathLike[str] | None
    ) -> None:
        self.planner, self.base, self.search = planner, base, search
        head = {**planner.made_with(), "evaluation": search.to_dict(), "base": base.made_with()}
        self.file = ResultFile(resume, head)
        self._before: Evaluation | None = None
        self._latest: tuple[NLSRConfig, Realignment] | None = None

    def trial(self, settings: Settings, *, required: bool = False) -> Trial:
        """A setting measured on the search prompts; from the file where it is there.

        What cannot be used on this adapter is refused, not kept (a later run tries it again), and, when it is
        required, an error.
        """
        key = key_of(sorted(settings.items()))
        kept = self.file.get(key)
        if kept is None:
            try:
                planned = self._planned(self.base.config.replace(**settings))
            except (PeftNLSRError, ValueError) as error:
                if required:
                    raise
                return Trial(settings, {}, {}, str(error))
            after = self._measured(self.search, "trial", planned)
            self.file.add(key, {"settings": settings, "evaluation": after.to_dict()})
        else:
            after = Evaluation.from_dict(kept["evaluation"])
        return Trial(settings, after.rates, losses(self._fine_tuned().rates, after.rates))

    def final(self, held_out: EvaluationSettings, configs: Mapping[str, NLSRConfig]) -> dict[str, Evaluation]:
        """Label -> evaluation on the held-out prompts; equal settings are measured once."""
        found = {"fine-tuned": self._untouched(held_out)}
        made: dict[NLSRConfig, Evaluation] = {}
        for label, config in configs.items():
            if config not in made:
                made[config] = self._measured(held_out, label, self._planned(config))
            found[label] = replace(made[config], label=label)
        return found

    def _fine_tuned(self) -> Evaluation:
        if self._before is None:
            kept = self.file.get("fine-tuned")
            self._before = self._untouched(self.search) if kept is None else Evaluation.from_dict(kept)
            if kept is None:
                self.file.add("fine-tuned", self._before.to_dict())
        return self._before

    def _untouched(self, asked: EvaluationSettings) -> Evaluation:
        return self._evaluate(asked, "fine-tuned", self._checked)

    def _planned(self, config: NLSRConfig) -> Realignment:
        if self._latest is None or self._latest[0] != config:
            self._latest = config, self.planner.plan(replace(self.base, config=config)).realignment
        return self._latest[1]

    def _measured(self, asked: EvaluationSettings, label: str, planned: Realignment) -> Evaluation:
        checked = self._checked  # found before the adapter is changed
        apply(self.planner.model, planned)
        try:
            return self._evaluate(asked, label, checked)
        finally:
            revert(self.planner.model, planned.adapter_name)

    def _evaluate(self, asked: EvaluationSettings, label: str, checked: AnswerRows) -> Evaluation:
        planner = self.planner
        name = planner.adapter.info.adapter_name
        found = asked.evaluate(planner.model, planner.tokenizer, label, adapter_name=name, progress=planner.progress)
        with quiet(planner.adapter.model):
            return with_answers(
                found, planner.model, checked, planner.tokenizer, batch_size=asked.batch_size, adapter_name=name
            )

    @cached_property
    def _checked(self) -> AnswerRows:
        """The user's rows that every trial is measured on: such that the default settings neither fit nor refuse."""
        planner = self.planner
        if planner.utility is None:
            return AnswerRows()
        return answer_rows(
            planner.model,
            self._planned(self.base.config),
            planner.utility,
            tokenizer=planner.tokenizer,
            judge=planner.judge,
            progress=planner.progress,
        )


_Propose = Callable[[Space, int, int, Settings, Callable[[Settings], float]], None]


def _search(
    bench: _Bench, space: Space, propose: _Propose, *, trials: int, tolerance: float, seed: int
) -> list[Trial]:
    """The default and then what the searcher proposes; a setting that was tried already costs nothing."""
    default = {name: getattr(bench.base.config, name) for name in space}
    found = [bench.trial(default, required=True)]

    def cost(settings: Settings) -> float:
        known = next((trial for trial in found if trial.settings == settings), None)
        if known is None:
            known = bench.trial(settings)
            found.append(known)
        return known.cost(tolerance)

    propose({**space}, trials, seed, default, cost)
    return found


def _grid(space: Space, trials: int, seed: int, default: Settings, cost: Callable[[Settings], float]) -> None:
    """All combinations, in an order that the seed decides, until ``trials`` are made, the default being the first."""
    combinations = [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]
    others = [settings for settings in combinations if settings != default]
    random.Random(seed).shuffle(others)
    for settings in others[: trials - 1]:
        cost(settings)


def _optuna(space: Space, trials: int, seed: int, default: Settings, cost: Callable[[Settings], float]) -> None:
    """Tree-structured Parzen estimator. Asked and told in order, so that a run that goes on repeats what it did."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    made: set[tuple[int, ...]] = set()
    for _ in range(_PROPOSALS * trials):  # the sampler repeats itself, which costs next to nothing
        if len(made) == trials - 1:
            break
        asked = study.ask()
        places = {name: asked.suggest_categorical(name, range(len(values))) for name, values in space.items()}
        settings = {name: space[name][i] for name, i in places.items()}
        study.tell(asked, cost(settings))
        if settings != default:
            made.add(tuple(places.values()))


def _searchers(name: str) -> _Propose:
    if name not in SEARCHERS:
        raise ValueError(f"searcher={name!r} is not one of {', '.join(SEARCHERS)}")
    installed = importlib.util.find_spec("optuna") is not None
    if name == "optuna" and not installed:
        raise PeftNLSRError("searcher='optuna' needs optuna: pip install 'peft-nlsr[tune]', or use searcher='grid'")
    return _optuna if installed and name != "grid" else _grid


def default_space(config: NLSRConfig) -> Space:
    """What is searched around these settings: fields that their method and form read, and some values of each.

    Raises:
        ValueError: nothing is known to search for the method.
    """
    form = config.method
    if form == "nlsr" and config.update not in ("sum", "swap"):
        form = config.least_squares_form if config.update == "least_squares" else "two_teacher"
    if form not in SPACES:
        raise ValueError(f"method={form!r} has no default space; name the fields to search and their values")
    return {**SPACES[form], **(_OF_SELECTION[config.selection] if form in _SELECTING else {})}


def _require_space(space: Space | None, base: Method) -> Space:
    """The given space, or the one for the form of the method; each value is checked by making the settings."""
    if base.patch is not None:
        raise ValueError("a finished patch fixes what is searched; give the reference that it was built from")
    if space is None:
        space = default_space(base.config)
    known = base.config.to_dict()
    for name, values in space.items():
        if name not in known or not values:
            raise ValueError(f"space: {name!r} with {len(values)} values; expected fields of NLSRConfig with values")
        for value in values:
            base.config.replace(**{name: value})
    if not space:
        raise ValueError("space is empty; name at least one field of NLSRConfig")
    return space


def _require_trials(trials: int, evaluation: EvaluationSettings) -> None:
    if trials < 1:
        raise ValueError(f"trials={trials}: at least one is made, the default settings")
    if not any(prompts.kind == "safety" for prompts in evaluation.sets()):
        raise ValueError("harm is what is minimised, found no prompt set of kind 'safety'; give one")


def _said(measured: Measurement) -> str:
    return f"{say_value(measured)} ({say_interval(measured)})"
