"""Prompts come from files, rows and data sets as they are; what is broken is named by line, and halves stay apart."""

import json
import logging
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from peft_nlsr import (
    CorruptFileError,
    HubPrompts,
    IncompatibleError,
    PeftNLSRError,
    PromptSet,
    builtin_prompt_set,
    builtin_prompts,
    load_prompt_set,
    require_disjoint,
    require_unseen,
)
from peft_nlsr.prompt_sets import PRESETS
from peft_nlsr.prompts import KINDS

USER = {"role": "user", "content": "Why?"}
ANSWER = {"role": "assistant", "content": "because"}
ROWS = [{"prompt": "how?", "response": "so"}, {"prompt": "why?", "response": "because"}]


def write(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


class TestSources:
    @pytest.mark.parametrize(
        "name, text",
        [
            ("a.jsonl", "\n".join(map(json.dumps, ROWS)) + "\n\n"),
            ("a.csv", 'prompt,response\nhow?,so\n"why?",because\n'),
            ("a.csv", "\ufeffprompt,answer\r\nhow?,so\r\nwhy?,because\r\n"),
        ],
    )
    def test_files_give_the_rows(self, tmp_path: Path, name: str, text: str) -> None:
        found = load_prompt_set(write(tmp_path, name, text), kind="task")
        assert (found.prompts, found.answers) == (("how?", "why?"), ("so", "because"))
        assert found.sha256 == load_prompt_set(ROWS, kind="benign").sha256
        assert (found.name, found.ids) == (name, (f"{name}-1", f"{name}-2"))

    def test_a_text_file_gives_its_lines(self, tmp_path: Path) -> None:
        found = load_prompt_set(str(write(tmp_path, "a.txt", "how?\n\n  why?  \n")), kind="safety", name="mine")
        assert (found.name, found.prompts, found.answers) == ("mine", ("how?", "why?"), None)

    def test_rows_are_texts_messages_or_have_ids(self) -> None:
        chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "how?"}]
        found = load_prompt_set(["why?", {"prompt": chat, "id": 7}], kind="benign")
        assert found.prompts == ("why?", tuple(chat))
        assert found.ids == ("rows-1", "7")

    def test_repeated_rows_are_kept_once_and_the_log_says_so(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING):
            found = load_prompt_set(["a", "b", "a", "a"], kind="safety")
        assert found.prompts == ("a", "b")
        assert "2 of 4 rows repeat" in caplog.text

    def test_limit_keeps_the_first(self) -> None:
        assert load_prompt_set(["a", "b", "c"], kind="safety", limit=2).prompts == ("a", "b")

    def test_a_prompt_set_stays_as_it_is(self) -> None:
        found = builtin_prompt_set("safety")
        assert load_prompt_set(found) is found

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_built_in_set_is_the_evaluation_half(self, kind: str) -> None:
        found = builtin_prompt_set(kind)
        assert dict(zip(found.ids, found.prompts, strict=True)) == {
            p.id: p.text for p in builtin_prompts(kind, "evaluation")
        }

    def test_the_hash_is_of_contents_in_order(self) -> None:
        one = load_prompt_set(["a", "b"], kind="safety")
        assert one.sha256 == load_prompt_set(["a", "b"], kind="benign", name="other").sha256
        answered = [{"prompt": p, "response": "x"} for p in "ab"]
        others = (["b", "a"], ["a", "b", "c"], ["a b"], answered)
        assert len({one.sha256, *(load_prompt_set(o, kind="safety").sha256 for o in others)}) == 5
        assert one.to_dict() == {"name": "rows", "kind": "safety", "n": 2, "sha256": one.sha256}


class TestBadInput:
    @pytest.mark.parametrize(
        "name, text, words",
        [
            ("a.jsonl", '{"prompt": "a"}\n{"prompt": \n', r"a\.jsonl.*line 2 is no JSON"),
            (
                "a.jsonl",
                '{"prompt": "a"}\n\n{"question": "b"}\n',
                r"a\.jsonl, line 3: no prompt found \(keys question\)",
            ),
            ("a.jsonl", '{"prompt": " "}\n', r"line 1: no prompt"),
            ("a.jsonl", '"a"\n{"prompt": [{"from": "user", "value": "a"}]}\n', r"a\.jsonl, line 2: no prompt found"),
            ("a.jsonl", '{"prompt": 5}\n', r"a\.jsonl, line 1: no prompt found \(keys prompt\)"),
            ("a.jsonl", '{"prompt": ["a", "b"]}\n', r"a\.jsonl, line 1: .*chat messages with role and content"),
            ("a.jsonl", "7\n", r"line 1: no prompt found \(a int\)"),
            ("a.csv", "prompt,response\na,b\nc\n", r"a\.csv: line 3 has not the 2 columns"),
            ("a.csv", "prompt,response\na,b,c\n", r"line 2 has not the 2 columns"),
            ("a.csv", "question\na\n", r"line 2: no prompt found \(keys question\)"),
        ],
    )
    def test_broken_lines_are_named(self, tmp_path: Path, name: str, text: str, words: str) -> None:
        with pytest.raises(CorruptFileError, match=words):
            load_prompt_set(write(tmp_path, name, text), kind="safety")

    def test_what_is_no_utf8_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_bytes("für".encode("latin-1"))
        with pytest.raises(CorruptFileError, match=r"a\.txt: .*utf-8"):
            load_prompt_set(tmp_path / "a.txt", kind="safety")

    @pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.csv"])
    def test_empty_files_are_an_error(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(ValueError, match=rf"'{name}' holds no prompts"):
            load_prompt_set(write(tmp_path, name, ""), kind="safety")

    def test_a_missing_file_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            load_prompt_set(tmp_path / "a.txt", kind="safety")

    def test_an_unknown_name_lists_the_presets(self) -> None:
        with pytest.raises(ValueError, match=r"'beavertail' is neither a prompt file.*beavertails, harmbench"):
            load_prompt_set("beavertail", kind="safety")

    @pytest.mark.parametrize(
        "given, words",
        [
            ({"kind": "harmless"}, "unknown kind 'harmless'; choose one of safety"),
            ({"prompts": (), "ids": ()}, "holds no prompts"),
            ({"ids": ("a",)}, "one id of its own"),
            ({"ids": ("a", "a")}, "one id of its own"),
            ({"answers": ("x",)}, "one answer or none"),
            ({"kind": "task"}, "has no answers"),
            ({"prompts": ("p", " ")}, r"empty prompt 'b' \(1 in all\)"),
        ],
    )
    def test_sets_are_checked(self, given: dict[str, Any], words: str) -> None:
        sound = {"name": "s", "kind": "safety", "ids": ("a", "b"), "prompts": ("p", "q")}
        with pytest.raises(ValueError, match=words):
            PromptSet(**{**sound, **given})

    def test_answers_are_all_there_or_none(self) -> None:
        with pytest.raises(ValueError, match="1 of 2 rows have no response"):
            load_prompt_set([ROWS[0], "b"], kind="benign")

    def test_a_kind_is_needed(self) -> None:
        with pytest.raises(ValueError, match=r"pass kind=\.\.\., one of safety"):
            load_prompt_set(["a"])


class Data(list[dict[str, Any]]):
    """Rows that look like a data set."""

    @property
    def column_names(self) -> list[str]:
        return list(self[0])


class TestHub:
    @pytest.fixture
    def asked(self, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        calls: list[Any] = []
        rows = [
            {"prompt": f"p{i}", "response": "r", "is_safe": i % 2 == 0, "label": ["safe", "unsafe"][i % 2]}
            for i in range(4)
        ]

        def load_dataset(*names: Any, **settings: Any) -> Data:
            calls.append((*names, settings))
            return Data(rows)

        monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
        return calls

    def test_a_preset_asks_for_its_data_set_and_keeps_its_rows(self, asked: list[Any]) -> None:
        found = load_prompt_set("beavertails")
        assert asked == [("PKU-Alignment/BeaverTails", None, {"split": "30k_test", "revision": None})]
        assert (found.name, found.kind, found.prompts) == ("beavertails", "safety", ("p1", "p3"))
        assert found.answers is None

    def test_a_data_set_of_ones_own_is_described(self, asked: list[Any]) -> None:
        source = HubPrompts("org/name", "task", "test", config="c", answer="response", revision="abc")
        found = load_prompt_set(source, limit=3)
        assert asked == [("org/name", "c", {"split": "test", "revision": "abc"})]
        assert (found.name, found.prompts, found.answers) == ("org/name", ("p0", "p1", "p2"), ("r", "r", "r"))

    def test_a_column_that_is_not_there_is_named(self, asked: list[Any]) -> None:
        with pytest.raises(PeftNLSRError, match=r"org/name \(test\) has no column question; it has prompt, response"):
            load_prompt_set(HubPrompts("org/name", "safety", "test", prompt="question"))

    def test_without_the_package_the_error_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(PeftNLSRError, match=r"pip install 'peft-nlsr\[datasets\]'"):
            load_prompt_set("advbench")

    def test_a_hub_id_with_a_split_is_a_data_set(self, asked: list[Any]) -> None:
        found = load_prompt_set("org/name:test", kind="benign")
        assert asked == [("org/name", None, {"split": "test", "revision": None})]
        assert (found.name, found.kind, found.prompts) == ("org/name", "benign", ("p0", "p1", "p2", "p3"))
        with pytest.raises(ValueError, match=r"'org/name:test': pass kind=\.\.\."):
            load_prompt_set("org/name:test")

    def test_a_data_set_that_cannot_be_had_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def load_dataset(*names: Any, **settings: Any) -> Data:
            raise ConnectionError("no network")

        monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
        with pytest.raises(PeftNLSRError, match=r"walledai/AdvBench \(train\) cannot be loaded: no network.*terms"):
            load_prompt_set("advbench")

    def test_every_preset_has_a_stand_in(self) -> None:
        assert set(STAND_INS) == set(PRESETS)

    @pytest.mark.parametrize("name", PRESETS)
    def test_presets_read_data_sets_of_the_published_form(
        self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """By the real `datasets`, from a local folder whose configurations, splits and columns are the published."""
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
        config, split, rows, kept = STAND_INS[name]
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        card = {"configs": [{"config_name": config, "data_files": [{"split": split, "path": "rows.jsonl"}]}]}
        (tmp_path / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n")
        found = load_prompt_set(replace(PRESETS[name], repo_id=str(tmp_path)), name=name)
        assert (found.kind, found.prompts) == (PRESETS[name].kind, kept)
        unnamed = load_prompt_set(replace(PRESETS[name], repo_id=str(tmp_path)))
        assert unnamed.source is None and str(tmp_path) not in json.dumps(unnamed.to_dict())


# Configuration, split, rows with the published columns, and the prompts that a preset keeps.
XSTEST = [
    {"prompt": "p", "focus": "f", "type": "homonyms", "note": "n", "label": "safe"},
    {"prompt": "q", "focus": "f", "type": "contrast_homonyms", "note": "n", "label": "unsafe"},
]
CATEGORISED = [{"prompt": "p", "category": "c"}, {"prompt": "q", "category": "c"}]
STAND_INS: dict[str, tuple[str, str, list[dict[str, Any]], tuple[str, ...]]] = {
    "beavertails": (
        "default",
        "30k_test",
        [
            {"prompt": "p", "response": "r", "category": {"violence": True, "privacy_violation": False}, "is_safe": s}
            for s in (True, False, False)
        ],
        ("p",),
    ),
    "harmbench": ("standard", "train", CATEGORISED, ("p", "q")),
    "advbench": ("default", "train", [{"prompt": "p", "target": "t"}], ("p",)),
    "strongreject": ("default", "train", CATEGORISED, ("p", "q")),
    "xstest": ("default", "test", XSTEST, ("p",)),
    "xstest-unsafe": ("default", "test", XSTEST, ("q",)),
    "or-bench": ("or-bench-hard-1k", "train", CATEGORISED, ("p", "q")),
    "or-bench-toxic": ("or-bench-toxic", "train", CATEGORISED, ("p", "q")),
}


class TestDisjoint:
    SETS = (load_prompt_set(["How do I paint?", "Why?"], kind="safety", name="mine"),)

    def test_shared_prompts_are_named_by_id_and_never_quoted(self) -> None:
        with pytest.raises(IncompatibleError, match=r"1 of 2 prompts of 'mine'.*\(mine-1\)") as raised:
            require_disjoint(["something", " how do i\n PAINT? "], self.SETS)
        assert "paint" not in str(raised.value).lower()

    def test_chat_messages_count_by_their_text(self) -> None:
        with pytest.raises(IncompatibleError):
            require_disjoint([[{"role": "user", "content": "Why?"}]], self.SETS)

    def test_different_prompts_pass(self) -> None:
        require_disjoint(["How do I paint it?", ""], self.SETS)

    @pytest.mark.parametrize(
        "row",
        [
            "why?",
            {"prompt": "WHY?", "response": "r"},
            {"prompt": [{"role": "user", "content": "Why?"}]},
            {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "Why? "}]},
        ],
        ids=["text", "prompt", "chat-prompt", "messages"],
    )
    def test_rows_of_data_count_by_what_they_ask(self, row: Any) -> None:
        with pytest.raises(IncompatibleError, match=r"\(mine-2\)"):
            require_unseen([row], self.SETS)

    @pytest.mark.parametrize(
        "prompt",
        [
            [{"role": "system", "content": "s"}, USER],
            [USER, ANSWER, {"role": "user", "content": "and how?"}],
            [{"role": "user", "content": "Hello"}, ANSWER, USER],
        ],
        ids=["system-prompt", "first-turn", "last-turn"],
    )
    @pytest.mark.parametrize("answered", [False, True])
    def test_a_conversation_is_found_in_the_data(self, prompt: list[dict[str, str]], answered: bool) -> None:
        chats = load_prompt_set([{"prompt": prompt}], kind="safety", name="chats")
        row = {"messages": [*prompt, ANSWER]} if answered else {"prompt": prompt}
        for found in (row, "why? ", {"messages": [USER, ANSWER]}):
            with pytest.raises(IncompatibleError, match=r"\(chats-1\)"):
                require_unseen([found], [chats])
        others = [{"role": "system", "content": "s"}, {"role": "user", "content": "What?"}, ANSWER]
        assert require_unseen([{"messages": others}, {"messages": [ANSWER]}], [chats]) == 1

    def test_a_conversation_that_was_flattened_is_found(self) -> None:
        chat = [{"role": "system", "content": "s"}, USER]
        chats = load_prompt_set([{"prompt": chat}], kind="safety")
        with pytest.raises(IncompatibleError):
            require_unseen(["s\nWhy?"], [chats])

    def test_rows_without_text_are_counted(self) -> None:
        tokens = [{"input_ids": [1, 2]}, {"prompt_ids": [1]}, {"messages": []}, {"prompt": None}]
        assert require_unseen([*tokens, "another", {"prompt": "one", "response": "Why?"}], self.SETS) == 4

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_built_in_halves_are_disjoint(self, kind: str) -> None:
        calibration = [p.text for k in KINDS for p in builtin_prompts(k, "calibration")]
        require_disjoint(calibration, [builtin_prompt_set(kind)])
        with pytest.raises(IncompatibleError, match="of 'built-in"):
            require_disjoint([builtin_prompts(kind, "evaluation")[0].text], [builtin_prompt_set(kind)])
