"""The two-teacher closed form: repair without gradients (docs/DESIGN.md section 6).

Algorithm. Three models share one set of base weights and differ only in the factors of one adapter: the safe teacher
(adapter off, or a reference), the fine-tuned model, and the repaired one. Block by block, and within a block group by
group of modules that read the same tensor:

1. On safety tokens the safe teacher's output of each module is wanted, on utility tokens the fine-tuned model's. The
   module that is added last to a block's hidden state is asked, where the safe answer is a refusal, for the output
   that makes this hidden state the safe teacher's: what the modules before it left undone is made good.
2. The repaired model runs up to the group; its inputs ``x`` and the base outputs give the sums
   ``M = sum w x x^T`` and ``T = sum w (wanted - base(x)) x^T``.
3. ``dW'' = (T + e dW_t) (M + e I)^-1``, cut to the adapter's rank where it matters for these inputs.

Only module inputs and outputs are read, so biases, quantised base weights and fused layouts need no special case.
Several ranks, each with the whole model, share the batches; sums are over the tokens of all.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .blocks import (
    Factors,
    Place,
    find_blocks,
    groups_of,
    is_added_last,
    playing,
    require_active,
    rows_of,
    run_block,
    run_until,
)
from .config import NLSRConfig
from .costs import HELD, BlockPass, Estimate, Group, Share, choose_solver, estimate
from .edits import NormalEquations, Solved
from .errors import CalibrationError
from .examples import Example
from .generation import model_digest, quiet
from .live_adapter import LiveAdapter
from .lowrank import LowRank, fingerprint
from .offloading import held
from .ranks import ALONE, Ranks
from .result_file import key_of
from .resuming import SolvedBlocks
from .solvers import HeldTokens
from .streams import Batch, Stream, open_stream, weigh, weight_of

logger = logging.getLogger(__name__)

LARGEST_ERROR = 0.01  # of a solver, above which a note says so
_INPUT, _AFTER = "input of the group", "hidden state after the block"
INSTEAD = "use update='sum' with a patch"  # of a module that does not see each token once


@dataclass(frozen=True)
class TwoTeacherSolution:
    """What the closed form found.

    Attributes:
        updates: module -> repaired update, rank and scale of the adapter, on the CPU.
        errors: module -> relative error of the cut to the adapter's rank, on the calibration inputs.
        solver_errors: module -> measured relative error of the solver, on the calibration inputs; 0 where it is exact.
        left_alone: LoRA modules outside the chain of blocks, which keep their fine-tuned update.
        estimate: what the run was expected to cost, with the solver of each width, JSON values.
        notes: sentences that a user should read.
    """

    updates: dict[str, LowRank]
    errors: dict[str, float]
    solver_errors: dict[str, float]
    left_alone: tuple[str, ...]
    estimate: dict[str, Any]
    notes: tuple[str, ...]


def solve_two_teacher(
    adapter: LiveAdapter,
    *,
    safety: Sequence[Example],
    utility: Sequence[Example],
    safe_teacher: Factors,
    config: NLSRConfig,
    pad_id: int = 0,
    progress: bool = True,
    work_dir: Path | None = None,
    ranks: Ranks = ALONE,
) -> TwoTeacherSolution:
    """Solve every LoRA module inside the model's blocks; the model is left exactly as it was.

    Args:
        adapter: the fine-tuned adapter, active and alone on the model.
        safety: prompts with safe answers; those marked as refusals correct what is left undone, and those marked as
            no refusals, lookalikes, weigh less.
        utility: the user's own data; may be empty, then only the ridge keeps the fine-tuned behaviour.
        safe_teacher: module -> update of a safe adapter, or None for the base model itself.
        config: ``utility_weight``, ``lookalike_weight``, ``ridge``, ``decision_weight``, ``correct_drift``,
            ``solver``, ``max_tokens``, ``offload``, ``nlsr_batch_size`` and ``nlsr_seed`` are read.
        work_dir: where solved blocks are kept until the last one is; a run that was interrupted goes on from there.
            Over several ranks that of rank 0, which alone reads and writes there.
        ranks: the processes that share the examples; all call this with the same model and arguments, and all get
            the same solution.

    Raises:
        CalibrationError: no safety data.
        UnsupportedAdapterError: the model's blocks cannot be run one by one.
        IncompatibleError: the adapter is not the one that the model computes with, or ``work_dir`` holds another run.
    """
    if not safety:
        raise CalibrationError("the two-teacher form needs safety examples, found none; pass calibration=...")
    with ranks.together(), quiet(adapter.model), torch.no_grad():
        require_active(adapter)
        safe_teacher = None if safe_teacher is None else dict(safe_teacher)  # read once, also from a file
        finished = None
        if work_dir is not None and ranks.number == 0:
            finished = SolvedBlocks(work_dir, _made_from(adapter, safety, utility, safe_teacher, config, ranks))
        tuned = adapter.snapshot()
        data = _of_safety(safety, safe_teacher, config)
        if utility and config.utility_weight > 0.0:
            data.append(_Kind(utility, tuned, config.utility_weight, corrects=False))
        blocks = find_blocks(adapter)
        streams = _open(adapter, blocks, data, config, pad_id, ranks)
        run = _Run(adapter, [block for _, block in blocks], streams, tuned, config, ranks)
        solution = _solve_blocks(run, finished, progress and ranks.number == 0)
        if finished is not None:
            finished.remove()
    return solution


class _Kind(NamedTuple):
    """Data of one kind: whose outputs are wanted, the sum of their token weights, and ``Stream.corrects``."""

    examples: Sequence[Example]
    teacher: Factors
    weight: float
    corrects: bool


def _of_safety(safety: Sequence[Example], teacher: Factors, config: NLSRConfig) -> list[_Kind]:
    """The safety data by what their answers are; but for lookalikes their weights add up to 1."""
    total = weight_of(safety, config.decision_weight)
    found = []
    for refusal in (True, None, False):
        examples = [e for e in safety if e.refusal is refusal]
        if examples:
            share = weight_of(examples, config.decision_weight) / total
            weight = share * config.lookalike_weight if refusal is False else share
            found.append(_Kind(examples, teacher, weight, corrects=config.correct_drift and refusal is True))
    return found


def _made_from(
    adapter: LiveAdapter,
    safety: Sequence[Example],
    utility: Sequence[Example],
    safe_teacher: Factors,
    config: NLSRConfig,
    ranks: Ranks,
) -> dict[str, Any]:
    """All that a solution depends on, as hashes and settings."""
    tokens = [[[list(e.prompt), list(e.answer), e.refusal] for e in examples] for examples in (safety, utility)]
    return {
        "model": model_digest(adapter.model),
        "adapter": fingerprint(adapter),
        "safe_teacher": None if safe_teacher is None else fingerprint(safe_teacher),
        "data": key_of(tokens),
        "config": config.to_dict(),
        "ranks": ranks.count,
    }


def _open(
    adapter: LiveAdapter,
    blocks: list[tuple[str, nn.Module]],
    data: list[_Kind],
    config: NLSRConfig,
    pad_id: int,
    ranks: Ranks,
) -> list[Stream]:
    """This rank's share of all data, at the first block."""
    weighed = weigh([(kind.examples, kind.weight) for kind in data], config)
    modules = [block for _, block in blocks]
    options: dict[str, Any] = {"pad_id": pad_id, "offload": config.offload}
    return [
        open_stream(adapter, modules, found.share(ranks), kind.teacher, corrects=kind.corrects, **options)
        for found, kind in zip(weighed, data, strict=True)
    ]


@dataclass(frozen=True)
class _Run:
    """What every step of one solution reads.

    Attributes:
        blocks: in the order in which they run.
        streams: this rank's share of the data, safety first; advanced from block to block.
        tuned: the fine-tuned updates.
        ranks: the processes that have the other shares.
    """

    adapter: LiveAdapter
    blocks: list[nn.Module]
    streams: list[Stream]
    tuned: dict[str, LowRank]
    config: NLSRConfig
    ranks: Ranks

    def share(self) -> Share:
        """The size of this rank's share."""
        weights = [w for stream in self.streams for w in stream.weights]
        return Share(
            tokens=sum(stream.tokens() for stream in self.streams),
            counted=_positive(weights),
            kept=_positive([w for stream in self.streams for w in stream.drawn]),
            largest_batch=max((w.numel() for w in weights), default=0),
            nbytes=sum(stream.nbytes() for stream in self.streams),
            itemsize=max((h.element_size() for stream in self.streams for h in stream.repaired), default=0),
        )


def _positive(weights: Sequence[Tensor]) -> int:
    return sum(int((w > 0.0).sum()) for w in weights)


def _solve_blocks(run: _Run, finished: SolvedBlocks | None, progress: bool) -> TwoTeacherSolution:
    """Block by block; ``finished`` is None on all ranks but the first."""
    shares = run.ranks.gather(run.share())
    steps = run.ranks.gather(_steps(run, shares) if run.ranks.number == 0 else [])[0]
    expected = _expect(run, steps, shares)
    if run.ranks.number == 0:
        logger.info("two-teacher run: %s", expected.in_words())
    solved: dict[str, Solved] = {}
    for index, block in enumerate(tqdm(run.blocks, desc="two-teacher", unit="block", disable=not progress)):
        current = {name: run.tuned[name] for group in steps[index].groups for name in group.d_outs}
        found = run.ranks.gather(None if finished is None else finished.load(index))[0]
        with held(block):
            if found is None:
                found = _solve_block(run, index, steps[index], current)
                if finished is not None:
                    finished.save(index, found)
            current |= {name: module.update for name, module in found.items()}
            for stream in run.streams if index + 1 < len(run.blocks) else ():
                stream.advance(run.adapter, block, index, current)
        solved |= found
    return _solution(solved, run.tuned, expected)


def _solve_block(run: _Run, index: int, step: _Step, current: Mapping[str, LowRank]) -> dict[str, Solved]:
    """Group after group, each on the inputs that the groups before it, repaired already, give."""
    found: dict[str, Solved] = {}
    for group in step.groups:
        repaired = {**current, **{name: s.update for name, s in found.items()}}
        found |= _solve_group(run, index, group, repaired, step.corrects and group is step.groups[-1])
    return found


@dataclass(frozen=True)
class _Step:
    """What is solved in one block.

    Attributes:
        groups: LoRA modules that read the same tensor, in the order they run.
        corrects: whether the last of them can make good what is left undone, see :func:`_undone`.
    """

    groups: list[Group]
    corrects: bool


def _steps(run: _Run, shares: Sequence[Share]) -> list[_Step]:
    """Block after block, found on one batch."""
    names = {id(layer): name for name, layer in run.adapter.layers.items()}
    hidden = run.streams[0].batch(0, 0).repaired
    found = []
    for index, block in enumerate(run.blocks):
        batch = run.streams[0].batch(0, index)
        modules = groups_of(block, names, hidden, batch.arguments)
        corrects = bool(modules) and any(stream.corrects for stream in run.streams)
        if corrects:
            last: Any = run.adapter.layers[modules[-1][-1]]
            corrects = is_added_last(block, last, hidden, batch.arguments, batch.weights > 0.0)
        found.append(_Step([_group(run, group, shares) for group in modules], corrects))
        hidden = run_block(block, hidden, batch.arguments)
    return found


def _group(run: _Run, modules: list[str], shares: Sequence[Share]) -> Group:
    return Group(
        tokens=shares[0].kept,
        d_in=run.tuned[modules[0]].shape[1],
        d_outs={name: run.tuned[name].shape[0] for name in modules},
        rank=max(run.tuned[name].rank for name in modules),
        processes=len(shares),
    )


def _expect(run: _Run, steps: list[_Step], shares: Sequence[Share]) -> Estimate:
    passes = [
        BlockPass(sum(parameter.numel() for parameter in block.parameters()), tuple(step.groups))
        for block, step in zip(run.blocks, steps, strict=True)
    ]
    return estimate(passes, shares, wanted=run.config.solver)


def _solve_group(
    run: _Run, index: int, group: Group, current: Mapping[str, LowRank], corrects: bool
) -> dict[str, Solved]:
    """Collect the least-squares problem of one group of modules over all batches of all streams, and solve it."""
    solver, device = choose_solver(run.config.solver, group), run.streams[0].device
    sums: NormalEquations | HeldTokens = (
        HeldTokens.none(solver, group.d_in, group.d_outs, device, run.ranks)
        if solver in HELD
        else NormalEquations.zeros(group.d_in, group.d_outs, device, run.ranks)
    )
    for stream in run.streams:
        layers: dict[str, Any] = {name: run.adapter.layers[name] for name in group.d_outs}
        reads = _Reading(run.adapter, run.blocks[index], layers, current, stream.teacher, corrects and stream.corrects)
        for batch in stream.batches(index):
            weights = (batch.drawn if solver in HELD else batch.weights).flatten()
            counted = weights > 0.0
            inputs, targets = reads.tokens(batch, counted)
            sums.add(inputs if solver in HELD else inputs.float(), targets, weights[counted])
    return sums.solve(run.tuned, ridge=run.config.ridge, seed=run.config.nlsr_seed)


@dataclass(frozen=True)
class _Reading:
    """Reads what one group of modules gets, and what is wanted of it, from the batches of one stream.

    Attributes:
        layers: of the group, in the order they run.
        current: module of the block -> update, as far as it is repaired.
        teacher: whose outputs are wanted.
        corrects: whether the last of the layers makes good what is left undone.
    """

    adapter: LiveAdapter
    block: nn.Module
    layers: dict[str, Any]
    current: Mapping[str, LowRank]
    teacher: Factors
    corrects: bool

    def tokens(self, batch: Batch, counted: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Of the tokens that count: the inputs in the repaired model, and per module what is wanted minus base."""
        first, last = next(iter(self.layers)), next(reversed(self.layers))
        outputs = {name: Place(layer, output=True) for name, layer in self.layers.items()}
        inputs = {_INPUT: Place(self.layers[first], output=False)}
        corrected = {last: outputs[last], _AFTER: Place(self.block, output=True)} if self.corrects else {}
        with playing(self.adapter, self.current, self.teacher):
            taught = run_until(outputs | corrected, self.block, batch.taught, batch.arguments)
        with playing(self.adapter, self.current, self.current):
            seen = run_until(inputs | corrected, self.block, batch.repaired, batch.arguments)
        x = seen[_INPUT]
        targets = {
            name: rows_of(taught[name], counted, name, instead=INSTEAD).float()
            - layer.base_layer(x).to(x.device).flatten(0, -2)[counted].float()
            for name, layer in self.layers.items()
        }
        if self.corrects:
            targets[last] += _undone(taught, seen, last, counted)
        return rows_of(x, counted, first, instead=INSTEAD), targets


def _undone(taught: Mapping[str, Tensor], seen: Mapping[str, Tensor], module: str, counted: Tensor) -> Tensor:
    """How far the hidden state behind a block is from the teacher's, before the module's output is added to it."""
    rows = [
        {name: tensors[name].flatten(0, -2)[counted].float() for name in (_AFTER, module)}
        for tensors in (taught, seen)
    ]
    ahead, behind = (found[_AFTER] - found[module] for found in rows)
    return ahead - behind


def _solution(solved: dict[str, Solved], tuned: dict[str, LowRank], expected: Estimate) -> TwoTeacherSolution:
    notes: tuple[str, ...] = ()
    used = {solver for names in expected.solvers.values() for solver in names}
    if expected.kept < expected.counted and used & set(HELD):
        notes += (
            f"{expected.kept} of {expected.counted} calibration tokens were drawn for the solvers that keep tokens "
            "(max_tokens)",
        )
    doubtful = [name for name, module in solved.items() if module.solver_error > LARGEST_ERROR]
    if doubtful:
        notes += (
            f"the solver is off by more than {LARGEST_ERROR:.0%} in {len(doubtful)} modules: "
            f"{', '.join(doubtful[:4])}; solver='moment' is exact up to the number of directions",
        )
    return TwoTeacherSolution(
        updates={n: LowRank(s.update.A.cpu(), s.update.B.cpu(), s.update.scale) for n, s in solved.items()},
        errors={name: module.truncation_error for name, module in solved.items()},
        solver_errors={name: module.solver_error for name, module in solved.items()},
        left_alone=tuple(name for name in tuned if name not in solved),
        estimate=expected.to_dict(),
        notes=notes,
    )
