"""LoRA adapters as mappings ``module name -> LowRank``, the same for a live model and for files.

This file knows what PEFT's config and key names mean, `live_adapter` its modules, `adapter_folder` its files. Nothing
is skipped in silence: what is trained but is not a LoRA pair is listed in ``info.outside``, and a feature whose update
is not ``scale * B @ A`` on a plain base is refused. PEFT is imported where it is needed, because realigning files does
without it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .errors import CorruptFileError, IncompatibleError, UnsupportedAdapterError
from .hub import is_hub_id
from .lowrank import LowRank, zero_like
from .storage import require_finite

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_A_SUFFIX, _B_SUFFIX = ".lora_A.weight", ".lora_B.weight"
_COMPANION_SUFFIXES = (".lora_embedding_A", ".lora_embedding_B", ".lora_B.bias")
_COMPANION_PARTS = frozenset({"lora_monteclora_sampler", "lora_velora_embed"})
FILE_LEVEL = "Save the adapter and realign the files instead: `peft-nlsr realign ADAPTER --patch PATCH -o OUT`"
RETRAIN = "Convert it to plain LoRA (`peft.convert_to_lora`) or train it without this option"
_EXPORT = (
    "It changed the base weights; export it as plain LoRA first, with `save_pretrained(..., "
    "path_initial_model_for_weight_conversion=...)`"
)
UNTIE = "Train it without ensure_weight_tying, and with one LoRA layer per module"
_REFUSED_OPTIONS = {
    "use_dora": ("DoRA", RETRAIN),
    "use_qalora": ("QA-LoRA", RETRAIN),
    "use_bdlora": ("BD-LoRA", RETRAIN),
    "kasa_config": ("KaSA", RETRAIN),
    "arrow_config": ("Arrow", "Realign the adapters that it routes to, one by one"),
    "target_parameters": ("target_parameters (ParamWrapper)", "Train it with target_modules instead"),
    "megatron_config": ("Megatron parallelism", FILE_LEVEL),
}
_REFUSED_INITS = {
    "pissa": ("PiSSA", _EXPORT),
    "olora": ("OLoRA", _EXPORT),
    "corda": ("CorDA", _EXPORT),
    "loftq": ("LoftQ", _EXPORT),
    "lora_ga": ("LoRA-GA", _EXPORT),
    "mica": ("MiCA", RETRAIN),
}


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
        return rank_and_scale_of(self.info.config, name)


def refuse(feature: str, where: str, advice: str) -> NoReturn:
    raise UnsupportedAdapterError(f"{feature} is not supported (in {where}). {advice}.")


def factor_keys(module: str) -> tuple[str, str]:
    """The names under which PEFT saves a module's A and B."""
    return f"{_PREFIX}{module}{_A_SUFFIX}", f"{_PREFIX}{module}{_B_SUFFIX}"


def natural_order(name: str) -> list[int | str]:
    """A sort key that puts ``layers.10`` after ``layers.9``."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def base_name(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS).removeprefix(_PREFIX)


def adapter_info(adapter_name: str, config: dict[str, Any], outside: tuple[str, ...]) -> AdapterInfo:
    base = config.get("base_model_name_or_path")
    return AdapterInfo(adapter_name, base if is_hub_id(base) else None, config.get("revision"), config, outside)


def pair_keys(keys: Iterable[str], where: str) -> tuple[dict[str, tuple[str, str]], tuple[str, ...]]:
    """The keys of A and B of each module, and the names of everything else."""
    a_keys: dict[str, str] = {}
    b_keys: dict[str, str] = {}
    outside = []
    for key in keys:
        name = base_name(key)
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


def check_outside(outside: Iterable[str]) -> None:
    for name in outside:
        parts = [part for part in name.split(".") if part.startswith("lora_")]
        if parts and not name.endswith(_COMPANION_SUFFIXES) and not _COMPANION_PARTS.intersection(parts):
            refuse(f"the LoRA tensor {parts[0]}", name, RETRAIN)


def check_peft_type(config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        refuse(f"peft_type {config.get('peft_type')}", "the whole adapter", "Only LORA adapters can be realigned")


def check_config(config: Mapping[str, Any], modules: Mapping[str, Any]) -> None:
    if not modules:
        refuse("an adapter without a LoRA pair of a linear layer", "the whole adapter", "There is nothing to realign")
    _check_numbers(config, modules)
    where = f"{next(iter(modules))} and {len(modules) - 1} more"
    for option, (feature, advice) in _REFUSED_OPTIONS.items():
        if config.get(option):
            refuse(feature, where, advice)
    init = str(config.get("init_lora_weights")).lower()
    for start, (feature, advice) in _REFUSED_INITS.items():
        if init.startswith(start):
            refuse(f"{feature} initialisation", where, advice)


def _check_numbers(config: Mapping[str, Any], modules: Iterable[str]) -> None:
    """Raise CorruptFileError where a rank or an alpha, a module's own included, is no number that can be one.

    Pattern entries of no module have no effect and may be anything, as in PEFT.
    """
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key) or {}, dict):
            _wrong_number(f"{key} is", config[key], "an object from modules to numbers")
    for key, pattern_key, whole in (("r", "rank_pattern", True), ("lora_alpha", "alpha_pattern", False)):
        of_modules = {f"{pattern_key}.{name}": value for name, value in _used(config, pattern_key, modules).items()}
        for place, value in {key: config[key], **of_modules}.items():
            if not _is_number(value, whole=whole) or (whole and value < 1):
                said = f"{place} gives {'rank' if whole else 'alpha'}"
                _wrong_number(said, value, "a whole number above 0" if whole else "a finite number")


def _used(config: Mapping[str, Any], pattern_key: str, modules: Iterable[str]) -> dict[str, Any]:
    """The entries of a pattern that some module resolves to."""
    patterns: dict[str, Any] = config.get(pattern_key) or {}
    matched = {_pattern_of(patterns, name) for name in modules} if patterns else set()
    return {name: value for name, value in patterns.items() if name in matched}


def _pattern_of(patterns: Mapping[str, Any], name: str) -> str:
    from peft.utils.other import get_pattern_key

    return str(get_pattern_key(list(patterns), name))


def _is_number(value: Any, *, whole: bool) -> bool:
    kind = int if whole else int | float
    return isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)


def _wrong_number(said: str, found: Any, expected: str) -> NoReturn:
    raise CorruptFileError(f"{CONFIG_FILE}: {said} {found!r}, expected {expected}. Save the adapter again.")


def rank_and_scale_of(config: Mapping[str, Any], name: str) -> tuple[int, float]:
    rank = lookup(config, "rank_pattern", "r", name)
    alpha = lookup(config, "alpha_pattern", "lora_alpha", name)
    return rank, alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def lookup(config: Mapping[str, Any], pattern_key: str, default_key: str, name: str) -> Any:
    patterns = config.get(pattern_key)
    if not patterns:
        return config[default_key]
    return patterns.get(_pattern_of(patterns, name), config[default_key])


def divides(config: Mapping[str, Any], factor: Fraction) -> bool:
    ranks = [n for n in (config["r"], *(config.get("rank_pattern") or {}).values()) if _is_number(n, whole=True)]
    return factor > 0 and all((rank * factor).denominator == 1 for rank in ranks)


def at_rank(config: dict[str, Any], factor: Fraction) -> dict[str, Any]:
    """The config with every rank and alpha multiplied: the same scales, or with rsLoRA larger by ``sqrt(factor)``."""
    if factor == 1:
        return config
    if config.get("monteclora_config"):
        refuse(
            "a change of rank with MonteCLoRA, whose sampler has the rank,", "the whole adapter", "Compress instead"
        )

    def times(number: Any) -> Any:
        if not _is_number(number, whole=False):
            return number
        product = Fraction(number) * factor
        return int(product) if product.denominator == 1 else float(product)

    patterns = {
        key: {name: times(value) for name, value in (config.get(key) or {}).items()}
        for key in ("rank_pattern", "alpha_pattern")
    }
    return {**config, **patterns, "r": times(config["r"]), "lora_alpha": times(config["lora_alpha"])}


def require_known(changed: Mapping[str, LowRank], adapter: Adapter) -> None:
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
