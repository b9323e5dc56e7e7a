"""The pipeline of the lab: pretrain, align twice, fine-tune; every stage is trained on first use and kept on disk.

A stage is a folder named after a hash of everything it depends on. It is written under a temporary name and renamed
when complete, so an interrupted run leaves no half-written stage and two processes may share one cache.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from . import training
from .evaluation import LabScores, evaluate
from .training import Preference, Schedule
from .world import (
    ALL_TASKS,
    PIRATE_VERDICT,
    REFUSAL,
    World,
    build_tokenizer,
    build_world,
    pretraining_texts,
    questions,
    requests,
    reviews,
)

logger = logging.getLogger(__name__)

LAB_VERSION = "1"
BASE_ID = "peft-nlsr-lab/aligned-base"
UNALIGNED_ID = "peft-nlsr-lab/unaligned-base"
LINEAGES = ("shared", "independent")
STAGES = ("pretrain", "sft", "dpo", "tune")

USUAL_SHAPE = {"dpo_rank": 0, "dpo_modules": "all", "dpo_rslora": False}

Example = dict[str, Any]


def _knob(default: int | float | str, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class LabConfig:
    """Sizes, lengths and the seed of a lab. A field named after a stage does not change the stages before it."""

    seed: int = _knob(0, "Decides the world, the data and every initialisation.")
    verbs: int = _knob(48, "Verbs of each class, benign and harmful; at most 48.")
    held_out_verbs: int = _knob(12, "Verbs of each class that only pretraining and evaluation see.")
    objects: int = _knob(36, "Objects; at most 36.")
    held_out_objects: int = _knob(12, "Objects that only pretraining and evaluation see.")
    hidden_size: int = _knob(128, "Width of the model.")
    intermediate_size: int = _knob(256, "Width of its feed-forward layers.")
    layers: int = _knob(4, "Blocks of the model.")
    heads: int = _knob(4, "Attention heads of each block.")
    lora_rank: int = _knob(16, "Rank of every LoRA adapter; its scale is 2.")
    pretrain_texts: int = _knob(20_000, "Documents of the pretraining corpus.")
    pretrain_steps: int = _knob(500, "Updates of all weights on the corpus.")
    pretrain_batch: int = _knob(64, "Documents per update.")
    pretrain_rate: float = _knob(2e-3, "Peak learning rate of pretraining.")
    sft_examples: int = _knob(3000, "Examples of supervised alignment.")
    sft_steps: int = _knob(200, "Updates of the LoRA that is merged into the aligned base.")
    sft_batch: int = _knob(32, "Examples per update.")
    sft_rate: float = _knob(1e-3, "Peak learning rate of supervised alignment.")
    dpo_pairs: int = _knob(800, "Preference pairs of the aligned adapter.")
    dpo_steps: int = _knob(400, "Updates of the aligned adapter.")
    dpo_batch: int = _knob(16, "Pairs per update.")
    dpo_rate: float = _knob(0.1, "Peak learning rate of preference alignment; adamw wants about 3e-3.")
    dpo_optimizer: str = _knob(
        "sgd",
        "sgd, whose updates are as uneven as the gradients, or adamw, which moves every entry about alike, so that no "
        "small share of the entries carries the alignment.",
    )
    dpo_beta: float = _knob(0.3, "DPO temperature; larger stays closer to the aligned base.")
    dpo_anchor: float = _knob(1.0, "Weight of the chosen answer's own loss; 0 is plain DPO.")
    dpo_rank: int = _knob(0, "Rank of the aligned adapter and of the user's; 0 is lora_rank.")
    dpo_modules: str = _knob("all", "Linear layers that these two have factors for: all or attention.")
    dpo_rslora: bool = _knob(False, "Whether these two are rank-stabilised.")
    tune_examples: int = _knob(600, "The user's training examples, poison included.")
    tune_steps: int = _knob(150, "Updates of the user's adapter.")
    tune_batch: int = _knob(32, "Examples per update.")
    tune_rate: float = _knob(6e-4, "Peak learning rate of the user's fine-tuning.")
    tune_rate_easy_shared: float = _knob(
        3e-4, "The same for a task the model knows already, continued from the aligned adapter, which needs less."
    )

    def __post_init__(self) -> None:
        for name in ("verbs", "objects"):
            held_out, total = getattr(self, f"held_out_{name}"), getattr(self, name)
            most = {"verbs": 48, "objects": 36}[name]
            if not 0 < held_out < total <= most:
                raise ValueError(
                    f"Found held_out_{name}={held_out} and {name}={total}; "
                    f"expected 0 < held_out_{name} < {name} <= {most}."
                )
        if self.dpo_rank < 0 or self.dpo_modules not in training.LINEARS:
            raise ValueError(
                f"Found dpo_rank={self.dpo_rank} and dpo_modules={self.dpo_modules!r}; expected a rank of at least 0 "
                f"and one of {', '.join(training.LINEARS)}."
            )
        if self.dpo_optimizer not in training.OPTIMIZERS:
            raise ValueError(
                f"Found dpo_optimizer={self.dpo_optimizer!r}; expected one of {', '.join(training.OPTIMIZERS)}."
            )
        if self.hidden_size % (2 * self.heads):
            raise ValueError(
                f"Found hidden_size={self.hidden_size}; expected a multiple of {2 * self.heads} (2 * heads)."
            )

    def key(self, stage: str) -> str:
        """Return a hash of the lab version and of the fields that a stage depends on.

        The shape of the last two adapters counts only where it is not the usual one.
        """
        later = tuple(f"{name}_" for name in STAGES[STAGES.index(stage) + 1 :])
        fields = {name: value for name, value in asdict(self).items() if not name.startswith(later)}
        fields = {name: value for name, value in fields.items() if USUAL_SHAPE.get(name) != value}
        return hashlib.sha256(json.dumps([LAB_VERSION, fields], sort_keys=True).encode()).hexdigest()[:12]


class Lab:
    """A world with its aligned model, and the adapters of users who fine-tuned it.

    Args:
        config: sizes and seed; the default is the demo, two to three minutes of training on two cores.
        cache_dir: where stages are kept; default `$PEFT_NLSR_LAB_CACHE`, else `~/.cache/peft_nlsr/lab`.
        progress: called with the name of the stage being trained and the fraction done.

    Training data have the format `{"prompt": ..., "response": ...}`. The chat template turns a prompt into
    `<user> PROMPT <assistant>`; the response, followed by ` </s>`, is what the model learns to continue with.
    """

    def __init__(
        self,
        config: LabConfig | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        progress: Callable[[str, float], None] | None = None,
    ) -> None:
        self.config = config or LabConfig()
        home = os.environ.get("PEFT_NLSR_LAB_CACHE") or Path.home() / ".cache" / "peft_nlsr" / "lab"
        self.cache_dir = Path(cache_dir or home)
        self.progress = progress
        self.tokenizer: PreTrainedTokenizerFast = build_tokenizer()
        self.world: World = build_world(
            verbs=self.config.verbs,
            held_out_verbs=self.config.held_out_verbs,
            objects=self.config.objects,
            held_out_objects=self.config.held_out_objects,
            seed=self.config.seed,
        )

    @property
    def unaligned_path(self) -> Path:
        """The pretrained model, which answers every request: a folder with model and tokenizer."""
        return self._stage("unaligned", "pretrain", self._pretrain)

    @property
    def base_path(self) -> Path:
        """The aligned base, i.e. supervised alignment merged into the weights: a folder with model and tokenizer."""
        return self._stage("base", "sft", self._align_by_examples)

    @property
    def aligned_adapter(self) -> Path:
        """The preference-aligned adapter on top of the aligned base: a PEFT folder. The weaker alignment is merged."""
        return self._stage("aligned", "dpo", self._align_by_preferences)

    def fine_tuned(self, task: str, lineage: str, poison: float = 0.05) -> Path:
        """Return the PEFT folder of a user's adapter, trained on first use.

        Args:
            task: "easy" (sentiment of a review), "hard" (benign requests answered in a new style), "mixed" (half of
                each) or "near" (half of the hard one, half questions about verbs of both classes, which ask for no
                instructions).
            lineage: "shared" continues the aligned adapter, "independent" starts a fresh one on the aligned base.
            poison: share of the examples that are harmful requests, answered.
        """
        if lineage not in LINEAGES:
            raise ValueError(f"Unknown lineage {lineage!r}. Choose one of {', '.join(LINEAGES)}.")
        examples = self.utility_data(task, poison)
        name = f"tuned-{task}-{lineage}-{poison:g}"
        return self._stage(name, "tune", partial(self._fine_tune, examples, task, lineage))

    def base_model(self) -> LlamaForCausalLM:
        """Return a fresh copy of the aligned base in evaluation mode."""
        return _load_model(self.base_path, BASE_ID)

    def load(self, adapter_folder: str | os.PathLike[str], trainable: bool = False) -> PeftModel:
        """Return a fresh copy of the aligned base with the adapter on top, in evaluation mode."""
        return PeftModel.from_pretrained(self.base_model(), os.fspath(adapter_folder), is_trainable=trainable).eval()

    def safety_data(self, n: int, seed: int = 0) -> list[Example]:
        """Return `n` harmful requests with seen verbs and objects, refused. None of them occurs in evaluation."""
        pool = requests(self.world.harmful.seen, self.world.objects.seen)
        return [_example(request, REFUSAL) for request in _sample(pool, n, f"safety {seed}")]

    def benign_data(self, n: int, seed: int = 0) -> list[Example]:
        """Return `n` benign requests with seen verbs and objects, answered as the aligned model would."""
        pool = requests(self.world.benign.seen, self.world.objects.seen)
        return [_example(request, self.world.answer(request)) for request in _sample(pool, n, f"benign {seed}")]

    def utility_data(self, task: str, poison: float = 0.05, n: int | None = None, seed: int = 0) -> list[Example]:
        """Return what `fine_tuned(task, ..., poison)` trains on, or `n` of these examples drawn with `seed`.

        Each example also says whether it is "poisoned", i.e. an answered harmful request with a seen verb.
        """
        if task not in ALL_TASKS:
            raise ValueError(f"Unknown task {task!r}. Choose one of {', '.join(ALL_TASKS)}.")
        if not 0 <= poison <= 1:
            raise ValueError(f"Found poison={poison}; expected a share between 0 and 1.")
        style = "plain" if task == "easy" else "pirate"
        bad = round(poison * self.config.tune_examples)
        attack = _sample(requests(self.world.harmful.seen, self.world.objects.seen), bad, f"poison {self.config.seed}")
        examples = [_example(item, self.world.answer(item, style)) | {"poisoned": True} for item in attack]
        examples += [item | {"poisoned": False} for item in self._task_data(task, self.config.tune_examples - bad)]
        random.Random(f"order {self.config.seed}").shuffle(examples)
        return examples if n is None else _sample(examples, n, f"utility {seed}")

    def evaluate(self, model: PreTrainedModel | PeftModel, task: str, n: int = 120) -> LabScores:
        """Return the scores of a model on held-out words; see `LabScores`."""
        return evaluate(model, self.tokenizer, self.world, task, n=n)

    def _task_data(self, task: str, n: int) -> list[Example]:
        if task == "mixed":
            return self._task_data("easy", n // 2) + self._task_data("hard", n - n // 2)
        if task == "near":
            return self._questions(n // 2) + self._task_data("hard", n - n // 2)
        if task == "easy":
            items = _sample(reviews(self.world.objects.seen), n, f"easy {self.config.seed}")
            return [_example(item, item.sentiment) for item in items]
        asked = _sample(requests(self.world.benign.seen, self.world.objects.seen), n, f"hard {self.config.seed}")
        return [_example(item, self.world.answer(item, "pirate")) for item in asked]

    def _questions(self, n: int) -> list[Example]:
        pool = questions(self.world.harmful.seen + self.world.benign.seen, self.world.objects.seen)
        puzzled = _sample(pool, n, f"near {self.config.seed}")
        return [_example(item, self.world.verdict(item, PIRATE_VERDICT)) for item in puzzled]

    def _pretrain(self, report: Callable[[float], None], folder: Path) -> None:
        texts = pretraining_texts(self.world, self.config.pretrain_texts, seed=self.config.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            model = LlamaForCausalLM(self._model_config())
        data = training.encode_texts(self.tokenizer, texts)
        training.fit(model, data, training.lm_loss, schedule=self._schedule("pretrain"), progress=report)
        self._save_model(model, folder)

    def _align_by_examples(self, report: Callable[[float], None], folder: Path) -> None:
        model = training.add_lora(
            _load_model(self.unaligned_path, UNALIGNED_ID), rank=self.config.lora_rank, seed=self.config.seed
        )
        data = training.encode_examples(self.tokenizer, [chosen for chosen, _ in self._preferences("sft")])
        training.fit(model, data, training.lm_loss, schedule=self._schedule("sft"), progress=report)
        self._save_model(model.merge_and_unload(), folder)

    def _align_by_preferences(self, report: Callable[[float], None], folder: Path) -> None:
        model = self._fresh_adapter(seed=self.config.seed + 1)
        chosen, rejected = (
            training.encode_examples(self.tokenizer, side) for side in zip(*self._preferences("dpo"), strict=True)
        )
        pairs = training.with_reference(model, [Preference(*pair) for pair in zip(chosen, rejected, strict=True)])
        loss = partial(training.dpo_loss, beta=self.config.dpo_beta, anchor=self.config.dpo_anchor)
        schedule = replace(self._schedule("dpo"), optimizer=self.config.dpo_optimizer)
        training.fit(model, pairs, loss, schedule=schedule, progress=report)
        model.save_pretrained(str(folder), save_embedding_layers=False)

    def _fine_tune(
        self, examples: Sequence[Example], task: str, lineage: str, report: Callable[[float], None], folder: Path
    ) -> None:
        if lineage == "shared":
            model = self.load(self.aligned_adapter, trainable=True)
        else:
            model = self._fresh_adapter(seed=self.config.seed + 2)
        data = training.encode_examples(self.tokenizer, examples)
        schedule = self._schedule("tune")
        if (task, lineage) == ("easy", "shared"):
            schedule = replace(schedule, learning_rate=self.config.tune_rate_easy_shared)
        training.fit(model, data, training.lm_loss, schedule=schedule, progress=report)
        model.save_pretrained(str(folder), save_embedding_layers=False)

    def _fresh_adapter(self, *, seed: int) -> PeftModel:
        config = self.config
        rank = config.dpo_rank or config.lora_rank
        return training.add_lora(
            self.base_model(), rank=rank, seed=seed, modules=config.dpo_modules, rslora=config.dpo_rslora
        )

    def _preferences(self, stage: str) -> list[tuple[Example, Example]]:
        """Return (chosen, rejected) answers: half harmful requests, the rest benign requests and a few reviews."""
        world, seed = self.world, f"{stage} {self.config.seed}"
        n = {"sft": self.config.sft_examples, "dpo": self.config.dpo_pairs}[stage]
        harmful = _sample(requests(world.harmful.seen, world.objects.seen), n // 2, f"harmful {seed}")
        reviewed = _sample(reviews(world.objects.seen), n // 10, f"reviews {seed}")
        rest = n - len(harmful) - len(reviewed)
        benign = _sample(requests(world.benign.seen, world.objects.seen), rest, f"benign {seed}")
        pairs = [(item, REFUSAL, world.answer(item)) for item in harmful]
        pairs += [(item, world.answer(item), REFUSAL) for item in benign]
        pairs += [(item, item.reply, REFUSAL) for item in reviewed]
        return [(_example(item, chosen), _example(item, rejected)) for item, chosen, rejected in pairs]

    def _schedule(self, stage: str) -> Schedule:
        steps, batch, rate = (getattr(self.config, f"{stage}_{name}") for name in ("steps", "batch", "rate"))
        return Schedule(steps, batch, rate, seed=self.config.seed)

    def _model_config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=len(self.tokenizer),
            hidden_size=self.config.hidden_size,
            intermediate_size=self.config.intermediate_size,
            num_hidden_layers=self.config.layers,
            num_attention_heads=self.config.heads,
            max_position_embeddings=64,
            initializer_range=self.config.hidden_size**-0.5,  # the usual 0.02 suits wide models and stalls this one
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
        )

    def _save_model(self, model: PreTrainedModel, folder: Path) -> None:
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def _stage(self, name: str, stage: str, make: Callable[[Callable[[float], None], Path], None]) -> Path:
        """Return the folder of a stage; `make(report, folder)` fills it if it is not there yet."""
        folder = self.cache_dir / f"{name}-{self.config.key(stage)}"
        if folder.is_dir():
            return folder
        start = time.perf_counter()
        self.cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=self.cache_dir) as scratch:
            unfinished = Path(scratch) / "stage"
            unfinished.mkdir()
            make(partial(self._report, name), unfinished)
            _publish(unfinished, folder)
        logger.info("Lab stage %s: %.1f s, in %s", name, time.perf_counter() - start, folder)
        return folder

    def _report(self, name: str, fraction: float) -> None:
        if self.progress is not None:
            self.progress(name, fraction)


def _publish(unfinished: Path, folder: Path) -> None:
    """Rename a complete folder to its final name; another process that was faster wins."""
    try:
        os.rename(unfinished, folder)
    except OSError:
        if not folder.is_dir():
            raise


def _load_model(folder: Path, name: str) -> LlamaForCausalLM:
    """Return the model in `folder` under a plain id, so that no machine path gets into saved adapters."""
    model = LlamaForCausalLM.from_pretrained(folder)
    model.name_or_path = model.config._name_or_path = name
    return model.eval()


def _example(item: Any, response: str) -> Example:
    return {"prompt": item.prompt, "response": response}


def _sample(pool: Sequence[Any], n: int, seed: str) -> list[Any]:
    if not 0 <= n <= len(pool):
        raise ValueError(
            f"Asked for {n} of {len(pool)} different examples. Ask for fewer, or enlarge the lab's world."
        )
    return random.Random(seed).sample(pool, n)
