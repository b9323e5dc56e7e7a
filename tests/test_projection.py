"""Projections equal their dense forms without ever being formed; the literal one is shown to be a reset of rows."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracles_fgsn as oracle
import pytest
import torch
from oracles import gap, random_factors
from peft import PeftModel
from tiny import factors_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peft_nlsr import IncompatibleError, LowRank, NLSRConfig, Reference
from peft_nlsr.baselines import add_safety_vector
from peft_nlsr.checkpoints import extract_reference
from peft_nlsr.config import CHOICES
from peft_nlsr.fgsn import edit_rows
from peft_nlsr.live_adapter import LiveAdapter
from peft_nlsr.projection import HOW_TO_GET_ONE, Projection, projection_of, read_delta
from peft_nlsr.reference import BASE_REFERENCE
from peft_nlsr.safelora import decide_safelora, project

MakeLora = Callable[..., PeftModel]
NORMALISERS = CHOICES["normaliser"]
D_OUT, D_IN = 12, 17


def low_rank(d_out: int = D_OUT, d_in: int = D_IN, rank: int = 4, scale: float = 2.0, *, seed: int = 0) -> LowRank:
    return LowRank(*random_factors(d_out, d_in, rank, seed=seed), scale)


def dense_of(projection: Projection | None) -> torch.Tensor:
    assert projection is not None
    return projection.times(torch.eye(len(projection.U)))


@pytest.mark.parametrize("normaliser", NORMALISERS)
@pytest.mark.parametrize(("d_out", "d_in"), [(12, 17), (17, 12), (4, 30)], ids=["wide", "tall", "rank is d_out"])
def test_it_is_the_dense_matrix(normaliser: str, d_out: int, d_in: int) -> None:
    delta = low_rank(d_out, d_in)
    config = NLSRConfig(normaliser=normaliser, subspace_share=0.8)
    wanted = oracle.projection(delta.dense(), normaliser, share=0.8)
    assert gap(dense_of(projection_of(delta, config)), wanted) < 1e-5


@pytest.mark.parametrize("share", [0.0, 0.3, 0.75, 1.0])
def test_the_share_counts_singular_values_and_keeps_at_least_one_direction(share: float) -> None:
    delta = low_rank()
    P = dense_of(projection_of(delta, NLSRConfig(subspace_share=share)))
    exact = delta.scale * delta.B.double() @ delta.A.double()
    assert gap(P, oracle.projection(exact, "orthogonal", share=share)) < 1e-5


def test_the_orthogonal_one_is_a_projection_and_the_others_are_not() -> None:
    for normaliser in NORMALISERS:
        P = dense_of(projection_of(low_rank(), NLSRConfig(normaliser=normaliser)))
        assert (gap(P @ P, P) < 1e-5) == (normaliser == "orthogonal"), normaliser


@pytest.mark.parametrize(
    ("normaliser", "factor"), [("orthogonal", 1), ("spectral", 1), ("frobenius", 10), ("literal", 100)]
)
def test_the_size_of_d_matters_only_where_it_is_said_to(normaliser: str, factor: float) -> None:
    config = NLSRConfig(normaliser=normaliser)
    one, other = (dense_of(projection_of(low_rank().times(f), config)) for f in (1.0, 10.0))
    assert gap(other, factor * one) < 1e-5


def test_spectral_never_enlarges() -> None:
    P = dense_of(projection_of(low_rank(), NLSRConfig(normaliser="spectral")))
    assert float(torch.linalg.matrix_norm(P, 2)) == pytest.approx(1.0, rel=1e-5)


def test_literal_resets_rows_to_zero_for_all_practical_purposes() -> None:
    """A delta of a real model's size and magnitude: the projection has no say in what is left."""
    generator = torch.Generator().manual_seed(0)
    delta = LowRank(torch.randn(64, 1024, generator=generator), torch.randn(768, 64, generator=generator), 1e-3 / 8)
    assert float(delta.dense().std()) == pytest.approx(1e-3, rel=0.05)
    B = torch.randn(768, 16, generator=generator)
    left = {n: projection_of(delta, NLSRConfig(normaliser=n)).times(B).norm() / B.norm() for n in NORMALISERS}  # type: ignore[union-attr]
    assert left["literal"] < 1e-5 < left["frobenius"] < left["orthogonal"] < 1


class Largest(TorchDispatchMode):
    """Notes how many entries the largest tensor has that is made inside."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor)]
        self.entries = max(self.entries, *sizes, 0)
        return made


@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_no_method_forms_a_matrix_of_outputs_by_outputs_or_inputs(normaliser: str) -> None:
    d_out, d_in, rank = 120, 90, 3
    tuned, delta = (low_rank(d_out, d_in, rank, seed=seed) for seed in (0, 1))
    config = NLSRConfig(normaliser=normaliser, selection="all", keep_share=0.5)
    with Largest() as seen:
        decide_safelora({"m": tuned}, {"m": delta}, config)
        project(tuned, delta, config)
        add_safety_vector("m", tuned, delta, config)
        projection = projection_of(delta, config)
        assert projection is not None
        edit_rows(tuned, tuned, torch.arange(d_out) < 5, projection, config.kappa)
    assert 0 < seen.entries <= 2 * rank * d_out
    with Largest() as dense:
        tuned.dense()
    assert dense.entries == d_out * d_in


@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_a_delta_of_zero_has_no_projection(normaliser: str) -> None:
    zero = LowRank(torch.randn(4, 9), torch.zeros(7, 4), 1.0)
    assert projection_of(zero, NLSRConfig(normaliser=normaliser)) is None


def test_padding_of_a_delta_adds_no_direction() -> None:
    delta = low_rank()
    padded = LowRank(*(torch.cat([t, 0 * t], dim=d) for t, d in ((delta.A, 0), (delta.B, 1))), delta.scale)
    one, other = (dense_of(projection_of(d, NLSRConfig(subspace_share=1.0))) for d in (delta, padded))
    assert gap(one, other) < 1e-5


def test_half_precision_is_computed_in_float32() -> None:
    delta = low_rank()
    half = LowRank(delta.A.bfloat16(), delta.B.bfloat16(), delta.scale)
    exact = LowRank(half.A.float(), half.B.float(), delta.scale)
    projection = projection_of(half, NLSRConfig())
    assert projection is not None and projection.times(torch.ones(D_OUT, 2).bfloat16()).dtype == torch.float32
    assert gap(dense_of(projection), dense_of(projection_of(exact, NLSRConfig()))) < 1e-5


# The reference it is made from


@pytest.fixture
def adapter(make_pico_lora: MakeLora) -> LiveAdapter:
    return LiveAdapter(make_pico_lora(seed=1))


@pytest.mark.parametrize("nothing", [None, BASE_REFERENCE], ids=["none", "the base model"])
@pytest.mark.parametrize("method", ["fgsn", "safelora", "resta"])
def test_without_a_reference_the_error_says_how_to_get_one(adapter: LiveAdapter, nothing: Any, method: str) -> None:
    with pytest.raises(IncompatibleError) as error:
        read_delta(nothing, adapter, method)
    assert f"method='{method}'" in str(error.value) and HOW_TO_GET_ONE in str(error.value)
    assert "peft-nlsr reference extract --aligned" in HOW_TO_GET_ONE


def test_folders_mappings_and_references_are_read(
    adapter: LiveAdapter, make_pico_lora: MakeLora, tmp_path: Path
) -> None:
    other = make_pico_lora(seed=2)
    other.save_pretrained(tmp_path / "a")
    factors = factors_of(other)
    for source in (tmp_path / "a", str(tmp_path / "a"), factors, Reference("adapter", factors, "mine")):
        found = read_delta(source, adapter, "safelora")
        assert found.updates is not None
        assert all(torch.equal(found.updates[name].B, factors[name].B) for name in adapter)


def test_modules_that_are_missing_or_of_another_shape_are_named(
    adapter: LiveAdapter, make_pico_lora: MakeLora
) -> None:
    less = factors_of(make_pico_lora(target_modules=["q_proj"]))
    with pytest.raises(IncompatibleError, match=r"lacks 4 of the adapter's 6 modules, first model.layers.0.mlp.down"):
        read_delta(less, adapter, "fgsn")
    odd = {name: low_rank() for name in adapter}
    with pytest.raises(IncompatibleError, match=r"has shape \(12, 17\), the adapter's \(32, 48\)"):
        read_delta(odd, adapter, "fgsn")


def test_more_modules_than_the_adapter_has_are_fine(adapter: LiveAdapter, make_pico_lora: MakeLora) -> None:
    more = factors_of(make_pico_lora(target_modules="all-linear"))
    assert read_delta(more, adapter, "fgsn").updates == more


def named(model: PeftModel, base: str) -> LiveAdapter:
    model.peft_config["default"].base_model_name_or_path = base
    return LiveAdapter(model)


def test_an_adapter_of_another_base_is_refused(make_pico_lora: MakeLora, tmp_path: Path) -> None:
    reference = make_pico_lora()
    reference.peft_config["default"].base_model_name_or_path = "org/base"
    reference.save_pretrained(tmp_path / "a")
    read_delta(tmp_path / "a", named(make_pico_lora(), "org/base"), "safelora")
    with pytest.raises(IncompatibleError, match="changed in org/base, the adapter belongs to org/other"):
        read_delta(tmp_path / "a", named(make_pico_lora(), "org/other"), "safelora")


def test_an_extracted_reference_goes_with_adapters_of_both_of_its_models(
    make_pico_lora: MakeLora, pico_llama: Any, tmp_path: Path
) -> None:
    pico_llama.save_pretrained(tmp_path / "base")
    for parameter in pico_llama.parameters():
        parameter.data += 0.1
    pico_llama.save_pretrained(tmp_path / "aligned")
    folder = tmp_path / "out"
    extract_reference(tmp_path / "aligned", tmp_path / "base", folder, rank=2, progress=False)
    pretend_from_hub(folder, "org/aligned", "org/base")
    for base in ("org/aligned", "org/base"):
        assert read_delta(folder, named(make_pico_lora(), base), "safelora").kind == "checkpoints"
    with pytest.raises(IncompatibleError, match="changed in org/aligned and org/base, the adapter belongs to org/ot"):
        read_delta(folder, named(make_pico_lora(), "org/other"), "safelora")


def pretend_from_hub(folder: Path, aligned: str, base: str) -> None:
    """Put Hub ids where an extraction from the Hub would have put them."""
    from safetensors.torch import load_file, save_file

    weights = folder / "adapter_model.safetensors"
    ids = json.dumps({"aligned": aligned, "base": base})
    save_file(load_file(weights), weights, {"peft_nlsr_reference": ids})
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))
