"""Statistics of several processes as one: each batch goes to one rank, and the ranks' sums are added."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from accelerate.data_loader import DataLoaderAdapter

from .calibration import FrequentDirections, SafetyStatistics
from .errors import CalibrationError, IncompatibleError
from .processes import from_all_ranks, rank, summed, world_size
from .scores import ModuleStatistics, Moment

T = TypeVar("T")

_SUMS = ("z_gram", "x_square", "grad_A", "grad_B", "x_code")


def own_batches(batches: Iterable[T]) -> Iterator[T]:
    """This rank's share of ``batches``: each goes to exactly one rank, so that sums over ranks count nothing twice.

    A loader prepared by accelerate repeats samples until every rank has equally many (``even_batches=True``), which
    makes sums too large. Here shares may differ by a batch, and may be empty; sound where the forward pass of a rank
    needs no other rank, as in DDP.

    Args:
        batches: in the same order on every rank, not yet divided among them.
    """
    if isinstance(batches, DataLoaderAdapter):
        raise ValueError(
            "accelerate has divided these batches among the ranks already, and repeats samples to make that even; "
            "give the data loader as it was before accelerator.prepare"
        )
    return itertools.islice(batches, rank(), None, world_size())


def reduce_statistics(statistics: SafetyStatistics | None) -> SafetyStatistics:
    """The statistics of all ranks' data as one, the same on every rank: counts and sums added, sketches merged.

    A module that only some ranks have seen counts as zeros on the others. The bounds of sketches are added too, with
    what is lost when the merged rows are cut to the length of the longest sketch.

    Args:
        statistics: of this rank's share of the data (see :func:`own_batches`), or None when its share is empty.

    Raises:
        CalibrationError: no rank had data.
        IncompatibleError: collected with different settings, models or factors.

    Example:
        >>> mine = list(own_batches(batches))  # doctest: +SKIP
        >>> whole = reduce_statistics(collect_statistics(model, mine) if mine else None)  # doctest: +SKIP
    """
    own: Mapping[str, ModuleStatistics] = {} if statistics is None else statistics
    layout = {name: _layout(module) for name, module in own.items()}
    records = [record for record in from_all_ranks(statistics.record if statistics else None) if record is not None]
    if not records:
        raise CalibrationError("no rank has statistics; give at least one of them a batch")
    _require_equal([{**record, "samples": None} for record in records], "their records")
    layouts = from_all_ranks(layout)
    merged = {}
    for name in dict.fromkeys(name for found in layouts for name in found):  # in one order on every rank
        found = [module[name] for module in layouts if name in module]
        _require_equal(found, f"the tensors of {name}")
        merged[name] = _added(own.get(name), found[0])
    return SafetyStatistics(merged, {**records[0], "samples": sum(record["samples"] for record in records)})


def _layout(module: ModuleStatistics) -> dict[str, Any]:
    """Which sums there are, and their shapes; of a sketch its width only, because its length may differ."""
    shapes = {kind: tuple(t.shape) for kind in _SUMS if (t := getattr(module, kind)) is not None}
    moment = None
    if module.moment is not None:
        moment = "sketch" if module.moment.full is None else "full"
    return {"shapes": shapes, "moment": moment}


def _require_equal(found: list[Any], what: str) -> None:
    for other in found[1:]:
        if other != found[0]:
            raise IncompatibleError(
                f"the ranks' statistics do not belong together: {what} differ, {found[0]} and {other}; collect them "
                "with the same model, factors and settings on every rank"
            )


def _added(own: ModuleStatistics | None, layout: Mapping[str, Any]) -> ModuleStatistics:
    """The sum over ranks of one module's statistics; own is None where this rank has not seen it."""
    shapes = layout["shapes"]
    sums = {kind: summed(None if own is None else getattr(own, kind), shape) for kind, shape in shapes.items()}
    tokens = int(summed(None if own is None else torch.tensor([own.tokens], dtype=torch.float64), (1,)))
    moment = None if own is None else own.moment
    if layout["moment"] == "full":
        width = shapes["x_square"][0]
        merged: Moment | None = Moment(full=summed(None if moment is None else moment.full, (width, width)))
    elif layout["moment"] == "sketch":
        total = 0.0 if own is None else float(own.x_square.sum())
        merged = _merged([(part, energy) for part, energy in from_all_ranks((moment, total)) if part is not None])
    else:
        merged = None
    return ModuleStatistics(tokens, moment=merged, **sums)


def _merged(parts: list[tuple[Moment, float]]) -> Moment:
    """One sketch from several, each with the sum of all squared inputs that it stands for."""
    rows = [moment.rows for moment, _ in parts if moment.rows is not None]
    sketch = FrequentDirections(rows[0].shape[1], max(map(len, rows)))
    sketch.buffer = torch.cat(rows)
    sketch.shrunk = sum(moment.error * total for moment, total in parts)
    sketch.total = sum(total for _, total in parts)
    return sketch.moment()
