"""LoRA adapters as mappings ``module name -> LowRank``, the same for a live model and for files.

This is the only file that knows PEFT's parameter and key names. Nothing is skipped in silence: what is trained but is
not a LoRA pair is listed in ``info.outside``, and a feature whose update is not ``scale * B @ A`` on a plain base is
refused. PEFT is imported where it is needed, because realigning files does without it.
"""

from __future__ import annotations

import copy
import dataclasses
import glob
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from .errors import CorruptFileError, IncompatibleError, PeftNLSRError, UnsupportedAdapterError
from .hub import CARD_NAME, is_hub_id
from .lowrank import LowRank, zero_like
from .offloading import bring_in
from .storage import Spec, TensorFile, replace_folder, require_finite, write_tensors

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

logger = logging.getLogger(__name__)

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_PREFIX = "base_model.model."
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_A_SUFFIX, _B_SUFFIX = ".lora_A.weight", ".lora_B.weight"
_COMPANION_SUFFIXES = (".lora_embedding_A", ".lora_embedding_B", ".lora_B.bias")
_COMPANION_PARTS = frozenset({"lora_monteclora_sampler", "lora_velora_embed"})

_COPIED_SUFFIXES = frozenset({".json", ".jinja", ".md", ".model", ".tiktoken", ".txt", ".yaml", ".yml"})
# What an earlier realignment claimed about an adapter does not hold for the one made from it.
_CLAIMS = ("nlsr_", "safety_report")

_FILE_LEVEL = "Save the adapter and realign the files instead: `peft-nlsr realign ADAPTER --patch PATCH -o OUT`"
_KEEP_VALUES = (
    "PEFT loses them where the base was offloaded before: load the adapter with PeftModel.from_pretrained(base, "
    "ADAPTER, device_map=..., offload_folder=...) on a base that was loaded with a device_map, offload the model "
    "after the adapter was put on it, or realign its files: `peft-nlsr realign ADAPTER --patch PATCH -o OUT`"
)
_RETRAIN = "Convert it to plain LoRA (`peft.convert_to_lora`) or train it without this option"
_EXPORT = (
    "It changed the base weights; export it as plain LoRA first, with `save_pretrained(..., "
    "path_initial_model_for_weight_conversion=...)`"
)
_UNTIE = "Train it without ensure_weight_tying, and with one LoRA layer per module"
_REFUSED_OPTIONS = {
    "use_dora": ("DoRA", _RETRAIN),
    "use_qalora": ("QA-LoRA", _RETRAIN),
    "use_bdlora": ("BD-LoRA", _RETRAIN),
    "kasa_config": ("KaSA", _RETRAIN),
    "arrow_config": ("Arrow", "Realign the adapters that it routes to, one by one"),
    "target_parameters": ("target_parameters (ParamWrapper)", "Train it with target_modules instead"),
    "megatron_config": ("Megatron parallelism", _FILE_LEVEL),
}
_REFUSED_INITS = {
    "pissa": ("PiSSA", _EXPORT),
    "olora": ("OLoRA", _EXPORT),
    "corda": ("CorDA", _EXPORT),
    "loftq": ("LoftQ", _EXPORT),
    "lora_ga": ("LoRA-GA", _EXPORT),
    "mica": ("MiCA", _RETRAIN),
}
_REFUSED_LAYERS = {
    "_ConvNd": ("LoRA of a convolution", "Train it without convolutions in target_modules"),
    "MultiheadAttention": ("LoRA of nn.MultiheadAttention in a live model", _FILE_LEVEL),
}
_ACCEPTED_VARIANTS = frozenset({"ALoraLinearVariant", "VeloraLinearVariant", "MontecloraLinearVariant"})


@dataclass(frozen=True)
class AdapterInfo:
    """What is known about an adapter besides its factors.

    Attributes:
        adapter_name: PEFT's name of it; ``default`` for a folder without sub-folder.
        base_model: Hub id of the base model; None when it is unknown or was a local path, which is nobody's business.
        revision: revision of the base model.
        config: the content of ``adapter_config.json``.
        outside: names of the tensors saved with the adapter that are not LoRA pairs, sorted: ``modules_to_save``,
            biases, embedding LoRA, trainable tokens. They are not realigned, and belong into every report.
    """

    adapter_name: str
    base_model: str | None
    revision: str | None
    config: dict[str, Any]
    outside: tuple[str, ...]


class Adapter(Mapping[str, LowRank]):
    """An adapter as a mapping from module name to its update, read on access.

    A module is named as in the base model, ``model.layers.0.self_attn.q_proj``; order is natural, by name with numbers
    compared as numbers, so layer 2 comes before layer 10.

    Raises:
        CorruptFileError: a factor that is read holds NaN or infinite values.
    """

    info: AdapterInfo
    _modules: Mapping[str, Any]

    def __getitem__(self, name: str) -> LowRank:
        A, B = self._factors(name)
        require_finite(A, f"lora_A of {name}")
        require_finite(B, f"lora_B of {name}")
        return LowRank(A, B, self._geometry(name)[1])

    def __contains__(self, name: object) -> bool:
        return name in self._modules

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    def _factors(self, name: str) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _geometry(self, name: str) -> tuple[int, float]:
        return _rank_and_scale(self.info.config, name)


class LiveAdapter(Adapter):
    """One LoRA adapter of a model in memory; a value is a view of the parameters as they are at that moment.

    What accelerate offloads of the adapter (not of its base) is brought in, and stays where it is computed with.

    Args:
        model: a ``PeftModel`` or a transformers model with injected adapters, bare or wrapped (DDP, compiled).
        adapter_name: which adapter; None means the one that is active.

    Attributes:
        model: the unwrapped model.
        layers: the ``LoraLayer`` of each module, in the same order.

    Raises:
        UnsupportedAdapterError: a feature, named with its module, that cannot be edited safely.
    """

    layers: dict[str, LoraLayer]

    def __init__(self, model: nn.Module, adapter_name: str | None = None) -> None:
        self.model: Any = _unwrap(model)
        self._name = _choose_adapter(self.model, adapter_name)
        _bring_in(self.model, self._name)
        config = _live_config(self.model, self._name)
        _check_peft_type(config)
        layers = _lora_layers(self.model, self._name)
        self.layers = self._modules = {name: layers[name] for name in sorted(layers, key=natural_order)}
        _check_config(config, self.layers)
        for name, layer in self.layers.items():
            _check_layer(name, layer, self._name, _rank_and_scale(config, name))
        _check_not_aliased(self.model, self._name)
        self.info = _info(self._name, config, self._cross_check())

    def _cross_check(self) -> tuple[str, ...]:
        from peft import get_peft_model_state_dict

        # save_embedding_layers=False: the default asks the Hub whether the vocabulary was resized.
        keys = get_peft_model_state_dict(self.model, adapter_name=self._name, save_embedding_layers=False)
        pairs, outside = _pair_keys(keys, f"adapter {self._name}")
        if set(pairs) != set(self.layers):
            where = ", ".join(sorted(set(pairs) ^ set(self.layers)))
            _refuse("LoRA that PEFT would not save under its module's name", where, "Unwrap the modules around it")
        _check_outside(outside)
        return outside

    def _factors(self, name: str) -> tuple[Tensor, Tensor]:
        A, B = self._linears(name)
        return A.weight.detach(), B.weight.detach()

    def _linears(self, name: str) -> tuple[Any, Any]:
        layer = self.layers[name]
        return layer.lora_A[self._name], layer.lora_B[self._name]

    def snapshot(self) -> dict[str, LowRank]:
        """Copies of all factors on the CPU, bit for bit in their dtype; ``write`` takes them back."""
        return {name: LowRank(u.A.cpu().clone(), u.B.cpu().clone(), u.scale) for name, u in self.items()}

    def write(self, changed: Mapping[str, LowRank]) -> None:
        """Put updates into the model: all of them, or none when one of them does not fit.

        Each update is rewritten to its layer's scale and dtype; smaller ranks are padded with zeros, parameters keep
        their identity. When a rank is larger than its layer's, the rank of *all* modules is multiplied by the smallest
        whole number that fits it and the rest is padded; when ``changed`` covers all modules with one common ratio of
        ranks, they get exactly these ranks (so a snapshot undoes a growth). Then the parameters are new objects, which
        an optimizer made before does not know, and ``peft_config[adapter]`` is a changed copy.

        Raises:
            IncompatibleError: unknown module or wrong shape.
            CorruptFileError: NaN or infinite values, also when the cast to the stored dtype made them.
        """
        fitted, factor, config = self._fit_all(changed)
        with torch.no_grad(), self.undone_on_failure(fitted):
            for name, factors in fitted.items():
                for linear, new in zip(self._linears(name), factors, strict=True):
                    _store(linear, new)
            if factor != 1:
                self._adopt(config)

    def fitted(self, changed: Mapping[str, LowRank]) -> dict[str, tuple[Tensor, Tensor]]:
        """The A and B that ``write`` would store for each module, or its errors; the model is not changed."""
        return self._fit_all(changed)[0]

    def _fit_all(
        self, changed: Mapping[str, LowRank]
    ) -> tuple[dict[str, tuple[Tensor, Tensor]], Fraction, dict[str, Any]]:
        _require_known(changed, self)
        updates = dict(changed.items())
        factor = self._rank_factor(updates)
        config = at_rank(self.info.config, factor)
        names = [name for name in self if factor != 1 or name in updates]
        return {name: self._fit(name, updates.get(name), config) for name in names}, factor, config

    @contextmanager
    def undone_on_failure(self, names: Iterable[str]) -> Iterator[None]:
        """Put parameters and rank back when anything, an interrupt included, stops the writing half-way."""
        before = {name: [(m.weight, m.weight.detach().clone()) for m in self._linears(name)] for name in names}
        info, peft_config = self.info, self.model.peft_config[self._name]
        try:
            yield
        except BaseException:
            for name, factors in before.items():
                for linear, (parameter, values) in zip(self._linears(name), factors, strict=True):
                    linear.weight = parameter
                    parameter.data.copy_(values)
                    linear.out_features, linear.in_features = values.shape
            if self.model.peft_config[self._name] is not peft_config:
                self._adopt(info.config)
                self.info, self.model.peft_config[self._name] = info, peft_config
            raise

    def _rank_factor(self, updates: Mapping[str, LowRank]) -> Fraction:
        ratios = {Fraction(update.rank, self._geometry(name)[0]) for name, update in updates.items()}
        if len(ratios) == 1 and len(updates) == len(self) and _divides(self.info.config, max(ratios)):
            return ratios.pop()
        return Fraction(math.ceil(max([*ratios, Fraction(1)])))

    def _fit(self, name: str, update: LowRank | None, config: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        A, B = (linear.weight for linear in self._linears(name))
        new = fit_factors(
            name,
            self[name] if update is None else update,
            _rank_and_scale(config, name),
            (A.dtype, B.dtype),
            (B.shape[0], A.shape[1]),
        )
        return new[0].to(A.device), new[1].to(B.device)

    def _adopt(self, config: dict[str, Any]) -> None:
        # A copy, because several adapters may share one config object (TRL's "default" and "ref" do).
        peft_config = copy.copy(self.model.peft_config[self._name])
        for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern"):
            setattr(peft_config, key, copy.copy(config[key]))
        self.model.peft_config[self._name] = peft_config
        for name, layer in self.layers.items():
            layer.r[self._name], layer.scaling[self._name] = _rank_and_scale(config, name)
            layer.lora_alpha[self._name] = _lookup(config, "alpha_pattern", "lora_alpha", name)
        self.info = dataclasses.replace(self.info, config=config)


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
        _check_peft_type(config)
        self._file = TensorFile(_weights_path(self.path))
        pairs, outside = _pair_keys(self._file.names, str(self._file.path))
        self._modules: dict[str, tuple[str, str]] = {name: pairs[name] for name in sorted(pairs, key=natural_order)}
        _check_config(config, self._modules)
        _check_outside(outside)
        _check_tying(self._file, self._modules)
        self.info = _info(adapter_name, config, outside)
        for name in self._modules:
            self._check_shapes(name)

    def _check_shapes(self, name: str) -> None:
        (_, a_shape), (_, b_shape) = (self._file.spec(key) for key in self._modules[name])
        if len(a_shape) != 2 or len(b_shape) != 2:
            _refuse(f"LoRA with factors {a_shape} and {b_shape}", name, "Train it on linear layers only")
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
        _require_known(changed, self)
        if not _divides(self.info.config, Fraction(rank_multiple)):
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
        return fit_factors(name, update, _rank_and_scale(config, name), (a_dtype, b_dtype), (b_shape[0], a_shape[1]))


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


def _refuse(feature: str, where: str, advice: str) -> NoReturn:
    raise UnsupportedAdapterError(f"{feature} is not supported (in {where}). {advice}.")


def factor_keys(module: str) -> tuple[str, str]:
    """The names under which PEFT saves a module's A and B."""
    return f"{_PREFIX}{module}{_A_SUFFIX}", f"{_PREFIX}{module}{_B_SUFFIX}"


def natural_order(name: str) -> list[int | str]:
    """A sort key that puts ``layers.10`` after ``layers.9``."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _base_name(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS).removeprefix(_PREFIX)


def _info(adapter_name: str, config: dict[str, Any], outside: tuple[str, ...]) -> AdapterInfo:
    base = config.get("base_model_name_or_path")
    return AdapterInfo(adapter_name, base if is_hub_id(base) else None, config.get("revision"), config, outside)


def _pair_keys(keys: Iterable[str], where: str) -> tuple[dict[str, tuple[str, str]], tuple[str, ...]]:
    """The keys of A and B of each module, and the names of everything else."""
    a_keys: dict[str, str] = {}
    b_keys: dict[str, str] = {}
    outside = []
    for key in keys:
        name = _base_name(key)
        side = a_keys if name.endswith(_A_SUFFIX) else b_keys if name.endswith(_B_SUFFIX) else None
        if side is None:
            outside.append(name)
        elif side.setdefault(name[: -len(_A_SUFFIX)], key) != key:
            raise CorruptFileError(f"{where}: two keys name {name}: {side[name[: -len(_A_SUFFIX)]]} and {key}")
    lonely = sorted(a_keys.keys() ^ b_keys.keys())
    if lonely:
        raise CorruptFileError(
            f"{where}: only one of lora_A and lora_B is there for {', '.join(lonely)}. Save the adapter again."
        )
    return {name: (a_keys[name], b_keys[name]) for name in a_keys}, tuple(sorted(outside))


def _check_outside(outside: Iterable[str]) -> None:
    for name in outside:
        parts = [part for part in name.split(".") if part.startswith("lora_")]
        if parts and not name.endswith(_COMPANION_SUFFIXES) and not _COMPANION_PARTS.intersection(parts):
            _refuse(f"the LoRA tensor {parts[0]}", name, _RETRAIN)


def _check_peft_type(config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        _refuse(f"peft_type {config.get('peft_type')}", "the whole adapter", "Only LORA adapters can be realigned")


def _check_config(config: Mapping[str, Any], modules: Mapping[str, Any]) -> None:
    if not modules:
        _refuse("an adapter without a LoRA pair of a linear layer", "the whole adapter", "There is nothing to realign")
    where = f"{next(iter(modules))} and {len(modules) - 1} more"
    for option, (feature, advice) in _REFUSED_OPTIONS.items():
        if config.get(option):
            _refuse(feature, where, advice)
    init = str(config.get("init_lora_weights")).lower()
    for start, (feature, advice) in _REFUSED_INITS.items():
        if init.startswith(start):
            _refuse(f"{feature} initialisation", where, advice)


def _rank_and_scale(config: Mapping[str, Any], name: str) -> tuple[int, float]:
    rank = _lookup(config, "rank_pattern", "r", name)
    alpha = _lookup(config, "alpha_pattern", "lora_alpha", name)
    if not isinstance(rank, int) or rank < 1:
        raise CorruptFileError(f"{CONFIG_FILE} gives {name} rank {rank!r}, expected a whole number above 0")
    return rank, alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _lookup(config: Mapping[str, Any], pattern_key: str, default_key: str, name: str) -> Any:
    patterns = config.get(pattern_key)
    if not patterns:
        return config[default_key]
    from peft.utils.other import get_pattern_key

    return patterns.get(get_pattern_key(list(patterns), name), config[default_key])


def _divides(config: Mapping[str, Any], factor: Fraction) -> bool:
    ranks = (config["r"], *(config.get("rank_pattern") or {}).values())
    return factor > 0 and all((rank * factor).denominator == 1 for rank in ranks)


def at_rank(config: dict[str, Any], factor: Fraction) -> dict[str, Any]:
    """The config with every rank and alpha multiplied: the same scales, or with rsLoRA larger by ``sqrt(factor)``."""
    if factor == 1:
        return config
    if config.get("monteclora_config"):
        _refuse(
            "a change of rank with MonteCLoRA, whose sampler has the rank,", "the whole adapter", "Compress instead"
        )

    def times(number: float) -> float:
        product = Fraction(number) * factor
        return int(product) if product.denominator == 1 else float(product)

    patterns = {
        key: {name: times(value) for name, value in (config.get(key) or {}).items()}
        for key in ("rank_pattern", "alpha_pattern")
    }
    return {**config, **patterns, "r": times(config["r"]), "lora_alpha": times(config["lora_alpha"])}


def _require_known(changed: Mapping[str, LowRank], adapter: Adapter) -> None:
    unknown = [name for name in changed if name not in adapter]
    if unknown:
        raise IncompatibleError(
            f"adapter {adapter.info.adapter_name} has no LoRA on {', '.join(unknown)}; "
            f"it has {len(adapter)} modules, such as {next(iter(adapter))}"
        )


def fit_factors(
    name: str,
    update: LowRank,
    rank_and_scale: tuple[int, float],
    dtypes: tuple[torch.dtype, torch.dtype],
    shape: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """A and B of an update at a rank, scale and dtype, finite after the cast; new tensors, since ``pad`` copies."""
    rank, scale = rank_and_scale
    if update.shape != shape:
        raise IncompatibleError(f"update of {name} has shape {update.shape}, expected {shape}")
    if update.rank > rank:
        raise IncompatibleError(
            f"update of {name} has rank {update.rank}, which does not fit into rank {rank}. "
            "Truncate it, or ask for a larger rank_multiple."
        )
    at_scale = (zero_like(update) if update.scale == 0.0 else update).at_scale(scale)
    missing = rank - update.rank
    A = nn.functional.pad(at_scale.A, (0, 0, 0, missing)).to(dtypes[0])
    B = nn.functional.pad(at_scale.B, (0, missing)).to(dtypes[1])
    require_finite(A, f"lora_A of {name}, cast to {dtypes[0]},")
    require_finite(B, f"lora_B of {name}, cast to {dtypes[1]},")
    return A, B


def _unwrap(model: nn.Module) -> nn.Module:
    from accelerate.utils import extract_model_from_parallel
    from peft import PeftMixedModel

    unwrapped = extract_model_from_parallel(model, keep_torch_compile=False)
    if isinstance(unwrapped, PeftMixedModel):
        _refuse("PeftMixedModel", "the whole model", "Load the LoRA adapter alone, with PeftModel.from_pretrained")
    return unwrapped


def _choose_adapter(model: nn.Module, adapter_name: str | None) -> str:
    configs: Mapping[str, Any] = getattr(model, "peft_config", None) or {}
    active = _active_adapters(model, configs)
    if not configs or active is None:
        raise UnsupportedAdapterError(f"{type(model).__name__} has no PEFT adapter. Pass a model with a LoRA adapter.")
    choices = ", ".join(configs)
    if adapter_name is not None:
        if adapter_name not in configs:
            raise ValueError(f"the model has no adapter {adapter_name!r}; it has {choices}")
        return adapter_name
    if len(active) != 1:
        raise ValueError(f"{len(active)} adapters are active; pass adapter_name, one of {choices}")
    return active[0]


def _active_adapters(model: nn.Module, configs: Iterable[str]) -> list[str] | None:
    """The names in use; None where a model of transformers carries no adapter, which some versions call an error."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    active = getattr(model, "active_adapters", configs)
    if not callable(active):
        return list(active)
    layers = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
    return next((list(layer.active_adapters) for layer in layers), None)


def _live_config(model: Any, adapter_name: str) -> dict[str, Any]:
    """The config as ``save_pretrained`` writes it, sets sorted."""
    config = model.peft_config[adapter_name].to_dict()
    return {**json.loads(json.dumps(config, default=sorted)), "inference_mode": True}


def _bring_in(model: nn.Module, adapter_name: str) -> None:
    for path, module in model.named_modules():
        parts = path.split(".")
        if adapter_name in parts and any(part.startswith(("lora_", "modules_to_save")) for part in parts):
            bring_in(module)


def _lora_layers(model: nn.Module, adapter_name: str) -> dict[str, LoraLayer]:
    from peft.tuners.lora import LoraLayer

    return {
        _base_name(name): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and adapter_name in module.lora_A
    }


def _check_layer(name: str, layer: LoraLayer, adapter_name: str, rank_and_scale: tuple[int, float]) -> None:
    for cls in type(layer).__mro__:
        if cls.__name__ in _REFUSED_LAYERS:
            feature, advice = _REFUSED_LAYERS[cls.__name__]
            _refuse(feature, name, advice)
    variant = type(layer.lora_variant.get(adapter_name)).__name__
    if adapter_name in layer.lora_variant and variant not in _ACCEPTED_VARIANTS:
        _refuse(f"the LoRA variant {variant}", name, _RETRAIN)
    if layer.merged:
        _refuse("a merged adapter", name, "Call model.unmerge_adapter() first")
    for side in (layer.lora_A, layer.lora_B):
        _check_parameter(name, side[adapter_name].weight)
    if getattr(layer, "_is_fsdp_managed_module", False):  # its parameters are whole after a forward pass, to be read
        _refuse("a module under FSDP2", name, _FILE_LEVEL)
    if hasattr(layer, "_tp_info") or getattr(layer.get_base_layer(), "_hf_tp_plan", None):
        _refuse("tensor parallelism", name, _FILE_LEVEL)
    _check_scale(name, layer, adapter_name, rank_and_scale)


def _check_parameter(name: str, weight: Any) -> None:
    if hasattr(weight, "placements"):
        _refuse("a sharded parameter (DTensor: FSDP2 or tensor parallelism)", name, _FILE_LEVEL)
    if hasattr(weight, "ds_id") or weight.numel() == 0:
        _refuse("a partitioned parameter (DeepSpeed ZeRO-3 or FSDP)", name, _FILE_LEVEL)
    if weight.is_meta:
        _refuse("a factor without values (on the meta device)", name, _KEEP_VALUES)
    if weight.ndim != 2:
        _refuse(f"a LoRA factor of shape {tuple(weight.shape)} (flattened by FSDP?)", name, _FILE_LEVEL)


def _check_scale(name: str, layer: LoraLayer, adapter_name: str, rank_and_scale: tuple[int, float]) -> None:
    rank, scale = rank_and_scale
    found = layer.scaling[adapter_name]
    if layer.r[adapter_name] != rank or not math.isclose(found, scale, rel_tol=1e-6):
        _refuse(
            f"a rank and scale ({layer.r[adapter_name]}, {found:g}) other than the config's ({rank}, {scale:g})",
            name,
            "Undo set_scale or scale_layer with layer.unscale_layer() first",
        )


def _check_not_aliased(model: nn.Module, adapter_name: str) -> None:
    owner: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parts = name.split(".")
        if adapter_name not in parts or not any(part.startswith("lora_") for part in parts):
            continue
        first = owner.setdefault(parameter.data_ptr(), name)
        if first != name:
            _refuse("a LoRA factor shared by two modules", f"{_base_name(first)} and {_base_name(name)}", _UNTIE)


def _store(linear: Any, new: Tensor) -> None:
    if linear.weight.shape == new.shape:
        linear.weight.data.copy_(new)
        return
    linear.weight = nn.Parameter(new, requires_grad=linear.weight.requires_grad)
    linear.out_features, linear.in_features = new.shape


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
            _refuse("a LoRA factor tied to the embedding's", name, _UNTIE)


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
