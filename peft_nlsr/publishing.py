"""Publishing a realigned adapter: weights, record, report and card go to the Hub together, and only if they agree.

What is pushed is a copy. In it no card and no configuration names a base model by a path of this machine, and nothing
claims a realignment that the weights do not have.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, ModelCard
from peft import PeftModel
from torch import nn

from .adapter_folder import AdapterFolder
from .adapters import CONFIG_FILE
from .card import parsed_card
from .claims import CLAIM_FILES, Claim, settle, unclaimed
from .config import CONFIG_NAME
from .errors import PeftNLSRError
from .files import read_json, read_text, write_text
from .hub import CARD_NAME, fetch, files_there, files_to_push, is_hub_id, push_folder, staging, stale_checkpoints
from .live_adapter import LiveAdapter
from .lowrank import fingerprint
from .report import REPORT_NAME

logger = logging.getLogger(__name__)

_BASE = "base_model_name_or_path"
_UNNAMED = "a base model that is not on the Hub"


def push_realigned(
    adapter: Any,
    repo_id: str,
    *,
    adapter_name: str | None = None,
    base_model: str | None = None,
    allow_unaligned: bool = False,
    keep_checkpoints: bool = False,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | None = None,
) -> CommitInfo:
    """Push a realigned adapter, saved or live, in one commit, after checking that its record speaks of its weights.

    The card gets its safety section, made from the record and the report beside it. A base model that is a path of
    this machine is replaced by ``base_model``, or else dropped with a warning, in ``adapter_config.json`` and card.
    Neither the folder nor the model is changed: a copy is pushed, which stays in the temporary folder that the error
    names when the push fails. Other adapters in a folder are pushed as they are, and named in a warning. What an
    earlier push said of other weights (report, pictures, diff) is deleted in the same commit.

    Args:
        adapter: a folder, or a model in memory (when it is sharded, save it with its trainer and push the folder).
        adapter_name: which adapter of a model, or which sub-folder; default the active one, or the folder itself.
        base_model: Hub id of the base model, to replace a path.
        allow_unaligned: push even if no record fits the weights; then the record, the report, the pictures and all
            that the card says of a realignment are left out.
        keep_checkpoints: keep the training checkpoints of earlier pushes, which hold weights from before the
            realignment; they are deleted in the same commit otherwise, and stay in the repository's history.
        private, revision, create_pr, commit_message, token: as in :func:`peft_nlsr.hub.push_folder`.

    Raises:
        PeftNLSRError: no record, or one of other weights.
        PushError: the Hub could not be reached, or refused.
        ValueError: ``base_model`` is no Hub id.
    """
    if base_model is not None and not is_hub_id(base_model):
        raise ValueError(f"base_model={base_model!r} must be the id of a model on the Hub, such as org/name")
    with staging() as folder:
        name = _copy(adapter, folder, adapter_name)
        home = folder if name == "default" else folder / name
        claim = _claim(home, base_model, allow_unaligned)
        _warn(folder, home, base_model)
        _hide_paths(folder, base_model)
        settle(home, name, claim)
        # From here on the folder is fit to be pushed, should the Hub be out of reach.
        if _take_card(adapter, name, folder, fetch(repo_id, CARD_NAME, revision=revision, token=token)):
            _hide_paths(folder, base_model)
            settle(home, name, claim)
        there = files_there(repo_id, revision=revision, token=token)
        stale = () if keep_checkpoints else stale_checkpoints(repo_id, revision, token)
        return push_folder(
            folder,
            repo_id,
            private=private,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message or ("Upload realigned adapter" if claim else "Upload adapter"),
            token=token,
            delete=[*unclaimed(home, folder, there), *stale],
        )


def _copy(adapter: Any, folder: Path, adapter_name: str | None) -> str:
    """Fill the folder from a model, saved as PEFT does, or from another folder; PEFT's name of the adapter."""
    if isinstance(adapter, nn.Module):
        live = LiveAdapter(adapter, adapter_name)
        only = {"selected_adapters": [live.info.adapter_name]} if isinstance(live.model, PeftModel) else {}
        live.model.save_pretrained(str(folder), **only)
        return live.info.adapter_name
    source = Path(os.fspath(adapter))
    for path in files_to_push(source):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / path, folder / path)
    return adapter_name or "default"


def _claim(home: Path, base_model: str | None, allow_unaligned: bool) -> Claim | None:
    """What may be said of the weights; None, when that is allowed, where it would be untrue."""
    saved, claim = AdapterFolder(home), Claim.read(home)
    true = None if claim is None else claim.about(saved)
    if true is not None and _report_fits(true):
        base = true.record["base_model"] or base_model
        return replace(true, record={**true.record, "base_model": base})
    if claim is None:
        problem = f"the adapter has no record of a realignment that fits its weights ({CONFIG_NAME})"
    elif true is None:
        said, found = claim.record["fingerprint_after"][:12], fingerprint(saved)[:12]
        problem = (
            f"the record is of other weights ({said}) than the adapter's ({found}), which were changed afterwards"
        )
    else:
        problem = f"{REPORT_NAME} is of other weights than the adapter's; write it again, or remove it"
    if not allow_unaligned:
        raise PeftNLSRError(
            f"{problem}; nothing was pushed. Realign it first, or pass allow_unaligned=True (--allow-unaligned)"
        )
    logger.warning("pushed without any claim of a realignment: %s", problem)
    for path in (home / name for name in CLAIM_FILES):
        path.unlink(missing_ok=True)
    return None


def _report_fits(claim: Claim) -> bool:
    return claim.report is None or claim.report.record["fingerprint_after"] == claim.record["fingerprint_after"]


def _take_card(adapter: Any, adapter_name: str, folder: Path, present: Path | None) -> bool:
    """Take the repository's present card, which its author may have edited, where the source brings none of its own.

    A model in memory has none: PEFT has just made the one in the folder.
    """
    live = isinstance(adapter, nn.Module)
    if present is None or (not live and (Path(adapter) / CARD_NAME).is_file()):
        return False
    write_text(folder / CARD_NAME, read_text(present) or "")
    if live and isinstance(bare := LiveAdapter(adapter, adapter_name).model, PeftModel):
        bare.create_or_update_model_card(str(folder))
    return True


def _hide_paths(folder: Path, base_model: str | None) -> None:
    """Replace or drop the base model in all configurations and the card, where it is a path of this machine."""
    paths = _base_paths(folder)
    if not paths:
        return
    for path in folder.rglob(CONFIG_FILE):
        config = read_json(path)
        if config.get(_BASE) in paths:
            write_text(path, json.dumps({**config, _BASE: base_model}, indent=2, sort_keys=True) + "\n")
    readme = read_text(folder / CARD_NAME)
    if readme is not None:
        write_text(folder / CARD_NAME, _without_paths(readme, paths, base_model))


def _base_paths(folder: Path) -> set[str]:
    """The base models, in configurations and card, that are paths of this machine."""
    readme = read_text(folder / CARD_NAME)
    named = [read_json(path).get(_BASE) for path in folder.rglob(CONFIG_FILE)]
    return {name for name in [*named, *_bases(parsed_card(readme or ""))] if name and not is_hub_id(name)}


def _without_paths(readme: str, paths: Iterable[str], base_model: str | None) -> str:
    card = parsed_card(readme)
    data: Any = card.data
    bases = dict.fromkeys(base_model if name in paths else name for name in _bases(card))
    known = [name for name in bases if name is not None] or ([base_model] if base_model else [])
    data.base_model = known if len(known) > 1 else next(iter(known), None)
    data.tags = [tag for tag in data.tags or () if not str(tag).endswith(tuple(paths))] or None
    text = str(card)
    for path in sorted(paths, key=len, reverse=True):
        if "/" in path or "\\" in path:
            text = re.sub(rf"(?<!\w){re.escape(path)}(?!\w)", lambda _: base_model or _UNNAMED, text)
    return text


def _bases(card: ModelCard) -> list[str]:
    data: Any = card.data
    found = data.base_model if isinstance(data.base_model, list) else [data.base_model]
    return [str(name) for name in found if name]


def _warn(folder: Path, home: Path, base_model: str | None) -> None:
    """Say what is pushed without being checked or whole."""
    if base_model is None and _base_paths(folder):
        logger.warning(
            "the base model is named by a path of this machine, so it is pushed without a name; pass base_model with "
            "its Hub id, so that others can load the adapter"
        )
    others = sorted(path.parent for path in folder.rglob(CONFIG_FILE) if path.parent != home)
    if others:
        names = ", ".join(other.relative_to(folder).as_posix() for other in others)
        logger.warning("other adapters are pushed as they are, without a check of their weights: %s", names)
