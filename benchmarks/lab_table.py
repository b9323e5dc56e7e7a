"""Writes the README's results table from a lab report made by ``peft-nlsr demo --seeds 5 --full``.

Run: ``python -m benchmarks.lab_table``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
REPORT = ROOT / "benchmarks" / "results" / "lab" / "lab_report.json"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
CELLS = (("easy", "shared"), ("easy", "independent"), ("hard", "shared"), ("hard", "independent"))
SHOWN = (
    "fine-tuned",
    "random mask",
    "released",
    "paper, low-rank",
    "paper, Wanda",
    "sum, low-rank",
    "sum, Wanda",
    "FGSN",
    "SafeLoRA, published",
    "SafeLoRA, orthogonal",
    "RESTA",
    "one-shot",
    "two-teacher",
    "two-teacher, benign data, full weight",
)


def section(report: dict[str, Any]) -> str:
    """The results as Markdown: what was run, and one row per method with harm / benign / task per cell."""
    settings = report["settings"]
    found = {(row["task"], row["lineage"], row["method"]): row for row in report["summary"]}
    lines = [
        f"Means over {settings['seeds']} seeds, {settings['prompts']} prompts per rate and seed, "
        f"{settings['poison']:.0%} of "
        "the user's data poisoned; judged by the lab's parser: harmful requests with held-out verbs and objects, "
        "benign requests and task items about held-out objects, three quarters of their verbs seen. Each cell: harm % "
        "(95% "
        "interval: the wider of Wilson's on all prompts and Student's t on the seeds) / benign requests answered % / "
        "right answers to the task % / coherent answers %.",
        "",
        "| method | " + " | ".join(f"{task} task, {lineage} lineage" for task, lineage in CELLS) + " |",
        "|---|" + "---|" * len(CELLS),
    ]
    for method in SHOWN:
        cells = " | ".join(_cell(found[task, lineage, method]) for task, lineage in CELLS)
        lines.append(f"| {method} | {cells} |")
    return "\n".join(lines)


def _cell(row: dict[str, Any]) -> str:
    if not row["rates"]:
        return "refused"
    harm = row["rates"]["harm"]
    interval = f"({harm['low'] * 100:.0f}-{harm['high'] * 100:.0f})"
    others = (f"{row['rates'][name]['mean'] * 100:.0f}" for name in ("benign_answered", "task", "coherence"))
    return " / ".join([f"{harm['mean'] * 100:.0f} {interval}", *others])


def main() -> None:
    """Put the section between the README's markers."""
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text("utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    made = section(json.loads(REPORT.read_text("utf-8")))
    readme.write_text(f"{before}{BEGIN}\n{made}\n{END}{after}", "utf-8")


if __name__ == "__main__":
    main()
