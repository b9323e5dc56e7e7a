"""Everything that competes: the lab's methods, the same with other teachers, matched controls, a trained baseline.

Each entry turns a broken adapter in memory into a repaired one, and says in JSON values what its result depends on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import peft_nlsr.two_teacher
from peft_nlsr import LowRank, NLSRConfig, Realignment, apply
from peft_nlsr.controls import MATCHED, as_realignment
from peft_nlsr.judges import refuses
from peft_nlsr.lab import Lab
from peft_nlsr.lab.study import METHODS, Method, what_alignment_changed
from peft_nlsr.lab.training import Schedule
from peft_nlsr.live_adapter import LiveAdapter
from peft_nlsr.planning import Method as PlannedMethod
from peft_nlsr.planning import Planned, Planner
from peft_nlsr.record import ModuleRecord
from peft_nlsr.screening import prepare_data
from peft_nlsr.selection import Decision

from .trained import SCHEDULE, fine_tune

TRAINED = "trained"
FINE_TUNED = "fine-tuned"


@dataclass(frozen=True)
class Entry:
    """One competitor.

    Attributes:
        name: shown in tables.
        method: settings and what it is given.
        control: of :data:`peft_nlsr.controls.MATCHED`, matched to the method; ``trained`` is gradient steps on the
            method's data; None is the method itself.
        schedule: of the trained baseline.
        only: expression found in the names of the modules that the two-teacher form may change; None is all.
    """

    name: str
    method: Method
    control: str | None = None
    only: str | None = None
    schedule: Schedule = SCHEDULE

    def settings(self) -> dict[str, Any]:
        """What the result depends on, as JSON values; names are not part of it."""
        given = {k: v for k, v in asdict(self.method).items() if k not in ("name", "config")}
        config = None if self.method.config is None else self.method.config.to_dict()
        schedule = asdict(self.schedule) if self.control == TRAINED else None
        only = {} if self.only is None else {"only": self.only}  # left out elsewhere, where older rows lack it
        return {**given, "config": config, "control": self.control, "schedule": schedule, **only}


@dataclass(frozen=True)
class Repair:
    """What an entry did to the adapter in memory: one record per module, and what became of the user's data."""

    modules: tuple[ModuleRecord, ...]
    data: dict[str, Any]


_OURS = next(m for m in METHODS if m.name == "two-teacher")
_SUM = next(m for m in METHODS if m.name == "sum, low-rank")
_DROPPING = Method("two-teacher, refused dropped", NLSRConfig(refused_prompts="drop"), utility=True)
_ALIGNED = Method("two-teacher, aligned teacher", NLSRConfig(), reference=True, utility=True)
_BENIGN = Method("two-teacher, benign data", NLSRConfig(screening=False), utility=True, safety="benign")
_LOOKALIKES = Method("two-teacher, half lookalikes", NLSRConfig(), utility=True, safety="both")
_HEAVY = Method(f"{_LOOKALIKES.name}, full weight", NLSRConfig(lookalike_weight=1.0), utility=True, safety="both")
_ABLATIONS: dict[str, dict[str, Any]] = {
    "16 examples": {"max_samples": 16},
    "64 examples": {"max_samples": 64},
    "128 examples": {"max_samples": 128},
    "no screening": {"screening": False},
    "drift not corrected": {"correct_drift": False},
    "decision weight 1": {"decision_weight": 1.0},
    "lambda 0.3": {"utility_weight": 0.3},
    "lambda 3": {"utility_weight": 3.0},
    "ridge 0.003": {"ridge": 0.003},
    "ridge 0.3": {"ridge": 0.3},
}
_PARTS = {
    "attention": "self_attn",
    "MLPs": "mlp",
    "first two blocks": r"layers\.[01]\.",
    "last two blocks": r"layers\.[23]\.",  # of the demo world's four
}
ENTRIES = {
    entry.name: entry
    for entry in (
        *(Entry(method.name, method) for method in (*METHODS, _DROPPING, _BENIGN, _LOOKALIKES, _HEAVY)),
        *(
            Entry(f"two-teacher, {what}", replace(_OURS, config=NLSRConfig(**changes)))
            for what, changes in _ABLATIONS.items()
        ),
        *(Entry(f"two-teacher, {part} only", _OURS, only=only) for part, only in _PARTS.items()),
        *(
            Entry(f"trained, {steps} steps", _OURS, TRAINED, schedule=replace(SCHEDULE, steps=steps))
            for steps in (10, 25, 50, 100)
        ),
        Entry("random entries, as sum", _SUM, "random"),
        Entry("rows reset, as sum", _SUM, "reset"),
        Entry("scaled, as sum", _SUM, "scaled"),
        Entry("adapter removed", _OURS, "transplant"),
        Entry("aligned adapter instead", _ALIGNED, "transplant"),
    )
}


def prepare(entry: Entry, lab: Lab) -> None:
    """Train or extract what the entry is given, so that it is not part of what the repair costs."""
    _reference(entry.method, lab)


def repair(entry: Entry, lab: Lab, model: Any, task: str, poison: float) -> Repair | None:
    """Let an entry change the adapter of ``model`` in place; None where it does nothing.

    Raises:
        PeftNLSRError: the method refuses this adapter; nothing has changed then.
    """
    if entry.method.config is None:
        return None
    if entry.control == TRAINED:
        return _train(entry, lab, model, task, poison)
    with _changing(entry.only, model):
        planned = _plan(entry.method, lab, model, task, poison)
    done = planned.realignment if entry.control is None else _control(entry, model, planned)
    apply(model, done)
    return Repair(done.modules, done.data)


@contextmanager
def _changing(only: str | None, model: Any) -> Iterator[None]:
    """Narrow what the two-teacher form solves; for users it solves all modules, as leaving some out repairs less."""
    if only is None:
        yield
        return
    if not any(re.search(only, name) for name, _ in model.named_modules()):
        raise ValueError(f"no module of this world has {only!r} in its name; use the method in the demo world")
    find = peft_nlsr.two_teacher.groups_of

    def some(*args: Any) -> list[list[str]]:
        groups = [[name for name in group if re.search(only, name)] for group in find(*args)]
        return [group for group in groups if group]

    with mock.patch.object(peft_nlsr.two_teacher, "groups_of", some):
        yield


def _plan(method: Method, lab: Lab, model: Any, task: str, poison: float) -> Planned:
    """The plan of :func:`peft_nlsr.nlsr_realign`, with the masks that a control is matched to."""
    assert method.config is not None
    planner = Planner(
        model,
        calibration=method.calibration(lab),
        utility=lab.utility_data(task, poison) if method.utility else None,
        tokenizer=lab.tokenizer,
        progress=False,
    )
    return planner.plan(PlannedMethod(method.name, method.config, reference=_reference(method, lab)))


def _reference(method: Method, lab: Lab) -> Path | None:
    if method.checkpoints:
        return what_alignment_changed(lab)
    return lab.aligned_adapter if method.reference else None


def _control(entry: Entry, model: Any, planned: Planned) -> Realignment:
    assert entry.control is not None
    generator = torch.Generator().manual_seed(planned.realignment.config.nlsr_seed)
    control = MATCHED[entry.control](planned, generator)
    return as_realignment(LiveAdapter(model), entry.control, control, planned)


def _train(entry: Entry, lab: Lab, model: Any, task: str, poison: float) -> Repair:
    """Gradient steps on the data that the closed form would use, screened in the same way."""
    method = entry.method
    assert method.config is not None
    adapter = LiveAdapter(model)
    teaching = prepare_data(
        adapter,
        calibration=method.calibration(lab),
        utility=lab.utility_data(task, poison),
        tokenizer=lab.tokenizer,
        safe_teacher=None,
        judge=refuses,
        config=method.config.replace(leave_intact=False),
        progress=False,
    )
    before = _copies(adapter.snapshot())
    fine_tune(model, [*teaching.safety, *teaching.utility], entry.schedule)
    after = LiveAdapter(model).snapshot()
    return Repair(_changes(before, after), teaching.record)


def _copies(updates: Mapping[str, LowRank]) -> dict[str, LowRank]:
    return {name: LowRank(u.A.detach().clone(), u.B.detach().clone(), u.scale) for name, u in updates.items()}


def _changes(before: Mapping[str, LowRank], after: Mapping[str, LowRank]) -> tuple[ModuleRecord, ...]:
    decided = {name: Decision(name, None, True) for name in before}
    return tuple(ModuleRecord.of(decided[name], before[name], after[name], {}) for name in before)
