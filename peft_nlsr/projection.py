"""Projection of LoRA updates onto what alignment changed, on the output side and always factored.

``D`` is the aligned minus the unaligned model, per module, as a low-rank update. ``P = U diag(gains) U^T`` is
``d_out x d_out`` and acts on the outputs, so ``P (s B A) = s (P B) A``: only B changes. Used by FGSN and SafeLoRA.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .adapter_folder import AdapterFolder
from .adapters import Adapter
from .checkpoints import models_of
from .config import NLSRConfig
from .errors import IncompatibleError
from .lowrank import LowRank
from .reference import Reference, base_of, open_updates, require_same_shapes

HOW_TO_GET_ONE = (
    "pass reference=<a LoRA adapter that aligned this base model>, or extract one from the public aligned and "
    "unaligned checkpoints: peft-nlsr reference extract --aligned MODEL --base MODEL --rank 64 -o FOLDER"
)


@dataclass(frozen=True)
class Projection:
    """``P = U diag(gains) U^T``.

    Attributes:
        U: ``(d_out, k)`` orthonormal directions of D's outputs, float32 on the CPU.
        gains: ``(k,)`` what P multiplies each of them with; directions outside U become zero.
    """

    U: Tensor
    gains: Tensor

    def times(self, B: Tensor) -> Tensor:
        """``P B`` for ``B (d_out, r)``, in float32 on the CPU."""
        B = B.to(self.U)
        return (self.U * self.gains) @ (self.U.T @ B)


def projection_of(delta: LowRank, config: NLSRConfig) -> Projection | None:
    """The projection that ``config.normaliser`` makes of one module's D; None when D is zero.

    From D's singular values ``S`` and left vectors U, which QR of its factors gives, ``D D^T / c = U (S^2 / c) U^T``:

        orthogonal: gain 1 on the top directions that hold ``subspace_share`` of ``sum(S)``, a true projection
        spectral: ``c = |D|_2^2``, never enlarges
        frobenius: ``c = |D|_F`` (SafeLoRA, arXiv 2405.16833); depends on D's size
        literal: ``c`` is the number of D's entries (one reading of ``Dim`` in FGSN, arXiv 2508.09190, eq. 6), for
            which ``P B`` is zero for all practical purposes
    """
    U, S = _left_singular(delta)
    if len(S) == 0:
        return None
    return Projection(U, _GAINS[config.normaliser](S, delta, config).to(U))


def _left_singular(delta: LowRank) -> tuple[Tensor, Tensor]:
    """U ``(d_out, k)`` and S ``(k,)`` of the directions above rounding level."""
    left = torch.linalg.qr(delta.B.detach().cpu().double())
    right = torch.linalg.qr(delta.A.detach().cpu().double().T, mode="r").R
    turn, S, _ = torch.linalg.svd(delta.scale * (left.R @ right.T), full_matrices=False)
    kept = S > 1e-7 * S[0]
    return (left.Q @ turn[:, kept]).float(), S[kept]


def _orthogonal(S: Tensor, _: LowRank, config: NLSRConfig) -> Tensor:
    before = S.cumsum(0) - S
    return (before < config.subspace_share * S.sum()) | (torch.arange(len(S)) == 0)


_GAINS: dict[str, Callable[[Tensor, LowRank, NLSRConfig], Tensor]] = {
    "orthogonal": _orthogonal,
    "spectral": lambda S, delta, config: (S / S[0]) ** 2,
    "frobenius": lambda S, delta, config: S**2 / S.norm(),
    "literal": lambda S, delta, config: S**2 / (delta.shape[0] * delta.shape[1]),
}


def read_delta(source: Any, adapter: Adapter, method: str) -> Reference:
    """What alignment changed in the adapter's modules, from what a caller passed as reference.

    Args:
        source: a Reference, adapter folder, Hub id or mapping; one extracted from two checkpoints may cover more
            modules than the adapter, and goes with adapters of the aligned as well as of the unaligned model.
        adapter: the fine-tuned adapter.
        method: who asks, for the error text.

    Raises:
        IncompatibleError: there is none, or it belongs to another base model, or it lacks modules or has other shapes.
    """
    require_delta(source, method)
    if isinstance(source, Reference):
        reference, bases = source, {source.base_model}
    else:
        reference, bases = _opened(source)
    mine = adapter.info.base_model
    if mine is not None and None not in bases and mine not in bases:
        raise IncompatibleError(
            f"the reference says what alignment changed in {' and '.join(sorted(map(str, bases)))}, the adapter "
            f"belongs to {mine}; {HOW_TO_GET_ONE}"
        )
    assert reference.updates is not None
    _require_cover(adapter, reference.updates)
    return reference


def require_delta(source: Any, method: str) -> None:
    """Raise IncompatibleError when what a caller passed as reference is the base model, which says no difference."""
    if source is None or (isinstance(source, Reference) and source.updates is None):
        raise IncompatibleError(
            f"method={method!r} needs what alignment changed, but the reference is the base model; {HOW_TO_GET_ONE}"
        )


def _opened(source: Any) -> tuple[Reference, set[str | None]]:
    """The reference, and the base models whose adapters it goes with."""
    opened = open_updates(source)
    base = base_of(opened)
    models = models_of(opened) if isinstance(opened, AdapterFolder) else None
    if models is None:
        return Reference("adapter", opened, "the given reference adapter", base), {base}
    said = "the difference of an aligned and an unaligned checkpoint"
    return Reference("checkpoints", opened, said, base), set(models)


def _require_cover(adapter: Adapter, delta: Mapping[str, LowRank]) -> None:
    missing = [name for name in adapter if name not in delta]
    if missing:
        raise IncompatibleError(
            f"the reference lacks {len(missing)} of the adapter's {len(adapter)} modules, first {missing[0]}; "
            f"{HOW_TO_GET_ONE} --module all-linear"
        )
    require_same_shapes(adapter, delta)
