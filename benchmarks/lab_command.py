"""The command line that the benchmarks on the lab share: a configuration in, JSON out, the lab's stages cached."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple


class Asked(NamedTuple):
    """What a benchmark on the lab was asked for: the configuration, the file to write, the folder of the stages."""

    config: dict[str, Any]
    output: Path
    cache: Path | None


def asked_for(about: str | None, arguments: list[str] | None = None) -> Asked:
    """Read the command line; ``about`` is the benchmark's docstring."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="JSON file with what to run")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--cache", type=Path, help="folder of the lab's stages")
    given = parser.parse_args(arguments)
    return Asked(json.loads(given.config.read_text("utf-8")), given.output, given.cache)
