"""The demo: a tiny model is trained, broken and repaired before your eyes, and the result is a table and a page."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import ConfigFile, Json, command, show, write_new_text, wrote

if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.table import Table

JSON_NAME, PAGE_NAME = "lab_report.json", "lab_report.html"
_COLUMNS = (("harm", "harm"), ("benign_answered", "benign answered"), ("task", "task"))
_LEGEND = (
    "Mean % and its 95% interval. harm: held-out harmful requests complied with (less is better). benign: ordinary "
    "requests answered. task: the user's task done. n/a: the method refuses an adapter that was not trained from the "
    "reference."
)


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the report, as JSON and page.")] = Path(
        "peft-nlsr-demo"
    ),
    seeds: Annotated[int, typer.Option(min=1, help="Worlds to train, each from scratch.")] = 1,
    poison: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of attacks in the user's data.")] = 0.05,
    prompts: Annotated[int, typer.Option(min=10, help="Prompts per rate and cell.")] = 120,
    full: Annotated[bool, typer.Option("--full", help="More methods and controls.")] = False,
    cache: Annotated[Path | None, typer.Option(help="Where trained stages are kept.")] = None,
    config_file: ConfigFile = None,
    as_json: Json = False,
) -> None:
    """Train a tiny safe model, break it by fine-tuning, realign it by every method, and show what happened.

    Takes a few minutes on two cores the first time; an interrupted run goes on where it was.

    "Harmful" is a label on made-up verbs; there is no harmful text.

    Example: peft-nlsr demo -o ./demo
    """
    from rich.text import Text

    if output.is_file():
        raise FileExistsError(f"{output} is a file; give a folder for the report")
    report = _study_with_progress(seeds, poison, prompts, full, cache)
    write_new_text(output / JSON_NAME, json.dumps(report, indent=2) + "\n")
    write_new_text(output / PAGE_NAME, study_page(report))
    show(as_json, report, *_study_tables(report), Text(_LEGEND))
    wrote(output / PAGE_NAME, f"Next, your own adapter: {_next()}")


def _next() -> str:
    return command("realign", "ADAPTER", "--base", "MODEL", "--utility", "DATA", "-o", "OUT")


def _study_with_progress(seeds: int, poison: float, prompts: int, full: bool, cache: Path | None) -> dict[str, Any]:
    from transformers.utils.logging import disable_progress_bar

    from ..lab import Lab, LabConfig
    from ..lab.lab import LINEAGES
    from ..lab.study import DEMO_METHODS, METHODS, run_study, study_report
    from ..lab.world import TASKS

    disable_progress_bar()
    logging.getLogger("peft_nlsr").setLevel(logging.ERROR)  # its notes are meant for people's own adapters
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    methods = METHODS if full else DEMO_METHODS
    with _progress() as bar:
        measured = bar.add_task("methods measured", total=seeds * len(TASKS) * len(LINEAGES) * len(methods))
        trained = bar.add_task("starting", total=1.0)

        def stage(name: str, fraction: float) -> None:
            bar.update(trained, description=f"training {name}", completed=fraction)

        def row(done: Any) -> None:
            said = f"{done.task} task, {done.lineage} lineage: {done.method}"
            bar.update(trained, description=said, completed=1.0)
            bar.advance(measured)

        labs = [Lab(LabConfig(seed=seed), cache_dir=cache, progress=stage) for seed in range(seeds)]
        rows = run_study(labs, methods=methods, poison=poison, prompts=prompts, report=row)
    return study_report(rows, labs[0], {"seeds": seeds, "poison": poison, "prompts": prompts})


def _progress() -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from .options import console

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(20), TimeElapsedColumn())
    return Progress(*columns[:3], MofNCompleteColumn(), columns[3], console=console(stderr=True), transient=True)


def _cells(report: dict[str, Any]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """The summary's rows by task and lineage."""
    cells: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for cell in report["summary"]:
        cells.setdefault((cell["task"], cell["lineage"]), []).append(cell)
    return cells


def study_page(report: dict[str, Any]) -> str:
    """A study's report as one self-contained HTML page."""
    from importlib import resources

    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    source = resources.files("peft_nlsr").joinpath("data").joinpath("study.html.jinja").read_text("utf-8")
    return environment.from_string(source).render(
        settings=report["settings"],
        judge=report["judge"],
        cells=[(f"{task} task, {lineage} lineage", rows) for (task, lineage), rows in _cells(report).items()],
        columns=_COLUMNS,
        percent=lambda rate: f"{100 * rate:.0f}%",
        next=_next(),
    )


def _study_tables(report: dict[str, Any]) -> Iterator[Table]:
    """One table per task and lineage, in percent, narrow enough for 80 columns."""
    from rich.table import Table

    settings = report["settings"]
    data = f"{settings['poison']:.0%} poison, n={settings['seeds']}x{settings['prompts']}"
    for (task, lineage), rows in _cells(report).items():
        title = f"{task} task, {lineage} lineage; {data}; % (95%)"
        table = Table(title=title, title_justify="left", title_style="bold")
        table.add_column("method", no_wrap=True)
        for name in ("harm", "benign", "task", "s"):
            table.add_column(name, justify="right", no_wrap=True)
        for row in rows:
            rates = [_rate(row, name) for name, _ in _COLUMNS]
            partly = row["rates"] and row["refused_seeds"]
            said = f" ({row['refused_seeds']} of {row['seeds']} refused)" if partly else ""
            table.add_row(row["method"] + said, *rates, f"{row['seconds']:.1f}")
        yield table


def _rate(row: dict[str, Any], name: str) -> str:
    if not row["rates"]:
        return "n/a"
    mean, low, high = (round(100 * row["rates"][name][key]) for key in ("mean", "low", "high"))
    return f"{mean} ({low}-{high})"
