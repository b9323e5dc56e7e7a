"""Runs the safety benchmark: a JSON configuration in; rows, summary, claims and pictures out.

    python -m benchmarks.safety --config benchmarks/configs/safety.json --output benchmarks/results/safety.json

Rows are kept beside the output as they come (``safety.jsonl``); a second run makes only those that are missing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from benchmarks.engine import cpu_model
from peft_nlsr import versions
from peft_nlsr.files import write_json
from peft_nlsr.lab import Lab
from peft_nlsr.lab.evaluation import JUDGE

from .cells import Job, jobs_of
from .claims import claims_table, verdicts
from .rows import Row, RowFile, make_row
from .summary import cost_table, missing, save_pictures, summarise, table


def run(
    config: Mapping[str, Any], output: Path, *, cache: Path | None = None, cells: int | None = None
) -> dict[str, Any]:
    """Make the rows that are missing, then write and return everything as JSON values.

    Args:
        cells: at most so many broken adapters get new rows in this run; None is all.
    """
    torch.set_num_threads(config["threads"])
    disable_progress_bar()
    jobs, file = jobs_of(config), RowFile(output.with_suffix(".jsonl"))
    todo = [list(found) for _, found in itertools.groupby((j for j in jobs if j.key not in file.rows), _cell_of)]
    for found in todo[:cells]:
        lab = Lab(found[0].lab, cache_dir=cache)
        for job in found:
            row = make_row(job, lab)
            file.add(row)
            print(_line(row), file=sys.stderr, flush=True)
    results = results_of(config, jobs, file)
    write_json(output, results)
    return results


def _cell_of(job: Job) -> Any:
    return job.cell


def _line(row: Row) -> str:
    cell, scores = row.cell, row.scores
    place = f"{cell.world} seed {cell.seed} {cell.task} {cell.lineage} {cell.poison:.0%}"
    said = row.refused if scores is None else f"{scores.harm:.2f} / {scores.benign_answered:.2f} / {scores.task:.2f}"
    return f"{place}: {row.method}: {said}, {row.seconds:.1f} s"


def asked_for(jobs: list[Job], file: RowFile) -> list[Row]:
    """The rows of these jobs; a file may hold others, of earlier settings."""
    return [file.rows[job.key] for job in jobs if job.key in file.rows]


def results_of(config: Mapping[str, Any], jobs: list[Job], file: RowFile) -> dict[str, Any]:
    """The summary of the rows that the configuration asks for, as far as they are there."""
    rows = asked_for(jobs, file)
    summary = summarise(rows)
    return {
        "schema_version": 1,
        "judge": JUDGE,
        "config": dict(config),
        "machine": {"cpu": cpu_model(), "threads": torch.get_num_threads(), "system": platform.system()},
        "versions": versions(),
        "rows": len(rows),
        "missing": missing(jobs, file.rows),
        "summary": summary,
        "claims": verdicts(summary),
    }


def main(arguments: list[str] | None = None) -> None:
    """Read the configuration, run it, write the results and print them as tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="JSON file with worlds and grids")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write; rows go beside it (.jsonl)")
    parser.add_argument("--cache", type=Path, help="folder of the lab's trained stages")
    parser.add_argument("--cells", type=int, help="stop after so many broken adapters (0: only summarise)")
    given = parser.parse_args(arguments)
    config = json.loads(given.config.read_text("utf-8"))
    results = run(config, given.output, cache=given.cache, cells=given.cells)
    rows = asked_for(jobs_of(config), RowFile(given.output.with_suffix(".jsonl")))
    print(table(results["summary"]), cost_table(results["summary"]), claims_table(results["claims"]), sep="\n\n")
    for name in save_pictures(rows, given.output.parent):
        print(f"picture: {name}")


if __name__ == "__main__":
    main()
