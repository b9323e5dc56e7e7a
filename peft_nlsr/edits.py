"""How one module is restored: tensors in, a new low-rank update out. Nothing is written here.

``t`` is the fine-tuned update, ``e`` the safety reference; see docs/DESIGN.md sections 2 and 6.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .costs import columns
from .directions import TOLERANCE, Applied, Directions, block_lanczos
from .lowrank import LowRank, add
from .ranks import ALONE, Ranks
from .scores import FactorPair, InputSketch, Moment

EXACT_SVD_SIDE = 1024
CLOSE = TOLERANCE / 10  # where the operator is a matrix at hand, a round more costs little


def masked(update: LowRank, masks: FactorPair, *, inside: bool = True) -> LowRank:
    """The update whose factors are zero outside the masks (``inside=False``: zero inside them), on their device."""
    mask_a, mask_b = masks if inside else (~masks[0], ~masks[1])
    return LowRank(_where(mask_a, update.A), _where(mask_b, update.B), update.scale)


def _where(mask: Tensor, factor: Tensor) -> Tensor:
    """Not a product, which leaves -0.0 behind: the bits would differ from those of a saved patch."""
    return torch.where(mask, factor.to(mask.device), torch.zeros((), dtype=factor.dtype, device=mask.device))


def restore_sum(
    tuned: LowRank, safe_part: LowRank, masks: FactorPair, *, compress: bool, inputs: InputSketch | None = None
) -> tuple[LowRank, float]:
    """``dW'' = W'_e + W^_t`` (NLSR eq. 12): masked reference plus the complement of the fine-tuned factors.

    Args:
        tuned: ``A (r, d_in)``, ``B (d_out, r)`` of the fine-tuned adapter.
        safe_part: the reference with its factors already masked, same shapes.
        masks: ``(M_A, M_B)``.
        compress: truncate the exact rank-2r sum back to rank r.
        inputs: the truncation then keeps what matters for these inputs, instead of what is largest.

    Returns:
        The update at the scale of ``tuned`` and the relative error of the compression (0 when exact), on the inputs
        when they are given.

    Differs from the release, whose entry swap adds two cross terms.
    """
    total = add([safe_part, masked(tuned, masks, inside=False)])
    if not compress:
        return total.at_scale(tuned.scale), 0.0
    seen_gram = None if inputs is None else inputs.gram(total.A)
    truncated, error = total.truncate(tuned.rank, seen_gram=seen_gram)
    return truncated.at_scale(tuned.scale), error


def restore_swap(tuned: LowRank, safe_part: LowRank, masks: FactorPair) -> LowRank:
    """As released: inside the masks the reference's entries of A and of B, elsewhere the fine-tuned ones."""
    at_scale = safe_part.at_scale(tuned.scale)
    A, B = tuned.A.to(masks[0].device), tuned.B.to(masks[1].device)
    return LowRank(
        torch.where(masks[0], at_scale.A.to(A.dtype), A), torch.where(masks[1], at_scale.B.to(B.dtype), B), tuned.scale
    )


def restore_one_shot(
    tuned: LowRank,
    reference: LowRank | None,
    safety: Moment,
    utility: Moment,
    *,
    utility_weight: float,
    ridge: float,
) -> tuple[LowRank, float]:
    """``dW_t + (dW_e - dW_t) C_s (C_s + lambda C_u + eps I)^-1``, truncated to the adapter's rank.

    The edit that follows the reference on safety inputs and stays put on utility inputs, for fixed inputs.
    Only the rows of A meet the moments, so nothing of size d_out x d_in appears.

    Args:
        tuned: the fine-tuned update.
        reference: the safety reference, or None for the base model (``dW_e = 0``).
        safety, utility: second moments ``(d_in, d_in)`` divided by their token counts.
        utility_weight: lambda; larger keeps more of the fine-tuned behaviour.
        ridge: eps relative to the mean diagonal of ``C_s + lambda C_u``.

    Returns:
        The update at the scale of ``tuned``, and the relative error of the truncation on the same inputs.
    """
    d_in = tuned.shape[1]
    epsilon = ridge * (safety.trace() + utility_weight * utility.trace()) / d_in
    rows = tuned.A.double() if reference is None else torch.cat([tuned.A.double(), reference.A.double()])
    moved = _solve_moments(safety.right_multiply(rows), safety, utility, utility_weight, epsilon)
    kept = LowRank(tuned.A.double() - moved[: tuned.rank], tuned.B.double(), tuned.scale)
    total = kept if reference is None else add([kept, LowRank(moved[tuned.rank :], reference.B, reference.scale)])
    seen = safety.right_multiply(total.A) + utility_weight * utility.right_multiply(total.A) + epsilon * total.A
    truncated, error = total.truncate(tuned.rank, seen_gram=seen @ total.A.T)
    return truncated.at_scale(tuned.scale), error


def _solve_moments(rows: Tensor, safety: Moment, utility: Moment, weight: float, epsilon: float) -> Tensor:
    """``rows (C_s + weight C_u + epsilon I)^-1``, through the sketches' own size when both are sketched."""
    if safety.rows is not None and utility.rows is not None:
        F = torch.cat([safety.rows, weight**0.5 * utility.rows])
        inner = F @ F.T + epsilon * torch.eye(len(F), dtype=F.dtype)
        return (rows - torch.linalg.solve(inner, (rows @ F.T).T).T @ F) / epsilon
    total = _full(safety) + weight * _full(utility)
    total.diagonal().add_(epsilon)
    return torch.linalg.solve(total, rows.T).T


def _full(moment: Moment) -> Tensor:
    if moment.full is not None:
        return moment.full.clone()
    assert moment.rows is not None
    return moment.rows.T @ moment.rows


class Solved(NamedTuple):
    """One module of a two-teacher problem.

    Attributes:
        update: the repaired update, at the adapter's rank and scale.
        truncation_error: what the cut to the adapter's rank loses, relative, on the inputs seen.
        solver_error: how far the solver is from that update, relative, on the inputs seen; 0 for an exact one.
    """

    update: LowRank
    truncation_error: float
    solver_error: float = 0.0


def merged(ranks: Ranks, own: Mapping[str, Solved], names: Iterable[str], device: torch.device) -> dict[str, Solved]:
    """What each rank has solved of the named modules, in the same bits on every rank."""
    if ranks.count == 1:
        return {name: own[name] for name in names}
    parts = ranks.gather({name: _moved(solved, torch.device("cpu")) for name, solved in own.items()})
    found = {name: solved for part in parts for name, solved in part.items()}
    return {name: _moved(found[name], device) for name in names}


def _moved(solved: Solved, device: torch.device) -> Solved:
    update = solved.update
    return solved._replace(update=LowRank(update.A.to(device), update.B.to(device), update.scale))


@dataclass
class NormalEquations:
    """Sums of the two-teacher least-squares problem for modules that share one input (docs/DESIGN.md section 6).

    Attributes:
        moment: ``M (d_in, d_in)``, weighted second moment of the repaired model's inputs.
        cross: per module ``T (d_out, d_in)``, weighted products of wanted output and input.
        ranks: the processes whose tokens the sums are over; each solves its share of the modules.

    Both are as large as the base weight: the closed form needs every pair of inputs once. One group of modules is
    held at a time.
    """

    moment: Tensor
    cross: dict[str, Tensor]
    ranks: Ranks = ALONE

    @classmethod
    def zeros(
        cls, d_in: int, d_outs: Mapping[str, int], device: torch.device, ranks: Ranks = ALONE
    ) -> NormalEquations:
        return cls(
            torch.zeros(d_in, d_in, dtype=torch.float64, device=device),
            {name: torch.zeros(d, d_in, dtype=torch.float64, device=device) for name, d in d_outs.items()},
            ranks,
        )

    def add(self, inputs: Tensor, wanted: dict[str, Tensor], weights: Tensor) -> None:
        """Add tokens: ``inputs (n, d_in)``, ``weights (n,)``, ``wanted (n, d_out)`` per module: teacher minus base."""
        weighted = inputs * weights[:, None]
        self.moment += (weighted.T @ inputs).double()
        for name, target in wanted.items():
            self.cross[name] += (target.T @ weighted).double()

    def solve(self, tuned: dict[str, LowRank], *, ridge: float, seed: int) -> dict[str, Solved]:
        """The best rank-r update of each module and its truncation error on the inputs seen.

        ``dW'' = (T + e dW_t) (M + e I)^-1`` with ``e = ridge * mean diag M``, then the best rank-r factors under
        ``|D (M + e I)^(1/2)|``. With ``M + e I = L L^T`` the singular vectors of ``D L = (T + e dW_t) L^-T`` give both
        without forming D.
        Over several ranks the sums are added up, in place, and each module is solved by one of them.
        """
        for total in (self.moment, *self.cross.values()):
            self.ranks.add_up(total)
        epsilon = ridge * float(self.moment.diagonal().mean())
        own = self.ranks.own(list(self.cross))
        solved = self._solutions({name: tuned[name] for name in own}, epsilon, seed) if own else {}
        return merged(self.ranks, solved, self.cross, self.moment.device)

    def _solutions(self, tuned: dict[str, LowRank], epsilon: float, seed: int) -> dict[str, Solved]:
        M = self.moment.clone()
        M.diagonal().add_(epsilon)
        root = torch.linalg.cholesky(M)
        solved = {}
        for name, t in tuned.items():
            T = self.cross[name]
            T = T + epsilon * t.scale * (t.B.to(T) @ t.A.to(T))
            whitened = torch.linalg.solve_triangular(root, T.T, upper=False)
            left, truncation, off = top_directions(whitened.T, t.rank, seed=seed)
            A = torch.linalg.solve_triangular(root.T, whitened @ left, upper=True).T
            solved[name] = Solved(balanced(A, left, t.scale), truncation, off)
        return solved


def top_directions(matrix: Tensor, rank: int, *, seed: int) -> tuple[Tensor, float, float]:
    """The top ``rank`` left singular vectors ``U (m, rank)`` of ``X = matrix (m, n)``, with two errors.

    The first is ``|X - U U^T X| / |X|``, the second how far ``U U^T X`` is from the best cut of this rank, relative
    to that cut: 0 where a singular value decomposition found it. That is so up to side 1024, for ranks above a
    quarter of the shorter side, and where block Lanczos does not come below its tolerance. Missing directions are
    zero columns.
    """
    found = None if min(matrix.shape) <= max(EXACT_SVD_SIDE, 4 * rank) else _by_lanczos(matrix, rank, seed)
    if found is None or found.error > TOLERANCE:
        left, off = torch.linalg.svd(matrix, full_matrices=False).U[:, :rank], 0.0
    else:
        left, off = found.basis[:, :rank], found.error
    if left.shape[1] < rank:
        left = torch.cat([left, left.new_zeros(len(left), rank - left.shape[1])], dim=1)
    total = float(matrix.square().sum())
    kept = float((left.T @ matrix).square().sum())
    return left, max(0.0, 1.0 - kept / total) ** 0.5 if total > 0.0 else 0.0, off


def _by_lanczos(matrix: Tensor, rank: int, seed: int) -> Directions:
    many = columns(rank, len(matrix))
    start = torch.randn(len(matrix), many, generator=torch.Generator().manual_seed(seed)).to(matrix)

    def applied(block: Tensor, precision: float) -> Applied:
        rows = matrix.T @ block
        return Applied(rows, matrix @ rows, 0.0)

    return block_lanczos(applied, start, rank, tolerance=CLOSE, patient=True)


def balanced(A: Tensor, B: Tensor, scale: float) -> LowRank:
    """``B A`` as an update of the given scale; a direction's size is shared evenly by its row of A and column of B."""
    size = A.norm(dim=1)
    root = (size / abs(scale)).sqrt()
    inverse = torch.where(size > 0.0, 1.0 / (root * scale), torch.zeros_like(size))
    return LowRank((A * inverse[:, None]).float(), (B * root).float(), scale)
