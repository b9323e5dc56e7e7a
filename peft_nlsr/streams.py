"""The data of the two-teacher form on their way through the blocks: hidden states, batch by batch.

Between two blocks only hidden states are kept, on the model's device or, where that has not the memory, on the CPU.
Over several ranks each has whole batches of its own, the same as one process would make.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import torch
from accelerate.utils import recursively_apply, send_to_device
from torch import Tensor, nn

from .blocks import Factors, as_teacher, capture, playing, prove_chain, run_block
from .config import NLSRConfig
from .examples import Example, batches_of, collate, token_weights
from .live_adapter import LiveAdapter
from .lowrank import LowRank
from .offloading import input_device
from .ranks import Ranks

DEVICE_SHARE = 0.5  # of the free memory of an accelerator, that hidden states may take before they go to the CPU


class Batch(NamedTuple):
    """One batch before a block, on the model's device.

    Attributes:
        weights, drawn: ``(examples, tokens)``, token weights of all tokens, and of those drawn for solvers that keep
            tokens; 0 where a token does not count.
        taught, repaired: hidden state in the teacher and in the repaired model.
        arguments: what else the block is called with.
    """

    weights: Tensor
    drawn: Tensor
    taught: Tensor
    repaired: Tensor
    arguments: tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class Stream:
    """One kind of data with its teacher.

    Attributes:
        teacher: whose outputs are wanted: module -> update, or None for the base model.
        device: where the model computes.
        home: where hidden states and arguments stay between blocks.
        weights, drawn, arguments, taught, repaired: per batch, see :class:`Batch`; arguments per block.
        corrects: whether the teacher is right about the whole hidden state, see ``two_teacher``.
    """

    teacher: Factors
    device: torch.device
    home: torch.device
    weights: list[Tensor] = field(default_factory=list)
    drawn: list[Tensor] = field(default_factory=list)
    arguments: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = field(default_factory=list)
    taught: list[Tensor] = field(default_factory=list)
    repaired: list[Tensor] = field(default_factory=list)
    corrects: bool = False

    def __len__(self) -> int:
        return len(self.weights)

    def batch(self, which: int, block: int) -> Batch:
        """A batch as it stands before a block."""
        weights, drawn = self.weights[which], self.drawn[which]
        if self.home == self.device:
            return Batch(weights, drawn, self.taught[which], self.repaired[which], self.arguments[which][block])
        moved = (self.taught[which], self.repaired[which], self.arguments[which][block])
        return Batch(weights, drawn, *send_to_device(moved, self.device))

    def batches(self, block: int) -> Iterator[Batch]:
        """All batches as they stand before a block, one on the device at a time."""
        for which in range(len(self)):
            yield self.batch(which, block)

    def advance(self, adapter: LiveAdapter, block: nn.Module, index: int, current: dict[str, LowRank]) -> None:
        """Send all hidden states through a finished block."""
        for which in range(len(self)):
            _, _, taught, repaired, arguments = self.batch(which, index)
            with playing(adapter, current, self.teacher):
                self.taught[which] = run_block(block, taught, arguments).to(self.home)
            with playing(adapter, current, current):
                self.repaired[which] = run_block(block, repaired, arguments).to(self.home)

    def tokens(self) -> int:
        """All tokens, padding included."""
        return sum(weights.numel() for weights in self.weights)

    def nbytes(self) -> int:
        """Memory between two blocks; hidden states that teacher and repaired model still share count twice."""
        others: dict[int, int] = {}
        recursively_apply(lambda t: others.update({t.data_ptr(): t.nbytes}), self.arguments)
        return sum(t.nbytes for t in (*self.taught, *self.repaired, *self.weights)) + sum(others.values())


@dataclass(frozen=True)
class Weighed:
    """Examples in batches, with the weights of their tokens.

    Attributes:
        batches: examples of similar length.
        weights, drawn: per batch, see :class:`Batch`.
    """

    batches: list[list[Example]]
    weights: list[Tensor]
    drawn: list[Tensor]

    def share(self, ranks: Ranks) -> Weighed:
        """The batches of one rank; there may be none."""
        return Weighed(ranks.own(self.batches), ranks.own(self.weights), ranks.own(self.drawn))


def weigh(data: Sequence[tuple[Sequence[Example], float]], config: NLSRConfig) -> list[Weighed]:
    """Batches of several kinds of data; each kind's weights add up to the number beside it.

    Args:
        config: ``decision_weight``, ``nlsr_batch_size``, ``max_tokens`` and ``nlsr_seed`` are read.
    """
    batches = [batches_of(examples, config.nlsr_batch_size) for examples, _ in data]
    weights = [_weights(found, total, config.decision_weight) for found, (_, total) in zip(batches, data, strict=True)]
    drawn = iter(draw_tokens([w for each in weights for w in each], config.max_tokens, config.nlsr_seed))
    return [Weighed(b, w, list(islice(drawn, len(w)))) for b, w in zip(batches, weights, strict=True)]


def _weights(batches: list[list[Example]], total: float, decision_weight: float) -> list[Tensor]:
    found = sum(weight_of(batch, decision_weight) for batch in batches)
    return [token_weights(batch, decision_weight) * (total / found) for batch in batches]


def weight_of(examples: Sequence[Example], decision_weight: float) -> float:
    """What the examples weigh before they are normalised."""
    return sum(float(token_weights([e], decision_weight).sum()) for e in examples)


def open_stream(
    adapter: LiveAdapter,
    modules: Sequence[nn.Module],
    weighed: Weighed,
    teacher: Factors,
    *,
    pad_id: int,
    offload: str,
    corrects: bool = False,
) -> Stream:
    """Bring the examples to the first block, in the teacher and in the fine-tuned model.

    Args:
        modules: the blocks.
        offload: ``always``, ``never`` or ``auto``, see ``NLSRConfig.offload``.
        corrects: see :class:`Stream`.
    """
    device = input_device(adapter.model)
    stream = Stream(teacher, device, device, corrects=corrects)
    stream.weights = [w.to(device) for w in weighed.weights]
    stream.drawn = [w.to(device) for w in weighed.drawn]
    for which, batch in enumerate(weighed.batches):
        tokens = collate(batch, pad_id, device)
        if which == 0:
            prove_chain(adapter.model, modules, tokens)
        seen = capture(adapter.model, modules, tokens)
        if which == 0:
            needed = 2 * seen.hidden.nbytes / len(batch) * sum(map(len, weighed.batches))
            stream.home = torch.device("cpu") if _goes_home(offload, device, needed) else device
        with as_teacher(adapter, teacher):
            taught = capture(adapter.model, modules[:1], tokens).hidden
        stream.arguments.append(_moved_once(seen.arguments, stream.home))
        stream.repaired.append(seen.hidden.to(stream.home))
        stream.taught.append(taught.to(stream.home))
    return stream


def _goes_home(offload: str, device: torch.device, needed: float) -> bool:
    if offload != "auto" or device.type != "cuda":
        return offload == "always"
    return needed > DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]


def _moved_once(arguments: list[Any], home: torch.device) -> list[Any]:
    """The arguments of all blocks on a device; a tensor that blocks share stays shared."""
    moved: dict[int, Tensor] = {}

    def move(tensor: Tensor) -> Tensor:
        return moved.setdefault(id(tensor), tensor.to(home))

    moved_arguments: list[Any] = recursively_apply(move, arguments)
    return moved_arguments


def draw_tokens(weights: Sequence[Tensor], most: int, seed: int) -> list[Tensor]:
    """Weights of at most ``most`` tokens, zero for the others, whose weighted sums are right on average.

    Systematic sampling: a token of weight ``w`` is kept with probability ``p = min(1, c w)``, and then weighs
    ``w / p``. So heavy tokens are all kept, and the kept ones are spread evenly over the data.
    """
    flat = torch.cat([w.flatten() for w in weights]).double().cpu()
    if int((flat > 0.0).sum()) <= most:
        return list(weights)
    chance = _chances(flat, most)
    offset = torch.rand((), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    steps = torch.floor(chance.cumsum(0) + offset)
    kept = steps > torch.cat([torch.zeros(1), steps[:-1]])
    drawn = torch.where(kept, flat / chance.clamp_min(1e-300), 0.0)
    parts = drawn.split([w.numel() for w in weights])
    return [part.view_as(w).to(w) for part, w in zip(parts, weights, strict=True)]


def _chances(weights: Tensor, most: int) -> Tensor:
    """``min(1, c w)`` with the ``c`` for which they add up to ``most``."""
    certain = torch.zeros(len(weights), dtype=torch.bool)
    while True:
        left = most - int(certain.sum())
        chance = torch.where(certain, 1.0, weights * (left / float(weights[~certain].sum())))
        if not bool((chance > 1.0).any()):
            return chance
        certain = certain | (chance >= 1.0)
