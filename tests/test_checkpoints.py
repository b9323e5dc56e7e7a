"""Extraction from two checkpoints: the dense SVD's answer from a few rows at a time, resumable, loud when they do not
pair up."""

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracles_fgsn as oracle
import pytest
import torch
from local_hub import LocalHub
from oracles import gap
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import quick, refuses_attacks, rows, word_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from peft_nlsr import (
    IncompatibleError,
    LineageError,
    PeftNLSRError,
    UnsupportedAdapterError,
    checkpoints,
    open_adapter,
    plan,
)
from peft_nlsr.checkpoints import CheckpointRecord, extract_reference, models_of, truncated
from peft_nlsr.errors import CorruptFileError

pytest_plugins = ["hub_fixtures"]

SINGLE = 1e-5
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def shifted(model: Any, size: float = 0.02, *, seed: int = 1) -> Any:
    """The model with every weight moved: what alignment might have done."""
    moved = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for parameter in moved.parameters():
        parameter.data += (size * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)
    return moved


@pytest.fixture
def pair(pico_llama: LlamaForCausalLM, tmp_path: Path) -> tuple[Path, Path]:
    """Folders of an aligned model and its base, each in several shards."""
    shifted(pico_llama).save_pretrained(tmp_path / "aligned", max_shard_size="20KB")
    pico_llama.save_pretrained(tmp_path / "base", max_shard_size="30KB")
    assert len(list((tmp_path / "aligned").glob("*.safetensors"))) > 2
    return tmp_path / "aligned", tmp_path / "base"


def extract(pair: tuple[Path, Path], output: Path, **changes: Any) -> CheckpointRecord:
    return extract_reference(*pair, output, **{"rank": 4, "progress": False, **changes})


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in folder.glob("model*.safetensors") for name, t in load_file(path).items()}


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("rank", [1, 4, 40], ids=["one", "some", "more than there are"])
def test_each_module_is_the_dense_difference_cut_to_the_rank(pair: Any, tmp_path: Path, rank: int) -> None:
    record = extract(pair, tmp_path / "out", rank=rank)
    aligned, base = tensors(pair[0]), tensors(pair[1])
    found = open_adapter(tmp_path / "out")
    assert list(found) == [m.module for m in record.modules] and len(found) == 14
    for module in record.modules:
        D = oracle.difference(aligned, base, f"{module.module}.weight")
        best, captured = oracle.cut(D, rank)
        update = found[module.module]
        assert gap(update.dense(), best) < SINGLE and update.rank == rank and update.shape == module.shape
        assert module.captured == pytest.approx(captured, abs=SINGLE)
        assert module.norm == pytest.approx(float(D.norm()), rel=SINGLE)


def test_at_full_rank_the_base_with_the_reference_is_the_aligned_model(
    pair: Any, tmp_path: Path, pico_llama: LlamaForCausalLM
) -> None:
    extract(pair, tmp_path / "out", rank=48)
    aligned = LlamaForCausalLM.from_pretrained(pair[0])
    state = aligned.state_dict()
    for name, parameter in pico_llama.named_parameters():
        if not any(part in name for part in LINEAR):
            parameter.data.copy_(state[name])
    with_reference = PeftModel.from_pretrained(pico_llama, str(tmp_path / "out"))
    ids = torch.arange(10)[None]
    assert gap(with_reference(ids).logits, aligned(ids).logits) < 1e-4


def test_only_the_modules_asked_for_are_read(pair: Any, tmp_path: Path) -> None:
    read: list[str] = []
    original = checkpoints.Checkpoint.rows

    def noting(self: Any, tensor: str, start: int, stop: int) -> torch.Tensor:
        read.append(tensor)
        return original(self, tensor, start, stop)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints.Checkpoint, "rows", noting)
        extract(pair, tmp_path / "out", modules=["q_proj", "layers.1.mlp.down_proj"])
    wanted = {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)} | {"model.layers.1.mlp.down_proj"}
    assert set(open_adapter(tmp_path / "out")) == wanted
    assert set(read) == {f"{name}.weight" for name in wanted}


def test_chunks_of_rows_give_the_whole(pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extract(pair, tmp_path / "whole")
    monkeypatch.setattr(checkpoints, "_CHUNK_BYTES", 5 * 32 * 4)
    extract(pair, tmp_path / "chunks")
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "chunks"))
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("shape", [(1400, 1100), (1100, 1400)], ids=["tall", "wide"])
def test_large_matrices_are_cut_by_subspace_iteration_to_the_same(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 60, generator=generator)).Q for n in shape)
    D = (left * 0.8 ** torch.arange(60.0)) @ right.T
    update, norm, captured = truncated(D, 8)
    S = 0.8 ** torch.arange(60.0).double()
    assert gap(update.dense(), (left[:, :8] * S[:8].float()) @ right[:, :8].T) < 1e-4
    assert captured == pytest.approx(float((S[:8] ** 2).sum() / (S**2).sum()), abs=1e-5)
    assert norm == pytest.approx(float(S.norm()), rel=1e-5)


def test_conv1d_weights_are_turned_around(tmp_path: Path) -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20, n_positions=8))
    moved = shifted(model)
    moved.save_pretrained(tmp_path / "aligned")
    model.save_pretrained(tmp_path / "base")
    extract((tmp_path / "aligned", tmp_path / "base"), tmp_path / "out", rank=16, modules=["c_attn"])
    (update,) = open_adapter(tmp_path / "out").values()
    D = moved.transformer.h[0].attn.c_attn.weight - model.transformer.h[0].attn.c_attn.weight
    assert update.shape == (48, 16) and gap(update.dense(), D.T) < SINGLE


def test_an_output_layer_outside_the_blocks_of_gpt2_is_not_turned_around(tmp_path: Path) -> None:
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20, n_positions=8, tie_word_embeddings=False)
    model = GPT2LMHeadModel(config)
    moved = shifted(model)
    moved.save_pretrained(tmp_path / "aligned")
    model.save_pretrained(tmp_path / "base")
    extract((tmp_path / "aligned", tmp_path / "base"), tmp_path / "out", rank=16, modules=["lm_head"])
    (update,) = open_adapter(tmp_path / "out").values()
    assert update.shape == (20, 16) and gap(update.dense(), moved.lm_head.weight - model.lm_head.weight) < SINGLE


@pytest.mark.parametrize("method", ["nlsr", "fgsn", "safelora", "resta"])
def test_it_is_accepted_as_a_reference_for_an_adapter_of_the_base(
    pair: Any, tmp_path: Path, make_pico_lora: Any, method: str
) -> None:
    extract(pair, tmp_path / "out", modules=["q_proj", "v_proj", "down_proj"])
    model = make_pico_lora()
    attacks = rows(4, poisoned=range(4))
    given = {"calibration": attacks, "utility": rows(4), "tokenizer": word_tokenizer(), "progress": False}
    done = plan(model, quick(method=method), reference=tmp_path / "out", judge=refuses_attacks, **given)
    assert done.restored and done.method == ("two_teacher" if method == "nlsr" else method)
    if method == "nlsr":
        with pytest.raises(LineageError, match="was not trained from the reference"):
            plan(model, quick(update="sum"), reference=tmp_path / "out", **given)


# What does not pair up directly


def test_prefixes_that_differ_are_paired_and_noted(pair: Any, tmp_path: Path) -> None:
    base = {name.removeprefix("model."): t for name, t in tensors(pair[1]).items()}
    resave(pair[1], base)
    record = extract(pair, tmp_path / "out")
    assert any("14 tensors have another name in the base model" in note for note in record.notes)
    assert next(iter(open_adapter(tmp_path / "out"))).startswith("model.layers.0")


@pytest.mark.parametrize("doubled", ["aligned", "base"])
def test_prefixes_that_leave_two_choices_are_an_error(pair: Any, tmp_path: Path, doubled: str) -> None:
    """As in a model with a tower for pictures: guessing would pair one tower with the other."""
    aligned, base = tensors(pair[0]), {f"text.{name}": t for name, t in tensors(pair[1]).items()}
    vision = {f"vision.{name}": t.clone() for name, t in aligned.items()}
    resave(pair[0], aligned | (vision if doubled == "aligned" else {}))
    resave(pair[1], base | (vision if doubled == "base" else {}))
    with pytest.raises(IncompatibleError, match=r"cannot be told: .*vision\.model"):
        extract(pair, tmp_path / "out")


def test_tensors_of_blocks_that_are_no_matrices_are_noted(pair: Any, tmp_path: Path) -> None:
    for folder in pair:
        resave(folder, {**tensors(folder), "model.layers.0.mlp.experts.gate_up_proj": torch.rand(2, 8, 32)})
    record = extract(pair, tmp_path / "out")
    assert any("1 tensors are no matrices" in n and "experts.gate_up_proj" in n for n in record.notes)
    assert len(record.modules) == 14


def test_dtypes_that_differ_are_noted_and_subtracted_in_float32(pair: Any, tmp_path: Path) -> None:
    base = {name: t.bfloat16() for name, t in tensors(pair[1]).items()}
    resave(pair[1], base)
    record = extract(pair, tmp_path / "out", rank=32)
    assert any("float32 minus bfloat16" in note for note in record.notes)
    D = oracle.difference(tensors(pair[0]), base, "model.layers.0.self_attn.q_proj.weight")
    assert gap(open_adapter(tmp_path / "out")["model.layers.0.self_attn.q_proj"].dense(), D) < SINGLE


def test_added_vocabulary_rows_are_skipped_with_a_note(pair: Any, tmp_path: Path) -> None:
    aligned = tensors(pair[0])
    aligned["lm_head.weight"] = torch.cat([aligned["lm_head.weight"], torch.ones(6, 32)])
    resave(pair[0], aligned)
    record = extract(pair, tmp_path / "out", rank=32, modules=["lm_head"])
    assert any("lm_head has 70 rows, 64 in the base model" in note for note in record.notes)
    dense = open_adapter(tmp_path / "out")["lm_head"].dense()
    assert dense.shape == (70, 32) and float(dense[64:].abs().max()) < 1e-6
    D = aligned["lm_head.weight"][:64] - tensors(pair[1])["lm_head.weight"]
    assert gap(dense[:64], D) < SINGLE


def test_a_tied_output_layer_is_noted_and_an_untied_one_meets_the_embedding(pair: Any, tmp_path: Path) -> None:
    base = tensors(pair[1])
    del base["lm_head.weight"]
    resave(pair[1], base)
    record = extract(pair, tmp_path / "out", rank=32, modules=["lm_head"])
    assert any("lm_head.weight as model.embed_tokens.weight" in note for note in record.notes)
    aligned = tensors(pair[0])
    D = aligned.pop("lm_head.weight") - base["model.embed_tokens.weight"]
    assert gap(open_adapter(tmp_path / "out")["lm_head"].dense(), D) < SINGLE
    resave(pair[0], aligned)
    edit_config(pair[0], tie_word_embeddings=True)
    record = extract(pair, tmp_path / "tied", modules=["q_proj", "lm_head"])
    assert any("tied" in note for note in record.notes) and len(record.modules) == 2


def test_embeddings_are_skipped_with_a_note(pair: Any, tmp_path: Path) -> None:
    record = extract(pair, tmp_path / "out", modules=["embed_tokens", "v_proj"])
    assert any("embed_tokens is an embedding" in note for note in record.notes) and len(record.modules) == 2
    with pytest.raises(IncompatibleError, match="no linear module is left"):
        extract(pair, tmp_path / "none", modules=["embed_tokens"])


def test_modules_that_are_the_same_are_noted(pair: Any, tmp_path: Path) -> None:
    aligned, base = tensors(pair[0]), tensors(pair[1])
    name = "model.layers.1.mlp.up_proj.weight"
    resave(pair[0], {**aligned, name: base[name]})
    record = extract(pair, tmp_path / "out")
    assert any("1 modules are the same in both models, first model.layers.1.mlp.up_proj" in n for n in record.notes)
    assert not open_adapter(tmp_path / "out")["model.layers.1.mlp.up_proj"].B.any()


# Bad input


def resave(folder: Path, contents: dict[str, torch.Tensor]) -> None:
    """Replace a checkpoint's shards by one file."""
    for path in folder.glob("model*"):
        path.unlink()
    save_file({name: t.contiguous() for name, t in contents.items()}, folder / "model.safetensors")


def other_architecture(aligned: Path, base: Path) -> None:
    edit_config(base, model_type="mistral")


def other_depth(aligned: Path, base: Path) -> None:
    edit_config(base, num_hidden_layers=4)


def other_width(aligned: Path, base: Path) -> None:
    resave(base, {n: t[:, :16] if t.ndim == 2 else t for n, t in tensors(base).items()})


def fused(aligned: Path, base: Path) -> None:
    base_tensors = tensors(base)
    for i in (0, 1):
        parts = [base_tensors.pop(f"model.layers.{i}.self_attn.{p}_proj.weight") for p in "qkv"]
        base_tensors[f"model.layers.{i}.self_attn.qkv_proj.weight"] = torch.cat(parts)
    resave(base, base_tensors)


def missing_shard(aligned: Path, base: Path) -> None:
    sorted(base.glob("model-*.safetensors"))[1].unlink()


def wrong_index(aligned: Path, base: Path) -> None:
    path = base / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    names = sorted(index["weight_map"])
    turned = {name: index["weight_map"][names[-1 - i]] for i, name in enumerate(names)}
    path.write_text(json.dumps({**index, "weight_map": turned}))


def index_outside(aligned: Path, base: Path) -> None:
    path = base / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps({"weight_map": {name: "../x.safetensors" for name in index["weight_map"]}}))


def broken_index(aligned: Path, base: Path) -> None:
    (base / "model.safetensors.index.json").write_text("{")


def no_weight_map(aligned: Path, base: Path) -> None:
    (base / "model.safetensors.index.json").write_text("{}")


def same_values(aligned: Path, base: Path) -> None:
    resave(aligned, tensors(base))


def quantised(aligned: Path, base: Path) -> None:
    resave(base, {n: t.to(torch.int8) for n, t in tensors(base).items()})


def infinite(aligned: Path, base: Path) -> None:
    resave(base, {n: torch.full_like(t, torch.inf) if "q_proj" in n else t for n, t in tensors(base).items()})


def only_pickles(aligned: Path, base: Path) -> None:
    for path in base.glob("model*"):
        path.unlink()
    (base / "pytorch_model.bin").write_bytes(b"x")


def no_weights(aligned: Path, base: Path) -> None:
    for path in base.glob("model*"):
        path.unlink()


BAD: dict[Callable[[Path, Path], None], tuple[type[Exception], str]] = {
    other_architecture: (IncompatibleError, "different architectures: model_type is llama and mistral"),
    other_depth: (IncompatibleError, "num_hidden_layers is 2 and 4"),
    other_width: (IncompatibleError, r"is 32 x 48 in the aligned model and 32 x 16 in the base"),
    fused: (
        IncompatibleError,
        r"lacks 6 of the 14 tensors, first model.layers.0.self_attn.k_proj.*qkv_proj \(fused\)",
    ),
    missing_shard: (CorruptFileError, r"into model-0000\d-of-\d+.safetensors, which is missing; download"),
    wrong_index: (CorruptFileError, "which does not hold it; the index belongs to other files"),
    index_outside: (CorruptFileError, "which is missing"),
    broken_index: (CorruptFileError, "is not JSON"),
    no_weight_map: (CorruptFileError, "holds no weight_map"),
    same_values: (IncompatibleError, "the same values in all 14 modules.*give the model before its alignment"),
    quantised: (IncompatibleError, r"stored as torch.int8 \(quantised\?\)"),
    infinite: (CorruptFileError, "difference in model.layers.0.self_attn.q_proj.weight holds .* infinite"),
    only_pickles: (UnsupportedAdapterError, "only pickled weights"),
    no_weights: (CorruptFileError, "neither model.safetensors nor"),
}


@pytest.mark.parametrize("damage", BAD, ids=lambda damage: damage.__name__)
def test_bad_input_is_an_error_that_says_what_and_where(
    pair: Any, tmp_path: Path, damage: Callable[[Path, Path], None]
) -> None:
    damage(*pair)
    kind, words = BAD[damage]
    with pytest.raises(kind, match=words):
        extract(pair, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_base_that_is_the_aligned_model_leaves_nothing_behind(pair: Any, tmp_path: Path) -> None:
    with pytest.raises(IncompatibleError, match="same values"):
        extract((pair[0], pair[0]), tmp_path / "place" / "out")
    assert list((tmp_path / "place").iterdir()) == []


def test_unknown_modules_are_answered_with_the_known_ones(pair: Any, tmp_path: Path) -> None:
    with pytest.raises(
        IncompatibleError, match=r"matches 'qkv_proj'; its linear modules are down_proj, gate_proj, k_"
    ):
        extract(pair, tmp_path / "out", modules=["qkv_proj"])


def test_a_name_that_is_neither_folder_nor_cached_model_is_an_error(pair: Any, tmp_path: Path) -> None:
    with pytest.raises(PeftNLSRError, match="org/nowhere"):
        extract((pair[0], Path("org/nowhere")), tmp_path / "out")
    with pytest.raises(PeftNLSRError, match="not an existing folder"):
        extract((pair[0], Path("/no/such/folder")), tmp_path / "out")


def test_an_output_that_exists_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        extract((tmp_path / "none", tmp_path / "none"), tmp_path / "out")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        extract((tmp_path / "none", tmp_path / "none"), tmp_path / "out" / "mine.txt")
    with pytest.raises(ValueError, match="rank=0"):
        extract((tmp_path / "none", tmp_path / "none"), tmp_path / "new", rank=0)


def test_the_current_folder_is_an_output_when_it_is_empty(
    pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    extract(pair, Path("."))
    assert len(open_adapter(".")) and not list(tmp_path.glob(".*"))


# From the Hub


def seeded(hub: LocalHub, pair: tuple[Path, Path]) -> tuple[str, str]:
    """Both checkpoints as repositories of a local Hub."""
    for folder in pair:
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        hub.seed(f"org/{folder.name}", files)
    return "org/aligned", "org/base"


def test_hub_ids_give_the_same_reference_and_are_recorded(
    pair: Any, tmp_path: Path, hub: LocalHub, hub_client: Any
) -> None:
    extract(pair, tmp_path / "local", modules=["q_proj"])
    ids: Any = seeded(hub, pair)
    record = extract(ids, tmp_path / "out", modules=["q_proj"])
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("local", "out"))
    assert all(torch.equal(one[key], other[key]) for key in one | other)
    assert (record.aligned, record.base) == ids
    found = open_adapter(tmp_path / "out")
    assert found.info.base_model == "org/base" and models_of(found) == ids  # type: ignore[arg-type]
    shards = [json.loads((f / "model.safetensors.index.json").read_text())["weight_map"] for f in pair]
    needed = {(f.name, shard) for f, m in zip(pair, shards, strict=True) for n, shard in m.items() if "q_proj" in n}
    cached = {(p.parts[-4].rpartition("--")[2], p.name) for p in (tmp_path / "hub_cache").rglob("model-*.safetensors")}
    assert cached == needed != {(f.name, shard) for f, m in zip(pair, shards, strict=True) for shard in m.values()}


def test_a_repository_without_weights_or_that_does_not_exist_is_an_error(
    pair: Any, tmp_path: Path, hub: LocalHub, hub_client: Any
) -> None:
    aligned, _ = seeded(hub, pair)
    hub.seed("org/empty", {"config.json": (pair[0] / "config.json").read_bytes()})
    for base, words in (
        ("org/empty", "org/empty has neither model.safetensors"),
        ("org/none", "'org/none' is not an"),
    ):
        with pytest.raises(PeftNLSRError, match=words):
            extract((aligned, base), tmp_path / "out")  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


# Interruption


class Pulled(Exception):
    """The plug."""


def interrupted(pair: Any, output: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> list[str]:
    """Extract, but pull the plug after some modules; later calls note what they compute."""
    computed: list[str] = []
    original = checkpoints._difference

    def noting(checkpoints_: Any, names: tuple[str, str]) -> torch.Tensor:
        if len(computed) == after:
            raise Pulled
        computed.append(names[0])
        return original(checkpoints_, names)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "_difference", noting)
        with pytest.raises(Pulled):
            extract(pair, output)
    assert not output.exists()
    return computed


def resumed(pair: Any, output: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> list[str]:
    computed: list[str] = []
    original = checkpoints._difference
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "_difference", lambda c, n: (computed.append(n[0]), original(c, n))[1])
        extract(pair, output, **changes)
    return computed


def test_an_interrupted_run_goes_on_and_gives_the_same_files(
    pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract(pair, tmp_path / "once")
    first = interrupted(pair, tmp_path / "out", monkeypatch, 5)
    second = resumed(pair, tmp_path / "out", monkeypatch)
    assert len(first) == 5 and len(second) == 9 and not set(first) & set(second)
    for name in ("adapter_model.safetensors", "adapter_config.json", "safety_reference.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "once" / name).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["aligned", "base", "once", "out"]


@pytest.mark.parametrize("changes", [{"resume": False}, {"rank": 3}], ids=["not wanted", "other settings"])
def test_an_unfinished_run_is_not_gone_on_with_when_it_does_not_fit(
    pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    interrupted(pair, tmp_path / "out", monkeypatch, 5)
    assert len(resumed(pair, tmp_path / "out", monkeypatch, **changes)) == 14


def test_an_unfinished_run_of_other_files_is_not_gone_on_with(
    pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(pair, tmp_path / "out", monkeypatch, 5)
    resave(pair[1], {n: t + 0.01 for n, t in tensors(pair[1]).items()})
    assert len(resumed(pair, tmp_path / "out", monkeypatch)) == 14


# What is written


def test_the_folder_holds_no_machine_path_and_the_record_is_json(pair: Any, tmp_path: Path) -> None:
    record = extract(pair, tmp_path / "out")
    written = tmp_path / "out" / "safety_reference.json"
    assert json.loads(written.read_text()) == json.loads(json.dumps(record.to_dict()))
    assert record.aligned is None and record.base is None
    for path in (tmp_path / "out").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes()


def test_an_adapter_says_whether_it_was_extracted(pair: Any, tmp_path: Path, make_pico_lora: Any) -> None:
    extract(pair, tmp_path / "out")
    assert models_of(open_adapter(tmp_path / "out")) == (None, None)  # type: ignore[arg-type]
    make_pico_lora().save_pretrained(tmp_path / "plain")
    assert models_of(open_adapter(tmp_path / "plain")) is None  # type: ignore[arg-type]


MEASURE = """
import sys, threading, time
from pathlib import Path
import torch
from peft import LoraConfig
from peft_nlsr.checkpoints import extract_reference

torch.set_num_threads(1)
torch.linalg.svd(torch.randn(1100, 64)), torch.linalg.qr(torch.randn(1100, 64))
torch.randn(1100, 1100) @ torch.ones(1100, 9)
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
before, peak = resident(), 0
def watch():
    global peak
    while True:
        peak = max(peak, resident())
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
extract_reference(sys.argv[1], sys.argv[2], sys.argv[3], rank=8, progress=False)
print(peak - before)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_peak_memory_is_below_two_tensors_and_the_result(tmp_path: Path) -> None:
    rows, columns = 3072, 4096
    generator = torch.Generator().manual_seed(0)
    for name in ("aligned", "base"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text('{"model_type": "llama"}')
        for i in (0, 1):
            tensor = {f"model.layers.{i}.mlp.up_proj.weight": torch.rand(rows, columns, generator=generator)}
            save_file(tensor, folder / f"model-0000{i}.safetensors")
        shards = {f"model.layers.{i}.mlp.up_proj.weight": f"model-0000{i}.safetensors" for i in (0, 1)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    arguments = [str(tmp_path / name) for name in ("aligned", "base", "out")]
    done = subprocess.run([sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = (tmp_path / "out" / "adapter_model.safetensors").stat().st_size
    largest = rows * columns * 4
    interpreter = 4 * 2**20  # what it allocates for itself meanwhile differs from run to run
    assert largest < int(done.stdout) < 2 * largest + result + interpreter
