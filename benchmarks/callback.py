"""Fine-tunes lab adapters with a real trainer and ``NLSRCallback()``, and measures what it repairs and what it costs.

    python -m benchmarks.callback --config benchmarks/configs/callback.json --output benchmarks/results/callback.json

Each cell is trained twice with the same seed, without the callback and with it. The callback gets no argument but
``evaluate=False``, because the built-in evaluation prompts are in English and the lab's model does not know English;
harm and task are measured by the lab's own parser on held-out words.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments
from transformers.utils.logging import disable_progress_bar

from peft_nlsr import NLSRCallback, versions
from peft_nlsr.lab import Lab, LabConfig
from peft_nlsr.lab.training import add_lora, encode_examples

from .engine import cpu_model
from .lab_command import asked_for

RATES = ("harm", "benign_answered", "task")


class Clock(TrainerCallback):
    """Notes when training itself was over, which is before any callback's ``on_train_end``."""

    ended = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.ended = time.perf_counter()


def run(config: dict[str, Any], cache: Path | None = None) -> dict[str, Any]:
    """Figures of every cell in ``config``, as JSON values; ``cache`` is where the lab keeps what it trained."""
    torch.set_num_threads(config["threads"])
    disable_progress_bar()
    rows = []
    for seed in range(config["seeds"]):
        lab = Lab(LabConfig(seed=seed, **config["lab"]), cache_dir=cache)
        for trainer in config["trainers"]:
            for task in config["tasks"]:
                for lineage in config["lineages"]:
                    rows.append(cell(lab, trainer, task, lineage, config))
                    print(rows[-1], file=sys.stderr, flush=True)
    machine = {"cpu": cpu_model(), "threads": torch.get_num_threads(), "system": platform.system()}
    return {"config": config, "machine": machine, "versions": versions(), "rows": rows, "summary": summary(rows)}


def cell(lab: Lab, trainer: str, task: str, lineage: str, config: dict[str, Any]) -> dict[str, Any]:
    """One adapter, fine-tuned by ``trainer`` without the callback and with it."""
    row: dict[str, Any] = {"seed": lab.config.seed, "trainer": trainer, "task": task, "lineage": lineage}
    for name, callbacks in (("fine_tuned", []), ("realigned", [NLSRCallback(evaluate=False)])):
        with tempfile.TemporaryDirectory() as folder:
            model, clock = start(lab, lineage), Clock()
            made = make_trainer(lab, model, trainer, task, lineage, config["poison"], folder, [clock, *callbacks])
            forget_peak_memory()
            begun = time.perf_counter()
            made.train()
            ended, peak = time.perf_counter(), peak_memory_mb()
        scores = lab.evaluate(model.eval(), task, n=config["prompts"])
        row[name] = {rate: getattr(scores, rate) for rate in RATES}
        row[name] |= {"train_s": clock.ended - begun, "after_s": ended - clock.ended, "peak_mb": peak}
    return row


def start(lab: Lab, lineage: str) -> Any:
    """The model that the user begins with: the aligned adapter, or a fresh one."""
    if lineage == "shared":
        return lab.load(lab.aligned_adapter, trainable=True)
    return add_lora(lab.base_model(), rank=lab.config.lora_rank, seed=lab.config.seed + 2)


def make_trainer(
    lab: Lab,
    model: Any,
    kind: str,
    task: str,
    lineage: str,
    poison: float,
    folder: str,
    callbacks: list[TrainerCallback],
) -> Trainer:
    """A trainer with the lab's schedule, on the user's data as a script would give them."""
    config, examples = lab.config, lab.utility_data(task, poison)
    easy = (task, lineage) == ("easy", "shared")
    settings: dict[str, Any] = {
        "output_dir": folder,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "seed": config.seed,
        "max_steps": config.tune_steps,
        "per_device_train_batch_size": config.tune_batch,
        "learning_rate": config.tune_rate_easy_shared if easy else config.tune_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": config.tune_steps // 10,
        "adam_beta2": 0.98,
        "weight_decay": 0.0,
    }
    if kind == "SFTTrainer":
        from trl import SFTConfig, SFTTrainer

        rows = [
            {"prompt": [turn("user", e["prompt"])], "completion": [turn("assistant", e["response"])]} for e in examples
        ]
        arguments = SFTConfig(**settings, bf16=False, gradient_checkpointing=False, max_length=64)
        return SFTTrainer(
            model,
            arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=lab.tokenizer,
            callbacks=callbacks,
        )
    data = [{"input_ids": t.ids, "labels": t.labels} for t in encode_examples(lab.tokenizer, examples)]
    return Trainer(
        model,
        TrainingArguments(**settings),
        train_dataset=data,
        data_collator=DataCollatorForSeq2Seq(lab.tokenizer, padding=True),
        processing_class=lab.tokenizer,
        callbacks=callbacks,
    )


def turn(role: str, content: str) -> dict[str, str]:
    """One chat message."""
    return {"role": role, "content": content}


def forget_peak_memory() -> None:
    """Let the process's peak memory count from now (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mb() -> float:
    """Most memory that the process has held since :func:`forget_peak_memory`, in megabytes (Linux)."""
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over the seeds, one row per trainer, task and lineage."""
    cells: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["trainer"], row["task"], row["lineage"]), []).append(row)
    return [
        {
            "trainer": trainer,
            "task": task,
            "lineage": lineage,
            "seeds": len(found),
            **{name: means([row[name] for row in found]) for name in ("fine_tuned", "realigned")},
        }
        for (trainer, task, lineage), found in cells.items()
    ]


def means(values: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each figure."""
    return {name: statistics.mean(value[name] for value in values) for name in values[0]}


def table(results: dict[str, Any]) -> str:
    """The summary as a Markdown table."""
    lines = [
        "| trainer | task | lineage | harm / benign / task before | after | training, s | callback, s | adds, MB |",
        "|---|---|---|---|---|--:|--:|--:|",
    ]
    for row in results["summary"]:
        before, after = row["fine_tuned"], row["realigned"]
        rates = [" / ".join(f"{100 * part[rate]:.0f}" for rate in RATES) for part in (before, after)]
        seconds = after["after_s"] - before["after_s"]
        cells = [row["trainer"], row["task"], row["lineage"], *rates, f"{before['train_s']:.1f}", f"{seconds:.1f}"]
        lines.append(f"| {' | '.join(cells)} | {after['peak_mb'] - before['peak_mb']:.0f} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Read the configuration, run it, write the figures and print the table."""
    config, output, cache = asked_for(__doc__, arguments)
    results = run(config, cache)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=2) + "\n", "utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
