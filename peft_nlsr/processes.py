"""Processes that work together: what one computes is sent to all, and what one meets is raised by all.

Every function here is called by all ranks together; without a process group each does what it says on its own.
"""

from __future__ import annotations

import io
import itertools
import logging
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor

from .errors import PeftNLSRError

logger = logging.getLogger(__name__)

T = TypeVar("T")

_calls = itertools.count()


def on_every_rank(work: Callable[[], T]) -> T:
    """What ``work()`` returns on this rank; when it raises on any rank, every rank raises that error.

    For steps without collectives: a rank that failed alone would leave the others waiting for it.
    """
    attempt = Attempt()
    result = attempt.make(work)
    attempt.settle()
    return result  # type: ignore[return-value]  # None only where settle has raised


def rank() -> int:
    """This process's number; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def from_all_ranks(own: T) -> list[T]:
    """Every rank's object, in the order of ranks. For small objects; tensors must be on the CPU."""
    if world_size() == 1:
        return [own]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, own)
    return found


def summed(own: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """The sum of every rank's float64 tensor of this shape, on the CPU; None stands for zeros."""
    total = torch.zeros(shape, dtype=torch.float64) if own is None else own.detach().clone()
    if world_size() == 1:
        return total
    total = total.to(PartialState().device)
    dist.all_reduce(total)
    return total.cpu()


@dataclass
class Attempt:
    """Local steps between collectives: after a failure the others are left out, and the collectives go on."""

    error: BaseException | None = None

    def make(self, step: Callable[[], T]) -> T | None:
        if self.error is not None:
            return None
        try:
            return step()
        except BaseException as error:  # raised again by settle, on this rank and all others
            self.error = error
            return None

    def settle(self) -> None:
        """Raise, on every rank, the first error that any rank has met."""
        met = met_by_any(self.error)
        if met is not None:
            raise met


def met_by_any(own: BaseException | None) -> BaseException | None:
    """This rank's error, else the first that another rank has met, which is logged; None where no rank met one."""
    errors = from_all_ranks(None if own is None else _portable(own))
    if own is not None:
        return own
    number, met = next(((i, error) for i, error in enumerate(errors) if error is not None), (0, None))
    if met is not None:
        logger.error("stopped, because rank %d raised %s", number, type(met).__name__)
    return met


def _portable(error: BaseException) -> BaseException:
    """The error itself when it survives pickling, else one with its name and message."""
    try:
        again = pickle.loads(pickle.dumps(error))
        if type(again) is type(error) and str(again) == str(error):
            return error
    except Exception as problem:  # an exception's class may do anything when it is built
        logger.debug("%s cannot be sent to other ranks: %s", type(error).__name__, problem)
    return PeftNLSRError(f"{type(error).__name__}: {error}")


def computed_by_rank_zero(work: Callable[[], T]) -> T:
    """The result of ``work`` on rank 0, or its error, on every rank."""
    if world_size() == 1:
        with _without_zero3():
            return work()
    attempt = Attempt()
    packed = None
    with others_waiting():
        if rank() == 0:
            with _without_zero3():
                packed = attempt.make(lambda: Packed.of(work()))
    attempt.settle()
    return received(packed)


@contextmanager
def _without_zero3() -> Iterator[None]:
    """Let transformers generate and load as without ZeRO-3: both would wait for ranks that do not take part."""
    from transformers.integrations import deepspeed as integration

    active = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = active


@contextmanager
def others_waiting() -> Iterator[None]:
    """Rank 0 passes through; the others leave once rank 0 has left.

    They ask the process group's store, because a collective that waits for long work is killed by the timeout.
    """
    store, key = dist.distributed_c10d._get_default_store(), f"peft_nlsr/done/{next(_calls)}"
    try:
        yield
    finally:
        if rank() == 0:
            store.set(key, "1")
    pause = 0.001
    while not store.check([key]):
        time.sleep(pause)
        pause = min(2 * pause, 0.05)


@dataclass(frozen=True)
class Packed:
    """A picklable value with its tensors taken out, so that they can be sent one by one and end up on the CPU."""

    frame: bytes
    tensors: tuple[Tensor, ...]

    @classmethod
    def of(cls, value: Any) -> Packed:
        file = io.BytesIO()
        pickler = _Pickler(file)
        pickler.dump(value)
        return cls(file.getvalue(), tuple(tensor.detach().cpu().contiguous() for tensor in pickler.tensors.values()))

    def open(self) -> Any:
        return _Unpickler(io.BytesIO(self.frame), self.tensors).load()


class _Pickler(pickle.Pickler):
    """Writes the number of a tensor in place of the tensor."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: dict[int, Tensor] = {}
        self._numbers: dict[int, int] = {}

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, Tensor):
            return None
        self.tensors.setdefault(id(value), value)
        return self._numbers.setdefault(id(value), len(self._numbers))


class _Unpickler(pickle.Unpickler):
    """Puts the tensors back."""

    def __init__(self, file: io.BytesIO, tensors: Sequence[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, number: int) -> Tensor:
        return self._tensors[number]


def received(packed: Packed | None) -> Any:
    """Rank 0's packed value, opened on every rank."""
    plan: list[Any] = [None]
    if packed is not None:
        plan = [(packed.frame, [(tuple(t.shape), t.dtype) for t in packed.tensors])]
    dist.broadcast_object_list(plan, src=0)
    frame, specs = plan[0]
    device = PartialState().device
    tensors = []
    for number, (shape, dtype) in enumerate(specs):
        own = torch.empty(shape, dtype=dtype) if packed is None else packed.tensors[number]
        flat = own.reshape(-1).view(torch.uint8).to(device)
        if flat.numel():
            dist.broadcast(flat, src=0)
        tensors.append(flat.cpu().view(dtype).reshape(shape))
    return Packed(frame, tuple(tensors)).open()
