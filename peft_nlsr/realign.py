"""Realignment of a live model: which method, what it would change, and the change itself in one call.

Everything is computed and checked before the first parameter changes (``applying``).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import fgsn
from .adapters import Adapter
from .applying import apply_together, realignment_of
from .baselines import add_safety_vector, prune
from .blocks import Factors
from .calibration import calibrate, collect_statistics
from .config import NLSRConfig
from .edits import restore_one_shot
from .errors import IncompatibleError, LineageError, PeftNLSRError, UnsupportedAdapterError
from .examples import Example, collated, sample
from .generation import find_tokenizer, model_digest, pad_id, require_positions
from .judges import Judge, refuses, require_function
from .live_adapter import LiveAdapter
from .lowrank import LowRank, fingerprint
from .nlsr import UNCALIBRATED, build_nlsr_patch, decide, require_shared_lineage, restore, truncation_norm
from .patch import SafetyPatch
from .projection import read_delta
from .prompts import builtin_prompts
from .ranks import ALONE, Ranks
from .record import OF_WEIGHTS, ON_INPUTS, ModuleRecord, Realignment, new_record
from .reference import BASE_REFERENCE, Lineage, Reference, open_updates, read_reference, reference_for_masks
from .safelora import decide_safelora, project
from .screening import TeachingData, prepare_data, require_refusals
from .selection import Decision
from .two_teacher import solve_two_teacher

logger = logging.getLogger(__name__)


def nlsr_realign(
    peft_model: Any,
    config: NLSRConfig | None = None,
    *,
    patch: SafetyPatch | str | os.PathLike[str] | None = None,
    reference: Any = None,
    weak: Any = None,
    calibration: Iterable[Any] | None = None,
    utility: Iterable[Any] | None = None,
    tokenizer: Any = None,
    judge: Judge = refuses,
    previous: str | os.PathLike[str] | None = None,
    adapter_name: str | None = None,
    work_dir: str | os.PathLike[str] | None = None,
    data_parallel: bool = False,
    progress: bool = True,
) -> Any:
    """Restore the safety of a fine-tuned LoRA adapter and return the same model; the record is
    ``model.nlsr_realignment``.

    With nothing but the model, a causal language model whose tokenizer can be found: the two-teacher form, the base
    model as safe teacher, built-in safety prompts; it says in the log what it chose and why.

    Args:
        peft_model: a PeftModel (or a model with injected adapters); one LoRA adapter is edited in place.
        config: settings; ``NLSRConfig()`` when None.
        patch: a SafetyPatch, its folder or Hub id: NLSR without data.
        reference: a safe adapter: Reference, folder, Hub id or mapping. None is the base model. For ``fgsn``,
            ``safelora`` and ``resta`` what alignment changed, which :func:`peft_nlsr.extract_reference` gives too.
        weak: the adapter before preference alignment, for pre-amplification of ``reference``.
        calibration: safety prompts, best with safe answers; rows as :func:`peft_nlsr.examples.read_examples` takes
            them.
        utility: the user's own training data (screened for what the safe teacher refuses).
        tokenizer: found from the base model's name when None.
        judge: ``(prompts, responses) -> list[bool]``, which answers are refusals.
        previous: for ``fgsn``, the folder of an adapter with earlier safety dimensions, which the model was loaded
            from; not needed while the model in memory holds their record.
        adapter_name: which adapter; the active one when None.
        work_dir: for the two-teacher form, a folder for the blocks solved so far: the same call goes on there after an
            interruption, with the same result bit for bit. Removed when all blocks are solved.
        data_parallel: all processes of a job started with ``torchrun`` or ``accelerate launch`` make this call
            together, each with the whole model on its device and the same arguments, and share the two-teacher form's
            examples; any other method is computed by rank 0. All get the same result. With False each works alone.

    Raises:
        PeftNLSRError: see its subclasses; nothing has changed then.

    Example:
        >>> model = nlsr_realign(model, utility=train_dataset)  # doctest: +SKIP
    """
    planned = plan(
        peft_model,
        config,
        patch=patch,
        reference=reference,
        weak=weak,
        calibration=calibration,
        utility=utility,
        tokenizer=tokenizer,
        judge=judge,
        previous=previous,
        adapter_name=adapter_name,
        work_dir=work_dir,
        data_parallel=data_parallel,
        progress=progress,
    )
    apply_together(peft_model, planned, Ranks.launched() if data_parallel else ALONE)
    return peft_model


def plan(
    peft_model: Any,
    config: NLSRConfig | None = None,
    *,
    patch: SafetyPatch | str | os.PathLike[str] | None = None,
    reference: Any = None,
    weak: Any = None,
    calibration: Iterable[Any] | None = None,
    utility: Iterable[Any] | None = None,
    tokenizer: Any = None,
    judge: Judge = refuses,
    previous: str | os.PathLike[str] | None = None,
    adapter_name: str | None = None,
    work_dir: str | os.PathLike[str] | None = None,
    data_parallel: bool = False,
    progress: bool = True,
) -> Realignment:
    """What :func:`nlsr_realign` would do, with the new updates in it; the model is not changed (dry run).

    Arguments are those of :func:`nlsr_realign`.
    """
    if not isinstance(peft_model, torch.nn.Module):
        raise UnsupportedAdapterError(
            f"expected a model in memory, found a {type(peft_model).__name__}; load it with "
            "PeftModel.from_pretrained, or realign its files with realign_folder and a patch"
        )
    require_kinds(config, patch, tokenizer, judge)
    arguments = {"patch": patch, "reference": reference, "weak": weak, "calibration": calibration, "utility": utility}
    given = {name for name, value in {**arguments, "work_dir": work_dir}.items() if value is not None}
    ranks = Ranks.launched() if data_parallel else ALONE
    with ranks.together():
        adapter = LiveAdapter(peft_model, adapter_name)
        config = config or NLSRConfig()
        earlier = _earlier(adapter, config, previous)
        patch = SafetyPatch.from_pretrained(patch) if isinstance(patch, str | os.PathLike) else patch
        source = _read_source(reference, adapter, config)
        method, reason = choose_method(adapter, config, patch=patch, reference=source)
        if ranks.count > 1:
            ranks.require_same(_seen_by_a_rank(adapter, config, source, method, given))
        if ranks.number == 0:
            logger.info("realigning %d modules by %s: %s", len(adapter), method, reason)
        shared = method == "two_teacher"
        folder = None if work_dir is None else Path(work_dir)
        data = _Data(calibration, utility, tokenizer, judge, progress, folder, ranks if shared else ALONE)
        make = partial(_made, method, adapter, config, source, data, patch=patch, weak=weak, earlier=earlier)
        own = make() if shared else None
        found = ranks.first(lambda: make() if own is None else own)
    notes = found.notes + _unused(method, config, given)
    for note in notes if ranks.number == 0 else ():
        logger.warning(note)
    return replace(found, method=method, reason=reason, notes=notes)


def require_kinds(config: Any, patch: Any, tokenizer: Any, judge: Any) -> None:
    """Check the arguments for which a name is often given, or a mapping.

    Raises:
        TypeError: an argument of another kind.
    """
    if not isinstance(config, NLSRConfig | None):
        raise TypeError(f"config is {config!r}; give NLSRConfig(...), or NLSRConfig.from_preset('paper') for a preset")
    if not isinstance(patch, SafetyPatch | str | os.PathLike | None):
        raise TypeError(f"patch is a {type(patch).__name__}; give a SafetyPatch, its folder or its Hub id")
    if isinstance(tokenizer, str | os.PathLike):
        raise TypeError(f"tokenizer is {tokenizer!r}; give AutoTokenizer.from_pretrained({str(tokenizer)!r})")
    require_function(judge, "judge")


def _seen_by_a_rank(
    adapter: LiveAdapter, config: NLSRConfig, reference: Reference, method: str, given: set[str]
) -> dict[str, Any]:
    """What must be the same on all ranks that work together."""
    return {
        "the model": model_digest(adapter.model),
        "the adapter": fingerprint(adapter),
        "the reference": None if reference.updates is None else fingerprint(reference.updates),
        "the configuration": config.to_dict(),
        "the method": method,
        "the arguments that were given": sorted(given),
    }


def _made(
    method: str,
    adapter: LiveAdapter,
    config: NLSRConfig,
    reference: Reference,
    data: _Data,
    *,
    patch: SafetyPatch | None,
    weak: Any,
    earlier: fgsn.Earlier | None,
) -> Realignment:
    """The plan by one of the methods."""
    with _solvable():
        if method in _PLANNERS:
            return _PLANNERS[method](adapter, config, reference, data)
        if method == "fgsn":
            return _plan_fgsn(adapter, config, reference, data, earlier)
        if method in ("sum", "swap"):
            return _plan_nlsr(adapter, replace(config, update=method), patch, reference, open_updates(weak), data)
        if method == "one_shot":
            return _plan_one_shot(adapter, config, reference, data)
        return _plan_two_teacher(adapter, config, reference, data)


def choose_method(
    adapter: Adapter, config: NLSRConfig, *, patch: SafetyPatch | None, reference: Reference
) -> tuple[str, str]:
    """``sum``, ``swap``, ``one_shot``, ``two_teacher`` or another ``config.method``, and why, from the config and what
    is at hand.

    Raises:
        IncompatibleError: a patch for another adapter; LineageError: entries asked for, but the lineage is
            independent.
    """
    if config.method != "nlsr":
        return config.method, "asked for by the configuration"
    if config.update == "least_squares":
        return config.least_squares_form, "asked for by the configuration"
    if patch is not None:
        patch.require_fit(adapter)
    if config.update in ("sum", "swap"):
        if patch is None and reference.updates is not None:
            require_shared_lineage(Lineage.of(adapter, reference.updates))
        return config.update, "asked for by the configuration"
    if patch is None:
        return "two_teacher", f"no patch was given; the safe teacher is {reference.description}"
    try:
        decide(adapter, patch, config)
    except LineageError:
        return (
            "two_teacher",
            "a patch was given, but the adapter was not trained from its reference or was realigned since",
        )
    return "sum", "a patch was given and the adapter was trained from its reference"


def takes_delta(config: NLSRConfig) -> bool:
    """Whether the reference is what alignment changed; for NLSR it is a safe adapter, for antidote nothing."""
    return config.method != "nlsr" and "reference" in _USES[config.method]


def takes_utility(method: str) -> bool:
    """Whether the user's data have a part in the method that :func:`choose_method` chose."""
    return method in ("one_shot", "two_teacher") or "utility" in _USES.get(method, ())


def _read_source(reference: Any, adapter: Adapter, config: NLSRConfig) -> Reference:
    if config.method == "nlsr":
        return read_reference(reference, adapter)
    return read_delta(reference, adapter, config.method) if takes_delta(config) else BASE_REFERENCE


@contextmanager
def _solvable() -> Iterator[None]:
    """Says in the model's terms why a matrix had no factorisation."""
    try:
        yield
    except torch.linalg.LinAlgError as error:
        raise PeftNLSRError(
            "the model's activations on these data hold NaN or infinite values, so nothing was changed; check the "
            "base model's weights, and load it in bfloat16 or float32 where float16 overflows"
        ) from error


def _unused(method: str, config: NLSRConfig, given: set[str]) -> tuple[str, ...]:
    """A note on arguments that were given, but have no part in the method."""
    if method in _USES:
        used = set(_USES[method])
    elif method in ("one_shot", "two_teacher"):
        used = {"reference", "calibration", "utility"} | ({"work_dir"} if method == "two_teacher" else set())
    elif "patch" in given:
        used = {"patch"}
    else:
        used = {"reference", "weak"} | ({"calibration"} if config.score not in UNCALIBRATED else set())
    return (f"given, but not used by {method}: {', '.join(sorted(given - used))}",) if given - used else ()


class _Data:
    """The caller's data and how to read them."""

    def __init__(
        self,
        calibration: Iterable[Any] | None,
        utility: Iterable[Any] | None,
        tokenizer: Any,
        judge: Judge,
        progress: bool,
        work_dir: Path | None,
        ranks: Ranks,
    ) -> None:
        self.calibration, self.utility, self.work_dir, self.ranks = calibration, utility, work_dir, ranks
        self._tokenizer, self.judge, self.progress = tokenizer, judge, progress

    def tokenizer(self, adapter: LiveAdapter) -> Any:
        return self._tokenizer if self._tokenizer is not None else find_tokenizer(adapter.model)

    def examples(self, kind: str, adapter: LiveAdapter, config: NLSRConfig) -> tuple[list[Example], dict[str, Any]]:
        """The caller's ``safety`` or ``benign`` data as they are, or the built-in prompts of that kind; the record."""
        given = self.calibration if kind == "safety" else self.utility
        found = sample(
            [{"prompt": prompt.text} for prompt in builtin_prompts(kind, "calibration")] if given is None else given,
            self.tokenizer(adapter),
            config,
        )
        require_positions(adapter.model, max(len(e.tokens) for e in found))
        return found, {"source": "built-in prompts" if given is None else "given", "used": len(found)}

    def teaching(self, adapter: LiveAdapter, teacher: Factors, config: NLSRConfig) -> TeachingData:
        return prepare_data(
            adapter,
            calibration=self.calibration,
            utility=self.utility,
            tokenizer=self.tokenizer(adapter),
            safe_teacher=teacher,
            judge=self.judge,
            config=config,
            progress=self.progress,
            ranks=self.ranks,
        )


def _plan_two_teacher(adapter: LiveAdapter, config: NLSRConfig, reference: Reference, data: _Data) -> Realignment:
    teaching = data.teaching(adapter, reference.updates, config)
    if teaching.intact:
        return _left_alone(adapter, config, reference, teaching)
    require_refusals(teaching.safety, config, data.judge)
    solution = solve_two_teacher(
        adapter,
        safety=teaching.safety,
        utility=teaching.utility,
        safe_teacher=reference.updates,
        config=config,
        pad_id=pad_id(data.tokenizer(adapter)),
        progress=data.progress,
        work_dir=data.work_dir,
        ranks=data.ranks,
    )
    notes = teaching.notes + solution.notes
    if solution.left_alone:
        notes += (
            f"{len(solution.left_alone)} LoRA modules outside the model's blocks keep their update: "
            f"{', '.join(solution.left_alone[:4])}",
        )
    decisions = [Decision(name, None, name in solution.updates) for name in adapter]
    found = (solution.updates, solution.errors)
    record = {**teaching.record, "cost": solution.estimate}
    done = _record(adapter, config, reference.description, decisions, found, record, notes)
    modules = tuple(replace(m, solver_error=solution.solver_errors.get(m.module, 0.0)) for m in done.modules)
    return replace(done, modules=modules, truncation_norm=ON_INPUTS)


def _left_alone(adapter: LiveAdapter, config: NLSRConfig, reference: Reference, teaching: TeachingData) -> Realignment:
    """The record of a check that found nothing to repair."""
    decisions = [Decision(name, None, False) for name in adapter]
    return _record(adapter, config, reference.description, decisions, ({}, {}), teaching.record, teaching.notes)


def _plan_one_shot(adapter: LiveAdapter, config: NLSRConfig, reference: Reference, data: _Data) -> Realignment:
    teaching = data.teaching(adapter, reference.updates, config)
    if teaching.intact:
        return _left_alone(adapter, config, reference, teaching)
    if not teaching.utility:
        raise PeftNLSRError("least_squares_form='one_shot' needs utility data, found none after screening")
    padding = pad_id(data.tokenizer(adapter))
    safety, utility = (
        collect_statistics(
            adapter, collated(examples, config.nlsr_batch_size, padding), moments=True, progress=data.progress
        )
        for examples in (teaching.safety, teaching.utility)
    )
    updates: dict[str, LowRank] = {}
    errors: dict[str, float] = {}
    for name, tuned in adapter.snapshot().items():
        mine, theirs = safety[name], utility[name]
        assert mine.moment is not None and theirs.moment is not None
        updates[name], errors[name] = restore_one_shot(
            tuned,
            None if reference.updates is None else reference.updates[name],
            mine.moment.over(mine.tokens),
            theirs.moment.over(theirs.tokens),
            utility_weight=config.utility_weight,
            ridge=config.ridge,
        )
    decisions = [Decision(name, None, True) for name in adapter]
    found = (updates, errors)
    done = _record(adapter, config, reference.description, decisions, found, teaching.record, teaching.notes)
    return replace(done, truncation_norm=ON_INPUTS)


def _plan_nlsr(
    adapter: LiveAdapter,
    config: NLSRConfig,
    patch: SafetyPatch | None,
    reference: Reference,
    weak: Mapping[str, LowRank] | None,
    data: _Data,
) -> Realignment:
    record: dict[str, Any] = {}
    if patch is None:
        patch, record = _build_patch(adapter, config, reference, weak, data)
    patch.require_fit(adapter)
    decisions, notes = decide(adapter, patch, config)
    tuned = adapter.snapshot()
    updates: dict[str, LowRank] = {}
    errors: dict[str, float] = {}
    for decision in decisions:
        if decision.restored:
            name = decision.module
            updates[name], errors[name] = restore(tuned[name], patch, name, config)
    said = patch.record["reference"]["description"]
    done = _record(adapter, config, said, decisions, (updates, errors), record, notes)
    return replace(done, truncation_norm=truncation_norm(patch, config))


def _build_patch(
    adapter: LiveAdapter, config: NLSRConfig, reference: Reference, weak: Mapping[str, LowRank] | None, data: _Data
) -> tuple[SafetyPatch, dict[str, Any]]:
    amplified = reference_for_masks(reference, weak, config)
    if config.score in UNCALIBRATED:
        return build_nlsr_patch(amplified, None, config), {}
    if data.calibration is None:
        raise PeftNLSRError(
            f"score={config.score!r} needs safety examples with answers: pass calibration=..., or a finished patch=..."
        )
    tokenizer = data.tokenizer(adapter)
    examples = sample(data.calibration, tokenizer, config)
    require_positions(adapter.model, max(len(e.tokens) for e in examples))
    batches = collated(examples, config.nlsr_batch_size, pad_id(tokenizer))
    statistics = calibrate(adapter, batches, amplified, config, progress=data.progress)
    return build_nlsr_patch(amplified, statistics, config), {"safety": {"source": "given", "used": len(examples)}}


def _plan_safelora(adapter: LiveAdapter, config: NLSRConfig, reference: Reference, _: _Data) -> Realignment:
    assert reference.updates is not None
    tuned = adapter.snapshot()
    decisions, notes = decide_safelora(tuned, reference.updates, config)
    updates = {
        d.module: project(tuned[d.module], reference.updates[d.module], config) for d in decisions if d.restored
    }
    return _record(adapter, config, reference.description, decisions, (updates, {}), {}, notes)


def _plan_resta(adapter: LiveAdapter, config: NLSRConfig, reference: Reference, _: _Data) -> Realignment:
    assert reference.updates is not None
    updates: dict[str, LowRank] = {}
    errors: dict[str, float] = {}
    for name, tuned in adapter.snapshot().items():
        updates[name], errors[name] = add_safety_vector(name, tuned, reference.updates[name], config)
    decisions = [Decision(name, None, True) for name in adapter]
    done = _record(adapter, config, reference.description, decisions, (updates, errors), {})
    return replace(done, truncation_norm=OF_WEIGHTS)


def _plan_antidote(adapter: LiveAdapter, config: NLSRConfig, reference: Reference, data: _Data) -> Realignment:
    examples, record = data.examples("safety", adapter, config)
    batches = collated(examples, config.nlsr_batch_size, pad_id(data.tokenizer(adapter)))
    statistics = collect_statistics(
        adapter,
        batches,
        tokens=config.calibration_tokens,
        gradients="snip" if config.score == "snip" else None,
        progress=data.progress,
    )
    updates = {name: prune(name, tuned, statistics[name], config) for name, tuned in adapter.snapshot().items()}
    decisions = [Decision(name, None, True) for name in adapter]
    return _record(adapter, config, "none: harmful entries are pruned", decisions, (updates, {}), {"safety": record})


def _plan_fgsn(
    adapter: LiveAdapter, config: NLSRConfig, reference: Reference, data: _Data, earlier: fgsn.Earlier | None
) -> Realignment:
    assert reference.updates is not None
    harmful, of_harmful = data.examples("safety", adapter, config)
    utility, of_utility = data.examples("benign", adapter, config)
    found = fgsn.add_dimension(
        adapter,
        reference.updates,
        harmful,
        utility,
        earlier=earlier,
        config=config,
        pad_id=pad_id(data.tokenizer(adapter)),
        progress=data.progress,
    )
    decisions = [Decision(name, None, name in found.updates) for name in adapter]
    record = {"safety": of_harmful, "utility": of_utility, **found.data}
    done = _record(
        adapter, config, reference.description, decisions, (found.updates, {}), record, found.notes, found.originals
    )
    return replace(done, fingerprint_before=earlier.fingerprint_before) if earlier else done


_PLANNERS = {"safelora": _plan_safelora, "resta": _plan_resta, "antidote": _plan_antidote}
# What each method reads of what a caller may give, besides NLSR, where it depends on the form.
_USES = {
    "fgsn": ("reference", "calibration", "utility"),
    "safelora": ("reference",),
    "resta": ("reference",),
    "antidote": ("calibration",),
}


def _record(
    adapter: LiveAdapter,
    config: NLSRConfig,
    reference: str,
    decisions: list[Decision],
    found: tuple[Mapping[str, LowRank], Mapping[str, float]],
    data: dict[str, Any],
    notes: tuple[str, ...] = (),
    originals: dict[str, LowRank] | None = None,
) -> Realignment:
    originals = originals or adapter.snapshot()
    updates = {name: _as_stored(update, originals[name]) for name, update in found[0].items()}
    modules = tuple(ModuleRecord.of(d, originals[d.module], updates.get(d.module), found[1]) for d in decisions)
    return new_record(
        adapter,
        method="",
        reason="",
        config=config,
        reference=reference,
        modules=modules,
        data=data,
        notes=notes,
        updates=updates,
        originals=originals,
    )


def _as_stored(update: LowRank, original: LowRank) -> LowRank:
    """The update on the CPU, in the original's precision but at least float32."""
    dtype = torch.promote_types(original.A.dtype, torch.float32)
    return LowRank(update.A.to("cpu", dtype), update.B.to("cpu", dtype), update.scale)


def _require_unclaimed(adapter: LiveAdapter) -> None:
    """Refuses an adapter that was loaded with the record of its realignment (``register()``)."""
    name = adapter.info.adapter_name
    claim = getattr(adapter.model.peft_config[name], "nlsr_claim", None)
    if claim is not None and claim.covers(adapter):
        raise PeftNLSRError(
            f"adapter {name!r} was loaded with the record of its realignment (by {claim.record['method']}); realign "
            "the original, which revert_folder gives, or continue FGSN with previous=<its folder>"
        )


def _earlier(adapter: LiveAdapter, config: NLSRConfig, previous: str | os.PathLike[str] | None) -> fgsn.Earlier | None:
    """The FGSN runs that this one continues; None for a fresh adapter, an error for one realigned in another way."""
    if previous is not None:
        if config.method != "fgsn":
            raise ValueError(f"previous=... goes with method='fgsn', found method={config.method!r}")
        earlier = fgsn.Earlier.read(previous)
        if fingerprint(adapter) != earlier.fingerprint_after:
            raise IncompatibleError(
                f"the model's adapter is not the one in {previous} (its weights or dtype differ); load that one, with "
                "autocast_adapter_dtype=False where it is stored in 16 bits"
            )
        return earlier
    done = realignment_of(adapter)
    if done is None:
        _require_unclaimed(adapter)
        return None
    if config.method != "fgsn" or done.method != "fgsn":
        raise PeftNLSRError(
            f"adapter {done.adapter_name!r} is realigned already (by {done.method}); call revert(model) first to "
            "realign it in another way"
        )
    return fgsn.Earlier.of(done)
