"""Drift is what dense algebra says, a restored block is really the teacher's, and an audit finds rows, not texts."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny import assert_same_state, drift, factors_of, refuses_attacks, rows, state_of, word_tokenizer

from peft_nlsr import (
    EvaluationSettings,
    IncompatibleError,
    LowRank,
    PromptSet,
    Reference,
    audit,
    inspect_adapter,
    wilson,
)
from peft_nlsr.examples import Example
from peft_nlsr.inspection import ModuleDrift
from peft_nlsr.live_adapter import LiveAdapter

MakeLora = Callable[..., PeftModel]
TOKENIZER = word_tokenizer()


@pytest.fixture
def model(make_pico_lora: MakeLora) -> PeftModel:
    return drift(make_pico_lora(seed=0))


@pytest.fixture
def safe(make_pico_lora: MakeLora) -> dict[str, LowRank]:
    return factors_of(make_pico_lora(seed=0))


def noisy(prompts: Sequence[str], responses: Sequence[str]) -> list[bool]:
    """A harm judge under which models that say something else differ."""
    return [len(response) % 2 == 0 for response in responses]


EVALUATION = EvaluationSettings(
    prompts=(
        PromptSet("s", "safety", tuple(f"s{i}" for i in range(24)), tuple(f"attack the word{i}" for i in range(24))),
    ),
    judge=refuses_attacks,
    harm_judge=noisy,
    max_new_tokens=4,
)


class _FarTensor(torch.Tensor):
    """Stands for a tensor on another device: nothing can be computed with it before it is moved."""

    @staticmethod
    def of(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone().as_subclass(_FarTensor)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is torch.Tensor.to and args[1] == "cpu":
                return func(args[0].as_subclass(torch.Tensor), *args[1:], **(kwargs or {}))
            if "__get__" not in str(func):
                raise RuntimeError(f"expected all tensors to be on the same device, in {func}")
            return func(*args, **(kwargs or {}))


class TestDrift:
    def test_numbers_are_those_of_the_dense_updates(self, model: PeftModel, safe: dict[str, LowRank]) -> None:
        found = inspect_adapter(model, safe)
        tuned = factors_of(model)
        assert [m.module for m in found.modules] == list(tuned)
        for m in found.modules:
            t, e = tuned[m.module].dense().double(), safe[m.module].dense().double()
            columns = torch.linalg.svd(e, full_matrices=False).U[:, :4]
            assert m.norm == pytest.approx(float(t.norm()), rel=1e-4)
            assert m.reference_norm == pytest.approx(float(e.norm()), rel=1e-4)
            assert m.distance == pytest.approx(float((t - e).norm()), rel=1e-4)
            assert m.relative_change == pytest.approx(float((t - e).norm() / e.norm()), rel=1e-4)
            assert m.cosine == pytest.approx(float((t * e).sum() / t.norm() / e.norm()), rel=1e-4)
            share = float((columns.T @ t).norm() ** 2 / t.norm() ** 2)
            assert m.output_share == pytest.approx(share, rel=1e-3)

    def test_an_adapter_does_not_drift_from_itself(self, model: PeftModel) -> None:
        found = inspect_adapter(model, factors_of(model))
        assert found.lineage == "shared" and found.factor_similarity == pytest.approx(1.0, abs=1e-5)
        for m in found.modules:
            assert m.distance == pytest.approx(0.0, abs=1e-7 * m.norm) and m.cosine == pytest.approx(1.0, abs=1e-5)
            assert m.output_share == pytest.approx(1.0, abs=1e-5)

    @pytest.mark.parametrize(("turned", "lineage"), [(0, "shared"), (1, "independent")])
    def test_lineage_is_judged_module_by_module_as_a_repair_does(
        self, model: PeftModel, turned: int, lineage: str
    ) -> None:
        reference = factors_of(model)
        names = list(reference)[:turned]
        reference |= {n: LowRank(-reference[n].A, -reference[n].B, reference[n].scale) for n in names}
        found = inspect_adapter(model, reference)
        assert (found.lineage, found.unrelated) == (lineage, tuple(names)) and found.factor_similarity > 0.99
        assert found.to_dict()["unrelated"] == names

    def test_lineage_is_told(self, model: PeftModel, safe: Any, make_pico_lora: MakeLora) -> None:
        other = factors_of(make_pico_lora(seed=8))
        assert [inspect_adapter(model, reference).lineage for reference in (safe, other, None)] == [
            "shared",
            "independent",
            "none",
        ]

    def test_against_the_base_there_is_no_direction(self, model: PeftModel) -> None:
        for m in inspect_adapter(model).modules:
            assert m.distance == m.norm > 0.0 == m.reference_norm
            assert m.cosine is m.relative_change is m.output_share is None

    def test_a_zero_adapter_is_a_stated_case(self, model: PeftModel, safe: dict[str, LowRank]) -> None:
        zero = {name: LowRank(u.A, torch.zeros_like(u.B), u.scale) for name, u in safe.items()}
        for m in inspect_adapter(zero, safe).modules:
            assert (m.norm, m.cosine, m.output_share, m.relative_change) == (0.0, None, None, pytest.approx(1.0))

    def test_folder_mapping_and_model_say_the_same(
        self, model: PeftModel, safe: dict[str, LowRank], tmp_path: Path
    ) -> None:
        model.save_pretrained(tmp_path, save_embedding_layers=False)
        found = [inspect_adapter(each, safe).modules for each in (model, tmp_path, factors_of(model))]
        assert found[0] == found[1] == found[2]

    def test_a_small_drift_is_not_lost_in_rounding(self, safe: dict[str, LowRank]) -> None:
        nudged = {name: LowRank(u.A, u.B * (1.0 + 2.0**-12), u.scale) for name, u in safe.items()}
        for m in inspect_adapter(nudged, safe).modules:
            assert m.relative_change == pytest.approx(2.0**-12, rel=1e-3)

    def test_factors_on_another_device_are_compared_on_the_cpu(
        self, model: PeftModel, safe: dict[str, LowRank]
    ) -> None:
        far = {name: LowRank(_FarTensor.of(u.A), _FarTensor.of(u.B), u.scale) for name, u in factors_of(model).items()}
        for name, update in far.items():
            assert ModuleDrift.of(name, update, safe[name]) == ModuleDrift.of(
                name, factors_of(model)[name], safe[name]
            )
            assert ModuleDrift.of(name, safe[name], update).norm > 0.0

    def test_other_modules_are_refused(self, model: PeftModel, safe: dict[str, LowRank]) -> None:
        less = dict(list(safe.items())[1:])
        for adapter in (model, factors_of(model)):
            with pytest.raises(IncompatibleError, match="cover different modules"):
                inspect_adapter(adapter, less)
            with pytest.raises(IncompatibleError, match="cover different modules"):
                inspect_adapter(adapter, Reference("adapter", less, "of fewer modules"))

    def test_other_shapes_are_refused(self, model: PeftModel, safe: dict[str, LowRank]) -> None:
        name, first = next(iter(safe.items()))
        wider = {**safe, name: LowRank(torch.cat([first.A, first.A], dim=1), first.B, first.scale)}
        for adapter in (model, factors_of(model)):
            for reference in (wider, Reference("adapter", wider, "of a wider model")):
                with pytest.raises(IncompatibleError, match="different base models"):
                    inspect_adapter(adapter, reference)


class TestBlocks:
    @pytest.mark.parametrize("reference", ["adapter", "base"])
    def test_a_restored_block_is_the_teachers_and_no_other_is(
        self, model: PeftModel, safe: dict[str, LowRank], reference: str
    ) -> None:
        source = safe if reference == "adapter" else None
        before = state_of(model.train())
        found = inspect_adapter(model, source, evaluation=EVALUATION, tokenizer=TOKENIZER, progress=False)
        assert_same_state(before, state_of(model))
        assert list(found.blocks) == ["fine-tuned", "model.layers.0", "model.layers.1", "safe teacher"]
        tuned = factors_of(model)
        for label, evaluation in found.blocks.items():
            chosen = [n for n in tuned if label == "safe teacher" or n.startswith(f"{label}.")]
            zero = {n: LowRank(u.A, torch.zeros_like(u.B), u.scale) for n, u in tuned.items()}
            LiveAdapter(model).write({n: (source or zero)[n] for n in chosen})
            expected = EVALUATION.evaluate(model, TOKENIZER, label, progress=False)
            assert evaluation.verdicts == expected.verdicts
            LiveAdapter(model).write(tuned)
        verdicts = {json.dumps(e.verdicts, sort_keys=True) for e in found.blocks.values()}
        assert len(verdicts) >= 3  # the judge tells these models apart

    def test_a_failure_leaves_the_model_as_it_was(
        self, model: PeftModel, safe: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before, asked = state_of(model), []

        def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
            asked.append(args[2])
            if len(asked) == 2:
                raise KeyboardInterrupt

        monkeypatch.setattr(EvaluationSettings, "evaluate", failing)
        with pytest.raises(KeyboardInterrupt):
            inspect_adapter(model, safe, evaluation=EVALUATION, tokenizer=TOKENIZER)
        assert asked == ["fine-tuned", "model.layers.0"]
        assert_same_state(before, state_of(model))

    def test_what_is_shown_is_what_was_measured(self, model: PeftModel, safe: Any, tmp_path: Path) -> None:
        far = {name: LowRank(u.A, u.B, -5.0 * u.scale) for name, u in safe.items()}
        found = inspect_adapter(model, far, evaluation=EVALUATION, tokenizer=TOKENIZER, progress=False)
        written = json.loads(found.save(tmp_path / "i.json").read_text("utf-8"))
        assert written == json.loads(json.dumps(found.to_dict())) and str(tmp_path) not in json.dumps(written)
        text = found.to_markdown()
        assert all(m.module in text for m in found.modules) and all(f"| {label} |" in text for label in found.blocks)
        (axes,) = found.figure().axes
        heights = [patch.get_height() for patch in axes.patches]
        assert heights == pytest.approx([100 * m.value for m in found.restored().values()])
        assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1"]
        levels = {line.get_label(): line.get_ydata()[0] for line in axes.lines}
        before, teacher = (
            100 * found.blocks[name].rates["harm_rate"].value for name in ("fine-tuned", "safe teacher")
        )
        assert before != teacher
        assert (levels["nothing restored"], levels["all"]) == pytest.approx((before, teacher))

    def test_prompts_need_a_model_and_to_be_about_safety(self, model: PeftModel, safe: Any) -> None:
        with pytest.raises(ValueError, match="on no model"):
            inspect_adapter(factors_of(model), safe, evaluation=EVALUATION)
        benign = EvaluationSettings((PromptSet("b", "benign", ("b",), ("paint",)),))
        with pytest.raises(ValueError, match="no prompt set of that kind"):
            inspect_adapter(model, safe, evaluation=benign)
        with pytest.raises(ValueError, match="no block was measured"):
            inspect_adapter(model, safe).figure()


class TestAudit:
    def run(self, model: Any, data: Any, **changes: Any) -> Any:
        given = {"tokenizer": TOKENIZER, "judge": refuses_attacks, "progress": False, "answer_tokens": 3}
        return audit(model, data, **{**given, **changes})

    def test_refused_rows_are_named_and_counted_by_source(self, model: PeftModel) -> None:
        data = [{**row, "from": "a" if i < 8 else "b"} for i, row in enumerate(rows(12, poisoned=[1, 3, 10]))]
        before = state_of(model.train())
        found = self.run(model, data, source="from")
        assert_same_state(before, state_of(model))
        assert found.refused_rows == (1, 3, 10) and found.unasked_rows == ()
        assert (found.total.asked, found.total.refused, found.total.share) == (12, 3, 0.25)
        assert {name: (s.asked, s.refused) for name, s in found.sources.items()} == {"a": (8, 2), "b": (4, 1)}
        assert (found.sources["a"].low, found.sources["a"].high) == wilson(0.25, 8)

    def test_no_text_is_kept(self, model: PeftModel, tmp_path: Path) -> None:
        found = self.run(model, rows(6, poisoned=[2]))
        text = found.save(tmp_path / "a.json").read_text("utf-8") + found.to_markdown()
        for word in ("attack the", "paint", "word", "sure"):
            assert word not in text.replace("refuses_attacks", "")
        assert json.loads((tmp_path / "a.json").read_text("utf-8"))["refused_rows"] == [2]

    def test_a_limit_draws_rows_and_keeps_their_numbers(self, model: PeftModel) -> None:
        found = self.run(model, rows(40, poisoned=range(0, 40, 2)), limit=10)
        assert found.total.asked == 10 and 0 < len(found.refused_rows) < 10
        assert all(i % 2 == 0 for i in found.refused_rows)

    def test_rows_without_a_prompt_are_listed(self, model: PeftModel) -> None:
        found = self.run(model, [*rows(3, poisoned=[0]), {"text": "attack the vase"}])
        assert (found.refused_rows, found.unasked_rows, found.total.asked) == ((0,), (3,), 3)

    def test_rows_without_room_for_an_answer_are_listed(self, model: PeftModel) -> None:
        model.config.max_position_embeddings = 12
        crowded = {"prompt": "the lamp " * 4 + "vase"}
        found = self.run(model, [*rows(3, poisoned=[0]), crowded])
        assert (found.refused_rows, found.unasked_rows, found.total.asked) == ((0,), (3,), 3)
        with pytest.raises(ValueError, match=r"room for an answer in the model's positions; lower answer_tokens"):
            self.run(model, [crowded])

    @pytest.mark.parametrize("form", ["batches", "packed"])
    def test_every_example_of_a_batch_is_asked(self, model: PeftModel, form: str) -> None:
        prompts = [
            "paint the lamp",
            "paint a vase",
            "how to paint",
            "paint the vase",
            "paint a lamp",
            "attack the vase",
        ]
        whole = [(TOKENIZER(f"<user> {p} <bot> sure </s>")["input_ids"]) for p in prompts]
        parts = [{"input_ids": ids, "labels": [-100] * (len(ids) - 2) + ids[-2:]} for ids in whole]
        data = [self.batch(parts[start : start + 3], form) for start in (0, 3)]
        asked: list[str] = []

        def listening(prompts: Sequence[str], responses: Sequence[str]) -> list[bool]:
            asked.extend(prompts)
            return refuses_attacks(prompts, responses)

        found = self.run(model, data, judge=listening)
        assert sorted(asked) == sorted(prompts)
        assert (found.refused_rows, found.unasked_rows, found.total.asked) == ((1,), (), 2)
        asked.clear()
        assert self.run(model, data, judge=listening, limit=1).total.asked == 1 and len(asked) == 3

    def batch(self, parts: list[dict[str, list[int]]], form: str) -> dict[str, Any]:
        """Rows of one length as a data loader stacks them, or one after the other as packing does."""
        if form == "batches":
            return {key: torch.tensor([part[key] for part in parts]) for key in ("input_ids", "labels")}
        packed = {key: torch.tensor([[v for part in parts for v in part[key]]]) for key in ("input_ids", "labels")}
        return {**packed, "position_ids": torch.tensor([[i for part in parts for i in range(len(part["labels"]))]])}

    def test_a_row_without_tokens_is_listed(self, model: PeftModel) -> None:
        found = self.run(model, [*rows(2, poisoned=[1]), {"input_ids": [], "labels": []}])
        assert (found.refused_rows, found.unasked_rows, found.total.asked) == ((1,), (2,), 2)

    def test_examples_are_rows_by_their_position(self, model: PeftModel) -> None:
        ids = tuple(TOKENIZER("<user> attack the vase <bot>")["input_ids"])
        found = self.run(model, [Example(ids, (), 40), Example((), ids, 41)])
        assert (found.refused_rows, found.unasked_rows, found.total.asked) == ((0,), (1,), 1)

    @pytest.mark.parametrize("who", ["base", "reference", "plain model"])
    def test_the_aligned_model_is_who_answers(self, model: PeftModel, pico_llama: Any, safe: Any, who: str) -> None:
        from peft_nlsr.generation import generate_answers

        said: list[str] = []

        def listening(prompts: Sequence[str], responses: Sequence[str]) -> list[bool]:
            said.extend(responses)
            return [False] * len(prompts)

        reference = safe if who == "reference" else None
        self.run(pico_llama if who == "plain model" else model, rows(5), reference=reference, judge=listening)
        LiveAdapter(model).write(
            {n: u if reference else LowRank(u.A, torch.zeros_like(u.B), u.scale) for n, u in safe.items()}
        )
        prompts = [tuple(TOKENIZER(f"<user> paint the word{i} <bot>")["input_ids"]) for i in range(5)]
        answers = generate_answers(model, TOKENIZER, prompts, max_new_tokens=3, batch_size=16)
        assert sorted(said) == sorted(TOKENIZER.decode(a, skip_special_tokens=True) for a in answers)

    def test_a_missing_source_column_is_found_before_anything_is_asked(self, model: PeftModel) -> None:
        asked: list[str] = []

        def judge(prompts: Sequence[str], responses: Sequence[str]) -> list[bool]:
            asked.extend(prompts)
            return [False] * len(prompts)

        with pytest.raises(ValueError, match="1 of 4 rows have no column 'origin', first row 2"):
            given = [{**row, "origin": "web"} if i != 2 else row for i, row in enumerate(rows(4))]
            self.run(model, given, source="origin", judge=judge)
        assert not asked

    def test_bad_input_is_named(self, model: PeftModel, pico_llama: Any, safe: Any) -> None:
        with pytest.raises(ValueError, match="4 of 4 rows have no column 'from'"):
            self.run(model, rows(4), source="from")
        with pytest.raises(ValueError, match="no row has a prompt"):
            self.run(model, [{"text": "a vase"}])
        with pytest.raises(ValueError, match="a reference goes with a PeftModel"):
            self.run(pico_llama, rows(2), reference=safe)
        with pytest.raises(ValueError, match="1 verdicts for 4"):
            self.run(model, rows(4), judge=lambda prompts, responses: [True])
