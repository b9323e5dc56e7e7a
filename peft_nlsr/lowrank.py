"""Algebra of low-rank updates ``dW = scale * B @ A`` without ever forming a ``(d_out, d_in)`` matrix.

Everything is computed in float32 or better; results are new tensors, the operands are never changed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


@dataclass(frozen=True)
class LowRank:
    """An update ``dW = scale * B @ A`` of one module.

    Attributes:
        A: ``(rank, d_in)``, PEFT's ``lora_A`` weight.
        B: ``(d_out, rank)``, PEFT's ``lora_B`` weight.
        scale: PEFT's scaling, ``lora_alpha / r`` (``/ sqrt(r)`` with rsLoRA).
    """

    A: Tensor
    B: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.A.ndim != 2 or self.B.ndim != 2 or self.A.shape[0] != self.B.shape[1]:
            raise ValueError(
                f"LowRank needs A (rank, d_in) and B (d_out, rank), got {tuple(self.A.shape)} and "
                f"{tuple(self.B.shape)}"
            )

    @property
    def rank(self) -> int:
        """Number of rows of A."""
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """``(d_out, d_in)`` of the update."""
        return self.B.shape[0], self.A.shape[1]

    def dense(self) -> Tensor:
        """The full update ``(d_out, d_in)`` in float32 or better. For inspection and tests of small modules."""
        return self.scale * (_wide(self.B) @ _wide(self.A))

    def inner(self, other: LowRank) -> float:
        """Frobenius inner product of two updates of the same shape, from ``rank x rank`` products."""
        _same_shape(self, other)
        left = _wide(self.B).T @ _wide(other.B)
        right = _wide(self.A) @ _wide(other.A).T
        return self.scale * other.scale * float((left.double() * right.double()).sum())

    def norm(self) -> float:
        """Frobenius norm of the update."""
        return math.sqrt(max(self.inner(self), 0.0))

    def cosine(self, other: LowRank) -> float:
        """Cosine between two updates; 0.0 when either of them is zero."""
        norms = self.norm() * other.norm()
        return max(-1.0, min(1.0, self.inner(other) / norms)) if norms > 0.0 else 0.0

    def times(self, factor: float) -> LowRank:
        """The update multiplied by ``factor``, carried by the scale."""
        return LowRank(self.A, self.B, self.scale * factor)

    def at_scale(self, scale: float) -> LowRank:
        """The same update written with another ``scale``; the ratio is spread evenly over both factors."""
        if scale == self.scale:
            return self
        if scale == 0.0 or self.scale == 0.0:
            raise ValueError(f"an update cannot be rewritten from scale {self.scale} to scale {scale}")
        ratio = self.scale / scale
        root = math.sqrt(abs(ratio))
        return LowRank(_wide(self.A) * root, _wide(self.B) * math.copysign(root, ratio), scale)

    def truncate(self, rank: int, *, seen_gram: Tensor | None = None) -> tuple[LowRank, float]:
        """The best update of at most ``rank`` directions, zero-padded to exactly ``rank``, and its relative error.

        Args:
            rank: rank of the result, at least 1; a larger rank than this update's own pads with zeros.
            seen_gram: optional ``A C A^T (own rank, own rank)`` for inputs of second moment ``C``; the error is then
                measured as ``|D C^(1/2)|``, on those inputs instead of in weight space.

        Returns:
            The truncated update at this update's scale with balanced factors, and ``|D - D_r| / |D|``.

        Exact: SVD of a core of the size of the factors' rank, left by their QR (or by ``seen_gram``), never of ``dW``.
        Only the triangles of the QR are made: the singular directions are sums of the factors' own rows and columns.
        """
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        A, B = _wide(self.A), _wide(self.B)
        r_out = torch.linalg.qr(B, mode="r").R
        root = torch.linalg.qr(A.T, mode="r").R.T if seen_gram is None else _gram_root(seen_gram).to(A.dtype)
        left, values, right = torch.linalg.svd(r_out.to(root.dtype) @ root, full_matrices=False)
        # Directions at rounding level are dropped: balancing would divide by their vanishing size.
        noise = values.max() * len(values) * torch.finfo(values.dtype).eps
        kept = min(rank, int((values > noise).sum()))
        half = values[:kept].sqrt()
        new_b = B @ (root @ (right[:kept].T / half)).to(B.dtype)
        new_a = ((left[:, :kept] / half).T.to(B.dtype) @ r_out) @ A
        return LowRank(_pad_rows(new_a, rank), _pad_rows(new_b.T, rank).T, self.scale), _relative_tail(values, kept)


def add(terms: Sequence[LowRank]) -> LowRank:
    """The exact sum of updates of one shape: factors concatenated, ranks added, scale 1.

    Each term's scale is spread over its two factors, so the result is balanced (NLSR, arXiv 2412.12497, eq. 2 and 12
    are sums of this kind). Never a factor-wise combination, which would add cross terms.
    """
    if not terms:
        raise ValueError("add needs at least one update")
    for term in terms[1:]:
        _same_shape(terms[0], term)
    at_one = [term.at_scale(1.0) if term.scale != 0.0 else zero_like(term) for term in terms]
    return LowRank(torch.cat([_wide(t.A) for t in at_one]), torch.cat([_wide(t.B) for t in at_one], dim=1))


def zero_like(update: LowRank) -> LowRank:
    """The zero update with the geometry of ``update``."""
    return LowRank(torch.zeros_like(update.A), torch.zeros_like(update.B), 1.0)


def fingerprint(adapter: Mapping[str, LowRank]) -> str:
    """SHA-256 over names, dtypes, shapes, scales and bytes of all factors; a live adapter has its file's."""
    digest = hashlib.sha256()
    for name in sorted(adapter):
        update = adapter[name]
        for factor, tensor in (("A", update.A), ("B", update.B)):
            digest.update(f"{name}.{factor}:{tensor.dtype}:{tuple(tensor.shape)}:{update.scale!r};".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _same_shape(one: LowRank, other: LowRank) -> None:
    if one.shape != other.shape:
        raise ValueError(f"updates of different shape cannot be combined: {one.shape} and {other.shape}")


def _gram_root(gram: Tensor) -> Tensor:
    """``L`` with ``L L^T = gram`` in float64; directions that rounding made negative count as unseen."""
    values, vectors = torch.linalg.eigh(gram.double())
    return vectors * values.clamp_min(0.0).sqrt()


def _pad_rows(tensor: Tensor, rows: int) -> Tensor:
    missing = rows - tensor.shape[0]
    return tensor if missing == 0 else torch.cat([tensor, tensor.new_zeros(missing, tensor.shape[1])])


def _relative_tail(values: Tensor, kept: int) -> float:
    total = float(values.double().square().sum())
    return math.sqrt(float(values[kept:].double().square().sum()) / total) if total > 0.0 else 0.0
