"""Programs that test_distributed.py starts on two processes, `python -m torch.distributed.run`; findings go to files.

The traps of a distributed run only show in one: a trainer makes the models, gloo on the CPU stands in for a cluster.
"""

import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from accelerate import PartialState
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from tiny import apart, assert_same_state, quick, refuses_attacks, rows, state_of, word_tokenizer
from transformers import AutoModelForCausalLM

from peft_nlsr import distributed, live_adapter
from peft_nlsr import examples as reading
from peft_nlsr.calibration import collect_statistics
from peft_nlsr.distributed import gathered_factors, on_rank_zero, on_replicas, refuse_unsupported, write_updates
from peft_nlsr.errors import IncompatibleError
from peft_nlsr.examples import Example, read_examples
from peft_nlsr.live_adapter import LiveAdapter
from peft_nlsr.lowrank import LowRank, fingerprint
from peft_nlsr.processes import on_every_rank
from peft_nlsr.prompt_sets import PromptSet
from peft_nlsr.ranks import ALONE, Ranks
from peft_nlsr.realign import nlsr_realign, plan
from peft_nlsr.record import Realignment
from peft_nlsr.summing import own_batches, reduce_statistics
from peft_nlsr.two_teacher import solve_two_teacher

LORA = {"r": 3, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
PATIENCE = timedelta(seconds=15)
QUERY = torch.arange(12).reshape(2, 6)


def lora_model(base: str) -> PeftModel:
    """A LoRA on the base of a folder, its factors drawn from seed 0, B included; rank 3 leaves uneven shards."""
    torch.manual_seed(0)
    return get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(init_lora_weights=False, **LORA))


def planned(model: Any) -> Realignment:
    """The realignment that each program plans: two-teacher form, little data, a screened row."""
    return plan(
        model,
        quick(),
        calibration=rows(6, poisoned=range(6)),
        utility=rows(6, poisoned=[2]),
        tokenizer=word_tokenizer(),
        judge=refuses_attacks,
        progress=False,
    )


def save_factors(factors: Mapping[str, LowRank], path: Path) -> None:
    """Write ``NAME.A`` and ``NAME.B`` of every module."""
    tensors = {f"{name}.{side}": getattr(u, side) for name, u in factors.items() for side in ("A", "B")}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def portrait(model: Any) -> dict[str, Any]:
    """What must be the same of a model and its plain copy, as JSON values."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    with torch.no_grad():
        logits = model.eval()(input_ids=QUERY.to(model.device), output_hidden_states=True)
    return {
        "classes": [type(module).__name__ for module in model.modules()],
        "tensors": {name: [str(t.dtype), list(t.shape), t.requires_grad] for name, t in tensors},
        "name_or_path": model.config._name_or_path,
        "config": json.loads(model.config.to_json_string()),
        "tied": model.get_input_embeddings().weight is model.get_output_embeddings().weight,
        "logits": logits.logits.tolist(),
        "hidden_states": len(logits.hidden_states),
    }


def trained(kind: str, base: str, out: Path) -> None:
    """Train with ``kind``, realign in on_train_end as a callback would, save, and take a step of size zero."""
    from transformers import Trainer, TrainerCallback

    args = training_arguments(kind, out)
    ids = torch.randint(6, 60, (16, 10), generator=torch.Generator().manual_seed(0)).tolist()
    data = [{"input_ids": row, "labels": row} for row in ids]

    class Realign(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            self.start = fingerprint(gathered_factors(given["model"]))

        def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            trainer.evaluate()
            realign(trainer, given["model"], given["optimizer"], out, self.start)

    trainer = Trainer(lora_model(base), args, train_dataset=data, eval_dataset=data[:4], callbacks=[Realign()])
    trainer.train()


def tokenised() -> list[dict[str, Any]]:
    """Answered requests of one length, two of them attacks, as a plain trainer takes them."""
    examples = read_examples(rows(16, poisoned=(1, 5)), word_tokenizer(), limit=16, max_length=24)
    ordered = sorted(examples, key=lambda example: example.index)
    return [{"input_ids": list(e.tokens), "labels": [-100] * len(e.prompt) + list(e.answer)} for e in ordered]


def prompt_sets() -> list[PromptSet]:
    """Two prompts of each kind that matters to the gate."""
    safety, benign = ("attack the word1", "attack the word2"), ("paint the word1", "paint the word2")
    return [PromptSet("s", "safety", ("s0", "s1"), safety), PromptSet("b", "benign", ("b0", "b1"), benign)]


def with_callback(kind: str, base: str, out: Path) -> None:
    """Train with ``kind`` and the callback, save as a script does, and take a step of size zero."""
    from transformers import Trainer

    from peft_nlsr.callback import NLSRCallback

    class Noting(NLSRCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            self.before = gathered_factors(given["model"])
            self.optimizer = given["optimizer"]
            super().on_train_end(args, state, control, **given)

    callback = Noting(quick(), judge=refuses_attacks, evaluate=prompt_sets(), max_new_tokens=4, tolerance=1.0)
    trainer = Trainer(
        lora_model(base),
        training_arguments(kind, out),
        train_dataset=tokenised(),
        processing_class=word_tokenizer(),
        callbacks=[callback],
    )
    trainer.train()
    after = gathered_factors(trainer.model)
    trainer.save_model(str(out / "saved"))
    step_of_size_zero(trainer, callback.optimizer)
    done = callback.outcome
    assert done is not None and done.realignment is not None
    tell(
        out,
        {
            "fingerprints": [fingerprint(f) for f in (callback.before, after, gathered_factors(trainer.model))],
            "recorded": [done.realignment.fingerprint_before, done.realignment.fingerprint_after],
            "refused_rows": done.realignment.data["utility"]["refused_rows"],
            "reference": done.realignment.reference,
            "evaluations": [evaluation.label for evaluation in done.evaluations],
            "ranks": done.realignment.data["cost"]["ranks"],
        },
    )
    if dist.get_rank() == 0:
        save_factors(callback.before, out / "before.safetensors")
        save_factors(after, out / "after.safetensors")


def training_arguments(kind: str, out: Path) -> Any:
    from accelerate.utils import DistributedType
    from transformers import TrainingArguments

    settings: dict[str, Any] = {}
    if kind.startswith("fsdp2"):
        layer = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
        settings = {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "FULL_STATE_DICT", **layer}}
    elif kind.startswith("zero"):
        zero = {"stage": int(kind[4]), "stage3_gather_16bit_weights_on_model_save": True}
        settings["deepspeed"] = {"train_micro_batch_size_per_gpu": "auto", "zero_optimization": zero}
        settings["deepspeed"]["bf16"] = {"enabled": "auto"}
    quiet = {"report_to": [], "disable_tqdm": True, "logging_strategy": "no", "save_strategy": "no"}
    small = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "dataloader_pin_memory": False}
    settings["bf16"] = kind.endswith("bf16")
    args = TrainingArguments(str(out / "trainer"), use_cpu=True, **small, **quiet, **settings)
    if kind.startswith("fsdp2"):  # accelerate runs FSDP on the CPU as DDP, without a word
        assert args._setup_devices is not None
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return args


def realign(trainer: Any, model: Any, optimizer: Any, out: Path, start: str) -> None:
    """Plan on rank 0, write everywhere, save, step; every state on the way goes to a file."""
    held = lora_parameters(model)
    before = gathered_factors(model)
    whole = on_rank_zero(model, portrait)
    found = on_rank_zero(model, planned)
    stopped = outcome(lambda: write_interrupted(model, found.updates, optimizer, on=0))
    step_of_size_zero(trainer, optimizer)  # would bring master copies of a half patch to light
    put_back = fingerprint(gathered_factors(model)) == fingerprint(before)
    # ZeRO-3's parameters lead to their optimizer, those of ZeRO-1/2 do not.
    without = outcome(lambda: write_updates(model, found.updates))
    if without[0] != "returned":
        write_updates(model, found.updates, optimizer=optimizer)
    after = gathered_factors(model)
    trainer.save_model(str(out / "saved"))
    step_of_size_zero(trainer, optimizer)
    stepped = gathered_factors(model)
    told = {
        "class": type(model).__name__,
        "interrupted": stopped,
        "put back": put_back,
        "without optimizer": without,
        "identity": held == lora_parameters(model),
        "fingerprints": [
            start,
            fingerprint(before),
            found.fingerprint_before,
            fingerprint(after),
            fingerprint(stepped),
        ],
        "portrait": whole,
    }
    tell(out, told)
    if dist.get_rank() == 0:
        states = {"before": before, "planned": found.updates, "after": after, "stepped": stepped}
        for name, factors in states.items():
            save_factors(factors, out / f"{name}.safetensors")


def lora_parameters(model: Any) -> dict[str, int]:
    return {name: id(parameter) for name, parameter in model.named_parameters() if ".lora_" in name}


def step_of_size_zero(trainer: Any, optimizer: Any) -> None:
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    trainer.model_wrapped.train()
    loss = trainer.model_wrapped(input_ids=QUERY, labels=QUERY).loss
    trainer.accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()


def outcome(step: Callable[[], Any]) -> list[Any]:
    """``["returned", value]`` or the name and text of what was raised."""
    try:
        return ["returned", step()]
    except BaseException as error:
        return [type(error).__name__, str(error)]


@dataclass(frozen=True)
class Parcel:
    """A result with tensors in it, as a realignment is."""

    name: str
    tensors: dict[str, torch.Tensor]


def parcel() -> Parcel:
    ramp = torch.arange(6.0)
    odd = {"bf16": ramp.bfloat16(), "bool": ramp > 2, "complex": ramp + 1j, "int": ramp.long(), "one": ramp.sum()}
    return Parcel("odd", {**odd, "empty": ramp[:0], "turned": ramp.reshape(2, 3).T, "same": ramp, "again": ramp})


class OwnError(Exception):
    """Cannot be built from its arguments, so pickle cannot carry it."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


def fail(error: BaseException) -> Any:
    raise error


def faults(base: str, out: Path) -> None:
    """One rank fails, in many ways; each time every rank must say so, and the model be as it was."""
    model = torch.nn.parallel.DistributedDataParallel(lora_model(base))
    good = gathered_factors(model)
    name = next(iter(good))
    steps = {**failing_work(model), **failing_writes(model, good)}
    told = {case: outcome(step) for case, step in steps.items()}
    told["parcel"] = outcome(lambda: same(on_rank_zero(model, lambda _: parcel()), parcel()))
    told["unchanged"] = fingerprint(gathered_factors(model)) == fingerprint(good)
    write_updates(model, {name: doubled_rank(good[name])})
    told["grown"] = [LiveAdapter(model)[name].rank, LiveAdapter(model).info.config["r"]]
    tell(out, told)


@contextmanager
def interrupted(on: int, leave: Callable[[], Any] | None = None) -> Iterator[None]:
    """Rank ``on`` is interrupted, or leaves, when half of its new values are in place."""
    if dist.get_rank() != on:
        yield
        return
    put, store, stored = distributed._put, live_adapter._store, itertools.count()
    stop = leave or (lambda: fail(KeyboardInterrupt("stop")))

    def put_half(new: Sequence[Any]) -> None:
        put(new[: len(new) // 2 + 1])
        if new:  # under ZeRO-3 none is written outside its context
            stop()

    def store_three(linear: Any, new: Any) -> None:
        store(linear, new)
        if next(stored) == 2:
            stop()

    with patch.object(distributed, "_put", put_half), patch.object(live_adapter, "_store", store_three):
        yield


def failing_work(model: Any) -> dict[str, Callable[[], Any]]:
    second = dist.get_rank() == 1
    return {
        "work": lambda: on_rank_zero(model, lambda _: fail(IncompatibleError("rank 8, expected 16"))),
        "own class": lambda: on_rank_zero(model, lambda _: fail(OwnError("two", "words"))),
        "interrupt": lambda: on_rank_zero(model, lambda _: fail(KeyboardInterrupt("stop"))),
        "result": lambda: on_rank_zero(model, lambda _: lambda: None),
        "elsewhere": lambda: on_every_rank(lambda: fail(ValueError("no disk")) if second else None),
        "adapter": lambda: on_rank_zero(model, lambda _: 1, adapter_name="other" if second else "default"),
    }


def failing_writes(model: Any, good: Mapping[str, LowRank]) -> dict[str, Callable[[], Any]]:
    rank, name = dist.get_rank(), next(iter(good))
    bad = {name: LowRank(good[name].A * float("nan"), good[name].B, good[name].scale)}
    return {
        "unknown": lambda: write_updates(model, {"layer": good[name]} if rank else good),
        "not finite": lambda: write_updates(model, bad if rank else good),
        "diverging": lambda: write_updates(model, {name: good[name].times(1.0 + rank)}),
        "interrupted": lambda: write_interrupted(model, {name: u.times(2.0) for name, u in good.items()}),
        "interrupted growth": lambda: write_interrupted(model, {name: doubled_rank(u) for name, u in good.items()}),
    }


def write_interrupted(model: Any, updates: Mapping[str, LowRank], optimizer: Any = None, on: int = 1) -> None:
    with interrupted(on):
        write_updates(model, updates, optimizer=optimizer)


def doubled_rank(update: LowRank) -> LowRank:
    return LowRank(update.A.repeat(2, 1), update.B.repeat(1, 2), update.scale)


def tell(out: Path, told: Mapping[str, Any]) -> None:
    (out / f"told{dist.get_rank()}.json").write_text(json.dumps(told))


def same(one: Parcel, other: Parcel) -> bool:
    assert one.tensors["same"] is one.tensors["again"]
    assert all(one.tensors[k].dtype == t.dtype and one.tensors[k].equal(t) for k, t in other.tensors.items())
    return one.name == other.name


def shards(base: str, out: Path) -> None:
    """FSDP2 as torch has it, without a trainer: what is read and written after forward passes, and refusals."""
    from torch.distributed.fsdp import FSDPModule, fully_shard

    model, plain = lora_model(base), lora_model(base)
    before = fingerprint(LiveAdapter(plain))
    for layer in checkpointed(model).get_base_model().model.layers:
        fully_shard(layer, reshard_after_forward=False)
    fully_shard(model)
    told: dict[str, Any] = {"gathered": fingerprint(gathered_factors(model)) == before}
    model.register_forward_hook(Watcher().note)
    model(input_ids=QUERY, output_hidden_states=True)  # leaves parameters whole, and transformers' hooks in place
    told["live and whole"] = outcome(lambda: bool(LiveAdapter(model)))
    told["portrait"] = on_rank_zero(model, portrait)
    told["gathered again"] = fingerprint(gathered_factors(model)) == before
    model(input_ids=QUERY)
    doubled = {name: update.times(2.0) for name, update in LiveAdapter(plain).snapshot().items()}
    told["interrupted"] = outcome(lambda: write_interrupted(model, doubled))
    told["put back"] = fingerprint(gathered_factors(model)) == before
    name, update = next(iter(LiveAdapter(plain).snapshot().items()))
    for written in (model, plain):
        write_updates(written, {name: update.times(2.0)})
    for module in model.modules():  # as the next backward pass does: what was written to whole parameters is lost
        if isinstance(module, FSDPModule):
            module.reshard()
    told["written"] = fingerprint(gathered_factors(model)) == fingerprint(LiveAdapter(plain)) != before
    told["forward"] = torch.allclose(model(input_ids=QUERY).logits, plain(input_ids=QUERY).logits, atol=1e-6)
    told["grown"] = outcome(lambda: write_updates(model, {name: doubled_rank(update)}))
    tell(out, told | refusals(base, model))


def refusals(base: str, sharded: Any) -> dict[str, list[Any]]:
    from torch.distributed.fsdp import FullyShardedDataParallel

    told = {"live": outcome(lambda: bool(LiveAdapter(sharded)))}
    sharded.config.quantization_config = {"quant_method": "bitsandbytes"}
    old = FullyShardedDataParallel(lora_model(base), device_id=torch.device("cpu"), use_orig_params=True)
    split = tensor_parallel(lora_model(base))
    models = {"quantised": sharded, "fsdp1": old, "tensor parallel": split}
    return told | {case: outcome(partial(refuse_unsupported, model)) for case, model in models.items()}


def checkpointed(model: PeftModel) -> PeftModel:
    """The model with its first layer in the wrapper that FSDP's activation checkpointing uses."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    layers = model.get_base_model().model.layers
    layers[0] = checkpoint_wrapper(layers[0])
    return model


class Watcher:
    """The owner of a hook, a trainer for example, which holds what cannot be copied."""

    def note(self, *_: Any) -> None: ...

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise AssertionError("copied")


def tensor_parallel(model: PeftModel) -> PeftModel:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    parallelize_module(model.get_output_embeddings(), mesh, ColwiseParallel())
    return model


def drawn(base: str, seed: int) -> list[Any]:
    """The modules that a Bernoulli draw restores and the written adapter; the global generator stands at ``seed``."""
    model = lora_model(base)
    stronger = {name: update.times(1.5) for name, update in gathered_factors(model).items()}
    config = quick(update="sum", selection="bernoulli", score="magnitude", sparsity=0.5)
    torch.manual_seed(seed)
    found = on_rank_zero(model, lambda plain: plan(plain, config, reference=stronger, progress=False))
    write_updates(model, found.updates)
    return [list(found.restored), fingerprint(gathered_factors(model))]


def sums(base: str, out: Path) -> None:
    """Statistics over both ranks of batches that do not divide evenly, and of a single one."""
    model, rank = lora_model(base), dist.get_rank()
    lengths = [5, 9, 7, 4, 3]
    batches = [
        {"input_ids": torch.randint(6, 60, (2, n), generator=torch.Generator().manual_seed(n))} for n in lengths
    ]

    def collect(given: list[Any], **settings: Any) -> Any:
        return (
            collect_statistics(model, given, codes=True, moments=True, progress=False, **settings) if given else None
        )

    settings = {"exact": {}, "sketch": {"sketch_above": 0, "sketch_rows": 6}}
    for case, changes in settings.items():
        reduce_statistics(collect(list(own_batches(batches)), **changes)).save(out / f"{case}{rank}")
        collect(batches, **changes).save(out / f"{case}{rank}_alone")
    reduce_statistics(collect(list(own_batches(batches[:1])))).save(out / f"one{rank}")
    collect(batches[:1]).save(out / f"one{rank}_alone")
    mixed = {} if rank else settings["sketch"]
    told = {
        "mixed": outcome(lambda: reduce_statistics(collect(batches, **mixed))),
        "none": outcome(lambda: reduce_statistics(None)),
        "prepared": outcome(lambda: own_batches(prepared_loader())),
        "drawn": drawn(base, seed=dist.get_rank()),
    }
    tell(out, told)


def prepared_loader() -> Any:
    from accelerate import Accelerator

    return Accelerator(cpu=True).prepare(torch.utils.data.DataLoader([1, 2, 3]))


def examples(count: int, *, first: int = 0) -> list[Example]:
    """Answered requests of several lengths."""
    ids = torch.randint(6, 60, (first + count, 12), generator=torch.Generator().manual_seed(5)).tolist()
    return [Example(tuple(row[: 4 + i % 5]), tuple(row[9:]), i) for i, row in enumerate(ids)][first:]


def solved(model: Any, ranks: Ranks, amount: tuple[int, int], work_dir: Path | None = None, **changes: Any) -> Any:
    """The two-teacher solution with so many examples of both kinds, in batches of four."""
    return solve_two_teacher(
        LiveAdapter(model),
        safety=[replace(e, refusal=e.index % 3 > 0) for e in examples(amount[0])],
        utility=examples(amount[1], first=20),
        safe_teacher=None,
        config=quick(ridge=0.1, **changes),
        progress=False,
        work_dir=work_dir,
        ranks=ranks,
    )


@contextmanager
def stopped(module: torch.nn.Module, on: int, after: int) -> Iterator[None]:
    """The module's pass raises on one rank, after so many."""
    passes = itertools.count()

    def stop(*_: Any) -> None:
        if dist.get_rank() == on and next(passes) == after:
            raise RuntimeError(f"rank {on} has no memory")

    handle = module.register_forward_hook(stop)
    try:
        yield
    finally:
        handle.remove()


SHARED = {
    "full": {"amount": (13, 9), "solver": "full"},
    "moment": {"amount": (13, 9), "solver": "moment"},
    "dual": {"amount": (13, 9), "solver": "dual"},
    "iterative": {"amount": (13, 9), "solver": "iterative"},
    "drawn": {"amount": (13, 9), "solver": "moment", "max_tokens": 60},
    "full, one batch": {"amount": (3, 0), "solver": "full"},
    "moment, one batch": {"amount": (3, 0), "solver": "moment"},
    "dual, one batch": {"amount": (3, 2), "solver": "dual"},
}


def shares(base: str, out: Path) -> None:
    """The two-teacher form on both ranks together, against one alone; failures on one of them in the middle."""
    reading.SHORT = 1  # several batches of these short rows
    model, ranks = lora_model(base), Ranks.launched()
    before = state_of(model)
    told: dict[str, Any] = {}
    for case, given in SHARED.items():
        together, alone = solved(model, ranks, **given), solved(model, ALONE, **given)
        told[case] = {
            "gap": apart(together.updates, alone.updates),
            "fingerprint": fingerprint(together.updates),
            "ranks": together.estimate["ranks"],
            "counts": [[s.estimate[key] for key in ("tokens", "counted", "kept")] for s in (together, alone)],
            "cheaper": together.estimate["pass_operations"] / alone.estimate["pass_operations"],
            "notes": [list(together.notes), list(alone.notes)],
        }
    told |= {f"stopped {case}": found for case, found in stopped_runs(model, ranks).items()}
    told |= resumed(model, ranks, out)
    try:
        assert_same_state(state_of(model), before)
        told["unchanged"] = True
    except AssertionError:
        told["unchanged"] = False
    tell(out, told | realigned(base, ranks) | {"replicas": replicas(base, ranks)})


def replicas(base: str, ranks: Ranks) -> list[Any]:
    """How many ranks work on replicas that are the same, and on some that are not; and an error of one of them."""
    model = torch.nn.parallel.DistributedDataParallel(lora_model(base))
    found: list[Any] = [on_replicas(model, lambda whole, ranks: [ranks.count, whole is model.module])]
    failing = lambda whole, _: fail(ValueError("no disk")) if ranks.number else [0]  # noqa: E731
    found.append(outcome(lambda: on_replicas(model, failing)))
    with torch.no_grad():
        model.module.get_input_embeddings().weight += ranks.number
    return [*found, on_replicas(model, lambda _, ranks: ranks.count)]


def stopped_runs(model: Any, ranks: Ranks) -> dict[str, Any]:
    first, last = model.get_submodule("model.model.embed_tokens"), list(LiveAdapter(model).layers.values())[-1]
    found = {}
    for case, (module, on, after) in {
        "at the beginning": (first, 1, 0),
        "in the middle": (last, 1, 7),
        "on rank 0": (last, 0, 7),
    }.items():
        with stopped(module, on, after):
            found[case] = outcome(lambda: bool(solved(model, ranks, (13, 9))))
    found["outside of an inner one"] = outcome(lambda: outside(ranks))
    found["without the others"] = outcome(lambda: bool(solved(model, ALONE, (5, 5)))) if ranks.number == 0 else None
    return found


def outside(ranks: Ranks) -> None:
    """Rank 1 fails where the other has begun a step inside a step already."""
    with ranks.together():
        if ranks.number == 1:
            raise RuntimeError("rank 1 has no memory")
        with ranks.together():
            ranks.gather(ranks.number)


def resumed(model: Any, ranks: Ranks, out: Path) -> dict[str, Any]:
    """Interrupted in the second block and gone on with; and by one process, which is refused."""
    whole = fingerprint(solved(model, ranks, (13, 9)).updates)
    folder, last = out / "work", list(LiveAdapter(model).layers.values())[-1]
    with stopped(last, 1, 5):
        interrupted = outcome(lambda: bool(solved(model, ranks, (13, 9), folder)))
    dist.barrier()
    files = sorted(path.name for path in folder.iterdir())
    dist.barrier()
    refused = outcome(lambda: bool(solved(model, ALONE, (13, 9), folder))) if ranks.number else None
    dist.barrier()
    again = fingerprint(solved(model, ranks, (13, 9), folder).updates)
    left = folder.exists()
    return {"work_dir": [interrupted, files, refused, whole == again, left]}


def realigned(base: str, ranks: Ranks) -> dict[str, Any]:
    """``nlsr_realign`` by both ranks, by each alone, with arguments that differ, and interrupted while it writes."""
    settings = {"calibration": rows(9, poisoned=range(9)), "utility": rows(9, poisoned=[2]), "progress": False}
    settings |= {"tokenizer": word_tokenizer(), "judge": refuses_attacks}
    model, other, third = lora_model(base), lora_model(base), lora_model(base)
    nlsr_realign(model, quick(), **settings, data_parallel=True)
    nlsr_realign(other, quick(), **settings)
    start = fingerprint(LiveAdapter(third))
    differ = quick(ridge=0.1 * (1 + ranks.number))
    with interrupted(1):
        stopped = outcome(lambda: bool(nlsr_realign(third, quick(), **settings, data_parallel=True)))
    refused = outcome(lambda: bool(nlsr_realign(third, differ, **settings, data_parallel=True)))
    patchless = quick(update="sum", score="magnitude", sparsity=0.5)
    stronger = {name: update.times(1.5) for name, update in LiveAdapter(third).snapshot().items()}
    by_first = plan(third, patchless, reference=stronger, progress=False, data_parallel=True)
    return {
        "realigned": {
            "gap": apart(LiveAdapter(model), LiveAdapter(other)),
            "fingerprint": fingerprint(LiveAdapter(model)),
            "record": model.nlsr_realignment.to_dict(),
            "alone": other.nlsr_realignment.to_dict(),
        },
        "interrupted": [*stopped, start == fingerprint(LiveAdapter(third)), hasattr(third, "nlsr_realignment")],
        "differing": refused,
        "other method": [by_first.method, fingerprint(by_first.updates)],
    }


def waits(base: str, out: Path) -> None:
    """Work that takes longer than the group lets a collective wait."""
    model = lora_model(base)
    longer = PATIENCE.total_seconds() + 4
    tell(out, {"long": outcome(lambda: on_rank_zero(model, lambda _: time.sleep(longer) or "done"))})


def stops(base: str, out: Path) -> None:
    """Rank 0 raises and nobody catches it: the whole run must end."""
    on_rank_zero(lora_model(base), lambda _: [][0] if out else None)


def dies(base: str, out: Path) -> None:
    """Rank 1 is gone in the middle of its write; rank 0 outlives it and must hold its old values."""
    from torch.distributed.fsdp import fully_shard

    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher ends the others, if they let it
    model = lora_model(base)
    fully_shard(model)
    new = {name: update.times(2.0) for name, update in gathered_factors(model).items()}
    before = {name: p.detach().to_local().clone() for name, p in model.named_parameters()}
    with interrupted(1, leave=lambda: os._exit(1)):
        found = outcome(lambda: write_updates(model, new))
    same_shards = all(torch.equal(before[name], p.detach().to_local()) for name, p in model.named_parameters())
    tell(out, {"write": found, "put back": same_shards})


def main(names: str, base: str, out: str) -> None:
    """Run programs by name, separated by commas, each with a folder of its own."""
    torch.set_num_threads(1)
    programs = {
        "faults": faults,
        "shards": shards,
        "shares": shares,
        "sums": sums,
        "waits": waits,
        "stops": stops,
        "dies": dies,
    }
    for name in names.split(","):
        folder = Path(out) / name
        folder.mkdir(parents=True, exist_ok=True)
        if name in programs:
            PartialState(cpu=True, **({"timeout": PATIENCE} if name == "waits" else {}))
            programs[name](base, folder)
        elif name.endswith("-callback"):
            with_callback(name.removesuffix("-callback"), base, folder)
        else:
            trained(name, base, folder)
    if dist.is_initialized():  # the group's threads may otherwise outlive the interpreter, which aborts
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
