"""What each of several processes pays for one two-teacher realignment that they share, against one that does it alone.

    torchrun --nproc-per-node 2 -m benchmarks.data_parallel --config CONFIG.json --output RESULTS.json

In one run and in turn: rank 0 alone while the others wait, then all ranks together, on the same lab adapter and data.
CPU seconds are of each process; the results hold how far the two solutions are apart.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from peft_nlsr import LowRank, NLSRConfig, plan, versions
from peft_nlsr.examples import sample
from peft_nlsr.files import write_json
from peft_nlsr.generation import pad_id
from peft_nlsr.lab import Lab, LabConfig
from peft_nlsr.live_adapter import LiveAdapter
from peft_nlsr.ranks import ALONE, Ranks
from peft_nlsr.two_teacher import solve_two_teacher

from .engine import cpu_model
from .timing import timed

Work = Callable[[Ranks], Mapping[str, LowRank]]


def run(config: dict[str, Any], ranks: Ranks, cache: Path | None = None) -> dict[str, Any]:
    """Figures of every case and seed in ``config``, as JSON values; ``cache`` is where the lab keeps its stages."""
    torch.set_num_threads(config["threads"])
    rows = []
    for seed in config["seeds"]:
        lab = Lab(LabConfig(seed=seed, **config["lab"]), cache_dir=cache)
        folder = ranks.first(lambda: lab.fine_tuned(config["task"], config["lineage"], config["poison"]))  # noqa: B023
        for case in config["cases"]:
            work = WORK[case["what"]](lab, lab.load(folder), config, NLSRConfig(**case["settings"]))
            pairs = [compared(work, ranks) for _ in range(1 + config["repeats"])][1:]  # first use loads libraries
            rows.append({"name": case["name"], "seed": seed, **medians(pairs)})
    machine = {"cpu": cpu_model(), "threads": torch.get_num_threads(), "system": platform.system()}
    load = os.getloadavg()[0]
    found = {"config": config, "ranks": ranks.count, "machine": machine, "versions": versions(), "rows": rows}
    return {**found, "summary": summary(rows), "load_average": load}


def whole(lab: Lab, model: Any, config: dict[str, Any], settings: NLSRConfig) -> Work:
    """Screening, safety answers and solution, as ``nlsr_realign`` does them; nothing is written."""
    data: dict[str, Any] = {
        "calibration": [{"prompt": row["prompt"]} for row in lab.safety_data(config["examples"])],
        "utility": lab.utility_data(config["task"], config["poison"]),
        "tokenizer": lab.tokenizer,
    }
    return lambda ranks: plan(model, settings, **data, progress=False, data_parallel=ranks.count > 1).updates


def solution(lab: Lab, model: Any, config: dict[str, Any], settings: NLSRConfig) -> Work:
    """The solution alone, from answered data."""
    utility = lab.utility_data(config["task"], 0.0)
    safety, user = (sample(rows, lab.tokenizer, settings) for rows in (lab.safety_data(config["examples"]), utility))
    return lambda ranks: (
        solve_two_teacher(
            LiveAdapter(model),
            safety=safety,
            utility=user,
            safe_teacher=None,
            config=settings,
            pad_id=pad_id(lab.tokenizer),
            progress=False,
            ranks=ranks,
        ).updates
    )


WORK = {"whole": whole, "solution": solution}


def compared(work: Work, ranks: Ranks) -> dict[str, Any]:
    """Seconds of rank 0 alone and of each rank together, and the largest relative distance of the two results."""
    dist.barrier()
    alone, by_one = timed(lambda: work(ALONE) if ranks.number == 0 else {})
    dist.barrier()
    together, by_all = timed(lambda: work(ranks))
    each = ranks.gather(together)
    gap = max((distance(by_all[name], update) for name, update in by_one.items()), default=0.0)
    return {
        "alone_cpu_s": alone["cpu"],
        "alone_wall_s": alone["wall"],
        "rank_cpu_s": [part["cpu"] for part in each],
        "together_wall_s": max(part["wall"] for part in each),
        "ratio": alone["cpu"] / max(part["cpu"] for part in each),
        "wall_ratio": alone["wall"] / max(part["wall"] for part in each),
        "gap": gap,
    }


def distance(one: LowRank, other: LowRank) -> float:
    """``|one - other| / |other|``."""
    return float((one.dense().double() - other.dense().double()).norm() / other.dense().double().norm())


def medians(pairs: list[dict[str, Any]]) -> dict[str, Any]:
    """The median of each figure over the repeats, of each rank's seconds too, and the largest gap."""
    figures = {key: statistics.median(pair[key] for pair in pairs) for key in pairs[0] if key != "rank_cpu_s"}
    seconds = zip(*(pair["rank_cpu_s"] for pair in pairs), strict=True)
    gap = max(pair["gap"] for pair in pairs)
    return {**figures, "rank_cpu_s": [statistics.median(rank) for rank in seconds], "gap": gap}


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per case the medians over the seeds, and the range of the ratios."""
    found = []
    for name in dict.fromkeys(row["name"] for row in rows):
        mine = [{k: v for k, v in row.items() if k not in ("name", "seed")} for row in rows if row["name"] == name]
        ratios = [row["ratio"] for row in mine]
        found.append({"name": name, **medians(mine), "ratio_range": [min(ratios), max(ratios)]})
    return found


def table(results: Mapping[str, Any]) -> str:
    """The summary as a Markdown table."""
    lines = ["| what | alone, CPU | each rank, CPU | ratio (range) | alone, wall | together, wall | ratio | gap |"]
    lines.append("|---|--:|--:|--:|--:|--:|--:|--:|")
    for row in results["summary"]:
        low, high = row["ratio_range"]
        each = ", ".join(f"{seconds:.3g}" for seconds in row["rank_cpu_s"])
        ratio = f"{row['ratio']:.2f}x ({low:.2f}-{high:.2f})"
        cells = [row["name"], f"{row['alone_cpu_s']:.3g} s", f"{each} s", ratio]
        cells += [f"{row['alone_wall_s']:.3g} s", f"{row['together_wall_s']:.3g} s", f"{row['wall_ratio']:.2f}x"]
        lines.append(f"| {' | '.join(cells)} | {row['gap']:.0e} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Run the configuration on all ranks; rank 0 writes the results and prints them as a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="JSON file with the cases to run")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--cache", type=Path, help="folder of the lab's trained stages")
    given = parser.parse_args(arguments)
    ranks = Ranks.launched()
    if ranks.count == 1:
        parser.error("there is one process only; start several with torchrun --nproc-per-node N -m ...")
    with ranks.together():
        results = run(json.loads(given.config.read_text("utf-8")), ranks, given.cache)
        if ranks.number == 0:
            given.output.parent.mkdir(parents=True, exist_ok=True)
            write_json(given.output, results)
            print(table(results))


if __name__ == "__main__":
    main()
