"""Realigning a saved adapter with its base model at hand: plan on the live model, measure if asked, write new files.

The files are written from the adapter's own files, so everything that is not realigned keeps its bytes; they appear
complete or not at all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .loading import Loaded

if TYPE_CHECKING:
    from ..config import NLSRConfig
    from ..gate import Outcome
    from ..judges import Judge
    from ..measuring import EvaluationSettings
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
    """How a repair is measured, and how much worse a guarded rate may become."""

    asked: EvaluationSettings
    tolerance: float


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
    from ..gate import Measure, measured

    asked = replace(gate.asked, batch_size=planned.config.nlsr_batch_size)
    measure = Measure(asked, loaded.tokenizer, gate.tolerance)
    return measured(loaded.model, planned, measure, given.utility)
