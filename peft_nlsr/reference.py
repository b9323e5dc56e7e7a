"""Safety references: where the safe behaviour comes from, as low-rank updates of the base model."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .adapter_folder import open_adapter
from .adapters import Adapter
from .config import NLSRConfig
from .errors import IncompatibleError
from .lowrank import LowRank, add

LEAST_RELATED = 0.5  # cosine of the factors of a module, below which its entries mean something else
_MOST_UNRELATED = 0.1  # share of such modules in an adapter that was trained from the reference


@dataclass(frozen=True)
class Reference:
    """A safety reference.

    Attributes:
        kind: ``adapter``, ``extrapolated``, ``starting_point`` or ``base``.
        updates: module -> update of the safe model; None for the base model itself (``dW_e = 0``).
        description: one sentence for log and report.
        base_model: the base it belongs to, when known.
    """

    kind: str
    updates: Mapping[str, LowRank] | None
    description: str
    base_model: str | None = None


BASE_REFERENCE = Reference("base", None, "the base model itself, which is taken to be aligned")


def open_updates(source: Any) -> Mapping[str, LowRank] | None:
    """The updates of a folder or Hub id; a mapping of updates, or None, as it is."""
    return source if source is None or isinstance(source, Mapping) else open_adapter(source)


def base_of(updates: Mapping[str, LowRank] | None) -> str | None:
    """The base model that an adapter says it was trained on; None for a mapping that says none."""
    return updates.info.base_model if isinstance(updates, Adapter) else None


def read_reference(source: Any, adapter: Mapping[str, LowRank]) -> Reference:
    """A reference from what a caller passed: None (the base model), a Reference, an adapter folder, Hub id or mapping.

    Raises:
        IncompatibleError: it belongs to another base model, or has other modules or shapes than the adapter.
    """
    if source is None:
        return BASE_REFERENCE
    if not isinstance(source, Reference):
        updates = open_updates(source)
        source = Reference("adapter", updates, "the given reference adapter", base_of(updates))
    theirs, ours = source.base_model, base_of(adapter)
    if theirs and ours and theirs != ours:
        raise IncompatibleError(
            f"the reference was trained on {theirs}, the adapter on {ours}; give a reference for the same base model"
        )
    if source.updates is not None:
        require_same_modules(adapter, source.updates)
    return source


def require_same_modules(adapter: Mapping[str, LowRank], reference: Mapping[str, LowRank]) -> None:
    """Raise IncompatibleError unless the reference has an update of the same shape for each module of the adapter."""
    missing = sorted(set(adapter) ^ set(reference))
    if missing:
        where = "reference" if missing[0] in adapter else "adapter"
        raise IncompatibleError(
            f"adapter and reference cover different modules: {len(missing)} differ, first {missing[0]}, which the "
            f"{where} lacks; give a reference with the same target modules"
        )
    require_same_shapes(adapter, reference)


def require_same_shapes(adapter: Mapping[str, LowRank], reference: Mapping[str, LowRank]) -> None:
    """Raise IncompatibleError unless the reference's update of each module of the adapter has the same shape."""
    for name, update in adapter.items():
        if reference[name].shape != update.shape:
            raise IncompatibleError(
                f"the reference's update of {name} has shape {reference[name].shape}, the adapter's {update.shape}; "
                "they belong to different base models"
            )


def starting_point(adapter: Mapping[str, LowRank]) -> Reference:
    """The adapter as it is now, as the reference of what it will become; the base model while its update is zero."""
    updates = {name: LowRank(u.A.detach().clone(), u.B.detach().clone(), u.scale) for name, u in adapter.items()}
    if not any(bool(u.B.any()) for u in updates.values()):
        return BASE_REFERENCE
    return Reference("starting_point", updates, "the adapter that fine-tuning started from", base_of(adapter))


def extrapolate(
    strong: Mapping[str, LowRank],
    weak: Mapping[str, LowRank] | None = None,
    *,
    beta: float = 0.9,
    form: str = "exact",
) -> tuple[dict[str, LowRank], dict[str, float]]:
    """Pre-amplification ``dW_e = (1 + beta) dW_a - beta dW_0`` (NLSR, arXiv 2412.12497, eq. 2) and its error per
    module.

    Without a weak adapter (merged, or none) it is exact at the strong adapter's rank. With one, the exact sum of
    ranks is truncated to the strong adapter's rank, and its factors are turned as close as possible to the strong
    adapter's, so that entry-wise masks keep their meaning.

    Args:
        strong: the aligned adapter ``a``.
        weak: the adapter ``0`` before preference alignment; a module that it lacks counts as zero.
        beta: strength; 0 returns the strong adapter.
        form: ``exact``, or ``released``: A and B both multiplied by ``2 beta`` and the weak adapter ignored.

    Returns:
        Module -> reference at the strong adapter's scale, and module -> relative truncation error.

    Differs from the release, which scales both factors and never reads the weak adapter (``form="released"``).
    """
    if form == "released":
        return {n: LowRank(u.A * 2 * beta, u.B * 2 * beta, u.scale) for n, u in strong.items()}, dict.fromkeys(
            strong, 0.0
        )
    extra = sorted(set(weak or {}) - set(strong))
    if extra:
        raise IncompatibleError(
            f"the weak adapter updates {len(extra)} modules that the strong one lacks, first {extra[0]}; give a pair "
            "with the same target modules"
        )
    found: dict[str, LowRank] = {}
    errors: dict[str, float] = {}
    for name, update in strong.items():
        amplified = update.times(1.0 + beta)
        if weak is None or name not in weak:
            found[name], errors[name] = amplified.at_scale(update.scale), 0.0
        else:
            total, errors[name] = add([amplified, weak[name].times(-beta)]).truncate(update.rank)
            found[name] = align_gauge(total.at_scale(update.scale), update)
    return found, errors


def align_gauge(update: LowRank, to: LowRank) -> LowRank:
    """The same update with factors ``(B R^-1, R A)`` whose A is closest to the one of ``to`` in least squares."""
    A, goal = update.A.double(), to.A.double()
    R = torch.linalg.lstsq(A.T, goal.T).solution.T
    if torch.linalg.matrix_rank(R) < len(R):
        return update
    return LowRank((R @ A).float(), torch.linalg.solve(R.T, update.B.double().T).T.float(), update.scale)


@dataclass(frozen=True)
class Lineage:
    """Whether an adapter was trained from a reference's factors, so that entries of both mean the same.

    One module that training moved far is no other lineage; a second repair after training on finds all those of the
    first unrelated, because the cut to the adapter's rank gave them new factors.

    Attributes:
        cosines: module -> :func:`factor_cosine`, of the modules that can be compared.
    """

    cosines: dict[str, float]

    @classmethod
    def of(cls, adapter: Mapping[str, LowRank], reference: Mapping[str, LowRank]) -> Lineage:
        """Module by module."""
        return cls.from_cosines({name: factor_cosine(update, reference[name]) for name, update in adapter.items()})

    @classmethod
    def from_cosines(cls, found: Mapping[str, float | None]) -> Lineage:
        """None takes no part."""
        return cls({name: cosine for name, cosine in found.items() if cosine is not None})

    @property
    def unrelated(self) -> tuple[str, ...]:
        """Modules whose cosine is below 0.5."""
        return tuple(name for name, cosine in self.cosines.items() if cosine < LEAST_RELATED)

    @property
    def shared(self) -> bool:
        """At most a tenth of the modules are unrelated, and at least one can be compared."""
        return bool(self.cosines) and len(self.unrelated) <= _MOST_UNRELATED * len(self.cosines)

    @property
    def similarity(self) -> float:
        """Median cosine: near 1 when one was trained from the other, else near 0."""
        return statistics.median(self.cosines.values() or [0.0])


def factor_cosine(adapter: LowRank, reference: LowRank) -> float | None:
    """Cosine between the A factors over the entries that the reference has (a patch keeps some of them).

    0 where the ranks differ, since entries cannot be compared then; None where the reference has no entries.
    """
    if adapter.A.shape != reference.A.shape:
        return 0.0
    theirs = reference.A.float()
    mine = torch.where(theirs == 0.0, 0.0, adapter.A.to(theirs))
    if not theirs.any():
        return None
    return float(torch.nn.functional.cosine_similarity(mine.flatten(), theirs.flatten(), dim=0))


def reference_for_masks(reference: Reference, weak: Mapping[str, LowRank] | None, config: NLSRConfig) -> Reference:
    """The pre-amplified reference that masks and patches are taken from.

    Raises:
        IncompatibleError: the reference is the base model, whose update is zero and has no entries to mask.
    """
    if reference.updates is None:
        raise IncompatibleError(
            "update='sum' and 'swap' take entries from a reference adapter, but the reference is the base model; pass "
            "reference=... or patch=..., or use update='least_squares'"
        )
    updates, errors = extrapolate(reference.updates, weak, beta=config.beta, form=config.extrapolation)
    worst = max(errors.values(), default=0.0)
    said = f"{reference.description}, amplified with beta {config.beta} ({config.extrapolation})"
    return Reference(
        "extrapolated",
        updates,
        said + (f", truncation error up to {worst:.3f}" if worst else ""),
        reference.base_model,
    )
