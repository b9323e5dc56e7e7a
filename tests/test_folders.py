"""Files give the same tensors as a live model; the input stays as it is, and the output is whole or not there."""

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import assert_same_factors, drift, factors_of, hashes, make_patch
from transformers import LlamaForCausalLM

from peft_nlsr import (
    CorruptFileError,
    LineageError,
    LowRank,
    NLSRConfig,
    PeftNLSRError,
    SafetyPatch,
    files,
    folders,
    nlsr_realign,
    open_adapter,
    realign_folder,
    record,
    revert_folder,
)
from peft_nlsr.folders import DIFF_NAME
from peft_nlsr.lowrank import fingerprint
from peft_nlsr.storage import TensorFile
from peft_nlsr.verification import verify_folder

MakeLora = Callable[..., PeftModel]
WEIGHTS, CONFIG, RECORD = "adapter_model.safetensors", "adapter_config.json", "nlsr_config.json"

LORAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bf16": {},
    "rslora": {"use_rslora": True},
    "patterns": {"lora_alpha": 7, "rank_pattern": {"v_proj": 3}, "alpha_pattern": {"down_proj": 5}},
    "modules-to-save": {"modules_to_save": ["lm_head"]},
}
EDITS = {
    "sum": NLSRConfig(update="sum"),
    "sum-all": NLSRConfig(update="sum", selection="all"),
    "sum-exact": NLSRConfig(update="sum", compress=False),
    "sum-exact-all": NLSRConfig(update="sum", compress=False, selection="all"),
    "swap": NLSRConfig(update="swap"),
    "swap-uncompressed": NLSRConfig(update="swap", compress=False),
    "paper": NLSRConfig.from_preset("paper", prune_probability=0.2),
    "released": NLSRConfig.from_preset("released"),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make(make_pico_lora: MakeLora, tmp_path: Path) -> Callable[[str], tuple[PeftModel, Path, SafetyPatch]]:
    """A model by the id of its LoRA, its saved adapter, and the patch of what it was trained from."""

    def build(lora: str = "plain") -> tuple[PeftModel, Path, SafetyPatch]:
        settings = LORAS[lora]
        reference, model = (make_pico_lora(seed=0, **copy.deepcopy(settings)) for _ in range(2))
        if lora == "bf16":
            reference, model = reference.to(torch.bfloat16), model.to(torch.bfloat16)
        drift(model).save_pretrained(tmp_path / "adapter")
        (tmp_path / "adapter" / "tokenizer.json").write_text('{"kept": true}')
        return model, tmp_path / "adapter", make_patch(factors_of(reference))

    return build


# ---- the same as on a live model


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("lora", LORAS)
def test_files_and_a_live_model_get_the_same_tensors(tmp_path: Path, make: Any, lora: str, edit: str) -> None:
    model, adapter, patch = make(lora)
    patch.save(tmp_path / "patch")
    from_files = realign_folder(adapter, tmp_path / "out", patch=tmp_path / "patch", config=EDITS[edit])
    live = nlsr_realign(model, EDITS[edit], patch=tmp_path / "patch").nlsr_realignment
    assert_same_factors(factors_of(model), dict(open_adapter(tmp_path / "out")))
    assert from_files.restored and from_files.modules == live.modules
    assert (from_files.method, from_files.reference, from_files.notes) == (live.method, live.reference, live.notes)
    assert from_files.fingerprint_before == live.fingerprint_before != from_files.fingerprint_after
    assert from_files.fingerprint_after == live.fingerprint_after


@pytest.mark.parametrize("edit", ["sum", "sum-exact", "swap"])
@pytest.mark.parametrize("lora", ["plain", "patterns", "modules-to-save"])
def test_the_output_loads_in_plain_peft_and_computes_the_same(
    tmp_path: Path, make: Any, pico_llama: LlamaForCausalLM, lora: str, edit: str
) -> None:
    model, adapter, patch = make(lora)
    realign_folder(adapter, tmp_path / "out", patch=patch, config=EDITS[edit])
    texts = [json.loads((folder / CONFIG).read_text()) for folder in (adapter, tmp_path / "out")]
    assert set(texts[0]) == set(texts[1])
    if edit != "sum-exact":
        assert (adapter / CONFIG).read_bytes() == (tmp_path / "out" / CONFIG).read_bytes()
    loaded = PeftModel.from_pretrained(pico_llama, tmp_path / "out").eval()
    nlsr_realign(model, EDITS[edit], patch=patch)
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits, rtol=0, atol=0)


def test_auto_means_sum(tmp_path: Path, make: Any) -> None:
    _, adapter, patch = make()
    done = realign_folder(adapter, tmp_path / "out", patch=patch)
    assert done.method == done.config.update == "sum"
    realign_folder(adapter, tmp_path / "sum", patch=patch, config=EDITS["sum"])
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "sum" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("as_text", [False, True], ids=["paths", "texts"])
def test_folders_may_be_text_or_paths(tmp_path: Path, make: Any, as_text: bool) -> None:
    _, adapter, patch = make()
    patch.save(tmp_path / "patch")
    kind: Any = str if as_text else Path
    realign_folder(kind(adapter), kind(tmp_path / "out"), patch=kind(tmp_path / "patch"))
    revert_folder(kind(tmp_path / "out"), kind(tmp_path / "back"))
    assert hashes(tmp_path / "back") == hashes(adapter)


def test_a_named_adapter_lies_in_its_subfolder(tmp_path: Path, make_pico_lora: MakeLora, make: Any) -> None:
    _, _, patch = make()
    drift(make_pico_lora(seed=0, adapter_name="mine")).save_pretrained(tmp_path / "named")
    realign_folder(tmp_path / "named" / "mine", tmp_path / "out", patch=patch)
    assert_same_factors(dict(open_adapter(tmp_path / "adapter")), dict(open_adapter(tmp_path / "named" / "mine")))
    with pytest.raises(PeftNLSRError, match=r"no adapter_config\.json.*adapter_name, one of mine"):
        realign_folder(tmp_path / "named", tmp_path / "out2", patch=patch)


# ---- what is written


@pytest.mark.parametrize("edit", ["sum", "sum-exact", "swap"])
def test_the_input_is_byte_for_byte_the_same_afterwards(tmp_path: Path, make: Any, edit: str) -> None:
    _, adapter, patch = make()
    patch.save(tmp_path / "patch")
    before = hashes(tmp_path)
    realign_folder(adapter, tmp_path / "out", patch=tmp_path / "patch", config=EDITS[edit])
    revert_folder(tmp_path / "out", tmp_path / "back")
    after = hashes(tmp_path)
    assert {path: after[path] for path in before} == before


@pytest.mark.parametrize("edit", ["sum", "sum-exact", "swap"])
def test_a_dry_run_writes_nothing_and_reports_the_same(tmp_path: Path, make: Any, edit: str) -> None:
    _, adapter, patch = make()
    before = hashes(tmp_path)
    planned = realign_folder(adapter, None, patch=patch, config=EDITS[edit])
    assert hashes(tmp_path) == before and planned.fingerprint_after is None
    done = realign_folder(adapter, tmp_path / "out", patch=patch, config=EDITS[edit])
    assert planned == replace(done, fingerprint_after=None)
    assert planned.summary() == done.summary()


def test_the_output_holds_adapter_settings_record_and_diff(tmp_path: Path, make: Any) -> None:
    _, adapter, patch = make()
    done = realign_folder(adapter, tmp_path / "out", patch=patch, config=EDITS["paper"])
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {path.name for path in adapter.iterdir()} | {RECORD, DIFF_NAME}
    content = json.loads((tmp_path / "out" / RECORD).read_text())
    assert content == {"config": EDITS["paper"].to_dict(), "record": done.to_dict()}
    assert NLSRConfig.from_pretrained(tmp_path / "out") == EDITS["paper"]
    assert content["record"]["fingerprint_before"] == fingerprint(open_adapter(adapter))
    assert content["record"]["fingerprint_after"] == fingerprint(open_adapter(tmp_path / "out"))
    assert content["record"]["preset"] == "paper, 1 setting changed"
    assert set(load_file(tmp_path / "out" / DIFF_NAME)) == {f"{n}.{f}" for n in done.restored for f in "AB"}
    assert (tmp_path / "out" / "tokenizer.json").read_text() == '{"kept": true}'


def test_only_restored_modules_differ_in_the_file(tmp_path: Path, make: Any) -> None:
    _, adapter, patch = make("modules-to-save")
    done = realign_folder(adapter, tmp_path / "out", patch=patch)
    before, after = load_file(adapter / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert list(before) == list(after)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {f"base_model.model.{n}.lora_{f}.weight" for n in done.restored for f in "AB"}


def test_what_is_not_realigned_is_listed(tmp_path: Path, make: Any) -> None:
    _, adapter, patch = make("modules-to-save")
    done = realign_folder(adapter, None, patch=patch)
    assert [note for note in done.notes if "1 trained parameters outside LoRA" in note and "lm_head" in note]


def test_the_record_names_no_place_of_this_machine(tmp_path: Path, make: Any) -> None:
    _, adapter, patch = make()
    content = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps({**content, "base_model_name_or_path": str(tmp_path)}))
    patch.save(tmp_path / "patch")
    realign_folder(adapter, tmp_path / "out", patch=tmp_path / "patch")
    text = (tmp_path / "out" / RECORD).read_text()
    assert str(tmp_path) not in text and "/tmp" not in text and json.loads(text)["record"]["base_model"] is None


def test_the_base_model_of_the_hub_is_recorded(tmp_path: Path, make: Any) -> None:
    _, adapter, patch = make()
    content = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps({**content, "base_model_name_or_path": "org/base"}))
    assert realign_folder(adapter, None, patch=patch).base_model == "org/base"


# ---- revert


@pytest.mark.parametrize("edit", ["sum", "sum-exact", "sum-exact-all", "swap"])
@pytest.mark.parametrize("lora", LORAS)
def test_revert_gives_the_files_back_byte_for_byte(tmp_path: Path, make: Any, lora: str, edit: str) -> None:
    _, adapter, patch = make(lora)
    realign_folder(adapter, tmp_path / "out", patch=patch, config=EDITS[edit])
    assert (tmp_path / "out" / WEIGHTS).read_bytes() != (adapter / WEIGHTS).read_bytes()
    revert_folder(tmp_path / "out", tmp_path / "back")
    assert hashes(tmp_path / "back") == hashes(adapter)


def test_a_configuration_with_windows_line_ends_comes_back_too(tmp_path: Path, make: Any) -> None:
    _, adapter, patch = make()
    (adapter / CONFIG).write_bytes((adapter / CONFIG).read_bytes().replace(b"\n", b"\r\n"))
    realign_folder(adapter, tmp_path / "out", patch=patch, config=EDITS["sum-exact"])
    revert_folder(tmp_path / "out", tmp_path / "back")
    assert hashes(tmp_path / "back") == hashes(adapter)


def test_revert_works_where_nothing_was_restored(tmp_path: Path, make: Any) -> None:
    _, adapter, patch = make()
    done = realign_folder(adapter, tmp_path / "out", patch=patch, config=NLSRConfig(restore_rate=0.0))
    assert done.restored == () and "0 of 6 modules changed" in done.summary()
    revert_folder(tmp_path / "out", tmp_path / "back")
    assert hashes(tmp_path / "back") == hashes(adapter)


def test_without_a_diff_there_is_no_way_back(tmp_path: Path, make: Any) -> None:
    _, adapter, patch = make()
    realign_folder(adapter, tmp_path / "out", patch=patch, save_diff=False)
    assert not (tmp_path / "out" / DIFF_NAME).exists() and (tmp_path / "out" / RECORD).exists()
    with pytest.raises(PeftNLSRError, match=f"cannot be reverted: it has no {DIFF_NAME}; realign with save_diff"):
        revert_folder(tmp_path / "out", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_an_adapter_that_was_never_realigned_cannot_be_reverted(tmp_path: Path, make: Any) -> None:
    _, adapter, _ = make()
    with pytest.raises(PeftNLSRError, match=f"cannot be reverted: it has no {RECORD}"):
        revert_folder(adapter, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def nudge_weights(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    next(iter(tensors.values())).add_(1e-3)
    save_file(tensors, folder / WEIGHTS)


def nudge_scale(folder: Path) -> None:
    content = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**content, "lora_alpha": 9}))


def nudge_diff(folder: Path) -> None:
    tensors = load_file(folder / DIFF_NAME)
    next(iter(tensors.values())).add_(1e-3)
    save_file(tensors, folder / DIFF_NAME, metadata=dict(TensorFile(folder / DIFF_NAME).metadata))


def shorten_diff(folder: Path) -> None:
    tensors = load_file(folder / DIFF_NAME)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, folder / DIFF_NAME, metadata=dict(TensorFile(folder / DIFF_NAME).metadata))


def unlabel_diff(folder: Path) -> None:
    save_file(load_file(folder / DIFF_NAME), folder / DIFF_NAME)


def truncate_diff(folder: Path) -> None:
    (folder / DIFF_NAME).write_bytes((folder / DIFF_NAME).read_bytes()[:-8])


def poison_diff(folder: Path) -> None:
    tensors = load_file(folder / DIFF_NAME)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, folder / DIFF_NAME, metadata=dict(TensorFile(folder / DIFF_NAME).metadata))


def swap_record(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / RECORD).write_text(text) and None


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        pytest.param(nudge_weights, "not those that were realigned", id="weights-changed"),
        pytest.param(nudge_scale, "not those that were realigned", id="scale-changed"),
        pytest.param(nudge_diff, "does not give back the original", id="diff-changed"),
        pytest.param(shorten_diff, f"{DIFF_NAME} lacks, or should not hold, model", id="diff-lacks-a-tensor"),
        pytest.param(unlabel_diff, f"{DIFF_NAME} does not say what it holds", id="diff-without-labels"),
        pytest.param(truncate_diff, f"{DIFF_NAME}.*truncated", id="diff-truncated"),
        pytest.param(poison_diff, "NaN or infinite", id="diff-holds-nan"),
        pytest.param(swap_record("{"), f"{RECORD} is not JSON", id="record-broken"),
        pytest.param(swap_record("[]"), f"{RECORD} holds a JSON list", id="record-is-a-list"),
        pytest.param(swap_record("{}"), "holds no record", id="record-empty"),
        pytest.param(swap_record('{"record": {"fingerprint_after": "x"}}'), "holds no record", id="record-partial"),
    ],
)
def test_a_folder_that_was_tampered_with_is_not_reverted(
    tmp_path: Path, make: Any, damage: Callable[[Path], None], words: str
) -> None:
    _, adapter, patch = make()
    realign_folder(adapter, tmp_path / "out", patch=patch)
    damage(tmp_path / "out")
    before = hashes(tmp_path)
    with pytest.raises(PeftNLSRError, match=words):
        revert_folder(tmp_path / "out", tmp_path / "back")
    assert hashes(tmp_path) == before and sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "out"]


# ---- a second time


def test_a_realigned_folder_is_refused_until_it_is_reverted(tmp_path: Path, make: Any) -> None:
    _, adapter, patch = make()
    realign_folder(adapter, tmp_path / "out", patch=patch)
    for output in (tmp_path / "again", None):
        with pytest.raises(PeftNLSRError, match="realigned already; write its original with revert_folder"):
            realign_folder(tmp_path / "out", output, patch=patch)
    assert not (tmp_path / "again").exists()
    revert_folder(tmp_path / "out", tmp_path / "back")
    realign_folder(tmp_path / "back", tmp_path / "again", patch=patch)
    assert hashes(tmp_path / "again") == hashes(tmp_path / "out")


def test_a_realigned_folder_that_was_trained_on_is_an_adapter_like_any_other(tmp_path: Path, make: Any) -> None:
    _, adapter, patch = make()
    realign_folder(adapter, tmp_path / "out", patch=patch, config=EDITS["swap"])
    nudge_weights(tmp_path / "out")
    done = realign_folder(tmp_path / "out", tmp_path / "again", patch=patch, config=EDITS["swap"])
    content = json.loads((tmp_path / "again" / RECORD).read_text())
    assert (
        content["record"]["fingerprint_before"]
        == done.fingerprint_before
        == fingerprint(open_adapter(tmp_path / "out"))
    )


def test_a_cut_that_made_new_factors_is_not_repaired_by_entries_again(tmp_path: Path, make: Any) -> None:
    _, adapter, patch = make()
    realign_folder(adapter, tmp_path / "out", patch=patch)
    nudge_weights(tmp_path / "out")
    with pytest.raises(LineageError, match=r"[23] of 6 modules.*realigned before"):
        realign_folder(tmp_path / "out", tmp_path / "again", patch=patch)
    assert not (tmp_path / "again").exists()


# ---- interrupted


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, MemoryError], ids=lambda e: e.__name__)
@pytest.mark.parametrize("place", ["restore", "fingerprint-of-the-output", "record", "diff", "copy", "sync", "rename"])
def test_an_interrupted_realignment_leaves_nothing_behind(
    tmp_path: Path, make: Any, monkeypatch: pytest.MonkeyPatch, place: str, error: type[BaseException]
) -> None:
    _, adapter, patch = make()
    before = hashes(tmp_path)
    interrupt(monkeypatch, place, error)
    with pytest.raises(error):
        realign_folder(adapter, tmp_path / "out", patch=patch)
    monkeypatch.undo()
    assert hashes(tmp_path) == before and [p.name for p in tmp_path.iterdir()] == ["adapter"]
    realign_folder(adapter, tmp_path / "out", patch=patch)


@pytest.mark.parametrize("place", ["fingerprint-of-the-output", "copy", "sync", "rename"])
def test_an_interrupted_revert_leaves_nothing_behind(
    tmp_path: Path, make: Any, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    _, adapter, patch = make()
    realign_folder(adapter, tmp_path / "out", patch=patch)
    before = hashes(tmp_path)
    interrupt(monkeypatch, place, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        revert_folder(tmp_path / "out", tmp_path / "back")
    monkeypatch.undo()
    assert hashes(tmp_path) == before and not (tmp_path / "back").exists()


def interrupt(monkeypatch: pytest.MonkeyPatch, place: str, error: type[BaseException]) -> None:
    """Let the second call at a place fail, where there is one, so that some work has been done."""
    targets: dict[str, tuple[Any, str, int]] = {
        "restore": (folders, "restore", 2),
        "fingerprint-of-the-output": (folders, "fingerprint", 1),
        "record": (folders, "_write_record", 1),
        "diff": (record, "write_tensors", 1),
        "copy": (shutil, "copyfile", 1),
        "sync": (files.os, "fsync", 2),
        "rename": (files.os, "replace", 2),
    }
    where, name, at = targets[place]
    original, calls = getattr(where, name), []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        if len(calls) == at:
            raise error("interrupted by the test")
        return original(*args, **kwargs)

    monkeypatch.setattr(where, name, failing)


def test_a_value_that_does_not_fit_the_stored_type_stops_everything(tmp_path: Path, make_pico_lora: MakeLora) -> None:
    """float16 overflows at 65504: the sum is finite in float32, its cast is not."""
    model = make_pico_lora(seed=0)
    reference = {name: LowRank(u.A * 1e6, u.B * 1e7, u.scale) for name, u in factors_of(model).items()}
    patch = make_patch(reference)
    drift(model).half().save_pretrained(tmp_path / "adapter")
    with pytest.raises(CorruptFileError, match=r"lora_. of model\..*cast to torch.float16,.*NaN or infinite"):
        realign_folder(tmp_path / "adapter", tmp_path / "out", patch=patch, config=EDITS["sum-all"])
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("action", ["revert", "realign"])
def test_a_record_of_a_newer_version_is_refused(tmp_path: Path, make: Any, action: str) -> None:
    _, adapter, patch = make()
    realign_folder(adapter, tmp_path / "out", patch=patch)
    content = json.loads((tmp_path / "out" / RECORD).read_text())
    content["record"]["schema_version"] = 2
    (tmp_path / "out" / RECORD).write_text(json.dumps(content))
    with pytest.raises(CorruptFileError, match=r"found schema_version 2 in the record in .*nlsr_config.json.*upgrade"):
        if action == "revert":
            revert_folder(tmp_path / "out", tmp_path / "back")
        else:
            realign_folder(tmp_path / "out", tmp_path / "back", patch=patch)
    assert not (tmp_path / "back").exists()


def test_a_card_that_is_not_utf8_is_named_before_anything_is_written(tmp_path: Path, make: Any) -> None:
    _, adapter, patch = make()
    (adapter / "README.md").write_bytes("# Für alle".encode("latin-1"))
    before = hashes(tmp_path)
    with pytest.raises(CorruptFileError, match=rf"{adapter / 'README.md'} is not UTF-8 .*save it as UTF-8"):
        realign_folder(adapter, tmp_path / "out", patch=patch)
    assert hashes(tmp_path) == before


def test_the_current_folder_is_an_output_when_it_is_empty(
    tmp_path: Path, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, adapter, patch = make()
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    done = realign_folder(adapter, ".", patch=patch)
    assert fingerprint(open_adapter(".")) == done.fingerprint_after
    assert Path.cwd() == tmp_path / "out" and verify_folder(".").verified
