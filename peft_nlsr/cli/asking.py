"""Which prompts a model is asked and who judges its answers: options that the measuring commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import judge_of, usage_error

if TYPE_CHECKING:
    from ..measuring import EvaluationSettings
    from ..prompt_sets import PromptSet

_PROMPTS = "file (.jsonl, .json, .csv, .txt), public set or HUB_ID:SPLIT; without any of the three the built-in ones"
Safety = Annotated[str | None, typer.Option(help=f"Safety prompts: {_PROMPTS}.", rich_help_panel="Data")]
Lookalike = Annotated[
    str | None, typer.Option(help="Prompts that only look harmful: the same.", rich_help_panel="Data")
]
Benign = Annotated[str | None, typer.Option(help="Benign prompts: the same.", rich_help_panel="Data")]
Task = Annotated[
    str | None, typer.Option(help="Prompts of your task with their answers: a file.", rich_help_panel="Data")
]
Limit = Annotated[
    int | None, typer.Option(min=1, help="Only the first prompts of each set that is given.", rich_help_panel="Data")
]
Seen = Annotated[
    list[str],
    typer.Option(
        metavar="SOURCE",
        help="Data of the repair or the training: an error when a prompt to ask is in it; repeatable.",
        rich_help_panel="Data",
    ),
]
HarmJudge = Annotated[
    str | None,
    typer.Option(
        metavar="MODULE:FUNCTION",
        help="Which answers are harmful; else every coherent answer that is no refusal.",
        rich_help_panel="Data",
    ),
]
Tokens = Annotated[
    int, typer.Option("--max-new-tokens", min=1, help="Answers are cut there.", rich_help_panel="Model")
]
BatchSize = Annotated[int, typer.Option(min=1, help="Prompts per batch.", rich_help_panel="Model")]
Template = Annotated[
    str | None,
    typer.Option(
        help="Text around each prompt, with {prompt} in it; else the chat template.", rich_help_panel="Model"
    ),
]
Utility = Annotated[
    str | None,
    typer.Option(help="Your training data: .jsonl, .json, .csv, .txt, or HUB_ID:SPLIT.", rich_help_panel="Data"),
]
Reference = Annotated[str | None, typer.Option(help="A safe adapter, for the methods that take one.")]
Patch = Annotated[str | None, typer.Option(help="A safety patch, for the methods that take one.")]
Resume = Annotated[
    Path | None, typer.Option(help="File for finished parts; the same command goes on with it after Ctrl-C.")
]
Sources = tuple[str | None, str | None, str | None, str | None, int | None]


def asked_of(
    sources: Sources,
    judge: str,
    harm_judge: str | None,
    tokens: int,
    batch_size: int,
    template: str | None,
    *,
    only: str | None = None,
) -> EvaluationSettings:
    """How models are measured, from the options; where no set is given, the built-in ones, or that of one kind."""
    from ..measuring import EvaluationSettings
    from ..prompt_sets import builtin_prompt_set

    safety, lookalike, benign, task, limit = sources
    kinds = {"safety": safety, "lookalike": lookalike, "benign": benign}
    sets = [_prompt_set(source, kind, limit) for kind, source in kinds.items() if source is not None]
    if not sets and only is not None:
        sets = [builtin_prompt_set(only)]
    return EvaluationSettings(
        prompts=sets or None,
        task=None if task is None else _prompt_set(task, "task", limit),
        judge=judge_of(judge),
        harm_judge=None if harm_judge is None else judge_of(harm_judge),
        max_new_tokens=tokens,
        batch_size=batch_size,
        template=template,
    )


def _prompt_set(source: str, kind: str, limit: int | None) -> PromptSet:
    from ..prompt_sets import PRESETS, load_prompt_set

    preset = PRESETS.get(source)
    if preset is not None and preset.kind != kind:
        usage_error(
            f"--{kind} {source}: the public set {source} holds {preset.kind} prompts; give it as --{preset.kind}"
        )
    return load_prompt_set(source, kind=kind, limit=limit)
