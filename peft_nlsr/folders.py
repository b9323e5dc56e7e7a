"""Realignment of a saved adapter with a patch or a reference: no base model, no data, one module in memory at a time.

The input folder is never changed; the output folder appears complete or not at all.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from .adapter_folder import AdapterFolder, open_adapter
from .adapters import CONFIG_FILE
from .baselines import add_safety_vector
from .card import is_tag_of_path, parsed_card, stale_card
from .claims import Claim, write_claim
from .config import CONFIG_NAME, NLSRConfig
from .errors import CorruptFileError, PeftNLSRError
from .files import read_json, read_text, require_schema, write_text
from .hub import CARD_NAME, is_hub_id
from .lowrank import LowRank, fingerprint
from .nlsr import decide, restore, truncation_norm
from .patch import SafetyPatch
from .projection import read_delta
from .record import (
    DIFF_NAME,
    OF_WEIGHTS,
    SCHEMA_VERSION,
    Diff,
    ModuleRecord,
    Realignment,
    new_record,
    with_base_of,
    without_base,
    write_diff,
)
from .report import SafetyReport
from .safelora import decide_safelora, project
from .selection import Decision

logger = logging.getLogger(__name__)


def realign_folder(
    adapter: str | os.PathLike[str],
    output: str | os.PathLike[str] | None,
    *,
    patch: SafetyPatch | str | os.PathLike[str] | None = None,
    reference: Any = None,
    config: NLSRConfig | None = None,
    save_diff: bool = True,
) -> Realignment:
    """Realign an adapter folder (or Hub id) and write a new folder; the same tensors as on a live model.

    Beside the adapter the output holds ``nlsr_config.json`` (settings and record) and, with ``save_diff``,
    ``nlsr_diff.safetensors`` for :func:`revert_folder`.

    Args:
        adapter: folder or Hub id of the fine-tuned adapter; never changed.
        output: a new folder; None only plans (dry run) and writes nothing.
        patch: a SafetyPatch, its folder or Hub id; for ``method="nlsr"``.
        reference: what alignment changed: a Reference, adapter folder, Hub id or mapping; for ``safelora`` and
            ``resta``.
        config: settings; ``update="auto"`` means ``sum`` here.

    Raises:
        IncompatibleError, LineageError: adapter and patch or reference do not fit, or it is missing.
        CorruptFileError: truncated file, NaN or infinite values.
        FileExistsError: the output exists.
        PeftNLSRError: the adapter is realigned already.
    """
    source = open_adapter(os.fspath(adapter))
    assert isinstance(source, AdapterFolder)
    require_fresh(source)
    found = _plan(source, config or NLSRConfig(), patch, reference)
    edits = _Edits(source, found.edit, {d.module: d for d in found.decisions if d.restored})
    done = new_record(
        source,
        method=found.method,
        reason=found.reason,
        config=found.config,
        reference=found.reference,
        modules=(),
        data={},
        notes=found.notes,
        truncation_norm=found.truncation_norm,
    )
    if output is None:
        for module in edits:
            edits[module]
        return replace(done, modules=edits.all_records(found.decisions))
    return write_realigned(
        source, done, output, edits, modules=lambda: edits.all_records(found.decisions), save_diff=save_diff
    )


_Edit = Callable[[str, LowRank], tuple[LowRank, float]]


@dataclass(frozen=True)
class _Plan:
    """What is to be done with an adapter's files; ``edit(module, tuned)`` gives the update and its cut's error."""

    method: str
    reason: str
    config: NLSRConfig
    reference: str
    decisions: list[Decision]
    edit: _Edit
    notes: tuple[str, ...] = ()
    truncation_norm: str | None = None


def _plan(source: AdapterFolder, config: NLSRConfig, patch: Any, reference: Any) -> _Plan:
    if config.method in ("fgsn", "antidote"):
        raise PeftNLSRError(
            f"method={config.method!r} needs the base model's activations: load the adapter with "
            "PeftModel.from_pretrained and call nlsr_realign(model, config, ...); files alone are realigned with "
            "method='nlsr', 'safelora' or 'resta'"
        )
    given = patch if config.method == "nlsr" else reference
    other = reference if config.method == "nlsr" else patch
    if other is not None or (given is None and config.method == "nlsr"):
        raise ValueError("files are realigned with patch=... for method='nlsr', else with reference=..., and not both")
    return _plan_nlsr(source, config, given) if config.method == "nlsr" else _plan_delta(source, config, given)


def _plan_nlsr(source: AdapterFolder, config: NLSRConfig, patch: SafetyPatch | str | os.PathLike[str]) -> _Plan:
    opened = patch if isinstance(patch, SafetyPatch) else SafetyPatch.from_pretrained(patch)
    config = _file_config(config)
    opened.require_fit(source)
    decisions, notes = decide(source, opened, config)
    said = opened.record["reference"]["description"]

    def edit(module: str, tuned: LowRank) -> tuple[LowRank, float]:
        return restore(tuned, opened, module, config)

    norm = truncation_norm(opened, config)
    return _Plan(config.update, "a patch and adapter files", config, said, decisions, edit, notes, norm)


def _plan_delta(source: AdapterFolder, config: NLSRConfig, reference: Any) -> _Plan:
    found = read_delta(reference, source, config.method)
    assert found.updates is not None
    delta = found.updates
    if config.method == "safelora":
        decisions, notes = decide_safelora(source, delta, config)
    else:
        decisions, notes = [Decision(name, None, True) for name in source], ()

    def edit(module: str, tuned: LowRank) -> tuple[LowRank, float]:
        if config.method == "safelora":
            return project(tuned, delta[module], config), 0.0
        return add_safety_vector(module, tuned, delta[module], config)

    norm = OF_WEIGHTS if config.method == "resta" else None
    reason = "asked for by the configuration"
    return _Plan(config.method, reason, config, found.description, decisions, edit, notes, norm)


def _file_config(config: NLSRConfig) -> NLSRConfig:
    if config.update == "least_squares":
        raise PeftNLSRError(
            "update='least_squares' needs the base model: load the adapter with PeftModel.from_pretrained and call "
            "nlsr_realign(model); files alone are realigned with update='sum' or 'swap'"
        )
    return config.replace(update="sum") if config.update == "auto" else config


class _Edits(Mapping[str, LowRank]):
    """Restored updates, each computed when asked for; what was done is noted in ``records``."""

    def __init__(self, source: AdapterFolder, edit: _Edit, restored: Mapping[str, Decision]) -> None:
        self._source, self._edit, self._restored = source, edit, restored
        self.records: dict[str, ModuleRecord] = {}

    def __getitem__(self, module: str) -> LowRank:
        decision, tuned = self._restored[module], self._source[module]
        update, error = self._edit(module, tuned)
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


def write_realigned(
    source: AdapterFolder,
    planned: Realignment,
    output: str | os.PathLike[str],
    updates: Mapping[str, LowRank],
    *,
    originals: Mapping[str, LowRank] | None = None,
    modules: Callable[[], tuple[ModuleRecord, ...]] | None = None,
    report: SafetyReport | None = None,
    save_diff: bool = True,
) -> Realignment:
    """Write a new adapter folder with these updates, their record, report, card and undo, whole or not at all.

    Args:
        updates: module -> restored update; each is asked for once.
        originals: what the undo gives back; the adapter's own factors when None.
        modules: gives the records of all modules once every update was asked for; the planned ones when None.

    Raises:
        FileExistsError: the output exists.
    """
    grows = planned.method == "sum" and not planned.config.compress
    card_before = _card_to_give_back(source.path)  # first, because it may be a file that cannot be read
    finished: list[Realignment] = []

    def finish(folder: Path) -> None:
        records = planned.modules if modules is None else modules()
        done = replace(planned, modules=records, fingerprint_after=fingerprint(AdapterFolder(folder)))
        card_after = _write_record(folder, done, report)
        if save_diff:
            card = {} if card_before is None else {"card": card_before, "card_sha256": _sha256(card_after)}
            metadata = {**card, **(_config_of(source) if grows else {})}
            write_diff(folder, originals or source, list(source) if grows else list(updates), metadata)
        finished.append(done)

    source.save_as(output, updates, rank_multiple=2 if grows else 1, finish=finish)
    return finished[0]


def _card_to_give_back(folder: Path) -> str | None:
    """The card that the undo gives back, empty where there is none; None where it must not be kept: it speaks of an
    earlier realignment, or names a place of this machine."""
    before = read_text(folder / CARD_NAME) or ""
    return None if finished_record(folder) is not None or _names_a_path(before) else before


def _write_record(folder: Path, done: Realignment, report: SafetyReport | None) -> str:
    """Write settings, record, report and card; the new card."""
    readme = folder / CARD_NAME
    write_claim(folder, Claim.of(done, None if report is None else replace(report, record=done.to_dict())), readme)
    return read_text(readme) or ""


def _names_a_path(readme: str) -> bool:
    """Whether a card tells a place of this machine, which no file written here repeats; so may YAML that cannot be
    read."""
    try:
        data: Any = parsed_card(readme).data
    except CorruptFileError:
        return True
    bases = data.base_model if isinstance(data.base_model, list) else [data.base_model]
    return any(base and not is_hub_id(str(base)) for base in bases) or any(
        is_tag_of_path(tag) and not str(tag).endswith(":") for tag in data.tags or ()
    )


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _config_of(source: AdapterFolder) -> dict[str, str]:
    """The original configuration, for the undo of a grown adapter."""
    return {"adapter_config": without_base((source.path / CONFIG_FILE).read_bytes().decode())}


def _revert_card(folder: Path, metadata: Mapping[str, str]) -> None:
    """Give back the card of before, or take only the section out of one that was edited since."""
    readme = folder / CARD_NAME
    text = read_text(readme)
    if text is None:
        return
    if _sha256(text) != metadata.get("card_sha256"):
        try:
            write_text(readme, stale_card(text))
        except CorruptFileError as error:
            logger.warning("%s may still claim a realignment: %s", readme, error)
    elif metadata["card"]:
        write_text(readme, metadata["card"])
    else:
        readme.unlink()


def revert_folder(folder: str | os.PathLike[str], output: str | os.PathLike[str]) -> None:
    """Write the adapter as it was before its realignment, bit for bit, into a new folder.

    Raises:
        PeftNLSRError: the folder holds no realignment, no diff, or its weights changed afterwards.
    """
    realigned = AdapterFolder(folder)
    record = read_record(realigned.path)
    if fingerprint(realigned) != record["fingerprint_after"]:
        raise PeftNLSRError(
            f"the weights in {folder} are not those that were realigned, so the diff no longer fits them; nothing was "
            "written"
        )
    originals = Diff(realigned.path)
    config = originals.metadata.get("adapter_config")
    ranks = Fraction(1) if config is None else Fraction(1, 2)

    def finish(made: Path) -> None:
        if config is not None:
            present = (realigned.path / CONFIG_FILE).read_bytes().decode()
            (made / CONFIG_FILE).write_bytes(with_base_of(config, present).encode())
        _revert_card(made, originals.metadata)
        if fingerprint(AdapterFolder(made)) != record["fingerprint_before"]:
            raise CorruptFileError(f"{DIFF_NAME} does not give back the original adapter; nothing was written")

    realigned.save_as(output, originals, rank_multiple=ranks, finish=finish)


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a realigned folder that can be reverted; PeftNLSRError where something is missing."""
    for name in (CONFIG_NAME, DIFF_NAME):
        if not (folder / name).is_file():
            raise PeftNLSRError(f"{folder} cannot be reverted: it has no {name}; realign with save_diff to get one")
    record = finished_record(folder)
    if record is None:
        raise PeftNLSRError(f"{folder / CONFIG_NAME} holds no record of a realignment")
    return record


def finished_record(folder: Path) -> dict[str, Any] | None:
    """The record in a folder; None when nothing was realigned there.

    Raises:
        CorruptFileError: the file is no JSON, or the record is of a newer version.
    """
    path = folder / CONFIG_NAME
    record = read_json(path).get("record") if path.is_file() else None
    if not isinstance(record, dict) or not {"fingerprint_before", "fingerprint_after"} <= set(record):
        return None
    require_schema(record, SCHEMA_VERSION, f"the record in {path}")
    return record


def is_realigned(source: AdapterFolder) -> bool:
    """Whether the weights in a folder are those that its record says a realignment gave."""
    record = finished_record(source.path)
    return record is not None and record["fingerprint_after"] == fingerprint(source)


def require_fresh(source: AdapterFolder) -> None:
    """Raise PeftNLSRError for an adapter that is realigned already, and whose originals a second run would lose."""
    if is_realigned(source):
        raise PeftNLSRError(
            f"{source.path} is realigned already; write its original with revert_folder (peft-nlsr revert) and "
            "realign that in another way"
        )
