"""Runs the engine's benchmarks: a JSON configuration in, a JSON of figures out.

    python -m benchmarks.engine --config benchmarks/configs/engine.json --output benchmarks/results/engine.json

Every ratio is against a baseline that is measured in the same run, in turn with ours. The results name versions, CPU
model, thread count and how busy the machine was (the load average when a case ended), but no date, path or host.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from peft_nlsr.record import versions

from . import low_rank_statistics, module_similarity, one_pass, stage3

Rows = list[dict[str, Any]]
CASES: dict[str, Callable[[dict[str, Any]], Rows]] = {
    "statistics": low_rank_statistics.measure,
    "similarity": module_similarity.measure,
    "one_pass": one_pass.measure,
    "stage3": stage3.measure,
}


def run(config: dict[str, Any]) -> dict[str, Any]:
    """Figures of every case in ``config``, as JSON values.

    Raises:
        ValueError: a case that does not exist.
    """
    unknown = sorted(set(config["cases"]) - set(CASES))
    if unknown:
        raise ValueError(f"unknown cases {', '.join(unknown)}; known are {', '.join(CASES)}")
    torch.set_num_threads(config["threads"])
    cases = {}
    for name, settings in config["cases"].items():
        print(f"{name} ...", file=sys.stderr, flush=True)
        rows = CASES[name](settings)
        judged = [{**row, "met": _meets(row, settings["target"])} for row in rows]
        cases[name] = {"rows": judged, "load_average": os.getloadavg()[0]}
    machine = {"cpu": cpu_model(), "threads": torch.get_num_threads(), "system": platform.system()}
    return {"config": config, "machine": machine, "versions": versions(), "cases": cases}


def _meets(row: dict[str, Any], target: dict[str, float]) -> bool:
    """A target is the least ``ratio`` of CPU times, or the most ``wall_s`` and ``peak_mb``."""
    if "ratio" in target:
        return row["ratio"] >= target["ratio"]
    return row["ours_wall_s"] < target["wall_s"] and row["peak_mb"] < target["peak_mb"]


def cpu_model() -> str:
    """The processor's name as Linux gives it, elsewhere its architecture."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def table(results: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    lines = ["| case | what | ours, CPU | baseline, CPU | ratio | error | ours, wall | baseline, wall | target |"]
    lines += ["|---|---|--:|--:|--:|--:|--:|--:|---|"]
    for case, outcome in results["cases"].items():
        target = results["config"]["cases"][case]["target"]
        lines += [f"| {case} | {_cells(row)} | {_target_text(target)}: {_verdict(row)} |" for row in outcome["rows"]]
    return "\n".join(lines)


def _cells(row: dict[str, Any]) -> str:
    ours = _seconds(row["ours_s"]) + (f", {row['peak_mb']:.0f} MB" if "peak_mb" in row else "")
    times = f"{ours} | {_seconds(row['baseline_s'])} | {row['ratio']:.3g}x"
    walls = f"{_seconds(row['ours_wall_s'])} | {_seconds(row['baseline_wall_s'])}"
    return f"{row['name']} | {times} | {row['error']:.0e} | {walls}"


def _verdict(row: dict[str, Any]) -> str:
    return "met" if row["met"] else "**missed**"


def _seconds(value: float) -> str:
    return f"{value * 1e3:.3g} ms" if value < 1.0 else f"{value:.3g} s"


def _target_text(target: dict[str, float]) -> str:
    if "ratio" in target:
        return f">= {target['ratio']}x"
    return f"wall < {target['wall_s']} s, < {target['peak_mb']} MB"


def main(arguments: list[str] | None = None) -> None:
    """Read the configuration, run it, write the results and print them as a table."""
    from_command_line(__doc__, run, table, arguments)


def from_command_line(
    about: str | None,
    run: Callable[[dict[str, Any]], dict[str, Any]],
    table: Callable[[dict[str, Any]], str],
    arguments: list[str] | None,
) -> None:
    """A benchmark's command: a configuration of cases in, JSON out, the table on the terminal."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="JSON file with the cases to run")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    given = parser.parse_args(arguments)
    results = run(json.loads(given.config.read_text("utf-8")))
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps(results, indent=2) + "\n", "utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
