"""Checks that what a realigned adapter says of itself is true: record, diff, report and card against the weights.

Nothing is written and nothing is believed: fingerprints are computed again, and what the folder claims is compared
with what they give. Every check is in the result, those with nothing to check included.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard
from jinja2 import TemplateError

from .adapter_folder import AdapterFolder, download_adapter
from .adapters import CONFIG_FILE
from .card import PICTURES, stale_card, update_card
from .claims import Claim, readme_of
from .config import CONFIG_NAME, NLSRConfig
from .errors import CorruptFileError, PeftNLSRError
from .eval_results import RESULTS_NAME, eval_results
from .files import read_json, read_text
from .lowrank import fingerprint
from .record import DIFF_NAME, Diff, require_record, versions
from .report import REPORT_NAME, SafetyReport

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: ``weights``, ``record``, ``fingerprint``, ``modules``, ``diff``, ``report`` or ``card``.
        status: ``passed``, ``failed``, or ``absent`` when there is nothing to check.
        detail: what was found, one sentence.
    """

    name: str
    status: str
    detail: str


@dataclass(frozen=True)
class Verification:
    """The result of :func:`verify_folder`; ``verified`` when no check failed."""

    checks: tuple[Check, ...]

    @property
    def verified(self) -> bool:
        """Whether no check failed; one that could not be made does not count."""
        return all(check.status != "failed" for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        checks = [asdict(check) for check in self.checks]
        return {"schema_version": SCHEMA_VERSION, "verified": self.verified, "checks": checks}


def verify_folder(
    adapter: str | os.PathLike[str], *, adapter_name: str | None = None, revision: str | None = None
) -> Verification:
    """Check a realigned adapter: a folder, or the files of a Hub repository, which are downloaded.

    Args:
        adapter: folder or Hub id.
        adapter_name: a sub-folder, as PEFT saves named adapters; None is the folder itself.
        revision: of a Hub repository.

    Raises:
        PeftNLSRError: there is no adapter at all. Everything that is wrong with one is a failed check.
    """
    name = adapter_name or "default"
    home = _local(adapter, "" if name == "default" else name, revision)
    looked_at = _Folder(home, name)
    return Verification(tuple(_check(what, check, looked_at) for what, check in _CHECKS.items()))


def _local(adapter: str | os.PathLike[str], subfolder: str, revision: str | None) -> Path:
    """The folder with the adapter's files on this machine."""
    if Path(adapter).is_dir():
        if revision is not None:
            raise ValueError(f"revision {revision!r} only goes with a Hub id; a folder is what it is")
        home = Path(adapter) / subfolder
    else:
        home = download_adapter(str(adapter), subfolder, revision)
    if not (home / CONFIG_FILE).is_file():
        raise PeftNLSRError(f"{home} is no adapter: it has no {CONFIG_FILE}; give the folder that the adapter is in")
    return home


@dataclass(frozen=True)
class _Folder:
    """Where the files are, and the adapter's PEFT name."""

    home: Path
    adapter_name: str

    def weights(self) -> AdapterFolder:
        return AdapterFolder(self.home, adapter_name=self.adapter_name)

    def record(self) -> dict[str, Any] | None:
        """The record of the finished realignment, or None."""
        path = self.home / CONFIG_NAME
        record = read_json(path).get("record") if path.is_file() else None
        if not isinstance(record, dict) or not record.get("fingerprint_after"):
            return None
        require_record(record, path)
        return record

    def claim(self) -> Claim:
        """What the folder says, about its weights."""
        claim = Claim.read(self.home)
        said = None if claim is None else claim.about(self.weights())
        if said is None:
            raise CorruptFileError("there is no record that speaks of these weights, so this cannot be true")
        return said


# What values of the wrong kind raise, wherever they are met: in settings, in a report, in the data of a record.
_MALFORMED = (LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, TemplateError)
_Look = Callable[[_Folder], str | None]


def _check(name: str, look: _Look, folder: _Folder) -> Check:
    """What a look at a folder gives: a sentence, None where there is nothing to look at, or an error."""
    try:
        found = look(folder)
    except (PeftNLSRError, ValueError, OSError) as error:
        return Check(name, "failed", str(error))
    except _MALFORMED as error:
        return Check(name, "failed", f"malformed ({error!r})")
    return Check(name, "absent", "not there, nothing to check") if found is None else Check(name, "passed", found)


def _weights(folder: _Folder) -> str:
    read = sum(1 for _ in folder.weights().values())  # reading checks that all values are finite
    return f"{read} modules, all values finite"


def _record(folder: _Folder) -> str:
    record = folder.record()
    if record is None:
        raise PeftNLSRError(f"no record of a realignment in {CONFIG_NAME}; realign the adapter to get one")
    config = NLSRConfig.from_dict(read_json(folder.home / CONFIG_NAME)["config"])
    if config.preset != record["preset"].partition(",")[0]:  # its count of changes depends on the version
        raise CorruptFileError(f"the settings are of preset {config.preset}, the record says {record['preset']}")
    return f"realigned by {record['method']}, preset {record['preset']}"


def _fingerprint(folder: _Folder) -> str:
    record, found = folder.record(), fingerprint(folder.weights())
    if record is None:
        raise PeftNLSRError(f"the weights are {found[:12]}, and no record speaks of them")
    if found == record["fingerprint_after"]:
        return f"the weights are the realigned ones ({found[:12]})"
    claim = Claim.read(folder.home)
    if claim is None or claim.about(folder.weights()) is None:
        raise CorruptFileError(
            f"the weights are {found[:12]}, the record is of {record['fingerprint_after'][:12]}; they were changed "
            "after the realignment, realign them again"
        )
    return f"the weights are the realigned ones, in another dtype ({found[:12]})"


def _modules(folder: _Folder) -> str:
    record = folder.record()
    if record is None:
        raise PeftNLSRError("no record says which modules were changed")
    said, found = {module["module"] for module in record["modules"]}, set(folder.weights())
    if said != found:
        raise CorruptFileError(f"record and weights name different modules, first {min(said ^ found)}")
    restored = sum(bool(module["restored"]) for module in record["modules"])
    return f"{restored} of {len(found)} modules restored, as recorded"


def _diff(folder: _Folder) -> str | None:
    if not (folder.home / DIFF_NAME).is_file():
        return None
    record = folder.claim().record
    originals = dict(Diff(folder.home))
    restored = {module["module"] for module in record["modules"] if module["restored"]}
    if not restored <= set(originals):
        raise CorruptFileError(f"it lacks {len(restored - set(originals))} modules that were restored")
    found = fingerprint({**folder.weights(), **originals})
    if found != record["fingerprint_before"]:
        raise CorruptFileError(
            f"putting it back gives {found[:12]}, the original was {record['fingerprint_before'][:12]}; the adapter "
            "cannot be reverted from it"
        )
    return f"gives the original back, bit for bit ({found[:12]})"


def _report(folder: _Folder) -> str | None:
    results = read_text(folder.home / RESULTS_NAME)
    if not (folder.home / REPORT_NAME).is_file():
        if results is not None:
            raise CorruptFileError(f"there is none, but {RESULTS_NAME} holds results; remove it")
        return None
    report, record = SafetyReport.load(folder.home), folder.claim().record
    require_record(report.record, folder.home / REPORT_NAME)
    differ = [
        key for key in ("method", "fingerprint_before", "fingerprint_after") if report.record[key] != record[key]
    ]
    if differ:
        raise CorruptFileError(f"it is of another realignment: {', '.join(differ)} differ from the record")
    if results is not None and _parsed(results) != _parsed(eval_results(report)):
        raise CorruptFileError(f"{RESULTS_NAME} does not hold what it gives; save the adapter again, or remove it")
    measured = sum(evaluation is not None for evaluation in (report.before, report.after))
    return f"of these weights; {measured} of 2 evaluations (before, after) in it"


def _parsed(results: str) -> Any:
    try:
        return yaml.safe_load(results)
    except yaml.YAMLError as error:
        raise CorruptFileError(f"{RESULTS_NAME} is no YAML; remove it") from error


def _card(folder: _Folder) -> str | None:
    readme = readme_of(folder.home, folder.adapter_name)
    text = read_text(readme)
    if text is None or stale_card(text, adapter_name=folder.adapter_name) == text:
        return None
    claim = folder.claim()
    report = claim.report or SafetyReport(claim.record, claim.config, None, None)
    plots = [name for name in PICTURES if readme.parent == folder.home and (folder.home / name).is_file()]
    base = claim.record["base_model"]
    true = ModelCard(update_card(text, record=claim.record, report=report, base_model=base, plots=plots))
    found = ModelCard(text)
    differ = [
        part
        for part, same in {
            "safety section": _lines(found.text) == _lines(true.text),
            "YAML": _unordered(found.data.to_dict()) == _unordered(true.data.to_dict()),
        }.items()
        if not same
    ]
    if not differ:
        return "its safety section and YAML are those that record and report give"
    theirs, ours = claim.record["versions"].get("peft_nlsr"), versions()["peft_nlsr"]
    other = "" if theirs == ours else f", or was written by peft_nlsr {theirs} (this is {ours})"
    raise CorruptFileError(f"not what record and report give: its {' and its '.join(differ)} (edited{other})")


def _lines(text: str) -> list[str]:
    """The lines in one order: a card made from memory and one made from files list the same rows in different orders,
    because JSON files are sorted."""
    return sorted(_words(line) if line.startswith("Versions:") else line for line in text.splitlines())


def _words(line: str) -> str:
    return " ".join(sorted(re.findall(r"[^\s,]+(?<!\.)", line)))


def _unordered(values: Any) -> Any:
    """JSON values whose lists are sorted, for the same reason; the card's lists are tags and results."""
    if isinstance(values, dict):
        return {key: _unordered(value) for key, value in values.items()}
    return sorted(map(_unordered, values), key=repr) if isinstance(values, list) else values


_CHECKS: dict[str, _Look] = {
    "weights": _weights,
    "record": _record,
    "fingerprint": _fingerprint,
    "modules": _modules,
    "diff": _diff,
    "report": _report,
    "card": _card,
}
