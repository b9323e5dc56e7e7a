"""The LoRA adapter in a folder, as PEFT saves it: read module by module, written as a new folder; opened by path, by
Hub id, or from a model."""

from __future__ import annotations

import glob
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import (
    CONFIG_FILE,
    UNTIE,
    WEIGHTS_FILE,
    Adapter,
    adapter_info,
    at_rank,
    check_config,
    check_outside,
    check_peft_type,
    divides,
    fit_factors,
    natural_order,
    pair_keys,
    rank_and_scale_of,
    refuse,
    require_known,
)
from .errors import CorruptFileError, PeftNLSRError, UnsupportedAdapterError
from .hub import CARD_NAME
from .live_adapter import LiveAdapter
from .lowrank import LowRank
from .storage import Spec, TensorFile, replace_folder, write_tensors

logger = logging.getLogger(__name__)

_COPIED_SUFFIXES = frozenset({".json", ".jinja", ".md", ".model", ".tiktoken", ".txt", ".yaml", ".yml"})
# What an earlier realignment claimed about an adapter does not hold for the one made from it.
_CLAIMS = ("nlsr_", "safety_report")


class AdapterFolder(Adapter):
    """An adapter saved by PEFT, read one module at a time and never changed.

    Args:
        path: a local folder with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        CorruptFileError: a file is missing, truncated or contradicts the other.
        UnsupportedAdapterError: a feature, named with its module, that cannot be edited safely.
    """

    def __init__(self, path: str | os.PathLike[str], *, adapter_name: str = "default") -> None:
        self.path = Path(path)
        config = _read_config(self.path)
        check_peft_type(config)
        self._file = TensorFile(_weights_path(self.path))
        pairs, outside = pair_keys(self._file.names, str(self._file.path))
        self._modules: dict[str, tuple[str, str]] = {name: pairs[name] for name in sorted(pairs, key=natural_order)}
        check_config(config, self._modules)
        check_outside(outside)
        _check_tying(self._file, self._modules)
        self.info = adapter_info(adapter_name, config, outside)
        for name in self._modules:
            self._check_shapes(name)

    def _check_shapes(self, name: str) -> None:
        (_, a_shape), (_, b_shape) = (self._file.spec(key) for key in self._modules[name])
        if len(a_shape) != 2 or len(b_shape) != 2:
            refuse(f"LoRA with factors {a_shape} and {b_shape}", name, "Train it on linear layers only")
        rank = self._geometry(name)[0]
        if a_shape[0] != rank or b_shape[1] != rank:
            raise CorruptFileError(
                f"{self._file.path}: factors {a_shape} and {b_shape} of {name} do not have rank {rank}, which "
                f"{CONFIG_FILE} gives them. The two files do not belong together; save the adapter again."
            )

    def _factors(self, name: str) -> tuple[Tensor, Tensor]:
        a_key, b_key = self._modules[name]
        return self._file[a_key], self._file[b_key]

    def save_as(
        self,
        output: str | os.PathLike[str],
        changed: Mapping[str, LowRank],
        *,
        rank_multiple: int | Fraction = 1,
        extra_files: Mapping[str, str] | None = None,
        finish: Callable[[Path], None] | None = None,
    ) -> None:
        """Write a complete new adapter folder in which some modules have another update.

        Tensors are streamed; each module of ``changed`` is asked for exactly once, so it may compute on access. All
        other tensors and ``adapter_config.json`` are the same bytes as in the input, unless ``rank_multiple`` asks for
        every rank to be multiplied (the exact, uncompressed form). Text files beside the adapter (tokenizer, README)
        are copied, except the record of an earlier realignment; ``extra_files`` (name to text) are written over them,
        and ``finish`` gets the complete folder before it appears at ``output``. A ``rank_multiple`` below 1 undoes an
        earlier growth; then ``changed`` must hold all modules.

        Raises:
            IncompatibleError: unknown module, wrong shape, or a rank that does not fit.
            CorruptFileError: NaN or infinite values, also when the cast to the stored dtype made them.
            FileExistsError: ``output`` exists and is not an empty folder.
        """
        require_known(changed, self)
        if not divides(self.info.config, Fraction(rank_multiple)):
            raise ValueError(f"rank_multiple {rank_multiple} gives a rank that is no whole number of at least 1")
        if self.path.resolve() in Path(output).resolve().parents:
            raise ValueError(
                f"output {output} is inside the input {self.path}, which is never changed; choose another"
            )
        config = at_rank(self.info.config, Fraction(rank_multiple))

        def fill(folder: Path) -> None:
            specs, stream = self._new_specs(rank_multiple), self._stream(changed, config)
            write_tensors(folder / WEIGHTS_FILE, specs, stream, self._file.metadata)
            _copy_text_files(self.path, folder)
            self._write_texts(folder, config, extra_files or {})
            if finish is not None:
                finish(folder)

        replace_folder(output, fill)

    def _write_texts(self, folder: Path, config: dict[str, Any], extra_files: Mapping[str, str]) -> None:
        if config is not self.info.config:
            (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True), "utf-8")
        for name, text in extra_files.items():
            (folder / _plain_name(name)).write_text(text, "utf-8")

    def _new_specs(self, rank_multiple: int | Fraction) -> dict[str, Spec]:
        specs = {key: self._file.spec(key) for key in self._file}
        for a_key, b_key in self._modules.values():
            (a_dtype, (rank, d_in)), (b_dtype, (d_out, _)) = specs[a_key], specs[b_key]
            new_rank = int(rank * rank_multiple)
            specs[a_key] = a_dtype, (new_rank, d_in)
            specs[b_key] = b_dtype, (d_out, new_rank)
        return specs

    def _stream(self, changed: Mapping[str, LowRank], config: Mapping[str, Any]) -> Callable[[str], Tensor]:
        given = set(changed)
        edited = given if config is self.info.config else set(self)
        module_of = {key: name for name in edited for key in self._modules[name]}
        waiting: dict[str, Tensor] = {}

        def tensor(key: str) -> Tensor:
            if key not in module_of:
                return self._file[key]
            if key not in waiting:
                name = module_of[key]
                update = changed[name] if name in given else self[name]
                waiting.update(zip(self._modules[name], self._fit(name, update, config), strict=True))
            return waiting.pop(key)

        return tensor

    def _fit(self, name: str, update: LowRank, config: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        (a_dtype, a_shape), (b_dtype, b_shape) = (self._file.spec(key) for key in self._modules[name])
        return fit_factors(name, update, rank_and_scale_of(config, name), (a_dtype, b_dtype), (b_shape[0], a_shape[1]))


def open_adapter(source: Any, *, adapter_name: str | None = None, revision: str | None = None) -> Adapter:
    """The adapter of a model in memory, of a local folder, or of a Hub repository.

    Args:
        source: a model, a folder, or a Hub id, whose files are downloaded as :func:`download_adapter` does.
        adapter_name: which adapter of a model; for files, a sub-folder, as PEFT saves named adapters.
        revision: branch, tag or commit of a Hub repository.
    """
    local = isinstance(source, nn.Module) or Path(source).exists()
    if local and revision is not None:
        raise ValueError(f"revision {revision!r} only goes with a Hub id; a model or a folder is what it is")
    if isinstance(source, nn.Module):
        return LiveAdapter(source, adapter_name)
    subfolder = "" if adapter_name in (None, "default") else str(adapter_name)
    home = Path(source) / subfolder if local else download_adapter(str(source), subfolder, revision)
    return AdapterFolder(home, adapter_name=adapter_name or "default")


def download_adapter(repo_id: str, subfolder: str = "", revision: str | None = None) -> Path:
    """The folder with an adapter from the Hub: weights, text files (tokenizer, card, the record of a realignment) and
    the undo, all of one commit; other folders (checkpoints, other adapters) and pickles stay there.

    Raises:
        PeftNLSRError: no such repository or revision, or the Hub cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    prefix = f"{glob.escape(subfolder)}/" if subfolder else ""
    wanted = [WEIGHTS_FILE, "nlsr_*.safetensors", *(f"*{suffix}" for suffix in sorted(_COPIED_SUFFIXES))]
    above = [CARD_NAME] if subfolder else []  # where PEFT writes the card of named adapters
    try:
        found = snapshot_download(
            repo_id,
            revision=revision,
            allow_patterns=[*above, *(prefix + name for name in wanted)],
            ignore_patterns=[f"{prefix}[!.]*/*"],  # a * matches / too; .eval_results lies beside the weights
        )
    except HFValidationError as error:
        raise PeftNLSRError(f"{repo_id!r} is neither an existing folder nor a Hub id. Check the path.") from error
    except (HfHubHTTPError, OSError) as error:
        raise PeftNLSRError(
            f"{repo_id!r} is not an existing folder and its adapter could not be downloaded from the Hub ({error}). "
            "Check the name, the access token and the network, or download it first and give the folder."
        ) from error
    return Path(found) / subfolder


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not path.is_file():
        named = sorted(str(found.parent.relative_to(folder)) for found in folder.glob(f"*/{CONFIG_FILE}"))
        advice = f"Pass adapter_name, one of {', '.join(named)}." if named else "Give the folder of a saved adapter."
        raise CorruptFileError(f"{folder} has no {CONFIG_FILE}. {advice}")
    try:
        config = json.loads(path.read_text("utf-8"))
        return {"r": 8, "lora_alpha": 8, **config}
    except (ValueError, TypeError) as error:
        raise CorruptFileError(f"{path} is not a JSON object ({error}). Save the adapter again.") from error


def _weights_path(folder: Path) -> Path:
    path = folder / WEIGHTS_FILE
    if path.is_file():
        return path
    if (folder / "adapter_model.bin").is_file():
        raise UnsupportedAdapterError(
            f"{folder} has adapter_model.bin, a pickle, which is never opened. Convert it once where you trust it: "
            "PeftModel.from_pretrained(base, folder).save_pretrained(new_folder)."
        )
    raise CorruptFileError(
        f"{folder} has no {WEIGHTS_FILE}. Give the folder of a saved adapter, or download it again."
    )


def _check_tying(file: TensorFile, modules: Mapping[str, tuple[str, str]]) -> None:
    """Refuse an output layer whose factors PEFT ties, at load, to those of the embedding in the same file."""
    embedded = [file[key].T for key in file if key.endswith(".lora_embedding_B")]
    for name, (a_key, _) in modules.items():
        if any(torch.equal(file[a_key], factor) for factor in embedded):
            refuse("a LoRA factor tied to the embedding's", name, UNTIE)


def _copy_text_files(source: Path, folder: Path) -> None:
    skipped = []
    for path in sorted(source.iterdir()):
        if path.name == WEIGHTS_FILE or path.name.startswith(_CLAIMS):
            continue
        if path.is_file() and path.suffix in _COPIED_SUFFIXES:
            shutil.copyfile(path, folder / path.name)
        else:
            skipped.append(path.name)
    if skipped:
        logger.warning("not copied to the new adapter, being no text files: %s", ", ".join(skipped))


def _plain_name(name: str) -> str:
    if Path(name).name != name or name in (CONFIG_FILE, WEIGHTS_FILE):
        raise ValueError(f"extra file {name!r} must be a plain file name other than {CONFIG_FILE} and {WEIGHTS_FILE}")
    return name
