"""A live model and its saved folder are the same adapter, and every write is exact or nothing."""

import copy
import json
import logging
import math
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
from conftest import randomise_lora
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from tiny import assert_same_state, state_of
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from peft_nlsr import live_adapter
from peft_nlsr.adapter_folder import AdapterFolder, open_adapter
from peft_nlsr.adapters import Adapter
from peft_nlsr.errors import CorruptFileError, IncompatibleError, PeftNLSRError, UnsupportedAdapterError
from peft_nlsr.live_adapter import LiveAdapter
from peft_nlsr.lowrank import LowRank, add, fingerprint

MakeLora = Callable[..., PeftModel]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
RANKS = {"rank_pattern": {"layers.0.self_attn.q_proj": 6, "v_proj": 3}, "alpha_pattern": {"down_proj": 5}}
SUPPORTED: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "rank-and-alpha-pattern": RANKS,
    "rslora-and-patterns": {"use_rslora": True, **RANKS},
    "lora-bias": {"lora_bias": True},
    "modules-to-save": {"modules_to_save": ["lm_head"]},
    "trainable-tokens": {"trainable_token_indices": [1, 2]},
    "embedding-lora": {"target_modules": ["q_proj", "embed_tokens"]},
    "regex-target": {"target_modules": r".*\.(q_proj|down_proj)"},
    "some-layers": {"layers_to_transform": [1]},
    "layer-replication": {"layer_replication": [[0, 2], [1, 2]]},
    "orthogonal-init": {"init_lora_weights": "orthogonal"},
    "gaussian-init": {"init_lora_weights": "gaussian"},
}
if "alora_invocation_tokens" in LoraConfig.__dataclass_fields__:
    SUPPORTED["alora"] = {"alora_invocation_tokens": [3]}
if hasattr(peft.tuners.lora.config, "VeloraConfig"):
    SUPPORTED["velora"] = {"velora_config": peft.tuners.lora.config.VeloraConfig(num_groups=4)}
if hasattr(peft.tuners.lora.config, "MontecloraConfig"):
    SUPPORTED["monteclora"] = {"monteclora_config": peft.tuners.lora.config.MontecloraConfig()}
EXACT = ["plain", "rslora", "rank-and-alpha-pattern", "rslora-and-patterns", "lora-bias", "modules-to-save"]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def pico_gpt2() -> PeftModel:
    config = GPT2Config(vocab_size=48, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    lora = LoraConfig(r=2, lora_alpha=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, bias="all")
    torch.manual_seed(0)
    model = get_peft_model(GPT2LMHeadModel(config), lora)
    randomise_lora(model, "default", seed=1)
    return model.eval()


@pytest.fixture
def make(make_pico_lora: MakeLora) -> Callable[[str], Any]:
    """A model by the id of its variant."""

    def build(variant: str) -> Any:
        if variant == "conv1d-and-all-biases":
            return pico_gpt2()
        if variant == "mixed-dtypes":
            model = make_pico_lora()
            for name, parameter in model.named_parameters():
                if "lora_A" in name or ("lora_B" in name and "q_proj" in name):
                    parameter.data = parameter.data.to(torch.bfloat16)
            return model
        if variant == "float16":
            return make_pico_lora().half()
        if variant == "native-transformers":
            return native(make_pico_lora)
        return make_pico_lora(**copy.deepcopy(SUPPORTED[variant]))

    return build


def native(make_pico_lora: MakeLora) -> LlamaForCausalLM:
    model = make_pico_lora().get_base_model()
    bare = LlamaForCausalLM(model.config)
    bare.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    randomise_lora(bare, "default", seed=0)
    return bare.eval()


VARIANTS = [*SUPPORTED, "conv1d-and-all-biases", "mixed-dtypes", "float16", "native-transformers"]


def save(model: Any, path: Path) -> Path:
    model.save_pretrained(path)
    return path


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def assert_same_bits(one: Mapping[str, LowRank], other: Mapping[str, LowRank]) -> None:
    assert list(one) == list(other)
    for name in one:
        assert one[name].scale == other[name].scale, name
        for a, b in ((one[name].A, other[name].A), (one[name].B, other[name].B)):
            assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b)), name


def assert_same_tensors(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert set(one) == set(other)
    for key in one:
        assert one[key].dtype == other[key].dtype and torch.equal(bits(one[key]), bits(other[key])), key


def random_like(update: LowRank, *, seed: int, rank: int | None = None, scale: float = 0.7) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    d_out, d_in = update.shape
    rank = rank or update.rank
    A, B = torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator)
    return LowRank(A, B, scale)


def reload(model: PeftModel, path: Path) -> PeftModel:
    base = copy.deepcopy(model).unload()
    return PeftModel.from_pretrained(base, path).eval()


# Reading


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_live_model_and_its_folder_are_the_same_adapter(make: Any, tmp_path: Path, variant: str) -> None:
    model = make(variant)
    live, folder = LiveAdapter(model), AdapterFolder(save(model, tmp_path / "a"))
    assert len(live) > 0
    assert_same_bits(live, folder)
    assert live.info.adapter_name == folder.info.adapter_name == "default"


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_live_config_has_the_content_of_the_saved_file(make: Any, tmp_path: Path, variant: str) -> None:
    model = make(variant)
    live, folder = LiveAdapter(model), AdapterFolder(save(model, tmp_path / "a"))
    for config in (live.info.config, folder.info.config):
        config.pop("auto_mapping")
        # PeftModel.save_pretrained always writes True; transformers writes what is there.
        assert config.pop("inference_mode") or variant == "native-transformers"
        for key, value in config.items():
            config[key] = sorted(value) if isinstance(value, list) else value
    assert live.info.config == folder.info.config


@pytest.mark.parametrize(
    "variant", [v for v in VARIANTS if v not in ("alora", "velora", "monteclora", "mixed-dtypes")]
)
def test_dense_is_what_merging_adds_to_the_base(make: Any, variant: str) -> None:
    model = make(variant)
    live = LiveAdapter(model)
    for name, layer in live.layers.items():
        expected = layer.get_delta_weight("default").float()
        expected = expected.T if getattr(layer, "fan_in_fan_out", False) else expected
        tolerance = 1e-5 if live[name].A.dtype == torch.float32 else 2e-2
        torch.testing.assert_close(live[name].dense(), expected, rtol=tolerance, atol=tolerance)


def test_names_are_those_of_the_base_model_in_natural_order(make_pico_lora: MakeLora, tmp_path: Path) -> None:
    model = make_pico_lora(layer_replication=[[0, 2]] * 6, target_modules=["q_proj", "down_proj"])
    kinds = ["mlp.down_proj", "self_attn.q_proj"]
    expected = [f"model.layers.{layer}.{kind}" for layer in range(12) for kind in kinds]
    assert list(LiveAdapter(model)) == list(AdapterFolder(save(model, tmp_path / "a"))) == expected


OLD_ACCELERATE = pytest.mark.skipif(
    Version(accelerate.__version__) < Version("1.15"), reason="an older accelerate fails to unwrap compiled blocks"
)


@pytest.mark.parametrize("wrap", ["compile", pytest.param("compiled-block", marks=OLD_ACCELERATE), "data-parallel"])
def test_wrappers_do_not_change_names(make_pico_lora: MakeLora, wrap: str) -> None:
    model = make_pico_lora()
    expected = LiveAdapter(model).snapshot()
    wrapped: Any = {"compile": torch.compile, "data-parallel": nn.DataParallel}.get(wrap, nn.Identity())(model)
    if wrap == "compiled-block":
        layers = model.base_model.model.model.layers
        layers[0] = torch.compile(layers[0])
    live = LiveAdapter(wrapped)
    assert live.model is model
    assert_same_bits(live, expected)


@pytest.mark.parametrize("wrapper", ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
def test_wrappers_in_saved_keys_do_not_change_names(make_pico_lora: MakeLora, tmp_path: Path, wrapper: str) -> None:
    folder = save(make_pico_lora(), tmp_path / "a")
    expected = dict(AdapterFolder(folder))
    wrapped = {key.replace("layers.0.", f"layers.0.{wrapper}."): t for key, t in load_file(folder / WEIGHTS).items()}
    save_file({f"{wrapper}.{key}": tensor for key, tensor in wrapped.items()}, folder / WEIGHTS)
    assert_same_bits(AdapterFolder(folder), expected)
    AdapterFolder(folder).save_as(tmp_path / "b", expected)
    assert (folder / WEIGHTS).read_bytes() == (tmp_path / "b" / WEIGHTS).read_bytes()


def test_modules_that_peft_forgets_to_save_are_noticed(make_pico_lora: MakeLora) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = make_pico_lora()
    layers = model.base_model.model.model.layers
    layers[0] = checkpoint_wrapper(layers[0])
    if len(peft.get_peft_model_state_dict(model)) == 12:
        assert len(LiveAdapter(model)) == 6
        return
    with pytest.raises(UnsupportedAdapterError, match=r"would not save.*layers\.0\.mlp\.down_proj.*[Uu]nwrap"):
        LiveAdapter(model)


@pytest.mark.parametrize(
    ("variant", "count", "example"),
    [
        ("plain", 0, None),
        ("lora-bias", 6, "model.layers.1.mlp.down_proj.lora_B.bias"),
        ("modules-to-save", 1, "lm_head.weight"),
        ("trainable-tokens", 1, "model.embed_tokens.token_adapter.trainable_tokens_delta"),
        ("embedding-lora", 2, "model.embed_tokens.lora_embedding_A"),
        ("conv1d-and-all-biases", 13, "transformer.h.0.ln_1.bias"),
    ],
)
def test_what_is_not_a_lora_pair_is_listed(make: Any, variant: str, count: int, example: Any) -> None:
    outside = LiveAdapter(make(variant)).info.outside
    assert len(outside) == count and list(outside) == sorted(outside)
    assert example is None or example in outside


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "embedding-lora"])
def test_outside_is_the_same_from_model_and_folder(make: Any, tmp_path: Path, variant: str) -> None:
    model = make(variant)
    assert LiveAdapter(model).info.outside == AdapterFolder(save(model, tmp_path / "a")).info.outside


def test_a_saved_base_embedding_is_listed(make: Any, tmp_path: Path) -> None:
    assert "model.embed_tokens.base_layer.weight" in AdapterFolder(save(make("embedding-lora"), tmp_path)).info.outside


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B"),
        ("gpt2", "gpt2"),
        ("/home/anna/secret/llama", None),
        ("./llama", None),
        ("C:\\models\\llama", None),
        ("~/models/llama", None),
        ("tests", None),
        ("", None),
        (None, None),
    ],
)
def test_a_local_base_path_is_not_given_away(
    make_pico_lora: MakeLora, tmp_path: Path, base: Any, expected: Any
) -> None:
    model = make_pico_lora(revision="v2")
    folder = save(model, tmp_path / "a")
    edit_config(folder, base_model_name_or_path=base)
    model.peft_config["default"].base_model_name_or_path = base
    for info in (LiveAdapter(model).info, AdapterFolder(folder).info):
        assert (info.base_model, info.revision) == (expected, "v2")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["lora_A", "lora_B"])
@pytest.mark.parametrize("source", ["live", "folder"])
def test_values_that_are_not_finite_are_refused_on_read(
    make_pico_lora: MakeLora, tmp_path: Path, bad: float, side: str, source: str
) -> None:
    model = make_pico_lora()
    name = "model.layers.1.self_attn.v_proj"
    getattr(LiveAdapter(model).layers[name], side)["default"].weight.data[0, 0] = bad
    adapter: Adapter = LiveAdapter(model) if source == "live" else AdapterFolder(save(model, tmp_path / "a"))
    with pytest.raises(CorruptFileError, match=f"{side} of {name} holds 1 NaN"):
        adapter[name]


def test_membership_and_iteration_read_nothing(make_pico_lora: MakeLora, tmp_path: Path) -> None:
    folder = AdapterFolder(save(make_pico_lora(), tmp_path / "a"))
    (tmp_path / "a" / WEIGHTS).unlink()
    assert next(iter(folder)) in folder and "nothing" not in folder and len(folder) == 6


def test_reading_a_live_adapter_leaves_the_model_as_it_was(make_pico_lora: MakeLora) -> None:
    model = make_pico_lora()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    dict(LiveAdapter(model))
    LiveAdapter(model).snapshot()
    assert_same_tensors(model.state_dict(), before)
    assert all(parameter.requires_grad == ("lora_" in name) for name, parameter in model.named_parameters())


# Choosing an adapter


def two_adapters(make_pico_lora: MakeLora) -> PeftModel:
    model = make_pico_lora()
    model.add_adapter("q_proj_x", LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "up_proj"]))
    randomise_lora(model, "q_proj_x", seed=5)
    return model


def test_the_active_adapter_is_the_one_that_is_meant(make_pico_lora: MakeLora) -> None:
    model = two_adapters(make_pico_lora)
    assert LiveAdapter(model).info.adapter_name == "default"
    model.set_adapter("q_proj_x")
    assert LiveAdapter(model).info.adapter_name == "q_proj_x"
    assert {update.rank for update in LiveAdapter(model).values()} == {3}
    assert LiveAdapter(model, "default").info.adapter_name == "default"


def test_only_the_named_adapter_is_written(make_pico_lora: MakeLora) -> None:
    model = two_adapters(make_pico_lora)
    before = LiveAdapter(model, "default").snapshot()
    other = LiveAdapter(model, "q_proj_x")
    other.write({name: random_like(update, seed=2) for name, update in other.items()})
    assert_same_bits(LiveAdapter(model, "default"), before)


def test_growing_one_adapter_leaves_a_shared_config_object_alone(make_pico_lora: MakeLora) -> None:
    model = make_pico_lora()
    model.add_adapter("ref", model.peft_config["default"])
    model.peft_config["ref"] = model.peft_config["default"]
    reference = LiveAdapter(model, "ref").snapshot()
    live = LiveAdapter(model, "default")
    live.write({name: add([update, update]) for name, update in live.items()})
    assert (model.peft_config["default"].r, model.peft_config["ref"].r) == (8, 4)
    assert_same_bits(LiveAdapter(model, "ref"), reference)


def test_several_active_adapters_need_a_name(make_pico_lora: MakeLora) -> None:
    model = two_adapters(make_pico_lora)
    model.base_model.set_adapter(["default", "q_proj_x"])
    with pytest.raises(ValueError, match="2 adapters are active; pass adapter_name, one of default, q_proj_x"):
        LiveAdapter(model)


def test_an_unknown_adapter_name_lists_the_choices(make_pico_lora: MakeLora) -> None:
    with pytest.raises(ValueError, match="no adapter 'other'; it has default"):
        LiveAdapter(make_pico_lora(), "other")


OLD_PEFT = pytest.mark.skipif(Version(peft.__version__) < Version("0.21"), reason="an older PEFT saves wrong keys")


@pytest.mark.parametrize(
    "adapter_name", ["default", "up_proj", *(pytest.param(name, marks=OLD_PEFT) for name in ("lora_A", "weight"))]
)
def test_awkward_adapter_names_do_not_leak_into_module_names(
    make_pico_lora: MakeLora, tmp_path: Path, adapter_name: str
) -> None:
    model = make_pico_lora(adapter_name=adapter_name)
    live = LiveAdapter(model)
    saved = AdapterFolder(save(model, tmp_path) / ("" if adapter_name == "default" else adapter_name))
    assert_same_bits(live, saved)
    assert "model.layers.0.self_attn.q_proj" in live and len(live) == 6


# open_adapter


def test_open_adapter_takes_models_folders_and_named_sub_folders(make_pico_lora: MakeLora, tmp_path: Path) -> None:
    model = two_adapters(make_pico_lora)
    save(model, tmp_path / "a")
    assert isinstance(open_adapter(model), LiveAdapter)
    for adapter_name in ("default", "q_proj_x"):
        from_folder = open_adapter(str(tmp_path / "a"), adapter_name=adapter_name)
        assert isinstance(from_folder, AdapterFolder) and from_folder.info.adapter_name == adapter_name
        assert_same_bits(from_folder, open_adapter(model, adapter_name=adapter_name))


def test_a_folder_of_named_adapters_lists_them(make_pico_lora: MakeLora, tmp_path: Path) -> None:
    save(make_pico_lora(adapter_name="tuned"), tmp_path / "a")
    with pytest.raises(CorruptFileError, match="Pass adapter_name, one of tuned"):
        open_adapter(tmp_path / "a")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        pytest.param("someone/not-cached", "could not be downloaded.*Check the name", id="offline"),
        pytest.param("/no/such/folder", "neither an existing folder nor a Hub id", id="missing-folder"),
        pytest.param("a b", "neither an existing folder nor a Hub id", id="impossible-id"),
    ],
)
def test_what_cannot_be_found_is_one_clear_error(source: str, words: str) -> None:
    with pytest.raises(PeftNLSRError, match=f"(?s){words}"):
        open_adapter(source)


def test_a_revision_of_something_local_is_refused(make_pico_lora: MakeLora, tmp_path: Path) -> None:
    for source in (make_pico_lora(), tmp_path):
        with pytest.raises(ValueError, match="revision 'v1' only goes with a Hub id"):
            open_adapter(source, revision="v1")


# Refusals

REFUSED_LIVE: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "DoRA.*down_proj and 5 more.*convert_to_lora"),
    "pissa": ({"init_lora_weights": "pissa"}, "PiSSA.*proj.*path_initial_model_for_weight_conversion"),
    "pissa-niter": ({"init_lora_weights": "pissa_niter_2"}, "PiSSA.*path_initial_model_for_weight_conversion"),
    "olora": ({"init_lora_weights": "olora"}, "OLoRA.*path_initial_model_for_weight_conversion"),
    "parameters": ({"target_modules": [], "target_parameters": ["q_proj.weight"]}, "target_parameters.*q_proj"),
    "only-embedding": ({"target_modules": ["embed_tokens"]}, "without a LoRA pair.*nothing to realign"),
}
NEWER: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "qalora": ("use_qalora", lambda _: True, "QA-LoRA.*proj"),
    "kasa": ("kasa_config", lambda lora: lora.KasaConfig(), "KaSA.*proj"),
    "bdlora": (
        "use_bdlora",
        lambda lora: lora.BdLoraConfig(
            target_modules_bd_a=["q_proj", "v_proj"], target_modules_bd_b=["down_proj"], nblocks=2
        ),
        "BD-LoRA.*proj",
    ),
}
for _id, (_field, _value, _words) in NEWER.items():
    if _field in LoraConfig.__dataclass_fields__:
        REFUSED_LIVE[_id] = ({_field: _value(peft.tuners.lora.config)}, _words)
if "mica" in str(LoraConfig.__dataclass_fields__["init_lora_weights"].type):
    REFUSED_LIVE["mica"] = ({"init_lora_weights": "mica"}, "MiCA.*proj")


@pytest.mark.parametrize("source", ["live", "folder"])
@pytest.mark.parametrize("variant", REFUSED_LIVE)
def test_refused_variants_name_feature_module_and_next_step(
    make_pico_lora: MakeLora, tmp_path: Path, variant: str, source: str
) -> None:
    settings, words = REFUSED_LIVE[variant]
    model = make_pico_lora(**copy.deepcopy(settings))
    with pytest.raises(UnsupportedAdapterError, match=words):
        open_adapter(model if source == "live" else save(model, tmp_path / "a"))


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        pytest.param({"peft_type": "ADALORA"}, "peft_type ADALORA", id="adalora"),
        pytest.param({"peft_type": "LOHA"}, "peft_type LOHA", id="loha"),
        pytest.param({"peft_type": "XLORA"}, "peft_type XLORA", id="xlora"),
        pytest.param({"peft_type": "IA3"}, "peft_type IA3", id="ia3"),
        pytest.param({"peft_type": "PROMPT_TUNING"}, "peft_type PROMPT_TUNING", id="prompt"),
        pytest.param({"peft_type": None}, "peft_type None", id="no-type"),
        pytest.param({"init_lora_weights": "corda"}, "CorDA.*proj", id="corda"),
        pytest.param({"init_lora_weights": "loftq"}, "LoftQ.*proj", id="loftq"),
        pytest.param({"init_lora_weights": "lora_ga"}, "LoRA-GA.*proj", id="lora-ga"),
        pytest.param({"init_lora_weights": "OLoRA"}, "OLoRA.*proj", id="init-in-capitals"),
        pytest.param({"arrow_config": {"top_k": 2}}, "Arrow.*proj.*one by one", id="arrow"),
        pytest.param({"megatron_config": {"a": 1}}, "Megatron.*proj.*peft-nlsr realign", id="megatron"),
    ],
)
def test_refused_configs_of_folders(make_pico_lora: MakeLora, tmp_path: Path, changes: Any, words: str) -> None:
    edit_config(save(make_pico_lora(), tmp_path / "a"), **changes)
    with pytest.raises(UnsupportedAdapterError, match=words):
        open_adapter(tmp_path / "a")


@pytest.mark.parametrize("init", ["eva", "orthogonal", "gaussian", True, False])
def test_initialisations_that_leave_the_base_alone_are_read(
    make_pico_lora: MakeLora, tmp_path: Path, init: Any
) -> None:
    edit_config(save(make_pico_lora(), tmp_path / "a"), init_lora_weights=init)
    assert len(open_adapter(tmp_path / "a")) == 6


def break_merged(model: Any, layer: Any) -> None:
    model.merge_adapter()


def break_scale(model: Any, layer: Any) -> None:
    layer.set_scale("default", 0.5)


def break_rank(model: Any, layer: Any) -> None:
    model.peft_config["default"].rank_pattern = {"layers.1.self_attn.v_proj": 2}
    model.peft_config["default"].alpha_pattern = {"layers.1.self_attn.v_proj": 4}


def break_meta(model: Any, layer: Any) -> None:
    layer.lora_B["default"].to("meta")


def break_zero3(model: Any, layer: Any) -> None:
    layer.lora_A["default"].weight.data = torch.empty(0)


def break_zero3_persistent(model: Any, layer: Any) -> None:
    layer.lora_A["default"].weight.ds_id = 3


def break_flat(model: Any, layer: Any) -> None:
    layer.lora_A["default"].weight.data = layer.lora_A["default"].weight.data.reshape(-1)


def break_legacy_tp(model: Any, layer: Any) -> None:
    layer._tp_info = object()


def break_dtensor_tp(model: Any, layer: Any) -> None:
    layer.get_base_layer()._hf_tp_plan = "colwise"


def break_alias(model: Any, layer: Any) -> None:
    other = model.base_model.model.model.layers[0].self_attn.v_proj
    layer.lora_A["default"].weight = other.lora_A["default"].weight


def break_shared_module(model: Any, layer: Any) -> None:
    model.base_model.model.model.layers[0].self_attn.v_proj = layer


def break_variant(model: Any, layer: Any) -> None:
    layer.lora_variant["default"] = type("BrandNewVariant", (), {})()


def break_unknown_tensor(model: Any, layer: Any) -> None:
    layer.lora_new = nn.ParameterDict({"default": torch.zeros(1)})


BROKEN = {
    break_unknown_tensor: "lora_new.*layers.1.self_attn.v_proj",
    break_merged: "merged.*proj.*unmerge_adapter",
    break_scale: "rank and scale.*layers.1.self_attn.v_proj.*unscale_layer",
    break_rank: "rank and scale.*layers.1.self_attn.v_proj",
    break_meta: "meta device.*layers.1.self_attn.v_proj.*peft-nlsr realign ADAPTER --patch PATCH -o OUT",
    break_zero3: "ZeRO-3.*layers.1.self_attn.v_proj.*peft-nlsr realign",
    break_zero3_persistent: "ZeRO-3.*layers.1.self_attn.v_proj.*peft-nlsr realign",
    break_flat: "FSDP.*layers.1.self_attn.v_proj.*peft-nlsr realign",
    break_legacy_tp: "tensor parallelism.*layers.1.self_attn.v_proj.*peft-nlsr realign",
    break_dtensor_tp: "tensor parallelism.*layers.1.self_attn.v_proj.*peft-nlsr realign",
    break_alias: "shared.*layers.0.self_attn.v_proj.*layers.1.self_attn.v_proj",
    break_shared_module: "shared.*layers.0.self_attn.v_proj.*layers.1.self_attn.v_proj",
    break_variant: "BrandNewVariant.*layers.1.self_attn.v_proj",
}


@pytest.mark.parametrize("spoil", BROKEN, ids=lambda spoil: spoil.__name__.removeprefix("break_"))
def test_states_of_a_model_that_cannot_be_edited_are_refused(make_pico_lora: MakeLora, spoil: Any) -> None:
    model = make_pico_lora()
    spoil(model, model.base_model.model.model.layers[1].self_attn.v_proj)
    with pytest.raises(UnsupportedAdapterError, match=BROKEN[spoil]):
        LiveAdapter(model)


def test_sharded_parameters_are_refused(make_pico_lora: MakeLora, tmp_path: Path) -> None:
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    model = make_pico_lora()
    linear = model.base_model.model.model.layers[1].self_attn.v_proj.lora_A["default"]
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        linear.weight = nn.Parameter(distribute_tensor(linear.weight.data, init_device_mesh("cpu", (1,))))
        with pytest.raises(UnsupportedAdapterError, match=r"DTensor.*layers\.1.*peft-nlsr realign"):
            LiveAdapter(model)
    finally:
        distributed.destroy_process_group()


class Vision(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, 2)
        self.attention = nn.MultiheadAttention(8, 2)


def test_convolutions_are_refused_live_and_saved(tmp_path: Path) -> None:
    model = get_peft_model(Vision(), LoraConfig(r=2, target_modules=["conv", "head"]))
    for source in (model, save(model, tmp_path / "a")):
        with pytest.raises(UnsupportedAdapterError, match="conv"):
            open_adapter(source)


def test_multihead_attention_is_refused_live_and_read_from_files(tmp_path: Path) -> None:
    model = get_peft_model(Vision(), LoraConfig(r=2, target_modules=["attention"]))
    with pytest.raises(UnsupportedAdapterError, match=r"MultiheadAttention.*attention.*peft-nlsr realign"):
        LiveAdapter(model)
    assert list(AdapterFolder(save(model, tmp_path / "a"))) == ["attention", "attention.base_layer.out_proj"]


def test_tied_factors_are_refused_live_and_saved(tmp_path: Path) -> None:
    if "ensure_weight_tying" not in LoraConfig.__dataclass_fields__:
        pytest.skip("this PEFT has no ensure_weight_tying")
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True)  # fmt: skip
    lora = LoraConfig(r=2, target_modules=["embed_tokens", "lm_head", "q_proj"], ensure_weight_tying=True)
    model = get_peft_model(LlamaForCausalLM(config), lora)
    randomise_lora(model, "default", seed=0)
    for source in (model, save(model, tmp_path / "a")):
        with pytest.raises(UnsupportedAdapterError, match=r"lm_head.*ensure_weight_tying"):
            open_adapter(source)


def test_what_is_no_lora_model_is_refused(pico_llama: LlamaForCausalLM) -> None:
    with pytest.raises(UnsupportedAdapterError, match="has no PEFT adapter"):
        LiveAdapter(pico_llama)
    mixed = get_peft_model(pico_llama, LoraConfig(target_modules=["q_proj"]), mixed=True)
    with pytest.raises(UnsupportedAdapterError, match=r"PeftMixedModel.*PeftModel\.from_pretrained"):
        LiveAdapter(mixed)


@pytest.mark.parametrize("peft_type", ["IA3Config", "LoHaConfig", "AdaLoraConfig"])
def test_other_methods_are_refused_live(pico_llama: LlamaForCausalLM, peft_type: str) -> None:
    extra = {"IA3Config": {"feedforward_modules": []}, "AdaLoraConfig": {"total_step": 9}}.get(peft_type, {})
    model = get_peft_model(pico_llama, getattr(peft, peft_type)(target_modules=["q_proj"], **extra))
    with pytest.raises(UnsupportedAdapterError, match="peft_type"):
        LiveAdapter(model)


# Files that are not what they should be


def spoil_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


FIRST = "base_model.model.model.layers.0.self_attn.q_proj"


def only_text(name: str, text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("spoil", "error", "words"),
    [
        pytest.param(lambda f: (f / CONFIG).unlink(), CorruptFileError, f"no {CONFIG}", id="no-config"),
        pytest.param(lambda f: (f / WEIGHTS).unlink(), CorruptFileError, f"no {WEIGHTS}", id="no-weights"),
        pytest.param(only_text(CONFIG, "{"), CorruptFileError, f"{CONFIG} is not a JSON object", id="config-not-json"),
        pytest.param(only_text(CONFIG, "[]"), CorruptFileError, f"{CONFIG} is not a JSON object", id="config-a-list"),
        pytest.param(
            only_text(WEIGHTS, "x"), CorruptFileError, "not a safetensors file", id="weights-not-safetensors"
        ),
        pytest.param(
            lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-4]),
            CorruptFileError,
            "truncated",
            id="cut",
        ),
        pytest.param(
            lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"),
            UnsupportedAdapterError,
            "pickle.*save_pretrained",
            id="pickle",
        ),
        pytest.param(
            lambda f: spoil_tensors(f, lambda t: t.pop(f"{FIRST}.lora_B.weight")),
            CorruptFileError,
            r"only one of lora_A and lora_B.*layers\.0\.self_attn\.q_proj",
            id="a-without-b",
        ),
        pytest.param(
            lambda f: spoil_tensors(f, lambda t: t.update({f"{FIRST}.lora_new": torch.zeros(1)})),
            UnsupportedAdapterError,
            "lora_new.*q_proj",
            id="unknown-lora-tensor",
        ),
        pytest.param(
            lambda f: spoil_tensors(f, lambda t: t.update({f"{FIRST[17:]}.lora_A.weight": torch.zeros(4, 32)})),
            CorruptFileError,
            "two keys name",
            id="two-keys-for-one-module",
        ),
        pytest.param(lambda f: edit_config(f, r=8), CorruptFileError, "do not have rank 8", id="rank-not-config"),
        pytest.param(lambda f: edit_config(f, r=0), CorruptFileError, "rank 0", id="rank-zero"),
        pytest.param(lambda f: edit_config(f, r="4"), CorruptFileError, "rank '4'", id="rank-text"),
        pytest.param(
            lambda f: spoil_tensors(f, lambda t: t.update({f"{FIRST}.lora_A.weight": torch.zeros(3, 32)})),
            CorruptFileError,
            r"q_proj do not have rank 4",
            id="a-of-another-rank",
        ),
    ],
)
def test_folders_that_are_not_whole_are_refused(
    make_pico_lora: MakeLora, tmp_path: Path, spoil: Any, error: Any, words: str
) -> None:
    spoil(save(make_pico_lora(), tmp_path / "a"))
    with pytest.raises(error, match=words):
        AdapterFolder(tmp_path / "a")


# Writing into a model


@pytest.mark.parametrize("variant", VARIANTS)
def test_writing_a_snapshot_back_is_bit_exact(make: Any, variant: str) -> None:
    live = LiveAdapter(make(variant))
    snapshot = live.snapshot()
    live.write({name: random_like(update, seed=3) for name, update in snapshot.items()})
    assert not torch.equal(live[next(iter(live))].A, snapshot[next(iter(live))].A)
    live.write(snapshot)
    assert_same_bits(live, snapshot)


def test_a_snapshot_does_not_follow_the_model(make_pico_lora: MakeLora) -> None:
    live = LiveAdapter(make_pico_lora())
    snapshot, expected = live.snapshot(), copy.deepcopy(live.snapshot())
    live.write({name: random_like(update, seed=3) for name, update in live.items()})
    assert_same_bits(snapshot, expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_write_changes_the_given_modules_and_nothing_else(make: Any, variant: str) -> None:
    model = make(variant)
    live = LiveAdapter(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    name = list(live)[1]
    new = random_like(live[name], seed=3)
    live.write({name: new})
    tolerance = 1e-5 if live[name].A.dtype == live[name].B.dtype == torch.float32 else 3e-2
    torch.testing.assert_close(live[name].dense(), new.dense(), rtol=tolerance, atol=5 * tolerance)
    assert all(parameter is parameters[key] for key, parameter in model.named_parameters())
    changed = {key for key, value in model.state_dict().items() if not torch.equal(bits(value), bits(before[key]))}
    assert len(changed) == 2 and all(name in key and ("lora_A" in key or "lora_B" in key) for key in changed)


def test_the_model_computes_with_what_was_written(make_pico_lora: MakeLora) -> None:
    model, tokens = make_pico_lora(), torch.arange(8)[None]
    other = make_pico_lora(seed=7, lora_alpha=3)
    with torch.no_grad():
        before, expected = model(tokens).logits, other(tokens).logits
        LiveAdapter(model).write(LiveAdapter(other))
        after = model(tokens).logits
    assert not torch.allclose(before, expected, atol=1e-3)
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-5)


def test_a_smaller_rank_is_padded_and_the_scale_zero_is_the_zero_update(make_pico_lora: MakeLora) -> None:
    live = LiveAdapter(make_pico_lora())
    first, second = list(live)[:2]
    small = random_like(live[first], seed=1, rank=2)
    live.write({first: small})
    live.write({second: live[second].times(0.0)})
    torch.testing.assert_close(live[first].dense(), small.dense())
    assert live[first].rank == 4 and live[second].norm() == 0.0


@pytest.mark.parametrize("count", [1, 6], ids=["one-module", "all-modules"])
def test_an_update_of_rank_zero_is_the_zero_update(make_pico_lora: MakeLora, count: int) -> None:
    live = LiveAdapter(make_pico_lora())
    names = list(live)[:count]
    live.write({name: LowRank(live[name].A[:0], live[name].B[:, :0]) for name in names})
    assert all(live[name].norm() == 0.0 and live[name].rank == 4 for name in names)


def test_updates_that_are_views_of_the_model_are_read_before_it_changes(make_pico_lora: MakeLora) -> None:
    live = LiveAdapter(make_pico_lora())
    first, second = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"
    old = live.snapshot()
    live.write({first: live[second], second: live[first]})
    assert_same_bits({"x": live[first], "y": live[second]}, {"x": old[second], "y": old[first]})


def bad_shape(update: LowRank) -> LowRank:
    return LowRank(update.A[:, 1:], update.B, update.scale)


def not_finite(update: LowRank) -> LowRank:
    return LowRank(update.A * float("nan"), update.B, update.scale)


def too_large(update: LowRank) -> LowRank:
    return LowRank(update.A.float() * 1e6, update.B.float(), update.scale)


SPOILED_UPDATES = [
    pytest.param(bad_shape, IncompatibleError, "down_proj has shape.*expected", id="shape"),
    pytest.param(not_finite, CorruptFileError, "lora_A of .*down_proj.*holds", id="nan"),
    pytest.param(too_large, CorruptFileError, r"lora_A of .*down_proj, cast to torch\.float16, holds", id="overflow"),
]


@pytest.mark.parametrize(("spoil", "error", "words"), SPOILED_UPDATES)
@pytest.mark.parametrize("growing", [False, True], ids=["same-rank", "growing"])
def test_one_bad_update_and_the_model_is_untouched(
    make: Any, spoil: Any, error: Any, words: str, growing: bool
) -> None:
    model = make("float16")
    live = LiveAdapter(model)
    before, parameters = live.snapshot(), dict(model.named_parameters())
    changed = {name: random_like(update, seed=1, rank=8 if growing else 4) for name, update in live.items()}
    last = [name for name in live if name.endswith("down_proj")][-1]
    changed[last] = spoil(changed[last])
    with pytest.raises(error, match=words):
        live.write(changed)
    assert_same_bits(LiveAdapter(model), before)
    assert all(parameter is parameters[key] for key, parameter in model.named_parameters())


def test_an_unknown_module_is_refused_before_anything_changes(make_pico_lora: MakeLora, tmp_path: Path) -> None:
    model = make_pico_lora()
    live = LiveAdapter(model)
    before = live.snapshot()
    changed = {next(iter(live)): random_like(live[next(iter(live))], seed=1), "lm_head": live[next(iter(live))]}
    with pytest.raises(IncompatibleError, match="no LoRA on lm_head; it has 6 modules"):
        live.write(changed)
    assert_same_bits(live, before)
    with pytest.raises(IncompatibleError, match="no LoRA on lm_head"):
        AdapterFolder(save(model, tmp_path / "a")).save_as(tmp_path / "b", changed)
    assert not (tmp_path / "b").exists()


# The exact form of rank 2r


def exact_sums(adapter: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """An update of rank 2r for every second module."""
    return {name: add([adapter[name], random_like(adapter[name], seed=4)]) for name in list(adapter)[::2]}


def dense(adapter: Mapping[str, LowRank]) -> dict[str, Tensor]:
    return {name: update.dense() for name, update in adapter.items()}


def assert_close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("variant", [*EXACT, "conv1d-and-all-biases"])
def test_rank_2r_written_live_survives_saving_and_loading(make: Any, tmp_path: Path, variant: str) -> None:
    model = make(variant)
    live = LiveAdapter(model)
    ranks = {name: update.rank for name, update in live.items()}
    sums = exact_sums(live)
    expected = {**dense(live), **dense(sums)}
    live.write(sums)
    assert {name: update.rank for name, update in live.items()} == {name: 2 * rank for name, rank in ranks.items()}
    assert_close(dense(live), expected)
    assert_close(dense(LiveAdapter(model)), expected)
    loaded = reload(model, save(model, tmp_path / "a"))
    assert_close(dense(LiveAdapter(loaded)), expected)
    with torch.no_grad():
        tokens = torch.arange(8)[None]
        torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", [*EXACT, "conv1d-and-all-biases"])
@pytest.mark.parametrize("multiple", [2, 3])
def test_rank_multiples_saved_as_a_folder_load_in_vanilla_peft(
    make: Any, tmp_path: Path, variant: str, multiple: int
) -> None:
    model = make(variant)
    folder = AdapterFolder(save(model, tmp_path / "a"))
    sums = exact_sums(folder)
    folder.save_as(tmp_path / "b", sums, rank_multiple=multiple)
    expected = {**dense(folder), **dense(sums)}
    assert_close(dense(LiveAdapter(reload(model, tmp_path / "b"))), expected)
    assert_close(dense(AdapterFolder(tmp_path / "b")), expected)
    configs = [json.loads((tmp_path / name / CONFIG).read_text()) for name in "ab"]
    assert set(configs[0]) == set(configs[1])
    different = {key for key in configs[0] if configs[0][key] != configs[1][key]}
    assert {"r", "lora_alpha"} <= different <= {"r", "lora_alpha", "rank_pattern", "alpha_pattern"}
    assert type(configs[1]["lora_alpha"]) is int


@pytest.mark.parametrize("variant", ["plain", "rank-and-alpha-pattern"])
@pytest.mark.parametrize("source", ["live", "folder"])
def test_growing_pads_the_other_modules_without_rounding(make: Any, tmp_path: Path, variant: str, source: str) -> None:
    model = make(variant)
    folder = AdapterFolder(save(model, tmp_path / "a"))
    sums, grown = exact_sums(folder), LiveAdapter(model)
    if source == "live":
        grown.write(sums)
    else:
        folder.save_as(tmp_path / "b", sums, rank_multiple=2)
    after = grown if source == "live" else AdapterFolder(tmp_path / "b")
    for name in set(folder) - set(sums):
        rank = folder[name].rank
        unpadded = LowRank(after[name].A[:rank], after[name].B[:, :rank], after[name].scale)
        assert_same_bits({name: unpadded}, {name: folder[name]})


@pytest.mark.parametrize("variant", EXACT)
def test_a_snapshot_undoes_a_growth_bit_for_bit(make: Any, tmp_path: Path, variant: str) -> None:
    model = make(variant)
    live = LiveAdapter(model)
    save(model, tmp_path / "before")
    snapshot, config = live.snapshot(), live.info.config
    live.write(exact_sums(live))
    live.write(snapshot)
    assert_same_bits(LiveAdapter(model), snapshot)
    assert live.info.config == config
    save(model, tmp_path / "after")
    assert_same_tensors(load_file(tmp_path / "before" / WEIGHTS), load_file(tmp_path / "after" / WEIGHTS))
    before, after = ((tmp_path / name / CONFIG).read_text() for name in ("before", "after"))
    assert json.loads(before) == json.loads(after)


@pytest.mark.parametrize("variant", EXACT)
def test_a_fractional_multiple_undoes_a_growth_of_files_bit_for_bit(make: Any, tmp_path: Path, variant: str) -> None:
    original = AdapterFolder(save(make(variant), tmp_path / "a"))
    original.save_as(tmp_path / "b", exact_sums(original), rank_multiple=2)
    AdapterFolder(tmp_path / "b").save_as(tmp_path / "c", original, rank_multiple=Fraction(1, 2))
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "c" / WEIGHTS).read_bytes()
    assert json.loads((tmp_path / "a" / CONFIG).read_text()) == json.loads((tmp_path / "c" / CONFIG).read_text())


def test_growing_keeps_frozen_parameters_frozen_and_the_layer_consistent(make_pico_lora: MakeLora) -> None:
    model = make_pico_lora(inference_mode=True)
    live = LiveAdapter(model)
    live.write(exact_sums(live))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    for layer in live.layers.values():
        A, B = layer.lora_A["default"], layer.lora_B["default"]
        assert (A.out_features, B.in_features, layer.r["default"], layer.lora_alpha["default"]) == (8, 8, 8, 16)
        layer.set_scale("default", 1.0)
        assert layer.scaling["default"] == 2.0


@pytest.mark.skipif("monteclora" not in SUPPORTED, reason="this PEFT has no MonteCLoRA")
def test_the_sampler_of_monteclora_fixes_the_rank(make: Any, tmp_path: Path) -> None:
    model = make("monteclora")
    live, folder = LiveAdapter(model), AdapterFolder(save(model, tmp_path / "a"))
    with pytest.raises(UnsupportedAdapterError, match="MonteCLoRA"):
        live.write(exact_sums(live))
    with pytest.raises(UnsupportedAdapterError, match="MonteCLoRA"):
        folder.save_as(tmp_path / "b", {}, rank_multiple=2)


# Writing folders


class Computed(Mapping[str, LowRank]):
    """Computes each update on access, counts the accesses, and cannot say cheaply what it contains."""

    def __init__(self, updates: Mapping[str, LowRank]) -> None:
        self.updates, self.accesses = updates, []

    def __getitem__(self, name: str) -> LowRank:
        self.accesses.append(name)
        return self.updates[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.updates)

    def __len__(self) -> int:
        return len(self.updates)


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_changed_is_the_same_bytes(make: Any, tmp_path: Path, variant: str) -> None:
    folder = AdapterFolder(save(make(variant), tmp_path / "a"))
    folder.save_as(tmp_path / "b", {})
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    folder.save_as(tmp_path / "c", dict(folder))
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "c" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "native-transformers"])
def test_a_folder_and_a_model_given_the_same_updates_are_the_same(make: Any, tmp_path: Path, variant: str) -> None:
    model = make(variant)
    live, folder = LiveAdapter(model), AdapterFolder(save(model, tmp_path / "a"))
    input_files = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    changed = Computed({name: random_like(live[name], seed=8) for name in list(live)[1:]})
    folder.save_as(tmp_path / "b", changed)
    assert sorted(changed.accesses) == sorted(changed.updates)
    assert (tmp_path / "b" / CONFIG).read_bytes() == input_files[CONFIG]
    assert input_files == {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    live.write(changed.updates)
    assert_same_bits(AdapterFolder(tmp_path / "b"), live)
    assert_same_tensors(load_file(tmp_path / "b" / WEIGHTS), load_file(save(model, tmp_path / "c") / WEIGHTS))


def test_a_saved_folder_loads_in_vanilla_peft(make_pico_lora: MakeLora, tmp_path: Path) -> None:
    model = make_pico_lora()
    folder = AdapterFolder(save(model, tmp_path / "a"))
    changed = {name: random_like(update, seed=8) for name, update in folder.items()}
    folder.save_as(tmp_path / "b", changed)
    assert_close(dense(LiveAdapter(reload(model, tmp_path / "b"))), dense(changed))


def test_only_small_text_files_travel_and_old_claims_do_not(
    make_pico_lora: MakeLora, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save(make_pico_lora(), tmp_path / "a")
    for name in ("tokenizer.json", "merges.txt", "chat_template.jinja"):
        (folder / name).write_text(name)
    for name in (
        "optimizer.pt",
        "training_args.bin",
        "nlsr_config.json",
        "safety_report.json",
        "nlsr_diff.safetensors",
    ):
        (folder / name).write_text(name)
    (folder / "checkpoint-3").mkdir()
    with caplog.at_level(logging.WARNING):
        AdapterFolder(folder).save_as(tmp_path / "b", {}, extra_files={"README.md": "new", "nlsr_config.json": "{}"})
    found = {path.name: path.read_text() for path in (tmp_path / "b").iterdir() if path.suffix != ".safetensors"}
    config = found.pop(CONFIG)
    assert config == (folder / CONFIG).read_text()
    assert found == {
        "tokenizer.json": "tokenizer.json",
        "merges.txt": "merges.txt",
        "chat_template.jinja": "chat_template.jinja",
        "README.md": "new",
        "nlsr_config.json": "{}",
    }
    assert "checkpoint-3, optimizer.pt, training_args.bin" in caplog.text


def test_finish_sees_the_complete_folder_before_it_appears(make_pico_lora: MakeLora, tmp_path: Path) -> None:
    folder = AdapterFolder(save(make_pico_lora(), tmp_path / "a"))

    def finish(unfinished: Path) -> None:
        assert len(AdapterFolder(unfinished)) == 6 and (unfinished / "note.txt").read_text() == "note"
        assert not (tmp_path / "b").exists()
        (unfinished / "note.txt").write_text("finished")

    folder.save_as(tmp_path / "b", {}, extra_files={"note.txt": "note"}, finish=finish)
    assert (tmp_path / "b" / "note.txt").read_text() == "finished"
    with pytest.raises(ZeroDivisionError):
        folder.save_as(tmp_path / "c", {}, finish=lambda _: 1 // 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_files_of_the_hub_cache_are_followed_and_become_plain(make_pico_lora: MakeLora, tmp_path: Path) -> None:
    blobs = save(make_pico_lora(), tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for path in blobs.iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    AdapterFolder(tmp_path / "snapshot").save_as(tmp_path / "b", {})
    shutil.rmtree(blobs)
    assert len(AdapterFolder(tmp_path / "b")) == 6
    assert not any(path.is_symlink() for path in (tmp_path / "b").iterdir())


@pytest.mark.parametrize(("spoil", "error", "words"), SPOILED_UPDATES)
def test_one_bad_update_and_no_folder_appears(make: Any, tmp_path: Path, spoil: Any, error: Any, words: str) -> None:
    folder = AdapterFolder(save(make("float16"), tmp_path / "a"))
    last = [name for name in folder if name.endswith("down_proj")][-1]
    with pytest.raises(error, match=words):
        folder.save_as(tmp_path / "b", {**dict(folder), last: spoil(folder[last])})
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("output", "options", "error", "words"),
    [
        pytest.param("b", {"rank_multiple": 0}, ValueError, "rank_multiple 0 gives a rank", id="rank-multiple-0"),
        pytest.param("b", {"rank_multiple": Fraction(1, 3)}, ValueError, "1/3 gives a rank", id="rank-not-whole"),
        pytest.param("b", {"rank_multiple": Fraction(1, 2)}, IncompatibleError, "does not fit", id="shrink-unasked"),
        pytest.param("a/b", {}, ValueError, "inside the input", id="output-in-input"),
        pytest.param("a", {}, FileExistsError, "not an empty folder", id="output-is-input"),
        pytest.param("b", {"extra_files": {"../x": ""}}, ValueError, "plain file name", id="extra-file-outside"),
        pytest.param("b", {"extra_files": {CONFIG: ""}}, ValueError, "plain file name", id="extra-file-is-config"),
    ],
)
def test_wrong_arguments_write_nothing(
    make_pico_lora: MakeLora, tmp_path: Path, output: str, options: Any, error: Any, words: str
) -> None:
    folder = AdapterFolder(save(make_pico_lora(), tmp_path / "a"))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(error, match=words):
        folder.save_as(tmp_path / output, {}, **options)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_a_rank_that_does_not_fit_the_files_says_so(make_pico_lora: MakeLora, tmp_path: Path) -> None:
    folder = AdapterFolder(save(make_pico_lora(), tmp_path / "a"))
    with pytest.raises(IncompatibleError, match=r"rank 8, which does not fit into rank 4.*larger rank_multiple"):
        folder.save_as(tmp_path / "b", exact_sums(folder))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("r", None, "r gives rank None, expected a whole number above 0"),
        ("r", 4.0, "r gives rank 4.0, expected a whole number above 0"),
        ("lora_alpha", None, "lora_alpha gives alpha None, expected a finite number"),
        ("lora_alpha", "8", "lora_alpha gives alpha '8', expected a finite number"),
        ("lora_alpha", math.nan, "lora_alpha gives alpha nan, expected a finite number"),
        ("lora_alpha", True, "lora_alpha gives alpha True, expected a finite number"),
        ("alpha_pattern", {"q_proj": None}, r"alpha_pattern\.q_proj gives alpha None, expected a finite number"),
        ("rank_pattern", {"v_proj": 0}, r"rank_pattern\.v_proj gives rank 0, expected a whole number above 0"),
        ("rank_pattern", ["q_proj"], r"rank_pattern is \['q_proj'\], expected an object"),
        ("alpha_pattern", "q_proj", "alpha_pattern is 'q_proj', expected an object"),
    ],
)
def test_a_bad_number_in_the_configuration_is_named(
    make_pico_lora: MakeLora, tmp_path: Path, key: str, value: Any, words: str
) -> None:
    save(make_pico_lora(), tmp_path / "a")
    content = json.loads((tmp_path / "a" / CONFIG).read_text())
    (tmp_path / "a" / CONFIG).write_text(json.dumps({**content, key: value}))
    with pytest.raises(CorruptFileError, match=f"{CONFIG}: {words}"):
        AdapterFolder(tmp_path / "a")


@pytest.mark.parametrize("value", [0, None, "8"])
@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_of_no_module_has_no_effect(make_pico_lora: MakeLora, tmp_path: Path, key: str, value: Any) -> None:
    plain = AdapterFolder(save(make_pico_lora(), tmp_path / "a"))
    before = fingerprint(plain)
    content = json.loads((tmp_path / "a" / CONFIG).read_text())
    (tmp_path / "a" / CONFIG).write_text(json.dumps({**content, key: {"nowhere": value}}))
    folder = AdapterFolder(tmp_path / "a")
    assert fingerprint(folder) == before
    folder.save_as(tmp_path / "b", exact_sums(folder), rank_multiple=2)
    assert json.loads((tmp_path / "b" / CONFIG).read_text())[key] == {"nowhere": value}


# Quantised bases


def test_a_4_bit_base_is_read_written_and_saved(pico_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    pico_llama.save_pretrained(tmp_path / "base")
    quantised = LlamaForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=BitsAndBytesConfig(load_in_4bit=True), device_map="cpu"
    )
    model = get_peft_model(quantised, LoraConfig(r=2, target_modules=["q_proj"]))
    randomise_lora(model, "default", seed=0)
    live = LiveAdapter(model)
    assert all(type(layer).__name__ == "Linear4bit" for layer in live.layers.values())
    new = {name: random_like(update, seed=2) for name, update in live.items()}
    live.write(new)
    assert_close(dense(live), dense(new))
    assert_same_bits(AdapterFolder(save(model, tmp_path / "a")), live)


def test_layers_are_the_lora_layers_of_the_model(make_pico_lora: MakeLora) -> None:
    live = LiveAdapter(make_pico_lora())
    assert list(live.layers) == list(live) and all(isinstance(layer, LoraLayer) for layer in live.layers.values())
    assert live.layers["model.layers.1.mlp.down_proj"] is live.model.base_model.model.model.layers[1].mlp.down_proj


@pytest.mark.parametrize("rank", [4, 8], ids=["same-rank", "growing"])
@pytest.mark.parametrize("stop_after", [0, 1, 6, 7, 11])
def test_an_interrupt_while_writing_leaves_everything_as_it_was(
    make_pico_lora: MakeLora, monkeypatch: pytest.MonkeyPatch, rank: int, stop_after: int
) -> None:
    model = make_pico_lora()
    before, parameters = state_of(model), dict(model.named_parameters())
    adapter = LiveAdapter(model)
    updates = {name: random_like(update, seed=1, rank=rank) for name, update in adapter.items()}
    store, calls = live_adapter._store, iter(range(99))

    def interrupted(linear: Any, new: Tensor) -> None:
        store(linear, new)
        if next(calls) == stop_after:
            raise KeyboardInterrupt

    monkeypatch.setattr(live_adapter, "_store", interrupted)
    with pytest.raises(KeyboardInterrupt):
        adapter.write(updates)
    assert_same_state(state_of(model), before)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())


def test_an_interrupt_while_the_rank_is_noted_leaves_everything_as_it_was(
    make_pico_lora: MakeLora, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_pico_lora()
    before, peft_config = state_of(model), model.peft_config["default"]
    adapter = LiveAdapter(model)
    updates = {name: random_like(update, seed=1, rank=8) for name, update in adapter.items()}
    real, calls = live_adapter.rank_and_scale_of, iter(range(99))

    def interrupted(config: Mapping[str, Any], name: str) -> Any:
        if config["r"] == 8 and next(calls) == 8:
            raise KeyboardInterrupt
        return real(config, name)

    monkeypatch.setattr(live_adapter, "rank_and_scale_of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        adapter.write(updates)
    assert_same_state(state_of(model), before)
    assert model.peft_config["default"] is peft_config
    assert {name: (layer.r, layer.scaling) for name, layer in adapter.layers.items()} == {
        name: ({"default": 4}, {"default": 2.0}) for name in adapter
    }
