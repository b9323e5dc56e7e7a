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
    "wilson": "intervals",
    "mcnemar": "intervals",
    "bootstrap_mean": "intervals",
    "student_mean": "intervals",
    "judge_name": "judges",
    "load_judge": "judges",
    "complies": "judges",
    "coherent": "judges",
    "classifier_judge": "judging",
    "beaver_dam_judge": "judging",
    "guard_judge": "judging",
    "PromptSet": "prompt_sets",
    "HubPrompts": "prompt_sets",
    "builtin_prompt_set": "prompt_sets",
    "load_prompt_set": "prompt_sets",
    "require_disjoint": "prompt_sets",
    "require_unseen": "prompt_sets",
    "Evaluation": "evaluation",
    "Measurement": "evaluation",
    "evaluate": "evaluation",
    "collect_baseline": "evaluation",
    "exact_match": "evaluation",
    "open_adapter": "adapter_folder",
    "CheckpointRecord": "checkpoints",
    "extract_reference": "checkpoints",
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
    "apply": "applying",
    "realign_folder": "folders",
    "revert": "applying",
    "NLSRCallback": "callback",
    "save_plots": "plots",
    "to_html": "plots",
    "to_terminal": "report",
    "SafetyReport": "report",
    "push_realigned": "publishing",
    "verify_folder": "verification",
    "stale_checkpoints": "hub",
    "push_folder": "hub",
    "revert_folder": "folders",
    "EvaluationSettings": "measuring",
    "Method": "planning",
    "CONTROLS": "controls",
    "Comparison": "comparison",
    "compare": "comparison",
    "Tuning": "tuning",
    "tune": "tuning",
    "Inspection": "inspection",
    "inspect_adapter": "inspection",
    "Audit": "inspection",
    "audit": "inspection",
    "register": "registration",
    "unregister": "registration",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
