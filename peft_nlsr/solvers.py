"""The two-teacher least squares for wide modules, solved from the calibration tokens without their second moments.

``edits.NormalEquations`` sums ``M (d_in, d_in)`` and ``T (d_out, d_in)`` in float64. Here the tokens themselves are
kept and only the ``r`` directions that the adapter can hold are looked for, by block Lanczos on ``(T + e dW_t) (M + e
I)^-1 (T + e dW_t)^T``. What remains is to apply ``(M + e I)^-1`` to a few columns, in one of three ways
(:data:`INVERSES`). Nothing is approximated in silence: every solution carries a measured error. Over several ranks
each keeps its own tokens, and all run the same iteration on sums over all tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .costs import MOMENT_ROWS, columns, sketch_size
from .directions import Applied, Directions, block_lanczos, symmetric
from .edits import Solved, balanced, merged
from .lowrank import LowRank
from .ranks import ALONE, Ranks

MOST_STEPS = 60  # of conjugate gradients, per round
SLOWEST = 0.95  # ratio of the energies that two steps of conjugate gradients gain, when an error is estimated
PROBES = 8  # random outputs that estimate how much the cut to the adapter's rank loses

Inverse = Callable[[Tensor, float], tuple[Tensor, float]]


@dataclass(frozen=True)
class Weighted:
    """``diag(sqrt(w)) X`` for tokens kept in chunks of any floating dtype; products are float32.

    All products are made chunk by chunk, so that they have the same bits whichever rank keeps the chunk.

    Attributes:
        chunks: rows ``(n_i, d)`` as the model made them.
        roots: square roots of all token weights ``(n, 1)``.
        ranks: the processes that keep the other tokens; what is summed over tokens is summed over theirs too.
    """

    chunks: Sequence[Tensor]
    roots: Tensor
    ranks: Ranks = ALONE

    @property
    def width(self) -> int:
        return self.chunks[0].shape[1]

    def times(self, v: Tensor) -> Tensor:
        """``(d, k) -> (n, k)``."""
        return torch.cat([chunk.float() @ v for chunk in self.chunks]) * self.roots

    def mapped(self, matrix: Tensor) -> Weighted:
        """The same tokens after a linear map ``(d, k)``."""
        return replace(self, chunks=[chunk.float() @ matrix for chunk in self.chunks])

    def adjoint(self, v: Tensor) -> Tensor:
        """``(n, k) -> (d, k)``; chunks and ranks are added in float64, so that their order does not matter."""
        total = v.new_zeros(self.width, v.shape[1], dtype=torch.float64)
        parts = (v * self.roots).split([len(chunk) for chunk in self.chunks])
        for chunk, part in zip(self.chunks, parts, strict=True):
            total += chunk.float().T @ part
        return self.ranks.add_up(total).to(v)

    def power(self) -> float:
        """The trace of the weighted second moment."""
        parts = self.roots.split([len(chunk) for chunk in self.chunks])
        own = sum(float((c.float() * p).square().sum()) for c, p in zip(self.chunks, parts, strict=True))
        return float(self.ranks.add_up(torch.tensor([own], dtype=torch.float64)))


@dataclass
class HeldTokens:
    """The normal equations of modules that share one input, as the tokens that make them.

    Attributes:
        solver: how ``(M + e I)^-1`` is applied, a key of :data:`INVERSES`.
        inputs, weights: the repaired model's inputs ``(n_i, d_in)`` and token weights ``(n_i,)``, batch by batch.
        wanted: per module, teacher minus base ``(n_i, d_out)``.
        ranks: the processes that keep the other tokens.

    Inputs in 16 bits are kept as they are, and the wanted outputs beside them as bfloat16; all else is float32.
    """

    solver: str
    inputs: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    wanted: dict[str, list[Tensor]] = field(default_factory=dict)
    ranks: Ranks = ALONE

    @classmethod
    def none(
        cls, solver: str, d_in: int, d_outs: Mapping[str, int], device: torch.device, ranks: Ranks = ALONE
    ) -> HeldTokens:
        """No tokens yet, but their widths, which a rank without any of its own needs."""
        held = cls(solver, ranks=ranks)
        empty = torch.zeros(0, device=device)
        held.add(empty.reshape(0, d_in), {name: empty.reshape(0, d) for name, d in d_outs.items()}, empty)
        return held

    def add(self, inputs: Tensor, wanted: dict[str, Tensor], weights: Tensor) -> None:
        """Add tokens, shapes as in :meth:`peft_nlsr.edits.NormalEquations.add`."""
        short = inputs.dtype in (torch.bfloat16, torch.float16)
        self.inputs.append(inputs if short else inputs.float())
        self.weights.append(weights.float())
        for name, target in wanted.items():
            self.wanted.setdefault(name, []).append(target.to(torch.bfloat16 if short else torch.float32))

    def solve(self, tuned: dict[str, LowRank], *, ridge: float, seed: int) -> dict[str, Solved]:
        """The best rank-r update of each module with its truncation error and its measured solver error.

        Over several ranks that of rank 0: the others' may differ in their last bits.
        """
        roots = torch.cat(self.weights).sqrt()[:, None]
        X = Weighted(self.inputs, roots, self.ranks)
        epsilon = ridge * X.power() / X.width
        inverse = INVERSES[self.solver](X, epsilon, max(tuned[name].rank for name in self.wanted), seed)
        solved = {}
        for name, chunks in self.wanted.items():
            code, Y = X.mapped(tuned[name].A.to(roots).T), Weighted(chunks, roots, self.ranks)
            solved[name] = _Problem(X, Y, tuned[name], code, epsilon, inverse).solve(seed)
        return merged(self.ranks, solved if self.ranks.number == 0 else {}, self.wanted, roots.device)


@dataclass(frozen=True)
class _Problem:
    """One module: ``D = (T + e dW_t) (M + e I)^-1`` with ``T = Y^T X`` and ``M = X^T X``, weights included.

    ``G = D (M + e I)^(1/2)`` is what is cut to the adapter's rank. Its left singular vectors are the eigenvectors of
    ``G G^T = T' (M + e I)^-1 T'^T`` with ``T' = T + e dW_t``, and neither T' nor G is ever formed. ``tuned_code`` is
    ``X A_t^T``.
    """

    X: Weighted
    Y: Weighted
    tuned: LowRank
    tuned_code: Weighted
    epsilon: float
    inverse: Inverse

    def solve(self, seed: int) -> Solved:
        generator = torch.Generator().manual_seed(seed)
        start = self._random(columns(self.tuned.rank, self.Y.width), generator)
        return self._cut(block_lanczos(self._applied, start, self.tuned.rank, ranks=self.X.ranks), generator)

    def _applied(self, basis: Tensor, precision: float) -> Applied:
        rows, error = self._rows(basis, precision)
        return Applied(rows, self._image(rows), error)

    def _random(self, many: int, generator: torch.Generator) -> Tensor:
        return torch.randn(self.Y.width, many, generator=generator).to(self.Y.roots)

    def _rows(self, basis: Tensor, precision: float) -> tuple[Tensor, float]:
        """``D^T basis (d_in, k)`` and the error of the solution.

        As ``D^T = dW_t^T + (M + e I)^-1 X^T (Y - X dW_t^T)``, only the difference has to be solved for.
        """
        A, B, scale = self.tuned.A.to(basis), self.tuned.B.to(basis), self.tuned.scale
        code = scale * (B.T @ basis)
        moved, error = self.inverse(self.Y.times(basis) - self.tuned_code.times(code), precision)
        return A.T @ code + moved, error

    def _image(self, rows: Tensor) -> Tensor:
        """``T' rows (d_out, k)``."""
        A, B, scale = self.tuned.A.to(rows), self.tuned.B.to(rows), self.tuned.scale
        return self.Y.adjoint(self.X.times(rows)) + self.epsilon * scale * (B @ (A @ rows))

    def _cut(self, found: Directions, generator: torch.Generator) -> Solved:
        """The first ``rank`` directions; what the others hold is known inside the basis and estimated outside."""
        rank, (basis, rows, sizes, solver_error) = self.tuned.rank, found
        probes = self._random(PROBES, generator)
        probes = probes - basis @ (basis.T @ probes)
        beyond = float((probes * self._image(self._rows(probes, 0.1)[0])).sum().clamp_min(0.0)) / PROBES
        kept, lost = float(sizes[:rank].sum()), float(sizes[rank:].sum()) + beyond
        missing = max(0, rank - basis.shape[1])
        left = torch.nn.functional.pad(basis[:, :rank], (0, missing))
        A = torch.nn.functional.pad(rows[:, :rank], (0, missing)).T
        truncation = (lost / (kept + lost)) ** 0.5 if kept + lost > 0.0 else 0.0
        return Solved(balanced(A, left, self.tuned.scale), truncation, solver_error)


def _by_moment(X: Weighted, epsilon: float, rank: int, seed: int) -> Inverse:
    """Exact: ``M`` is formed in float64 from float32 products, its upper triangle only, and factorised."""
    d = X.width
    moment = torch.zeros(d, d, dtype=torch.float64, device=X.roots.device)
    for chunk, roots in zip(X.chunks, X.roots.split([len(c) for c in X.chunks]), strict=True):
        x = chunk.float() * roots
        for begin in range(0, d, MOMENT_ROWS):
            moment[begin : begin + MOMENT_ROWS, begin:] += x[:, begin : begin + MOMENT_ROWS].T @ x[:, begin:]
    X.ranks.add_up(moment)
    moment.diagonal().add_(epsilon)
    root = torch.linalg.cholesky(moment, upper=True)

    def solve(v: Tensor, precision: float) -> tuple[Tensor, float]:
        return torch.cholesky_solve(X.adjoint(v).double(), root, upper=True).to(v), 0.0

    return solve


def _by_tokens(X: Weighted, epsilon: float, rank: int, seed: int) -> Inverse:
    """Exact, for few tokens: ``(X^T X + e I)^-1 X^T = X^T (X X^T + e I)^-1``."""
    rows, place = X.ranks.stacked(torch.cat([chunk.float() for chunk in X.chunks]) * X.roots)
    gram = (rows @ rows.T).double()
    gram.diagonal().add_(epsilon)
    root = torch.linalg.cholesky(gram)

    def solve(v: Tensor, precision: float) -> tuple[Tensor, float]:
        solved = torch.cholesky_solve(X.ranks.stacked(v)[0].double(), root)
        return X.adjoint(solved[place].to(v)), 0.0

    return solve


def _by_gradients(X: Weighted, epsilon: float, rank: int, seed: int) -> Inverse:
    """Block conjugate gradients on ``M + e I``, whitened by a randomised sketch of its strong directions."""
    whiten = _whitening(X, epsilon, sketch_size(X.width, rank), seed)

    def system(v: Tensor) -> Tensor:
        u = whiten(v)
        return whiten(X.adjoint(X.times(u)) + epsilon * u)

    def solve(v: Tensor, precision: float) -> tuple[Tensor, float]:
        found, error = block_conjugate_gradients(system, whiten(X.adjoint(v)), precision, X.ranks)
        return whiten(found), error

    return solve


def _whitening(X: Weighted, epsilon: float, size: int, seed: int) -> Callable[[Tensor], Tensor]:
    """``P^(-1/2)`` for the Nystrom approximation ``P`` of ``M`` plus ridge, scaled to one on what it misses.

    Frangella, Tropp, Udell (2021), "Randomized Nystrom preconditioning", algorithm 2.1. Activations have a few very
    strong directions (outlier channels); with those gone, few steps are left.
    """
    start = torch.randn(X.width, size, generator=torch.Generator().manual_seed(seed)).to(X.roots)
    start = torch.linalg.qr(start).Q
    sketch = X.adjoint(X.times(start)).double()
    shift = torch.finfo(torch.float32).eps * float(sketch.norm())
    sketch = sketch + shift * start
    core = torch.linalg.cholesky(symmetric(start.T.double() @ sketch))
    half = torch.linalg.solve_triangular(core, sketch.T, upper=False).T
    vectors, values, _ = torch.linalg.svd(half, full_matrices=False)
    strong = (values.square() - shift).clamp_min(0.0) + epsilon
    vectors, down = vectors.to(X.roots), ((strong[-1] / strong).sqrt() - 1.0).to(X.roots)[:, None]
    return lambda v: v + vectors @ (down * (vectors.T @ v))


def block_conjugate_gradients(
    system: Callable[[Tensor], Tensor], wanted: Tensor, precision: float, ranks: Ranks = ALONE
) -> tuple[Tensor, float]:
    """Columns ``x (d, k)`` with ``system(x) = wanted`` for a symmetric positive definite system, and the error.

    The block form with QR of the residuals (Dubrulle 2001), which stays stable when columns become dependent. The
    error is relative, in the norm of the system, and that of one step earlier: the energy that the last step gained
    (Strakos and Tichy 2002), with the steps that were not done as a geometric series. It is rank 0's, so that all
    ranks end at the same step.
    """
    x = torch.zeros_like(wanted)
    residual, size = torch.linalg.qr(wanted)
    direction, gains = residual, []
    error = 0.0
    for _ in range(MOST_STEPS if bool(wanted.any()) else 0):
        applied = system(direction)
        step = torch.linalg.inv(symmetric(direction.T @ applied)).to(x)
        along = step @ size
        x = x + direction @ along
        gains.append(float((size.double() * along.double()).sum().clamp_min(0.0)))
        energy = float((x.double() * wanted.double()).sum())
        slowness = min(gains[-1] / gains[-2], SLOWEST) if len(gains) > 1 and gains[-2] > 0.0 else SLOWEST
        error = (gains[-1] / (1.0 - slowness) / energy) ** 0.5 if energy > 0.0 else 1.0
        error = float(ranks.of_first(torch.tensor([error], dtype=torch.float64)))
        if error <= precision:
            break
        residual, turn = torch.linalg.qr(residual - applied @ step)
        direction = residual + direction @ turn.T
        size = turn @ size
    return x, error


INVERSES: dict[str, Callable[[Weighted, float, int, int], Inverse]] = {
    "moment": _by_moment,
    "dual": _by_tokens,
    "iterative": _by_gradients,
}
