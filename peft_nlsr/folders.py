"""Realignment of a saved adapter with a safety patch: no base model, no data, one module in memory at a time.

The input folder is never changed; the output folder appears complete or not at all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from .adapters import CONFIG_FILE, AdapterFolder, open_adapter
from .config import CONFIG_NAME, NLSRConfig
from .errors import CorruptFileError, PeftNLSRError
from .lowrank import LowRank
from .nlsr import decide, restore
from .patch import SafetyPatch, read_json
from .record import ModuleRecord, Realignment, fingerprint, new_record
from .selection import Decision
from .storage import Spec, TensorFile, write_tensors

DIFF_NAME = "nlsr_diff.safetensors"


def realign_folder(
    adapter: str | os.PathLike[str],
    output: str | os.PathLike[str] | None,
    *,
    patch: SafetyPatch | str | os.PathLike[str],
    config: NLSRConfig | None = None,
    save_diff: bool = True,
) -> Realignment:
    """Realign an adapter folder (or Hub id) with a patch and write a new folder; the same tensors as on a live model.

    Beside the adapter the output holds ``nlsr_config.json`` (settings and record) and, with ``save_diff``,
    ``nlsr_diff.safetensors`` for :func:`revert_folder`.

    Args:
        adapter: folder or Hub id of the fine-tuned adapter; never changed.
        output: a new folder; None only plans (dry run) and writes nothing.
        patch: a SafetyPatch, its folder or Hub id.
        config: settings; ``update="auto"`` means ``sum`` here.

    Raises:
        IncompatibleError, LineageError: adapter and patch do not fit.
        CorruptFileError: truncated file, NaN or infinite values.
        FileExistsError: the output exists.
        PeftNLSRError: the adapter is realigned already.
    """
    source = open_adapter(os.fspath(adapter))
    assert isinstance(source, AdapterFolder)
    _require_fresh(source)
    patch = patch if isinstance(patch, SafetyPatch) else SafetyPatch.from_pretrained(patch)
    config = _file_config(config or NLSRConfig())
    patch.require_fit(source)
    decisions = decide(source, patch, config)
    edits = _Edits(source, patch, config, {d.module: d for d in decisions if d.restored})
    done = new_record(
        source,
        method=config.update,
        reason="a patch and adapter files",
        config=config,
        reference=patch.record["reference"]["description"],
        modules=(),
        data={},
    )
    if output is None:
        for module in edits:
            edits[module]
        return replace(done, modules=edits.all_records(decisions))
    return _write(source, Path(output), edits, decisions, done, save_diff)


def _file_config(config: NLSRConfig) -> NLSRConfig:
    if config.update == "least_squares":
        raise PeftNLSRError(
            "update='least_squares' needs the base model: load the adapter with PeftModel.from_pretrained and call "
            "nlsr_realign(model); files alone are realigned with update='sum' or 'swap'"
        )
    return config.replace(update="sum") if config.update == "auto" else config


class _Edits(Mapping[str, LowRank]):
    """Restored updates, each computed when asked for; what was done is noted in ``records``."""

    def __init__(
        self, source: AdapterFolder, patch: SafetyPatch, config: NLSRConfig, restored: Mapping[str, Decision]
    ) -> None:
        self._source, self._patch, self._config, self._restored = source, patch, config, restored
        self.records: dict[str, ModuleRecord] = {}

    def __getitem__(self, module: str) -> LowRank:
        decision, tuned = self._restored[module], self._source[module]
        update, error = restore(tuned, self._patch[module], self._config)
        self.records[module] = ModuleRecord.of(decision, tuned, update, {module: error})
        return update

    def all_records(self, decisions: list[Decision]) -> tuple[ModuleRecord, ...]:
        """Records of all modules, in the order of the decisions, once every restored one was computed."""
        return tuple(
            self.records.get(d.module) or ModuleRecord.of(d, self._source[d.module], None, {}) for d in decisions
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._restored)

    def __len__(self) -> int:
        return len(self._restored)


def _write(
    source: AdapterFolder,
    output: Path,
    edits: _Edits,
    decisions: list[Decision],
    done: Realignment,
    save_diff: bool,
) -> Realignment:
    grows = done.method == "sum" and not done.config.compress
    finished: list[Realignment] = []

    def finish(folder: Path) -> None:
        after = fingerprint(AdapterFolder(folder))
        result = replace(done, modules=edits.all_records(decisions), fingerprint_after=after)
        _write_record(folder, result)
        if save_diff:
            _write_diff(source, folder, list(source) if grows else list(edits), with_config=grows)
        finished.append(result)

    source.save_as(output, edits, rank_multiple=2 if grows else 1, finish=finish)
    return finished[0]


def _write_record(folder: Path, done: Realignment) -> None:
    content = {"config": done.config.to_dict(), "record": done.to_dict()}
    (folder / CONFIG_NAME).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", "utf-8")


def _write_diff(source: AdapterFolder, folder: Path, modules: list[str], *, with_config: bool) -> None:
    """The original factors and scales of the changed modules, and for a grown adapter its original configuration."""

    def original(key: str) -> torch.Tensor:
        name, _, factor = key.rpartition(".")
        return source[name].A if factor == "A" else source[name].B

    specs: dict[str, Spec] = {}
    scales: dict[str, float] = {}
    for name in modules:
        update = source[name]
        scales[name] = update.scale
        for factor, tensor in (("A", update.A), ("B", update.B)):
            specs[f"{name}.{factor}"] = (tensor.dtype, tuple(tensor.shape))
    metadata = {"scales": json.dumps(scales)}
    if with_config:
        metadata["adapter_config"] = (source.path / CONFIG_FILE).read_bytes().decode()
    write_tensors(folder / DIFF_NAME, specs, original, metadata)


class _Originals(Mapping[str, LowRank]):
    """The original updates stored in a diff, each read when asked for."""

    def __init__(self, file: TensorFile) -> None:
        self._file = file
        try:
            self._scales: dict[str, float] = dict(json.loads(file.metadata["scales"]))
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptFileError(f"{file.path} does not say what it holds; nothing was written") from error
        differ = sorted({f"{name}.{factor}" for name in self._scales for factor in "AB"} ^ set(file.names))
        if differ:
            raise CorruptFileError(f"{file.path} lacks, or should not hold, {', '.join(differ)}; nothing was written")

    def __getitem__(self, module: str) -> LowRank:
        return LowRank(self._file[f"{module}.A"], self._file[f"{module}.B"], self._scales[module])

    def __iter__(self) -> Iterator[str]:
        return iter(self._scales)

    def __len__(self) -> int:
        return len(self._scales)


def revert_folder(folder: str | os.PathLike[str], output: str | os.PathLike[str]) -> None:
    """Write the adapter as it was before its realignment, bit for bit, into a new folder.

    Raises:
        PeftNLSRError: the folder holds no realignment, no diff, or its weights changed afterwards.
    """
    realigned = AdapterFolder(folder)
    record = _read_record(realigned.path)
    if fingerprint(realigned) != record["fingerprint_after"]:
        raise PeftNLSRError(
            f"the weights in {folder} are not those that were realigned, so the diff no longer fits them; nothing was "
            "written"
        )
    diff = TensorFile(realigned.path / DIFF_NAME)
    originals = _Originals(diff)
    config = diff.metadata.get("adapter_config")
    ranks = Fraction(1) if config is None else Fraction(1, 2)

    def finish(made: Path) -> None:
        if config is not None:
            (made / CONFIG_FILE).write_bytes(config.encode())
        if fingerprint(AdapterFolder(made)) != record["fingerprint_before"]:
            raise CorruptFileError(f"{DIFF_NAME} does not give back the original adapter; nothing was written")

    realigned.save_as(output, originals, rank_multiple=ranks, finish=finish)


def _read_record(folder: Path) -> dict[str, Any]:
    for name in (CONFIG_NAME, DIFF_NAME):
        if not (folder / name).is_file():
            raise PeftNLSRError(f"{folder} cannot be reverted: it has no {name}; realign with save_diff to get one")
    record = _finished_record(folder)
    if record is None:
        raise PeftNLSRError(f"{folder / CONFIG_NAME} holds no record of a realignment")
    return record


def _finished_record(folder: Path) -> dict[str, Any] | None:
    if not (folder / CONFIG_NAME).is_file():
        return None
    record = read_json(folder / CONFIG_NAME).get("record")
    return record if isinstance(record, dict) and {"fingerprint_before", "fingerprint_after"} <= set(record) else None


def _require_fresh(source: AdapterFolder) -> None:
    record = _finished_record(source.path)
    if record is not None and record["fingerprint_after"] == fingerprint(source):
        raise PeftNLSRError(
            f"{source.path} is realigned already; write its original with revert_folder (peft-nlsr revert) and "
            "realign that in another way"
        )
