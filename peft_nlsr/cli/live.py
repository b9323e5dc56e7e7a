"""Realigning a saved adapter with its base model at hand: plan on the live model, measure if asked, write new files.

The files are written from the adapter's own files, so everything that is not realigned keeps its bytes; they appear
complete or not at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .loading import Loaded

if TYPE_CHECKING:
    from ..config import NLSRConfig
    from ..gate import Outcome
    from ..judges import Judge
    from ..prompt_sets import PromptSet
    from ..record import Realignment


@dataclass(frozen=True)
class Teaching:
    """What a live realignment is given besides the model; see :func:`peft_nlsr.nlsr_realign`."""

    patch: str | None
    reference: str | None
    weak: str | None
    calibration: Any
    utility: Any
    judge: Judge
    work_dir: Path | None = None


@dataclass(frozen=True)
class Gate:
    """How a repair is measured, and how far a guarded rate may fall; built-in prompts when None."""

    prompts: Sequence[PromptSet] | None
    tolerance: float
    max_new_tokens: int


def planned_on(loaded: Loaded, config: NLSRConfig, given: Teaching) -> Realignment:
    """What would be done; the model is not changed.

    Raises:
        PeftNLSRError: the adapter is realigned already (an FGSN run may add to an FGSN run), or see ``nlsr_realign``.
    """
    from ..folders import finished_record, require_fresh
    from ..realign import plan

    earlier = finished_record(loaded.source.path)
    continues = earlier is not None and config.method == earlier["method"] == "fgsn"
    if not continues:
        require_fresh(loaded.source)
    return plan(
        loaded.model,
        config,
        patch=given.patch,
        reference=given.reference,
        weak=given.weak,
        calibration=given.calibration,
        utility=given.utility,
        tokenizer=loaded.tokenizer,
        judge=given.judge,
        previous=loaded.source.path if continues else None,
        work_dir=given.work_dir,
    )


def measured_on(loaded: Loaded, planned: Realignment, given: Teaching, gate: Gate) -> Outcome:
    """The plan with evaluations before and after, and the verdict of the gate; the model is as it was afterwards."""
    from ..examples import sample
    from ..gate import Measure, measured

    measure = Measure(
        prompts=True if gate.prompts is None else gate.prompts,
        tokenizer=loaded.tokenizer,
        judge=given.judge,
        max_new_tokens=gate.max_new_tokens,
        batch_size=planned.config.nlsr_batch_size,
        tolerance=gate.tolerance,
    )
    config = planned.config
    rows = []
    if given.utility is not None:
        rows = sample(given.utility, loaded.tokenizer, config)
    return measured(loaded.model, planned, measure, rows)
