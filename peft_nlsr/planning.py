"""Plans many realignments of one adapter; what they share is computed once.

Answers of teachers, screening and calibration statistics do not depend on most settings, so a further plan costs its
own solve only. The model is never changed here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .adapter_folder import open_adapter
from .applying import realignment_of
from .calibration import SafetyStatistics, calibrate, needs_codes
from .config import NLSRConfig
from .errors import PeftNLSRError
from .examples import collated, read_examples, sample
from .generation import find_tokenizer, model_digest, pad_id
from .judges import Judge, refuses
from .live_adapter import LiveAdapter
from .lowrank import LowRank, fingerprint
from .nlsr import UNCALIBRATED, build_nlsr_patch
from .patch import SafetyPatch
from .realign import choose_method, plan
from .record import Realignment
from .reference import BASE_REFERENCE, Reference, open_updates, read_reference, reference_for_masks
from .result_file import key_of
from .screening import TeachingData, prepare_data

_ROWS_HASHED = 1024


@dataclass(frozen=True)
class Method:
    """One way to realign, with what it is given besides data.

    Attributes:
        name: shown in tables.
        config: its settings.
        reference: a safe adapter (Reference, folder, Hub id or mapping), see :func:`peft_nlsr.nlsr_realign`; None is
            the base model.
        weak: the adapter before preference alignment, for pre-amplification.
        patch: a safety patch in place of a reference.
    """

    name: str
    config: NLSRConfig
    reference: Any = None
    weak: Any = None
    patch: SafetyPatch | None = None

    def made_with(self) -> dict[str, Any]:
        """What its plans depend on besides data, JSON values: settings, and hashes of what it is given."""
        return {
            "config": self.config.to_dict(),
            "reference": _hash(self.reference),
            "weak": _hash(self.weak),
            "patch": None if self.patch is None else key_of(self.patch.record),
        }


@dataclass(frozen=True)
class Planned:
    """A plan and where its values come from.

    Attributes:
        realignment: the plan.
        patch: the masks it used; None for methods that change whole modules.
        reference: the safe adapter; its ``updates`` are None for the base model.
        values: module -> update that masked values were taken from (amplified); None where there are no masks.
    """

    realignment: Realignment
    patch: SafetyPatch | None
    reference: Reference
    values: Mapping[str, LowRank] | None


class Planner:
    """Plans for one adapter and one set of data.

    Args:
        model: a PeftModel; one LoRA adapter is planned for, and never changed here.
        calibration, utility, tokenizer, judge, adapter_name: see :func:`peft_nlsr.nlsr_realign`.

    Attributes:
        adapter: the adapter.
        tokenizer: the given one, else found from the base model's name.

    Raises:
        PeftNLSRError: the adapter is realigned already.
    """

    def __init__(
        self,
        model: Any,
        *,
        calibration: Iterable[Any] | None = None,
        utility: Iterable[Any] | None = None,
        tokenizer: Any = None,
        judge: Judge = refuses,
        adapter_name: str | None = None,
        progress: bool = True,
    ) -> None:
        self.model, self.judge, self.progress = model, judge, progress
        self.adapter = LiveAdapter(model, adapter_name)
        _require_fresh(self.adapter)
        self.tokenizer = tokenizer if tokenizer is not None else find_tokenizer(self.adapter.model)
        self.calibration, self.utility = as_rows(calibration), as_rows(utility)
        self._teaching: dict[Any, TeachingData] = {}
        self._statistics: dict[Any, SafetyStatistics] = {}

    def plan(self, method: Method) -> Planned:
        """The plan of a method, the same as :func:`peft_nlsr.plan` makes.

        Raises:
            PeftNLSRError: the method cannot be used on this adapter or these data.
        """
        config = method.config
        if config.method != "nlsr":
            return Planned(self._plan_alone(method), None, BASE_REFERENCE, None)
        source = read_reference(method.reference, self.adapter)
        form, reason = choose_method(self.adapter, config, patch=method.patch, reference=source)
        if form in ("sum", "swap"):
            return self._plan_masks(method, source)
        return Planned(replace(self._plan_taught(method, source), reason=reason), None, source, None)

    def made_with(self) -> dict[str, Any]:
        """What its plans depend on besides the method, JSON values: hashes of model, adapter and data."""
        data = {"calibration": self.calibration, "utility": self.utility}
        return {
            "model_sha256": model_digest(self.adapter.model),
            "adapter": fingerprint(self.adapter),
            "data": {kind: data_digest(rows, self.tokenizer) for kind, rows in data.items()},
        }

    def _plan_alone(self, method: Method) -> Realignment:
        return plan(
            self.model,
            method.config,
            patch=method.patch,
            reference=method.reference,
            weak=method.weak,
            calibration=self.calibration,
            utility=self.utility,
            tokenizer=self.tokenizer,
            judge=self.judge,
            adapter_name=self.adapter.info.adapter_name,
            progress=self.progress,
        )

    def _plan_taught(self, method: Method, source: Reference) -> Realignment:
        """By the closed forms, from data that were answered and screened once."""
        teaching = self._taught(method.config, source)
        if teaching.intact or not teaching.utility:  # an empty list would be read as data without tokens
            return self._plan_alone(method)
        size = max(len(teaching.safety), len(teaching.utility))
        found = plan(
            self.model,
            method.config.replace(screening=False, leave_intact=False, max_samples=size),
            reference=source,
            calibration=teaching.safety,
            utility=teaching.utility,
            tokenizer=self.tokenizer,
            judge=self.judge,
            adapter_name=self.adapter.info.adapter_name,
            progress=self.progress,
        )
        # What both say of the same data is said once.
        notes = tuple(dict.fromkeys(teaching.notes + found.notes))
        return replace(found, config=method.config, data={**found.data, **teaching.record}, notes=notes)

    def _taught(self, config: NLSRConfig, source: Reference) -> TeachingData:
        drawn = (config.max_samples, config.max_length, config.nlsr_seed)
        asked = (config.screening, config.refused_prompts, config.leave_intact, config.answer_tokens)
        key = (_identity(source.updates), *asked, *drawn)
        if key not in self._teaching:
            self._teaching[key] = prepare_data(
                self.adapter,
                calibration=self.calibration,
                utility=self.utility,
                tokenizer=self.tokenizer,
                safe_teacher=source.updates,
                judge=self.judge,
                config=config,
                progress=self.progress,
            )
        return self._teaching[key]

    def _plan_masks(self, method: Method, source: Reference) -> Planned:
        """By the entries of a patch, which is built from statistics that were collected once."""
        config, patch = method.config, method.patch
        needs_data = patch is None and config.score not in UNCALIBRATED
        if needs_data and self.calibration is None:
            return Planned(self._plan_alone(method), None, source, None)  # says what is missing
        if patch is not None:
            return Planned(self._plan_patch(config, patch), patch, source, None)
        weak = open_updates(method.weak)
        amplified = reference_for_masks(source, weak, config)
        statistics = self._calibrated(config, source, amplified, weak) if needs_data else None
        patch = build_nlsr_patch(amplified, statistics, config)
        data = {} if statistics is None else {"safety": {"source": "given", "used": statistics.record["samples"]}}
        return Planned(replace(self._plan_patch(config, patch), data=data), patch, source, amplified.updates)

    def _plan_patch(self, config: NLSRConfig, patch: SafetyPatch) -> Realignment:
        return plan(
            self.model,
            config,
            patch=patch,
            tokenizer=self.tokenizer,
            adapter_name=self.adapter.info.adapter_name,
            progress=self.progress,
        )

    def _calibrated(
        self, config: NLSRConfig, source: Reference, amplified: Reference, weak: Mapping[str, LowRank] | None
    ) -> SafetyStatistics:
        """Statistics for the amplified reference, or for it at another size where masks do not depend on that."""
        key = (_identity(source.updates), _identity(weak), *_statistics_key(config, weak))
        if key not in self._statistics:
            examples = sample(self.calibration or [], self.tokenizer, config)
            batches = collated(examples, config.nlsr_batch_size, pad_id(self.tokenizer))
            self._statistics[key] = calibrate(self.adapter, batches, amplified, config, progress=self.progress)
        return self._statistics[key]


def as_rows(data: Iterable[Any] | None) -> Sequence[Any] | None:
    """Data that can be read more than once."""
    if data is None or (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        return data  # type: ignore[return-value]
    return list(data)


def data_digest(rows: Sequence[Any] | None, tokenizer: Any) -> str | None:
    """A hash of data as a method would read them; None without data."""
    if rows is None:
        return None
    examples = read_examples(rows, tokenizer, limit=_ROWS_HASHED, max_length=512)
    return key_of([[list(example.prompt), list(example.answer)] for example in examples])


def _hash(source: Any) -> str | None:
    """The fingerprint of a reference in any of its forms; None for the base model."""
    updates = source.updates if isinstance(source, Reference) else source
    return _identity(updates if updates is None or isinstance(updates, Mapping) else open_adapter(updates))


def _require_fresh(adapter: LiveAdapter) -> None:
    done = realignment_of(adapter)
    if done is not None:
        raise PeftNLSRError(
            f"adapter {done.adapter_name!r} is realigned already (by {done.method}); call revert(model) first, "
            "so that everything starts from the fine-tuned weights"
        )


def _identity(updates: Mapping[str, LowRank] | None) -> str | None:
    return None if updates is None else fingerprint(updates)


def _statistics_key(config: NLSRConfig, weak: Mapping[str, LowRank] | None) -> tuple[Any, ...]:
    """What the statistics depend on, as far as masks can tell.

    Masks rank entries, and the size of an exact amplification scales them all alike, unless the model runs with it,
    gradients see it, or a weak adapter gives it another direction.
    """
    gradients = config.score if config.score in ("snip", "preference_snip") else None
    key: tuple[Any, ...] = (
        config.calibration_tokens,
        config.calibration_model,
        config.sequential,
        gradients,
        needs_codes(config),
    )
    key += (config.max_samples, config.max_length, config.nlsr_seed)
    if config.sequential or config.calibration_model == "reference" or gradients or weak is not None:
        key += (config.beta, config.extrapolation)
    if config.sequential:
        key += (config.score, config.sparsity, config.low_rank_rule, config.mask_unit)
    return key
