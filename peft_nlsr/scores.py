"""From calibration statistics of a LoRA module to scores of its entries, and from scores to masks.

A score tensor has the shape of the factor it judges; larger means more safety-critical. All scores are recomputed from
small sufficient statistics, never from stored activations. Random numbers come from an explicit CPU generator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import NLSRConfig
from .errors import CalibrationError
from .lowrank import LowRank

FactorPair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Moment:
    """Second moment ``C = sum x x^T (d_in, d_in)`` of a module's inputs, full or as a sketch.

    Attributes:
        full: ``(d_in, d_in)`` float64, exact; or None when sketched.
        rows: ``(l, d_in)`` frequent-directions sketch, ``rows^T rows <= C``; or None when full.
        error: bound on the largest eigenvalue of ``C - rows^T rows``, divided by the trace of ``C``; 0 when full.
    """

    full: Tensor | None = None
    rows: Tensor | None = None
    error: float = 0.0

    def __post_init__(self) -> None:
        if (self.full is None) == (self.rows is None):
            raise ValueError("a Moment holds either the full matrix or the rows of a sketch")

    def right_multiply(self, vectors: Tensor) -> Tensor:
        """``vectors @ C`` for ``vectors (k, d_in)``."""
        if self.full is not None:
            return vectors @ self.full
        assert self.rows is not None
        return (vectors @ self.rows.T) @ self.rows

    def over(self, tokens: int) -> Moment:
        """The mean over ``tokens`` inputs."""
        if self.full is not None:
            return Moment(full=self.full / tokens)
        assert self.rows is not None
        return Moment(rows=self.rows / tokens**0.5, error=self.error)

    def trace(self) -> float:
        """Sum of all squared inputs (of the sketch, when sketched)."""
        if self.full is not None:
            return float(self.full.diagonal().sum())
        assert self.rows is not None
        return float(self.rows.square().sum())


@dataclass(frozen=True)
class ModuleStatistics:
    """Sufficient statistics of one module over the calibration tokens, float64 on the CPU.

    Attributes:
        tokens: number of token rows that were counted.
        z_gram: ``(r, r)`` sum of ``z z^T`` for the adapter code ``z = A x``.
        x_square: ``(d_in,)`` sum of ``x * x``.
        grad_A, grad_B: shapes of A and B, sum over samples of the absolute gradient, or None.
        moment: second moment of ``x``, or None.
        x_code: ``(d_in, r)`` sum of ``x z^T``, or None.
    """

    tokens: int
    z_gram: Tensor
    x_square: Tensor
    grad_A: Tensor | None = None
    grad_B: Tensor | None = None
    moment: Moment | None = None
    x_code: Tensor | None = None


@dataclass(frozen=True)
class InputSketch:
    """Second moment of a module's inputs up to a factor, ``C ~ rows^T rows + diag(rest)``, small enough for a patch.

    Attributes:
        rows: ``(r, d_in)`` bfloat16.
        rest: ``(d_in,)`` float32, at least 0.
    """

    rows: Tensor
    rest: Tensor

    @classmethod
    def of(cls, statistics: ModuleStatistics) -> InputSketch | None:
        """What the code ``z = A x`` has seen of the inputs; None when the statistics hold no ``x_code``.

        The Nystrom approximation ``(C A^T) (A C A^T)^-1 (A C)``, exact on the rows of A and never above ``C``, and
        the diagonal that it misses. One more product of the size of ``lora_A`` per token is all that it takes.
        """
        if statistics.x_code is None:
            return None
        sizes, vectors = torch.linalg.eigh(statistics.z_gram)
        seen = sizes > torch.finfo(torch.float32).eps * sizes[-1].clamp_min(torch.finfo(sizes.dtype).tiny)
        inverse = torch.where(seen, sizes.clamp_min(torch.finfo(sizes.dtype).tiny).rsqrt(), 0.0)
        rows = (inverse[:, None] * (vectors.T @ statistics.x_code.T) / max(1, statistics.tokens) ** 0.5).bfloat16()
        rest = statistics.x_square / max(1, statistics.tokens) - rows.double().square().sum(dim=0)
        return cls(rows, rest.clamp_min(0.0).float())

    def gram(self, A: Tensor) -> Tensor:
        """``A C A^T (k, k)`` for ``A (k, d_in)``."""
        A = A.float()
        code = A @ self.rows.float().T
        return code @ code.T + (A * self.rest) @ A.T


def rank_kept(rank: int, config: NLSRConfig) -> int:
    """Directions that ``low_rank`` keeps of ``rank``, at least one.

    NLSR keeps ``r* = r (1 - P_SR)``, rounded up here. Differs in the release: ``int(r P_SR)``.
    """
    dropped = int(rank * config.sparsity)
    return max(1, dropped if config.low_rank_rule == "released" else rank - dropped)


def low_rank_factors(update: LowRank, z_gram: Tensor, kept: int) -> FactorPair:
    """The factors reduced to the ``kept`` directions that carry most output energy (ActSVD; NLSR eq. 3-5).

    ``A^ = V V^T A`` with V the top right singular vectors of ``H = X A^T``, and ``B^ = U U^T B`` with U those of
    ``H B^T``; both come exactly from ``G = H^T H (r, r)``.

    Args:
        update: factors ``A (r, d_in)``, ``B (d_out, r)`` of the reference.
        z_gram: ``G (r, r)``.
        kept: number of directions, 1 to r.

    Returns:
        ``(A^, B^)`` in float32 with the shapes of A and B.

    Differs from the release: exact eigenvectors where the release draws a randomised SVD.
    """
    A, B = update.A.double(), update.B.double()
    values, vectors = torch.linalg.eigh(z_gram.double())
    top = vectors[:, -kept:]
    root = vectors * values.clamp_min(0.0).sqrt()
    energy, rotation = torch.linalg.eigh(root.T @ (B.T @ B) @ root)
    usable = energy[-kept:] > 1e-14 * energy[-1].clamp_min(torch.finfo(energy.dtype).tiny)
    seen = root @ rotation[:, -kept:][:, usable]
    core = (seen / energy[-kept:][usable]) @ (seen.T @ (B.T @ B))
    return (top @ (top.T @ A)).float(), (B @ core).float()


def _low_rank(update: LowRank, statistics: ModuleStatistics, config: NLSRConfig, _: torch.Generator) -> FactorPair:
    A, B = low_rank_factors(update, statistics.z_gram, rank_kept(update.rank, config))
    return A.abs(), B.abs()


def _wanda(update: LowRank, statistics: ModuleStatistics, config: NLSRConfig, _: torch.Generator) -> FactorPair:
    """``|A_ij| |X_j|`` and ``|B_ij| |H_j|`` with ``H = X A^T`` (methods of Wanda applied to the factors)."""
    code_square = statistics.z_gram.diagonal()
    return (
        update.A.float().abs() * statistics.x_square.sqrt().float(),
        update.B.float().abs() * code_square.clamp_min(0.0).sqrt().float(),
    )


def _snip(update: LowRank, statistics: ModuleStatistics, config: NLSRConfig, _: torch.Generator) -> FactorPair:
    """``|W| sum_k |dL_k/dW|`` with per-sample gradients. Differs from the release, which accumulates gradients."""
    if statistics.grad_A is None or statistics.grad_B is None:
        raise CalibrationError(
            f"score={config.score!r} needs gradient sums, but the statistics hold none; collect them with "
            f"collect_statistics(..., gradients={config.score!r})"
        )
    return update.A.float().abs() * statistics.grad_A.float(), update.B.float().abs() * statistics.grad_B.float()


def _magnitude(update: LowRank, statistics: ModuleStatistics, config: NLSRConfig, _: torch.Generator) -> FactorPair:
    return update.A.float().abs(), update.B.float().abs()


def _random(
    update: LowRank, statistics: ModuleStatistics, config: NLSRConfig, generator: torch.Generator
) -> FactorPair:
    return torch.rand(update.A.shape, generator=generator), torch.rand(update.B.shape, generator=generator)


_Score = Callable[[LowRank, ModuleStatistics, NLSRConfig, torch.Generator], FactorPair]
SCORES: dict[str, _Score] = {
    "low_rank": _low_rank,
    "wanda": _wanda,
    "snip": _snip,
    "preference_snip": _snip,
    "magnitude": _magnitude,
    "random": _random,
}


def safety_masks(
    update: LowRank, statistics: ModuleStatistics, config: NLSRConfig, *, generator: torch.Generator
) -> FactorPair:
    """Boolean masks ``(M_A, M_B)``, True on the safety-critical entries of the reference's factors (NLSR eq. 6).

    Args:
        update: the reference of one module.
        statistics: its calibration statistics; ``magnitude`` and ``random`` use none of them.
        config: ``score``, ``sparsity``, ``mask_unit`` and ``low_rank_rule`` are read.
        generator: CPU generator for ``random`` and for ties at zero under the released rule.
    """
    scores = SCORES[config.score](update, statistics, config, generator)
    released = config.score == "low_rank" and config.low_rank_rule == "released"
    if released:
        return _above(scores[0], config.sparsity, generator), _above(scores[1], config.sparsity, generator)
    keep = _top_of_rows if config.mask_unit == "row" else _top
    return keep(scores[0], config.sparsity), keep(scores[1], config.sparsity)


def _top(score: Tensor, sparsity: float) -> Tensor:
    """True on exactly ``n - int(n * sparsity)`` largest entries; ties go to the earlier entry."""
    return _top_of_rows(score.reshape(1, -1), sparsity).reshape(score.shape)


def _top_of_rows(score: Tensor, sparsity: float) -> Tensor:
    dropped = int(score.shape[1] * sparsity)
    if dropped == 0:
        return torch.ones_like(score, dtype=torch.bool)
    bar = score.kthvalue(dropped, dim=1, keepdim=True).values
    mask = score > bar
    missing = score.shape[1] - dropped - mask.sum(dim=1, keepdim=True)
    if bool(missing.any()):
        tied = score == bar
        mask |= tied & (tied.cumsum(dim=1) <= missing)
    return mask


def _above(score: Tensor, sparsity: float, generator: torch.Generator) -> Tensor:
    """The release's threshold: strictly above the ``int(n * sparsity)``-th smallest, so ties are dropped.

    When that bar is zero the release drops a random subset of the zeros instead; seeded here, unseeded there.
    """
    flat = score.flatten()
    dropped = min(int(len(flat) * sparsity), len(flat) - 1)
    bar = flat.kthvalue(dropped + 1).values
    if bar > 0.0:
        return score > bar
    zeros = (flat == 0.0).nonzero().flatten()
    chosen = zeros[torch.randperm(len(zeros), generator=generator)[:dropped]]
    mask = torch.ones(len(flat), dtype=torch.bool)
    mask[chosen] = False
    return mask.reshape(score.shape)
