"""Repair the safety alignment of a fine-tuned LoRA adapter, without training.

The public names are imported on first use, so that ``import peft_nlsr`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0.dev0"

_HOME = {
    "NLSRConfig": "config",
    "PeftNLSRError": "errors",
    "UnsupportedAdapterError": "errors",
    "IncompatibleError": "errors",
    "LineageError": "errors",
    "CorruptFileError": "errors",
    "CalibrationError": "errors",
    "LowRank": "lowrank",
    "builtin_prompts": "prompts",
    "refuses": "judges",
    "open_adapter": "adapters",
    "SafetyStatistics": "calibration",
    "collect_statistics": "calibration",
    "SafetyPatch": "patch",
    "Reference": "reference",
    "extrapolate": "reference",
    "build_nlsr_patch": "nlsr",
    "build_safety_patch": "building",
    "Realignment": "record",
    "versions": "record",
    "nlsr_realign": "realign",
    "plan": "realign",
    "apply": "realign",
    "realign_folder": "folders",
    "revert": "realign",
    "revert_folder": "folders",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
