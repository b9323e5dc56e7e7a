"""What a realignment did: the record that travels with the adapter, and the diff that undoes it."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from .adapters import Adapter
from .config import NLSRConfig
from .errors import CorruptFileError
from .files import require_schema
from .lowrank import LowRank, fingerprint
from .selection import Decision
from .storage import Spec, TensorFile, write_tensors

SCHEMA_VERSION = 1
DIFF_NAME = "nlsr_diff.safetensors"
ON_INPUTS, OF_WEIGHTS = "on the calibration inputs", "of the weights"  # what a truncation error is measured by
_NULL = type(None)
_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("method", "reason", "preset", "adapter_name", "reference"), (str,)),
    **dict.fromkeys(("fingerprint_before", "fingerprint_after"), (str,)),
    "base_model": (str, _NULL),
    **dict.fromkeys(("modules", "notes"), (list,)),
    **dict.fromkeys(("data", "versions"), (dict,)),
}
_MODULE_KINDS: dict[str, tuple[type, ...]] = {
    "module": (str,),
    "restored": (bool,),
    "relative_change": (float, int, _NULL),
    "truncation_error": (float, int),
}
_SAID = {
    str: "text",
    list: "a list",
    dict: "an object",
    bool: "true or false",
    float: "a number",
    int: "a whole number",
    _NULL: "null",
}
_BASE_IN_CONFIG = re.compile(r'("base_model_name_or_path"\s*:\s*)("(?:[^"\\]|\\.)*"|null)')


@dataclass(frozen=True)
class ModuleRecord:
    """What happened to one module.

    Attributes:
        module: its name.
        restored: whether it was changed.
        similarity: cosine of safety-critical parts of reference and adapter; None where the method uses none.
        probability: chance of being restored, for random selections.
        relative_change: ``|dW'' - dW_t| / |dW_t|``, before the cast to the stored dtype; None when ``dW_t`` is zero.
        truncation_error: relative error of the cut to the adapter's rank, 0 when nothing was cut; in the norm that
            the realignment names.
        solver_error: measured relative error of an iterative solver on the calibration inputs, 0 for an exact one.
    """

    module: str
    restored: bool
    similarity: float | None
    probability: float | None
    relative_change: float | None
    truncation_error: float
    solver_error: float = 0.0

    @classmethod
    def of(
        cls, decision: Decision, before: LowRank, after: LowRank | None, errors: Mapping[str, float]
    ) -> ModuleRecord:
        """The record of a decision and its edit."""
        if after is None:
            return cls(decision.module, False, decision.similarity, decision.probability, 0.0, 0.0)
        size = before.norm()
        difference = math.sqrt(max(after.inner(after) - 2.0 * after.inner(before) + size**2, 0.0))
        change = difference / size if size > 0.0 else None
        error = errors.get(decision.module, 0.0)
        return cls(decision.module, True, decision.similarity, decision.probability, change, error)


@dataclass(frozen=True)
class Realignment:
    """A planned or applied realignment.

    Attributes:
        method: ``sum``, ``swap``, ``one_shot``, ``two_teacher``, ``fgsn``, ``safelora``, ``antidote`` or ``resta``.
        reason: why this method, one clause.
        config: the settings, preset included.
        base_model: Hub id of the base model; None when it is unknown or a local path.
        adapter_name: of the adapter on its model.
        reference: where the safe behaviour comes from.
        modules: one record per LoRA module.
        data: counts, sources and screened row indices, JSON values.
        notes: sentences that a user should read: what is not covered, what is doubtful.
        versions: of Python and the packages.
        fingerprint_before, fingerprint_after: SHA-256 of the adapter's factors; ``after`` is None while only planned.
        updates: module -> new update; not part of the JSON record.
        originals: module -> weights before, bit for bit; not part of the JSON record.
        truncation_norm: what ``truncation_error`` is measured by, ``ON_INPUTS`` or ``OF_WEIGHTS``; None where the
            method cuts nothing.
    """

    method: str
    reason: str
    config: NLSRConfig
    base_model: str | None
    adapter_name: str
    reference: str
    modules: tuple[ModuleRecord, ...]
    data: dict[str, Any]
    notes: tuple[str, ...]
    versions: dict[str, str]
    fingerprint_before: str
    fingerprint_after: str | None
    updates: dict[str, LowRank] = field(repr=False, compare=False)
    originals: dict[str, LowRank] = field(repr=False, compare=False)
    truncation_norm: str | None = None

    @property
    def restored(self) -> tuple[str, ...]:
        """Names of the modules that were changed."""
        return tuple(m.module for m in self.modules if m.restored)

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON values; tensors are left out."""
        plain = {k: getattr(self, k) for k in ("method", "reason", "base_model", "adapter_name", "reference", "data")}
        return {
            "schema_version": SCHEMA_VERSION,
            **plain,
            "preset": self.config.preset_label,
            "modules": [asdict(m) for m in self.modules],
            "truncation_norm": self.truncation_norm,
            "notes": list(self.notes),
            "versions": self.versions,
            "fingerprint_before": self.fingerprint_before,
            "fingerprint_after": self.fingerprint_after,
        }

    def summary(self) -> str:
        """A few lines for people: what was chosen, why, how much changed and what to know."""
        changes = [m.relative_change for m in self.modules if m.restored and m.relative_change is not None]
        lines = [
            f"{self.method} ({self.reason}); preset {self.config.preset_label}",
            f"reference: {self.reference}",
            f"{len(self.restored)} of {len(self.modules)} modules changed, median relative change "
            f"{statistics.median(changes) if changes else 0.0:.3f}",
        ]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def new_record(
    adapter: Adapter,
    *,
    method: str,
    reason: str,
    config: NLSRConfig,
    reference: str,
    modules: tuple[ModuleRecord, ...],
    data: dict[str, Any],
    notes: tuple[str, ...] = (),
    updates: Mapping[str, LowRank] | None = None,
    originals: Mapping[str, LowRank] | None = None,
    truncation_norm: str | None = None,
) -> Realignment:
    """A planned realignment of ``adapter`` as it is now, with a note on what it does not cover."""
    outside = adapter.info.outside
    if outside:
        notes += (
            f"{len(outside)} trained parameters outside LoRA's A and B are not realigned: {', '.join(outside[:4])}",
        )
    return Realignment(
        method=method,
        reason=reason,
        config=config,
        base_model=adapter.info.base_model,
        adapter_name=adapter.info.adapter_name,
        reference=reference,
        modules=modules,
        data=data,
        notes=notes,
        versions=versions(),
        fingerprint_before=fingerprint(adapter),
        fingerprint_after=None,
        updates=dict(updates or {}),
        originals=dict(originals or {}),
        truncation_norm=truncation_norm,
    )


def require_record(record: Mapping[str, Any], where: Path) -> None:
    """Raise CorruptFileError unless a finished record read from ``where`` has this version's schema and its parts."""
    require_schema(record, SCHEMA_VERSION, f"the record in {where}")
    wrong = [
        f"{place} is {'missing' if value is ... else repr(value)[:60]}, expected {_said(kinds)}"
        for place, value, kinds in _parts(record)
        if not isinstance(value, kinds)
    ]
    if wrong:
        raise CorruptFileError(
            f"the record in {where} is malformed in {len(wrong)} places: {'; '.join(wrong[:3])}. Realign the original "
            "adapter again, or download the file again"
        )


def _said(kinds: tuple[type, ...]) -> str:
    return " or ".join(_SAID[kind] for kind in kinds)


def _parts(record: Mapping[str, Any]) -> Iterator[tuple[str, Any, tuple[type, ...]]]:
    """Each part of a record that is read: its place, its value (``...`` where it is missing), its possible kinds."""
    for key, kinds in _KINDS.items():
        yield key, record.get(key, ...), kinds
    modules, notes, versions = (record.get(key) or () for key in ("modules", "notes", "versions"))
    for i, module in enumerate(modules if isinstance(modules, list) else ()):
        yield f"modules[{i}]", module, (dict,)
        for key, kinds in _MODULE_KINDS.items() if isinstance(module, dict) else ():
            yield f"modules[{i}].{key}", module.get(key, ...), kinds
    for i, note in enumerate(notes if isinstance(notes, list) else ()):
        yield f"notes[{i}]", note, (str,)
    yield "versions.peft_nlsr", versions.get("peft_nlsr", ...) if isinstance(versions, dict) else ..., (str,)


def write_diff(
    folder: Path, originals: Mapping[str, LowRank], modules: Iterable[str], metadata: Mapping[str, str]
) -> None:
    """Write ``nlsr_diff.safetensors``: the original factors and scales of some modules, one module in memory at a
    time, and what else the undo needs to know."""

    def original(key: str) -> torch.Tensor:
        name, _, factor = key.rpartition(".")
        return originals[name].A if factor == "A" else originals[name].B

    specs: dict[str, Spec] = {}
    scales: dict[str, float] = {}
    for name in modules:
        update = originals[name]
        scales[name] = update.scale
        for factor, tensor in (("A", update.A), ("B", update.B)):
            specs[f"{name}.{factor}"] = (tensor.dtype, tuple(tensor.shape))
    write_tensors(folder / DIFF_NAME, specs, original, {"scales": json.dumps(scales), **metadata})


def without_base(config: str) -> str:
    """The text of an ``adapter_config.json`` without the value that names the base model, which may be a path."""
    return _BASE_IN_CONFIG.sub(lambda found: found[1] + "null", config)


def with_base_of(config: str, other: str) -> str:
    """The text of :func:`without_base` with the base model that the other configuration names."""
    named = _BASE_IN_CONFIG.search(other)
    return config if named is None else _BASE_IN_CONFIG.sub(lambda found: found[1] + named[2], config)


class Diff(Mapping[str, LowRank]):
    """The original updates stored in a folder's ``nlsr_diff.safetensors``, each read when asked for.

    Raises:
        CorruptFileError: the file is no diff, or lacks a tensor.
    """

    def __init__(self, folder: Path) -> None:
        self._file = TensorFile(folder / DIFF_NAME)
        self.metadata = self._file.metadata
        path = self._file.path
        try:
            self._scales: dict[str, float] = dict(json.loads(self.metadata["scales"]))
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptFileError(f"{path} does not say what it holds; nothing was written") from error
        differ = sorted({f"{name}.{factor}" for name in self._scales for factor in "AB"} ^ set(self._file.names))
        if differ:
            raise CorruptFileError(f"{path} lacks, or should not hold, {', '.join(differ)}; nothing was written")

    def __getitem__(self, module: str) -> LowRank:
        return LowRank(self._file[f"{module}.A"], self._file[f"{module}.B"], self._scales[module])

    def __iter__(self) -> Iterator[str]:
        return iter(self._scales)

    def __len__(self) -> int:
        return len(self._scales)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter, for the record."""
    names = ("peft_nlsr", "torch", "transformers", "peft", "accelerate", "safetensors", "huggingface_hub")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name.replace("_", "-"))
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
