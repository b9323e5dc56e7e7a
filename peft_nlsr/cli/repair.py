"""The commands that change, undo, check and publish an adapter: realign, revert, verify, push."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..defaults import MAX_NEW_TOKENS, TOLERANCE
from .asking import Benign, HarmJudge, Lookalike, Safety, Task, Tokens, Utility, asked_of
from .live import Gate, Teaching, measured_on, planned_on
from .loading import ModelOptions, load, read_rows
from .options import (
    REFUSES,
    Base,
    Calibration,
    ConfigFile,
    Device,
    DryRun,
    Dtype,
    Json,
    JudgeName,
    Output,
    Preset,
    Settings,
    TokenizerName,
    TrustRemoteCode,
    UnmetError,
    Weak,
    command,
    judge_of,
    refuse_unread,
    require_new,
    say,
    settings_of,
    show,
    table,
    usage_error,
    wrote,
)

if TYPE_CHECKING:
    from ..config import NLSRConfig
    from ..gate import Outcome
    from ..verification import Verification

_MEASURED = ("safety", "lookalike", "benign", "task", "harm_judge", "tolerance", "max_new_tokens")
_LIVE = (
    *("utility", "calibration", "weak", "judge", "measure", "work_dir"),
    *("device", "dtype", "tokenizer", "trust_remote_code"),
)
_STATUS = {"passed": "ok", "failed": "FAILED", "absent": "-"}


def realign(
    ctx: typer.Context,
    adapter: Annotated[str, typer.Argument(help="Folder or Hub id of the fine-tuned adapter; never changed.")],
    patch: Annotated[str | None, typer.Option(help="Folder or Hub id of the safety patch.")] = None,
    reference: Annotated[
        str | None, typer.Option(help="Folder or Hub id of a safe adapter, for the methods that take one.")
    ] = None,
    base: Base = None,
    output: Output = None,
    utility: Utility = None,
    calibration: Calibration = None,
    weak: Weak = None,
    judge: JudgeName = REFUSES,
    safety: Safety = None,
    lookalike: Lookalike = None,
    benign: Benign = None,
    task: Task = None,
    harm_judge: HarmJudge = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure before and after; write nothing if the gate is closed.")
    ] = False,
    tolerance: Annotated[
        float,
        typer.Option(
            min=0.0, max=1.0, help="The gate: how far coherence and accuracy may fall, and over-refusal rise."
        ),
    ] = TOLERANCE,
    max_new_tokens: Tokens = MAX_NEW_TOKENS,
    preset: Preset = "default",
    settings: Settings = [],  # noqa: B006  typer copies it
    config_file: ConfigFile = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    tokenizer: TokenizerName = None,
    trust_remote_code: TrustRemoteCode = False,
    work_dir: Annotated[
        Path | None,
        typer.Option(
            help="Two-teacher form: keep solved blocks here; the same command goes on after an interruption."
        ),
    ] = None,
    diff: Annotated[bool, typer.Option(help="Keep the original values, for revert.")] = True,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Realign an adapter: from files with --patch, or with its base model.

    With --patch: no base model, no data, no GPU, seconds.

    With --base: any LoRA adapter on an aligned base model, best with the data it was trained on.

    Example: peft-nlsr realign ./my-adapter --patch ./patch -o ./my-adapter-realigned

    Example: peft-nlsr realign ./my-adapter --base org/model --utility train.jsonl --measure -o ./realigned
    """
    config = settings_of(ctx, preset, settings)
    target = require_new(output, dry_run, adapter)
    if base is not None:
        options = ModelOptions(base, device, dtype, trust_remote_code, tokenizer)
        _require_no_patch_and_data(patch, utility)
        asked = asked_of((safety, lookalike, benign, task, None), judge, harm_judge, max_new_tokens, 16, None)
        gate = Gate(asked, tolerance) if measure else None
        if not measure:
            refuse_unread(ctx, "{} says what is measured: give --measure too", *_MEASURED)
        given = Teaching(patch, reference, weak, read_rows(calibration), read_rows(utility), judge_of(judge), work_dir)
        if gate is not None:
            asked.require_unseen(given.calibration, given.utility)
        _realign_live(options, adapter, config, given, target, gate, diff, as_json)
        return
    refuse_unread(ctx, "{} needs the base model: give --base MODEL", *_LIVE, *_MEASURED)
    if patch is None and reference is None:
        usage_error("give --patch PATCH (files only), or --base MODEL (a live model)")
    from ..errors import LineageError
    from ..folders import realign_folder

    try:
        done = realign_folder(adapter, target, patch=patch, reference=reference, config=config, save_diff=diff)
    except LineageError as error:
        any_adapter = command("realign", adapter, "--base", "MODEL", "--utility", "DATA", "-o", "OUT")
        raise LineageError(f"{error}: {any_adapter}") from error
    show(as_json, done.to_dict(), done.summary())
    _say_next(adapter, target, diff)


def _require_no_patch_and_data(patch: str | None, utility: str | None) -> None:
    if patch is not None and utility is not None:
        usage_error("--patch and --utility exclude each other: a patch needs no data, the two-teacher form no patch")


def _realign_live(
    options: ModelOptions,
    adapter: str,
    config: NLSRConfig,
    given: Teaching,
    target: Path | None,
    gate: Gate | None,
    save_diff: bool,
    as_json: bool,
) -> None:
    from ..folders import write_realigned

    logging.getLogger("peft_nlsr.realign").setLevel(logging.ERROR)  # its notes are in the summary and the record
    if target is None:
        logging.getLogger("peft_nlsr.two_teacher").setLevel(logging.INFO)  # what it will cost
    loaded = load(options, adapter)
    planned = planned_on(loaded, config, given)
    outcome = None
    if gate is not None:
        outcome = measured_on(loaded, planned, given, gate)
        _require_open(outcome, as_json)
        planned = outcome.realignment or planned
    report = None if outcome is None or outcome.report is None else outcome.report
    if target is not None:
        planned = write_realigned(
            loaded.source,
            planned,
            target,
            planned.updates,
            originals=planned.originals,
            report=report,
            save_diff=save_diff,
        )
    if report is None:
        show(as_json, planned.to_dict(), planned.summary())
    else:
        _show_report(replace(report, record=planned.to_dict()), as_json)
    _say_next(adapter, target, save_diff)


def _require_open(outcome: Outcome, as_json: bool) -> None:
    from ..errors import PeftNLSRError

    if not outcome.evaluations:
        raise PeftNLSRError(
            "the tokenizer does not know the words of the built-in prompts, so the gate could not be measured and "
            "nothing was written; give prompts in the model's language with --safety, --lookalike and --benign"
        )
    if outcome.verdict.kept:
        return
    if outcome.report is not None:
        _show_report(outcome.report, as_json)
    raise UnmetError(f"the gate is closed and nothing was written: {'; '.join(outcome.verdict.reasons)}")


def _show_report(report: Any, as_json: bool) -> None:
    from ..report import to_terminal

    show(as_json, report.to_dict(), *([] if as_json else [to_terminal(report)]))


def _say_next(adapter: str, target: Path | None, diff: bool) -> None:
    if target is None:
        say("Nothing was written (dry run). To write: the same command with -o FOLDER instead of --dry-run")
        return
    undo = f"Undo: {command('revert', target, '-o', 'ORIGINAL')}" if diff else f"The original is still in {adapter}."
    wrote(target, f"Next: {command('verify', target)}", undo)


def revert(
    adapter: Annotated[Path, typer.Argument(help="Folder of a realigned adapter.")],
    output: Output = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Write the adapter as it was before its realignment, bit for bit.

    Example: peft-nlsr revert ./my-adapter-realigned -o ./my-adapter-again
    """
    from ..folders import read_record, revert_folder

    target = require_new(output, dry_run, adapter)
    if target is None:
        found = _verified(adapter, None, None)
        _show_checks(found, as_json)
        if any(check.status == "failed" and check.name in ("weights", "record", "diff") for check in found.checks):
            raise UnmetError(f"{adapter} cannot be reverted")
        say("Nothing was written (dry run). The adapter can be reverted")
        return
    revert_folder(adapter, target)
    if as_json:
        show(True, {"output": str(target), "fingerprint": read_record(adapter)["fingerprint_before"]})
    wrote(target, "It is the adapter as it was before realignment, bit for bit.")


def verify(
    adapter: Annotated[str, typer.Argument(help="Folder or Hub id of a realigned adapter.")],
    adapter_name: Annotated[
        str | None, typer.Option(help="Sub-folder, as PEFT saves adapters that have a name.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Of a Hub repository: branch, tag or commit.")] = None,
    as_json: Json = False,
) -> None:
    """Check record, diff, report and card of a realigned adapter against its weights; exit code 3 if one is untrue.

    Example: peft-nlsr verify ./my-adapter-realigned
    """
    found = _verified(adapter, adapter_name, revision)
    _show_checks(found, as_json)
    if not found.verified:
        failed = ", ".join(check.name for check in found.checks if check.status == "failed")
        raise UnmetError(f"{adapter} is not verified: {failed}")
    then = f" Next: {command('push', adapter, 'USER/REPOSITORY')}" if Path(adapter).is_dir() else ""
    say(f"{adapter} is what it says.{then}")


def _verified(adapter: str | Path, adapter_name: str | None, revision: str | None) -> Verification:
    from ..verification import verify_folder

    return verify_folder(adapter, adapter_name=adapter_name, revision=revision)


def _show_checks(found: Verification, as_json: bool) -> None:
    rows = ((check.name, _STATUS[check.status], check.detail) for check in found.checks)
    show(as_json, found.to_dict(), table("verification", "what", "result", "found", rows=rows))


def push(
    adapter: Annotated[Path, typer.Argument(help="Folder of a realigned adapter; a copy of it is pushed.")],
    repo_id: Annotated[str, typer.Argument(help="USER/NAME on the Hub; made when it is missing.")],
    base_model: Annotated[str | None, typer.Option(help="Hub id of the base model, in place of a local path.")] = None,
    adapter_name: Annotated[str | None, typer.Option(help="Sub-folder of the adapter.")] = None,
    private: Annotated[bool | None, typer.Option(help="For a new repository; else your account's default.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch; made when it is missing.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Of the commit.")] = None,
    allow_unaligned: Annotated[
        bool, typer.Option("--allow-unaligned", help="Push even if no record fits the weights, without any claim.")
    ] = False,
    keep_checkpoints: Annotated[
        bool, typer.Option("--keep-checkpoints", help="Keep training checkpoints of earlier pushes.")
    ] = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Push a realigned adapter to the Hub in one commit: weights, record, report and card, if they agree.

    The access token is the one of `hf auth login`, or the variable HF_TOKEN.

    Example: peft-nlsr push ./my-adapter-realigned me/my-adapter --private
    """
    if dry_run:
        _preview_push(adapter, repo_id, adapter_name, allow_unaligned, as_json)
        return
    from ..publishing import push_realigned

    done = push_realigned(
        adapter,
        repo_id,
        adapter_name=adapter_name,
        base_model=base_model,
        allow_unaligned=allow_unaligned,
        keep_checkpoints=keep_checkpoints,
        private=private,
        revision=revision,
        create_pr=create_pr,
        commit_message=message,
    )
    result = {"repo_id": repo_id, "commit": done.oid, "url": done.commit_url, "pull_request": done.pr_url}
    show(as_json, result, done.pr_url or done.commit_url)
    say(f"Pushed to {repo_id}. Next: {command('verify', repo_id)}")


def _preview_push(adapter: Path, repo_id: str, adapter_name: str | None, allow_unaligned: bool, as_json: bool) -> None:
    from ..hub import files_to_push

    found, files = _verified(adapter, adapter_name, None), files_to_push(adapter)
    sizes = {name: (adapter / name).stat().st_size for name in files}
    rows = ((name, f"{size:,} bytes") for name, size in sizes.items())
    values = {"repo_id": repo_id, "files": sizes, "verification": found.to_dict()}
    show(as_json, values, table(f"would be pushed to {repo_id}", "file", "size", rows=rows))
    failed = [check.name for check in found.checks if check.status == "failed"]
    if "card" in failed:
        failed.remove("card")
        say("The card would be written anew, from record and report.")
    if failed and not allow_unaligned:
        raise UnmetError(f"{adapter} is not verified ({', '.join(failed)}); see {command('verify', adapter)}")
    say("Nothing was pushed (dry run).")
