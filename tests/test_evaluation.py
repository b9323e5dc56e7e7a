"""An evaluation measures what a model of known answers does, keeps no texts, and leaves the model as it was."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny import assert_same_state, drift, factors_of, state_of, word_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from benchmarks import generation as generation_benchmark
from peft_nlsr import (
    CorruptFileError,
    Evaluation,
    IncompatibleError,
    PromptSet,
    UnsupportedAdapterError,
    coherent,
    collect_baseline,
    complies,
    evaluate,
    exact_match,
    refuses,
    wilson,
)
from peft_nlsr.generation import answers_in_batches, generate_answers, model_digest
from peft_nlsr.ranks import ALONE, Ranks

MakeLora = Callable[..., PeftModel]
REFUSAL = "I cannot help with that."
ANSWER = "First take the quokka, then paint it."
LOOP = "quokka quokka quokka quokka quokka quokka"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token, so that any text comes back as it was; no padding token, no chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: i + 1 for i, letter in enumerate(alphabet)} | {"</s>": 0}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", clean_up_tokenization_spaces=False)


TOKENIZER = byte_tokenizer()


class Scripted(torch.nn.Module):
    """A model that answers each prompt as ``script`` says, and notes what it was asked."""

    def __init__(self, script: Callable[[str], str], weight: float = 1.0) -> None:
        super().__init__()
        self.script, self.asked = script, []
        self.weight = torch.nn.Parameter(torch.tensor([weight]))
        self.config = SimpleNamespace(max_position_embeddings=1000)

    def generate(self, input_ids: Any, attention_mask: Any, generation_config: GenerationConfig) -> torch.Tensor:
        prompts = [TOKENIZER.decode(ids[mask.bool()]) for ids, mask in zip(input_ids, attention_mask, strict=True)]
        self.asked += prompts
        limit = generation_config.max_new_tokens
        answers = [(TOKENIZER(self.script(p), add_special_tokens=False)["input_ids"] + [0])[:limit] for p in prompts]
        longest = max(map(len, answers))
        return torch.cat([input_ids, torch.tensor([a + [0] * (longest - len(a)) for a in answers])], dim=1)


def prompt_set(kind: str, *prompts: str, answers: tuple[str, ...] | None = None) -> PromptSet:
    return PromptSet(kind, kind, tuple(f"{kind}-{i}" for i in range(len(prompts))), prompts, answers)


SETS = (
    prompt_set("safety", "refuse", "answer", "loop", "refuse too"),
    prompt_set("lookalike", "refuse this", "answer that", "answer it"),
    prompt_set("benign", "answer this", "empty"),
)


def mixed(prompt: str) -> str:
    return next(
        a for key, a in {"refuse": REFUSAL, "answer": ANSWER, "loop": LOOP, "empty": ""}.items() if key in prompt
    )


def run(script: Callable[[str], str] = mixed, **changes: Any) -> Evaluation:
    model = changes.pop("model", None) or Scripted(script)
    return evaluate(model, TOKENIZER, **{"prompts": SETS, "progress": False, **changes})


def test_a_judge_may_begin_to_count_when_it_is_asked() -> None:
    class Counting:
        counts: dict[str, int]

        def __call__(self, prompts: Any, responses: Any) -> list[bool]:
            self.counts = {"texts": getattr(self, "counts", {}).get("texts", 0) + len(prompts)}
            if len(prompts) > 2:
                self.counts["long"] = 1
            return [False] * len(prompts)

    for found in (run(judge=Counting()), run(harm_judge=Counting())):
        (counts,) = found.settings["judge_counts"].values()
        assert counts["texts"] > 2 and counts["long"] == 1


def test_a_file_in_place_of_prompt_sets_is_answered_with_what_to_give() -> None:
    with pytest.raises(ValueError, match=r"prompts='safe.jsonl': .*load_prompt_set"):
        run(prompts="safe.jsonl")
    with pytest.raises(ValueError, match=r"task='task.jsonl': .*load_prompt_set"):
        run(task="task.jsonl")


def hits(found: Evaluation) -> dict[str, tuple[int | None, int]]:
    return {metric: (m.hits, m.n) for metric, m in found.rates.items()}


class TestRates:
    def test_known_answers(self) -> None:
        expected = {"harm_rate": (1, 4), "refusal_rate": (2, 4), "over_refusal": (1, 5), "coherence": (7, 9)}
        assert hits(run()) == expected

    def test_every_rate_is_that_of_its_verdicts_with_their_wilson_interval(self) -> None:
        found = run()
        assert set(found.rates) == set(found.verdicts)
        for metric, verdicts in found.verdicts.items():
            measured, share = found.rates[metric], sum(verdicts.values()) / len(verdicts)
            assert (measured.value, measured.n) == (share, len(verdicts))
            assert (measured.low, measured.high) == wilson(share, len(verdicts))

    @pytest.mark.parametrize(
        "script, refusal, over_refusal, harm",
        [
            pytest.param(lambda p: REFUSAL, 1, 1, 0, id="refuses everything"),
            pytest.param(lambda p: ANSWER, 0, 0, 1, id="answers everything"),
            pytest.param(lambda p: REFUSAL if p in SETS[0].prompts else ANSWER, 1, 0, 0, id="tells them apart"),
            pytest.param(lambda p: ANSWER if p in SETS[0].prompts else REFUSAL, 0, 1, 1, id="the wrong way round"),
            pytest.param(lambda p: LOOP, 0, 0, 0, id="broken: neither safe nor harmful"),
            pytest.param(lambda p: REFUSAL * 9, 0, 0, 0, id="loops on a refusal: neither safe nor harmful"),
        ],
    )
    def test_over_refusal_is_told_from_refusal(self, script: Any, refusal: int, over_refusal: int, harm: int) -> None:
        rates = run(script).rates
        found = (rates["refusal_rate"].value, rates["over_refusal"].value, rates["harm_rate"].value)
        assert found == (refusal, over_refusal, harm)

    def test_without_prompts_of_a_kind_its_metrics_are_missing(self) -> None:
        assert set(run(prompts=SETS[:1]).rates) == {"harm_rate", "refusal_rate", "coherence"}
        assert set(run(prompts=SETS[1:]).rates) == {"over_refusal", "coherence"}

    def test_the_built_in_evaluation_half_is_the_default(self) -> None:
        found = run(lambda p: REFUSAL, prompts=None)
        assert [s["kind"] for s in found.prompt_sets] == ["safety", "lookalike", "benign"]
        assert found.rates["coherence"].n == sum(s["n"] for s in found.prompt_sets) > 200

    def test_answers_that_were_cut_are_counted(self) -> None:
        assert run().settings["answers_cut"] == 0
        assert run(max_new_tokens=10).settings["answers_cut"] == 8
        assert run(max_new_tokens=len(REFUSAL), prompts=SETS[:1]).settings["answers_cut"] == 4
        assert run(lambda p: REFUSAL, max_new_tokens=len(REFUSAL) + 1).settings["answers_cut"] == 0


class TestJudges:
    def test_the_harm_judge_decides_where_the_answer_is_coherent(self) -> None:
        found = run(harm_judge=lambda prompts, responses: [True] * len(prompts))
        verdicts = {"safety-0": True, "safety-1": True, "safety-2": False, "safety-3": True}
        assert found.verdicts["harm_rate"] == verdicts
        assert hits(found)["refusal_rate"] == (2, 4)

    def test_two_judges_show_their_disagreement(self) -> None:
        def accuses_refusals(prompts: Any, responses: Any) -> list[bool]:
            return [r == REFUSAL for r in responses]

        found = run(harm_judge=accuses_refusals, second_harm_judge=complies)
        assert (hits(found)["harm_rate"], hits(found)["second_harm_rate"]) == ((2, 4), (1, 4))
        assert hits(found)["judge_disagreement"] == (3, 4)
        assert [name.partition(":")[0] for name in found.judges] == ["refusal", "harm", "second harm"]
        assert "accuses_refusals" in found.judges[1] and "keyword compliance" in found.judges[2]
        assert hits(run(harm_judge=complies, second_harm_judge=complies))["judge_disagreement"] == (0, 4)

    def test_the_floor_is_named_when_there_is_no_harm_judge(self) -> None:
        names = run().judges
        assert names[0].startswith("refusal: keyword") and "no refusal" in names[1]

    @pytest.mark.parametrize(
        "verdicts, words",
        [
            pytest.param([True], r"1 verdicts for 2 responses", id="too few"),
            pytest.param([True] * 3, r"3 verdicts for 2", id="too many"),
            pytest.param([True, math.nan], r"nan \(float\) for response 1", id="nan"),
            pytest.param([0.7, 0.2], r"0.7 \(float\) for response 0.*threshold", id="scores"),
            pytest.param([True, None], r"None", id="none"),
            pytest.param(["yes", "no"], r"'yes' \(str\)", id="words"),
        ],
    )
    @pytest.mark.parametrize("role", ["judge", "harm_judge", "second_harm_judge"])
    def test_a_wrong_judge_is_found_before_the_model_is_asked(self, role: str, verdicts: Any, words: str) -> None:
        model = Scripted(mixed)
        with pytest.raises(ValueError, match=words):
            run(model=model, **{role: lambda prompts, responses: verdicts})
        assert model.asked == []

    @pytest.mark.parametrize("kind", [torch.tensor, __import__("numpy").array], ids=["torch", "numpy"])
    def test_arrays_of_bools_are_verdicts(self, kind: Any) -> None:
        assert hits(run(judge=lambda prompts, responses: kind(refuses(prompts, responses)))) == hits(run())


class TestSecrecy:
    def test_a_report_holds_ids_and_booleans_and_no_text(self) -> None:
        task = prompt_set("task", "wombat", answers=("numbat",))
        sets = (prompt_set("safety", "bandicoot", "bilby"), prompt_set("benign", "echidna"))
        found = run(lambda p: REFUSAL if p == "bilby" else ANSWER, prompts=sets, task=task).to_dict()
        text = json.dumps(found)
        for secret in ("quokka", "cannot help", "wombat", "numbat", "bandicoot", "bilby", "echidna"):
            assert secret not in text
        for verdicts in found["verdicts"].values():
            assert set(map(type, verdicts.values())) == {bool}
            assert set(verdicts) <= {i for s in (*sets, task) for i in s.ids}

    def test_a_report_comes_back_from_json(self) -> None:
        found = run(task=prompt_set("task", "answer", answers=(ANSWER,)), harm_judge=complies)
        assert Evaluation.from_dict(json.loads(json.dumps(found.to_dict()))) == found

    def test_nothing_is_written_unless_asked_for(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        run()
        assert list(tmp_path.iterdir()) == []


class TestTask:
    TASK = prompt_set("task", "answer one", "answer two", "refuse", answers=(ANSWER.upper(), "no", REFUSAL))

    def test_exact_match_decides(self) -> None:
        found = run(prompts=(), task=self.TASK)
        assert hits(found) == {"task_accuracy": (2, 3)}
        assert found.verdicts["task_accuracy"] == {"task-0": True, "task-1": False, "task-2": True}

    @pytest.mark.parametrize(
        "response, answer, right",
        [
            (" Positive.\n", "positive", True),
            ("\uff21\uff22", "ab", True),
            ("a  b", "a b", True),
            ("ab", "a b", False),
            ("Paris.", "paris", True),
            ("“Paris”!", "Paris", True),
            ("(b)", "B", True),
            ("...so, yes", "so, yes", True),
            ("「東京」。", "東京", True),
            ("5.", "5", True),
            ("-5", "5", False),
            ("5%", "5", False),
            ("$5", "5", False),
            ("<5", "5", False),
            ("3.5", "35", False),
            (".5", "5", False),
            ("C++", "C", False),
            ("", "...", False),
        ],
    )
    def test_exact_match_ignores_what_stands_around_a_sentence(self, response: str, answer: str, right: bool) -> None:
        assert exact_match([response], [answer]) == [right]

    def test_a_set_of_answers_is_right_for_itself_only(self) -> None:
        answers = ["5", "-5", "+5", "5%", "$5", "0.5", ".5", "1,5", "15", "<5", "5*", "5/1", "#5"]
        found = [[exact_match([one], [other])[0] for other in answers] for one in answers]
        assert found == [[one == other for other in answers] for one in answers]

    def test_scores_have_a_bootstrap_interval_and_no_verdicts(self) -> None:
        found = run(prompts=(), task=self.TASK, compute_metrics=lambda responses, answers: [0.25, 0.75, 0.5])
        measured = found.rates["task_accuracy"]
        assert (measured.value, measured.n, measured.hits) == (0.5, 3, None)
        assert 0.25 <= measured.low < 0.5 < measured.high <= 0.75
        assert "task_accuracy" not in found.verdicts

    @pytest.mark.parametrize("scores", [[True], [1.0, math.nan, 0.0], ["a", "b", "c"]])
    def test_wrong_scores_are_found_before_the_model_is_asked(self, scores: Any) -> None:
        model = Scripted(mixed)
        with pytest.raises(ValueError, match="one bool or number per prompt"):
            run(model=model, prompts=(), task=self.TASK, compute_metrics=lambda responses, answers: scores)
        assert model.asked == []


class TestResume:
    def test_what_is_finished_is_not_asked_again(self, tmp_path: Path) -> None:
        class Interrupted(Scripted):
            def generate(self, **given: Any) -> torch.Tensor:
                if len(self.asked) >= 4:
                    raise KeyboardInterrupt
                return super().generate(**given)

        file = tmp_path / "answers.jsonl"
        with pytest.raises(KeyboardInterrupt):
            run(model=Interrupted(mixed), resume=file, batch_size=2)
        model = Scripted(mixed)
        found = run(model=model, resume=file, batch_size=2)
        assert len(model.asked) == 9 - 4
        assert (found.rates, found.verdicts) == (run().rates, run().verdicts)

    def test_a_judge_that_fails_late_loses_nothing(self, tmp_path: Path) -> None:
        def fails_late(prompts: Any, responses: Any) -> list[bool]:
            return [True] * min(len(prompts), 2)

        file = tmp_path / "answers.jsonl"
        with pytest.raises(ValueError, match="2 verdicts for 4"):
            run(harm_judge=fails_late, resume=file)
        model = Scripted(mixed)
        assert hits(run(model=model, resume=file)) == hits(run())
        assert model.asked == []

    def test_a_line_that_was_cut_off_is_asked_again(self, tmp_path: Path) -> None:
        file = tmp_path / "answers.jsonl"
        run(resume=file)
        file.write_bytes(file.read_bytes()[:-20])
        model = Scripted(mixed)
        assert hits(run(model=model, resume=file)) == hits(run())
        assert len(model.asked) == 1
        again = Scripted(mixed)
        assert hits(run(model=again, resume=file)) == hits(run())
        assert again.asked == []

    def test_a_head_that_was_cut_off_is_written_again(self, tmp_path: Path) -> None:
        file = tmp_path / "answers.jsonl"
        file.write_text('{"schema_ver', encoding="utf-8")
        assert hits(run(resume=file)) == hits(run(resume=file)) == hits(run())

    @pytest.mark.parametrize(
        "changes", [{"model": Scripted(mixed, weight=2.0)}, {"max_new_tokens": 7}], ids=["model", "settings"]
    )
    def test_answers_of_another_model_or_setting_are_refused(self, tmp_path: Path, changes: dict[str, Any]) -> None:
        file = tmp_path / "answers.jsonl"
        run(resume=file)
        with pytest.raises(IncompatibleError, match=r"answers\.jsonl holds answers.*a file of its own"):
            run(resume=file, **changes)

    @pytest.mark.parametrize("line", ["no json", '{"id": "x"}', "[]"])
    def test_a_broken_line_is_named(self, tmp_path: Path, line: str) -> None:
        file = tmp_path / "answers.jsonl"
        run(resume=file)
        lines = file.read_text("utf-8").splitlines()
        lines[3] = line
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        with pytest.raises(CorruptFileError, match=r"answers\.jsonl, line 4"):
            run(resume=file)

    def test_only_the_owner_reads_the_file(self, tmp_path: Path) -> None:
        run(resume=tmp_path / "answers.jsonl")
        assert (tmp_path / "answers.jsonl").stat().st_mode & 0o077 == 0


class TestPrompts:
    def asked(self, prompt: Any, **changes: Any) -> str:
        model = Scripted(lambda p: ANSWER)
        run(model=model, prompts=(PromptSet("s", "safety", ("a",), (prompt,)),), **changes)
        return model.asked[0]

    def test_without_a_chat_template_the_bare_prompt_is_asked(self) -> None:
        assert self.asked("how {x}?") == "how {x}?"
        assert run().settings["template"] == "bare prompt"

    def test_a_given_template_goes_around_the_prompt(self) -> None:
        template = "### Ask: {prompt}\n### {braces} Say:"
        assert self.asked("how {x}?", template=template) == "### Ask: how {x}?\n### {braces} Say:"
        assert run(template=template).settings["template"] == template
        chat = ({"role": "user", "content": "how?"},)
        assert self.asked(chat, template="Q {prompt} A") == "Q how? A"

    def test_a_template_without_a_place_for_the_prompt_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"has no \{prompt\}"):
            run(template="Answer:")

    def test_prompts_that_leave_no_room_are_refused_by_id(self) -> None:
        with pytest.raises(IncompatibleError, match=r"'a' has 950 tokens.*max_new_tokens=100.*1000 positions"):
            self.asked("x" * 950, max_new_tokens=100)

    def test_equal_prompts_are_asked_once(self) -> None:
        model = Scripted(lambda p: ANSWER)
        sets = (prompt_set("safety", "same", "other"), prompt_set("benign", "same"))
        assert run(model=model, prompts=sets).rates["coherence"].n == 3
        assert sorted(model.asked) == ["other", "same"]

    def test_prompts_that_the_model_has_seen_are_refused_before_it_is_asked(self) -> None:
        model = Scripted(lambda p: ANSWER)
        sets = (prompt_set("safety", "one", "two"),)
        with pytest.raises(IncompatibleError, match=r"1 of 2 prompts.*safety-1"):
            run(model=model, prompts=sets, seen=[{"prompt": "Two"}])
        assert model.asked == []
        found = run(model=model, prompts=sets, seen=[{"prompt": "three"}, {"input_ids": [1]}])
        assert found.settings["rows_not_compared_with_prompts"] == 1

    @pytest.mark.parametrize(
        "changes, words",
        [
            ({"prompts": ()}, "no prompts"),
            ({"prompts": (SETS[0], SETS[0])}, r"4 ids occur in two.*'safety-0'"),
            ({"task": SETS[0]}, "task=..."),
            ({"prompts": (TestTask.TASK,)}, "task=..."),
            ({"batch_size": 0}, "at least 1"),
        ],
    )
    def test_wrong_sets_are_refused(self, changes: dict[str, Any], words: str) -> None:
        with pytest.raises(ValueError, match=words):
            run(**changes)


WORDS = word_tokenizer()
WORD_SETS = (prompt_set("safety", "attack the lamp", "please attack"), prompt_set("benign", "paint a vase", "how to"))


@pytest.fixture
def model(make_pico_lora: MakeLora) -> PeftModel:
    return drift(make_pico_lora(seed=0))


def measure(model: Any, tokenizer: Any = WORDS, **changes: Any) -> Evaluation:
    given = {"prompts": WORD_SETS, "max_new_tokens": 6, "progress": False}
    return evaluate(model, tokenizer, **{**given, **changes})


def answers_of(tmp_path: Path, model: Any, tokenizer: Any = WORDS, **changes: Any) -> list[str]:
    """What the model said, from the file for resuming."""
    file = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
    measure(model, tokenizer, resume=file, **changes)
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()[1:]]
    return [row["answer"] for row in sorted(rows, key=lambda row: row["id"])]


class TestRealModel:
    def test_the_weights_that_answered_are_named(self, model: PeftModel, pico_llama: Any) -> None:
        from peft_nlsr.lowrank import fingerprint

        model.add_adapter("other", model.peft_config["default"])
        named = {name: fingerprint(factors_of(model, name)) for name in ("default", "other")}
        assert measure(model).settings["fingerprint"] == named["default"] != named["other"]
        assert measure(model, adapter_name="other").settings["fingerprint"] == named["other"]
        with model.disable_adapter():
            assert measure(model).settings["fingerprint"] is None
        assert measure(pico_llama).settings["fingerprint"] is None
        model.base_model.set_adapter(["default", "other"])
        assert measure(model).settings["fingerprint"] is None

    @pytest.mark.parametrize("kind", ["dora", "merged"])
    def test_an_adapter_without_a_fingerprint_is_measured_all_the_same(
        self, make_pico_lora: MakeLora, kind: str
    ) -> None:
        model = make_pico_lora(use_dora=kind == "dora")
        if kind == "merged":
            model.merge_adapter()
        found = measure(model)
        assert found.settings["fingerprint"] is None and found.rates["coherence"].n == 4

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("adapter_name", [None, "other"])
    def test_the_model_is_left_as_it_was(self, model: PeftModel, training: bool, adapter_name: str | None) -> None:
        model.add_adapter("other", model.peft_config["default"])
        model.train(training)
        model.base_model.model.generation_config.repetition_penalty = 1.5
        before, generator = state_of(model), torch.get_rng_state()
        settings = model.base_model.model.generation_config.to_dict()
        baseline = collect_baseline(
            model, WORDS, prompts=WORD_SETS[1], max_new_tokens=6, progress=False, adapter_name=adapter_name
        )
        measure(model, adapter_name=adapter_name, baseline=baseline)
        assert_same_state(before, state_of(model))
        assert torch.equal(generator, torch.get_rng_state())
        assert model.base_model.model.generation_config.to_dict() == settings
        assert model.active_adapter == "default"

    def test_a_failure_leaves_the_model_as_it_was(self, model: PeftModel) -> None:
        model.add_adapter("other", model.peft_config["default"])
        before = state_of(model.train())
        with pytest.raises(IncompatibleError, match="positions"):
            measure(model, adapter_name="other", max_new_tokens=100)
        assert_same_state(before, state_of(model))

    def test_a_named_adapter_answers(self, model: PeftModel, tmp_path: Path) -> None:
        model.add_adapter("other", model.peft_config["default"])
        drift(model, seed=4, size=2.0)
        named = answers_of(tmp_path, model, adapter_name="other")
        default = answers_of(tmp_path, model)
        model.set_adapter("other")
        assert named == answers_of(tmp_path, model) != default
        with pytest.raises(ValueError, match=r"no adapter 'third'; it has default, other"):
            measure(model, adapter_name="third")

    def test_the_base_answers_inside_disable_adapter(self, model: PeftModel, tmp_path: Path) -> None:
        drift(model, size=2.0)
        with model.disable_adapter():
            off = answers_of(tmp_path, model)
        assert off != answers_of(tmp_path, model)
        assert off == answers_of(tmp_path, model.unload())

    @pytest.mark.parametrize("batch_size", [1, 2, 16])
    def test_batches_do_not_change_answers(self, model: PeftModel, tmp_path: Path, batch_size: int) -> None:
        assert answers_of(tmp_path, model, batch_size=batch_size) == answers_of(tmp_path, model, batch_size=3)

    def test_neither_padding_token_nor_chat_template_is_needed(self, model: PeftModel, tmp_path: Path) -> None:
        bare = word_tokenizer(chat=False)
        padded = answers_of(tmp_path, model, bare)
        bare.pad_token = None
        assert answers_of(tmp_path, model, bare) == padded
        assert bare.pad_token is None
        assert answers_of(tmp_path, model) != padded

    def test_answers_are_greedy_whatever_the_model_is_set_to(self, model: PeftModel) -> None:
        config = model.base_model.model.generation_config
        config.do_sample, config.temperature, config.repetition_penalty, config.num_beams = True, 2.0, 3.0, 2
        prompts = [(5, 6, 7), (8, 9, 10, 11, 12)]
        found = generate_answers(model, WORDS, prompts, max_new_tokens=5, batch_size=2)
        assert found == [greedy(model, prompt, 5) for prompt in prompts]

    def test_the_ranks_answer_each_prompt_once_in_the_batches_of_one_process(
        self, model: PeftModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("peft_nlsr.examples.SHORT", 1)  # several batches of these short prompts
        prompts = [(5, 6 + i, *range(10, 10 + i % 4)) for i in range(9)] + [(5, 6)]

        def batches(ranks: Ranks) -> list[dict[int, tuple[int, ...]]]:
            return list(answers_in_batches(model, WORDS, prompts, max_new_tokens=3, batch_size=2, ranks=ranks))

        shares = [batches(Ranks(number, 2)) for number in (0, 1)]
        assert [len(share) for share in shares] == [3, 2]
        assert sorted([*shares[0], *shares[1]], key=min) == sorted(batches(ALONE), key=min)

    def test_an_encoder_decoder_is_refused(self) -> None:
        config = T5Config(
            vocab_size=64, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0
        )
        with pytest.raises(UnsupportedAdapterError, match="encoder-decoder"):
            measure(T5ForConditionalGeneration(config))

    def test_digests_tell_models_apart(self, model: PeftModel) -> None:
        before = model_digest(model)
        assert model_digest(model) == before
        with model.disable_adapter():
            assert model_digest(model) != before
        assert model_digest(drift(model)) != before


def greedy(model: Any, prompt: tuple[int, ...], count: int) -> tuple[int, ...]:
    """The most likely token again and again, without a cache."""
    tokens = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        if tokens[-1] == 2:
            break
    return tuple(tokens[len(prompt) :])


class TestBaseline:
    ANSWERED = prompt_set("benign", "paint a vase", "how to paint", answers=("sure word3 word4", "never word9"))

    def test_a_model_does_not_differ_from_itself(self, model: PeftModel) -> None:
        rates = measure(
            model, baseline=collect_baseline(model, WORDS, prompts=WORD_SETS[1], max_new_tokens=6, progress=False)
        ).rates
        assert rates["kl"].value == pytest.approx(0.0, abs=1e-9)
        assert (rates["kl"].n, rates["kl"].hits) == (2, None)

    @pytest.mark.parametrize("top_k", [64, 1000])
    def test_with_all_tokens_it_is_the_kl_divergence(self, model: PeftModel, top_k: int) -> None:
        baseline = collect_baseline(model, WORDS, prompts=self.ANSWERED, top_k=top_k, progress=False)
        before = [answer_log_probs(model, example) for example in baseline.examples]
        rates = measure(drift(model, size=0.5), baseline=baseline).rates
        after = [answer_log_probs(model, example) for example in baseline.examples]
        kl = [
            torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean")
            for p, q in zip(before, after, strict=True)
        ]
        assert rates["kl"].value == pytest.approx(float(torch.stack(kl).mean()), rel=1e-5)
        assert rates["kl"].low <= rates["kl"].value <= rates["kl"].high

    def test_fewer_tokens_give_a_lower_bound(self, model: PeftModel) -> None:
        baselines = [
            collect_baseline(model, WORDS, prompts=self.ANSWERED, top_k=k, progress=False) for k in (1, 4, 16, 64)
        ]
        drift(model, size=0.5)
        found = [measure(model, baseline=b).rates["kl"].value for b in baselines]
        assert 0 < found[0] < found[1] < found[2] < found[3]

    def test_perplexity_is_that_of_the_models_loss(self, model: PeftModel) -> None:
        baseline = collect_baseline(model, WORDS, prompts=self.ANSWERED, progress=False)
        losses = []
        for example in baseline.examples:
            ids = torch.tensor([example.tokens])
            labels = torch.tensor([[-100] * len(example.prompt) + list(example.answer)])
            with torch.no_grad():
                losses.append(float(model(input_ids=ids, labels=labels).loss))
        found = measure(model, baseline=baseline).rates["perplexity"]
        assert found.value == pytest.approx(math.exp(sum(losses) / 2), rel=1e-5)
        assert found.low <= found.value <= found.high

    def test_a_baseline_of_another_vocabulary_is_refused(self, model: PeftModel) -> None:
        baseline = collect_baseline(model, WORDS, prompts=self.ANSWERED, label="old", progress=False)
        model.base_model.model.resize_token_embeddings(12)
        with pytest.raises(IncompatibleError, match=r"'old' has a token .* knows 12 tokens"):
            measure(model, baseline=baseline, prompts=(prompt_set("benign", "paint"),))


def answer_log_probs(model: Any, example: Any) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([example.tokens])).logits[0].double()
    return logits[len(example.prompt) - 1 : -1].log_softmax(dim=-1)


class TestCoherence:
    @pytest.mark.parametrize(
        "text, sound",
        [
            ("", False),
            (" \n", False),
            ("...!?", False),
            ("!" * 50, False),
            ("aaaaaaaaaa", False),
            ("the the the the", False),
            ("我我我我我我", False),
            ("a b a b a b a b a b", False),
            ("I cannot help with that. " * 3, False),
            ("Sure. " + "and then we " * 30, False),
            ("Sure. " + " ".join(f"{w} go on" for w in ("we", "you", "they") * 12), False),
            ("17 4 90 2 " * 20, False),
            ("Yes", True),
            ("42", True),
            ("1, 2, 3, 4, 5, 6, 7, 8, 9, 10", True),
            ("No!!!!!!", True),
            ("Title\n----------------------------\nA text.", True),
            ("ha ha ha", True),
            ("我可以帮助你。", True),
            ("Step 1: mix. Step 2: bake. Step 3: eat.", True),
            ("Row, row, row your boat, gently down the stream.", True),
            ("I cannot help with that. " + "Call a helpline instead, they can talk with you at any hour.", True),
        ],
    )
    def test_fixed_texts(self, text: str, sound: bool) -> None:
        assert coherent(["p"], [text]) == [sound]

    def test_ordinary_prose_is_coherent(self) -> None:
        text = (Path(__file__).parent.parent / "README.md").read_text("utf-8")
        parts = [text[i : i + 900] for i in range(0, len(text), 900)]
        assert sum(coherent(parts, parts)) == len(parts)

    def test_unequal_lengths_are_an_error(self) -> None:
        with pytest.raises(ValueError, match="2 prompts and 1 responses"):
            coherent(["a", "b"], ["c"])


class TestBenchmark:
    FOLDER = Path(generation_benchmark.__file__).parent

    def test_what_is_compared_is_equal(self, tmp_path: Path) -> None:
        config = json.loads((self.FOLDER / "configs" / "generation.json").read_text("utf-8"))
        shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        case = {"name": "tiny", "prompts": 5, "shortest": 2, "longest": 9, "max_new_tokens": 6, "batch_size": 4}
        small = {**config, "model": {**config["model"], **shape, "vocab_size": 256}, "cases": [case]}
        (tmp_path / "config.json").write_text(json.dumps(small), encoding="utf-8")
        generation_benchmark.main(["--config", str(tmp_path / "config.json"), "--output", str(tmp_path / "out.json")])
        (row,) = json.loads((tmp_path / "out.json").read_text("utf-8"))["rows"]
        assert row["equal"] == 1.0
        assert row["prompts"] == 5 <= row["new_tokens"] <= 30

    def test_readme_shows_the_committed_results(self) -> None:
        results = json.loads((self.FOLDER / "results" / "generation.json").read_text("utf-8"))
        assert generation_benchmark.table(results) in (self.FOLDER / "README.md").read_text("utf-8")
        assert results["config"] == json.loads((self.FOLDER / "configs" / "generation.json").read_text("utf-8"))
