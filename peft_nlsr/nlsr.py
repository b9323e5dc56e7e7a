"""Neuron-Level Safety Realignment (NLSR, arXiv 2412.12497, AAAI 2025) on adapter tensors; no model needed.

Algorithm. Given a pre-amplified reference, calibration statistics and the fine-tuned adapter:

1. Per module, mark the safety-critical entries of the reference's A and B (eq. 3-6): the safety patch.
2. Similarity of the marked parts of reference and fine-tuned adapter (eq. 7-8).
3. Restore the modules that drifted away, by chance or by rank (eq. 9-10).
4. Restored modules get ``W'_e + W^_t`` (eq. 12), or the release's entry swap.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .adapters import Adapter
from .calibration import SafetyStatistics
from .config import NLSRConfig
from .edits import masked, restore_sum, restore_swap
from .errors import LineageError
from .lowrank import LowRank
from .patch import SCHEMA_VERSION, ModulePatch, SafetyPatch
from .reference import SHARED_LINEAGE, Reference
from .scores import InputSketch, ModuleStatistics, safety_masks
from .selection import Decision, select

UNCALIBRATED = ("magnitude", "random")


def build_nlsr_patch(reference: Reference, statistics: SafetyStatistics | None, config: NLSRConfig) -> SafetyPatch:
    """The safety patch of a pre-amplified reference (NLSR eq. 3-6).

    Args:
        reference: from :func:`peft_nlsr.reference.reference_for_masks`; its ``updates`` must not be None.
        statistics: calibration statistics for the reference's factors; None for the scores ``magnitude`` and
            ``random``.
        config: ``score``, ``sparsity``, ``mask_unit``, ``low_rank_rule`` and ``nlsr_seed`` are read.

    Returns:
        A patch that keeps, per module, the top ``1 - sparsity`` entries.
    """
    if reference.updates is None:
        raise ValueError("a patch needs a reference adapter; the base model has no entries to mask")
    if statistics is not None:
        statistics.require_modules(reference.updates)
    elif config.score not in UNCALIBRATED:
        raise ValueError(f"score={config.score!r} needs calibration statistics; collect them with collect_statistics")
    generator = torch.Generator().manual_seed(config.nlsr_seed)
    modules: dict[str, ModulePatch] = {}
    inputs: dict[str, InputSketch] = {}
    for name, update in reference.updates.items():
        own = statistics[name] if statistics is not None else _no_statistics(update)
        sketch = InputSketch.of(own)
        if sketch is not None:
            inputs[name] = sketch
        masks = safety_masks(update, own, config, generator=generator)
        modules[name] = ModulePatch(masks, masked(LowRank(update.A.float(), update.B.float(), update.scale), masks))
    return SafetyPatch(modules, _record(reference, statistics, config, modules, inputs), inputs)


def _no_statistics(update: LowRank) -> ModuleStatistics:
    return ModuleStatistics(0, torch.zeros(update.rank, update.rank), torch.zeros(update.shape[1]))


def _record(
    reference: Reference,
    statistics: SafetyStatistics | None,
    config: NLSRConfig,
    modules: Mapping[str, ModulePatch],
    inputs: Mapping[str, InputSketch],
) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "base_model": reference.base_model,
        "reference": {"kind": reference.kind, "description": reference.description},
        "statistics": None if statistics is None else statistics.record,
        "config": config.to_dict(),
        "modules": {
            name: {
                "rank": module.reference.rank,
                "shape": list(module.reference.shape),
                "scale": module.reference.scale,
                "kept_A": int(module.masks[0].sum()),
                "kept_B": int(module.masks[1].sum()),
                "inputs": len(inputs[name].rows) if name in inputs else 0,
            }
            for name, module in modules.items()
        },
    }


def decide(adapter: Adapter, patch: SafetyPatch, config: NLSRConfig) -> list[Decision]:
    """Similarity of every module (NLSR eq. 7-8) and which are restored (eq. 9-10), after a check of the lineage.

    Raises:
        LineageError: the adapter was not trained from the patch's reference, so its entries mean something else.
    """
    similarities: dict[str, float] = {}
    lineage: list[float] = []
    for name, tuned in adapter.items():
        module = patch[name]
        mine = masked(tuned, module.masks)
        similarities[name] = module.reference.cosine(mine)
        lineage.append(
            float(torch.nn.functional.cosine_similarity(mine.A.float().flatten(), module.reference.A.flatten(), dim=0))
        )
    require_shared_lineage(sorted(lineage)[len(lineage) // 2])
    return select(similarities, config)


def require_shared_lineage(similarity: float) -> None:
    """Raise LineageError when the factors of adapter and reference are unrelated (their cosine is below 0.5)."""
    if similarity < SHARED_LINEAGE:
        raise LineageError(
            f"the adapter's factors are unrelated to the reference's (median cosine {similarity:.2f}, expected at "
            f"least {SHARED_LINEAGE}): it was not trained from the reference, and entries of A and B cannot be "
            "exchanged; use update='least_squares', which works for any adapter"
        )


def restore(tuned: LowRank, patch: SafetyPatch, name: str, config: NLSRConfig) -> tuple[LowRank, float]:
    """The restored update of one selected module by ``config.update`` (``sum`` or ``swap``); the truncation error."""
    module = patch[name]
    if config.update == "swap":
        return restore_swap(tuned, module.reference, module.masks), 0.0
    inputs = patch.inputs.get(name) if config.compress else None
    return restore_sum(tuned, module.reference, module.masks, compress=config.compress, inputs=inputs)
