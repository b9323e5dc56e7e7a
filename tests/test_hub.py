"""A push arrives whole, in one commit, or not at all; whatever fails, nothing is lost and the error says what next."""

import os
import re
import uuid
from pathlib import Path
from typing import Any

import pytest
from hub_fixtures import Become, downloaded, run_client, run_process
from huggingface_hub import HfApi, constants
from local_hub import LocalHub

from peft_nlsr.config import CONFIG_NAME, NLSRConfig
from peft_nlsr.errors import PeftNLSRError
from peft_nlsr.hub import PushError, files_to_push, push_folder, staging, stale_checkpoints

pytest_plugins = ["hub_fixtures"]
pytestmark = pytest.mark.usefixtures("hub_client")  # every test talks to the local Hub, as alice

REPO = "alice/adapter"
CARD = b"---\ntags:\n- lora\n---\nText\n"
FILES = {
    "README.md": CARD,
    "adapter_model.safetensors": b"\0weights" * 99,
    "adapter_config.json": b"{}",
    "ref/a.txt": b"a",
}
STALE = {"last-checkpoint/adapter_model.safetensors": b"old", "checkpoint-7/optimizer.pt": b"old", "notes/a.md": b"n"}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder


def read(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "folder", FILES)


def test_a_push_is_one_commit_and_comes_back_bit_for_bit(hub: LocalHub, folder: Path, tmp_path: Path) -> None:
    info = push_folder(folder, REPO, commit_message="first")
    assert downloaded(REPO, tmp_path / "copy") == FILES == read(folder)
    assert [commit.title for commit in hub[REPO].commits()] == ["first", "initial commit"]
    assert info.oid == hub[REPO].head().oid
    assert [path for path, blob in hub[REPO].files().items() if blob.lfs] == ["adapter_model.safetensors"]


def test_files_that_are_there_are_no_change(hub: LocalHub, folder: Path) -> None:
    first = push_folder(folder, REPO)
    assert push_folder(folder, REPO).oid == first.oid
    (folder / "new.txt").write_bytes(b"new")
    push_folder(folder, REPO)
    assert len(hub[REPO].commits()) == 3 and hub.asked("upload") == 1


@pytest.mark.parametrize(
    "path",
    [
        *("_temporary", ".cache/x", ".git/config", "README.md~", "nlsr_config.json.tmp", "sub/_x"),
        *("checkpoint-3/adapter_model.safetensors", "last-checkpoint/a", "global_step5/a", "pytorch_model_fsdp_0/a"),
        *(
            "optimizer.pt",
            "optimizer_0/a",
            "scheduler.pt",
            "rng_state_0.pth",
            "training_args.bin",
            "trainer_state.json",
        ),
        *("adapter_model.bin", "x.pkl"),
    ],
)
def test_what_is_no_part_of_an_adapter_stays_here(
    hub: LocalHub, folder: Path, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    write(folder, {path: b"x", ".eval_results/a.yaml": b"pushed"})
    push_folder(folder, REPO)
    assert hub[REPO].paths() == {*FILES, ".eval_results/a.yaml"}
    assert path.split("/")[0] in caplog.text


def test_a_linked_folder_is_named_and_not_followed(hub: LocalHub, folder: Path, tmp_path: Path, caplog: Any) -> None:
    (folder / "linked").symlink_to(write(tmp_path / "elsewhere", {"a": b"a"}), target_is_directory=True)
    assert files_to_push(folder) == sorted(FILES) and "linked/" in caplog.text


def test_nothing_to_push_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PeftNLSRError, match=r"no files to push .*_x"):
        push_folder(write(tmp_path / "empty", {"_x": b""}), REPO)
    with pytest.raises(PeftNLSRError, match="is no folder"):
        push_folder(tmp_path / "absent", REPO)


def test_privacy_is_set_when_the_repository_is_made(hub: LocalHub, folder: Path, hub_client: Become) -> None:
    push_folder(folder, "alice/secret", private=True)
    push_folder(write(folder, {"more.txt": b"more"}), "alice/secret")
    assert hub["alice/secret"].private and "more.txt" in hub["alice/secret"].paths()
    hub_client("bob")
    with pytest.raises(PushError, match=r"no right.*403"):
        push_folder(folder, "alice/secret")
    assert stale_checkpoints("alice/secret") == ()


def test_a_public_repository_is_never_taken_for_a_private_one(hub: LocalHub, folder: Path) -> None:
    hub.seed(REPO, {"a.txt": b"a"})
    with pytest.raises(PushError, match="is public"):
        push_folder(folder, REPO, private=True)
    assert hub[REPO].paths() == {"a.txt"}


def test_a_missing_branch_is_made_from_main(hub: LocalHub, folder: Path, tmp_path: Path) -> None:
    hub.seed(REPO, {"a.txt": b"a"})
    for _ in range(2):
        push_folder(folder, REPO, revision="v/1")
    assert hub[REPO].branches == ["main", "v/1"] and hub[REPO].paths() == {"a.txt"}
    assert downloaded(REPO, tmp_path / "copy", revision="v/1") == {**FILES, "a.txt": b"a"}


def test_a_pull_request_by_another_user_and_a_second_push_to_it(
    hub: LocalHub, folder: Path, hub_client: Become, tmp_path: Path
) -> None:
    hub.seed(REPO, {"a.txt": b"a"})
    hub_client("bob")
    info = push_folder(folder, REPO, create_pr=True)
    assert (info.pr_num, info.pr_revision) == (1, "refs/pr/1")
    push_folder(write(folder, {"more.txt": b"more"}), REPO, revision="refs/pr/1")
    assert downloaded(REPO, tmp_path / "copy", revision="refs/pr/1") == {**FILES, "a.txt": b"a", "more.txt": b"more"}
    assert hub[REPO].paths() == {"a.txt"} and len(hub[REPO].pulls) == 1
    with pytest.raises(PushError, match="pull request is not"):
        push_folder(folder, REPO, revision="refs/pr/2")
    with pytest.raises(ValueError, match="push to the pull request itself"):
        push_folder(folder, REPO, revision="v1", create_pr=True)


def test_deletions_are_in_the_same_commit(hub: LocalHub, folder: Path) -> None:
    hub.seed(REPO, STALE)
    push_folder(folder, REPO, delete=["last-checkpoint/", "notes/a.md", "absent.txt", "absent/"])
    assert hub[REPO].paths() == {*FILES, "checkpoint-7/optimizer.pt"}
    assert len(hub[REPO].commits()) == 3
    with pytest.raises(ValueError, match=r"ref/a\.txt"):
        push_folder(folder, REPO, delete=["ref/"])


def test_stale_checkpoints_are_found_where_the_push_will_go(hub: LocalHub, folder: Path) -> None:
    assert stale_checkpoints(REPO) == ()
    hub.seed(REPO, STALE)
    hub.seed(REPO, {"checkpoint-9/a": b"a"}, ref="other")
    assert stale_checkpoints(REPO) == ("checkpoint-7/", "last-checkpoint/") == stale_checkpoints(REPO, "not-made-yet")
    assert stale_checkpoints(REPO, "other") == ("checkpoint-7/", "checkpoint-9/", "last-checkpoint/")
    push_folder(folder, REPO, revision="new", delete=stale_checkpoints(REPO, "new"))
    assert hub[REPO].paths("new") == {*FILES, "notes/a.md"}


def test_a_name_without_a_namespace_is_the_users_own(hub: LocalHub, folder: Path) -> None:
    push_folder(folder, "adapter")
    assert hub[REPO].paths() == set(FILES) and stale_checkpoints("adapter") == ()


def test_a_commit_of_somebody_else_in_between_is_not_overwritten(
    hub: LocalHub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = HfApi.create_commit

    def late(*args: Any, **settings: Any) -> Any:
        hub.seed(REPO, {"other.txt": b"other"})
        return commit(*args, **settings)

    monkeypatch.setattr(HfApi, "create_commit", late)
    with pytest.raises(PushError, match=r"in the meantime.*412"):
        push_folder(folder, REPO)
    assert hub[REPO].paths() == {"other.txt"}


WORDS = {401: "log in", 403: "create_pr=True", 409: "conflict", 500: "wait some minutes"}
ENDPOINTS = ["info", "preupload", "batch", "upload", "verify", "commit"]


@pytest.mark.parametrize("status", WORDS)
@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_a_refused_push_loses_nothing_and_can_be_repeated(
    hub: LocalHub, folder: Path, tmp_path: Path, endpoint: str, status: int
) -> None:
    hub.seed(REPO, {"a.txt": b"a"})
    hub.fault(endpoint, status=status, times=6)  # as often as the client tries
    with pytest.raises(PushError, match=WORDS[status]) as error:
        push_folder(folder, REPO)
    assert str(status) in str(error.value) and f"push_folder('{folder}', '{REPO}')" in str(error.value)
    assert hub[REPO].paths() == {"a.txt"} and read(folder) == FILES
    hub.heal()
    push_folder(folder, REPO)
    assert downloaded(REPO, tmp_path / "copy") == {**FILES, "a.txt": b"a"}


@pytest.mark.parametrize("status", [401, 403, 500])
def test_a_repository_that_cannot_be_made_is_named(hub: LocalHub, folder: Path, status: int) -> None:
    hub.fault("create", status=status)
    with pytest.raises(PushError, match=rf"{REPO}.*{status}"):
        push_folder(folder, REPO)
    assert hub.repos == {}


def test_the_way_to_repeat_a_push_keeps_it_private(hub: LocalHub, folder: Path) -> None:
    hub.fault("create", status=500)
    with pytest.raises(PushError) as error:
        push_folder(folder, REPO, private=True, revision="v2")
    call = re.search(r"push_folder\(.*?\)", str(error.value))
    assert call is not None
    eval(call[0], {"push_folder": push_folder})
    assert hub[REPO].private and hub[REPO].paths("v2") == set(FILES)


@pytest.mark.parametrize(("endpoint", "times"), [("create", 1), ("validate", 1), ("upload", 6), ("commit", 1)])
def test_a_connection_that_breaks_while_sending_leaves_no_half_commit(
    hub: LocalHub, folder: Path, endpoint: str, times: int
) -> None:
    hub.fault(endpoint, drop="body", times=times)
    with pytest.raises(PushError, match=r"broke off.*whole or not at all.*is complete"):
        push_folder(folder, REPO)
    assert REPO not in hub.repos or hub[REPO].paths() == set()
    push_folder(folder, REPO)
    assert hub[REPO].paths() == set(FILES)


def test_a_lost_answer_is_no_second_commit(hub: LocalHub, folder: Path) -> None:
    hub.fault("commit", drop="answer")
    with pytest.raises(PushError, match="whole or not at all"):
        push_folder(folder, REPO)
    assert hub[REPO].paths() == set(FILES)
    assert push_folder(folder, REPO).oid == hub[REPO].head().oid and len(hub[REPO].commits()) == 2


def test_offline_mode_is_named_before_anything_is_asked(
    hub: LocalHub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PushError, match="unset HF_HUB_OFFLINE and start again"):
        push_folder(folder, REPO)
    assert hub.requests == []


def test_no_hub_at_all(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LocalHub() as gone:
        monkeypatch.setattr(constants, "ENDPOINT", gone.endpoint)
    with pytest.raises(PushError, match="check the network"):
        push_folder(folder, REPO)


@pytest.mark.parametrize("repo_id", ["a/b/c", "alice/bad name", "alice/-x"])
def test_an_impossible_name_is_refused_here(hub: LocalHub, folder: Path, repo_id: str) -> None:
    with pytest.raises(PushError, match="user/name"):
        push_folder(folder, repo_id)
    assert hub.asked("create") == 0


@pytest.mark.parametrize("user", ["bob", None])
def test_another_user_or_nobody_cannot_push(hub: LocalHub, folder: Path, hub_client: Become, user: str | None) -> None:
    hub.seed(REPO, {"a.txt": b"a"})
    hub_client(user)
    with pytest.raises(PushError, match="403" if user else "401"):
        push_folder(folder, REPO)
    assert hub[REPO].paths() == {"a.txt"}
    push_folder(folder, REPO, token=hub.tokens["alice"])
    assert "README.md" in hub[REPO].paths()


@pytest.mark.parametrize(
    ("card", "found"),
    [
        (b"---\nbase_model: /home/me/base\n---\n", "base_model"),
        (b"---\ntags: [a\n---\n", "flow sequence"),
        (b"---\n- a\n---\n", "dict"),
        (b"---\nlicense: \xff\n---\n", "utf-8"),
    ],
)
def test_a_bad_card_is_found_before_anything_is_made(hub: LocalHub, folder: Path, card: bytes, found: str) -> None:
    write(folder, {"README.md": card})
    with pytest.raises(PushError, match=rf"metadata of README\.md .*{found}"):
        push_folder(folder, REPO)
    assert hub.repos == {} and hub.asked("upload") == 0


def test_a_staging_folder_stays_only_when_a_push_failed() -> None:
    made: list[Path] = []

    def use(error: Exception | None) -> None:
        with staging() as folder:
            made.append(folder)
            if error is not None:
                raise error

    use(None)
    for error in (PeftNLSRError("refused"), OSError("disk full"), PushError("no network")):
        with pytest.raises(type(error)):
            use(error)
    with pytest.raises(PushError) as error:
        use(PushError("no network"))
    assert str(made[-1]) in str(error.value)
    assert [folder.exists() for folder in made] == [False, False, False, True, True]
    for folder in made[-2:]:
        folder.rmdir()


def test_settings_come_back_from_the_hub(hub: LocalHub) -> None:
    config = NLSRConfig(sparsity=0.7, restore_rate=0.25)
    config.push_to_hub(REPO, private=True)
    assert hub[REPO].private and hub[REPO].paths() == {CONFIG_NAME}
    assert NLSRConfig.from_pretrained(REPO) == config
    config.replace(sparsity=0.6).push_to_hub(REPO, revision="v2")
    assert NLSRConfig.from_pretrained(REPO, revision="v2").sparsity == 0.6


def test_settings_keep_a_record_and_never_contradict_it(hub: LocalHub, tmp_path: Path) -> None:
    config = NLSRConfig(sparsity=0.7)
    content = (
        config.save_pretrained(tmp_path).read_text().replace('"config"', '"record": {"method": "sum"},\n"config"')
    )
    hub.seed(REPO, {CONFIG_NAME: content.encode()})
    config.push_to_hub(REPO)
    assert b'"method": "sum"' in hub[REPO].read(CONFIG_NAME)
    for revision in (None, "new"):
        with pytest.raises(PeftNLSRError, match="other settings"):
            config.replace(sparsity=0.6).push_to_hub(REPO, revision=revision)


def push_twice_and_read(name: str, place: str) -> dict[str, Any]:
    """Make a private repository, push, push a change to a branch, read everything back, and delete the repository."""
    here, api = Path(place), HfApi()
    folder = write(here / "folder", FILES)
    first = push_folder(folder, name, private=True)
    repo_id = first.repo_url.repo_id
    try:
        pushed = downloaded(repo_id, here / "main", revision=first.oid)
        again = push_folder(folder, repo_id)
        write(folder, {"more.txt": b"more"})
        push_folder(folder, repo_id, revision="v2")
        branch = downloaded(repo_id, here / "branch", revision="v2")
        private = api.model_info(repo_id).private
    finally:
        api.delete_repo(repo_id)
    return {
        "main": pushed == FILES,
        "again": again.oid == first.oid,
        "branch": branch == {**FILES, "more.txt": b"more"},
        "private": private,
    }


def test_a_fresh_process_pushes_by_xet(tmp_path: Path) -> None:
    with LocalHub(xet=tmp_path / "store") as hub:
        done = run_client(hub, push_twice_and_read, "adapter", str(tmp_path), home=tmp_path / "home")
        assert hub.unknown == [] and hub.asked("xet_write") and not hub.asked("upload")
    assert all(done.values()), done


@pytest.mark.real_hub
@pytest.mark.skipif(
    os.environ.get("PEFT_NLSR_REAL_HUB") != "1" or not os.environ.get("HF_TOKEN"),
    reason="pushes to a real Hub: set PEFT_NLSR_REAL_HUB=1, HF_TOKEN and, for another Hub, HF_ENDPOINT",
)
def test_a_real_hub(tmp_path: Path) -> None:
    variables = {key: os.environ[key] for key in ("HF_TOKEN", "HF_ENDPOINT") if key in os.environ}
    environment = {**variables, "HF_HOME": str(tmp_path / "home")}
    name = f"peft-nlsr-test-{uuid.uuid4().hex[:8]}"
    done = run_process(push_twice_and_read, name, str(tmp_path), home=tmp_path / "home", environment=environment)
    assert all(done.values()), done
