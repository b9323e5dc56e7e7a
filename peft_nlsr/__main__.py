"""``python -m peft_nlsr`` and the ``peft-nlsr`` script."""

import sys


def main() -> None:
    """Run the command line, or say in one sentence which extra it needs."""
    try:
        from .cli import main as run
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.exit(f"The command line needs {error.name}: pip install 'peft-nlsr[cli]'")
    run()


if __name__ == "__main__":
    main()
