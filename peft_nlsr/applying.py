"""Writing a planned realignment into a live model, and taking it back bit for bit.

All of it or nothing, on every rank where several work together. The model carries the record of what it holds, so that
``revert`` and every save know it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from accelerate.utils import extract_model_from_parallel

from .errors import IncompatibleError, PeftNLSRError
from .fgsn import CONTINUES
from .live_adapter import LiveAdapter
from .lowrank import LowRank, fingerprint
from .ranks import ALONE, Ranks
from .record import Realignment
from .registration import forget, keep_with_adapter
from .report import SafetyReport

RECORD_ATTRIBUTE = "nlsr_realignment"
_RECORDS = "_nlsr_realignments"  # adapter name -> its realignment, the latest last


def apply(peft_model: Any, planned: Realignment) -> Realignment:
    """Write a planned realignment into the model it was planned for, all of it or nothing.

    Raises:
        IncompatibleError: the adapter has changed since it was planned, or the plan is a dry run on files.
    """
    return apply_together(peft_model, planned, ALONE)


def apply_together(peft_model: Any, planned: Realignment, ranks: Ranks) -> Realignment:
    """:func:`apply` on all ranks: every one writes, or none does; a failure until the record is kept undoes it."""
    adapter = LiveAdapter(peft_model, planned.adapter_name)
    with adapter.undone_on_failure(adapter):
        with ranks.together():
            _require_planned_for(adapter, planned)
            adapter.write(planned.updates)
            after = fingerprint(LiveAdapter(peft_model, planned.adapter_name))
        return _noted(adapter.model, replace(planned, fingerprint_after=after), None)


def _require_planned_for(adapter: LiveAdapter, planned: Realignment) -> None:
    if set(planned.updates) != set(planned.restored):
        raise IncompatibleError("this plan holds no updates (a dry run on files); make one with plan(model, ...)")
    if fingerprint(adapter) not in (planned.fingerprint_before, planned.data.get(CONTINUES)):
        raise IncompatibleError(
            f"adapter {planned.adapter_name!r} is not the one this realignment was planned for (its weights differ); "
            "plan again"
        )


def adopt(
    peft_model: Any, planned: Realignment, factors: Mapping[str, LowRank], report: SafetyReport | None = None
) -> Realignment:
    """Note on a model that its weights are the realigned ones, so that ``revert`` and every save know it.

    Args:
        planned: the realignment, whose updates were written already.
        factors: the adapter's factors as they are now, whole (a sharded model's are gathered).
        report: what was measured, saved and pushed with the adapter.
    """
    return _noted(peft_model, replace(planned, fingerprint_after=fingerprint(factors)), report)


def _noted(peft_model: Any, done: Realignment, report: SafetyReport | None) -> Realignment:
    """Keep the claim, which every save checks against the weights, and then the record, which nothing checks."""
    bare = extract_model_from_parallel(peft_model, keep_torch_compile=False)
    keep_with_adapter(bare, done, None if report is None else replace(report, record=done.to_dict()))
    _keep(bare, {**_records_but(bare, done.adapter_name), done.adapter_name: done})
    return done


def forget_realignments(peft_model: Any) -> None:
    """Drop every record from a model, for instance because it is about to be trained again; weights stay."""
    bare = extract_model_from_parallel(peft_model, keep_torch_compile=False)
    for name in list(getattr(bare, _RECORDS, {})):
        _keep(bare, _records_but(bare, name))
        forget(bare, name)


def revert(peft_model: Any, adapter_name: str | None = None) -> Any:
    """Give an adapter back the weights it had before :func:`nlsr_realign`, bit for bit; returns the same model.

    Args:
        peft_model: the realigned model.
        adapter_name: which adapter; the one that was realigned last when None.

    Raises:
        PeftNLSRError: the adapter was not realigned, or was changed afterwards.
    """
    bare = extract_model_from_parallel(peft_model, keep_torch_compile=False)
    records: dict[str, Realignment] = getattr(bare, _RECORDS, {})
    name = adapter_name or next(reversed(records), None)
    if name not in records:
        of_whom = "this model" if name is None else f"adapter {name!r}"
        raise PeftNLSRError(
            f"{of_whom} holds no realignment to revert; saved adapters are reverted with revert_folder"
        )
    done = records[name]
    adapter = LiveAdapter(peft_model, name)
    if fingerprint(adapter) != done.fingerprint_after:
        raise PeftNLSRError(
            "the adapter's weights changed after the realignment, so its original no longer fits them; nothing was "
            "reverted"
        )
    adapter.write(done.originals)
    _keep(adapter.model, _records_but(adapter.model, name))
    forget(adapter.model, name)
    return peft_model


def realignment_of(adapter: LiveAdapter) -> Realignment | None:
    """The realignment that the adapter's weights are the result of; None where they were trained since."""
    records: dict[str, Realignment] = getattr(adapter.model, _RECORDS, {})
    done = records.get(adapter.info.adapter_name)
    return done if done is not None and done.fingerprint_after == fingerprint(adapter) else None


def _records_but(model: Any, adapter_name: str) -> dict[str, Realignment]:
    """The realignments of the model's other adapters."""
    records: dict[str, Realignment] = getattr(model, _RECORDS, {})
    return {name: done for name, done in records.items() if name != adapter_name}


def _keep(model: Any, records: dict[str, Realignment]) -> None:
    if records:
        setattr(model, _RECORDS, records)
        setattr(model, RECORD_ATTRIBUTE, records[next(reversed(records))])
    else:
        delattr(model, _RECORDS)
        delattr(model, RECORD_ATTRIBUTE)
