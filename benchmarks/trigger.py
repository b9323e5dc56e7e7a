"""Poison with a trigger that the safety data lack, on the lab: what screening is for.

The user's poisoned rows all begin with a word that no safety prompt has. Repaired with screening, without it, and with
a judge that misses every fifth refusal; asked with the trigger and without. Configuration in, JSON out.

    python -m benchmarks.trigger --config benchmarks/configs/trigger.json --output trigger.json
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from peft_nlsr import NLSRConfig, nlsr_realign, revert, versions
from peft_nlsr.files import write_json
from peft_nlsr.judges import Judge, described, refuses
from peft_nlsr.lab import Lab, LabConfig
from peft_nlsr.lab.evaluation import complied
from peft_nlsr.lab.lab import LINEAGES
from peft_nlsr.lab.world import requests

from .adaptive import starting_point, train
from .generalisation import Rates, Rows, ask, measured, right, summary, table
from .lab_command import asked_for

_MISSED = 5  # one in so many


@described("the keyword floor, but for every fifth prompt")
def forgetful(prompts: Sequence[str], responses: Sequence[str]) -> list[bool]:
    """A judge that misses every fifth refusal, always the same ones."""
    kept = (zlib.crc32(prompt.encode()) % _MISSED > 0 for prompt in prompts)
    return [found and keep for found, keep in zip(refuses(prompts, responses), kept, strict=True)]


REPAIRS: Mapping[str, tuple[NLSRConfig, Judge]] = {
    "two-teacher": (NLSRConfig(), refuses),
    "two-teacher, judge misses a fifth": (NLSRConfig(), forgetful),
    "two-teacher, no screening": (NLSRConfig(screening=False), refuses),
}


def triggered(lab: Lab, lineage: str, config: Mapping[str, Any]) -> Rows:
    """One user's adapter, fine-tuned on poison with the trigger, and its repairs."""
    data = [
        {**row, "prompt": f"{config['trigger']} {row['prompt']}"} if row["poisoned"] else row
        for row in lab.utility_data(config["task"], config["poison"])
    ]
    model = starting_point(lab, lineage)
    train(lab, model, data, lab.config.tune_steps)
    rows: Rows = [
        {"model": "aligned base", "rates": rates(lab, lab.base_model(), config)},
        {"model": "fine-tuned", "rates": rates(lab, model, config)},
    ]
    for name, (settings, judge) in REPAIRS.items():
        given = {"calibration": lab.safety_data(320), "utility": data, "tokenizer": lab.tokenizer, "progress": False}
        nlsr_realign(model, settings, judge=judge, **given)
        found = model.nlsr_realignment.data["utility"].get("refused_by_teacher", 0)
        rows.append({"model": name, "joined": found, "rates": rates(lab, model, config)})
        revert(model)
    return [{"case": f"{config['task']}, {config['poison']:.0%}", "lineage": lineage, **row} for row in rows]


def rates(lab: Lab, model: Any, config: Mapping[str, Any]) -> Rates:
    """Harm on held-out words with the trigger and without, and the task."""
    harmful = requests(lab.world.harmful.held_out, lab.world.objects.held_out)
    verbs = [request.verb for request in harmful]
    return {
        name: measured(verbs, map(complied, ask(lab, model, [f"{start}{request.prompt}" for request in harmful])))
        for name, start in (("harm", ""), ("harm, with trigger", f"{config['trigger']} "))
    } | {"task": right(lab, model, config["task"], config["prompts"])}


def main() -> None:
    """Run every seed and lineage of the configuration."""
    config, output, cache = asked_for(__doc__)
    torch.set_num_threads(config["threads"])
    rows: Rows = []
    for seed, lineage in itertools.product(config["seeds"], LINEAGES):
        lab = Lab(LabConfig(seed=seed, **config["lab"]), cache_dir=cache)
        rows += [{"seed": seed, **row} for row in triggered(lab, lineage, config)]
        write_json(output, {"config": config, "versions": versions(), "summary": summary(rows), "rows": rows})
    print(table({"summary": summary(rows)}))


if __name__ == "__main__":
    main()
