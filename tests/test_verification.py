"""Verification: what a realigned adapter says is compared with its weights, and each kind of untruth is found."""

import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randomise_lora
from hub_fixtures import hub, hub_client  # noqa: F401
from local_hub import LocalHub
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import drift, factors_of, hashes, make_patch
from transformers import LlamaForCausalLM

from peft_nlsr import NLSRConfig, PeftNLSRError, nlsr_realign, realign_folder, revert_folder
from peft_nlsr.config import CONFIG_NAME
from peft_nlsr.evaluation import Evaluation, Measurement
from peft_nlsr.hub import CARD_NAME
from peft_nlsr.patch import SafetyPatch
from peft_nlsr.publishing import push_realigned
from peft_nlsr.record import DIFF_NAME, Realignment
from peft_nlsr.registration import keep_with_adapter
from peft_nlsr.report import REPORT_NAME, SafetyReport
from peft_nlsr.verification import Verification, verify_folder

MakeLora = Callable[..., PeftModel]
WEIGHTS = "adapter_model.safetensors"
CHECKS = ["weights", "record", "fingerprint", "modules", "diff", "report", "card"]


def patch_for(make_pico_lora: MakeLora) -> SafetyPatch:
    return make_patch(factors_of(make_pico_lora(seed=0)))


def evaluation(label: str, hits: int) -> Evaluation:
    verdicts = {f"p{i}": i < hits for i in range(10)}
    rates = {"harm_rate": Measurement.of_verdicts(list(verdicts.values()))}
    return Evaluation(label, rates, {"harm_rate": verdicts}, (), ("harm: a judge",), {}, 1.0)


def report_of(done: Realignment) -> SafetyReport:
    return SafetyReport(done.to_dict(), done.config.to_dict(), evaluation("before", 8), evaluation("after", 1))


def realigned(make_pico_lora: MakeLora, folder: Path, **settings: object) -> Path:
    """A folder with everything there is to check: record, diff, report and card."""
    config = NLSRConfig(update="sum").replace(**settings)
    model = nlsr_realign(drift(make_pico_lora(seed=0)), config, patch=patch_for(make_pico_lora), progress=False)
    keep_with_adapter(model, model.nlsr_realignment, report_of(model.nlsr_realignment))
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def home(tmp_path: Path, make_pico_lora: MakeLora) -> Path:
    return realigned(make_pico_lora, tmp_path / "out")


def failed(found: Verification) -> list[str]:
    return [check.name for check in found.checks if check.status == "failed"]


def test_what_is_true_is_verified_and_nothing_is_changed(home: Path) -> None:
    before = hashes(home)
    found = verify_folder(home)
    assert [check.name for check in found.checks] == CHECKS and found.verified
    assert {check.status for check in found.checks} == {"passed"} and hashes(home) == before
    written = json.loads(json.dumps(found.to_dict()))
    assert written["verified"] and [check["name"] for check in written["checks"]] == CHECKS


@pytest.mark.parametrize("settings", [{"compress": False}, {"update": "swap"}], ids=["rank-doubled", "swap"])
def test_every_form_of_realignment_is_verified(
    tmp_path: Path, make_pico_lora: MakeLora, settings: dict[str, object]
) -> None:
    assert failed(verify_folder(realigned(make_pico_lora, tmp_path / "out", **settings))) == []


@pytest.mark.parametrize("compress", [True, False])
def test_a_realigned_folder_is_verified_and_its_original_is_not(
    tmp_path: Path, make_pico_lora: MakeLora, compress: bool
) -> None:
    drift(make_pico_lora(seed=0)).save_pretrained(tmp_path / "adapter")
    config = NLSRConfig(compress=compress)
    realign_folder(tmp_path / "adapter", tmp_path / "out", patch=patch_for(make_pico_lora), config=config)
    found = {check.name: check.status for check in verify_folder(tmp_path / "out").checks}
    assert found.pop("report") == "absent" and set(found.values()) == {"passed"}
    revert_folder(tmp_path / "out", tmp_path / "back")
    assert failed(verify_folder(tmp_path / "back")) == ["record", "fingerprint", "modules"]


def test_a_named_adapter_is_verified_in_its_sub_folder(tmp_path: Path, make_pico_lora: MakeLora) -> None:
    model = drift(make_pico_lora(seed=0, adapter_name="mine"))
    nlsr_realign(model, NLSRConfig(update="sum"), patch=patch_for(make_pico_lora), progress=False)
    model.save_pretrained(tmp_path)
    found = verify_folder(tmp_path, adapter_name="mine")
    assert failed(found) == [] and found.checks[-1].status == "passed"


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_weights_saved_in_a_wider_dtype_are_the_same_weights(
    tmp_path: Path, make_pico_lora: MakeLora, dtype: torch.dtype
) -> None:
    drift(make_pico_lora(seed=0)).to(dtype).save_pretrained(tmp_path / "adapter")
    realign_folder(tmp_path / "adapter", tmp_path / "out", patch=patch_for(make_pico_lora), save_diff=False)
    wide = {name: tensor.float() for name, tensor in load_file(tmp_path / "out" / WEIGHTS).items()}
    save_file(wide, tmp_path / "out" / WEIGHTS, metadata={"format": "pt"})
    found = {check.name: check for check in verify_folder(tmp_path / "out").checks}
    assert found["fingerprint"].status == "passed" and "another dtype" in found["fingerprint"].detail


def change_weight(home: Path) -> None:
    tensors = load_file(home / WEIGHTS)
    next(iter(tensors.values()))[0, 0] += 1.0
    save_file(tensors, home / WEIGHTS, metadata={"format": "pt"})


def put_nan(home: Path) -> None:
    tensors = load_file(home / WEIGHTS)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, home / WEIGHTS, metadata={"format": "pt"})


def cut_weights(home: Path) -> None:
    (home / WEIGHTS).write_bytes((home / WEIGHTS).read_bytes()[:-10])


def edit_json(name: str, *keys: str, value: object) -> Callable[[Path], None]:
    def edit(home: Path) -> None:
        content = json.loads((home / name).read_text())
        inner = content
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
        (home / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")

    return edit


def change_diff(home: Path) -> None:
    from safetensors import safe_open

    with safe_open(home / DIFF_NAME, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(home / DIFF_NAME)
    next(iter(tensors.values()))[0, 0] += 1.0
    save_file(tensors, home / DIFF_NAME, metadata=metadata)


def edit_card(old: str, new: str) -> Callable[[Path], None]:
    def edit(home: Path) -> None:
        text = (home / CARD_NAME).read_text()
        assert old in text
        (home / CARD_NAME).write_text(text.replace(old, new))

    return edit


def take_record(home: Path) -> None:
    (home / CONFIG_NAME).unlink()


def write_text(name: str, text: str) -> Callable[[Path], None]:
    return lambda home: (home / name).write_text(text) and None


LIES: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "a-weight-changed": (change_weight, ["fingerprint", "diff", "report", "card"]),
    "a-nan": (put_nan, ["weights", "fingerprint", "diff", "report", "card"]),
    "weights-cut": (cut_weights, ["weights", "fingerprint", "modules", "diff", "report", "card"]),
    "no-record": (take_record, ["record", "fingerprint", "modules", "diff", "report", "card"]),
    "another-preset": (edit_json(CONFIG_NAME, "config", "preset", value="paper"), ["record"]),
    "bad-settings": (edit_json(CONFIG_NAME, "config", "beta", value=-1), ["record"]),
    "no-settings": (edit_json(CONFIG_NAME, "config", value=None), ["record"]),
    "modules-left-out": (edit_json(CONFIG_NAME, "record", "modules", value=[]), ["modules", "card"]),
    "another-original": (
        edit_json(CONFIG_NAME, "record", "fingerprint_before", value="0" * 64),
        ["diff", "report", "card"],
    ),
    "diff-changed": (change_diff, ["diff"]),
    "report-of-others": (edit_json(REPORT_NAME, "record", "fingerprint_after", value="0" * 64), ["report"]),
    "report-no-json": (write_text(REPORT_NAME, "{"), ["diff", "report", "card"]),
    "card-better": (edit_card("| 10.0%", "| 0.0%"), ["card"]),
    "card-tags": (edit_card("- nlsr\n", ""), ["card"]),
    "card-record-of-others": (edit_card("fingerprint: ", "fingerprint: 0"), ["card"]),
}


@pytest.mark.parametrize("lie", LIES)
def test_each_untruth_is_found_and_named(home: Path, lie: str) -> None:
    tell, expected = LIES[lie]
    tell(home)
    found = verify_folder(home)
    assert not found.verified and failed(found) == expected, found
    assert all(check.detail for check in found.checks)


def test_what_authors_write_around_the_section_is_theirs(home: Path) -> None:
    text = (home / CARD_NAME).read_text()
    front, section = text.split("<!-- nlsr:begin -->")
    (home / CARD_NAME).write_text(f"{front}My own words.\n\n<!-- nlsr:begin -->{section}\nMore of mine.\n")
    assert failed(verify_folder(home)) == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere", "not an existing folder"),
        ("/no/where/at/all", "neither an existing folder"),
        (".", "is no adapter"),
    ],
)
def test_no_adapter_at_all_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PeftNLSRError, match=words):
        verify_folder(name)


def test_a_revision_needs_a_hub_id(home: Path) -> None:
    with pytest.raises(ValueError, match="only goes with a Hub id"):
        verify_folder(home, revision="main")


def test_a_pushed_adapter_is_verified_from_the_hub(
    home: Path,
    hub: LocalHub,  # noqa: F811
    hub_client: Callable[[str], None],  # noqa: F811
) -> None:
    push_realigned(home, "alice/adapter", base_model="org/base")
    assert failed(verify_folder("alice/adapter")) == []


def test_a_swapped_report_is_not_taken_for_the_adapters(home: Path, tmp_path: Path, make_pico_lora: MakeLora) -> None:
    other = realigned(make_pico_lora, tmp_path / "other", update="swap")
    shutil.copyfile(other / REPORT_NAME, home / REPORT_NAME)
    assert failed(verify_folder(home)) == ["report", "card"]


WRONG: tuple[object, ...] = (..., None, [], {}, "x", 5)  # ... takes the key away


def inner(folder: Path, part: str) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """A file, all of its content, and the object in it of which a test changes a key."""
    path = folder / (REPORT_NAME if part == "report" else CONFIG_NAME)
    content = json.loads(path.read_text())
    return path, content, content["record" if part == "report" else part]


@pytest.fixture(scope="module")
def realigned_once(tmp_path_factory: pytest.TempPathFactory, _pico_llama_original: LlamaForCausalLM) -> Path:
    def make(seed: int) -> PeftModel:
        config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
        model = get_peft_model(copy.deepcopy(_pico_llama_original), config)
        randomise_lora(model, "default", seed=seed)
        return model

    folder = tmp_path_factory.mktemp("realigned")
    patch = make_patch(factors_of(make(0)))
    model = nlsr_realign(drift(make(0)), NLSRConfig(update="sum"), patch=patch, progress=False)
    keep_with_adapter(model, model.nlsr_realignment, report_of(model.nlsr_realignment))
    model.save_pretrained(folder)
    assert verify_folder(folder).verified
    return folder


KEYS = [
    *(
        ("record", key)
        for key in (
            "schema_version method reason preset base_model adapter_name reference modules data notes versions "
            "fingerprint_before fingerprint_after"
        ).split()
    ),
    *(("config", key) for key in ("schema_version", "preset", "method", "compress")),
    *(("report", key) for key in ("method", "reason", "modules", "data", "notes", "versions", "fingerprint_before")),
]


@pytest.mark.parametrize(("part", "key"), KEYS, ids=lambda word: word)
def test_a_value_of_the_wrong_kind_is_a_failed_check(realigned_once: Path, part: str, key: str) -> None:
    path, content, changed = inner(realigned_once, part)
    original, text = changed[key], path.read_text()
    optional = {"base_model": None, "schema_version": ...}
    try:
        for wrong in WRONG:
            if type(wrong) is type(original) or optional.get(key, 0) is wrong or (part == "config" and wrong is ...):
                continue
            changed[key] = wrong
            if wrong is ...:
                del changed[key]
            path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
            found = verify_folder(realigned_once)
            assert [check.name for check in found.checks] == CHECKS
            assert not found.verified and all(check.detail for check in found.checks), wrong
    finally:
        path.write_text(text)


@pytest.mark.parametrize(
    ("place", "words"),
    [
        (("modules", 0), r"modules\[0\] is 5, expected an object"),
        (("modules", 0, "restored"), r"modules\[0\].restored is 5, expected true or false"),
        (("modules", 0, "truncation_error"), r"modules\[0\].truncation_error is 'x', expected a number"),
        (("versions", "peft_nlsr"), "versions.peft_nlsr is 5, expected text"),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_a_wrong_value_deep_in_a_record_is_a_failed_check(
    home: Path, place: tuple[str | int, ...], words: str
) -> None:
    path, content, changed = inner(home, "record")
    target: Any = changed
    for step in place[:-1]:
        target = target[step]
    target[place[-1]] = "x" if place[-1] == "truncation_error" else 5
    path.write_text(json.dumps(content))
    found = verify_folder(home)
    assert not found.verified
    assert re.search(words, {check.name: check.detail for check in found.checks}["record"])


def test_data_of_the_wrong_kind_in_a_report_is_a_failed_check(home: Path) -> None:
    edit_json(REPORT_NAME, "record", "data", "utility", value=5)(home)
    found = verify_folder(home)
    assert failed(found) == ["card"] and found.checks[-1].detail.startswith("malformed (")


@pytest.mark.parametrize("part", ["config", "record"])
def test_a_folder_of_a_newer_version_is_not_verified(home: Path, part: str) -> None:
    edit_json(CONFIG_NAME, part, "schema_version", value=2)(home)
    record = next(check for check in verify_folder(home).checks if check.name == "record")
    assert record.status == "failed" and "found schema_version 2" in record.detail and "upgrade" in record.detail
