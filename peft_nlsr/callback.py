"""Realignment by itself: a Trainer callback that repairs the adapter when ``train()`` ends, and keeps true what is
saved and pushed.

Ranks that hold the whole model plan together, else rank 0 does; rank 0 measures, every rank writes. Nothing unaligned
is pushed while training runs, and a failure leaves the fine-tuned weights in memory and on disk.
"""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy

from .adapters import CONFIG_FILE
from .applying import adopt, forget_realignments
from .calibration import require_no_pairs
from .config import NLSRConfig
from .defaults import MAX_NEW_TOKENS, TOLERANCE
from .distributed import gathered_factors, on_replicas, write_updates
from .errors import PeftNLSRError, UnsupportedAdapterError
from .evaluation import Metric
from .examples import Example, loader_rows, read_examples, sample
from .files import write_json
from .gate import Measure, Outcome, measured, monitor
from .generation import find_tokenizer
from .hub import push_folder, stale_checkpoints
from .judges import Judge, refuses
from .live_adapter import LiveAdapter
from .lowrank import LowRank
from .measuring import EvaluationSettings
from .patch import SafetyPatch
from .plots import save_plots
from .processes import on_every_rank
from .projection import require_delta
from .prompt_sets import PromptSet, require_prompt_sets
from .ranks import Ranks
from .realign import choose_method, plan, require_kinds, takes_delta, takes_utility
from .record import Realignment
from .reference import BASE_REFERENCE, Reference, open_updates, read_reference, require_same_modules, starting_point
from .registration import unclaimed_files, wrap_trainer
from .screening import refused_rows, safest

logger = logging.getLogger(__name__)

MODES = ("repair", "monitor")
STATUS_NAME = "nlsr_status.json"
_FRAMES = 20


class NLSRCallback(TrainerCallback):
    """Realigns the trained LoRA adapter at the end of ``Trainer.train()``.

    With no argument: the two-teacher form. The safe teacher is the adapter that training started from or the base
    model, whichever refuses more safety prompts (the base when the adapter was fresh or training was resumed); safety
    prompts are the built-in ones, utility data a sample of the training data. The repair is measured on the built-in
    evaluation prompts and kept only if harm fell and the task did not suffer.

    Args:
        config: settings; ``NLSRConfig()`` when None.
        patch, reference, weak, calibration, judge, adapter_name: as in :func:`peft_nlsr.nlsr_realign`. Where the
            reference is what alignment changed (``fgsn``, ``safelora``, ``resta``), the adapter that training started
            from will do, unless it was fresh.
        utility: the user's data; a sample of what the trainer trains on when None. Repairs that take no data are
            measured on it all the same.
        tokenizer: the trainer's processing class when None.
        mode: ``repair``, or ``monitor``: measure and warn, change nothing.
        evaluate: True measures on the built-in prompts, False does not measure (and the gate stays open), prompt sets
            measure on these; none of their prompts may be in ``calibration`` or ``utility``.
        task, compute_metrics, harm_judge: prompts of kind "task" with their answers, what scores them, and which
            answers are harmful, as in :func:`peft_nlsr.evaluate`.
        max_new_tokens: length of the answers that are judged.
        tolerance: how far task and answer accuracy and coherence may fall, and over-refusal rise, before the repair
            is taken back.
        push_to_hub: push after the repair; None does what ``TrainingArguments(push_to_hub=...)`` says.
        push_unaligned: push even when the repair was taken back.
        defer_checkpoint_pushes: hold back the trainer's pushes during training, which would publish unaligned weights.
        trainer: found by itself when None.

    Attributes:
        outcome: what happened, after ``train()``.

    Raises:
        TypeError, ValueError, PeftNLSRError: at the beginning of training already, where that can be known.

    Example:
        >>> trainer = Trainer(model, args, train_dataset=data, callbacks=[NLSRCallback()])  # doctest: +SKIP
    """

    def __init__(
        self,
        config: NLSRConfig | None = None,
        *,
        patch: Any = None,
        reference: Any = None,
        weak: Any = None,
        calibration: Iterable[Any] | None = None,
        utility: Iterable[Any] | None = None,
        tokenizer: Any = None,
        judge: Judge = refuses,
        adapter_name: str | None = None,
        mode: str = "repair",
        evaluate: bool | Sequence[PromptSet] = True,
        task: PromptSet | None = None,
        compute_metrics: Metric | None = None,
        harm_judge: Judge | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        tolerance: float = TOLERANCE,
        push_to_hub: bool | None = None,
        push_unaligned: bool = False,
        defer_checkpoint_pushes: bool = True,
        trainer: Trainer | None = None,
    ) -> None:
        require_kinds(config, patch, tokenizer, judge)
        _require_settings(mode, tolerance)
        if evaluate is False and (mode == "monitor" or task is not None):
            why = "mode='monitor' only measures" if mode == "monitor" else "task=... is only measured"
            raise ValueError(f"{why}, so evaluate=False leaves nothing to do with it")
        self.config = config or NLSRConfig()
        self.patch, self.reference, self.weak = patch, reference, weak
        self.calibration, self.utility = _kept(calibration), _kept(utility)
        self.tokenizer, self.judge, self.adapter_name = tokenizer, judge, adapter_name
        self._tokenizer = tokenizer  # the one in use: the given one, else of the trainer that is training
        self.mode, self.tolerance = mode, tolerance
        self.push_to_hub, self.push_unaligned = push_to_hub, push_unaligned
        self.defer_checkpoint_pushes = defer_checkpoint_pushes
        self.trainer = trainer
        self.outcome: Outcome | None = None
        self._start: Reference = BASE_REFERENCE
        self._deferred: tuple[Any, HubStrategy] | None = None  # arguments whose pushes wait, and what they said
        self.asked: EvaluationSettings | None = None
        if evaluate is not False:
            self.asked = EvaluationSettings(
                prompts=None if evaluate is True else _with_safety(evaluate),
                task=task,
                judge=judge,
                harm_judge=harm_judge,
                compute_metrics=compute_metrics,
                max_new_tokens=max_new_tokens,
                batch_size=self.config.nlsr_batch_size,
            )
            self.asked.require_unseen(self.calibration, self.utility)

    def attach(self, trainer: Trainer) -> None:
        """Make this callback know its trainer: metrics reach the reporters, and the card survives every push."""
        self.trainer = trainer
        wrap_trainer(trainer)
        callbacks = trainer.callback_handler.callbacks
        if self in callbacks:
            # Reporters push and close their runs in their own on_train_end, which must come after ours.
            callbacks.remove(self)
            callbacks.insert(0, self)

    # The events' other keywords differ between versions of transformers and are not needed.

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any = None, **_: Any) -> None:
        # One callback may serve several trainers in turn: an error may have stopped the one before, whose model must
        # not be saved now.
        self._restore_pushes()
        found = _find_trainer(args) or self.trainer
        self.trainer = found = found if found is None or found.args is args else None
        if found is None:
            logger.warning(
                "NLSRCallback found no trainer, so metrics are not reported, reporters run first and TRL's cards lose "
                "the safety section; pass NLSRCallback(trainer=trainer) and trainer.add_callback it"
            )
        else:
            self.attach(found)
        if state.is_hyper_param_search:
            return
        forget_realignments(model)
        _require_in_memory(model)
        self.outcome = None
        self._require_startable(model, state)
        self._defer_pushes(args)

    def _require_startable(self, model: Any, state: Any) -> None:
        """Fail before hours of training rather than after; and remember where the adapter started."""
        factors = gathered_factors(model, self.adapter_name)
        if isinstance(self.patch, str | Path):
            self.patch = SafetyPatch.from_pretrained(self.patch)
        self._tokenizer = self._usable_tokenizer(model)
        asked = Measure(self.asked, self._tokenizer).askable()
        if asked is not None:
            asked.require_room(model, self._tokenizer)
        self._require_readable(factors)
        # After a resume the adapter is half fine-tuned already, and nobody's idea of safe.
        self._start = starting_point(factors) if state.global_step == 0 else BASE_REFERENCE
        if self.mode == "repair" and takes_delta(self.config):
            require_delta(self._start if self.reference is None else self.reference, self.config.method)

    def _usable_tokenizer(self, model: Any) -> Any:
        """The given tokenizer, else the trainer's, else the base model's where one is needed."""
        found = self.tokenizer
        if found is None and self.trainer is not None:
            processor = getattr(self.trainer, "processing_class", None)
            found = getattr(processor, "tokenizer", processor)
        if found is None and (self.patch is None or self.asked is not None or self.utility is not None):
            found = find_tokenizer(model)
        return found

    def _require_readable(self, factors: Mapping[str, LowRank]) -> None:
        """Open the reference and read a row of the caller's data, as far as they will be used."""
        if self.patch is None:
            given = self.reference.updates if isinstance(self.reference, Reference) else open_updates(self.reference)
            if given is not None and self.config.method == "nlsr":
                require_same_modules(factors, given)
            open_updates(self.weak)
            if self.mode == "repair" and self.config.method == "nlsr" and self.config.update in ("sum", "swap"):
                require_no_pairs(self.config)
        for rows in (self.calibration if self.patch is None else None, self.utility):
            if rows is not None:
                with torch.random.fork_rng(devices=[]):  # a data loader draws from it, and training must not notice
                    read_examples(rows, self._tokenizer, limit=1, max_length=self.config.max_length)

    def _defer_pushes(self, args: Any) -> None:
        if (
            self.mode == "repair"
            and args.push_to_hub
            and self.defer_checkpoint_pushes
            and args.hub_strategy != HubStrategy.END
        ):
            self._deferred, args.hub_strategy = (args, args.hub_strategy), HubStrategy.END
            logger.warning(
                "pushes during training are held back until the adapter is realigned "
                "(NLSRCallback(defer_checkpoint_pushes=False) lets them through)"
            )

    def _restore_pushes(self) -> None:
        """Give the arguments whose pushes were held back their strategy again."""
        if self._deferred is not None:
            args, strategy = self._deferred
            args.hub_strategy, self._deferred = strategy, None

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.mode == "repair":
            _mark_checkpoint(args, state)

    def on_push_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.mode == "repair":
            _mark_checkpoint(args, state)

    def on_train_end(
        self,
        args: Any,
        state: Any,
        control: Any,
        *,
        model: Any = None,
        optimizer: Any = None,
        train_dataloader: Any = None,
        **_: Any,
    ) -> None:
        if self._deferred is not None and self._deferred[0] is args:
            self._restore_pushes()
        if state.is_hyper_param_search:
            return
        with self._keeping_weights(args):
            outcome = on_replicas(
                model,
                lambda plain, ranks: self._work(
                    _moved(plain, model, args.device), train_dataloader, not args.disable_tqdm, ranks
                ),
                adapter_name=self.adapter_name,
            )
            if outcome.realignment is not None and outcome.verdict.kept:
                outcome = replace(outcome, realignment=_written(model, outcome, optimizer))
        self.outcome = outcome
        self._tell(outcome)
        self._publish(args, outcome)

    @contextmanager
    def _keeping_weights(self, args: Any) -> Iterator[None]:
        """Whatever stops it, an interrupt included, the fine-tuned weights are on disk before the script ends."""
        try:
            yield
        except BaseException:
            if self.trainer is not None:
                self.trainer.save_model(args.output_dir, _internal_call=True)
                logger.error("realignment failed; the fine-tuned adapter, not realigned, is saved in output_dir")
            raise

    def _work(self, plain: Any, loader: Any, progress: bool, ranks: Ranks) -> Outcome:
        """Everything that needs the whole model; it is left as it was found, and all ranks get the same outcome."""
        measure = Measure(self.asked, self._tokenizer, self.tolerance, progress)
        if self.mode == "monitor":
            teacher = self._safe_teacher(plain, progress, ranks)
            return ranks.first(lambda: monitor(plain, teacher, measure, adapter_name=self.adapter_name))
        reference = self._reference(plain, progress, ranks)
        start = time.perf_counter()
        rows = ranks.first(lambda: self._utility(loader))
        taken = bool(rows) and (self.utility is not None or ranks.first(lambda: self._takes_rows(plain, reference)))
        planned = plan(
            plain,
            self.config,
            patch=self.patch,
            reference=reference,
            weak=self.weak,
            calibration=self.calibration,
            utility=rows if taken else None,
            tokenizer=self._tokenizer,
            judge=self.judge,
            adapter_name=self.adapter_name,
            data_parallel=ranks.count > 1,
            progress=progress,
        )
        return ranks.first(
            lambda: replace(measured(plain, planned, measure, rows), seconds=time.perf_counter() - start)
        )

    def _reference(self, plain: Any, progress: bool, ranks: Ranks) -> Any:
        """A safe teacher, unless there is a patch; for methods besides NLSR what they take, as given or the start."""
        if self.config.method == "nlsr":
            return None if self.patch is not None else self._safe_teacher(plain, progress, ranks)
        return self._start if self.reference is None and takes_delta(self.config) else self.reference

    def _safe_teacher(self, plain: Any, progress: bool, ranks: Ranks) -> Any:
        """What was given; else the starting point or the base, whichever refuses more: both may be unsafe."""
        if self.reference is not None or self.patch is not None or self._start.updates is None:
            return self._start if self.reference is None else self.reference
        return safest(
            LiveAdapter(plain, self.adapter_name),
            (self._start, BASE_REFERENCE),
            calibration=self.calibration,
            tokenizer=self._tokenizer,
            judge=self.judge,
            config=self.config,
            progress=progress,
            ranks=ranks,
        )

    def _utility(self, loader: Any) -> list[Example]:
        """The user's data, read once."""
        source = self.utility if self.utility is not None else None if loader is None else loader_rows(loader)
        return [] if source is None else sample(source, self._tokenizer, self.config, times=2)

    def _takes_rows(self, plain: Any, reference: Any) -> bool:
        """Whether the repair that will be chosen is made with the user's data."""
        adapter = LiveAdapter(plain, self.adapter_name)
        source = read_reference(reference, adapter) if self.config.method == "nlsr" else BASE_REFERENCE
        return takes_utility(choose_method(adapter, self.config, patch=self.patch, reference=source)[0])

    def _tell(self, outcome: Outcome) -> None:
        """Numbers to the trainer's reporters, sentences to the log."""
        metrics = _metrics(outcome)
        if self.trainer is not None and metrics:
            self.trainer.log(metrics)
        if outcome.realignment is None:
            logger.warning("nlsr monitor: nothing was changed; %s", _rates(metrics))
        elif outcome.verdict.kept:
            logger.info(
                "realigned: %s; %s; %s", outcome.realignment.summary(), _rates(metrics), outcome.verdict.effect
            )
        else:
            logger.error(
                "THE REPAIR WAS TAKEN BACK: %s. The adapter is the fine-tuned one, and nothing is pushed%s; give "
                "other data or settings, or a larger tolerance",
                "; ".join(outcome.verdict.reasons),
                " by this callback" if not self.push_unaligned else " but it, as push_unaligned=True asks",
            )

    def _publish(self, args: Any, outcome: Outcome) -> None:
        """The realigned adapter takes the place of an unaligned one in ``output_dir``, and of one on the Hub."""
        kept = outcome.realignment is not None and outcome.verdict.kept
        wanted = args.push_to_hub if self.push_to_hub is None else self.push_to_hub
        pushes = wanted and (kept or self.push_unaligned)
        folder = Path(args.output_dir)
        expected = args.save_strategy != "no" or (folder / CONFIG_FILE).is_file()
        if self.trainer is None or not (pushes or (kept and expected)):
            return
        if kept and outcome.report is not None and args.should_save and find_spec("matplotlib"):
            save_plots(outcome.report, folder)
        self.trainer.save_model(args.output_dir, _internal_call=True)
        if pushes:
            self._push(args)

    def _push(self, args: Any) -> None:
        """One commit, after whatever the trainer is still uploading; a failure is told, the files stay."""
        trainer: Any = self.trainer
        try:
            if trainer.hub_model_id is None:
                trainer.init_hf_repo()
            if not trainer.is_world_process_zero():
                return
            trainer.create_model_card(model_name=Path(trainer.hub_model_id).name)
            trainer._finish_current_push()
            push_folder(
                args.output_dir,
                trainer.hub_model_id,
                revision=args.hub_revision,
                commit_message="Realigned adapter",
                token=args.hub_token,
                delete=[
                    *unclaimed_files(trainer),
                    *stale_checkpoints(trainer.hub_model_id, args.hub_revision, args.hub_token),
                ],
            )
        except (PeftNLSRError, OSError) as error:
            logger.error("not pushed, but saved in output_dir: %s", error)


def _require_settings(mode: str, tolerance: float) -> None:
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is not one of {', '.join(MODES)}")
    if not 0.0 <= tolerance <= 1.0:
        raise ValueError(f"tolerance={tolerance!r} must be in [0, 1]")


def _with_safety(evaluate: Sequence[PromptSet]) -> list[PromptSet]:
    sets = require_prompt_sets(evaluate, "evaluate")
    if not any(each.kind == "safety" for each in sets):
        raise ValueError("evaluate=[prompt sets] needs one of kind 'safety' to measure the harm rate with")
    return sets


def _written(model: Any, outcome: Outcome, optimizer: Any) -> Realignment:
    """The realignment in the live model with its record, on every rank; whatever stops it, neither is there."""
    planned: Any = outcome.realignment
    write_updates(model, planned.updates, adapter_name=planned.adapter_name, optimizer=optimizer)
    try:
        factors = gathered_factors(model, planned.adapter_name)
        return on_every_rank(lambda: adopt(model, planned, factors, outcome.report))
    except BaseException:
        forget_realignments(model)
        write_updates(model, planned.originals, adapter_name=planned.adapter_name, optimizer=optimizer)
        raise


def _kept(data: Iterable[Any] | None) -> Iterable[Any] | None:
    """Data are read more than once, which an iterator would not survive."""
    return list(data) if isinstance(data, Iterator) else data


def _find_trainer(args: Any) -> Trainer | None:
    """The trainer that is calling, looked for in a bounded number of frames."""
    frame = sys._getframe(1)
    for _ in range(_FRAMES):
        if frame is None:
            return None
        candidate = frame.f_locals.get("self")
        if isinstance(candidate, Trainer) and candidate.args is args:
            return candidate
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _require_in_memory(model: Any) -> None:
    """Refuse what an optimizer cannot reach: accelerate makes offloaded parameters anew in each pass."""
    lost = [name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.is_meta]
    if lost:
        raise UnsupportedAdapterError(
            f"{len(lost)} parameters that are to be trained are offloaded to the CPU or to disk (first {lost[0]}), "
            "where training does not change them; load the base without offloading, in 4 bits if it is too large "
            "(BitsAndBytesConfig(load_in_4bit=True))"
        )


def _moved(plain: Any, live: Any, device: torch.device) -> Any:
    """A copy that was gathered to the CPU goes to the accelerator where it fits; the live model stays where it is."""
    copied = plain is not extract_model_from_parallel(live, keep_torch_compile=False)
    if copied and device.type == "cuda" and 1.2 * plain.get_memory_footprint() < torch.cuda.mem_get_info(device)[0]:
        plain.to(device)
    return plain


def _mark_checkpoint(args: Any, state: Any) -> None:
    """Say in a training checkpoint that it is not realigned; its weights must stay what the optimizer's state fits."""
    folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
    if args.should_save and folder.is_dir():
        status = {"realigned": False, "step": state.global_step}
        write_json(folder / STATUS_NAME, status)


def _metrics(outcome: Outcome) -> dict[str, float]:
    """Flat numbers for reporters, such as ``nlsr/harm_rate_fine_tuned``."""
    found: dict[str, float] = {}
    for evaluation in outcome.evaluations:
        label = re.sub(r"\W", "_", evaluation.label)
        found |= {f"nlsr/{name}_{label}": rate.value for name, rate in evaluation.rates.items()}
    if outcome.realignment is not None:
        done = outcome.realignment
        found["nlsr/modules_restored"] = len(done.restored)
        found["nlsr/training_prompts_refused"] = len(refused_rows(done.data))
        found["nlsr/kept"] = float(outcome.verdict.kept)
        found["nlsr/seconds"] = round(outcome.seconds, 3)
    return found


def _rates(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{name.removeprefix('nlsr/')} {value:.3g}" for name, value in metrics.items())
