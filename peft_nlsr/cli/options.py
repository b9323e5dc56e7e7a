"""What all commands share: their options, the settings file, and how results and hints are said.

A settings file holds settings (fields of ``NLSRConfig``) and options of the command; a flag wins over the file.
Results go to stdout, everything else to stderr. Heavy packages are imported when a command runs, never before.
"""

from __future__ import annotations

import difflib
import json
import os
import shlex
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from ..config import NLSRConfig
    from ..judges import Judge

EXIT_CODES = {
    0: "done",
    1: "it could not be done, the last line says why",
    2: "the call itself is wrong",
    3: "a gate is closed or a verification failed",
    130: "interrupted",
}
EPILOG = "Exit codes: " + "; ".join(f"{code} {meaning}" for code, meaning in EXIT_CODES.items()) + "."
_SETTINGS = "settings"  # the name of --set's parameter, by which a command is known to take settings


_FILE_PRESET = "preset of the settings file"


class UnmetError(Exception):
    """A gate was closed or a verification failed: exit code 3; what was found has been said."""


def console(*, stderr: bool = False) -> Console:
    """Where text goes: stdout for results, stderr for all else."""
    from rich.console import Console

    return Console(stderr=stderr)


def say(text: str, style: str | None = None, *, stderr: bool = True) -> None:
    """Print the text as it is: no markup, and no line breaks inside of paths."""
    console(stderr=stderr).print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def show(as_json: bool, values: Any, *shown: RenderableType) -> None:
    """The result on stdout: as JSON, or as text and tables for people."""
    if as_json:
        print(json.dumps(values, indent=2, sort_keys=True))
        return
    for part in shown:
        if isinstance(part, str):
            say(part, stderr=False)
        else:
            console().print(part)


def table(title: str, *columns: str, rows: Iterable[Iterable[str]]) -> Any:
    """A table that fits 80 columns: cells wrap, nothing in them is read as markup."""
    from rich.table import Table
    from rich.text import Text

    made = Table(title=title, title_justify="left", title_style="bold", expand=False)
    for name in columns:
        made.add_column(name, overflow="fold")
    for row in rows:
        made.add_row(*(Text(cell) for cell in row))
    return made


def wrote(path: Path, *then: str) -> None:
    """The closing lines: what was written, and the next commands, a line each, to be copied."""
    say("\n".join([f"Wrote {path}.", *then]))


def command(*words: str | Path) -> str:
    """A command to be copied, its paths quoted where they need it."""
    return "peft-nlsr " + " ".join(shlex.quote(str(word)) for word in words)


def given_flags(**given: str | Path | None) -> tuple[str | Path, ...]:
    """The options that were given, as words of a command: ``base="b", patch=None`` becomes ``("--base", "b")``."""
    return tuple(word for name, value in given.items() if value is not None for word in (f"--{name}", value))


def usage_error(text: str) -> NoReturn:
    """End with exit code 2: the call itself is wrong."""
    raise typer.BadParameter(text)


def refuse_unread(ctx: typer.Context, why: str, *names: str) -> None:
    """End with a usage error where any of the parameters was given, by a flag, or by the settings file with
    another value than the default.

    Args:
        why: with ``{}`` where the flags go.
    """
    parameters = {parameter.name: parameter for parameter in ctx.command.params}
    flags = [parameters[name].opts[0] for name in names if _was_given(ctx, parameters[name])]
    if flags:
        usage_error(why.format(", ".join(flags)))


def _was_given(ctx: typer.Context, parameter: Any) -> bool:
    source = getattr(ctx.get_parameter_source(parameter.name), "name", "DEFAULT")
    if source != "DEFAULT_MAP":
        return source != "DEFAULT"
    # Files often write out all options, so that one with the default's value asks for nothing.
    value = ctx.params[parameter.name]
    return value is not None and value != parameter.default


def require_new(output: Path | None, dry_run: bool, *inputs: str | Path | None) -> Path | None:
    """The folder to write, None for a dry run; checked before anything is computed.

    Raises:
        FileExistsError: it exists and is not an empty folder; ValueError: it lies inside an input.
    """
    if dry_run:
        return None
    if output is None:
        usage_error("give --output FOLDER, or --dry-run to only see what would happen")
    for given in (Path(i) for i in inputs if i is not None and Path(i).is_dir()):
        if given.resolve() in output.resolve().parents:
            raise ValueError(f"output {output} is inside the input {given}, which is never changed; choose another")
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise FileExistsError(
            f"{output} exists and is not an empty folder; nothing was written. Choose another output, or remove it."
        )
    return output


def require_file(path: Path | None) -> None:
    """Check, before anything is computed, that a result can be written to a file of this name.

    Raises:
        IsADirectoryError: it is a folder.
    """
    if path is not None and path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the name of a file")


def write_new_text(path: Path, text: str) -> None:
    """Write a result file, whole or not at all; an earlier one of that name is replaced."""
    from ..files import write_text

    require_file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)


def _read_settings_file(ctx: typer.Context, path: Path | None) -> Path | None:
    """Take the command's own options in the file as its defaults, and keep the settings for :func:`settings_of`."""
    if path is None or ctx.resilient_parsing:
        return path
    content = _parsed(path)
    content = content["config"] if isinstance(content.get("config"), dict) else content
    options_by_key = _keys(ctx.command.params)
    settings = {key: value for key, value in content.items() if _as_key(key) not in options_by_key}
    settings.pop("schema_version", None)
    takes_settings = any(parameter.name == _SETTINGS for parameter in ctx.command.params)
    known = set(_fields()) if takes_settings else set()
    for key in settings:
        if key not in known:
            meant = _meant(key, {*options_by_key, *known})
            usage_error(f"{path} holds {key!r}, which {ctx.command.name} does not know{meant}")
    found = {_as_key(key): value for key, value in content.items()}
    ctx.default_map = {name: found[key] for key, name in options_by_key.items() if key in found}
    ctx.meta[_SETTINGS] = settings
    ctx.meta[_FILE_PRESET] = content.get("preset")
    return path


def _keys(parameters: Iterable[Any]) -> dict[str, str]:
    """What a settings file may call each option or argument of a command -> the parameter's name."""
    found: dict[str, str] = {}
    for parameter in parameters:
        if parameter.name in (_SETTINGS, "config_file", "help"):
            continue
        flags = [_as_key(flag[2:]) for flag in parameter.opts if flag.startswith("--")]
        found |= dict.fromkeys(flags or [parameter.name], parameter.name)
    return found


def _as_key(name: str) -> str:
    return name.replace("-", "_")


def _parsed(path: Path) -> dict[str, Any]:
    import yaml

    if not path.is_file():
        usage_error(f"the settings file {path} does not exist")
    try:
        content = yaml.safe_load(path.read_text("utf-8"))  # JSON is YAML
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        usage_error(f"{path} is neither JSON nor YAML: {' '.join(str(error).split())}")
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        usage_error(f"{path} holds no names with values; write one with: peft-nlsr config > {path.name}")
    return content


def _fields() -> dict[str, Any]:
    import dataclasses

    from ..config import NLSRConfig

    return {field.name: field for field in dataclasses.fields(NLSRConfig)}


def _meant(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else "; `peft-nlsr config` lists all settings"


def settings_of(ctx: typer.Context, preset: str, assignments: Iterable[str]) -> NLSRConfig:
    """The preset, changed by the settings file, changed by ``--set``.

    A file that names a preset is refused with another one, under whose name its settings would not be true.
    """
    from ..config import NLSRConfig

    values: dict[str, Any] = dict(ctx.meta.get(_SETTINGS, {}))
    for assignment in assignments:
        name, separator, text = assignment.partition("=")
        if not separator:
            usage_error(f"--set {assignment}: expected NAME=VALUE, like --set beta=0.5")
        values[name.strip().replace("-", "_")] = text.strip()
    unknown = [name for name in values if name not in _fields()]
    if unknown:
        usage_error(f"--set {unknown[0]}: no such setting{_meant(unknown[0], _fields())}")
    changes = {name: _typed(name, value) for name, value in values.items()}
    preset = str(changes.pop("preset", preset))
    started = ctx.meta.get(_FILE_PRESET)
    if started not in (None, preset):
        usage_error(f"the settings file is of preset {started}, not {preset}; leave out one of the two")
    try:
        return NLSRConfig.from_preset(preset, **changes)
    except ValueError as error:
        usage_error(str(error))


def _typed(name: str, value: Any) -> Any:
    """A value as the field's type, where it was given as text."""
    if not isinstance(value, str):
        return value
    kind = _fields()[name].type
    try:
        return _READ.get(kind, str)(value)
    except ValueError:
        wanted = {"float": "a number", "int": "a whole number", "bool": "true or false"}[kind]
        usage_error(f"{name}={value!r} must be {wanted}")


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


_READ: dict[str, Callable[[str], Any]] = {"float": float, "int": int, "bool": _boolean}


def _complete_setting(incomplete: str) -> list[tuple[str, str]]:
    """What a shell offers after ``--set``."""
    found = {name: field for name, field in _fields().items() if name.startswith(incomplete)}
    return [(f"{name}=", field.metadata["help"]) for name, field in found.items()]


def _complete_preset(incomplete: str) -> list[str]:
    from ..config import PRESETS

    return [name for name in PRESETS if name.startswith(incomplete)]


def judge_of(name: str) -> Judge:
    """The judge that ``module:function`` names; modules beside the working folder count.

    Raises:
        ValueError: it cannot be imported.
    """
    import sys

    from ..judges import load_judge

    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    return load_judge(name)


def percent(value: float) -> str:
    """``12.5%``."""
    return f"{100 * value:.1f}%"


def key_values(title: str, values: Mapping[str, Any]) -> Any:
    """A two-column table."""
    made = table(title, "", "", rows=((name, str(value)) for name, value in values.items()))
    made.show_header = False
    return made


# The options, by the parameter that takes them.
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be done; write nothing.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="New folder for the result.")]
Preset = Annotated[
    str, typer.Option(help="default, paper or released.", autocompletion=_complete_preset, rich_help_panel="Settings")
]
Settings = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="Change one setting; repeat for more. `peft-nlsr config --explain` lists them.",
        autocompletion=_complete_setting,
        rich_help_panel="Settings",
    ),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        help="JSON or YAML file with settings and with options of this command; flags win.",
        callback=_read_settings_file,
        is_eager=True,
        rich_help_panel="Settings",
    ),
]
Base = Annotated[
    str | None,
    typer.Option("--base", help="Folder or Hub id of the base model (causal language model)."),
]
NeededBase = Annotated[str, typer.Option("--base", help="Folder or Hub id of the base model (causal language model).")]
Device = Annotated[
    str,
    typer.Option(
        help="auto, cpu, cuda, cuda:1, mps; auto takes a GPU when there is one. balanced spreads a large model over "
        "all GPUs and the CPU's memory.",
        rich_help_panel="Model",
    ),
]
Dtype = Annotated[
    str,
    typer.Option(help="auto (as stored), float32, bfloat16 or float16.", rich_help_panel="Model"),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Let the base model's repository run its own Python code. Off: such models are refused.",
        rich_help_panel="Model",
    ),
]
TokenizerName = Annotated[
    str | None,
    typer.Option(
        "--tokenizer", help="Folder or Hub id; else the adapter's own, else the base's.", rich_help_panel="Model"
    ),
]
JudgeName = Annotated[
    str,
    typer.Option("--judge", metavar="MODULE:FUNCTION", help="Which answers are refusals.", rich_help_panel="Data"),
]
Calibration = Annotated[
    str | None,
    typer.Option(
        help="Safety prompts, best with safe answers: .jsonl, .json, .csv, .txt, or HUB_ID:SPLIT. Else built-in ones.",
        rich_help_panel="Data",
    ),
]
Weak = Annotated[
    str | None,
    typer.Option(help="The adapter before preference alignment, for pre-amplification.", rich_help_panel="Data"),
]
REFUSES = "peft_nlsr.judges:refuses"
