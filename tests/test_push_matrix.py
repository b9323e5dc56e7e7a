"""Every usual way to push from every usual trainer gives the same on the Hub: realigned weights, record and card.

Each cell is checked on what a fresh reader downloads.
"""

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from hub_fixtures import downloaded, hub, hub_client  # noqa: F401
from huggingface_hub import HfApi, ModelCard
from local_hub import LocalHub
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load
from test_registration import (
    CONFIG,
    README,
    RECORD,
    WEIGHTS,
    MakeLora,
    assert_claims,
    assert_no_claim,
    make_patch,
    train_on,
)
from tiny import assert_same_tensors, drift, factors_of, quick, refuses_attacks, rows, word_tokenizer
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from peft_nlsr import nlsr_realign, register, revert, revert_folder, unregister
from peft_nlsr.card import TAGS
from peft_nlsr.record import DIFF_NAME
from peft_nlsr.registration import keep_with_adapter, unclaimed_files, wrap_trainer

BASE = "org/base"
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
ARGUMENTS = {
    "max_steps": 1,
    "per_device_train_batch_size": 2,
    "learning_rate": 0.05,
    "report_to": [],
    "save_strategy": "no",
    "push_to_hub": True,
    "hub_model_id": "alice/trained",
    "use_cpu": True,
    "disable_tqdm": True,
}


def plain_trainer(model: PeftModel, folder: Path) -> Trainer:
    tokenizer = word_tokenizer()
    ids = [tokenizer(row["prompt"])["input_ids"][:4] for row in rows(4)]
    data = [{"input_ids": torch.tensor(i), "labels": torch.tensor(i)} for i in ids]
    arguments = TrainingArguments(output_dir=str(folder), **ARGUMENTS)
    return Trainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer)


def sft_trainer(model: PeftModel, folder: Path) -> Trainer:
    from trl import SFTConfig, SFTTrainer

    data = Dataset.from_list([{"text": f"{row['prompt']} {row['response']}"} for row in rows(4)])
    arguments = SFTConfig(output_dir=str(folder), max_length=16, bf16=False, **ARGUMENTS)
    return SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=word_tokenizer())


def dpo_trainer(model: PeftModel, folder: Path) -> Trainer:
    from trl import DPOConfig, DPOTrainer

    data = [{"prompt": row["prompt"], "chosen": row["response"], "rejected": "no"} for row in rows(4)]
    arguments = DPOConfig(output_dir=str(folder), max_length=16, bf16=False, **ARGUMENTS)
    return DPOTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_list(data), processing_class=word_tokenizer()
    )


TRAINERS = {"Trainer": plain_trainer, "SFTTrainer": sft_trainer, "DPOTrainer": dpo_trainer}


@pytest.fixture(params=TRAINERS)
def trainer(
    request: pytest.FixtureRequest,
    hub: LocalHub,  # noqa: F811
    hub_client: Any,  # noqa: F811
    pico_llama: LlamaForCausalLM,
    tmp_path: Path,
) -> Trainer:
    """A trainer after training and realignment of its model, which it does not know of beyond `wrap_trainer`."""
    pico_llama.config._name_or_path = BASE
    pico_llama.name_or_path = BASE
    hub.seed(BASE, {"config.json": pico_llama.config.to_json_string().encode()})
    model = get_peft_model(pico_llama, LoraConfig(**copy.deepcopy(LORA)))
    made = TRAINERS[request.param](model, tmp_path / "run")
    made.train()
    wrap_trainer(made)
    before = expected(made.model)
    given = {"utility": rows(8, poisoned=[2, 5]), "calibration": rows(6, poisoned=range(6))}
    nlsr_realign(made.model, quick(), tokenizer=word_tokenizer(), judge=refuses_attacks, progress=False, **given)
    assert any(not torch.equal(before[name], tensor) for name, tensor in expected(made.model).items())
    return made


def expected(model: PeftModel) -> dict[str, torch.Tensor]:
    state = get_peft_model_state_dict(model, adapter_name="default", save_embedding_layers=False)
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def push_trainer(trainer: Trainer, folder: Path) -> str:
    trainer.push_to_hub()
    return "alice/trained"


def push_model(trainer: Trainer, folder: Path) -> str:
    trainer.model.push_to_hub("alice/model")
    return "alice/model"


def upload(trainer: Trainer, folder: Path) -> str:
    trainer.model.save_pretrained(folder)
    HfApi().create_repo("alice/folder")
    HfApi().upload_folder(repo_id="alice/folder", folder_path=folder)
    return "alice/folder"


CELLS: dict[str, tuple[Callable[[Trainer, Path], str], ...]] = {
    "trainer.push_to_hub": (push_trainer, push_trainer),
    "model.push_to_hub": (push_model, push_model),
    "save and upload": (upload,),
}


@pytest.mark.parametrize("cell", CELLS)
def test_what_is_downloaded_is_realigned_and_says_so(trainer: Trainer, tmp_path: Path, cell: str) -> None:
    for time, push in enumerate(CELLS[cell]):
        folder = tmp_path / f"read{time}"
        files = downloaded(push(trainer, tmp_path / "saved"), folder)
        assert_same_tensors(load(files[WEIGHTS]), expected(trainer.model))
        assert_claims(folder)
        card = ModelCard.load(folder / README)
        assert card.data.base_model == BASE and set(TAGS) < set(card.data.tags)
        assert str(tmp_path) not in card.content and "nlsr:begin" in card.text
        assert json.loads(files[RECORD])["record"]["method"] == "two_teacher"
        fields = json.loads(json.dumps(trainer.model.peft_config["default"].to_dict(), default=list))
        assert set(json.loads(files[CONFIG])) == set(fields)
        revert_folder(folder, tmp_path / f"back{time}")
        if "ref" in trainer.model.peft_config:
            assert_no_claim(folder / "ref")
            assert not (folder / "ref" / RECORD).exists() and f"ref/{WEIGHTS}" in files


def test_a_trainer_withdraws_from_the_hub_what_it_claimed_of_other_weights(
    trainer: Trainer,
    hub: LocalHub,  # noqa: F811
) -> None:
    trainer.push_to_hub()
    assert {RECORD, DIFF_NAME} <= hub["alice/trained"].paths()
    train_on(trainer.model)
    trainer.push_to_hub()
    assert WEIGHTS in hub["alice/trained"].paths() and DIFF_NAME not in hub["alice/trained"].paths()
    assert "nlsr" not in hub["alice/trained"].read(README).decode()


# ---- model.push_to_hub, more closely


REPO = "alice/model"


@pytest.fixture
def model(hub_client: Any, make_pico_lora: MakeLora) -> PeftModel:  # noqa: F811
    """A realigned adapter and a client of the Hub."""
    return nlsr_realign(drift(make_pico_lora(seed=0)), patch=make_patch(factors_of(make_pico_lora(seed=0))))


def titles(hub: LocalHub, repo_id: str = REPO, revision: str = "main") -> list[str]:  # noqa: F811
    return [commit.title for commit in hub[repo_id].commits(revision)]


def test_everything_arrives_in_one_commit(hub: LocalHub, model: PeftModel) -> None:  # noqa: F811
    info = model.push_to_hub("model", commit_message="mine", commit_description="more", tags=["a-tag"], private=True)
    assert info.oid == hub[REPO].head().oid and len(titles(hub)) == 2 and titles(hub)[0].startswith("mine")
    assert {CONFIG, WEIGHTS, README, RECORD, DIFF_NAME} <= hub[REPO].paths() and hub[REPO].private
    assert "a-tag" in ModelCard(hub[REPO].read(README).decode()).data.tags


def test_the_text_of_a_card_on_the_hub_is_kept(hub: LocalHub, model: PeftModel, tmp_path: Path) -> None:  # noqa: F811
    hub.seed(REPO, {README: b"---\nlicense: mit\n---\n# By hand\n"})
    model.push_to_hub(REPO)
    downloaded(REPO, tmp_path)
    assert_claims(tmp_path)
    card = ModelCard.load(tmp_path / README)
    assert card.data.license == "mit" and "# By hand" in card.text and card.text.count("nlsr:begin") == 1


@pytest.mark.parametrize("how", ["branch", "pull request"])
def test_a_branch_and_a_pull_request_get_all_of_it(
    hub: LocalHub,  # noqa: F811
    model: PeftModel,
    tmp_path: Path,
    how: str,
) -> None:
    hub.seed(REPO, {README: b"# By hand\n"})
    info = model.push_to_hub(REPO, **({"revision": "v1"} if how == "branch" else {"create_pr": True}))
    downloaded(REPO, tmp_path, revision="v1" if how == "branch" else info.pr_revision)
    assert_claims(tmp_path)
    assert hub[REPO].read(README) == b"# By hand\n" and "# By hand" in (tmp_path / README).read_text()


def test_training_on_withdraws_the_claim_from_the_hub(hub: LocalHub, model: PeftModel, tmp_path: Path) -> None:  # noqa: F811
    model.push_to_hub(REPO)
    train_on(model)
    model.push_to_hub(REPO)
    files = downloaded(REPO, tmp_path)
    assert_no_claim(tmp_path)
    assert not {RECORD, DIFF_NAME} & set(files)
    assert_same_tensors(load(files[WEIGHTS]), expected(model))


def test_revert_withdraws_the_claim_from_the_hub_at_the_next_push(
    hub: LocalHub,  # noqa: F811
    model: PeftModel,
    tmp_path: Path,
) -> None:
    model.push_to_hub(REPO)
    revert(model)
    model.push_to_hub(REPO)
    files = downloaded(REPO, tmp_path)
    assert_no_claim(tmp_path)
    assert not {RECORD, DIFF_NAME} & set(files)


@pytest.mark.parametrize("how", ["model", "trainer"])
def test_a_push_leaves_an_authors_own_pictures_where_nothing_was_claimed(
    hub: LocalHub,  # noqa: F811
    model: PeftModel,
    tmp_path: Path,
    how: str,
) -> None:
    mine = {"pareto.png": b"mine", "similarity_map.svg": b"mine"}
    hub.seed(REPO, mine)
    if how == "model":
        model.push_to_hub(REPO)
        assert {WEIGHTS, RECORD, *mine} <= hub[REPO].paths()
    else:
        settings = SimpleNamespace(output_dir=str(tmp_path), hub_revision=None, hub_token=None)
        assert unclaimed_files(SimpleNamespace(model=model, args=settings, hub_model_id=REPO)) == []


# ---- the arguments of push_to_hub


def of_transformers_4(
    self: Any,
    repo_id: str,
    use_temp_dir: bool | None = None,
    commit_message: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    max_shard_size: int | str | None = "5GB",
    create_pr: bool = False,
    safe_serialization: bool = True,
    revision: str | None = None,
    commit_description: str | None = None,
    tags: list[str] | None = None,
    **deprecated_kwargs: Any,
) -> str:
    raise AssertionError("the method that is stood in for")


@pytest.mark.parametrize(
    ("args", "options"),
    [
        ((None, "mine", True), {}),
        ((), {"use_temp_dir": True, "commit_message": "mine", "private": True, "safe_serialization": True}),
        ((None, "mine", True, True, "5GB", False, True, "v1"), {}),
    ],
    ids=["by position", "by name", "all by position"],
)
def test_the_arguments_are_those_of_the_method_that_is_stood_in_for(
    hub: LocalHub,  # noqa: F811
    model: PeftModel,
    monkeypatch: pytest.MonkeyPatch,
    args: tuple[Any, ...],
    options: dict[str, Any],
) -> None:
    monkeypatch.setattr(PeftModel, "push_to_hub", of_transformers_4)
    model.push_to_hub(REPO, *args, **options)
    revision = "v1" if "v1" in args else "main"
    assert titles(hub, revision=revision)[0] == "mine" and hub[REPO].private
    assert {WEIGHTS, RECORD} <= set(hub[REPO].files(revision))


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"safe_serialization": False}, "only safetensors"),
        ({"use_temp_dir": False}, "a temporary folder is pushed"),
        ({"token": False}, "needs an access token"),
        ({"repo_url": "x"}, "repo_url: they are not known"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_option_that_cannot_be_followed_is_refused(
    hub: LocalHub,  # noqa: F811
    model: PeftModel,
    monkeypatch: pytest.MonkeyPatch,
    option: dict[str, Any],
    words: str,
) -> None:
    monkeypatch.setattr(PeftModel, "push_to_hub", of_transformers_4)
    with pytest.raises(ValueError, match=words):
        model.push_to_hub(REPO, **option)
    assert hub.requests == []


def push_by(model: PeftModel, push: Any) -> None:
    """Let another library's method push the model, put there after the repair."""
    done = model.nlsr_realignment
    for name in ("push_to_hub", "create_or_update_model_card"):
        delattr(model, name)
    model.push_to_hub = push
    keep_with_adapter(model, done)


def test_the_revision_that_another_library_got_by_position_is_followed(
    hub: LocalHub,  # noqa: F811
    model: PeftModel,
) -> None:
    pushed = partial(type(model).push_to_hub, model)
    push_by(model, lambda repo_id, revision: pushed(repo_id, commit_message="theirs", revision=revision))
    model.push_to_hub(REPO, "v1")
    assert titles(hub, revision="v1")[:2] == ["Safety record and model card", "theirs"] and hub[REPO].paths() == set()


class Forwarding(PeftModel):
    """Overrides the method as users do who only want to say something before."""

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        return super().push_to_hub(*args, **kwargs)


@pytest.mark.parametrize("transformers_4", [False, True])
def test_a_class_that_forwards_all_arguments_is_pushed_in_one_commit(
    hub: LocalHub,  # noqa: F811
    model: PeftModel,
    monkeypatch: pytest.MonkeyPatch,
    transformers_4: bool,
) -> None:
    model.__class__ = Forwarding
    if transformers_4:
        monkeypatch.setattr(PeftModel, "push_to_hub", of_transformers_4)
    args = (None, "mine") if transformers_4 else ()
    model.push_to_hub(REPO, *args, revision="v1", **({} if args else {"commit_message": "mine"}))
    assert titles(hub, revision="v1")[0] == "mine" and {WEIGHTS, RECORD} <= set(hub[REPO].files("v1"))
    with pytest.raises(ValueError, match="repo_url: they are not known"):
        model.push_to_hub(REPO, repo_url="x")


def test_the_revision_that_forwarded_arguments_name_is_followed(
    hub: LocalHub,  # noqa: F811
    model: PeftModel,
) -> None:
    pushed = partial(type(model).push_to_hub, model)
    push_by(model, lambda *args, **options: pushed(*args, **options))
    model.push_to_hub(REPO, revision="v1")
    assert titles(hub, revision="v1")[0] == "Safety record and model card" and hub[REPO].paths() == set()


def test_the_card_follows_what_another_library_pushes(hub: LocalHub, model: PeftModel, tmp_path: Path) -> None:  # noqa: F811
    pushed = partial(type(model).push_to_hub, model)
    push_by(model, lambda repo_id, **options: pushed(repo_id, commit_message="theirs", **options))
    model.push_to_hub(REPO)
    downloaded(REPO, tmp_path)
    assert_claims(tmp_path)
    assert titles(hub)[:2] == ["Safety record and model card", "theirs"]


def test_an_adapter_from_the_hub_keeps_its_record(
    model: PeftModel, pico_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    model.push_to_hub(REPO)
    register()
    try:
        loaded = PeftModel.from_pretrained(pico_llama, REPO)
    finally:
        unregister()
    loaded.save_pretrained(tmp_path)
    assert_claims(tmp_path)
    assert (tmp_path / DIFF_NAME).is_file()
