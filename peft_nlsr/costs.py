"""What the two-teacher form costs: arithmetic and memory from shapes alone, and the choice of the cheapest solver.

Operations count a multiplication and an addition as two; those in float64 count twice. Memory is that of the
tensors which come on top of the model; what the process holds also depends on its allocator. Both are models, checked
against measurements by tests and by ``benchmarks/two_teacher_block.py``. Over several ranks they are those of the rank
with most tokens, communication left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

FULL_WIDTH = 2048  # inputs up to which auto takes the full second moments
MOMENT_ROWS = 1024  # rows of M made at a time
ROUNDS = 3  # of block Lanczos, typically, the first one and the shrinking later ones together
STEPS = 18  # of conjugate gradients in all rounds together, typically
_PREFIXES = ("", "k", "M", "G", "T", "P")
THIN = 10.0  # how much slower an operation is in the thin products of iterative; measured 6 against 60 GFLOP/s
HELD = ("moment", "dual", "iterative")  # the solvers that keep the tokens


@dataclass(frozen=True)
class Group:
    """Modules of one block that read the same tensor.

    Attributes:
        tokens: rows that enter one process's sums; for solvers that keep them, after the draw to ``max_tokens``.
        d_in: width of the tensor.
        d_outs: module -> width of its output, in the order in which they run.
        rank: largest rank of their updates.
        processes: how many share the tokens, each having about as many.
    """

    tokens: int
    d_in: int
    d_outs: Mapping[str, int]
    rank: int
    processes: int = 1

    def widest(self) -> int:
        """The largest output."""
        return max(self.d_outs.values())


def columns(rank: int, d_out: int) -> int:
    """Directions that block Lanczos begins with to find ``rank`` of them."""
    return min(rank + max(16, rank // 4), d_out)


def sketch_size(d_in: int, rank: int) -> int:
    """Strong directions of the inputs that are taken out before conjugate gradients."""
    return min(max(128, 2 * rank), d_in)


def operations(solver: str, group: Group) -> float:
    """Arithmetic of one group's sums and solutions, without the passes of the model."""
    n, d = float(group.tokens), float(group.d_in)
    everyone = n * group.processes
    if solver == "full":
        solved = sum(list(group.d_outs.values())[:: group.processes])
        return 2 * n * d * (d + sum(group.d_outs.values())) + 4 * d * d * (d / 6 + solved)
    rounds, k = 0.0, 0.0
    for width in group.d_outs.values():
        k = columns(group.rank, width)
        rounds += ROUNDS * 4 * n * k * (d + width)
    if solver == "moment":
        return n * d * d + 2 * d**3 / 3 + rounds + len(group.d_outs) * ROUNDS * 8 * d * d * k
    if solver == "dual":
        turns = len(group.d_outs) * ROUNDS * 8 * everyone**2 * k
        return 2 * everyone**2 * d + 2 * everyone**3 / 3 + rounds + turns
    return 4 * n * d * sketch_size(group.d_in, group.rank) + rounds + len(group.d_outs) * STEPS * 4 * n * d * k


def working_bytes(solver: str, group: Group, itemsize: int) -> float:
    """Largest memory of one group's sums and solutions at once; ``itemsize`` is that of the model's activations."""
    n, d, widest = float(group.tokens), float(group.d_in), float(group.widest())
    if solver == "full":
        return 8 * (3 * d * d + d * sum(group.d_outs.values()) + 4 * d * widest)
    held = n * (d + sum(group.d_outs.values())) * min(itemsize, 4)
    k = columns(group.rank, group.widest())
    turning = 4 * k * (3 * n + 5 * d + 10 * widest)
    if solver == "moment":
        return held + 8 * 2 * d * d + max(turning, 4 * MOMENT_ROWS * d)
    if solver == "dual":
        everyone = n * group.processes
        return held + 8 * 2 * everyone**2 + max(turning, 4 * everyone * (2 * d + everyone))
    return held + max(turning, 8 * 5 * d * sketch_size(group.d_in, group.rank))


def choose_solver(wanted: str, group: Group) -> str:
    """The solver for a group: the one asked for, or for ``auto`` the cheapest.

    ``auto`` takes ``full`` up to ``FULL_WIDTH`` inputs; above, the one of ``moment``, ``dual`` and ``iterative`` with
    the fewest operations.
    """
    if wanted != "auto":
        return wanted
    if group.d_in <= FULL_WIDTH:
        return "full"
    return cheapest(group)


def cheapest(group: Group) -> str:
    """Of the solvers that keep tokens, the one with the fewest operations, thin products counted ``THIN`` times."""
    return min(HELD, key=lambda solver: operations(solver, group) * (THIN if solver == "iterative" else 1.0))


@dataclass(frozen=True)
class BlockPass:
    """One block: its number of parameters, and its groups in the order they run."""

    parameters: int
    groups: tuple[Group, ...]


@dataclass(frozen=True)
class Share:
    """The data of one process.

    Attributes:
        tokens, counted, kept: tokens with padding, with a weight, and kept by solvers that keep tokens.
        largest_batch: tokens of the largest batch, with padding.
        nbytes: hidden states and arguments between two blocks.
        itemsize: bytes of one activation.
    """

    tokens: int
    counted: int
    kept: int
    largest_batch: int
    nbytes: int
    itemsize: int


@dataclass(frozen=True)
class Estimate:
    """What a two-teacher run is expected to cost beside the model itself.

    Attributes:
        pass_operations: of the model's passes, the attention scores left out; as all costs, of rank 0, which has most.
        solve_operations: of all sums and solutions.
        stream_bytes: hidden states and arguments between two blocks.
        peak_bytes: most memory at once, hidden states included.
        tokens, counted, kept: as in :class:`Share`, of all ranks together.
        solvers: width of the inputs -> the solvers of its groups.
        ranks: how many processes share the tokens.
    """

    pass_operations: float
    solve_operations: float
    stream_bytes: float
    peak_bytes: float
    tokens: int
    counted: int
    kept: int
    solvers: dict[int, tuple[str, ...]]
    ranks: int

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "solvers": {str(width): list(names) for width, names in self.solvers.items()}}

    def in_words(self) -> str:
        """One line for people."""
        solvers = ", ".join(
            f"{' and '.join(names)} for {width} inputs" for width, names in sorted(self.solvers.items())
        )
        memory, states = in_words(self.peak_bytes, "B"), in_words(self.stream_bytes, "B")
        shared = f" on {self.ranks} ranks, each at most" if self.ranks > 1 else ","
        return (
            f"{self.tokens} tokens{shared} {in_words(self.pass_operations, 'FLOP')} in passes of the model and "
            f"{in_words(self.solve_operations, 'FLOP')} in solutions ({solvers}); about "
            f"{memory} beside the model, {states} of it between blocks"
        )


def estimate(blocks: Sequence[BlockPass], shares: Sequence[Share], *, wanted: str) -> Estimate:
    """The cost of a run from its shapes.

    Args:
        blocks: with the tokens that rank 0 has.
        shares: of every rank, rank 0 first.
        wanted: ``NLSRConfig.solver``.
    """
    own = shares[0]
    groups = [group for block in blocks for group in block.groups]
    chosen = [(choose_solver(wanted, group), group) for group in groups]
    sized = [(s, g if s in HELD else replace(g, tokens=own.counted)) for s, g in chosen]
    working = max((working_bytes(s, g, own.itemsize) for s, g in sized), default=0.0)
    activations = max((_activations(block) for block in blocks), default=0)
    return Estimate(
        pass_operations=sum(_passes(block) for block in blocks) * float(own.tokens),
        solve_operations=sum(operations(s, g) for s, g in sized),
        stream_bytes=float(own.nbytes),
        peak_bytes=own.nbytes + working + activations * own.largest_batch * own.itemsize,
        tokens=sum(share.tokens for share in shares),
        counted=sum(share.counted for share in shares),
        kept=sum(share.kept for share in shares),
        solvers={
            width: tuple(sorted({solver for solver, group in chosen if group.d_in == width}))
            for width in sorted({group.d_in for group in groups})
        },
        ranks=len(shares),
    )


def _passes(block: BlockPass) -> float:
    """Operations per token: both models run up to each group, the base once more, and both through the whole block."""
    done, total = 0.0, 4.0 * block.parameters
    for group in block.groups:
        size = float(group.d_in * sum(group.d_outs.values()))
        total += 2 * (done + (done + size) + size)
        done += size
    return total


def _activations(block: BlockPass) -> int:
    """Values per token that a pass through the block holds at once, at most."""
    return sum(group.d_in + 2 * sum(group.d_outs.values()) for group in block.groups)


def in_words(amount: float, unit: str) -> str:
    """A large number with a decimal prefix, as ``1.2 TB``."""
    power = min(max(0, math.floor(math.log10(max(amount, 1.0))) // 3), len(_PREFIXES) - 1)
    return f"{amount / 1000.0**power:.3g} {_PREFIXES[power]}{unit}"
