"""A safety patch is the same after a round trip, is read lazily, and only fits what it was built for."""

import copy
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import (
    assert_same_factors,
    assert_same_state,
    drift,
    factors_of,
    make_patch,
    quick,
    refuses_attacks,
    rows,
    state_of,
    word_tokenizer,
)

from peft_nlsr import (
    CalibrationError,
    CorruptFileError,
    IncompatibleError,
    LowRank,
    NLSRConfig,
    PeftNLSRError,
    SafetyPatch,
    build_safety_patch,
    nlsr_realign,
    open_adapter,
    screening,
)
from peft_nlsr.building import collect_safety_statistics
from peft_nlsr.patch import RECORD_NAME, TENSORS_NAME
from peft_nlsr.storage import TensorFile

MakeLora = Callable[..., PeftModel]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def reference(make_pico_lora: MakeLora) -> dict[str, LowRank]:
    return factors_of(make_pico_lora(seed=0, rank_pattern={"down_proj": 3}))


@pytest.fixture
def patch(reference: dict[str, LowRank]) -> SafetyPatch:
    return make_patch(reference)


def without_signed_zeros(update: LowRank) -> LowRank:
    return LowRank(update.A + 0.0, update.B + 0.0, update.scale)


def assert_same_patch(one: SafetyPatch, other: SafetyPatch) -> None:
    assert one.record == other.record and list(one) == list(other)
    assert_same_factors(*({n: without_signed_zeros(p[n].reference) for n in p} for p in (one, other)))
    for name in one:
        for mine, theirs in zip(one[name].masks, other[name].masks, strict=True):
            assert mine.dtype == theirs.dtype == torch.bool and torch.equal(mine, theirs)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.8, 0.999], ids=lambda s: f"sparsity-{s}")
def test_a_saved_patch_is_read_back_bit_for_bit(
    tmp_path: Path, reference: dict[str, LowRank], sparsity: float
) -> None:
    patch = make_patch(reference, "org/base", sparsity=sparsity)
    patch.save(tmp_path / "patch")
    assert sorted(p.name for p in (tmp_path / "patch").iterdir()) == [RECORD_NAME, TENSORS_NAME]
    for loaded in (
        SafetyPatch.load(tmp_path / "patch"),
        SafetyPatch.from_pretrained(tmp_path / "patch"),
        SafetyPatch.from_pretrained(str(tmp_path / "patch")),
    ):
        assert_same_patch(patch, loaded)
    SafetyPatch.load(tmp_path / "patch").save_pretrained(tmp_path / "again")
    for name in (RECORD_NAME, TENSORS_NAME):
        assert (tmp_path / "patch" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_values_outside_the_masks_are_zero_and_inside_those_of_the_reference(
    reference: dict[str, LowRank], patch: SafetyPatch
) -> None:
    for name, update in reference.items():
        for mask, kept, full in zip(
            patch[name].masks,
            (patch[name].reference.A, patch[name].reference.B),
            (update.A, update.B),
            strict=True,
        ):
            assert torch.equal(kept, torch.where(mask, full, torch.zeros(()))) and 0 < int(mask.sum()) < mask.numel()


def test_the_file_holds_only_what_the_masks_keep(tmp_path: Path, patch: SafetyPatch) -> None:
    patch.save(tmp_path)
    stored = load_file(tmp_path / TENSORS_NAME)
    entries = sum(mask.numel() for module in patch.values() for mask in module.masks)
    kept = sum(int(mask.sum()) for module in patch.values() for mask in module.masks)
    assert sum(t.numel() for n, t in stored.items() if ".values_" in n) == kept
    assert entries <= 8 * sum(t.numel() for n, t in stored.items() if ".mask_" in n) < entries + 8 * 2 * len(patch)


def test_opening_reads_no_tensor_and_a_module_reads_its_own(
    tmp_path: Path, patch: SafetyPatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch.save(tmp_path)
    read: list[str] = []
    original = TensorFile.__getitem__

    def noted(self: TensorFile, name: str) -> torch.Tensor:
        read.append(name)
        return original(self, name)

    monkeypatch.setattr(TensorFile, "__getitem__", noted)
    loaded = SafetyPatch.load(tmp_path)
    assert len(loaded) == len(patch) and read == []
    name = next(iter(loaded))
    assert loaded[name].reference.rank > 0
    assert sorted(read) == sorted(f"{name}.{part}_{factor}" for part in ("mask", "values") for factor in "AB")


def test_the_record_is_json_and_describes_every_module(tmp_path: Path, patch: SafetyPatch) -> None:
    patch.save(tmp_path)
    record = json.loads((tmp_path / RECORD_NAME).read_text())
    assert record == json.loads(json.dumps(patch.record, allow_nan=False))
    assert list(record["modules"]) and str(tmp_path) not in json.dumps(record)
    for name, geometry in record["modules"].items():
        assert geometry["rank"] == patch[name].reference.rank
        assert geometry["shape"] == list(patch[name].reference.shape)
        assert geometry["kept_A"] == int(patch[name].masks[0].sum())


# ---- what it fits


def test_a_patch_fits_the_adapter_it_was_built_from_and_those_trained_from_it(
    make_pico_lora: MakeLora, patch: SafetyPatch
) -> None:
    for seed in (0, 7):
        patch.require_fit(open_adapter(make_pico_lora(seed=seed, rank_pattern={"down_proj": 3})))


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        pytest.param({"r": 6}, "built for rank 3, the adapter has rank 6 in model.layers.0.mlp.down_proj", id="rank"),
        pytest.param(
            {"target_modules": ["q_proj", "down_proj"]},
            r"0 only in the adapter \(first -\), 2 only in the patch \(first model.layers.0.self_attn.v_proj\)",
            id="modules-missing",
        ),
        pytest.param(
            {"target_modules": ["q_proj", "v_proj", "k_proj", "down_proj"]},
            r"2 only in the adapter \(first model.layers.0.self_attn.k_proj\), 0 only in the patch",
            id="modules-added",
        ),
    ],
)
def test_another_geometry_is_refused(
    make_pico_lora: MakeLora, patch: SafetyPatch, lora: dict[str, Any], words: str
) -> None:
    with pytest.raises(IncompatibleError, match=f"{words}.*build a patch"):
        patch.require_fit(open_adapter(make_pico_lora(**lora)))


def test_another_width_is_refused(make_pico_lora: MakeLora, reference: dict[str, LowRank]) -> None:
    name = "model.layers.1.mlp.down_proj"
    wide = LowRank(torch.randn(3, 96), reference[name].B, 1.0)
    with pytest.raises(IncompatibleError, match=rf"shape \(32, 96\) in {name}.*\(32, 48\).*another base model"):
        make_patch({**reference, name: wide}).require_fit(open_adapter(make_pico_lora(rank_pattern={"down_proj": 3})))


@pytest.mark.parametrize(
    ("theirs", "ours", "fits"),
    [
        pytest.param("org/one", "org/two", False, id="another-base"),
        pytest.param("org/one", "org/one", True, id="same-base"),
        pytest.param(None, "org/two", True, id="adapter-unknown"),
        pytest.param("org/one", None, True, id="patch-unknown"),
    ],
)
def test_the_base_model_must_be_the_same_where_both_are_known(
    make_pico_lora: MakeLora, reference: dict[str, LowRank], theirs: str | None, ours: str | None, fits: bool
) -> None:
    model = make_pico_lora(rank_pattern={"down_proj": 3})
    model.peft_config["default"].base_model_name_or_path = theirs
    patch = make_patch(reference, ours)
    if fits:
        patch.require_fit(open_adapter(model))
    else:
        with pytest.raises(IncompatibleError, match=r"built for base model org/two, .* trained on org/one"):
            patch.require_fit(open_adapter(model))


# ---- damage


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / TENSORS_NAME)
    change(tensors)
    save_file(tensors, folder / TENSORS_NAME)


NAME = "model.layers.0.self_attn.q_proj"


def drop_value(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{NAME}.values_A"] = tensors[f"{NAME}.values_A"][:-1].clone()


def drop_tensor(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[f"{NAME}.mask_B"]


def other_dtype(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{NAME}.values_B"] = tensors[f"{NAME}.values_B"].half()


def clear_mask(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{NAME}.mask_A"].zero_()


def put_nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{NAME}.values_A"][1] = float("nan")


def put_inf(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{NAME}.values_B"][0] = float("-inf")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param(drop_value, r"1 tensors differ, first .*0.self_attn.q_proj.values_A", id="value-count"),
        pytest.param(drop_tensor, r"first model.layers.0.self_attn.q_proj.mask_B \(found None", id="tensor-missing"),
        pytest.param(other_dtype, r"values_B \(found \(torch.float16.*expected \(torch.float32", id="dtype"),
    ],
)
def test_tensors_other_than_described_are_refused_when_opened(
    tmp_path: Path, patch: SafetyPatch, change: Any, words: str
) -> None:
    patch.save(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(CorruptFileError, match=f"do not belong together: .*{words}.*download"):
        SafetyPatch.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param(clear_mask, r"marks 0 entries of A but stores 26 values", id="mask-and-values"),
        pytest.param(put_nan, f"A of {NAME} in the safety patch holds 1 NaN or infinite values of 26", id="nan"),
        pytest.param(put_inf, f"B of {NAME} in the safety patch holds 1 NaN or infinite", id="inf"),
    ],
)
def test_damaged_values_are_refused_when_the_module_is_read(
    tmp_path: Path, patch: SafetyPatch, change: Any, words: str
) -> None:
    patch.save(tmp_path)
    rewrite(tmp_path, change)
    loaded = SafetyPatch.load(tmp_path)
    with pytest.raises(CorruptFileError, match=words):
        loaded[NAME]
    assert loaded["model.layers.1.self_attn.q_proj"].reference.rank == 4


@pytest.mark.parametrize("kept", [0, 7, 100, -4], ids=["empty", "in-the-length", "in-the-header", "in-the-data"])
def test_a_truncated_file_is_refused_when_opened(tmp_path: Path, patch: SafetyPatch, kept: int) -> None:
    patch.save(tmp_path)
    content = (tmp_path / TENSORS_NAME).read_bytes()
    (tmp_path / TENSORS_NAME).write_bytes(content[:kept])
    with pytest.raises(CorruptFileError, match=TENSORS_NAME):
        SafetyPatch.load(tmp_path)


def change_record(folder: Path, **changes: Any) -> None:
    record = json.loads((folder / RECORD_NAME).read_text())
    (folder / RECORD_NAME).write_text(json.dumps({**record, **changes}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        pytest.param({"schema_version": 99}, "has schema 99, this version reads 1", id="newer-schema"),
        pytest.param({"schema_version": None}, "has schema None", id="no-schema"),
        pytest.param({"modules": None}, "does not describe a safety patch", id="no-modules"),
        pytest.param({"modules": {NAME: {"rank": 4}}}, "does not describe a safety patch", id="no-geometry"),
        pytest.param({"reference": {}}, "does not describe a safety patch", id="no-reference"),
        pytest.param({"modules": {}}, "do not belong together", id="other-modules"),
    ],
)
def test_a_record_that_does_not_describe_the_tensors_is_refused(
    tmp_path: Path, patch: SafetyPatch, changes: dict[str, Any], words: str
) -> None:
    patch.save(tmp_path)
    change_record(tmp_path, **changes)
    with pytest.raises(CorruptFileError, match=words) as error:
        SafetyPatch.load(tmp_path)
    assert RECORD_NAME in str(error.value)


@pytest.mark.parametrize("scale", [None, "2", [], True, float("nan")])
def test_a_scale_that_is_no_number_is_named(tmp_path: Path, patch: SafetyPatch, scale: Any) -> None:
    patch.save(tmp_path)
    modules = copy.deepcopy(patch.record["modules"])
    modules[NAME]["scale"] = scale
    change_record(tmp_path, modules=modules)
    with pytest.raises(CorruptFileError, match=rf"{RECORD_NAME} gives {NAME} the scale .*expected a finite number"):
        SafetyPatch.load(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "3"], ids=["empty", "broken", "list", "number"])
def test_a_record_that_is_no_json_object_is_refused(tmp_path: Path, patch: SafetyPatch, text: str) -> None:
    patch.save(tmp_path)
    (tmp_path / RECORD_NAME).write_text(text)
    with pytest.raises(CorruptFileError, match=RECORD_NAME):
        SafetyPatch.load(tmp_path)


@pytest.mark.parametrize("missing", [RECORD_NAME, TENSORS_NAME])
def test_a_folder_with_half_a_patch_names_the_missing_file(tmp_path: Path, patch: SafetyPatch, missing: str) -> None:
    patch.save(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(PeftNLSRError, match=f"is no safety patch: it has no {missing}; build one"):
        SafetyPatch.from_pretrained(tmp_path)


@pytest.mark.parametrize("source", ["/no/such/folder", "no-such-patch", "org/no-such-patch", "not-an-id!"])
def test_a_patch_that_is_nowhere_is_named(source: str) -> None:
    with pytest.raises(PeftNLSRError, match=r"no safety patch at .*no such folder, and from the Hub") as error:
        SafetyPatch.from_pretrained(source)
    assert repr(source) in str(error.value)


# ---- built from a model


SAFETY = rows(6, poisoned=range(6))


@pytest.mark.parametrize("calibration", [SAFETY, None], ids=["given", "built-in"])
@pytest.mark.parametrize("preset", ["default", "paper", "released"])
def test_a_patch_built_from_a_model_realigns_what_was_trained_from_it(
    make_pico_lora: MakeLora, monkeypatch: pytest.MonkeyPatch, calibration: Any, preset: str
) -> None:
    monkeypatch.setattr(screening, "knows_words", lambda texts, tokenizer: True)  # the pico tokenizer has 60 words
    aligned = make_pico_lora(seed=0).train()
    before = state_of(aligned)
    config = NLSRConfig.from_preset(preset, max_samples=6, answer_tokens=2, nlsr_batch_size=4)
    patch = build_safety_patch(
        aligned, config, calibration=calibration, tokenizer=word_tokenizer(), judge=refuses_attacks, progress=False
    )
    assert_same_state(before, state_of(aligned))
    assert list(patch) == list(factors_of(aligned)) and patch.record["config"] == config.to_dict()
    assert patch.record["statistics"]["samples"] == 6
    assert "the aligned adapter, amplified with beta 0.9" in patch.record["reference"]["description"]
    said = json.dumps(patch.record, allow_nan=False)
    assert not any(word in said for word in ("attack", "/tmp", "word3"))
    model = drift(make_pico_lora(seed=0))
    selection = {"selection": "all"} if preset != "default" else {}
    done = nlsr_realign(model, config.replace(**selection), patch=patch).nlsr_realignment
    assert done.method == ("swap" if preset == "released" else "sum") and done.restored


def test_built_in_calibration_doubts_a_model_that_does_not_refuse(
    make_pico_lora: MakeLora, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(screening, "knows_words", lambda texts, tokenizer: True)
    build_safety_patch(make_pico_lora(), quick(max_samples=3), tokenizer=word_tokenizer(), progress=False)
    assert "refused only 0 of 3 safety prompts" in caplog.text and "may not be safe" in caplog.text


def test_a_score_without_statistics_needs_neither_data_nor_tokenizer(make_pico_lora: MakeLora) -> None:
    patch = build_safety_patch(make_pico_lora(), NLSRConfig(score="magnitude"))
    assert patch.record["statistics"] is None and len(patch) == 6


@pytest.mark.parametrize("build", [build_safety_patch, collect_safety_statistics])
def test_the_score_of_pairs_is_refused_before_a_prompt_is_asked(make_pico_lora: MakeLora, build: Any) -> None:
    def judge(prompts: Any, responses: Any) -> list[bool]:
        raise AssertionError("the model was asked")

    given = {"calibration": [{"prompt": "attack the vase"}], "tokenizer": word_tokenizer(), "judge": judge}
    with pytest.raises(CalibrationError, match=r"'chosen'.*gradients='preference_snip'.*build_nlsr_patch"):
        build(make_pico_lora(), quick(score="preference_snip"), progress=False, **given)


def test_a_weak_adapter_may_be_a_folder_or_a_mapping(tmp_path: Path, make_pico_lora: MakeLora) -> None:
    weak = drift(make_pico_lora(seed=0), seed=1)
    weak.save_pretrained(tmp_path)
    config = NLSRConfig(score="magnitude")
    patches = [
        build_safety_patch(make_pico_lora(), config, weak=w) for w in (factors_of(weak), tmp_path, str(tmp_path))
    ]
    for other in patches[1:]:
        assert_same_patch(patches[0], other)
    without = build_safety_patch(make_pico_lora(), config)
    assert any(not torch.equal(without[n].reference.A, patches[0][n].reference.A) for n in without)


def test_a_named_adapter_is_the_reference(make_pico_lora: MakeLora) -> None:
    model = make_pico_lora(seed=0)
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    config = NLSRConfig(score="magnitude", sparsity=0.0, beta=0.0)
    patch = build_safety_patch(model, config, adapter_name="other")
    assert_same_factors({n: patch[n].reference for n in patch}, factors_of(model, "other"))


def test_pickled_or_foreign_files_are_never_opened(tmp_path: Path, patch: SafetyPatch) -> None:
    patch.save(tmp_path)
    (tmp_path / TENSORS_NAME).write_bytes(b"\x80\x04" + struct.pack("<Q", 3) + b"pickle")
    with pytest.raises(CorruptFileError, match="not a safetensors file"):
        SafetyPatch.load(tmp_path)


# What the reference saw of its inputs


@pytest.fixture
def calibrated(make_pico_lora: MakeLora) -> SafetyPatch:
    return build_safety_patch(
        make_pico_lora(seed=0), quick(), calibration=rows(8), tokenizer=word_tokenizer(), progress=False
    )


def test_a_calibrated_patch_keeps_what_it_saw_of_the_inputs(tmp_path: Path, calibrated: SafetyPatch) -> None:
    calibrated.save(tmp_path)
    loaded = SafetyPatch.load(tmp_path)
    assert list(loaded.inputs) == list(calibrated.inputs) == list(calibrated)
    for name, mine in calibrated.inputs.items():
        theirs = loaded.inputs[name]
        assert mine.rows.dtype == theirs.rows.dtype == torch.bfloat16
        assert torch.equal(mine.rows, theirs.rows) and torch.equal(mine.rest, theirs.rest)
        assert float(mine.rows.float().norm()) > 0.0


def test_a_patch_without_calibration_has_seen_no_inputs(tmp_path: Path, patch: SafetyPatch) -> None:
    patch.save(tmp_path)
    assert not patch.inputs and not SafetyPatch.load(tmp_path).inputs
    assert SafetyPatch.load(tmp_path).inputs.get(next(iter(patch))) is None


def test_damaged_inputs_are_refused_when_they_are_read(tmp_path: Path, calibrated: SafetyPatch) -> None:
    calibrated.save(tmp_path)
    tensors, first = load_file(tmp_path / TENSORS_NAME), next(iter(calibrated))
    tensors[f"{first}.inputs_rest"][0] = torch.nan
    save_file(tensors, tmp_path / TENSORS_NAME)
    with pytest.raises(CorruptFileError, match=f"the inputs of {first} in the safety patch holds 1 NaN"):
        SafetyPatch.load(tmp_path).inputs[first]
