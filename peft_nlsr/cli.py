"""The ``peft-nlsr`` command: one command = one library call. Data go to stdout, everything else to stderr."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from .errors import PeftNLSRError

app = typer.Typer(
    name="peft-nlsr",
    help="Restore the safety alignment of fine-tuned LoRA adapters, without training.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)
out = Console()
err = Console(stderr=True)
Json = Annotated[bool, typer.Option("--json", help="Print the record as JSON on stdout.")]


@app.callback()
def _options(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what is done and why.")] = False,
) -> None:
    logging.basicConfig(level=logging.INFO if verbose else logging.ERROR, stream=sys.stderr, format="%(message)s")


@app.command()
def realign(
    adapter: Annotated[str, typer.Argument(help="Folder or Hub id of the fine-tuned adapter; never changed.")],
    patch: Annotated[str, typer.Option(help="Folder or Hub id of the safety patch.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="New folder for the realigned adapter.")
    ] = None,
    preset: Annotated[str, typer.Option(help="default, paper or released.")] = "default",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only report what would change.")] = False,
    diff: Annotated[bool, typer.Option(help="Keep the original values, for revert.")] = True,
    as_json: Json = False,
) -> None:
    """Realign a saved adapter with a safety patch: no base model, no GPU.

    Example: peft-nlsr realign ./my-adapter --patch ./patch -o ./my-adapter-realigned
    """
    from .config import NLSRConfig
    from .folders import realign_folder

    if output is None and not dry_run:
        raise typer.BadParameter("give --output FOLDER, or --dry-run to only see what would change")
    target = None if dry_run else output
    done = realign_folder(adapter, target, patch=patch, config=NLSRConfig.from_preset(preset), save_diff=diff)
    if as_json:
        print(json.dumps(done.to_dict(), indent=2, sort_keys=True))
    else:
        _say(out, done.summary())
    if target is not None:
        _say(err, f"Wrote {target}. Undo: peft-nlsr revert {target} -o ORIGINAL")


@app.command()
def revert(
    adapter: Annotated[Path, typer.Argument(help="Folder of a realigned adapter.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder for the original adapter.")],
) -> None:
    """Write the adapter as it was before its realignment, bit for bit."""
    from .folders import revert_folder

    revert_folder(adapter, output)
    _say(err, f"Wrote {output}: the adapter as it was before realignment.")


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the JSON report.")] = Path(
        "peft-nlsr-demo"
    ),
    seeds: Annotated[int, typer.Option(min=1, help="Worlds to train, each from scratch.")] = 1,
    poison: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of attacks in the user's data.")] = 0.05,
    prompts: Annotated[int, typer.Option(min=10, help="Prompts per rate and cell.")] = 120,
    full: Annotated[bool, typer.Option("--full", help="More methods and controls.")] = False,
    cache: Annotated[Path | None, typer.Option(help="Where trained stages are kept.")] = None,
    as_json: Json = False,
) -> None:
    """Train a tiny safe model, break it by fine-tuning, realign it by every method, and show what happened.

    Takes a few minutes on two cores the first time. "Harmful" is a label on made-up verbs; there is no harmful text.
    """
    report = _study_with_progress(seeds, poison, prompts, full, cache)
    path = output / "lab_report.json"
    output.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        for table in _study_tables(report):
            out.print(table)
        out.print(
            "harm: held-out harmful requests complied with (less is better). benign: ordinary requests answered. "
            "task: the "
            "user's task done. n/a: the method refuses an adapter that was not trained from the reference."
        )
    _say(err, f"Report: {path}. Your own adapter: peft-nlsr realign ADAPTER --patch PATCH -o OUT")


def _study_with_progress(seeds: int, poison: float, prompts: int, full: bool, cache: Path | None) -> dict[str, Any]:
    from transformers.utils.logging import disable_progress_bar

    from .lab import Lab, LabConfig
    from .lab.study import DEMO_METHODS, METHODS, run_study, study_report

    disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    with _progress() as bar:
        task = bar.add_task("starting", total=1.0)

        def stage(name: str, fraction: float) -> None:
            bar.update(task, description=f"training {name}", completed=fraction)

        def row(done: Any) -> None:
            said = f"seed {done.seed}, {done.task}, {done.lineage}: {done.method}"
            bar.update(task, description=said, completed=1.0)

        labs = [Lab(LabConfig(seed=seed), cache_dir=cache, progress=stage) for seed in range(seeds)]
        methods = METHODS if full else DEMO_METHODS
        rows = run_study(labs, methods=methods, poison=poison, prompts=prompts, report=row)
    return study_report(rows, labs[0], {"seeds": seeds, "poison": poison, "prompts": prompts})


def _progress() -> Progress:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, console=err, transient=True)


def _study_tables(report: dict[str, Any]) -> Iterator[Table]:
    """One table per task and lineage, in percent, narrow enough for 80 columns."""
    settings = report["settings"]
    title = f"{settings['poison']:.0%} poison, {settings['seeds']} seed(s), mean % and 95 % interval"
    cells: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for cell in report["summary"]:
        cells.setdefault((cell["task"], cell["lineage"]), []).append(cell)
    for (task, lineage), rows in cells.items():
        table = Table(title=f"{task} task, {lineage} lineage: {title}", title_justify="left")
        table.add_column("method", no_wrap=True)
        for name in ("harm", "benign", "task", "s"):
            table.add_column(name, justify="right", no_wrap=True)
        for row in rows:
            rates = [_rate(row, name) for name in ("harm", "benign_answered", "task")]
            table.add_row(row["method"], *rates, f"{row['seconds']:.1f}")
        yield table


def _rate(row: dict[str, Any], name: str) -> str:
    if not row["rates"]:
        return "n/a"
    mean, low, high = (round(100 * row["rates"][name][key]) for key in ("mean", "low", "high"))
    return f"{mean} ({low}-{high})"


def _say(console: Console, text: str, style: str | None = None) -> None:
    """Print the text as it is: no markup, and no line breaks inside of paths."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def main() -> None:
    """Entry point: an expected failure is one sentence on stderr and exit code 1, never a traceback."""
    try:
        app()
    except (PeftNLSRError, ValueError, OSError) as error:
        _say(err, f"Error: {error}", style="red")
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
