"""What is published agrees: the weights bit for bit, the record that speaks of them, the card, and no path of here."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_fixtures import Become, downloaded
from local_hub import LocalHub
from peft import PeftModel
from tiny import assert_same_factors, assert_same_state, drift, factors_of, hashes, make_patch, state_of
from transformers import LlamaForCausalLM

from peft_nlsr import (
    NLSRConfig,
    PeftNLSRError,
    SafetyPatch,
    nlsr_realign,
    realign_folder,
    revert_folder,
)
from peft_nlsr.adapter_folder import open_adapter
from peft_nlsr.adapters import CONFIG_FILE
from peft_nlsr.config import CONFIG_NAME
from peft_nlsr.folders import DIFF_NAME
from peft_nlsr.hub import CARD_NAME, PushError, push_folder
from peft_nlsr.publishing import push_realigned
from peft_nlsr.report import REPORT_NAME, SafetyReport

pytest_plugins = ["hub_fixtures"]
pytestmark = pytest.mark.usefixtures("hub_client")  # every test talks to the local Hub, as alice

REPO = "alice/adapter"
WEIGHTS = "adapter_model.safetensors"
BASE = "org/base-model"
MakeLora = Callable[..., PeftModel]


@pytest.fixture
def patch(make_pico_lora: MakeLora) -> SafetyPatch:
    return make_patch(factors_of(make_pico_lora()))


@pytest.fixture
def tuned(make_pico_lora: MakeLora) -> PeftModel:
    return drift(make_pico_lora())


@pytest.fixture
def folder(tuned: PeftModel, patch: SafetyPatch, tmp_path: Path) -> Path:
    """A realigned adapter on disk, with its record and its diff, and the card that PEFT wrote."""
    tuned.save_pretrained(tmp_path / "tuned")
    realign_folder(tmp_path / "tuned", tmp_path / "realigned", patch=patch)
    return tmp_path / "realigned"


def record_of(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / CONFIG_NAME).read_text())["record"]
    return record


def change_weights(folder: Path) -> None:
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (folder / WEIGHTS).write_bytes(content)


def test_a_folder_arrives_bit_for_bit_with_record_and_card(hub: LocalHub, folder: Path, tmp_path: Path) -> None:
    before = hashes(folder)
    push_realigned(folder, REPO, private=True)
    there = downloaded(REPO, tmp_path / "copy")
    assert set(there) == set(before) and hashes(folder) == before
    for name in (WEIGHTS, CONFIG_NAME, CONFIG_FILE):
        assert there[name] == (folder / name).read_bytes(), name
    revert_folder(tmp_path / "copy", tmp_path / "reverted")
    assert (tmp_path / "reverted" / WEIGHTS).read_bytes() == (tmp_path / "tuned" / WEIGHTS).read_bytes()
    card = there[CARD_NAME].decode()
    assert "## Safety realignment" in card and record_of(folder)["fingerprint_after"] in card
    assert hub[REPO].private and len(hub[REPO].commits()) == 2


def test_a_second_push_changes_nothing(hub: LocalHub, folder: Path) -> None:
    first = push_realigned(folder, REPO)
    assert push_realigned(folder, REPO).oid == first.oid and len(hub[REPO].commits()) == 2


def test_a_live_model_arrives_and_loads_again(
    tuned: PeftModel, patch: SafetyPatch, pico_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    nlsr_realign(tuned, patch=patch)
    before = state_of(tuned)
    push_realigned(tuned, REPO)
    assert_same_state(state_of(tuned), before)
    again = PeftModel.from_pretrained(pico_llama, REPO)
    assert_same_factors(factors_of(again), factors_of(tuned))
    assert NLSRConfig.from_pretrained(REPO) == tuned.nlsr_realignment.config
    there = downloaded(REPO, tmp_path / "copy")
    assert set(there) == {WEIGHTS, CONFIG_FILE, CONFIG_NAME, CARD_NAME, DIFF_NAME}
    assert b"library_name: peft" in there[CARD_NAME] and b"## Safety realignment" in there[CARD_NAME]


def test_one_of_several_adapters_of_a_model(make_pico_lora: MakeLora, patch: SafetyPatch, tmp_path: Path) -> None:
    model = drift(make_pico_lora(adapter_name="mine"))
    model.add_adapter("ref", copy.deepcopy(model.peft_config["mine"]))
    nlsr_realign(model, patch=patch, adapter_name="mine")
    push_realigned(model, REPO, adapter_name="mine")
    there = downloaded(REPO, tmp_path / "copy")
    assert set(there) == {CARD_NAME, *(f"mine/{name}" for name in (WEIGHTS, CONFIG_FILE, CONFIG_NAME, DIFF_NAME))}
    assert_same_factors(dict(open_adapter(tmp_path / "copy", adapter_name="mine")), factors_of(model, "mine"))
    assert "adapter `mine`" in there[CARD_NAME].decode()


def test_the_adapter_is_found_by_its_name_where_several_are_active(
    hub: LocalHub, make_pico_lora: MakeLora, patch: SafetyPatch
) -> None:
    model = drift(make_pico_lora(adapter_name="mine"))
    model.add_adapter("ref", copy.deepcopy(model.peft_config["mine"]))
    nlsr_realign(model, patch=patch, adapter_name="mine")
    model.base_model.set_adapter(["mine", "ref"])
    hub.seed(REPO, {CARD_NAME: b"---\nlicense: mit\n---\nMy words.\n"})
    push_realigned(model, REPO, adapter_name="mine")
    assert f"mine/{WEIGHTS}" in hub[REPO].paths() and "My words." in hub[REPO].read(CARD_NAME).decode()


def test_other_adapters_in_a_folder_are_named(hub: LocalHub, folder: Path, tuned: PeftModel, caplog: Any) -> None:
    tuned.save_pretrained(folder / "ref")
    push_realigned(folder, REPO)
    assert f"ref/{WEIGHTS}" in hub[REPO].paths() and "without a check of their weights: ref" in caplog.text


@pytest.mark.parametrize("live", [False, True], ids=["folder", "model"])
def test_an_adapter_without_a_record_is_refused(hub: LocalHub, tuned: PeftModel, tmp_path: Path, live: bool) -> None:
    tuned.save_pretrained(tmp_path / "tuned")
    with pytest.raises(PeftNLSRError, match=r"no record of a realignment.*allow_unaligned"):
        push_realigned(tuned if live else tmp_path / "tuned", REPO)
    assert hub.requests == []


def test_weights_changed_after_their_realignment_are_refused(hub: LocalHub, folder: Path) -> None:
    change_weights(folder)
    with pytest.raises(PeftNLSRError, match=r"of other weights.*changed afterwards"):
        push_realigned(folder, REPO)
    assert hub.requests == []


def test_a_model_trained_on_after_its_realignment_is_refused(
    hub: LocalHub, tuned: PeftModel, patch: SafetyPatch
) -> None:
    with pytest.raises(PeftNLSRError, match="no record of a realignment that fits"):
        push_realigned(drift(nlsr_realign(tuned, patch=patch)), REPO)


def test_a_report_of_other_weights_is_refused(hub: LocalHub, folder: Path) -> None:
    record = {**record_of(folder), "fingerprint_after": "0" * 64}
    SafetyReport(record, NLSRConfig().to_dict(), None, None).save(folder)
    with pytest.raises(PeftNLSRError, match=REPORT_NAME):
        push_realigned(folder, REPO)
    assert hub.requests == []


def test_unaligned_weights_are_pushed_without_a_claim(folder: Path, tmp_path: Path, caplog: Any) -> None:
    push_realigned(folder, REPO)
    downloaded(REPO, tmp_path / "pushed")
    (folder / CARD_NAME).write_bytes((tmp_path / "pushed" / CARD_NAME).read_bytes())
    SafetyReport(record_of(folder), NLSRConfig().to_dict(), None, None).save(folder)
    change_weights(folder)
    push_realigned(folder, "alice/other", allow_unaligned=True)
    there = downloaded("alice/other", tmp_path / "copy")
    assert there[WEIGHTS] == (folder / WEIGHTS).read_bytes()
    assert not {CONFIG_NAME, DIFF_NAME, REPORT_NAME} & set(there)
    assert "realign" not in there[CARD_NAME].decode().lower() and "nlsr" not in there[CARD_NAME].decode()
    assert "without any claim" in caplog.text


def test_what_an_earlier_push_claimed_is_deleted(hub: LocalHub, folder: Path, caplog: Any) -> None:
    SafetyReport(record_of(folder), NLSRConfig().to_dict(), None, None).save(folder)
    (folder / "pareto.png").write_bytes(b"\x89PNG")
    (folder / "pareto.svg").write_bytes(b"<svg/>")
    push_realigned(folder, REPO)
    assert {REPORT_NAME, DIFF_NAME, "pareto.png", "pareto.svg"} <= hub[REPO].paths()
    change_weights(folder)
    push_realigned(folder, REPO, allow_unaligned=True)
    assert hub[REPO].paths() == {WEIGHTS, CONFIG_FILE, CARD_NAME}
    assert "nlsr" not in hub[REPO].read(CARD_NAME).decode()


@pytest.mark.parametrize("live", [False, True], ids=["folder", "model"])
def test_an_authors_own_pictures_are_no_claim(
    hub: LocalHub, tuned: PeftModel, patch: SafetyPatch, folder: Path, live: bool
) -> None:
    mine = {"pareto.png": b"mine", "before_after.svg": b"mine", f"other/{CONFIG_NAME}": b"{}"}
    hub.seed(REPO, mine)
    push_realigned(nlsr_realign(tuned, patch=patch) if live else folder, REPO)
    assert {WEIGHTS, CONFIG_NAME, *mine} <= hub[REPO].paths()


@pytest.mark.parametrize("live", [False, True], ids=["folder", "model"])
def test_the_authors_words_on_the_hub_are_kept(
    hub: LocalHub, tuned: PeftModel, patch: SafetyPatch, folder: Path, live: bool
) -> None:
    hub.seed(REPO, {CARD_NAME: b"---\nlicense: mit\n---\n# Mine\n\nMy words.\n"})
    (folder / CARD_NAME).unlink()
    push_realigned(nlsr_realign(tuned, patch=patch) if live else folder, REPO)
    card = hub[REPO].read(CARD_NAME).decode()
    assert "My words." in card and "license: mit" in card and "## Safety realignment" in card


@pytest.mark.parametrize("claim", [True, False], ids=["realigned", "unaligned"])
@pytest.mark.parametrize("given", [BASE, None])
def test_no_path_of_this_machine_is_published(
    tmp_path: Path, tuned: PeftModel, patch: SafetyPatch, given: str | None, claim: bool, caplog: Any
) -> None:
    here = tmp_path / "models" / "base"
    here.mkdir(parents=True)
    tuned.peft_config["default"].base_model_name_or_path = str(here)
    tuned.base_model.model.config._name_or_path = str(here)
    tuned.save_pretrained(tmp_path / "tuned")
    folder = tmp_path / "tuned"
    if claim:
        folder = tmp_path / "realigned"
        realign_folder(tmp_path / "tuned", folder, patch=patch)
    with open(folder / CARD_NAME, "a") as card:
        card.write(f"\nFine-tuned from [{here}](https://huggingface.co/{here}).\n")
    assert str(here) in (folder / CARD_NAME).read_text() and str(here) in (folder / CONFIG_FILE).read_text()
    push_realigned(folder, REPO, base_model=given, allow_unaligned=not claim)
    there = downloaded(REPO, tmp_path / "copy")
    assert not [name for name, data in there.items() if str(here).encode() in data or str(tmp_path).encode() in data]
    assert json.loads(there[CONFIG_FILE])["base_model_name_or_path"] == given
    assert (f"base_model: {BASE}" in there[CARD_NAME].decode()) is (given is not None)
    assert ("pass base_model" in caplog.text) is (given is None)
    assert there[WEIGHTS] == (folder / WEIGHTS).read_bytes()


def test_a_path_is_no_name_for_the_base_model(hub: LocalHub, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="id of a model on the Hub"):
        push_realigned(folder, REPO, base_model=str(tmp_path))
    assert hub.requests == []


def test_a_base_model_of_the_hub_is_left_as_it_is(hub: LocalHub, tuned: PeftModel, patch: SafetyPatch) -> None:
    tuned.peft_config["default"].base_model_name_or_path = BASE
    hub.seed("org/base-model", {"config.json": b"{}"})
    push_realigned(nlsr_realign(tuned, patch=patch), REPO)
    assert json.loads(hub[REPO].read(CONFIG_FILE))["base_model_name_or_path"] == BASE


@pytest.mark.parametrize("kept", [False, True])
def test_checkpoints_of_earlier_pushes_go_in_the_same_commit(hub: LocalHub, folder: Path, kept: bool) -> None:
    hub.seed(REPO, {f"checkpoint-4/{WEIGHTS}": b"old", f"last-checkpoint/{WEIGHTS}": b"old", "notes.md": b"n"})
    push_realigned(folder, REPO, keep_checkpoints=kept)
    assert len(hub[REPO].commits()) == 3 and "notes.md" in hub[REPO].paths()
    assert any("checkpoint" in path for path in hub[REPO].paths()) is kept


def test_branches_and_pull_requests(hub: LocalHub, folder: Path, hub_client: Become) -> None:
    push_realigned(folder, REPO, revision="v2")
    hub_client("bob")
    assert push_realigned(folder, REPO, create_pr=True, commit_message="safer").pr_revision == "refs/pr/1"
    assert hub[REPO].paths() == set() and hub[REPO].head("refs/pr/1").title == "safer"
    assert hub[REPO].files("refs/pr/1")[WEIGHTS] == hub[REPO].files("v2")[WEIGHTS]


@pytest.mark.parametrize("endpoint", ["info", "upload", "commit"])
def test_a_failed_push_of_a_model_leaves_a_copy_to_push(
    hub: LocalHub, tuned: PeftModel, patch: SafetyPatch, tmp_path: Path, endpoint: str
) -> None:
    nlsr_realign(tuned, patch=patch)
    tuned.peft_config["default"].base_model_name_or_path = str(tmp_path)
    before = state_of(tuned)
    hub.fault(endpoint, status=403)
    with pytest.raises(PushError) as error:
        push_realigned(tuned, REPO)
    assert REPO not in hub.repos or hub[REPO].paths() == set()
    assert_same_state(state_of(tuned), before)
    kept = Path(re.findall(r"/\S*peft-nlsr-push-\w+", str(error.value))[0])
    push_folder(kept, REPO)
    assert_same_factors(dict(open_adapter(REPO)), factors_of(tuned))
    assert b"## Safety realignment" in hub[REPO].read(CARD_NAME)
    assert str(tmp_path).encode() not in hub[REPO].read(CONFIG_FILE)


def test_a_patch_comes_back_from_the_hub(hub: LocalHub, patch: SafetyPatch, folder: Path, tmp_path: Path) -> None:
    patch.push_to_hub("alice/patch", private=True)
    again = SafetyPatch.from_pretrained("alice/patch")
    assert again.record == patch.record and list(again) == list(patch)
    for name in patch:
        assert all(torch.equal(a, b) for a, b in zip(again[name].masks, patch[name].masks, strict=True))
        assert_same_factors({name: again[name].reference}, {name: patch[name].reference})
    assert hub["alice/patch"].private and len(hub["alice/patch"].commits()) == 2
    realign_folder(tmp_path / "tuned", tmp_path / "again", patch="alice/patch")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()


def test_a_patch_that_could_not_be_pushed_is_kept(hub: LocalHub, patch: SafetyPatch) -> None:
    hub.fault("commit", status=500)
    with pytest.raises(PushError) as error:
        patch.push_to_hub("alice/patch")
    kept = re.findall(r"/\S*peft-nlsr-push-\w+", str(error.value))[0]
    assert SafetyPatch.load(kept).record == patch.record
