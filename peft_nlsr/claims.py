"""What may be said of saved weights, and the files that say it: record, report, undo and the card's section.

One rule: what a folder says about its weights is true. Whenever something is written beside weights, they are
compared with the realigned ones; where they differ, the claim is withdrawn.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from .adapter_folder import AdapterFolder
from .adapters import WEIGHTS_FILE, Adapter, at_rank, fit_factors
from .card import PICTURE_FILES, PICTURES, stale_card, update_card
from .config import CONFIG_NAME
from .errors import CorruptFileError, PeftNLSRError
from .eval_results import RESULTS_NAME, eval_results
from .files import read_json, read_text, write_json, write_text
from .hub import CARD_NAME
from .lowrank import LowRank, fingerprint
from .record import DIFF_NAME, Diff, Realignment, require_record, without_base, write_diff
from .report import REPORT_NAME, SafetyReport

logger = logging.getLogger(__name__)

# Beside the weights that they speak of; the card, which speaks of them too, may lie one folder up.
CLAIM_FILES = (CONFIG_NAME, REPORT_NAME, DIFF_NAME, RESULTS_NAME, *PICTURE_FILES)
_NARROW = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Claim:
    """What may be said of an adapter as long as its weights are the realigned ones.

    Attributes:
        config, record: the content of ``nlsr_config.json``.
        report: what was measured, when something was.
        originals: module -> update before the realignment: of all modules, or of those in a saved diff.
        updates: module -> new update, as in :class:`Realignment`; empty when the claim was read from files.
        folder: where it was read from.
    """

    config: dict[str, Any]
    record: dict[str, Any]
    report: SafetyReport | None
    originals: Mapping[str, LowRank]
    updates: Mapping[str, LowRank]
    folder: Path | None = None

    @classmethod
    def of(cls, done: Realignment, report: SafetyReport | None) -> Claim:
        """The claim of a finished realignment.

        Raises:
            ValueError: it is only planned, or the report speaks of other weights.
        """
        after = done.fingerprint_after
        if after is None:
            raise ValueError(
                "this realignment is only planned, so there is nothing to claim; apply(model, plan) first"
            )
        if report is not None and report.record.get("fingerprint_after") != after:
            raise ValueError(
                f"the report speaks of weights {report.record.get('fingerprint_after')}, the realignment made {after}"
                "; give the report of this realignment"
            )
        return cls(done.config.to_dict(), done.to_dict(), report, done.originals, done.updates)

    @classmethod
    def read(cls, folder: Path) -> Claim | None:
        """The claim that a folder makes, or None.

        Raises:
            CorruptFileError: one of its files cannot be read, is malformed or of a newer version.
        """
        content = read_json(folder / CONFIG_NAME) if (folder / CONFIG_NAME).is_file() else {}
        record = content.get("record")
        if not isinstance(record, dict) or not record.get("fingerprint_after"):
            return None
        require_record(record, folder / CONFIG_NAME)
        report = SafetyReport.load(folder) if (folder / REPORT_NAME).is_file() else None
        originals = dict(Diff(folder)) if (folder / DIFF_NAME).is_file() else {}
        return cls(dict(content.get("config") or {}), record, report, originals, {}, folder)

    def about(self, saved: Adapter) -> Claim | None:
        """The claim about these saved weights, or None when they are not the realigned ones.

        The same values in another dtype are the same weights (ZeRO-3 gathers 16 bits, PEFT loads 16 bits as 32); the
        fingerprints then become those of the saved form.
        """
        found = fingerprint(saved)
        if found == self.record["fingerprint_after"]:
            return self
        if not (self._narrowed(saved) or self._widened(saved)):
            return None
        before = {name: _like(self.originals.get(name, update), update) for name, update in saved.items()}
        record = {**self.record, "fingerprint_before": fingerprint(before), "fingerprint_after": found}
        report = None if self.report is None else replace(self.report, record=record)
        return replace(self, record=record, report=report)

    def covers(self, adapter: Adapter) -> bool:
        """Whether an adapter holds the realigned weights, in whatever dtype; also a narrower one, as far as the files
        that the claim was read from are still there to compare with."""
        if self.about(adapter) is not None:
            return True
        if self.folder is None or not (self.folder / WEIGHTS_FILE).is_file():
            return False
        recorded = AdapterFolder(self.folder)
        if set(recorded) != set(adapter) or fingerprint(recorded) != self.record["fingerprint_after"]:
            return False
        pairs = ((recorded[name], mine) for name, mine in adapter.items())
        return all(one.scale == mine.scale and _equal(_like(one, mine), mine) for one, mine in pairs)

    def _narrowed(self, saved: Adapter) -> bool:
        """Whether the file holds this realignment's own result, cast to the file's dtype."""
        if not self.updates or set(saved) != set(self.originals):
            return False
        try:
            return all(_equal(_like(self._result(name, mine), mine), mine) for name, mine in saved.items())
        except PeftNLSRError:
            return False

    def _result(self, name: str, geometry: LowRank) -> LowRank:
        original = self.originals[name]
        factors = fit_factors(
            name,
            self.updates.get(name, original),
            (geometry.rank, geometry.scale),
            (original.A.dtype, original.B.dtype),
            geometry.shape,
        )
        return LowRank(*factors, geometry.scale)

    def _widened(self, saved: Adapter) -> bool:
        """Whether the file holds the recorded weights, cast to a wider dtype, which loses nothing."""
        for dtype in _NARROW:
            if all(_equal(_like(_as(update, dtype), update), update) for update in saved.values()):
                narrow = {name: _as(update, dtype) for name, update in saved.items()}
                if fingerprint(narrow) == self.record["fingerprint_after"]:
                    return True
        return False


def _as(update: LowRank, dtype: torch.dtype) -> LowRank:
    return LowRank(update.A.to(dtype), update.B.to(dtype), update.scale)


def _like(update: LowRank, other: LowRank) -> LowRank:
    """The update with each factor in the dtype of the other's; one file may hold several dtypes."""
    return LowRank(update.A.to(other.A.dtype), update.B.to(other.B.dtype), update.scale)


def _equal(one: LowRank, other: LowRank) -> bool:
    return torch.equal(one.A, other.A) and torch.equal(one.B, other.B)


def write_claim(folder: Path, claim: Claim, readme: Path) -> bool:
    """Write ``nlsr_config.json``, the report when there is one with its results for the Hub, and the card's section.
    A card that cannot be understood is left as it is, with a warning; whether the card was written."""
    if claim.report is not None:
        claim.report.save(folder)
    else:
        (folder / REPORT_NAME).unlink(missing_ok=True)
    _write_results(folder, claim.report)
    write_json(folder / CONFIG_NAME, {"config": claim.config, "record": claim.record})
    return _write_card(folder, claim, readme)


def _write_results(folder: Path, report: SafetyReport | None) -> None:
    """Write or remove ``.eval_results/nlsr.yaml``; results that others wrote there stay."""
    path, text = folder / RESULTS_NAME, ""
    try:
        text = eval_results(report)
    except ImportError as error:
        logger.warning("%s was not written: %s; upgrade huggingface_hub", RESULTS_NAME, error)
    if text:
        write_text(path, text)
        return
    path.unlink(missing_ok=True)
    if path.parent.is_dir() and not any(path.parent.iterdir()):
        path.parent.rmdir()


def _write_card(folder: Path, claim: Claim, readme: Path) -> bool:
    report = claim.report or SafetyReport(claim.record, claim.config, None, None)
    plots = [name for name in PICTURES if readme.parent == folder and (folder / name).is_file()]
    base = claim.record["base_model"]
    try:
        text = update_card(read_text(readme), record=claim.record, report=report, base_model=base, plots=plots)
    except CorruptFileError as error:
        logger.warning("%s was left as it is, without the safety section: %s", readme, error)
        return False
    write_text(readme, text)
    return True


def settle(folder: Path, adapter_name: str, claim: Claim | None) -> None:
    """Make what a folder says true after something was saved there: the claim about its weights, or none.

    A missing weight file (a configuration saved first) is no error; there is no claim then.
    """
    said, problem = _true_claim(folder, claim)
    if said is not None:
        _write_saved_claim(folder, adapter_name, said)
        return
    withdrawn = _withdraw(folder, adapter_name)
    if problem and (claim is not None or withdrawn):
        logger.warning(
            "the safety record of adapter %r was not written to %s, and an earlier one was removed: %s; realign it "
            "again, and measure",
            adapter_name,
            folder,
            problem,
        )


def unclaimed(folder: Path, within: Path, there: Collection[str]) -> list[str]:
    """Of the files ``there``, in a repository, those that an earlier push claimed of the weights of ``folder`` and
    that this push does not bring: what they say is of other weights. Where the repository holds no
    ``nlsr_config.json`` beside these weights nothing was claimed, and files of these names are somebody's own.

    Paths, ``there`` too, are relative to ``within``, with ``/``.
    """
    home = folder.relative_to(within)
    if (home / CONFIG_NAME).as_posix() not in there:
        return []
    missing = [(home / name).as_posix() for name in CLAIM_FILES if not (folder / name).exists()]
    return [path for path in missing if path in there]


def withdraw_copied(folder: Path) -> None:
    """Take all claims out of the card of a folder that was copied beside other weights; record and report were not."""
    _withdraw_card(folder / CARD_NAME, None)


def settle_card(folder: Path, adapter_name: str, claim: Claim | None) -> None:
    """Like :func:`settle`, for the card only, after it was rewritten beside weights that stayed as they were."""
    said, _ = _true_claim(folder, claim)
    readme = readme_of(folder, adapter_name)
    if said is None:
        _withdraw_card(readme, adapter_name)
    else:
        _write_card(folder, said, readme)


def _true_claim(folder: Path, claim: Claim | None) -> tuple[Claim | None, str]:
    """The claim about the weights in a folder (by default the folder's own), or None and why there is none."""
    if not any((folder / name).is_file() for name in (WEIGHTS_FILE, "adapter_model.bin")):
        return None, ""
    try:
        claim = claim or Claim.read(folder)
        said = None if claim is None else claim.about(AdapterFolder(folder))
    except PeftNLSRError as error:
        return None, str(error)
    return said, "" if said else "its weights are not the realigned ones (was it trained on?)"


def _write_saved_claim(folder: Path, adapter_name: str, claim: Claim) -> None:
    write_claim(folder, claim, readme_of(folder, adapter_name))
    restored = {module["module"] for module in claim.record["modules"] if module["restored"]}
    if not restored <= set(claim.originals):
        (folder / DIFF_NAME).unlink(missing_ok=True)
        return
    saved = AdapterFolder(folder)
    grown = any(claim.originals[name].rank != saved[name].rank for name in claim.originals)
    metadata = {"adapter_config": _original_config(saved)} if grown else {}
    originals = {name: _like(update, saved[name]) for name, update in claim.originals.items()}
    write_diff(folder, originals, originals if grown else restored, metadata)


def _original_config(saved: AdapterFolder) -> str:
    """The configuration before the ranks were doubled."""
    return without_base(json.dumps(at_rank(saved.info.config, Fraction(1, 2)), indent=2, sort_keys=True))


def _withdraw(folder: Path, adapter_name: str) -> bool:
    """Remove what a folder claims about its weights; whether there was anything."""
    path = folder / CONFIG_NAME
    content = _readable(path)
    claimed = content is None or isinstance(content.get("record"), dict)
    if content is None:
        path.unlink()
    elif claimed:
        write_json(path, {key: value for key, value in content.items() if key != "record"})
    if claimed:
        for name in (REPORT_NAME, DIFF_NAME, *PICTURE_FILES):
            (folder / name).unlink(missing_ok=True)
        _write_results(folder, None)
    return _withdraw_card(readme_of(folder, adapter_name), adapter_name) or claimed


def _readable(path: Path) -> dict[str, Any] | None:
    """The content of a JSON file, empty without a file; None when it cannot be read."""
    try:
        return read_json(path) if path.is_file() else {}
    except CorruptFileError:
        return None


def _withdraw_card(readme: Path, adapter_name: str | None) -> bool:
    try:
        text = read_text(readme)
        if text is None:
            return False
        stale = stale_card(text, adapter_name=adapter_name)
    except CorruptFileError as error:
        logger.warning("%s may still claim that other weights are realigned: %s", readme, error)
        return False
    if stale != text:
        write_text(readme, stale)
    return stale != text


def readme_of(folder: Path, adapter_name: str) -> Path:
    """The card for an adapter: beside its weights, or one folder up, where PEFT writes it for named adapters."""
    above = folder.parent / CARD_NAME
    if adapter_name != "default" and folder.name == adapter_name and not (folder / CARD_NAME).exists():
        if "library_name: peft" in (read_text(above) or ""):
            return above
    return folder / CARD_NAME
