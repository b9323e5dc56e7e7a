"""A live model: the plan changes nothing, the change is whole, the undo is exact, and the record tells no secrets."""

import copy
import json
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randomise_lora
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import (
    QUICK,
    assert_same_factors,
    assert_same_state,
    assert_same_tensors,
    drift,
    factors_of,
    hashes,
    make_patch,
    quick,
    refuses_attacks,
    rows,
    state_of,
    word_tokenizer,
)
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from peft_nlsr import (
    CalibrationError,
    IncompatibleError,
    LineageError,
    LowRank,
    NLSRConfig,
    PeftNLSRError,
    Realignment,
    apply,
    applying,
    builtin_prompts,
    nlsr_realign,
    plan,
    revert,
    screening,
)
from peft_nlsr.live_adapter import LiveAdapter
from peft_nlsr.nlsr import require_shared_lineage
from peft_nlsr.reference import Lineage

MakeLora = Callable[..., PeftModel]

METHODS: dict[str, tuple[NLSRConfig, tuple[str, ...]]] = {
    "two_teacher": (quick(), ("calibration", "utility")),
    "two_teacher-reference": (quick(), ("calibration", "utility", "reference")),
    "two_teacher-unscreened": (quick(screening=False), ("calibration", "utility")),
    "one_shot": (quick(update="least_squares", least_squares_form="one_shot"), ("calibration", "utility")),
    "sum-patch": (quick(update="sum"), ("patch",)),
    "sum-reference": (quick(update="sum"), ("reference", "calibration")),
    "sum-exact": (quick(update="sum", compress=False), ("patch",)),
    "swap-patch": (quick(update="swap", selection="all"), ("patch",)),
    "paper": (NLSRConfig.from_preset("paper", **QUICK), ("reference", "calibration")),
    "released": (NLSRConfig.from_preset("released", **QUICK), ("reference", "calibration")),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Pico matrices gain nothing from a second thread, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tuned(make_pico_lora: MakeLora) -> PeftModel:
    """An adapter that was trained on from the reference."""
    return drift(make_pico_lora(seed=0))


@pytest.fixture
def inputs(make_pico_lora: MakeLora) -> dict[str, Any]:
    """All that a realignment may be given, in the order of need."""
    reference = factors_of(make_pico_lora(seed=0))
    return {
        "patch": make_patch(reference),
        "reference": reference,
        "calibration": rows(6, poisoned=range(6)),
        "utility": rows(8, poisoned=[2, 5]),
    }


def call(method: str, inputs: dict[str, Any]) -> tuple[NLSRConfig, dict[str, Any]]:
    """Config and keyword arguments of one method."""
    config, needed = METHODS[method]
    given = {name: inputs[name] for name in needed}
    return config, {**given, "tokenizer": word_tokenizer(), "judge": refuses_attacks, "progress": False}


@dataclass(frozen=True)
class Run:
    """One method from plan to apply; every source is a folder below ``folder``, and the base model is a local path."""

    before: dict[str, Any]
    planned_state: dict[str, Any]
    planned: Realignment
    after: dict[str, Any]
    done: Realignment
    factors: tuple[dict[str, LowRank], dict[str, LowRank]]
    folder: Path


RUNS: dict[str, Run] = {}


@pytest.fixture(params=METHODS)
def run(request: pytest.FixtureRequest, tmp_path: Path, tuned: PeftModel, inputs: dict[str, Any]) -> Run:
    """The run of a method, made once for all tests that only look at it."""
    if request.param not in RUNS:
        RUNS[request.param] = make_run(request.param, tmp_path / "private", tuned, inputs)
    return RUNS[request.param]


def make_run(method: str, folder: Path, model: PeftModel, inputs: dict[str, Any]) -> Run:
    config, given = call(method, inputs)
    if "patch" in given:
        given["patch"].save(folder / "patch")
        given["patch"] = str(folder / "patch")
    if "reference" in given:
        with_factors(model, inputs["reference"]).save_pretrained(folder / "reference")
        given["reference"] = str(folder / "reference")
    model.peft_config["default"].base_model_name_or_path = str(folder)
    model.train()
    next(p for n, p in model.named_parameters() if "lora_A" in n).requires_grad_(False)
    before, factors = state_of(model), factors_of(model)
    planned = plan(model, config, **given)
    planned_state = state_of(model)
    done = apply(model, planned)
    return Run(before, planned_state, planned, state_of(model), done, (factors, factors_of(model)), folder)


def with_factors(model: PeftModel, factors: dict[str, LowRank]) -> PeftModel:
    """A copy of the model with these factors."""
    other = copy.deepcopy(model)
    LiveAdapter(other).write(factors)
    return other


def test_plan_leaves_everything_as_it_was(run: Run) -> None:
    assert_same_state(run.before, run.planned_state)
    assert run.planned.fingerprint_after is None and set(run.planned.updates) == set(run.planned.restored) != set()


def test_apply_changes_the_factors_of_the_restored_modules_and_nothing_else(run: Run) -> None:
    before, after = run.factors
    changed = {name for name in before if not torch.equal(before[name].dense(), after[name].dense())}
    assert changed == set(run.done.restored) != set()
    assert_same_tensors(*({n: t for n, t in s["values"].items() if "lora_" not in n} for s in (run.before, run.after)))
    for part in ("flags", "modes", "active", "hooks"):
        assert run.after[part] == run.before[part], part
    assert run.done.fingerprint_before == run.planned.fingerprint_before != run.done.fingerprint_after


def test_the_record_is_strict_json_without_paths_or_texts(run: Run) -> None:
    record = run.done.to_dict()
    text = json.dumps(record, allow_nan=False)
    assert json.loads(text) == record and run.done.base_model is None
    for secret in (str(run.folder), "private", "/tmp", str(Path.home()), "attack", "paint", "word3", "sure"):
        assert secret not in text + run.done.summary(), secret


def test_nlsr_realign_is_plan_and_apply_on_the_same_object(tuned: PeftModel, inputs: dict[str, Any]) -> None:
    config, given = call("two_teacher", inputs)
    other = copy.deepcopy(tuned)
    assert nlsr_realign(tuned, config, **given) is tuned
    apply(other, plan(other, config, **given))
    assert_same_factors(factors_of(tuned), factors_of(other))
    assert isinstance(tuned.nlsr_realignment, Realignment)
    assert tuned.nlsr_realignment.restored == tuple(factors_of(tuned))
    assert revert(tuned) is tuned and not hasattr(tuned, "nlsr_realignment")


def test_the_record_says_what_happened_to_each_module(tuned: PeftModel, inputs: dict[str, Any]) -> None:
    config, given = call("sum-patch", inputs)
    before = factors_of(tuned)
    done = nlsr_realign(tuned, config, **given).nlsr_realignment
    after = factors_of(tuned)
    for module in done.modules:
        difference = (after[module.module].dense() - before[module.module].dense()).norm()
        assert module.relative_change == pytest.approx(
            float(difference / before[module.module].dense().norm()), abs=1e-5
        )
        assert module.restored == (module.relative_change > 0) and -1.0 <= module.similarity <= 1.0
    assert len(done.restored) == round(config.restore_rate * len(before))
    lines = done.summary().splitlines()
    assert lines[0].startswith("sum (") and f"{len(done.restored)} of {len(before)} modules" in lines[2]


def test_a_zero_update_has_no_relative_change_and_stays_json(make_pico_lora: MakeLora, inputs: dict[str, Any]) -> None:
    model = make_pico_lora(seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    done = nlsr_realign(model, quick(update="swap", selection="all"), patch=inputs["patch"]).nlsr_realignment
    assert [m.relative_change for m in done.modules] == [None] * len(done.modules)
    json.dumps(done.to_dict(), allow_nan=False)
    assert "6 of 6 modules" in done.summary()


# ---- apply and revert


def test_apply_refuses_a_model_that_changed_since_the_plan(tuned: PeftModel, inputs: dict[str, Any]) -> None:
    config, given = call("sum-patch", inputs)
    planned = plan(tuned, config, **given)
    drift(tuned, size=1e-4)
    before = state_of(tuned)
    with pytest.raises(IncompatibleError, match=r"not the one this realignment was planned for.*plan again"):
        apply(tuned, planned)
    assert_same_state(before, state_of(tuned))


def test_apply_refuses_a_dry_run_on_files(tmp_path: Path, tuned: PeftModel, inputs: dict[str, Any]) -> None:
    from peft_nlsr import realign_folder

    tuned.save_pretrained(tmp_path / "adapter")
    planned = realign_folder(tmp_path / "adapter", None, patch=inputs["patch"])
    before = state_of(tuned)
    with pytest.raises(IncompatibleError, match=r"no updates.*plan"):
        apply(tuned, planned)
    assert_same_state(before, state_of(tuned))


LORAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bf16": {},
    "rslora": {"use_rslora": True},
    "odd-alpha-and-patterns": {"lora_alpha": 7, "rank_pattern": {"v_proj": 3}, "alpha_pattern": {"down_proj": 5}},
}


UNDONE = [(lora, method) for lora in LORAS for method in ("sum-patch", "sum-exact", "swap-patch")]


@pytest.mark.parametrize(("lora", "method"), [*UNDONE, ("plain", "two_teacher"), ("bf16", "two_teacher")])
def test_revert_is_bit_for_bit_configuration_included(
    tmp_path: Path, make_pico_lora: MakeLora, inputs: dict[str, Any], lora: str, method: str
) -> None:
    reference, model = (make_pico_lora(seed=0, **copy.deepcopy(LORAS[lora])) for _ in range(2))
    if lora == "bf16":
        reference, model = reference.to(torch.bfloat16), model.to(torch.bfloat16)
    config, given = call(method, {**inputs, "patch": make_patch(factors_of(reference))})
    drift(model).save_pretrained(tmp_path / "before")
    before = state_of(model)
    nlsr_realign(model, config, **given)
    if method == "sum-exact":
        assert all(factors_of(model)[n].rank == 2 * u.rank for n, u in factors_of(reference).items())
    assert factors_of(model)["model.layers.0.self_attn.q_proj"].A.dtype == (
        torch.bfloat16 if lora == "bf16" else torch.float32
    )
    revert(model)
    assert_same_state(before, state_of(model))
    model.save_pretrained(tmp_path / "after")
    assert hashes(tmp_path / "before") == hashes(tmp_path / "after")


def test_revert_without_a_realignment_says_so(tuned: PeftModel) -> None:
    with pytest.raises(PeftNLSRError, match=r"no realignment to revert.*revert_folder"):
        revert(tuned)


def test_revert_refuses_an_adapter_that_was_trained_on(tuned: PeftModel, inputs: dict[str, Any]) -> None:
    config, given = call("sum-patch", inputs)
    drift(nlsr_realign(tuned, config, **given), size=1e-3)
    before = state_of(tuned)
    with pytest.raises(PeftNLSRError, match=r"changed after the realignment.*nothing was reverted"):
        revert(tuned)
    assert_same_state(before, state_of(tuned))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"config": "paper"}, r"config is 'paper'; give .*from_preset"),
        ({"patch": {"q_proj": 1}}, "patch is a dict; give a SafetyPatch"),
        ({"tokenizer": "a/model"}, r"tokenizer is 'a/model'; give AutoTokenizer.from_pretrained\('a/model'\)"),
        ({"judge": "judges:refuses"}, r"judge is 'judges:refuses'; give a function, .*load_judge"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_names_in_place_of_objects_are_refused_with_advice(
    tuned: PeftModel, given: dict[str, Any], words: str
) -> None:
    with pytest.raises(TypeError, match=words):
        plan(tuned, **given)


@pytest.mark.parametrize("method", ["two_teacher", "sum-reference"])
def test_examples_that_the_model_has_no_positions_for_are_refused(
    tuned: PeftModel, inputs: dict[str, Any], method: str
) -> None:
    tuned.config.max_position_embeddings = 9
    config, given = call(method, inputs)
    long = [{"prompt": "attack the lamp", "response": " ".join(["word1"] * 20)}]
    with pytest.raises(PeftNLSRError, match=r"needs \d+ tokens .*the model has 9 positions; set max_length"):
        plan(tuned, config, **{**given, "calibration": long})


def test_a_second_call_is_refused_until_revert_or_more_training(tuned: PeftModel, inputs: dict[str, Any]) -> None:
    config, given = call("swap-patch", inputs)
    nlsr_realign(tuned, config, **given)
    before = state_of(tuned)
    with pytest.raises(PeftNLSRError, match=r"realigned already \(by swap\).*revert\(model\)"):
        nlsr_realign(tuned, config, **given)
    assert_same_state(before, state_of(tuned))
    drift(tuned, size=1e-3)
    nlsr_realign(tuned, config, **given)
    nlsr_realign(revert(tuned), config, **given)


# ---- what is chosen


def test_auto_with_a_patch_of_the_same_lineage_is_sum(tuned: PeftModel, inputs: dict[str, Any]) -> None:
    done = plan(tuned, patch=inputs["patch"], progress=False)
    assert (done.method, done.reference) == (
        "sum",
        "the aligned adapter",
    ) and "was trained from its ref" in done.reason


def test_auto_with_a_patch_of_another_lineage_is_two_teacher_and_says_why(
    make_pico_lora: MakeLora, inputs: dict[str, Any]
) -> None:
    config, given = call("two_teacher", inputs)
    done = plan(make_pico_lora(seed=5), config, patch=inputs["patch"], **given)
    assert done.method == "two_teacher" and "not trained from its reference" in done.reason
    assert "base model" in done.reference and "given, but not used by two_teacher: patch" in done.notes


def test_an_adapter_trained_on_after_a_repair_is_not_repaired_by_entries_again(
    tuned: PeftModel, inputs: dict[str, Any]
) -> None:
    """The cut to the adapter's rank gave the restored modules factors of their own."""
    config, given = call("sum-patch", inputs)
    nlsr_realign(tuned, config, **given)
    drift(tuned, size=0.01)
    before = state_of(tuned)
    with pytest.raises(
        LineageError, match=r"[23] of 6 modules .*\(first model\.layers\..*realigned before.*revert it"
    ):
        nlsr_realign(tuned, config, **given)
    assert_same_state(state_of(tuned), before)
    config, given = call("two_teacher", inputs)
    assert plan(tuned, config, patch=inputs["patch"], **given).method == "two_teacher"


LINEAGES: dict[str, tuple[dict[str, float | None], str]] = {
    "all-related": ({f"m{i}": 0.9 for i in range(20)}, ""),
    "one-in-twenty": ({"m0": 0.1} | {f"m{i}": 0.9 for i in range(1, 20)}, "1 of 20 modules .*first m0: cosine 0.10"),
    "modules-without-entries": ({"m0": None, "m1": None} | {f"m{i}": 0.9 for i in range(2, 20)}, ""),
}


@pytest.mark.parametrize(("lineage", "words"), LINEAGES.values(), ids=LINEAGES)
def test_single_modules_of_another_lineage_are_noted(lineage: dict[str, float | None], words: str) -> None:
    notes = require_shared_lineage(Lineage.from_cosines(lineage))
    assert len(notes) == bool(words) and all(re.match(words, note) for note in notes)


@pytest.mark.parametrize("cosines", [[0.1] * 3 + [0.9] * 17, [0.1, None, None], [None], []], ids=str)
def test_more_than_a_tenth_of_another_lineage_is_refused(cosines: list[float | None]) -> None:
    with pytest.raises(LineageError, match=r"entries of A and B cannot be exchanged.*update='least_squares'"):
        require_shared_lineage(Lineage.from_cosines({f"m{i}": cosine for i, cosine in enumerate(cosines)}))


CUTS = {
    "sum-patch": ("of the weights", True),
    "sum-reference": ("on the calibration inputs", False),
    "sum-exact": (None, False),
    "swap-patch": (None, False),
    "two_teacher": ("on the calibration inputs", False),
    "one_shot": ("on the calibration inputs", False),
}


@pytest.mark.parametrize("method", CUTS)
def test_a_cut_says_by_what_it_was_made(tuned: PeftModel, inputs: dict[str, Any], method: str) -> None:
    config, given = call(method, inputs)
    planned = plan(tuned, config, **given)
    norm, noted = CUTS[method]
    assert planned.truncation_norm == planned.to_dict()["truncation_norm"] == norm
    assert any("cut to rank r by size alone" in note for note in planned.notes) == noted


def test_auto_without_a_patch_is_two_teacher_with_the_teacher_named(tuned: PeftModel, inputs: dict[str, Any]) -> None:
    config, given = call("two_teacher", inputs)
    with_base = plan(tuned, config, **given)
    with_reference = plan(tuned, config, reference=inputs["reference"], **given)
    assert with_base.method == with_reference.method == "two_teacher"
    assert with_base.reference.startswith("the base model itself")
    assert with_reference.reference == "the given reference adapter"
    for done in (with_base, with_reference):
        assert done.reference in done.reason and "no patch" in done.reason
    name = with_base.restored[0]
    near = inputs["reference"][name]
    assert with_reference.updates[name].cosine(near) > with_base.updates[name].cosine(near)


def test_what_a_method_does_not_use_is_named(tuned: PeftModel, inputs: dict[str, Any]) -> None:
    done = plan(tuned, patch=inputs["patch"], utility=rows(3), calibration=rows(3), progress=False)
    assert done.notes[-1] == "given, but not used by sum: calibration, utility"


def test_a_patch_may_be_a_folder_as_text_or_path(tmp_path: Path, tuned: PeftModel, inputs: dict[str, Any]) -> None:
    inputs["patch"].save(tmp_path)
    plans = [plan(tuned, patch=given, progress=False) for given in (inputs["patch"], str(tmp_path), tmp_path)]
    for other in plans[1:]:
        assert_same_factors(plans[0].updates, other.updates)


def test_a_weak_adapter_may_be_a_folder_or_a_mapping(
    tmp_path: Path, make_pico_lora: MakeLora, tuned: PeftModel, inputs: dict[str, Any]
) -> None:
    weak = drift(make_pico_lora(seed=0), seed=1)
    weak.save_pretrained(tmp_path)
    config, given = quick(update="sum", score="magnitude"), {"reference": inputs["reference"], "progress": False}
    plans = [plan(tuned, config, weak=source, **given) for source in (factors_of(weak), tmp_path)]
    assert_same_factors(plans[0].updates, plans[1].updates)
    name = plans[0].restored[0]
    without = plan(tuned, config, **given).updates
    assert name not in without or not torch.equal(plans[0].updates[name].A, without[name].A)


def test_how_the_adapter_shares_its_scale_does_not_matter(make_pico_lora: MakeLora, inputs: dict[str, Any]) -> None:
    plain, rescaled = (drift(make_pico_lora(seed=0)) for _ in range(2))
    other = drift(make_pico_lora(seed=0, lora_alpha=32))
    LiveAdapter(other).write(factors_of(plain))
    config = quick(update="sum", selection="all")
    one, two = (plan(m, config, patch=inputs["patch"], progress=False).updates for m in (rescaled, other))
    for name in one:
        torch.testing.assert_close(one[name].dense(), two[name].dense(), atol=1e-5, rtol=1e-4)


# ---- the zero-configuration call


@pytest.fixture(scope="session")
def saved_base(tmp_path_factory: pytest.TempPathFactory, _pico_llama_original: LlamaForCausalLM) -> Path:
    folder = tmp_path_factory.mktemp("base")
    _pico_llama_original.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def lora_on(folder: Path) -> PeftModel:
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), lora)
    randomise_lora(model, "default", seed=0)
    return model.eval()


def test_nothing_but_a_model_is_enough(
    saved_base: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Every third prompt is enough to see what happens, and saves seconds.
    monkeypatch.setattr(screening, "builtin_prompts", lambda kind, half: builtin_prompts(kind, half)[::3])
    monkeypatch.setattr(screening, "knows_words", lambda texts, tokenizer: True)  # the pico tokenizer has 60 words
    model = lora_on(saved_base)
    with caplog.at_level(logging.INFO, "peft_nlsr"):
        assert nlsr_realign(model, progress=False) is model
    done = model.nlsr_realignment
    counts = {kind: len(builtin_prompts(kind, "calibration")[::3]) for kind in ("safety", "benign", "lookalike")}
    assert done.method == "two_teacher" and "base model itself" in done.reference
    assert done.data["safety"] == {
        "source": "built-in prompts",
        "used": counts["safety"],
        "asked_of_teacher": counts["safety"],
        "refused_by_teacher": 0,
        "lookalikes": 0,
    }
    assert done.data["utility"] == {"source": "built-in prompts", "used": counts["benign"] + counts["lookalike"]}
    assert f"by two_teacher: {done.reason}" in caplog.text and "no patch was given" in done.reason
    teacher, utility = done.notes
    assert "refused only 0 of" in teacher and "may not be safe" in teacher
    assert "no utility data" in utility and "may be lost" in utility and "utility=" in utility
    assert all(note in caplog.text for note in done.notes)


def test_the_tokenizer_beside_the_base_is_found(saved_base: Path) -> None:
    given = {
        "calibration": rows(4, poisoned=range(4)),
        "utility": rows(4),
        "judge": refuses_attacks,
        "progress": False,
    }
    found, passed = (
        plan(lora_on(saved_base), quick(), **given, **more) for more in ({}, {"tokenizer": word_tokenizer()})
    )
    assert_same_factors(found.updates, passed.updates)


def test_a_teacher_that_refuses_raises_no_doubt(tuned: PeftModel, inputs: dict[str, Any]) -> None:
    config, given = call("two_teacher", inputs)
    unanswered = [{"prompt": row["prompt"]} for row in inputs["calibration"]]
    done = plan(tuned, config, **{**given, "calibration": unanswered})
    assert done.data["safety"]["refused_by_teacher"] == len(unanswered)
    assert not any("may not be safe" in note for note in done.notes)


def test_safety_data_without_a_refusal_are_no_repair(tuned: PeftModel, inputs: dict[str, Any]) -> None:
    config, given = call("two_teacher", inputs)
    before = state_of(tuned)
    with pytest.raises(CalibrationError, match=r"none of the 3 safety answers is a refusal to the judge .*refuses_a"):
        nlsr_realign(tuned, config, **{**given, "calibration": rows(3), "utility": rows(4)})
    assert_same_state(state_of(tuned), before)
    attack = {"prompt": "attack the lamp", "response": "never"}
    for more, change in (([attack], {}), ([], {"lookalike_weight": 1.0})):
        plan(tuned, config.replace(**change), **{**given, "calibration": [*rows(3), *more], "utility": rows(4)})


def test_tokenised_data_give_the_same_as_text(tuned: PeftModel, inputs: dict[str, Any]) -> None:
    from peft_nlsr.examples import read_examples

    config, given = call("two_teacher", inputs)
    tokenised = {
        kind: [
            {"input_ids": list(e.tokens), "labels": [-100] * len(e.prompt) + list(e.answer)}
            for e in sorted(
                read_examples(given[kind], given["tokenizer"], limit=99, max_length=99), key=lambda e: e.index
            )
        ]
        for kind in ("calibration", "utility")
    }
    assert_same_factors(plan(tuned, config, **given).updates, plan(tuned, config, **{**given, **tokenised}).updates)


@pytest.mark.parametrize("form", ["two_teacher", "one_shot"])
def test_an_adapter_whose_safety_is_intact_stays_as_it_is(tuned: PeftModel, inputs: dict[str, Any], form: str) -> None:
    before = factors_of(copy.deepcopy(tuned))
    _, given = call("two_teacher", inputs)
    given["calibration"] = rows(20, poisoned=range(20))
    config = quick(update="least_squares", least_squares_form=form, max_samples=40)
    done = nlsr_realign(tuned, config, **given).nlsr_realignment
    assert_same_factors(before, factors_of(tuned))
    assert not done.restored and done.fingerprint_before == done.fingerprint_after
    assert any("safety is intact" in note for note in done.notes)
    revert(tuned)


def test_one_shot_without_utility_is_refused_when_screening_leaves_none(
    tuned: PeftModel, inputs: dict[str, Any]
) -> None:
    config, given = call("one_shot", inputs)
    before = state_of(tuned)
    with pytest.raises(PeftNLSRError, match="needs utility data, found none after screening"):
        nlsr_realign(tuned, config, **{**given, "utility": rows(3, poisoned=range(3))})
    assert_same_state(before, state_of(tuned))


def short_judge(prompts: Any, responses: Any) -> list[bool]:
    return [True]


def broken_judge(prompts: Any, responses: Any) -> list[bool]:
    raise RuntimeError("the judge is out")


@pytest.mark.parametrize(
    ("judge", "error", "words"),
    [
        pytest.param(short_judge, ValueError, "1 verdicts for 6 responses", id="wrong-length"),
        pytest.param(broken_judge, RuntimeError, "the judge is out", id="raises"),
    ],
)
def test_a_failing_judge_changes_nothing(
    tuned: PeftModel, inputs: dict[str, Any], judge: Any, error: type[Exception], words: str
) -> None:
    config, given = call("two_teacher", inputs)
    before = state_of(tuned)
    with pytest.raises(error, match=words):
        nlsr_realign(tuned, config, **{**given, "judge": judge})
    assert_same_state(before, state_of(tuned))


@pytest.mark.parametrize("place", ["fingerprint", "keep_with_adapter", "_keep"])
def test_an_interrupt_until_the_record_is_kept_undoes_the_write(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tuned: PeftModel, inputs: dict[str, Any], place: str
) -> None:
    config, given = call("sum-patch", inputs)
    planned, before = plan(tuned, config, **given), factors_of(tuned)
    original, calls = getattr(applying, place), []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(place)
        if len(calls) == (2 if place == "fingerprint" else 1):  # the first one looks at what was planned for
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(applying, place, interrupted)
    with pytest.raises(KeyboardInterrupt):
        apply(tuned, planned)
    monkeypatch.undo()
    assert_same_factors(before, factors_of(tuned))
    assert not hasattr(tuned, "nlsr_realignment")
    tuned.save_pretrained(tmp_path)
    assert not (tmp_path / "nlsr_config.json").exists()
    assert apply(tuned, planned).fingerprint_after is not None


@pytest.mark.parametrize("method", ["two_teacher", "one_shot", "sum-reference", "released"])
def test_an_interrupt_in_the_middle_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, tuned: PeftModel, inputs: dict[str, Any], method: str
) -> None:
    layer = tuned.base_model.model.model.layers[1].mlp.down_proj.base_layer
    config, given = call(method, inputs)
    before = state_of(tuned)

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(layer, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        nlsr_realign(tuned, config, **given)
    monkeypatch.undo()
    assert_same_state(before, state_of(tuned))


# ---- several adapters


@pytest.fixture
def two_adapters(tuned: PeftModel) -> Iterator[PeftModel]:
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    tuned.add_adapter("other", lora)
    randomise_lora(tuned, "other", seed=0)
    for name, parameter in tuned.named_parameters():
        if ".other." in name and "lora_" in name:
            parameter.data += 0.01
    yield tuned


@pytest.mark.parametrize(
    ("named", "changed"), [pytest.param(None, "default", id="active"), pytest.param("other", "other", id="named")]
)
def test_with_several_adapters_one_changes(
    two_adapters: PeftModel, inputs: dict[str, Any], named: str | None, changed: str
) -> None:
    before = {name: factors_of(two_adapters, name) for name in ("default", "other")}
    nlsr_realign(two_adapters, patch=inputs["patch"], adapter_name=named)
    assert two_adapters.nlsr_realignment.adapter_name == changed
    (kept,) = {"default", "other"} - {changed}
    assert_same_factors(before[kept], factors_of(two_adapters, kept))
    after = factors_of(two_adapters, changed)
    assert any(not torch.equal(before[changed][n].A, after[n].A) for n in after)
    assert two_adapters.active_adapters == ["default"]
    revert(two_adapters)
    assert_same_factors(before[changed], factors_of(two_adapters, changed))


@pytest.mark.parametrize("method", ["two_teacher", "one_shot", "sum-reference"])
def test_an_adapter_that_is_not_active_cannot_be_measured(
    two_adapters: PeftModel, inputs: dict[str, Any], method: str
) -> None:
    config, given = call(method, inputs)
    before = state_of(two_adapters)
    with pytest.raises(IncompatibleError, match=r"'default'.*expected 'other' alone.*set_adapter\('other'\)"):
        nlsr_realign(two_adapters, config, adapter_name="other", **given)
    assert_same_state(before, state_of(two_adapters))


def test_each_adapter_keeps_its_own_undo(two_adapters: PeftModel, inputs: dict[str, Any]) -> None:
    before = {name: factors_of(two_adapters, name) for name in ("default", "other")}
    for name in ("default", "other"):
        nlsr_realign(two_adapters, patch=inputs["patch"], adapter_name=name)
    with pytest.raises(PeftNLSRError, match="'default' is realigned already"):
        nlsr_realign(two_adapters, patch=inputs["patch"])
    two_adapters.base_model.set_adapter(["default", "other"])
    revert(two_adapters)  # the latest
    assert_same_factors(before["other"], factors_of(two_adapters, "other"))
    assert two_adapters.nlsr_realignment.adapter_name == "default"
    with pytest.raises(PeftNLSRError, match="'other' holds no realignment"):
        revert(two_adapters, "other")
    revert(two_adapters, "default")
    assert_same_factors(before["default"], factors_of(two_adapters, "default"))
    assert not hasattr(two_adapters, "nlsr_realignment")


# ---- what others load


@pytest.mark.parametrize("method", ["two_teacher", "sum-patch", "sum-exact", "swap-patch"])
def test_the_saved_adapter_loads_in_plain_peft_with_the_same_configuration(
    tmp_path: Path, make_pico_lora: MakeLora, pico_llama: LlamaForCausalLM, inputs: dict[str, Any], method: str
) -> None:
    model = drift(make_pico_lora(seed=0))
    config, given = call(method, inputs)
    model.save_pretrained(tmp_path / "before")
    nlsr_realign(model, config, **given).save_pretrained(tmp_path / "after")
    texts = [json.loads((tmp_path / side / "adapter_config.json").read_text()) for side in ("before", "after")]
    assert set(texts[0]) == set(texts[1])
    changed = {key for key in texts[0] if texts[0][key] != texts[1][key]}
    assert changed == ({"r", "lora_alpha"} if method == "sum-exact" else set())
    loaded = PeftModel.from_pretrained(pico_llama, tmp_path / "after").eval()
    assert_same_factors(factors_of(model), factors_of(loaded))
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits, rtol=0, atol=0)


def test_adapters_injected_by_transformers_are_realigned_too(
    pico_llama: LlamaForCausalLM, inputs: dict[str, Any]
) -> None:
    pico_llama.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"]))
    randomise_lora(pico_llama, "default", seed=0)  # type: ignore[arg-type]
    config, given = call("two_teacher", inputs)
    model = drift(pico_llama.eval())
    before = state_of(model)
    assert nlsr_realign(model, config, **given) is model and model.nlsr_realignment.method == "two_teacher"
    revert(model)
    assert_same_tensors(before["values"], state_of(model)["values"])


# Long runs


def test_a_two_teacher_run_records_its_cost_and_removes_its_working_folder(
    tuned: PeftModel, inputs: dict[str, Any], tmp_path: Path
) -> None:
    config, given = call("two_teacher", inputs)
    done = plan(tuned, config.replace(solver="iterative"), **given, work_dir=tmp_path / "work")
    assert not (tmp_path / "work").exists()
    assert done.data["cost"]["solvers"] == {"32": ["iterative"], "48": ["iterative"]}
    assert all(0.0 <= module.solver_error < 0.01 for module in done.modules)
    assert any(module.solver_error > 0.0 for module in done.modules)
    assert "solver_error" in done.to_dict()["modules"][0]


def test_a_working_folder_is_named_where_it_has_no_use(
    tuned: PeftModel, inputs: dict[str, Any], tmp_path: Path
) -> None:
    config, given = call("sum-patch", inputs)
    done = plan(tuned, config, **given, work_dir=tmp_path / "work")
    assert "given, but not used by sum: work_dir" in done.notes
    assert not (tmp_path / "work").exists()
