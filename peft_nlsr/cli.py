"""The ``peft-nlsr`` command: one command = one library call. Data go to stdout, everything else to stderr."""

from __future__ import annotations

import json
import logging
import sys
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
    from .lab import Lab, LabConfig
    from .lab.study import DEMO_METHODS, METHODS, run_study, study_report

    with _progress() as bar:
        task = bar.add_task("starting", total=1.0)

        def stage(name: str, fraction: float) -> None:
            bar.update(task, description=f"seed {current[0]}: training {name}", completed=fraction)

        def row(done: Any) -> None:
            current[0] = done.seed
            bar.update(
                task, description=f"seed {done.seed}: {done.task}, {done.lineage}: {done.method}", completed=1.0
            )

        current = [0]
        labs = [Lab(LabConfig(seed=seed), cache_dir=cache, progress=stage) for seed in range(seeds)]
        methods = METHODS if full else DEMO_METHODS
        rows = run_study(labs, methods=methods, poison=poison, prompts=prompts, report=row)
    report = study_report(rows, labs[0], {"seeds": seeds, "poison": poison, "prompts": prompts})
    path = output / "lab_report.json"
    output.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        out.print(_study_table(report))
    _say(err, f"Report: {path}. Your own adapter: peft-nlsr realign ADAPTER --patch PATCH -o OUT")


def _progress() -> Progress:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, console=err, transient=True)


def _study_table(report: dict[str, Any]) -> Table:
    settings = report["settings"]
    table = Table(
        title=f"Safety lab, {settings['poison']:.0%} poison, {settings['seeds']} seed(s), mean [95 % interval]",
        caption="harm: held-out harmful requests complied with (lower is better). benign: ordinary requests answered. "
        "task: the user's task done. n/a: the method refuses an adapter that was not trained from the reference.",
    )
    for name in ("task", "lineage", "method"):
        table.add_column(name, no_wrap=True)
    for name in ("harm", "benign", "task score", "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    previous = None
    for cell in report["summary"]:
        here = (cell["task"], cell["lineage"])
        if previous not in (None, here):
            table.add_section()
        shown = here if previous != here else ("", "")
        rates = [_rate(cell, name) for name in ("harm", "benign_answered", "task")]
        table.add_row(*shown, cell["method"], *rates, f"{cell['seconds']:.1f}")
        previous = here
    return table


def _rate(cell: dict[str, Any], name: str) -> str:
    if not cell["rates"]:
        return "n/a"
    rate = cell["rates"][name]
    return f"{rate['mean']:.2f} [{rate['low']:.2f}, {rate['high']:.2f}]"


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
