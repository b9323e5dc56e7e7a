"""Builds a safety patch from an aligned adapter on its base model: once per base, then applied to many adapters."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from .adapters import Adapter
from .calibration import SafetyStatistics, calibrate, require_no_pairs
from .config import NLSRConfig
from .examples import collated
from .generation import find_tokenizer, pad_id
from .judges import Judge, refuses
from .live_adapter import LiveAdapter
from .nlsr import UNCALIBRATED, build_nlsr_patch
from .patch import SafetyPatch
from .reference import Reference, open_updates, reference_for_masks
from .screening import answer_safety_prompts

logger = logging.getLogger(__name__)


def build_safety_patch(
    aligned_model: Any,
    config: NLSRConfig | None = None,
    *,
    weak: Any = None,
    calibration: Iterable[Any] | None = None,
    tokenizer: Any = None,
    judge: Judge = refuses,
    adapter_name: str | None = None,
    progress: bool = True,
) -> SafetyPatch:
    """The safety patch of an aligned adapter (NLSR, arXiv 2412.12497, steps 1 and 2); the model is left as it was.

    Args:
        aligned_model: a PeftModel with the aligned adapter that users fine-tune from.
        config: settings; ``beta``, ``score``, ``sparsity`` and the calibration fields matter here.
        weak: the adapter before preference alignment (folder, Hub id or mapping); None when it was merged.
        calibration: safety prompts, best with safe answers; the built-in prompts, answered by the model, when None.
        tokenizer: found from the base model's name when None.
        judge: which answers are refusals.
        adapter_name: which adapter; the active one when None.

    Example:
        >>> build_safety_patch(aligned_model).save("patch")  # doctest: +SKIP
    """
    config = config or NLSRConfig()
    adapter = LiveAdapter(aligned_model, adapter_name)
    reference = amplified(adapter, weak, config)
    statistics = None
    if config.score not in UNCALIBRATED:
        statistics = _collected(adapter, reference, config, calibration, tokenizer, judge, progress)
    return build_nlsr_patch(reference, statistics, config)


def collect_safety_statistics(
    aligned_model: Any,
    config: NLSRConfig | None = None,
    *,
    weak: Any = None,
    calibration: Iterable[Any] | None = None,
    tokenizer: Any = None,
    judge: Judge = refuses,
    adapter_name: str | None = None,
    progress: bool = True,
) -> SafetyStatistics:
    """What :func:`build_safety_patch` measures on the model; patches of any sparsity are built from it without one.

    Arguments are those of :func:`build_safety_patch`.
    """
    config = config or NLSRConfig()
    adapter = LiveAdapter(aligned_model, adapter_name)
    return _collected(adapter, amplified(adapter, weak, config), config, calibration, tokenizer, judge, progress)


def _collected(
    adapter: LiveAdapter,
    reference: Reference,
    config: NLSRConfig,
    calibration: Iterable[Any] | None,
    tokenizer: Any,
    judge: Judge,
    progress: bool,
) -> SafetyStatistics:
    require_no_pairs(config)
    tokenizer = tokenizer if tokenizer is not None else find_tokenizer(adapter.model)
    data = answer_safety_prompts(
        adapter, calibration=calibration, tokenizer=tokenizer, judge=judge, config=config, progress=progress
    )
    for note in data.notes:
        logger.warning(note)
    batches = collated(data.safety, config.nlsr_batch_size, pad_id(tokenizer))
    return calibrate(adapter, batches, reference, config, progress=progress)


def amplified(aligned: Adapter, weak: Any, config: NLSRConfig) -> Reference:
    """The reference that masks are made of: the aligned adapter, pre-amplified (NLSR eq. 2)."""
    factors = aligned.snapshot() if isinstance(aligned, LiveAdapter) else aligned
    reference = Reference("adapter", factors, "the aligned adapter", aligned.info.base_model)
    return reference_for_masks(reference, open_updates(weak), config)
