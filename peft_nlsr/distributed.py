"""Realignment of a model that is spread over processes: replicas share the work, else rank 0 does it; all ranks write.

Under DDP each rank has a replica; FSDP2 and ZeRO-3 parameters are gathered one by one into a plain copy on rank 0.
Every function here is called by all ranks together. What stops a write on one rank, an interrupt included, undoes it
on all.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, distribute_tensor

from .errors import IncompatibleError, PeftNLSRError, UnsupportedAdapterError
from .generation import model_digest
from .live_adapter import LiveAdapter
from .lowrank import LowRank, fingerprint
from .processes import Attempt, computed_by_rank_zero, from_all_ranks, on_every_rank, rank, world_size
from .ranks import ALONE, Ranks

logger = logging.getLogger(__name__)

T = TypeVar("T")

_FILE_LEVEL = (
    "Save the adapter with trainer.save_model(ADAPTER) and realign its files instead: "
    "`peft-nlsr realign ADAPTER --patch PATCH -o OUT`"
)
# What FSDP2, DeepSpeed and torch.compile leave on modules under these names leads back to the live model.
_LEFT_BEHIND = (
    "_is_fsdp_managed_module",
    "_fsdp_use_orig_params",
    "__composable_api",
    "ds_",
    "_original_parameters",
    "_external_params",
    "_compiled_call_impl",
)
_SHARDING = ("torch.distributed", "torch._C._distributed", "deepspeed")


def on_rank_zero(model: nn.Module, work: Callable[[Any], T], *, adapter_name: str | None = None) -> T:
    """What ``work`` makes of the whole model on rank 0, returned by every rank.

    On one process and under DDP or ZeRO-1/2, ``work`` gets the unwrapped live model of rank 0. Under FSDP2 and ZeRO-3
    it gets an un-sharded copy on the CPU, equal in class, config, adapters, dtypes, buffers and modes; rank 0 needs
    the memory of one full model, the other ranks that of one parameter. ``work`` may move the copy to an accelerator,
    and should where it fits: launchers leave one CPU thread to each process.

    Args:
        model: the model as the trainer has it, wrapped or not.
        work: runs on rank 0 only, so it must use no collectives and leave a live model as it was; it may take longer
            than the group's timeout. What it returns is pickled, its tensors sent one by one: over several processes
            they come back on the CPU.
        adapter_name: the adapter that must be fit for realignment; the active one when None.

    Raises:
        UnsupportedAdapterError: see :func:`refuse_unsupported` and LiveAdapter.
        Exception: whatever ``work`` raised, on every rank; one that cannot be sent is a PeftNLSRError elsewhere.
    """
    bare = _prepared(model)
    readable = _readable(bare)
    on_every_rank(lambda: LiveAdapter(readable, adapter_name))
    whole = bare if readable is bare else _plain_copy(bare, lambda _: True, on_this_rank=rank() == 0)
    return computed_by_rank_zero(lambda: work(whole))


def on_replicas(model: nn.Module, work: Callable[[Any, Ranks], T], *, adapter_name: str | None = None) -> T:
    """What ``work`` makes of the whole model, by all ranks together where each of them has the same, else by rank 0.

    Args:
        model: the model as the trainer has it, wrapped or not.
        work: gets the unwrapped live model of its rank and all ranks (DDP, ZeRO-1/2, one process), whose methods it
            may use; or the model that :func:`on_rank_zero` gives, and ``ALONE`` (FSDP2, ZeRO-3, replicas that differ).
        adapter_name: the adapter that must be fit for realignment; the active one when None.

    Raises:
        UnsupportedAdapterError: see :func:`refuse_unsupported` and LiveAdapter.
        Exception: whatever ``work`` raised on any rank, on every rank.
    """
    bare = _prepared(model)
    by_first: Callable[[], T] = partial(
        on_rank_zero, model, lambda whole: work(whole, ALONE), adapter_name=adapter_name
    )
    if world_size() == 1 or _is_sharded(bare):
        return by_first()
    ranks = Ranks.launched()
    with ranks.together():
        LiveAdapter(bare, adapter_name)
        if len(set(ranks.gather(model_digest(bare)))) == 1:
            return work(bare, ranks)
    if ranks.number == 0:
        logger.warning("the replicas differ between ranks, so rank 0 works alone")
    return by_first()


def write_updates(
    model: nn.Module,
    updates: Mapping[str, LowRank],
    *,
    adapter_name: str | None = None,
    optimizer: Any = None,
) -> None:
    """Put updates into the live model on every rank: all of them, or none when one does not fit on some rank.

    Parameters keep their identity. Values are those of ``LiveAdapter.write``: at the layer's scale, padded, cast.
    When anything, an interrupt included, stops the writing on some rank, every rank puts its old values back and
    raises that. A rank that dies leaves the others with their old values too, once they notice. Not put back are
    partitions that ZeRO-3 keeps on NVMe.

    Args:
        model: the model as the trainer has it, wrapped or not.
        updates: module -> new update, the same on every rank.
        adapter_name: which adapter; the active one when None.
        optimizer: the trainer's optimizer. DeepSpeed trains a float32 master copy, which would undo the patch at its
            next step and is refreshed from the written weights; needed where the parameters do not lead to it.

    Raises:
        IncompatibleError: an unknown module, a wrong shape, updates that differ between ranks, or a larger rank on
            parameters that DeepSpeed or FSDP2 holds.
        PeftNLSRError: DeepSpeed holds master copies that cannot be reached.
    """
    bare = _prepared(model)
    plain = _readable(bare)
    zero = on_every_rank(lambda: _zero_optimizer(bare, optimizer))
    fixed = zero is not None or plain is not bare
    fitted = on_every_rank(lambda: _fitted(LiveAdapter(plain, adapter_name), updates, fixed=fixed))
    if len(set(from_all_ranks(fingerprint(updates)))) > 1:
        raise IncompatibleError(
            "the updates differ between ranks, which would make the replicas diverge; compute them once, with "
            "on_rank_zero"
        )
    refresh: Callable[[], None] = (lambda: None) if zero is None else zero.refresh_fp32_params
    try:
        if plain is bare:
            _write_whole(LiveAdapter(bare, adapter_name), updates, then=refresh)
        else:
            new = [(p, fitted[name]) for name, p in bare.named_parameters() if name in fitted]
            _write_shards(new, then=refresh)
    except BaseException:
        refresh()
        raise


def gathered_factors(model: nn.Module, adapter_name: str | None = None) -> dict[str, LowRank]:
    """Copies of an adapter's factors on the CPU of every rank, bit for bit in their dtype, gathered where sharded."""
    bare = _prepared(model)
    plain = _readable(bare)
    return on_every_rank(lambda: LiveAdapter(plain, adapter_name).snapshot())


def refuse_unsupported(model: nn.Module) -> None:
    """Raise UnsupportedAdapterError for a model that cannot be realigned where it is, with the command for its files.

    FSDP1, tensor parallelism, Megatron, and quantised base weights under FSDP2 or ZeRO-3.
    """
    found = next(filter(None, map(_unsupported_module, model.modules())), None)
    bare = extract_model_from_parallel(model, keep_torch_compile=False)
    if found is None and _is_sharded(bare):
        found = _unsupported_sharding(bare)
    if found is not None:
        raise UnsupportedAdapterError(f"{found} cannot be realigned in memory. {_FILE_LEVEL}")


def _unsupported_module(module: nn.Module) -> str | None:
    origin = type(module).__module__
    if isinstance(module, FullyShardedDataParallel):
        return "a model under FSDP1 (flattened parameters; FSDP2 is supported: fsdp_version 2)"
    if origin.startswith(("megatron.", "deepspeed.module_inject", "deepspeed.runtime.pipe")):
        return f"a model with {type(module).__name__} of {origin.split('.')[0]} (tensor or pipeline parallel)"
    if getattr(module, "_tp_size", None) or hasattr(module, "_tp_info") or getattr(module, "_hf_tp_plan", None):
        return "a model under tensor parallelism"
    return None


def _unsupported_sharding(bare: Any) -> str | None:
    shards = [p for p in bare.parameters() if isinstance(p, DTensor)]
    if any("tp" in (p.device_mesh.mesh_dim_names or ()) for p in shards):
        return "a model under tensor parallelism"
    if shards and not any(isinstance(module, FSDPModule) for module in bare.modules()):
        return "a model of DTensors that are not FSDP2's (tensor parallelism)"
    config = getattr(bare, "config", None)
    if getattr(config, "quantization_config", None) or not all(p.is_floating_point() for p in bare.parameters()):
        return "a quantised base model in shards (FSDP2 or ZeRO-3)"
    return None


def _prepared(model: nn.Module) -> Any:
    """The unwrapped model with its FSDP2 parameters in shards; an evaluation leaves whole copies in their place."""
    on_every_rank(lambda: refuse_unsupported(model))
    bare = extract_model_from_parallel(model, keep_torch_compile=False)
    for module in bare.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return bare


def _is_sharded(bare: nn.Module) -> bool:
    return any(isinstance(p, DTensor) or _in_zero3(p) for p in bare.parameters()) or any(
        isinstance(module, FSDPModule) for module in bare.modules()
    )


def _in_zero3(parameter: Tensor) -> bool:
    return hasattr(parameter, "ds_id")


def _is_lora(name: str) -> bool:
    return any(part.startswith("lora_") for part in name.split("."))


def _readable(bare: nn.Module) -> nn.Module:
    """The model itself when its parameters are whole, else a copy whose LoRA factors are, on every rank."""
    return _plain_copy(bare, _is_lora, on_this_rank=True) if _is_sharded(bare) else bare


def _plain_copy(bare: nn.Module, wanted: Callable[[str], bool], *, on_this_rank: bool) -> Any:
    """A copy with the wanted parameters on the CPU and all others on the meta device; None on the other ranks.

    All ranks take part in gathering, whether or not they keep anything.
    """
    attempt = Attempt()
    copies: dict[int, Any] = {}
    for name, parameter in bare.named_parameters():
        if wanted(name):
            with _whole(parameter) as full:
                if on_this_rank:
                    copies[id(parameter)] = attempt.make(partial(_on_cpu, parameter, full))
        elif on_this_rank:
            copies[id(parameter)] = _on_meta(parameter)
    plain = attempt.make(lambda: _rebuilt(bare, copies)) if on_this_rank else None
    attempt.settle()
    return plain


@contextmanager
def _whole(parameter: Any) -> Iterator[Tensor]:
    """All values of a parameter; every rank must enter and leave together."""
    if _in_zero3(parameter):
        from deepspeed import zero

        with zero.GatheredParameters([parameter]):
            yield parameter.data
    elif isinstance(parameter, DTensor):
        # Offloaded shards are on the CPU, where their mesh may have no backend.
        shards: Any = parameter.detach().to(parameter.device_mesh.device_type)
        yield shards.full_tensor()
    else:
        yield parameter.detach()


def _on_cpu(parameter: Tensor, full: Tensor) -> nn.Parameter:
    return nn.Parameter(full.detach().to("cpu", copy=True), requires_grad=parameter.requires_grad)


def _on_meta(parameter: Tensor) -> nn.Parameter:
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return nn.Parameter(torch.empty(shape, dtype=parameter.dtype, device="meta"), parameter.requires_grad)


def _rebuilt(bare: nn.Module, copies: dict[int, Any]) -> nn.Module:
    """The module tree once more, around copies of its parameters, without what sharding attached to it.

    Every module is entered into deepcopy's memo first, so whatever refers to a module refers to its copy afterwards.
    FSDP2 forbids deepcopy of the modules themselves.
    """
    modules = list(bare.modules())
    memo = dict(copies)
    memo.update({id(module): object.__new__(_plain_class(module)) for module in modules})
    for module in modules:
        for value in (*module._buffers.values(), *vars(module).values()):
            if isinstance(value, Tensor):
                memo.setdefault(id(value), value.detach().to("cpu", copy=True))
        for hook in (hook for _, hooks in _hook_tables(module) for hook in hooks.values()):
            if id(getattr(hook, "__self__", None)) not in memo:
                memo[id(hook)] = hook  # it may belong to a trainer, which is not to be copied
    for module in modules:
        vars(memo[id(module)]).update(copy.deepcopy(_plain_attributes(module), memo))
    return memo[id(bare)]


def _plain_class(module: nn.Module) -> type:
    """The class before FSDP2 put its own in front."""
    return next(cls for cls in type(module).__mro__ if not issubclass(cls, FSDPModule))


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    checkpointing = _plain_class(module).__module__.startswith(_SHARDING)  # a wrapper that needs what it holds
    kept = {
        name: value
        for name, value in vars(module).items()
        if not name.startswith(_LEFT_BEHIND) and (checkpointing or not _is_of_sharding(value))
    }
    for name, hooks in _hook_tables(module):
        kept[name] = type(hooks)((key, hook) for key, hook in hooks.items() if not _is_of_sharding(hook))
    return {**kept, "_parameters": dict(module._parameters.items())}  # ZeRO-3 has a dictionary of its own


def _hook_tables(module: nn.Module) -> Iterator[tuple[str, dict[int, Any]]]:
    return ((n, v) for n, v in vars(module).items() if n.endswith("_hooks") and isinstance(v, dict))


def _is_of_sharding(value: Any) -> bool:
    """Whether torch.distributed or DeepSpeed defined the object, or the function behind the method or hook."""
    function = getattr(value, "__func__", value)
    defined_in = getattr(function, "__globals__", {}).get("__name__", "")
    return any(str(where).startswith(_SHARDING) for where in (defined_in, getattr(value, "__module__", "")))


def _fitted(adapter: LiveAdapter, updates: Mapping[str, LowRank], *, fixed: bool) -> dict[str, Tensor]:
    """The new value of each parameter that the updates change, by the parameter's name."""
    new: dict[int, Tensor] = {}
    chosen = adapter.info.adapter_name
    for module, factors in adapter.fitted(updates).items():
        layer = adapter.layers[module]
        for side, factor in zip((layer.lora_A, layer.lora_B), factors, strict=True):
            weight: Any = side[chosen].weight
            if fixed and weight.shape != factor.shape:
                raise IncompatibleError(
                    f"{module} would need a factor of shape {tuple(factor.shape)} in place of {tuple(weight.shape)}, "
                    f"but FSDP2 and DeepSpeed cannot change the shape of a parameter. Use compress=True. {_FILE_LEVEL}"
                )
            new[id(weight)] = factor
    return {name: new[id(p)] for name, p in adapter.model.named_parameters() if id(p) in new}


def _write_whole(adapter: LiveAdapter, updates: Mapping[str, LowRank], *, then: Callable[[], None]) -> None:
    """Write to a replica; between the ranks there is one step only, in which they agree."""
    attempt = Attempt()
    with adapter.undone_on_failure(adapter):
        attempt.make(lambda: adapter.write(updates))
        attempt.make(then)
        attempt.settle()


def _write_shards(new: Sequence[tuple[Any, Tensor]], *, then: Callable[[], None]) -> None:
    """Put whole values into sharded parameters, in place; rank 0's values count.

    All steps between the ranks are taken before the first value is written, or after the last one (ZeRO-3's own are
    around it), so that a rank that fails in between takes part in them all the same.
    """
    attempt = Attempt()
    partitioned = [(p, values) for p, values in new if _in_zero3(p)]
    with torch.no_grad(), _shards_undone_on_failure([p for p, _ in new]):
        here = [(_held_here(p), _own_shard(p, values)) for p, values in new if not _in_zero3(p)]
        attempt.make(partial(_put, here))
        if partitioned:
            from deepspeed import zero

            with zero.GatheredParameters([p for p, _ in partitioned], modifier_rank=0):
                if rank() == 0:
                    attempt.make(partial(_put, [(p.data, values) for p, values in partitioned]))
        attempt.make(then)
        attempt.settle()


def _own_shard(parameter: Any, values: Tensor) -> Any:
    if not isinstance(parameter, DTensor):
        return values
    mesh = parameter.device_mesh
    return distribute_tensor(values.detach().to(mesh.device_type), mesh, parameter.placements).to_local()


def _put(new: Sequence[tuple[Tensor, Tensor]]) -> None:
    for held, values in new:
        held.copy_(values)


@contextmanager
def _shards_undone_on_failure(parameters: Sequence[Any]) -> Iterator[None]:
    """Put this rank's shards back when anything stops the writing; no other rank is needed for that."""
    before = [_held_here(parameter).clone() for parameter in parameters]
    try:
        yield
    except BaseException:
        for parameter, values in zip(parameters, before, strict=True):
            if _in_zero3(parameter):
                parameter.partition()  # lets go of values that may still be gathered
            _held_here(parameter).copy_(values)
        raise


def _held_here(parameter: Any) -> Tensor:
    """What this rank holds of a sharded parameter, or all of one that is whole."""
    if _in_zero3(parameter):
        return parameter.ds_tensor.data
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter.data


def _zero_optimizer(bare: nn.Module, optimizer: Any) -> Any:
    """DeepSpeed's optimizer with float32 master copies, found from the argument or the parameters; None without."""
    while optimizer is not None and not hasattr(optimizer, "refresh_fp32_params"):
        optimizer = getattr(optimizer, "optimizer", None)
    if optimizer is not None:
        return optimizer
    parameters = list(bare.parameters())
    found = next((p._z3_optimizer for p in parameters if hasattr(p, "_z3_optimizer")), None)
    if found is None and any(hasattr(p, "_hp_mapping") for p in parameters):
        raise PeftNLSRError(
            "DeepSpeed holds float32 master copies of these parameters, which would undo the patch at the next step; "
            "pass the trainer's optimizer as optimizer=..."
        )
    return found
