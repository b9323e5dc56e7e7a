"""The ``peft-nlsr`` command: one command = one configuration = one library call.

Results go to stdout, everything else to stderr. An expected failure is one sentence and an exit code, never a
traceback; what a command writes appears complete or not at all. Heavy packages are imported when a command runs.
"""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Callable
from typing import Annotated, Any

import typer

from ..errors import PeftNLSRError
from . import building, comparing, looking, measuring, repair, settings
from .demo import demo
from .options import EPILOG, EXIT_CODES, UnmetError, say

_COMMANDS: dict[str, tuple[Callable[..., Any], ...]] = {
    "Start": (demo, settings.config),
    "Repair": (repair.realign, repair.revert, repair.verify, repair.push),
    "Measure": (measuring.evaluate, measuring.report, comparing.compare, comparing.tune),
    "Understand": (looking.inspect, looking.audit),
    "Prepare": (building.calibrate,),
}

_AGAIN = "The same command again goes on where finished parts are kept (--resume, demo, extract), else it starts over."

_NO_MEMORY = (
    "memory ran out; nothing is half-written. Try smaller batches (--set nlsr_batch_size=4, or --batch-size), shorter "
    "examples (--set max_length=256), --dtype bfloat16, --set offload=always, or --device balanced, which spreads the "
    "model over all GPUs and the CPU's memory"
)

__all__ = ["EXIT_CODES", "app", "main"]

app = typer.Typer(
    name="peft-nlsr",
    help="Restore the safety alignment of fine-tuned LoRA adapters, without training.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)
for _panel, _functions in _COMMANDS.items():
    for _function in _functions:
        app.command(rich_help_panel=_panel, epilog=EPILOG)(_function)
app.add_typer(building.patch_app, name="patch", rich_help_panel="Prepare")
app.add_typer(building.reference_app, name="reference", rich_help_panel="Prepare")


def _version(wanted: bool) -> None:
    from .. import __version__

    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what is done and why.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of a failure.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    level = logging.DEBUG if debug else logging.INFO if verbose else logging.WARNING
    logging.basicConfig(level=logging.ERROR, stream=sys.stderr, format="%(message)s")  # of other libraries
    logging.getLogger("peft_nlsr").setLevel(level)


def main() -> None:
    """Entry point: every outcome that can be expected is an exit code of ``EXIT_CODES``, never a traceback."""
    try:
        app(prog_name="peft-nlsr")
    except UnmetError as error:
        _fail("Not met", error, 3)
    except (PeftNLSRError, ValueError, OSError) as error:
        _fail("Error", error, 1)
    except (RuntimeError, MemoryError) as error:
        if not _out_of_memory(error):
            raise
        _fail("Error", PeftNLSRError(_NO_MEMORY), 1)
    except SystemExit as end:
        if end.code == 130:
            say(f"Interrupted. Nothing is half-written. {_AGAIN}", "yellow")
        raise


def _out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, on an accelerator or for torch on the CPU."""
    import torch

    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _fail(kind: str, error: Exception, code: int) -> None:
    if logging.getLogger("peft_nlsr").level == logging.DEBUG:
        traceback.print_exception(error)
    say(f"{kind}: {error}", "red")
    raise SystemExit(code) from error


if __name__ == "__main__":
    main()
