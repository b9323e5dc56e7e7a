"""Controls: changes that know nothing about safety, or less than a method does, and may explain its effect as well.

Each is one function from a method's plan to another change of the same adapter, with the budget that it was given said
in numbers. Nothing is written here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .adapters import Adapter
from .edits import masked, restore_sum, restore_swap
from .errors import IncompatibleError
from .lowrank import LowRank, add, zero_like
from .planning import Planned
from .record import ModuleRecord, Realignment, new_record
from .scores import FactorPair, InputSketch
from .selection import Decision


@dataclass(frozen=True)
class Size:
    """How much a change changes.

    Attributes:
        modules: that were changed.
        entries: of A and B that were decided upon: those under the masks, else those with another value.
        norm: ``sqrt(sum |dW'' - dW|^2)`` over all modules.
        relative: the same over ``sqrt(sum |dW|^2)``; None when the adapter is zero.
    """

    modules: int
    entries: int
    norm: float
    relative: float | None


@dataclass(frozen=True)
class Control:
    """A change that competes with a method: module -> new update, its entries, and what it is in words."""

    updates: dict[str, LowRank]
    entries: int
    said: str


def entries_of(planned: Planned) -> dict[str, tuple[int, int]]:
    """Per changed module the entries of A and of B that a method decided upon."""
    done, patch = planned.realignment, planned.patch
    if patch is not None:
        return {name: _count(patch[name].masks) for name in done.restored}
    return {name: _differing(done.originals[name], done.updates[name]) for name in done.restored}


def size_of(planned: Realignment, entries: int) -> Size:
    """The size of a planned change."""
    before = math.sqrt(sum(update.norm() ** 2 for update in planned.originals.values()))
    norm = change_norm(planned.originals, planned.updates)
    return Size(len(planned.updates), entries, norm, norm / before if before > 0.0 else None)


def change_norm(before: Mapping[str, LowRank], after: Mapping[str, LowRank]) -> float:
    """``sqrt(sum |dW'' - dW|^2)`` over the modules of ``after``."""
    return math.sqrt(sum(_change(before[name], update).norm() ** 2 for name, update in after.items()))


def random_mask(planned: Planned, generator: torch.Generator) -> Control:
    """As many random entries, in as many random modules of each shape, get the reference's values.

    Entry by entry in the form that the method used; a method that changes whole modules is matched by whole modules.
    """
    done = planned.realignment
    budget = _moved_at_random(entries_of(planned), done.originals, generator)
    values = planned.reference.updates if planned.values is None else planned.values
    if planned.patch is not None and planned.values is None:
        raise IncompatibleError(
            "a patch holds the reference's values inside its own masks only, so they cannot be put elsewhere; give "
            "the reference that it was built from"
        )
    updates: dict[str, LowRank] = {}
    for name, counts in budget.items():
        tuned = done.originals[name]
        value = _zero(tuned) if values is None else values[name]
        masks = _random_masks(tuned, counts, generator)
        inputs = None if planned.patch is None else planned.patch.inputs.get(name)
        updates[name] = _put_in(tuned, value, masks, inputs, done)
    said = f"random entries of {len(updates)} random modules get the reference's values"
    return Control(updates, sum(map(sum, budget.values())), said)


def reset(planned: Planned, generator: torch.Generator) -> Control:
    """The rows of B that the method changed most become zero, as many as hold the method's entries.

    A method that changes all of a module is matched by a zero module.
    """
    done = planned.realignment
    updates: dict[str, LowRank] = {}
    rows = entries = 0
    for name, (of_a, of_b) in entries_of(planned).items():
        tuned = done.originals[name]
        count = min(len(tuned.B), round((of_a + of_b) / tuned.rank))
        chosen = _row_norms(_change(tuned, done.updates[name])).argsort(descending=True, stable=True)[:count]
        rows += count
        if count == len(tuned.B):
            updates[name], entries = _zero(tuned), entries + _all_entries([tuned])
            continue
        B = tuned.B.clone()
        B[chosen] = 0.0
        updates[name], entries = LowRank(tuned.A, B, tuned.scale), entries + count * tuned.rank
    return Control(updates, entries, f"{rows} rows of B in {len(updates)} modules become zero")


def scaled(planned: Planned, generator: torch.Generator) -> Control:
    """The whole adapter shrinks until its change has the norm of the method's; at most to zero."""
    originals = planned.realignment.originals
    size = math.sqrt(sum(update.norm() ** 2 for update in originals.values()))
    if size == 0.0:
        raise IncompatibleError("the adapter's update is zero, so there is nothing to scale down")
    factor = max(0.0, 1.0 - change_norm(originals, planned.realignment.updates) / size)
    updates = {n: LowRank(u.A, u.B.float() * factor, u.scale) if factor else _zero(u) for n, u in originals.items()}
    return Control(updates, _all_entries(originals.values()), f"the adapter times {factor:.3f}")


def transplant(planned: Planned, generator: torch.Generator) -> Control:
    """The safe adapter, cut to the rank of the fine-tuned one, in its place; the base model where that is safe."""
    originals, safe = planned.realignment.originals, planned.reference.updates
    updates = {n: _zero(u) if safe is None else _at_rank_of(u, safe[n]) for n, u in originals.items()}
    updates = {name: update.at_scale(originals[name].scale) for name, update in updates.items()}
    said = f"{planned.reference.description}, in place of the adapter"
    return Control(updates, _all_entries(originals.values()), said)


MATCHED: dict[str, Callable[[Planned, torch.Generator], Control]] = {
    "random": random_mask,
    "reset": reset,
    "scaled": scaled,
    "transplant": transplant,
}
BENIGN = "benign"
CONTROLS = (*MATCHED, BENIGN)
"""The controls by name; ``benign`` is the method itself with benign data as its safety data, at full
weight and without screening."""


def as_realignment(adapter: Adapter, name: str, control: Control, planned: Planned) -> Realignment:
    """The control as a plan that can be applied and reverted like any other."""
    done = planned.realignment
    decisions = [Decision(module, None, module in control.updates) for module in done.originals]
    modules = tuple(ModuleRecord.of(d, done.originals[d.module], control.updates.get(d.module), {}) for d in decisions)
    return new_record(
        adapter,
        method=f"control: {name}",
        reason=control.said,
        config=done.config,
        reference=done.reference,
        modules=modules,
        data={},
        updates=control.updates,
        originals=done.originals,
    )


def _change(before: LowRank, after: LowRank) -> LowRank:
    return add([after, before.times(-1.0)])


def _zero(update: LowRank) -> LowRank:
    return zero_like(update).at_scale(update.scale)


def _row_norms(update: LowRank) -> Tensor:
    """``(d_out,)`` norms of the rows of an update."""
    A, B = update.A.double(), update.B.double()
    return ((B @ (A @ A.T)) * B).sum(dim=1).clamp_min(0.0).sqrt() * abs(update.scale)


def _differing(before: LowRank, after: LowRank) -> tuple[int, int]:
    """Entries of A and of B with another value; all of them where the rank is another."""
    if before.rank != after.rank:
        return before.A.numel(), before.B.numel()
    return _count((before.A.float() != after.A.float(), before.B.float() != after.B.float()))


def _count(masks: FactorPair) -> tuple[int, int]:
    return int(masks[0].sum()), int(masks[1].sum())


def _all_entries(updates: Iterable[LowRank]) -> int:
    return sum(update.A.numel() + update.B.numel() for update in updates)


def _moved_at_random(
    budget: Mapping[str, tuple[int, int]], originals: Mapping[str, LowRank], generator: torch.Generator
) -> dict[str, tuple[int, int]]:
    """The counts of each changed module, given to a random module of the same shape."""
    shapes: dict[tuple[int, ...], list[str]] = {}
    for name, update in originals.items():
        shapes.setdefault((update.rank, *update.shape), []).append(name)
    moved: dict[str, tuple[int, int]] = {}
    for names in shapes.values():
        counts = [budget[name] for name in names if name in budget]
        drawn = torch.randperm(len(names), generator=generator)[: len(counts)].tolist()
        moved |= {names[i]: count for i, count in zip(drawn, counts, strict=True)}
    return moved


def _random_masks(tuned: LowRank, counts: Sequence[int], generator: torch.Generator) -> FactorPair:
    masks = []
    for factor, count in zip((tuned.A, tuned.B), counts, strict=True):
        mask = torch.zeros(factor.numel(), dtype=torch.bool)
        mask[torch.randperm(factor.numel(), generator=generator)[:count]] = True
        masks.append(mask.reshape(factor.shape))
    return masks[0], masks[1]


def _put_in(
    tuned: LowRank, value: LowRank, masks: FactorPair, inputs: InputSketch | None, done: Realignment
) -> LowRank:
    """The entries in the form, and at the rank, that the method has them."""
    if bool(masks[0].all()) and bool(masks[1].all()):
        return _at_rank_of(tuned, value).at_scale(tuned.scale)
    if value.rank != tuned.rank:
        raise IncompatibleError(
            f"entries cannot be put in at random: the reference has rank {value.rank}, the adapter {tuned.rank}"
        )
    part = masked(LowRank(value.A.float(), value.B.float(), value.scale), masks)
    if done.method == "swap":
        return restore_swap(tuned, part, masks)
    return restore_sum(tuned, part, masks, compress=done.config.compress, inputs=inputs)[0]


def _at_rank_of(tuned: LowRank, value: LowRank) -> LowRank:
    return value if value.rank == tuned.rank else value.truncate(tuned.rank)[0]
