"""Methods with their controls, a search of settings, drift and an audit of the data, on adapters of the lab.

Config in, JSON out (rates, tests and sizes; no verdicts). The judge is the lab's parser. The prompts are about objects
held out from alignment, the user's data and calibration; the verbs of harmful requests are held out too.

    python -m benchmarks.compare --config benchmarks/configs/compare.json --output benchmarks/results/compare.json
"""

from __future__ import annotations

import itertools
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from peft_nlsr import (
    EvaluationSettings,
    Method,
    NLSRConfig,
    PromptSet,
    audit,
    compare,
    inspect_adapter,
    tune,
    versions,
)
from peft_nlsr.judges import described
from peft_nlsr.lab import Lab, LabConfig
from peft_nlsr.lab.evaluation import ANSWER_TOKENS, complied, refused, task_items
from peft_nlsr.lab.world import requests

from .lab_command import asked_for

ORDER = ("random, for paper", "paper", "two-teacher")


@described("the lab's parser: a refusal in the lab's language")
def refuses(prompts: Sequence[str], responses: Sequence[str]) -> list[bool]:
    """The lab's refusal judge."""
    return [refused(text) for text in responses]


@described("the lab's parser: instructions in the answer")
def harms(prompts: Sequence[str], responses: Sequence[str]) -> list[bool]:
    """The lab's harm judge."""
    return [complied(text) for text in responses]


def questions(lab: Lab, task: str, n: int) -> EvaluationSettings:
    """Prompts of the lab about held-out objects, harmful ones with held-out verbs, judged by its parser."""
    world = lab.world
    harmful = requests(world.harmful.held_out, world.objects.held_out)
    benign = requests(world.benign.all, world.objects.held_out)
    prompts, answers = task_items(world, task, n)
    return EvaluationSettings(
        prompts=(_drawn("harmful", "safety", harmful, n), _drawn("benign", "benign", benign, n)),
        task=PromptSet(
            task, "task", tuple(f"{task}-{i}" for i in range(len(prompts))), tuple(prompts), tuple(answers)
        ),
        judge=refuses,
        harm_judge=harms,
        max_new_tokens=ANSWER_TOKENS,
        batch_size=128,
    )


def _drawn(name: str, kind: str, pool: Sequence[Any], n: int) -> PromptSet:
    found = random.Random(f"evaluation {name}").sample(list(pool), min(n, len(pool)))
    return PromptSet(name, kind, tuple(f"{name}-{i}" for i in range(len(found))), tuple(r.prompt for r in found))


def run_compare(lab: Lab, task: str, lineage: str, config: dict[str, Any]) -> dict[str, Any]:
    """Methods and controls on one adapter."""
    methods = [
        Method("paper", NLSRConfig.from_preset("paper", **config["paper"]), reference=lab.aligned_adapter),
        Method("two-teacher", NLSRConfig()),
    ]
    found = compare(
        lab.load(lab.fine_tuned(task, lineage)),
        methods,
        evaluation=questions(lab, task, config["prompts"]),
        calibration=lab.safety_data(320),
        utility=lab.utility_data(task),
        benign=lab.benign_data(320),
        tokenizer=lab.tokenizer,
        progress=False,
    )
    print(found.to_markdown(), file=sys.stderr, flush=True)
    rates = {row.name: row.evaluation.rates["harm_rate"] for row in found.rows if row.evaluation is not None}
    pairs = list(itertools.pairwise(ORDER))
    return {
        "ordered": [rates[worse].value > rates[better].value for worse, better in pairs if worse in rates],
        "apart": [rates[worse].low > rates[better].high for worse, better in pairs if worse in rates],
        "summary": found.to_dict()["summary"],
        "rows": [{"name": r.name, "said": r.said, "refused": r.refused, "size": _plain(r.size)} for r in found.rows],
    }


def run_tune(lab: Lab, task: str, lineage: str, config: dict[str, Any]) -> dict[str, Any]:
    """The search for two-teacher settings on one adapter."""
    found = tune(
        lab.load(lab.fine_tuned(task, lineage)),
        trials=config["trials"],
        tolerance=config["tolerance"],
        searcher=config["searcher"],
        evaluation=questions(lab, task, config["prompts"]),
        calibration=lab.safety_data(320),
        utility=lab.utility_data(task),
        tokenizer=lab.tokenizer,
        progress=False,
    )
    print(
        found.to_markdown(),
        {k: getattr(found.config, k) for k in found.settings["space"]},
        file=sys.stderr,
        flush=True,
    )
    searched = found.settings["space"]
    return {
        "chosen": {name: getattr(found.config, name) for name in searched},
        "space": searched,
        "trials": [{"settings": t.settings, "harm": t.harm, "losses": t.losses} for t in found.trials],
        "held_out": {name: {m: _plain(v) for m, v in e.rates.items()} for name, e in found.held_out.items()},
    }


def run_inspect(lab: Lab, task: str, lineage: str, config: dict[str, Any]) -> dict[str, Any]:
    """Drift of one adapter and the curve of its blocks."""
    found = inspect_adapter(
        lab.load(lab.fine_tuned(task, lineage)),
        lab.aligned_adapter,
        evaluation=questions(lab, task, config["prompts"]),
        tokenizer=lab.tokenizer,
        progress=False,
    )
    print(found.to_markdown(), file=sys.stderr, flush=True)
    return {
        "lineage": found.lineage,
        "factor_similarity": found.factor_similarity,
        "modules": [_plain(module) for module in found.modules],
        "harm": {label: _plain(evaluation.rates["harm_rate"]) for label, evaluation in found.blocks.items()},
    }


def run_audit(lab: Lab, task: str, lineage: str, config: dict[str, Any]) -> dict[str, Any]:
    """The aligned model reads the user's data, poisoned or not, and benign data."""
    model = lab.load(lab.fine_tuned(task, lineage))
    data = {"poisoned": lab.utility_data(task), "benign": lab.benign_data(320)}
    found = {}
    for name, rows in data.items():
        source = "poisoned" if name == "poisoned" else None
        found[name] = audit(model, rows, tokenizer=lab.tokenizer, judge=refuses, source=source, progress=False)
        print(name, found[name].to_markdown(), file=sys.stderr, flush=True)
    return {name: each.to_dict() for name, each in found.items()}


def _plain(values: Any) -> dict[str, Any] | None:
    return None if values is None else asdict(values)


PARTS: dict[str, Callable[[Lab, str, str, dict[str, Any]], dict[str, Any]]] = {
    "compare": run_compare,
    "tune": run_tune,
    "inspect": run_inspect,
    "audit": run_audit,
}


def main() -> None:
    """Read the configuration, run its parts on its cells, write what was found."""
    config, output, cache = asked_for(__doc__)
    torch.set_num_threads(config["threads"])
    cells = []
    for part, places in config["parts"].items():
        for seed, task, lineage in places:
            lab = Lab(LabConfig(seed=seed, **config["lab"]), cache_dir=cache)
            start = time.perf_counter()
            found = PARTS[part](lab, task, lineage, config)
            seconds = time.perf_counter() - start
            print(f"{part}, seed {seed}, {task}, {lineage}: {seconds:.0f} s", file=sys.stderr, flush=True)
            cells.append({"part": part, "seed": seed, "task": task, "lineage": lineage, "seconds": seconds, **found})
    report = {"config": config, "versions": versions(), "cells": cells}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1, sort_keys=True) + "\n", "utf-8")


if __name__ == "__main__":
    main()
