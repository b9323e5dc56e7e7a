"""The LoRA adapter of a model in memory: read, checked, and written all or nothing."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .adapters import (
    FILE_LEVEL,
    RETRAIN,
    UNTIE,
    Adapter,
    adapter_info,
    at_rank,
    base_name,
    check_config,
    check_outside,
    check_peft_type,
    divides,
    fit_factors,
    lookup,
    natural_order,
    pair_keys,
    rank_and_scale_of,
    refuse,
    require_known,
)
from .errors import UnsupportedAdapterError
from .lowrank import LowRank
from .offloading import bring_in

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

_KEEP_VALUES = (
    "PEFT loses them where the base was offloaded before: load the adapter with PeftModel.from_pretrained(base, "
    "ADAPTER, device_map=..., offload_folder=...) on a base that was loaded with a device_map, offload the model "
    "after the adapter was put on it, or realign its files: `peft-nlsr realign ADAPTER --patch PATCH -o OUT`"
)
_REFUSED_LAYERS = {
    "_ConvNd": ("LoRA of a convolution", "Train it without convolutions in target_modules"),
    "MultiheadAttention": ("LoRA of nn.MultiheadAttention in a live model", FILE_LEVEL),
}
_ACCEPTED_VARIANTS = frozenset({"ALoraLinearVariant", "VeloraLinearVariant", "MontecloraLinearVariant"})


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
        check_peft_type(config)
        layers = _lora_layers(self.model, self._name)
        self.layers = self._modules = {name: layers[name] for name in sorted(layers, key=natural_order)}
        check_config(config, self.layers)
        for name, layer in self.layers.items():
            _check_layer(name, layer, self._name, rank_and_scale_of(config, name))
        _check_not_aliased(self.model, self._name)
        self.info = adapter_info(self._name, config, self._cross_check())

    def _cross_check(self) -> tuple[str, ...]:
        from peft import get_peft_model_state_dict

        # save_embedding_layers=False: the default asks the Hub whether the vocabulary was resized.
        keys = get_peft_model_state_dict(self.model, adapter_name=self._name, save_embedding_layers=False)
        pairs, outside = pair_keys(keys, f"adapter {self._name}")
        if set(pairs) != set(self.layers):
            where = ", ".join(sorted(set(pairs) ^ set(self.layers)))
            refuse("LoRA that PEFT would not save under its module's name", where, "Unwrap the modules around it")
        check_outside(outside)
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
        require_known(changed, self)
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
        if len(ratios) == 1 and len(updates) == len(self) and divides(self.info.config, max(ratios)):
            return ratios.pop()
        return Fraction(math.ceil(max([*ratios, Fraction(1)])))

    def _fit(self, name: str, update: LowRank | None, config: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        A, B = (linear.weight for linear in self._linears(name))
        new = fit_factors(
            name,
            self[name] if update is None else update,
            rank_and_scale_of(config, name),
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
            layer.r[self._name], layer.scaling[self._name] = rank_and_scale_of(config, name)
            layer.lora_alpha[self._name] = lookup(config, "alpha_pattern", "lora_alpha", name)
        self.info = dataclasses.replace(self.info, config=config)


def _unwrap(model: nn.Module) -> nn.Module:
    from accelerate.utils import extract_model_from_parallel
    from peft import PeftMixedModel

    unwrapped = extract_model_from_parallel(model, keep_torch_compile=False)
    if isinstance(unwrapped, PeftMixedModel):
        refuse("PeftMixedModel", "the whole model", "Load the LoRA adapter alone, with PeftModel.from_pretrained")
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
        base_name(name): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and adapter_name in module.lora_A
    }


def _check_layer(name: str, layer: LoraLayer, adapter_name: str, rank_and_scale: tuple[int, float]) -> None:
    for cls in type(layer).__mro__:
        if cls.__name__ in _REFUSED_LAYERS:
            feature, advice = _REFUSED_LAYERS[cls.__name__]
            refuse(feature, name, advice)
    variant = type(layer.lora_variant.get(adapter_name)).__name__
    if adapter_name in layer.lora_variant and variant not in _ACCEPTED_VARIANTS:
        refuse(f"the LoRA variant {variant}", name, RETRAIN)
    if layer.merged:
        refuse("a merged adapter", name, "Call model.unmerge_adapter() first")
    for side in (layer.lora_A, layer.lora_B):
        _check_parameter(name, side[adapter_name].weight)
    if getattr(layer, "_is_fsdp_managed_module", False):  # its parameters are whole after a forward pass, to be read
        refuse("a module under FSDP2", name, FILE_LEVEL)
    if hasattr(layer, "_tp_info") or getattr(layer.get_base_layer(), "_hf_tp_plan", None):
        refuse("tensor parallelism", name, FILE_LEVEL)
    _check_scale(name, layer, adapter_name, rank_and_scale)


def _check_parameter(name: str, weight: Any) -> None:
    if hasattr(weight, "placements"):
        refuse("a sharded parameter (DTensor: FSDP2 or tensor parallelism)", name, FILE_LEVEL)
    if hasattr(weight, "ds_id") or weight.numel() == 0:
        refuse("a partitioned parameter (DeepSpeed ZeRO-3 or FSDP)", name, FILE_LEVEL)
    if weight.is_meta:
        refuse("a factor without values (on the meta device)", name, _KEEP_VALUES)
    if weight.ndim != 2:
        refuse(f"a LoRA factor of shape {tuple(weight.shape)} (flattened by FSDP?)", name, FILE_LEVEL)


def _check_scale(name: str, layer: LoraLayer, adapter_name: str, rank_and_scale: tuple[int, float]) -> None:
    rank, scale = rank_and_scale
    found = layer.scaling[adapter_name]
    if layer.r[adapter_name] != rank or not math.isclose(found, scale, rel_tol=1e-6):
        refuse(
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
            refuse("a LoRA factor shared by two modules", f"{base_name(first)} and {base_name(name)}", UNTIE)


def _store(linear: Any, new: Tensor) -> None:
    if linear.weight.shape == new.shape:
        linear.weight.data.copy_(new)
        return
    linear.weight = nn.Parameter(new, requires_grad=linear.weight.requires_grad)
    linear.out_features, linear.in_features = new.shape
