"""Ranks that share one piece of work: each takes its part of the data, and sums run over all of them.

A rank that fails tells the others at the next step that they take together, and all raise what it has met. So the
work between two such steps needs no word about errors. :data:`ALONE` is one process, where each method does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor

from .errors import IncompatibleError, PeftNLSRError
from .processes import Packed, from_all_ranks, met_by_any, others_waiting, rank, received, world_size

T = TypeVar("T")

_inside: ContextVar[bool] = ContextVar("_inside", default=False)


class _Elsewhere(BaseException):
    """Another rank's error on its way out of this rank's work, which is not to handle it."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error


@dataclass(frozen=True)
class Ranks:
    """The processes that share a piece of work; all methods but :meth:`own` are called by all of them, in one order.

    Attributes:
        number: this process, from 0.
        count: how many there are.
    """

    number: int = 0
    count: int = 1

    @classmethod
    def launched(cls) -> Ranks:
        """All processes of the launched job (``torchrun``, ``accelerate launch``), brought together where needed.

        Raises:
            PeftNLSRError: the job has several processes, but accelerate was told before that this one is alone.
        """
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if started > 1 and torch.accelerator.current_accelerator(check_available=True) is None:
            PartialState(cpu=True)  # without this word accelerate lets processes without an accelerator work alone
        else:
            PartialState()
        if started > 1 and world_size() == 1:
            raise PeftNLSRError(
                f"this process was started as one of {started}, but no process group joins them; make "
                "accelerate.PartialState(cpu=True) before anything else, or call torch.distributed.init_process_group"
            )
        return cls(rank(), world_size())

    @contextmanager
    def together(self) -> Iterator[None]:
        """Inside, what one rank raises is raised by all: at their next step together, or at the end.

        Inside another one it does nothing: only the outermost knows that all ranks have left.
        """
        if self.count == 1 or _inside.get():
            yield
            return
        before = _inside.set(True)
        try:
            yield
            self._meet()
        except _Elsewhere as told:
            raise told.error from None
        except BaseException as error:
            self._meet(error)
            raise
        finally:
            _inside.reset(before)

    def own(self, parts: Sequence[T]) -> list[T]:
        """This rank's share of parts that all ranks have in one order; rank 0's is never smaller than another's."""
        return list(parts[self.number :: self.count])

    def add_up(self, own: Tensor) -> Tensor:
        """The sum of every rank's tensor, made in float64 and put into ``own``; the same bits on every rank."""
        if self.count == 1:
            return own
        total = own.to(PartialState().device, torch.float64).contiguous()
        self._meet()
        dist.all_reduce(total)
        return own.copy_(total)

    def stacked(self, own: Tensor) -> tuple[Tensor, slice]:
        """Every rank's rows ``(n_i, ...)`` as one ``(sum n_i, ...)``, and where in it this rank's are."""
        counts = self.gather(len(own))
        begin = sum(counts[: self.number])
        place = slice(begin, begin + len(own))
        rows = own.new_zeros(sum(counts), *own.shape[1:])
        rows[place] = own
        return self.add_up(rows), place

    def of_first(self, own: Tensor) -> Tensor:
        """Rank 0's tensor in place of one that every rank has made: what decides the next step must not differ."""
        if self.count == 1:
            return own
        return self.add_up(own.clone() if self.number == 0 else torch.zeros_like(own))

    def gather(self, own: T) -> list[T]:
        """Every rank's object, in the order of ranks; small ones, tensors on the CPU."""
        if self.count == 1:
            return [own]
        self._meet()
        return from_all_ranks(own)

    def first(self, work: Callable[[], T]) -> T:
        """What ``work`` returns on rank 0, which alone does it; it may take longer than the group's timeout.

        Tensors come back on the CPU.
        """
        if self.count == 1:
            return work()
        packed = None
        self._meet()
        with others_waiting():
            if self.number == 0:
                packed = Packed.of(work())
        self._meet()
        found: T = received(packed)
        return found

    def require_same(self, own: Mapping[str, Any]) -> None:
        """Raise IncompatibleError, on every rank, where a value differs between ranks."""
        found = self.gather(dict(own))
        differ = sorted(key for key in own if any(other.get(key) != found[0][key] for other in found))
        if differ:
            raise IncompatibleError(
                f"the ranks differ in {', '.join(differ)}; give every rank the same model and arguments, or leave "
                "data_parallel out"
            )

    def _meet(self, error: BaseException | None = None) -> None:
        """Begins every step together: raises what another rank has met, or tells it what this one has."""
        failed = torch.tensor([error is not None], dtype=torch.float32, device=PartialState().device)
        dist.all_reduce(failed)
        if not bool(failed):
            return
        met = met_by_any(error)
        if error is None and met is not None:
            raise _Elsewhere(met)


ALONE = Ranks()
