"""Throughput of the evaluator's answers against a plain loop that gives one prompt at a time to `model.generate`.

    python -m benchmarks.generation --config CONFIG.json --output RESULTS.json

Both ways answer the same prompts greedily with the same model, in turn; the results hold how many answers are equal,
and what the loop's first tokens cost alone: no batching makes the prompts themselves cheaper on a processor.
"""

from __future__ import annotations

import os
import platform
import random
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from peft_nlsr.generation import generate_answers
from peft_nlsr.record import versions

from .engine import cpu_model, from_command_line
from .timing import alternate, timed

Tokens = tuple[int, ...]


class Ends:
    """Stands for a tokenizer: a share of the vocabulary ends an answer, so that answers differ in length."""

    pad_token_id = 0
    eos_token_id = None


def run(config: dict[str, Any]) -> dict[str, Any]:
    """Figures of every case in ``config``, as JSON values."""
    torch.set_num_threads(config["threads"])
    model = random_model(config)
    rows = [measure(model, case, config) for case in config["cases"]]
    machine = {"cpu": cpu_model(), "threads": torch.get_num_threads(), "system": platform.system()}
    load = os.getloadavg()[0]
    return {"config": config, "machine": machine, "versions": versions(), "rows": rows, "load_average": load}


def random_model(config: dict[str, Any]) -> LlamaForCausalLM:
    """A Llama with random weights, whose answers end at any token below ``ending_tokens``."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**config["model"])).eval()
    model.generation_config.eos_token_id = list(range(1, config["ending_tokens"]))
    return model


def measure(model: LlamaForCausalLM, case: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """One row: seconds of both and of the prompts alone, their ratio, new tokens and the share of equal answers."""
    prompts = random_prompts(case, config["model"]["vocab_size"])
    limit = case["max_new_tokens"]
    figures, ours, plain = alternate(
        lambda: generate_answers(model, Ends(), prompts, max_new_tokens=limit, batch_size=case["batch_size"]),
        lambda: [one_at_a_time(model, prompt, limit) for prompt in prompts],
        repeats=config["repeats"],
    )
    alone, _ = timed(lambda: [one_at_a_time(model, prompt, 1) for prompt in prompts])
    return {
        "name": case["name"],
        **figures,
        "prompts_alone_s": alone["cpu"],
        "prompts": len(prompts),
        "prompt_tokens": sum(map(len, prompts)),
        "new_tokens": sum(map(len, ours)),
        "longest_answer": max(map(len, ours)),
        "equal": sum(a == b for a, b in zip(ours, plain, strict=True)) / len(prompts),
        "met": figures["ratio"] >= config["target"]["ratio"],
    }


def random_prompts(case: dict[str, Any], vocabulary: int) -> list[Tokens]:
    """Prompts whose lengths are drawn evenly between the case's shortest and longest."""
    draw = random.Random(0)
    lengths = [draw.randint(case["shortest"], case["longest"]) for _ in range(case["prompts"])]
    return [tuple(draw.randrange(100, vocabulary) for _ in range(length)) for length in lengths]


def one_at_a_time(model: LlamaForCausalLM, prompt: Tokens, limit: int) -> Tokens:
    """The answer of a plain call, with the key-value cache that is generate's default."""
    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, do_sample=False, pad_token_id=0
        )
    return tuple(out[0, len(prompt) :].tolist())


def table(results: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    lines = [
        "| prompts | new tokens | ours, CPU | one by one, CPU | of it prompts | ratio | new tokens/s, wall "
        "| equal answers | target |"
    ]
    lines += ["|---|--:|--:|--:|--:|--:|--:|--:|---|"]
    target = results["config"]["target"]["ratio"]
    for row in results["rows"]:
        speed = (
            f"{row['new_tokens'] / row['ours_wall_s']:.0f} against {row['new_tokens'] / row['baseline_wall_s']:.0f}"
        )
        verdict = f">= {target}x: {'met' if row['met'] else '**missed**'}"
        cells = [row["name"], str(row["new_tokens"]), f"{row['ours_s']:.3g} s", f"{row['baseline_s']:.3g} s"]
        cells += [f"{row['prompts_alone_s'] / row['baseline_s']:.0%}", f"{row['ratio']:.3g}x", speed]
        cells += [f"{row['equal']:.0%}", verdict]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Read the configuration, run it, write the results and print them as a table."""
    from_command_line(__doc__, run, table, arguments)


if __name__ == "__main__":
    main()
