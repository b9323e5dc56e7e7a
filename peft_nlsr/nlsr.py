"""Neuron-Level Safety Realignment (NLSR, arXiv 2412.12497, AAAI 2025) on adapter tensors; no model needed.

Algorithm. Given a pre-amplified reference, calibration statistics and the fine-tuned adapter:

1. Per module, mark the safety-critical entries of the reference's A and B (eq. 3-6): the safety patch.
2. Similarity of the marked parts of reference and fine-tuned adapter (eq. 7-8).
3. Restore the modules that drifted away, by chance or by rank (eq. 9-10).
4. Restored modules get ``W'_e + W^_t`` (eq. 12), or the release's entry swap.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from .adapters import Adapter
from .calibration import SafetyStatistics
from .config import NLSRConfig
from .edits import masked, restore_sum, restore_swap
from .errors import LineageError
from .lowrank import LowRank
from .patch import SCHEMA_VERSION, ModulePatch, SafetyPatch
from .record import OF_WEIGHTS, ON_INPUTS
from .reference import LEAST_RELATED, Lineage, Reference, factor_cosine
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


def decide(adapter: Adapter, patch: SafetyPatch, config: NLSRConfig) -> tuple[list[Decision], tuple[str, ...]]:
    """Similarity of every module (NLSR eq. 7-8), which are restored (eq. 9-10), and what to note of it.

    Raises:
        LineageError: the adapter was not trained from the patch's reference, so its entries mean something else.
    """
    similarities: dict[str, float] = {}
    cosines: dict[str, float | None] = {}
    for name, tuned in adapter.items():
        module = patch[name]
        similarities[name] = module.reference.cosine(masked(tuned, module.masks))
        cosines[name] = factor_cosine(tuned, module.reference)
    notes = require_shared_lineage(Lineage.from_cosines(cosines))
    decisions = select(similarities, config)
    return decisions, notes + _cut_notes(decisions, patch, config)


def require_shared_lineage(lineage: Lineage) -> tuple[str, ...]:
    """What to note of single modules whose factors are unrelated to the reference's.

    Raises:
        LineageError: the lineage is not shared.
    """
    found = f"{len(lineage.unrelated)} of {len(lineage.cosines)} modules have factors unrelated to the reference's"
    for name in lineage.unrelated[:1]:
        found += f" (first {name}: cosine {lineage.cosines[name]:.2f}, expected at least {LEAST_RELATED})"
    if not lineage.shared:
        raise LineageError(
            f"{found}, so entries of A and B cannot be exchanged: the adapter was not trained from the reference, it "
            "was realigned before, or its factors were computed anew; if it was realigned, revert it first, else use "
            "update='least_squares', which works for any adapter"
        )
    return (f"{found}; what is restored there may be noise",) if lineage.unrelated else ()


def _cut_notes(decisions: Iterable[Decision], patch: SafetyPatch, config: NLSRConfig) -> tuple[str, ...]:
    """Says where the sum is cut to rank r without calibration inputs."""
    blind = [d.module for d in decisions if d.restored and d.module not in patch.inputs]
    if config.update != "sum" or not config.compress or not blind:
        return ()
    return (f"{len(blind)} modules are cut to rank r by size alone: the patch has no calibration inputs",)


def truncation_norm(patch: SafetyPatch, config: NLSRConfig) -> str | None:
    """How the error of the cut to the adapter's rank is measured; None where nothing is cut."""
    if config.update != "sum" or not config.compress:
        return None
    return ON_INPUTS if set(patch.inputs) == set(patch) else OF_WEIGHTS


def restore(tuned: LowRank, patch: SafetyPatch, name: str, config: NLSRConfig) -> tuple[LowRank, float]:
    """The restored update of one selected module by ``config.update`` (``sum`` or ``swap``); the truncation error."""
    module = patch[name]
    if config.update == "swap":
        return restore_swap(tuned, module.reference, module.masks), 0.0
    inputs = patch.inputs.get(name) if config.compress else None
    return restore_sum(tuned, module.reference, module.masks, compress=config.compress, inputs=inputs)
