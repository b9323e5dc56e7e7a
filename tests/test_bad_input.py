"""Bad input in one table: each row is a clear error or a warning, and neither model nor disk has changed after it."""

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import (
    QUICK,
    assert_same_state,
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

from peft_nlsr import (
    CalibrationError,
    CorruptFileError,
    IncompatibleError,
    LineageError,
    LowRank,
    NLSRConfig,
    PeftNLSRError,
    UnsupportedAdapterError,
    build_safety_patch,
    nlsr_realign,
    plan,
    realign_folder,
)

MakeLora = Callable[..., PeftModel]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class World:
    """A call that works; a row of the table breaks one thing in it."""

    make: MakeLora
    folder: Path
    model: Any
    config: NLSRConfig = field(default_factory=quick)
    given: dict[str, Any] = field(default_factory=dict)

    def give(self, **changes: Any) -> None:
        self.given.update(changes)

    def lora(self, **settings: Any) -> None:
        self.model = drift(self.make(seed=0, **settings))

    def patch(self, **settings: Any) -> None:
        """Give only a patch, built for a LoRA with these settings."""
        base = settings.pop("base", None)
        for name in ("calibration", "utility", "tokenizer", "judge"):
            self.given.pop(name, None)
        make_patch(factors_of(self.make(**{"seed": 0, **settings})), base).save(self.folder / "patch")
        self.give(patch=str(self.folder / "patch"))

    def reference(self, **settings: Any) -> Path:
        """Give the saved adapter of a LoRA with these settings as reference."""
        self.make(**{"seed": 0, **settings}).save_pretrained(self.folder / "reference")
        self.give(reference=self.folder / "reference")
        return self.folder / "reference"


@pytest.fixture
def world(make_pico_lora: MakeLora, tmp_path: Path) -> World:
    given = {
        "calibration": rows(4, poisoned=range(4)),
        "utility": rows(4),
        "tokenizer": word_tokenizer(),
        "judge": refuses_attacks,
    }
    return World(make_pico_lora, tmp_path, drift(make_pico_lora(seed=0)), given=given)


# ---- what breaks a call on a live model


def base_of(model: Any, name: str) -> None:
    model.peft_config["default"].base_model_name_or_path = name


def other_base_patch(w: World) -> None:
    w.patch(base="org/one")
    base_of(w.model, "org/two")


def other_base_reference(w: World) -> None:
    folder = w.reference()
    edit_config(folder, base_model_name_or_path="org/one")
    base_of(w.model, "org/two")


def wide_patch(w: World) -> None:
    w.patch()
    factors = factors_of(w.model)
    make_patch({**factors, Q_PROJ: LowRank(torch.ones(4, 16), factors[Q_PROJ].B)}).save(w.folder / "patch")


def edit_config(folder: Path, **changes: Any) -> None:
    content = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**content, **changes}))


def put(model: Any, part: str, value: float) -> None:
    next(p for n, p in model.named_parameters() if part in n).data[0, 0] = value


def nan_in_reference(w: World) -> None:
    spoil(w.reference() / WEIGHTS)


def spoil(path: Path, value: float = float("nan")) -> None:
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = value
    save_file(tensors, path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def cut_reference(w: World) -> None:
    cut(w.reference() / WEIGHTS)


def cut_patch(w: World) -> None:
    w.patch()
    cut(w.folder / "patch" / "safety_patch.safetensors")


def old_patch(w: World) -> None:
    w.patch()
    path = w.folder / "patch" / "safety_patch.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 99}))


def merged(w: World) -> None:
    w.model.merge_adapter()


def without_adapter(w: World) -> None:
    w.model = w.model.unload()


def other_peft(config: Any) -> Callable[[World], None]:
    return lambda w: setattr(w, "model", get_peft_model(w.model.unload(), copy.deepcopy(config)))


def independent_patch(w: World) -> None:
    w.patch(seed=5)
    w.config = quick(update="sum")


def independent_reference(w: World) -> None:
    w.reference(seed=5)
    w.config = quick(update="sum")


def by(**settings: Any) -> Callable[[World], None]:
    return lambda w: setattr(w, "config", quick(**settings))


def both(*steps: Callable[[World], None]) -> Callable[[World], None]:
    def run(w: World) -> None:
        for step in steps:
            step(w)

    return run


def no_tokenizer(w: World) -> None:
    w.give(tokenizer=None)
    w.model.config._name_or_path = "/no/where"


def unanswered(w: World) -> None:
    w.give(calibration=[{"prompt": "paint the vase"}])


def with_reference(w: World) -> None:
    w.reference()


def wordy(*words: str) -> str:
    return ".*".join(words)


LIVE: dict[str, tuple[Callable[[World], None], type[Exception], str]] = {
    "patch-of-another-rank": (
        lambda w: w.patch(r=6),
        IncompatibleError,
        wordy("built for rank 6", "has rank 4 in model", "build a patch from a reference of rank 4"),
    ),
    "patch-of-other-modules": (
        lambda w: w.patch(target_modules=["q_proj", "v_proj"]),
        IncompatibleError,
        wordy("2 only in the adapter", "mlp.down_proj", "0 only in the patch", "same target modules"),
    ),
    "patch-of-another-width": (
        wide_patch,
        IncompatibleError,
        wordy(r"shape \(32, 16\) in " + Q_PROJ, r"\(32, 32\)", "another base model"),
    ),
    "patch-of-another-base": (
        other_base_patch,
        IncompatibleError,
        wordy("base model org/one", "trained on org/two", "build a patch for that base"),
    ),
    "patch-is-nowhere": (
        lambda w: w.give(patch="/no/where"),
        PeftNLSRError,
        wordy("no safety patch at '/no/where'", "no such folder"),
    ),
    "patch-is-an-empty-folder": (
        lambda w: w.give(patch=w.folder),
        PeftNLSRError,
        wordy("is no safety patch", "has no safety_patch.json", "build_nlsr_patch"),
    ),
    "patch-is-truncated": (cut_patch, CorruptFileError, wordy("safety_patch.safetensors", "truncated", "again")),
    "patch-of-a-newer-version": (
        old_patch,
        CorruptFileError,
        wordy("has schema 99", "reads 1", "build the patch"),
    ),
    "patch-of-another-lineage-for-sum": (
        independent_patch,
        LineageError,
        wordy(
            "of 6 modules", "cosine -?0", "at least 0.5", "not trained from the reference", "update='least_squares'"
        ),
    ),
    "reference-of-another-lineage-for-sum": (
        independent_reference,
        LineageError,
        wordy("of 6 modules", "cosine -?0", "at least 0.5", "update='least_squares'"),
    ),
    "reference-of-another-rank-for-sum": (
        both(lambda w: w.reference(r=6) and None, by(update="sum")),
        LineageError,
        wordy("6 of 6 modules", "cosine 0.00", "update='least_squares'"),
    ),
    "reference-of-other-modules": (
        lambda w: w.reference(target_modules=["q_proj", "v_proj"]) and None,
        IncompatibleError,
        wordy("different modules: 2 differ", "mlp.down_proj, which the reference lacks", "same target modules"),
    ),
    "reference-of-another-base": (
        other_base_reference,
        IncompatibleError,
        wordy("trained on org/one, the adapter on org/two", "same base model"),
    ),
    "reference-is-nowhere": (
        lambda w: w.give(reference="/no/where"),
        PeftNLSRError,
        wordy("'/no/where' is neither an existing folder nor a Hub id"),
    ),
    "reference-is-truncated": (cut_reference, CorruptFileError, wordy(WEIGHTS, "truncated", "again")),
    "reference-holds-nan": (nan_in_reference, CorruptFileError, wordy("lora_. of model", "1 NaN or infinite values")),
    "base-as-reference-for-sum": (
        by(update="sum"),
        IncompatibleError,
        wordy("reference adapter", "the reference is the base model", r"pass reference=\.\.\. or patch=\.\.\."),
    ),
    "sum-without-calibration": (
        both(with_reference, by(update="sum"), lambda w: w.give(calibration=None)),
        PeftNLSRError,
        wordy("score='low_rank' needs safety examples", r"calibration=\.\.\.", r"patch=\.\.\."),
    ),
    "response-tokens-without-responses": (
        both(with_reference, by(update="sum", calibration_tokens="response"), unanswered),
        CalibrationError,
        wordy("saw no calibration tokens", "labels"),
    ),
    "sequential-with-a-score-it-cannot-do": (
        both(with_reference, by(update="sum", sequential=True, score="snip")),
        ValueError,
        wordy("sequential=True needs score low_rank or wanda", "'snip'"),
    ),
    "preference-score-without-pairs": (
        both(with_reference, by(update="sum", score="preference_snip")),
        CalibrationError,
        wordy("'chosen'", "'rejected'"),
    ),
    "nan-in-a-factor": (
        lambda w: put(w.model, "lora_A", float("nan")),
        CorruptFileError,
        wordy("lora_A of model", "1 NaN or infinite values of"),
    ),
    "inf-in-a-factor": (
        lambda w: put(w.model, "lora_B", float("inf")),
        CorruptFileError,
        wordy("lora_B of model", "1 NaN or infinite values of"),
    ),
    "empty-calibration": (
        lambda w: w.give(calibration=[]),
        CalibrationError,
        wordy("no examples with tokens", "give an iterable of", "'prompt', 'response'"),
    ),
    "empty-utility": (lambda w: w.give(utility=iter(())), CalibrationError, "no examples with tokens"),
    "rows-of-unknown-form": (
        lambda w: w.give(utility=[{"question": "x"}]),
        CalibrationError,
        wordy(r"row 0 has the keys \['question'\]", "expected one of"),
    ),
    "one-row-in-place-of-data": (lambda w: w.give(calibration=rows(1)[0]), CalibrationError, "a single dict"),
    "nan-in-the-base-model": (
        lambda w: put(w.model, "1.mlp.gate_proj", float("nan")),
        PeftNLSRError,
        wordy("activations on these data hold NaN or infinite values", "check the base model's weights"),
    ),
    "merged-adapter": (merged, UnsupportedAdapterError, wordy("merged adapter", "model", "unmerge_adapter")),
    "dora": (lambda w: w.lora(use_dora=True), UnsupportedAdapterError, wordy("DoRA", "model", "without this option")),
    "ia3": (
        other_peft(IA3Config(task_type="CAUSAL_LM", target_modules=["q_proj"], feedforward_modules=[])),
        UnsupportedAdapterError,
        wordy("peft_type IA3", "Only LORA"),
    ),
    "prompt-tuning": (
        other_peft(PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)),
        UnsupportedAdapterError,
        wordy("peft_type PROMPT_TUNING", "Only LORA"),
    ),
    "no-adapter": (without_adapter, UnsupportedAdapterError, wordy("has no PEFT adapter", "Pass a model with")),
    "unknown-adapter-name": (
        lambda w: w.give(adapter_name="mine"),
        ValueError,
        wordy("no adapter 'mine'", "it has default"),
    ),
    "no-tokenizer": (no_tokenizer, PeftNLSRError, wordy("no tokenizer found at '/no/where'", r"tokenizer=\.\.\.")),
}


@pytest.mark.parametrize("call", [plan, nlsr_realign], ids=["plan", "realign"])
@pytest.mark.parametrize("row", LIVE)
def test_a_bad_call_on_a_model_is_a_clear_error_and_changes_nothing(world: World, row: str, call: Any) -> None:
    break_it, error, words = LIVE[row]
    break_it(world)
    before, files = state_of(world.model), hashes(world.folder)
    with pytest.raises(error, match=words) as caught:
        call(world.model, world.config, progress=False, **world.given)
    assert_same_state(before, state_of(world.model))
    assert hashes(world.folder) == files and not hasattr(world.model, "nlsr_realignment")
    assert "\n" not in str(caught.value)


def test_the_unbroken_call_works(world: World) -> None:
    assert nlsr_realign(world.model, world.config, progress=False, **world.given).nlsr_realignment.restored


def test_something_that_is_no_model_is_refused() -> None:
    with pytest.raises(
        UnsupportedAdapterError, match=r"expected a model in memory, found a str.*from_pretrained.*realign_folder"
    ):
        nlsr_realign("my-adapter")


@pytest.mark.parametrize("update", ["auto", "least_squares"])
def test_a_reference_of_another_rank_can_still_teach(world: World, update: str) -> None:
    world.reference(r=6)
    world.config = quick(update=update)
    assert plan(world.model, world.config, progress=False, **world.given).method == "two_teacher"


def test_what_is_not_covered_is_a_warning(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.lora(modules_to_save=["lm_head"])
    done = nlsr_realign(world.model, world.config, progress=False, **world.given).nlsr_realignment
    assert "1 trained parameters outside LoRA's A and B are not realigned: lm_head" in caplog.text
    assert any("lm_head" in note for note in done.notes)


# ---- building a patch


PATCHES: dict[str, tuple[Callable[[World], None], type[Exception], str]] = {
    "no-adapter": (without_adapter, UnsupportedAdapterError, "has no PEFT adapter"),
    "merged-adapter": (merged, UnsupportedAdapterError, "merged adapter"),
    "dora": (lambda w: w.lora(use_dora=True), UnsupportedAdapterError, "DoRA"),
    "nan-in-a-factor": (lambda w: put(w.model, "lora_A", float("nan")), CorruptFileError, "NaN or infinite"),
    "empty-calibration": (lambda w: w.give(calibration=[]), CalibrationError, "no examples with tokens"),
    "no-tokenizer": (no_tokenizer, PeftNLSRError, wordy("no tokenizer found", r"pass tokenizer=\.\.\.")),
    "weak-adapter-is-nowhere": (lambda w: w.give(weak="/no/where"), PeftNLSRError, "neither an existing folder"),
    "judge-of-the-wrong-length": (
        both(unanswered, lambda w: w.give(judge=lambda prompts, answers: [])),
        ValueError,
        "0 verdicts for 1 responses",
    ),
}


@pytest.mark.parametrize("row", PATCHES)
def test_a_patch_that_cannot_be_built_is_a_clear_error_and_changes_nothing(world: World, row: str) -> None:
    break_it, error, words = PATCHES[row]
    world.given.pop("utility")
    break_it(world)
    before = state_of(world.model)
    with pytest.raises(error, match=words):
        build_safety_patch(world.model, NLSRConfig(**QUICK), progress=False, **world.given)
    assert_same_state(before, state_of(world.model))


# ---- what breaks a call on files


def delete(name: str) -> Callable[[Path], None]:
    return lambda place: (place / "adapter" / name).unlink()


def pickled(place: Path) -> None:
    (place / "adapter" / WEIGHTS).rename(place / "adapter" / "adapter_model.bin")


def overwrite(name: str, text: str) -> Callable[[Path], None]:
    return lambda place: (place / name).write_text(text) and None


def with_config(**changes: Any) -> Callable[[Path], None]:
    return lambda place: edit_config(place / "adapter", **changes)


def half_a_module(place: Path) -> None:
    tensors = load_file(place / "adapter" / WEIGHTS)
    del tensors[next(name for name in tensors if "lora_B" in name)]
    save_file(tensors, place / "adapter" / WEIGHTS)


def nan_in_patch(place: Path) -> None:
    path = place / "patch" / "safety_patch.safetensors"
    tensors = load_file(path)
    next(t for n, t in tensors.items() if ".values_" in n)[0] = float("nan")
    save_file(tensors, path)


def unchanged(place: Path) -> None:
    pass


FILES: dict[str, tuple[Callable[[Path], None], dict[str, Any], type[Exception], str]] = {
    "adapter-is-nowhere": (unchanged, {"adapter": "nowhere"}, PeftNLSRError, "'nowhere' is not an existing folder"),
    "adapter-without-config": (delete(CONFIG), {}, CorruptFileError, wordy("has no adapter_config.json", "Give the")),
    "adapter-without-weights": (
        delete(WEIGHTS),
        {},
        CorruptFileError,
        wordy(f"has no {WEIGHTS}", "download"),
    ),
    "adapter-is-pickled": (
        pickled,
        {},
        UnsupportedAdapterError,
        wordy("pickle, which is never", "save_pretrained"),
    ),
    "adapter-truncated": (lambda p: cut(p / "adapter" / WEIGHTS), {}, CorruptFileError, wordy(WEIGHTS, "truncated")),
    "adapter-is-no-safetensors": (
        overwrite(f"adapter/{WEIGHTS}", "hello world, hello"),
        {},
        CorruptFileError,
        "is not a safetensors file",
    ),
    "adapter-is-an-lfs-pointer": (
        overwrite(f"adapter/{WEIGHTS}", "version https://git-lfs.github.com/spec/v1"),
        {},
        CorruptFileError,
        wordy("Git LFS pointer", "git lfs pull"),
    ),
    "adapter-config-is-broken": (overwrite(f"adapter/{CONFIG}", "{"), {}, CorruptFileError, "is not a JSON object"),
    "adapter-holds-nan": (
        lambda p: spoil(p / "adapter" / WEIGHTS),
        {},
        CorruptFileError,
        wordy("lora_. of model", "1 NaN or infinite"),
    ),
    "adapter-holds-inf": (
        lambda p: spoil(p / "adapter" / WEIGHTS, float("-inf")),
        {},
        CorruptFileError,
        wordy("lora_. of model", "1 NaN or infinite"),
    ),
    "adapter-lacks-a-factor": (half_a_module, {}, CorruptFileError, "only one of lora_A and lora_B"),
    "adapter-rank-contradicts-config": (with_config(r=6), {}, CorruptFileError, wordy("do not have rank 6", "belong")),
    "adapter-is-dora": (with_config(use_dora=True), {}, UnsupportedAdapterError, wordy("DoRA", "without this option")),
    "adapter-is-no-lora": (
        with_config(peft_type="IA3"),
        {},
        UnsupportedAdapterError,
        "peft_type IA3.*Only LORA",
    ),
    "adapter-is-pissa": (with_config(init_lora_weights="pissa"), {}, UnsupportedAdapterError, "PiSSA"),
    "patch-is-nowhere": (unchanged, {"patch": "nowhere"}, PeftNLSRError, "no safety patch at 'nowhere'"),
    "patch-is-truncated": (
        lambda p: cut(p / "patch" / "safety_patch.safetensors"),
        {},
        CorruptFileError,
        wordy("safety_patch.safetensors", "truncated"),
    ),
    "patch-holds-nan": (nan_in_patch, {}, CorruptFileError, wordy("in the safety patch holds 1 NaN or infinite")),
    "patch-of-another-version": (
        overwrite("patch/safety_patch.json", '{"schema_version": 99}'),
        {},
        CorruptFileError,
        "has schema 99, this version reads 1",
    ),
    "independent-lineage": (
        lambda p: shutil.copyfile(p / "other" / WEIGHTS, p / "adapter" / WEIGHTS) and None,
        {},
        LineageError,
        wordy("not trained from the reference", "least_squares"),
    ),
    "least-squares-needs-a-model": (
        unchanged,
        {"config": NLSRConfig(update="least_squares")},
        PeftNLSRError,
        wordy("needs the base model", "nlsr_realign", "'sum' or 'swap'"),
    ),
    "output-exists": (unchanged, {"output": "other"}, FileExistsError, wordy("other exists", "nothing was written")),
    "output-is-the-input": (unchanged, {"output": "adapter"}, FileExistsError, "adapter exists"),
    "output-is-a-file": (unchanged, {"output": "patch/safety_patch.json"}, FileExistsError, "exists"),
    "output-below-a-file": (unchanged, {"output": "patch/safety_patch.json/new"}, OSError, "safety_patch.json"),
    "output-inside-the-input": (unchanged, {"output": "adapter/new"}, ValueError, wordy("inside the input", "choose")),
}


@pytest.mark.parametrize("row", FILES)
def test_a_bad_call_on_files_is_a_clear_error_and_writes_nothing(
    tmp_path: Path, make_pico_lora: MakeLora, monkeypatch: pytest.MonkeyPatch, row: str
) -> None:
    break_it, changes, error, words = FILES[row]
    drift(make_pico_lora(seed=0)).save_pretrained(tmp_path / "adapter")
    make_pico_lora(seed=5).save_pretrained(tmp_path / "other")
    make_patch(factors_of(make_pico_lora(seed=0))).save(tmp_path / "patch")
    monkeypatch.chdir(tmp_path)
    break_it(tmp_path)
    before = hashes(tmp_path)
    call = {"adapter": "adapter", "output": "new", "patch": "patch", **changes}
    with pytest.raises(error, match=words) as caught:
        realign_folder(call.pop("adapter"), call.pop("output"), **call)
    assert hashes(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "other", "patch"]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"), [("sparsity", 1.0), ("beta", -0.1), ("max_samples", 0), ("update", "best")]
)
def test_a_quantity_out_of_range_never_reaches_a_model(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name}={value!r} "):
        NLSRConfig.from_preset("paper", **{name: value})
