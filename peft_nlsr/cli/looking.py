"""The commands that find out why safety dropped: inspect an adapter, audit the data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..defaults import MAX_NEW_TOKENS
from .asking import (
    BatchSize,
    HarmJudge,
    Limit,
    Reference,
    Safety,
    Template,
    Tokens,
    asked_of,
)
from .loading import ModelOptions, load, read_rows
from .options import (
    REFUSES,
    Base,
    ConfigFile,
    Device,
    Dtype,
    Json,
    JudgeName,
    NeededBase,
    TokenizerName,
    TrustRemoteCode,
    command,
    judge_of,
    refuse_unread,
    require_file,
    say,
    show,
    table,
    usage_error,
    wrote,
)

if TYPE_CHECKING:
    from ..inspection import Audit, Inspection

_MOST_SHOWN = 12  # modules; all are in the JSON
_ASKING = (
    *("safety", "limit", "judge", "harm_judge", "max_new_tokens", "batch_size", "template"),
    *("device", "dtype", "tokenizer", "trust_remote_code"),
)


def inspect(
    ctx: typer.Context,
    adapter: Annotated[str, typer.Argument(help="Folder or Hub id of the fine-tuned adapter.")],
    reference: Reference = None,
    base: Base = None,
    blocks: Annotated[
        bool, typer.Option("--blocks", help="With --base: the harm rate with each block restored alone.")
    ] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file for the inspection.")] = None,
    safety: Safety = None,
    limit: Limit = None,
    judge: JudgeName = REFUSES,
    harm_judge: HarmJudge = None,
    max_new_tokens: Tokens = MAX_NEW_TOKENS,
    batch_size: BatchSize = 16,
    template: Template = None,
    config_file: ConfigFile = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    tokenizer: TokenizerName = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Show how far an adapter drifted from a safe reference, module by module, and which blocks matter.

    Example: peft-nlsr inspect ./my-adapter --reference ./aligned

    Example: peft-nlsr inspect ./my-adapter --base org/model --blocks
    """
    from ..inspection import inspect_adapter

    require_file(output)
    if blocks and base is None:
        usage_error("--blocks asks the model: give --base MODEL")
    if not blocks or base is None:
        refuse_unread(ctx, "{} is for asking the model: give --base MODEL --blocks too", *_ASKING)
        found = inspect_adapter(adapter, reference)
    else:
        asked = asked_of(
            (safety, None, None, None, limit), judge, harm_judge, max_new_tokens, batch_size, template, only="safety"
        )
        loaded = load(ModelOptions(base, device, dtype, trust_remote_code, tokenizer), adapter)
        found = inspect_adapter(loaded.model, reference, evaluation=asked, tokenizer=loaded.tokenizer)
    if output is not None:
        found.save(output)
    show(as_json, found.to_dict(), *_inspected(found))
    then = f"Next: {_after_inspecting(adapter, base)}"
    wrote(output, then) if output is not None else say(then)


def _after_inspecting(adapter: str, base: str | None) -> str:
    """The command to realign the adapter; of one that is realigned already, the one that shows how."""
    from ..adapter_folder import AdapterFolder, open_adapter
    from ..folders import is_realigned

    opened = open_adapter(adapter)
    if isinstance(opened, AdapterFolder) and is_realigned(opened):
        return command("report", adapter)
    return command("realign", adapter, "--base", base or "MODEL", "--utility", "DATA", "-o", "OUT")


def _inspected(found: Inspection) -> list[Any]:
    from ..report import say_interval, say_value

    compared = found.lineage != "none"
    ordered = sorted(found.modules, key=lambda m: -(m.norm if m.relative_change is None else m.relative_change))
    columns = ["module", "norm", *(["cosine", "relative change"] if compared else [])]
    rows = (
        [
            m.module,
            f"{m.norm:#.3g}".rstrip("."),
            *([_number(m.cosine), _number(m.relative_change)] if compared else []),
        ]
        for m in ordered[:_MOST_SHOWN]
    )
    said = f"compared with: {found.reference}; lineage: {found.lineage}"
    if found.factor_similarity is not None:
        said += f" (cosine of the A factors {found.factor_similarity:.3f}"
        said += f", {len(found.unrelated)} of {len(found.modules)} modules unrelated)"
    title = f"the {min(_MOST_SHOWN, len(ordered))} of {len(ordered)} modules that moved most"
    shown: list[Any] = [said, table(title, *columns, rows=rows)]
    if found.blocks:
        harm = ((name, e.rates["harm_rate"]) for name, e in found.blocks.items())
        cells = ((name, say_value(rate), say_interval(rate)) for name, rate in harm)
        shown.append(table("harm with one block restored", "restored", "harm rate", "95% interval", rows=cells))
    first = ", ".join(found.outside[:4])
    outside = f"note: {len(found.outside)} trained tensors are not LoRA and were not compared: {first}"
    return [*shown, *([outside] if found.outside else [])]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def audit(
    data: Annotated[str, typer.Argument(help="Training data: .jsonl, .json, .csv, .txt, or HUB_ID:SPLIT.")],
    base: NeededBase,
    reference: Annotated[
        str | None, typer.Option(help="A safe adapter on the base; else the base itself is asked.")
    ] = None,
    source: Annotated[str | None, typer.Option(help="Column that says where a row comes from.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file for the audit.")] = None,
    judge: JudgeName = REFUSES,
    limit: Annotated[int | None, typer.Option(min=1, help="Rows that are asked, drawn with the seed.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of that draw.")] = 0,
    answer_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer; enough to open a refusal.")] = 16,
    batch_size: BatchSize = 16,
    config_file: ConfigFile = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    tokenizer: TokenizerName = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Count the rows of training data that an aligned model refuses; row numbers, never texts.

    Example: peft-nlsr audit train.jsonl --base org/model --source origin
    """
    from .. import inspection

    require_file(output)
    rows, judged = read_rows(data), judge_of(judge)
    loaded = load(ModelOptions(base, device, dtype, trust_remote_code, tokenizer), reference)
    found = inspection.audit(
        loaded.model,
        rows,
        reference=None if reference is None else str(loaded.source.path),
        tokenizer=loaded.tokenizer,
        judge=judged,
        source=source,
        limit=limit,
        answer_tokens=answer_tokens,
        batch_size=batch_size,
        seed=seed,
    )
    if output is not None:
        found.save(output)
    show(as_json, found.to_dict(), *_audited(found))
    then = f"Next: {command('realign', 'ADAPTER', '--base', base, '--utility', data, '-o', 'OUT')}"
    wrote(output, then) if output is not None else say(then)


def _audited(found: Audit) -> list[Any]:
    from .options import percent

    parts = [*found.sources.items(), ("all", found.total)]
    rows = (
        (name, str(p.asked), str(p.refused), f"{percent(p.share)} ({percent(p.low)} to {percent(p.high)})")
        for name, p in parts
    )
    shown = ", ".join(map(str, found.refused_rows[:20]))
    more = len(found.refused_rows) - 20
    said = [f"refused rows: {shown}{f' and {more} more (--json lists all)' if more > 0 else ''}"] if shown else []
    if found.unasked_rows:
        said.append(f"{len(found.unasked_rows)} rows have no prompt, or no room for an answer, and were not asked")
    return [
        table("refused by the aligned model", "source", "asked", "refused", "share, 95% interval", rows=rows),
        *said,
        f"judge: {found.judge}",
    ]
