"""An adapter read from the Hub is the whole adapter, as its folder was, and nothing that lies beside it."""

from collections.abc import Callable
from pathlib import Path

import pytest
from local_hub import LocalHub
from peft import PeftModel
from tiny import drift, factors_of, hashes, make_patch, word_tokenizer

from peft_nlsr import PeftNLSRError, SafetyPatch, realign_folder, revert_folder, verify_folder
from peft_nlsr.adapter_folder import open_adapter
from peft_nlsr.hub import push_folder

pytest_plugins = ["hub_fixtures"]
pytestmark = pytest.mark.usefixtures("hub_client")  # every test talks to the local Hub, as alice

REPO = "alice/adapter"
MakeLora = Callable[..., PeftModel]


@pytest.fixture
def patch(make_pico_lora: MakeLora) -> SafetyPatch:
    return make_patch(factors_of(make_pico_lora()))


@pytest.fixture
def tuned(make_pico_lora: MakeLora, tmp_path: Path) -> Path:
    """A saved adapter with its tokenizer and a card with words of its author."""
    drift(make_pico_lora()).save_pretrained(tmp_path / "tuned")
    word_tokenizer().save_pretrained(tmp_path / "tuned")
    (tmp_path / "tuned" / "README.md").write_text("---\nlicense: mit\n---\nWords of the author.\n", "utf-8")
    return tmp_path / "tuned"


def test_a_realigned_adapter_is_not_realigned_again(
    hub: LocalHub, tuned: Path, patch: SafetyPatch, tmp_path: Path
) -> None:
    realign_folder(tuned, tmp_path / "realigned", patch=patch)
    push_folder(tmp_path / "realigned", REPO)
    with pytest.raises(PeftNLSRError, match="is realigned already"):
        realign_folder(REPO, tmp_path / "twice", patch=patch)
    assert not (tmp_path / "twice").exists()


def test_what_is_fetched_can_be_verified_and_undone(
    hub: LocalHub, tuned: Path, patch: SafetyPatch, tmp_path: Path
) -> None:
    realign_folder(tuned, tmp_path / "realigned", patch=patch)
    push_folder(tmp_path / "realigned", REPO)
    fetched = open_adapter(REPO)
    assert verify_folder(REPO).verified
    revert_folder(fetched.path, tmp_path / "again")
    assert hashes(tmp_path / "again") == hashes(tuned)


def test_tokenizer_and_card_come_along_as_from_a_folder(
    hub: LocalHub, tuned: Path, patch: SafetyPatch, tmp_path: Path
) -> None:
    push_folder(tuned, REPO)
    for name, source in {"from_folder": str(tuned), "from_hub": REPO}.items():
        realign_folder(source, tmp_path / name, patch=patch)
    found = hashes(tmp_path / "from_hub")
    assert found == hashes(tmp_path / "from_folder")
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= set(found)
    assert "Words of the author." in (tmp_path / "from_hub" / "README.md").read_text("utf-8")


def test_checkpoints_pickles_and_other_adapters_stay_there(hub: LocalHub, tuned: Path) -> None:
    files = {path.name: path.read_bytes() for path in tuned.iterdir()}
    beside = {f"{folder}/{name}": data for folder in ("checkpoint-9", "other") for name, data in files.items()}
    hub.seed(REPO, {**files, **beside, "training_args.bin": b"pickle", "optimizer.pt": b"pickle"})
    hub.seed(REPO, {"adapter_model.bin": b"pickle", "model.safetensors": b"large"})
    assert set(hashes(open_adapter(REPO).path)) == set(files)


def test_a_named_adapter_brings_its_folder_and_the_card_above(hub: LocalHub, tuned: Path) -> None:
    files = {path.name: path.read_bytes() for path in tuned.iterdir()}
    below = {f"safe/{name}": data for name, data in files.items() if name != "README.md"}
    deeper = {f"safe/checkpoint-9/{name}": data for name, data in files.items()}
    oid = hub.seed(REPO, {**files, **below, **deeper}).oid
    hub.seed(REPO, {"safe/tokenizer.json": b"{}"})
    found = open_adapter(REPO, adapter_name="safe", revision=oid)
    assert found.info.adapter_name == "safe" and list(found) == list(open_adapter(tuned))
    assert set(hashes(found.path.parent)) == {*below, "README.md"}
    assert (found.path / "tokenizer.json").read_bytes() == files["tokenizer.json"]
