"""The safety patch: per module, which entries of A and B are safety-critical and the reference's values there.

Built once per aligned adapter, applied to every adapter that was fine-tuned from it, without base model or data.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .adapters import Adapter
from .errors import CorruptFileError, IncompatibleError, PeftNLSRError
from .files import read_json, write_json
from .hub import push_folder, staging
from .lowrank import LowRank
from .scores import FactorPair, InputSketch
from .storage import Spec, TensorFile, require_finite, write_tensors

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

SCHEMA_VERSION = 1
TENSORS_NAME = "safety_patch.safetensors"
RECORD_NAME = "safety_patch.json"


@dataclass(frozen=True)
class ModulePatch:
    """The patch of one module.

    Attributes:
        masks: boolean ``(M_A (r, d_in), M_B (d_out, r))``, True on safety-critical entries.
        reference: the reference's factors in float32, zero outside the masks, at the reference's scale.
    """

    masks: FactorPair
    reference: LowRank


class SafetyPatch(Mapping[str, ModulePatch]):
    """Module -> :class:`ModulePatch`; one read from a folder loads one module at a time.

    ``record`` holds JSON values: schema_version, base_model, config, reference, statistics and per module its
    geometry. ``inputs`` holds, per module, what the reference saw of its inputs, by which the rank-2r sum is cut to
    rank r; it lacks the modules of patches that were built without calibration data.
    """

    def __init__(
        self,
        modules: Mapping[str, ModulePatch],
        record: Mapping[str, Any],
        inputs: Mapping[str, InputSketch] | None = None,
    ) -> None:
        self._modules = modules
        self.record = dict(record)
        self.inputs: Mapping[str, InputSketch] = {} if inputs is None else inputs

    def __getitem__(self, module: str) -> ModulePatch:
        return self._modules[module]

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    def require_fit(self, adapter: Adapter) -> None:
        """Raise IncompatibleError unless base model, modules, shapes and rank are those of the adapter."""
        theirs, ours = adapter.info.base_model, self.record.get("base_model")
        if theirs and ours and theirs != ours:
            raise IncompatibleError(
                f"the patch was built for base model {ours}, the adapter was trained on {theirs}; build a patch for "
                "that base"
            )
        lacking = sorted(set(adapter) - set(self))
        unknown = sorted(set(self) - set(adapter))
        if lacking or unknown:
            raise IncompatibleError(
                f"patch and adapter cover different modules: {len(lacking)} only in the adapter (first "
                f"{lacking[0] if lacking else '-'}), {len(unknown)} only in the patch (first "
                f"{unknown[0] if unknown else '-'}); build a patch from a reference with the same target modules"
            )
        for name in adapter:
            self._require_shape(name, adapter[name])

    def _require_shape(self, name: str, update: LowRank) -> None:
        geometry = self.record["modules"][name]
        if geometry["rank"] != update.rank:
            raise IncompatibleError(
                f"the patch was built for rank {geometry['rank']}, the adapter has rank {update.rank} in {name}; "
                f"build a patch from a reference of rank {update.rank}"
            )
        if tuple(geometry["shape"]) != update.shape:
            raise IncompatibleError(
                f"the patch expects an update of shape {tuple(geometry['shape'])} in {name}, the adapter has "
                f"{update.shape}; it belongs to another base model"
            )

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``safety_patch.safetensors`` (bit-packed masks, values) and ``safety_patch.json`` into a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / TENSORS_NAME, _specs(self.record["modules"]), self._packed)
        write_json(folder / RECORD_NAME, self.record)

    save_pretrained = save

    def _packed(self, key: str) -> Tensor:
        name, _, kind = key.rpartition(".")
        part, factor = kind.split("_")
        if part == "inputs":
            return getattr(self.inputs[name], factor)
        module = self[name]
        mask = module.masks[0 if factor == "A" else 1]
        if part == "mask":
            return torch.from_numpy(np.packbits(mask.numpy()))
        return (module.reference.A if factor == "A" else module.reference.B)[mask].float()

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> SafetyPatch:
        """Open a folder written by :meth:`save`; tensors are read when a module is asked for."""
        folder = Path(folder)
        for name in (RECORD_NAME, TENSORS_NAME):
            if not (folder / name).is_file():
                raise PeftNLSRError(f"{folder} is no safety patch: it has no {name}; build one with build_nlsr_patch")
        record = read_json(folder / RECORD_NAME)
        if record.get("schema_version") != SCHEMA_VERSION:
            raise CorruptFileError(
                f"{folder / RECORD_NAME} has schema {record.get('schema_version')}, this version reads "
                f"{SCHEMA_VERSION}; build the patch again, or use the version of peft_nlsr that wrote it"
            )
        file = TensorFile(folder / TENSORS_NAME)
        _require_described(file, record, folder)
        return cls(_StoredPatch(file, record["modules"]), record, _StoredInputs(file, record["modules"]))

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], *, revision: str | None = None) -> SafetyPatch:
        """Open a patch from a folder or, when no such folder exists, from a Hub repository."""
        if Path(source).is_dir():
            return cls.load(source)
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            files = [hf_hub_download(str(source), n, revision=revision) for n in (RECORD_NAME, TENSORS_NAME)]
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
            raise PeftNLSRError(f"no safety patch at {source!r}: no such folder, and from the Hub: {error}") from error
        return cls.load(Path(files[0]).parent)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
        token: str | None = None,
    ) -> CommitInfo:
        """Push both files of the patch in one commit; the arguments are those of :func:`peft_nlsr.hub.push_folder`.

        Raises:
            PushError: the Hub could not be reached, or refused; the saved patch stays in the folder that it names.
        """
        with staging() as folder:
            self.save(folder)
            return push_folder(
                folder,
                repo_id,
                private=private,
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message or "Upload safety patch",
                token=token,
            )


def _specs(modules: Mapping[str, Any]) -> dict[str, Spec]:
    """The tensors of a patch, from the geometry of its modules."""
    specs: dict[str, Spec] = {}
    for name, geometry in modules.items():
        (d_out, d_in), rank = geometry["shape"], geometry["rank"]
        for factor, size in (("A", rank * d_in), ("B", d_out * rank)):
            specs[f"{name}.mask_{factor}"] = (torch.uint8, (math.ceil(size / 8),))
            specs[f"{name}.values_{factor}"] = (torch.float32, (geometry[f"kept_{factor}"],))
        if geometry["inputs"]:
            specs[f"{name}.inputs_rows"] = (torch.bfloat16, (geometry["inputs"], d_in))
            specs[f"{name}.inputs_rest"] = (torch.float32, (d_in,))
    return specs


def _require_described(file: TensorFile, record: Mapping[str, Any], folder: Path) -> None:
    """Raise CorruptFileError unless the record describes a patch and the tensors are those it describes."""
    try:
        expected = _specs(record["modules"])
        complete = bool(record["reference"]["description"])
        scales = {name: geometry["scale"] for name, geometry in record["modules"].items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        expected, complete, scales = {}, False, {}
    if not complete:
        raise CorruptFileError(f"{folder / RECORD_NAME} does not describe a safety patch; build the patch again")
    for name, scale in scales.items():
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
            raise CorruptFileError(
                f"{folder / RECORD_NAME} gives {name} the scale {scale!r}, expected a finite number; build the patch "
                "again, or download it again"
            )
    found = {key: file.spec(key) for key in file}
    wrong = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
    if wrong:
        raise CorruptFileError(
            f"{TENSORS_NAME} and {RECORD_NAME} in {folder} do not belong together: {len(wrong)} tensors differ, first "
            f"{wrong[0]} (found {found.get(wrong[0])}, expected {expected.get(wrong[0])}); download both again"
        )


class _StoredPatch(Mapping[str, ModulePatch]):
    """Modules of a patch on disk, each read when asked for."""

    def __init__(self, file: TensorFile, geometry: Mapping[str, Any]) -> None:
        self._file = file
        self._geometry = geometry

    def __getitem__(self, module: str) -> ModulePatch:
        geometry = self._geometry[module]
        (d_out, d_in), rank = geometry["shape"], geometry["rank"]
        mask_a, A = self._factor(module, "A", (rank, d_in))
        mask_b, B = self._factor(module, "B", (d_out, rank))
        return ModulePatch((mask_a, mask_b), LowRank(A, B, geometry["scale"]))

    def _factor(self, module: str, factor: str, shape: tuple[int, int]) -> FactorPair:
        bits = np.unpackbits(self._file[f"{module}.mask_{factor}"].numpy(), count=shape[0] * shape[1])
        mask = torch.from_numpy(bits).bool().reshape(shape)
        values = self._file[f"{module}.values_{factor}"]
        require_finite(values, f"{factor} of {module} in the safety patch")
        if len(values) != int(mask.sum()):
            raise CorruptFileError(
                f"the patch of {module} marks {int(mask.sum())} entries of {factor} but stores {len(values)} values; "
                "download or build it again"
            )
        return mask, torch.zeros(shape).masked_scatter_(mask, values)

    def __iter__(self) -> Iterator[str]:
        return iter(self._geometry)

    def __len__(self) -> int:
        return len(self._geometry)


class _StoredInputs(Mapping[str, InputSketch]):
    """Input sketches of a patch on disk, each read when asked for."""

    def __init__(self, file: TensorFile, geometry: Mapping[str, Any]) -> None:
        self._file = file
        self._modules = [name for name, found in geometry.items() if found["inputs"]]

    def __getitem__(self, module: str) -> InputSketch:
        if module not in self._modules:
            raise KeyError(module)
        rows, rest = self._file[f"{module}.inputs_rows"], self._file[f"{module}.inputs_rest"]
        for tensor in (rows, rest):
            require_finite(tensor, f"the inputs of {module} in the safety patch")
        return InputSketch(rows, rest)

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)
