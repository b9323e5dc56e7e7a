"""Models of which accelerate keeps parts on the CPU or on disk (``device_map``, ``cpu_offload``, ``disk_offload``).

Such a part's parameters are on the meta device, without values, except while its forward pass runs. Base weights are
left there and read through their hook; an adapter's own tensors, which are small and are changed, are brought in.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from accelerate.utils import align_module_device, has_offloaded_params, set_module_tensor_to_device
from torch import nn


def input_device(model: nn.Module) -> torch.device:
    """Where a model takes its inputs: the device on which the first of its modules that has parameters computes."""
    for module in model.modules():
        parameter = next(module.parameters(recurse=False), None)
        if parameter is not None:
            computes_on = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
            return parameter.device if computes_on is None else torch.device(computes_on)
    raise ValueError(f"{type(model).__name__} has no parameters")


def bring_in(module: nn.Module) -> None:
    """Put a module's own offloaded parameters where they are computed with, for good; others are left as they are."""
    if not has_offloaded_params(module):
        return
    hook: Any = module._hf_hook
    values = {name: hook.weights_map[name] for name, _ in module.named_parameters(recurse=False)}
    remove_hook_from_module(module)
    for name, value in values.items():
        set_module_tensor_to_device(module, name, hook.execution_device, value=value)
    add_hook_to_module(module, AlignDevicesHook(hook.execution_device))


@contextmanager
def at_hand(module: nn.Module) -> Iterator[None]:
    """Inside, a module's own offloaded parameters hold their values, on the device where they are computed with."""
    with torch.no_grad(), align_module_device(module):
        yield


@contextmanager
def held(module: nn.Module) -> Iterator[None]:
    """Inside, all offloaded parameters below a module are where they are computed with, so that passes fetch nothing.

    For work that runs one block many times: without it every pass of every batch brings the block in again.
    """
    offloaded: list[Any] = []
    try:
        for part in module.modules():
            if has_offloaded_params(part):
                hook: Any = part._hf_hook
                hook.pre_forward(part)
                hook.offload = False
                offloaded.append(part)
        yield
    finally:
        for part in offloaded:
            part._hf_hook.offload = True
            part._hf_hook.post_forward(part, None)
