"""The leading directions of a symmetric operator that is only applied, by block Lanczos, with a measured error.

The two-teacher solvers look for the top left singular vectors of ``G``, whose energies are the eigenvalues of
``G G^T``; whoever calls says how ``G^T`` and ``G G^T`` are applied, and how exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .costs import columns
from .ranks import ALONE, Ranks

TOLERANCE = 3e-3  # of the measured error; iteration ends there
SOLVED_TO = TOLERANCE / 5  # error of the first columns; later ones matter less, as much less as the error has fallen
MOST_ROUNDS = 12


class Applied(NamedTuple):
    """What an operator makes of a block of directions ``(d, k)``.

    Attributes:
        rows: ``G^T block``, in whatever coordinates the caller needs them.
        image: ``G G^T block (d, k)``.
        error: measured relative error of both, 0 when exact.
    """

    rows: Tensor
    image: Tensor
    error: float


class Directions(NamedTuple):
    """Ritz vectors, largest first, oversampled ones included.

    Attributes:
        basis: the directions ``(d, k)``.
        rows: what belongs to each of them.
        sizes: their energies ``(k,)``.
        error: how far ``G``, cut to the wanted ones, is from its best cut, relative, in the Frobenius norm.
    """

    basis: Tensor
    rows: Tensor
    sizes: Tensor
    error: float


def block_lanczos(
    apply: Callable[[Tensor, float], Applied],
    start: Tensor,
    rank: int,
    *,
    ranks: Ranks = ALONE,
    tolerance: float = TOLERANCE,
    patient: bool = False,
) -> Directions:
    """Block Lanczos with full orthogonalisation, as in Davidson's method only for what is not exact enough yet.

    It ends when the error is at most ``tolerance``, when there is no direction left to add, after ``MOST_ROUNDS``,
    or, unless ``patient``, when the error no longer falls because that of ``apply`` bounds it.
    ``apply(block, precision)`` may be off by about ``precision``. Over several ranks rank 0's errors decide.
    """
    block = torch.linalg.qr(apply(torch.linalg.qr(start).Q, 0.3).image).Q
    known: list[Applied] = []
    basis, said = block[:, :0], torch.zeros(0, dtype=torch.float64)
    precision, before = SOLVED_TO, math.inf
    for _ in range(MOST_ROUNDS):
        known.append(apply(block, precision))
        basis, image = torch.cat([basis, block], dim=1), torch.cat([one.image for one in known], dim=1)
        said = torch.cat([said, torch.full((block.shape[1],), known[-1].error, dtype=torch.float64)])
        sizes, turn = _ritz(basis, image)
        turned = _turned_errors(basis, image, sizes, turn, rank)
        squares = ranks.of_first(torch.cat([turned, _solve_errors(said, basis, image, turn, rank).reshape(1)]))
        turned, error = squares[:-1], float(squares.sum() ** 0.5)
        block = _beyond(basis, image, turn, turned > tolerance**2 / (2 * rank))
        if error <= tolerance or (error > 0.7 * before and not patient) or block.shape[1] == 0:
            break
        precision, before = min(0.02, SOLVED_TO / error), error
    rows = torch.cat([one.rows for one in known], dim=1)
    return Directions(basis @ turn.to(basis), rows @ turn.to(rows), sizes, error)


def _beyond(basis: Tensor, image: Tensor, turn: Tensor, wanted: Tensor) -> Tensor:
    """New directions ``(d, k)`` orthogonal to the basis: what the image of the wanted ones holds outside."""
    room = len(basis) - basis.shape[1]
    chosen = turn[:, : len(wanted)][:, wanted][:, :room].to(image)
    found = image @ chosen
    for _ in range(2):
        found = torch.linalg.qr(found - basis @ (basis.T @ found)).Q
    return found


def symmetric(matrix: Tensor) -> Tensor:
    return 0.5 * (matrix + matrix.T).double()


def _ritz(basis: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues of ``G G^T`` within the basis, largest first and at least 0, and their vectors in it."""
    sizes, turn = torch.linalg.eigh(symmetric(basis.T @ image))
    return sizes.flip(0).clamp_min(0.0), turn.flip(1)


def _turned_errors(basis: Tensor, image: Tensor, sizes: Tensor, turn: Tensor, rank: int) -> Tensor:
    """Squared share of the update's size by which each direction is off, from the residuals of ``G G^T u = s u``.

    The angle to the true directions is at most the residual over the distance to the eigenvalues that are left out
    (Davis and Kahan), for which the smallest of the oversampled ones stand in. A direction carries the energy ``s``.
    """
    kept = turn[:, :rank]
    residual = (image @ kept.to(image)).double() - basis.double() @ (kept * sizes[:rank])
    apart = (sizes[:rank] - sizes[min(columns(rank, len(basis)), len(sizes)) - 1]).clamp_min(1e-3 * sizes[:rank])
    angle = torch.where(sizes[:rank] > 0.0, residual.square().sum(dim=0) / apart.square(), 0.0)
    total = float(sizes[:rank].sum())
    return angle.clamp_max(1.0) * sizes[:rank] / (total if total > 0.0 else 1.0)


def _solve_errors(said: Tensor, basis: Tensor, image: Tensor, turn: Tensor, rank: int) -> Tensor:
    """Squared share of the update's size that the solutions may be off, each basis vector by what its solver said."""
    energy = (basis.double() * image.double()).sum(dim=0).clamp_min(0.0)
    off = (turn[:, :rank].square() * (said.to(energy).square() * energy)[:, None]).sum()
    total = float((turn[:, :rank].square() * energy[:, None]).sum())
    return off / (total if total > 0.0 else 1.0)
