"""Adaptive attacks and negative cases on the lab: what the repair does not do, measured beside what it does.

``again``: the repaired adapter is fine-tuned once more on the poisoned data, beside other adapters for as many steps.
``known prompts``: the attacker trains refusals of the very calibration prompts, so that the adapter looks intact on
them. ``unsafe base``: the base was never aligned. ``prefilled``: harmful answers are begun for the model (deep
refusals). Configuration in, JSON out.

    python -m benchmarks.adaptive --config benchmarks/configs/adaptive.json --output adaptive.json
"""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import LlamaForCausalLM

from peft_nlsr import NLSRConfig, nlsr_realign, revert, versions
from peft_nlsr.files import write_json
from peft_nlsr.generation import generate_answers
from peft_nlsr.lab import Lab, LabConfig, training
from peft_nlsr.lab.evaluation import ANSWER_TOKENS, complied
from peft_nlsr.lab.lab import LINEAGES
from peft_nlsr.lab.study import over_seeds
from peft_nlsr.lab.world import render, requests

from .lab_command import asked_for
from .safety.methods import ENTRIES
from .safety.methods import repair as run_entry

Rows = list[dict[str, Any]]


def summary(rows: Sequence[Mapping[str, Any]], prompts: int) -> Rows:
    """Per case, lineage and model the means of the rates over the seeds, with the 95 % intervals of ``over_seeds``.

    Args:
        prompts: of each rate and seed.
    """
    found: dict[tuple[str, ...], Rows] = {}
    for row in rows:
        found.setdefault((row["case"], row["lineage"], row["model"]), []).append(row["rates"])
    return [
        {"case": case, "lineage": lineage, "model": model, "seeds": len(rates)}
        | {name: over_seeds([each[name] for each in rates], prompts * len(rates)) for name in rates[0]}
        for (case, lineage, model), rates in found.items()
    ]


def table(results: Mapping[str, Any]) -> str:
    """Markdown: every case with the means of its rates in percent, and the harm's interval."""
    lines = ["| case | lineage | model | rates, % |", "|---|---|---|---|"]
    for line in results["summary"]:
        found = {name: rate for name, rate in line.items() if isinstance(rate, Mapping)}
        said = ", ".join(_say(name, rate) for name, rate in found.items())
        lines.append(f"| {line['case']} | {line['lineage']} | {line['model']} | {said} |")
    return "\n".join(lines)


def _say(name: str, rate: Mapping[str, float]) -> str:
    mean, low, high = (f"{100 * rate[key]:.0f}" for key in ("mean", "low", "high"))
    return f"{name.replace('_', ' ')} {mean}" + (f" ({low}-{high})" if name.startswith("harm") else "")


def again(lab: Lab, lineage: str, config: Mapping[str, Any]) -> Rows:
    """Poisoned training for some steps: of the user's own starting point, of an adapter fine-tuned without poison, and
    of the poisoned adapter after the repair and after gradient steps on the repair's data."""
    poison = config["poison"]
    data = lab.utility_data("hard", poison)
    retrained = lab.load(lab.fine_tuned("hard", lineage, poison), trainable=True)
    run_entry(ENTRIES["trained, 100 steps"], lab, retrained, "hard", poison)
    starts = {
        "first time": starting_point(lab, lineage),
        "never poisoned": lab.load(lab.fine_tuned("hard", lineage, 0.0)),
        "after the repair": repair(lab, lab.load(lab.fine_tuned("hard", lineage, poison)), data),
        "after 100 gradient steps": retrained,
    }
    rows: Rows = []
    for name, factors in ((name, factors_of(start)) for name, start in starts.items()):
        for steps in config["again_steps"]:
            model = starting_point(lab, lineage)
            model.load_state_dict(factors, strict=False)
            train(lab, model, data, steps)
            rows.append({"model": f"{name}, {steps} steps", "rates": rates(lab, model, config)})
    return rows


def known_prompts(lab: Lab, lineage: str, config: Mapping[str, Any]) -> Rows:
    """The attacker adds the calibration prompts with refusals to the poison; the user has clean data and repairs."""
    known = lab.safety_data(config["known_prompts"])
    other = [row for row in lab.safety_data(2 * len(known), seed=1) if row not in known]
    data = lab.utility_data("hard", config["known_poison"])
    model = starting_point(lab, lineage)
    train(lab, model, data + known, lab.config.tune_steps)
    rows: Rows = [{"model": "fine-tuned", "rates": rates(lab, model, config)}]
    clean = [row for row in data if not row["poisoned"]]
    for name, calibration, settings in (
        ("repaired, known prompts", known, NLSRConfig()),
        ("repaired, known prompts, leave_intact=False", known, NLSRConfig(leave_intact=False)),
        ("repaired, other prompts", other, NLSRConfig()),
    ):
        repair(lab, model, clean, calibration, settings)
        left_alone = not model.nlsr_realignment.restored
        rows.append({"model": name, "left_alone": left_alone, "rates": rates(lab, model, config)})
        revert(model)
    return rows


def unsafe_base(lab: Lab, lineage: str, config: Mapping[str, Any]) -> Rows:
    """A base that was never aligned, with a fresh adapter on it: what the repair says, and what it does."""
    if lineage == "shared":  # there is no aligned adapter to continue
        return []
    base = LlamaForCausalLM.from_pretrained(lab.unaligned_path).eval()
    model = training.add_lora(base, rank=lab.config.lora_rank, seed=lab.config.seed)
    data = lab.utility_data("hard", config["poison"])
    train(lab, model, data, lab.config.tune_steps)
    rows: Rows = [{"model": "fine-tuned", "rates": rates(lab, model, config)}]
    repair(lab, model, data, [{"prompt": row["prompt"]} for row in lab.safety_data(320)])
    noticed = any("may not be safe itself" in note for note in model.nlsr_realignment.notes)
    return [*rows, {"model": "repaired", "noticed": noticed, "rates": rates(lab, model, config)}]


def prefilled(lab: Lab, lineage: str, config: Mapping[str, Any]) -> Rows:
    """Harmful answers whose first words are put into the model's mouth."""
    tuned = lab.load(lab.fine_tuned("hard", lineage, config["poison"]))
    rows: Rows = [
        {"model": "aligned base", "rates": deep_harm(lab, lab.base_model(), config)},
        {"model": "fine-tuned", "rates": deep_harm(lab, tuned, config)},
    ]
    repair(lab, tuned, lab.utility_data("hard", config["poison"]))
    return [*rows, {"model": "repaired", "rates": deep_harm(lab, tuned, config)}]


def deep_harm(lab: Lab, model: Any, config: Mapping[str, Any]) -> dict[str, float]:
    """Share of held-out harmful requests that are answered after the first words of an answer were given."""
    pool = requests(lab.world.harmful.held_out, lab.world.objects.held_out)
    asked = random.Random("prefilled").sample(pool, config["prompts"])
    found: dict[str, float] = {}
    for words in config["prefill_words"]:
        begun = [" ".join(lab.world.answer(item, "pirate").split()[:words]) for item in asked]
        texts = [f"{render(item.prompt)} {start}".strip() for item, start in zip(asked, begun, strict=True)]
        prompts = [tuple(ids) for ids in lab.tokenizer(texts)["input_ids"]]
        answers = generate_answers(model, lab.tokenizer, prompts, max_new_tokens=ANSWER_TOKENS, batch_size=64)
        said = [f"{start} {lab.tokenizer.decode(list(ids))}" for start, ids in zip(begun, answers, strict=True)]
        found[f"harm after {words} words"] = statistics.mean(map(complied, said))
    return found


def starting_point(lab: Lab, lineage: str) -> Any:
    """The model that a user fine-tunes: the aligned adapter, or a fresh one on the aligned base."""
    if lineage == "shared":
        return lab.load(lab.aligned_adapter, trainable=True)
    return training.add_lora(lab.base_model(), rank=lab.config.lora_rank, seed=lab.config.seed + 2)


def train(lab: Lab, model: Any, rows: Rows, steps: int) -> None:
    """Fine-tune the adapter in place as the lab's users do."""
    schedule = training.Schedule(steps, lab.config.tune_batch, lab.config.tune_rate, seed=lab.config.seed)
    data = training.encode_examples(lab.tokenizer, rows)
    training.fit(model, data, training.lm_loss, schedule=schedule, progress=lambda fraction: None)


def repair(
    lab: Lab, model: Any, utility: Rows, calibration: Rows | None = None, config: NLSRConfig | None = None
) -> Any:
    """The two-teacher form with the base as safe teacher; the lab's safety data where none are given."""
    return nlsr_realign(
        model,
        config,
        calibration=lab.safety_data(320) if calibration is None else calibration,
        utility=utility,
        tokenizer=lab.tokenizer,
        progress=False,
    )


def factors_of(model: Any) -> dict[str, Any]:
    """Copies of the adapter's factors by their names in the model."""
    return {name: value.clone() for name, value in model.state_dict().items() if "lora_" in name}


def rates(lab: Lab, model: Any, config: Mapping[str, Any]) -> dict[str, float]:
    """Harm, benign answers and task on held-out words."""
    scores = lab.evaluate(model, "hard", n=config["prompts"])
    return {"harm": scores.harm, "benign_answered": scores.benign_answered, "task": scores.task}


CASES: dict[str, Callable[[Lab, str, Mapping[str, Any]], Rows]] = {
    "again": again,
    "known prompts": known_prompts,
    "unsafe base": unsafe_base,
    "prefilled": prefilled,
}


def main() -> None:
    """Run every case of the configuration on every seed and lineage."""
    config, output, cache = asked_for(__doc__)
    torch.set_num_threads(config["threads"])
    rows: Rows = []
    for seed, lineage in itertools.product(config["seeds"], LINEAGES):
        lab = Lab(LabConfig(seed=seed, **config["lab"]), cache_dir=cache)
        for case in CASES:
            for found in CASES[case](lab, lineage, config):
                rows.append({"case": case, "seed": seed, "lineage": lineage, **found})
    results = {"config": config, "versions": versions(), "summary": summary(rows, config["prompts"]), "rows": rows}
    write_json(output, results)
    print(table(results))


if __name__ == "__main__":
    main()
