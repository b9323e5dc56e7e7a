"""Runs the blocks of a decoder one at a time, so that only hidden states between blocks are ever stored.

A model is treated as a plain chain: each block maps the hidden state that the previous one returned, with the other
arguments (masks, position embeddings) of an ordinary forward pass. The first batch proves that this holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .errors import IncompatibleError, UnsupportedAdapterError
from .live_adapter import LiveAdapter
from .lowrank import LowRank

Factors = Mapping[str, LowRank] | None


class _Stop(Exception):
    """Ends a forward pass early; never leaves this file."""


@dataclass
class BlockInputs:
    """What one batch feeds the chain.

    Attributes:
        hidden: input of the first block ``(n, tokens, d)``.
        arguments: per block the other positional and keyword arguments.
        inputs: per block the hidden state that it really received; kept for the proof of the chain only.
    """

    hidden: Any = None
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)


def find_blocks(adapter: LiveAdapter) -> list[tuple[str, nn.Module]]:
    """The model's blocks in order, as ``(name, module)``: the module list that holds most of the LoRA modules.

    Raises:
        UnsupportedAdapterError: no such list, or an encoder-decoder model.
    """
    model = adapter.model
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise UnsupportedAdapterError(
            f"{type(model).__name__} is an encoder-decoder model, whose blocks are not one chain; use update='sum' "
            "with a "
            "patch, or least_squares_form='one_shot'"
        )
    layers = {id(layer) for layer in adapter.layers.values()}
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 0]
    counted = [(sum(id(s) in layers for s in m.modules()), name, m) for name, m in lists]
    most = max((c for c in counted if c[0] > 0), key=lambda c: (c[0], -len(c[1])), default=None)
    if most is None:
        raise UnsupportedAdapterError(
            f"{type(model).__name__} has no list of blocks that holds LoRA modules; use update='sum' with a patch, or "
            "least_squares_form='one_shot'"
        )
    return [(f"{most[1]}.{i}", block) for i, block in enumerate(most[2])]


def capture(
    model: nn.Module, blocks: Sequence[nn.Module], batch: dict[str, Tensor], *, keep: bool = False
) -> BlockInputs:
    """Run the model up to its last block and note what each block receives (hidden states only with ``keep``)."""
    seen = BlockInputs()

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, rest = _split(args, kwargs)
        if seen.hidden is None:
            seen.hidden = hidden
        if keep:
            seen.inputs.append(hidden.clone())
        seen.arguments.append(rest)
        if len(seen.arguments) == len(blocks):
            raise _Stop

    handles = [block.register_forward_pre_hook(note, with_kwargs=True) for block in blocks]
    try:
        _forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _forward(model: nn.Module, batch: dict[str, Tensor]) -> None:
    try:
        model(**{key: batch[key] for key in ("input_ids", "attention_mask") if key in batch}, use_cache=False)
    except _Stop:
        pass


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[tuple[Any, ...], dict[str, Any]]]:
    if args:
        return args[0], (args[1:], kwargs)
    return kwargs["hidden_states"], ((), {k: v for k, v in kwargs.items() if k != "hidden_states"})


def run_block(block: nn.Module, hidden: Tensor, arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> Tensor:
    """The hidden state after the block."""
    return _first(block(hidden, *arguments[0], **arguments[1]))


def _first(values: Any) -> Any:
    """What a block returns, or a hook is given, may be a tuple that begins with the tensor."""
    return values[0] if isinstance(values, tuple) else values


def prove_chain(model: nn.Module, blocks: Sequence[nn.Module], batch: dict[str, Tensor]) -> None:
    """Check on one batch that running block after block gives the hidden states of an ordinary forward pass.

    Raises:
        UnsupportedAdapterError: it does not, so the blocks exchange more than their hidden state.
    """
    seen = capture(model, blocks, batch, keep=True)
    same = len(seen.inputs) == len(blocks)
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    for block, hidden, wanted, arguments in zip(blocks, seen.inputs, seen.inputs[1:], seen.arguments, strict=False):
        difference = (run_block(block, hidden, arguments) - wanted)[mask].norm()
        same = same and bool(difference <= 1e-2 * wanted[mask].norm())
    if not same:
        raise UnsupportedAdapterError(
            f"the blocks of {type(model).__name__} are not a plain chain, so they cannot be solved one by one; use "
            "update='sum' with a patch, or least_squares_form='one_shot'"
        )


def groups_of(block: nn.Module, names: dict[int, str], hidden: Tensor, arguments: Any) -> list[list[str]]:
    """LoRA modules of a block in the order they run, those that read the same tensor together.

    Args:
        names: ``id(module) -> name`` of the LoRA modules.

    Raises:
        UnsupportedAdapterError: a module runs more than once, or not at all.
    """
    order: list[tuple[str, Tensor]] = []
    layers = [m for m in block.modules() if id(m) in names]
    handles = [m.register_forward_pre_hook(lambda m, a: order.append((names[id(m)], a[0]))) for m in layers]
    try:
        run_block(block, hidden, arguments)
    finally:
        for handle in handles:
            handle.remove()
    ran = [name for name, _ in order]
    for name in (names[id(m)] for m in layers):
        if ran.count(name) != 1:
            raise UnsupportedAdapterError(
                f"{name} ran {ran.count(name)} times in one pass of its block, expected once; leave it out of the "
                "adapter"
            )
    groups: list[list[str]] = []
    previous: Tensor | None = None
    for name, x in order:
        if x is previous:
            groups[-1].append(name)
        else:
            groups.append([name])
        previous = x
    return groups


class Place(NamedTuple):
    """Where a tensor of a pass is read: the input of a module, or its output."""

    module: nn.Module
    output: bool


@contextmanager
def _watched(places: Mapping[str, Place]) -> Iterator[dict[str, Tensor]]:
    """Collects the tensors at the places during the next passes; see :func:`run_until`."""
    seen: dict[str, Tensor] = {}

    def hook_for(name: str, place: Place) -> Any:
        def note(_: nn.Module, args: tuple[Any, ...], out: Any = None) -> None:
            seen[name] = _first(out if place.output else args)
            if len(seen) == len(places):
                raise _Stop

        return note

    handles = [
        (place.module.register_forward_hook if place.output else place.module.register_forward_pre_hook)(
            hook_for(name, place)
        )
        for name, place in places.items()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def run_until(places: Mapping[str, Place], block: nn.Module, hidden: Tensor, arguments: Any) -> dict[str, Tensor]:
    """The tensors at the places in one pass of the block, which ends once all have been seen.

    They come back on the device of ``hidden``; a block of a model that is spread over several may compute on another.
    """
    with _watched(places) as seen:
        try:
            run_block(block, hidden, arguments)
        except _Stop:
            pass
        return {name: tensor.to(hidden.device) for name, tensor in seen.items()}


def is_added_last(block: nn.Module, module: nn.Module, hidden: Tensor, arguments: Any, mask: Tensor) -> bool:
    """Whether a module's output is simply added to the hidden state that the block returns, as the output projection
    of the feed-forward layer is in most decoders.

    Found by moving the output, which must move the result by the same amount.

    Args:
        mask: tokens that are not padding, one value each.
    """
    before = run_until(
        {"out": Place(module, output=True), "after": Place(block, output=True)}, block, hidden, arguments
    )
    shift = before["after"].flip(-1)  # as large as the result, so that rounding stays small beside it
    if before["out"].shape[-1] != shift.shape[-1] or before["out"].numel() != shift.numel():
        return False

    def moved(_: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        return out + shift.reshape(out.shape).to(out)

    with module.register_forward_hook(moved):
        after = run_block(block, hidden, arguments).to(hidden.device)
    off = (after.float() - before["after"].float() - shift.float())[mask].norm()
    rounding = max(1e-4, 2.0 * torch.finfo(shift.dtype).eps)
    return bool(off <= rounding * shift.float()[mask].norm())


def rows_of(values: Tensor, counted: Tensor, name: str, *, instead: str) -> Tensor:
    """The rows of a module's inputs or outputs ``(..., tokens, d)`` whose token counts.

    Args:
        counted: which of the batch's tokens do, one value each.
        instead: what a user may do about a module that does not see each token once.

    Raises:
        UnsupportedAdapterError: tokens were routed or re-ordered on their way to the module.
    """
    flat = values.flatten(0, -2)
    if len(flat) != len(counted):
        raise UnsupportedAdapterError(
            f"{name} received {len(flat)} rows for {len(counted)} tokens (routed or re-ordered tokens); leave it out "
            f"of the adapter, or {instead}"
        )
    return flat[counted.to(flat.device)]


@contextmanager
def playing(adapter: LiveAdapter, names: Mapping[str, Any], factors: Factors) -> Iterator[None]:
    """Inside, the named modules compute with the given factors (None: with the adapter off); nothing is copied."""
    layers = [(name, adapter.layers[name]) for name in names]
    key = adapter.info.adapter_name
    kept = [(layer.lora_A[key].weight.data, layer.lora_B[key].weight.data) for _, layer in layers]
    try:
        for name, layer in layers:
            if factors is None:
                layer.enable_adapters(False)
            else:
                weights: tuple[Any, Any] = (layer.lora_A[key].weight, layer.lora_B[key].weight)
                update = factors[name]
                weights[0].data = update.A.to(weights[0].data)
                weights[1].data = (update.B * (update.scale / layer.scaling[key])).to(weights[1].data)
        yield
    finally:
        for (_, layer), (a, b) in zip(layers, kept, strict=True):
            if factors is None:
                layer.enable_adapters(True)
            layer.lora_A[key].weight.data, layer.lora_B[key].weight.data = a, b


def require_active(adapter: LiveAdapter) -> None:
    """Raise IncompatibleError unless the model computes with this adapter and with no other."""
    name = adapter.info.adapter_name
    for module, layer in adapter.layers.items():
        active = [] if layer.disable_adapters else list(layer.active_adapters)
        if active != [name]:
            raise IncompatibleError(
                f"the model computes with the adapters {active} in {module}, expected {name!r} alone; call "
                f"model.set_adapter({name!r}), outside of disable_adapter()"
            )


@contextmanager
def switched_off(adapter: LiveAdapter) -> Iterator[None]:
    """Inside, the model is its base: adapter and saved copies of base modules are out of the way."""
    model: Any = adapter.model
    if hasattr(model, "disable_adapter"):
        with model.disable_adapter():
            yield
        return
    model.disable_adapters()
    try:
        yield
    finally:
        model.enable_adapters()


@contextmanager
def as_teacher(adapter: LiveAdapter, factors: Factors) -> Iterator[None]:
    """Inside, the whole model computes with these factors; with None it is its base."""
    with switched_off(adapter) if factors is None else playing(adapter, adapter.layers, factors):
        yield
