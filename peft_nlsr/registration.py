"""Keeps record, report and card with a live adapter, whichever way it is saved or pushed.

What is written is what ``claims`` finds true of the saved weights. PEFT's classes and mappings stay as they are,
unless :func:`register` is called.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from accelerate.utils import extract_model_from_parallel
from huggingface_hub import CommitInfo, ModelCard, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft import LoraConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType

from .adapters import CONFIG_FILE
from .claims import Claim, settle, settle_card, unclaimed
from .config import CONFIG_NAME
from .errors import PeftNLSRError
from .files import read_text, write_text
from .hub import CARD_NAME, delete_files, fetch, files_there, push_folder, staging
from .record import DIFF_NAME, Realignment
from .report import REPORT_NAME, SafetyReport

logger = logging.getLogger(__name__)


class NLSRLoraConfig(LoraConfig):
    """PEFT's LoRA configuration that saves the record of a realignment beside itself.

    It has no fields of its own: ``adapter_config.json`` is the one that ``LoraConfig`` writes.
    """

    nlsr_adapter = "default"
    nlsr_claim = None

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save ``adapter_config.json``, and what is true of the weights beside it; ``kwargs`` are PEFT's."""
        super().save_pretrained(save_directory, **kwargs)
        settle(Path(save_directory), self.nlsr_adapter, self.nlsr_claim)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> NLSRLoraConfig:
        """Load ``adapter_config.json`` and the record beside it, if that can be read; ``kwargs`` are PEFT's."""
        config = LoraConfig.from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        options = LoraConfig._split_kwargs(kwargs)[0]
        try:
            folder = _claim_folder(Path(pretrained_model_name_or_path), subfolder, options)
            claim = None if folder is None else Claim.read(folder)
        except PeftNLSRError as error:
            logger.warning("the adapter is loaded without its safety record: %s", error)
            claim = None
        return _labelled(config, "default", claim)


def _claim_folder(source: Path, subfolder: str | None, options: dict[str, Any]) -> Path | None:
    """The folder with the files of a claim, downloaded from the Hub where ``source`` is no local folder."""
    local = source / (subfolder or "")
    if (local / CONFIG_FILE).is_file():
        return local
    found: list[Path] = []
    for name in (CONFIG_NAME, REPORT_NAME, DIFF_NAME):
        try:
            found.append(Path(hf_hub_download(source.as_posix(), name, subfolder=subfolder, **options)))
        except EntryNotFoundError:
            continue
    return found[0].parent if found else None


def _labelled(config: Any, adapter_name: str, claim: Claim | None, kind: type = NLSRLoraConfig) -> Any:
    """A copy of the configuration that carries a claim; a copy, because several adapters may share one object."""
    config = copy.copy(config)
    if type(config) in (LoraConfig, NLSRLoraConfig):
        config.__class__ = kind
    config.nlsr_adapter, config.nlsr_claim = adapter_name, claim
    return config


def register() -> None:
    """Let PEFT restore the record when it loads a LoRA adapter (``PeftModel.from_pretrained``), in the whole process.

    Opt-in, and undone by :func:`unregister`. An adapter loaded like this keeps its record through ``save_pretrained``
    as long as its weights stay the same. ``AutoPeftModel`` reads configurations in another way and is not covered.
    """
    if PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA] is not NLSRLoraConfig:
        _replaced.append(PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA])
        PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA] = NLSRLoraConfig


def unregister() -> None:
    """Undo :func:`register`; nothing happens when it was not called."""
    if PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA] is NLSRLoraConfig:
        PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA] = _replaced.pop()


_replaced: list[Any] = []


def keep_with_adapter(model: Any, done: Realignment, report: SafetyReport | None = None) -> None:
    """Let a live model write record, report and card with the realigned adapter, however it is saved or pushed.

    Calling it again, with a report for instance, replaces what is written. The claim is checked at every save.

    Args:
        model: the realigned model, bare or wrapped.
        done: the realignment that was applied to it.
        report: what was measured; only the record is written without.

    Raises:
        ValueError: the realignment is only planned, or the report speaks of other weights.
    """
    bare = extract_model_from_parallel(model, keep_torch_compile=False)
    _set_claim(bare, done.adapter_name, Claim.of(done, report))
    for name, hook in _hooks_for(bare).items():
        if not isinstance(vars(bare).get(name), _Hook):
            setattr(bare, name, hook(bare, name))


def forget(model: Any, adapter_name: str) -> None:
    """Undo :func:`keep_with_adapter` for one adapter; with the last one the model's methods are as they were.

    Two things stay, so that a claim can be withdrawn where it was made: a PeftModel's configuration, for folders into
    which other weights are saved, and ``push_to_hub`` of a model that was pushed with its claim.
    """
    bare = extract_model_from_parallel(model, keep_torch_compile=False)
    if adapter_name not in dict(_claims(bare)):
        return
    _set_claim(bare, adapter_name, None)
    if not dict(_claims(bare)):
        for name in _HOOKS:
            hook = vars(bare).get(name)
            if isinstance(hook, _Hook) and not hook.published:
                hook.remove()


def _set_claim(model: Any, adapter_name: str, claim: Claim | None) -> None:
    # transformers' own save_pretrained saves the configuration before the weights, too early for it to check them.
    kind = NLSRLoraConfig if isinstance(model, PeftModel) else LoraConfig
    model.peft_config[adapter_name] = _labelled(model.peft_config[adapter_name], adapter_name, claim, kind)


def _claims(model: Any) -> Iterator[tuple[str, Claim]]:
    for name, config in (getattr(model, "peft_config", None) or {}).items():
        claim = getattr(config, "nlsr_claim", None)
        if claim is not None and config.nlsr_adapter == name:
            yield name, claim


def _saved_claims(model: Any, folder: Path) -> Iterator[tuple[str, Claim, Path]]:
    """The model's claims with the folder into which ``save_pretrained(folder)`` puts their adapter."""
    for name, claim in _claims(model):
        if isinstance(model, PeftModel):
            yield name, claim, folder if name == "default" else folder / name
        elif name in model.active_adapters():
            yield name, claim, folder


def _refresh_cards(model: Any, folder: Path) -> None:
    """Put the sections into a card that was just rewritten, for the adapters whose realigned weights lie beside it."""
    for name, claim, where in _saved_claims(model, folder):
        settle_card(where, name, claim)


class _Hook:
    """Stands in for a method of one object and calls what was bound there before; copies and pickles with it."""

    published = False

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name = owner, name
        self.previous = vars(owner).get(name)

    def bound(self) -> Any:
        """The method that this one stands in for."""
        return self.previous or getattr(type(self.owner), self.name).__get__(self.owner)

    def call_previous(self, *args: Any, **kwargs: Any) -> Any:
        return self.bound()(*args, **kwargs)

    def given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call by name, those that the method takes as ``**kwargs`` included.

        What it takes as ``*args`` is named as in the nearest method of the class that names its parameters.

        Raises:
            TypeError: the method does not take them.
        """
        signature = inspect.signature(self.bound())
        if _takes(signature, inspect.Parameter.VAR_POSITIONAL):
            signature = self._named_parameters() or signature
            known = {name: value for name, value in kwargs.items() if name in signature.parameters}
            return signature.bind_partial(*args, **known).arguments | kwargs
        found = signature.bind(*args, **kwargs).arguments
        for name in _takes(signature, inspect.Parameter.VAR_KEYWORD):
            found.update(found.pop(name, {}))
        return found

    def _named_parameters(self) -> inspect.Signature | None:
        """The signature of the nearest method of the owner's class that has no ``*args``."""
        kinds = (kind for kind in type(self.owner).__mro__ if self.name in vars(kind))
        found = (inspect.signature(vars(kind)[self.name].__get__(self.owner)) for kind in kinds)
        return next((each for each in found if not _takes(each, inspect.Parameter.VAR_POSITIONAL)), None)

    def remove(self) -> None:
        if self.previous is None:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.previous)


def _takes(signature: inspect.Signature, kind: Any) -> list[str]:
    """The names of a signature's parameters of one kind."""
    return [name for name, parameter in signature.parameters.items() if parameter.kind is kind]


class _CardHook(_Hook):
    """``PeftModel.create_or_update_model_card``, then the section."""

    def __call__(self, output_dir: str) -> None:
        self.call_previous(output_dir)
        _refresh_cards(self.owner, Path(output_dir))


class _SaveHook(_Hook):
    """``save_pretrained`` of a model whose configuration cannot do it, then record and section."""

    def __call__(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        done = self.call_previous(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            for name, claim, folder in _saved_claims(self.owner, Path(save_directory)):
                settle(folder, name, claim)
        return done


class _PushHook(_Hook):
    """``push_to_hub`` that keeps the card: everything in one commit.

    The method of transformers saves a card of its own over the one that ``save_pretrained`` made. Where another
    library has bound its own method to the model, that one pushes, and the card follows in a second commit.
    """

    def __call__(self, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        given = self.given((repo_id, *args), kwargs)
        self.published = True
        if self.previous is None:
            return _push(self.owner, **given)
        done = self.previous(repo_id, *args, **kwargs)
        revision = getattr(done, "pr_revision", None) or given.get("revision")
        message = "Safety record and model card"
        _push(self.owner, repo_id, commit_message=message, token=given.get("token") or None, revision=revision)
        return done


_HOOKS: dict[str, type[_Hook]] = {
    "create_or_update_model_card": _CardHook,
    "push_to_hub": _PushHook,
    "save_pretrained": _SaveHook,
}


def _hooks_for(model: Any) -> dict[str, type[_Hook]]:
    configs = [model.peft_config[name] for name, _ in _claims(model)]
    itself = isinstance(model, PeftModel) and all(isinstance(config, NLSRLoraConfig) for config in configs)
    return {name: hook for name, hook in _HOOKS.items() if hasattr(model, name) and not (itself and hook is _SaveHook)}


def _push(
    model: Any,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str | None = None,
    tags: list[str] | None = None,
    use_temp_dir: bool | None = None,
    safe_serialization: bool = True,
    **others: Any,
) -> CommitInfo:
    """Save the model beside the repository's present card and push the folder; the arguments of ``push_to_hub`` of
    any supported version of transformers.

    ``max_shard_size`` has no effect, as in PEFT: adapters are saved in one file.

    Raises:
        ValueError: an option that cannot be followed.
    """
    _refuse_options(token, use_temp_dir, safe_serialization, others)
    access = token if isinstance(token, str) else None
    present = fetch(repo_id, CARD_NAME, revision=revision, token=access)
    with staging() as folder:
        if present is not None:
            write_text(folder / CARD_NAME, read_text(present) or "")
        model.save_pretrained(folder)
        if tags:
            _add_tags(folder / CARD_NAME, tags)
        return push_folder(
            folder,
            repo_id,
            private=private,
            revision=revision,
            create_pr=create_pr,
            commit_message="\n\n".join(
                filter(None, [commit_message or "Upload realigned adapter", commit_description])
            ),
            token=access,
            delete=_unclaimed(model, folder, files_there(repo_id, revision=revision, token=access)),
        )


def _refuse_options(token: Any, use_temp_dir: bool | None, safe_serialization: bool, others: dict[str, Any]) -> None:
    refused = {
        "token=False": (token is False, "a push needs an access token; pass it, or log in"),
        "use_temp_dir=False": (
            use_temp_dir is False,
            "a temporary folder is pushed; save_pretrained keeps one",
        ),
        "safe_serialization=False": (not safe_serialization, "only safetensors are written, never pickles"),
        ", ".join(others): (bool(others), "they are not known here; leave them out"),
    }
    for option, (given, why) in refused.items():
        if given:
            raise ValueError(f"push_to_hub of a realigned adapter does not take {option}: {why}. Nothing was pushed")


def _unclaimed(model: Any, folder: Path, there: Collection[str]) -> list[str]:
    """Of the files ``there`` what an earlier push claimed about the model's adapters and this one does not."""
    homes = [
        folder if name == "default" or not isinstance(model, PeftModel) else folder / name
        for name in model.peft_config
    ]
    return [path for home in homes for path in unclaimed(home, folder, there)]


def _add_tags(readme: Path, tags: list[str]) -> None:
    card = ModelCard(read_text(readme) or "---\n{}\n---\n")
    card.data["tags"] = list(dict.fromkeys([*(card.data.get("tags") or ()), *tags]))
    write_text(readme, str(card))


class _TrainerCardHook(_Hook):
    """``Trainer.create_model_card``, TRL's included, then the section; both take arguments of their own."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.call_previous(*args, **kwargs)
        if self.owner.is_world_process_zero():
            model = extract_model_from_parallel(self.owner.model, keep_torch_compile=False)
            _refresh_cards(model, Path(self.owner.args.output_dir))


def unclaimed_files(trainer: Any, *, revision: str | None = None, token: str | None = None) -> list[str]:
    """What an earlier push claimed on the Hub about a trainer's adapters, and ``output_dir`` does not.

    ``revision`` and ``token`` are the trainer's own unless given.
    """
    model = extract_model_from_parallel(trainer.model, keep_torch_compile=False)
    settings = trainer.args
    revision, token = revision or settings.hub_revision, token or settings.hub_token
    there = files_there(trainer.hub_model_id, revision=revision, token=token)
    return _unclaimed(model, Path(settings.output_dir), there)


class _TrainerPushHook(_Hook):
    """``Trainer.push_to_hub``, which deletes nothing; then what an earlier push claimed of other weights goes."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        done = self.call_previous(*args, **kwargs)
        if self.owner.is_world_process_zero():
            given, settings = self.given(args, kwargs), self.owner.args
            where = {
                "revision": given.get("revision") or settings.hub_revision,
                "token": given.get("token") or settings.hub_token,
            }
            if stale := unclaimed_files(self.owner, **where):
                message = "Withdraw what was said of other weights"
                delete_files(self.owner.hub_model_id, stale, message, **where)
        return done


_TRAINER_HOOKS: dict[str, type[_Hook]] = {"create_model_card": _TrainerCardHook, "push_to_hub": _TrainerPushHook}


def wrap_trainer(trainer: Any) -> None:
    """Let a trainer's ``create_model_card`` and ``push_to_hub`` keep what is said of its model true; without a claim
    they do what they did."""
    for name, hook in _TRAINER_HOOKS.items():
        if not isinstance(vars(trainer).get(name), hook):
            setattr(trainer, name, hook(trainer, name))
