"""Settings: valid or refused with their name, the same after a round trip, and never lost beside a record."""

import dataclasses
import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest

from peft_nlsr import CorruptFileError, NLSRConfig, PeftNLSRError
from peft_nlsr.config import CHOICES, CONFIG_NAME, PRESETS, SCHEMA_VERSION

FIELDS = {field.name: field for field in dataclasses.fields(NLSRConfig)}
# Field -> (lowest, highest, whether the highest itself is valid), as the documentation has them.
RANGES: dict[str, tuple[float, float, bool]] = {
    "beta": (0.0, math.inf, False),
    "sparsity": (0.0, 1.0, False),
    "restore_rate": (0.0, 1.0, True),
    "prune_probability": (0.0, 1.0, True),
    "prune_increment": (0.0, 1.0, True),
    "similarity_threshold": (-1.0, 1.0, True),
    "utility_weight": (0.0, math.inf, False),
    "decision_weight": (0.0, math.inf, False),
    "lookalike_weight": (1e-6, 1e3, True),
    "ridge": (1e-12, 1e3, True),
    "kappa": (0.0, 1.0, True),
    "subspace_share": (0.0, 1.0, True),
    "safety_layer_share": (0.0, 1.0, True),
    "harmful_rows": (0.0, 1.0, True),
    "utility_rows": (0.0, 1.0, True),
    "safety_weight": (0.0, math.inf, False),
    "keep_share": (1e-3, 1.0, True),
    "answer_tokens": (1, 2**31, True),
    "max_samples": (1, 2**31, True),
    "max_tokens": (1, 2**31, True),
    "max_length": (2, 2**31, True),
    "nlsr_batch_size": (1, 2**31, True),
    "nlsr_seed": (0, 2**63 - 1, True),
}
WHOLE = ("answer_tokens", "max_samples", "max_tokens", "max_length", "nlsr_batch_size", "nlsr_seed")
SWITCHES = ("sequential", "compress", "correct_drift", "screening", "leave_intact")
TEXTS = ("safety_layers", "safety_dimension")


def above(name: str) -> float:
    high, included = RANGES[name][1:]
    return high if not included else high + 1


def below(name: str) -> float:
    low = RANGES[name][0]
    return low - 1 if name in WHOLE or low <= 0 else low / 10


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_names_itself_and_sets_what_it_lists(preset: str) -> None:
    config = NLSRConfig.from_preset(preset)
    assert config.preset == preset
    assert {name: getattr(config, name) for name in PRESETS[preset]} == PRESETS[preset]
    rest = set(FIELDS) - set(PRESETS[preset]) - {"preset"}
    assert {name: getattr(config, name) for name in rest} == {name: FIELDS[name].default for name in rest}


def test_the_default_preset_is_the_default() -> None:
    assert NLSRConfig.from_preset("default") == NLSRConfig()


def test_a_field_can_be_changed_on_top_of_a_preset() -> None:
    config = NLSRConfig.from_preset("paper", sparsity=0.7)
    assert config == NLSRConfig.from_preset("paper").replace(sparsity=0.7) and config.sparsity == 0.7


@pytest.mark.parametrize("score", CHOICES["score"])
def test_the_released_preset_has_the_unit_that_the_release_gives_each_score(score: str) -> None:
    rows = {"wanda", "snip", "preference_snip", "random"}  # per row in the released code; magnitude is not in it
    assert NLSRConfig.from_preset("released", score=score).mask_unit == ("row" if score in rows else "tensor")
    assert NLSRConfig.from_preset("released", score=score, mask_unit="tensor").mask_unit == "tensor"
    assert NLSRConfig.from_preset("released").replace(score=score).mask_unit == "tensor"
    assert NLSRConfig.from_preset("paper", score=score).mask_unit == "tensor"


def test_an_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'papr' is not one of default, paper, released"):
        NLSRConfig.from_preset("papr")


def test_settings_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        NLSRConfig().beta = 1.0  # type: ignore[misc]


def test_every_field_has_help_and_is_checked() -> None:
    assert all(field.metadata["help"] for field in FIELDS.values())
    assert set(FIELDS) == {*CHOICES, *RANGES, *SWITCHES, *TEXTS}


def test_no_field_has_the_name_of_a_training_argument() -> None:
    from transformers import TrainingArguments

    assert not set(FIELDS) & {field.name for field in dataclasses.fields(TrainingArguments)}


@pytest.mark.parametrize("text", ["auto", "0", "3,5,7-9", "10-15"])
def test_layers_are_auto_or_numbers_and_ranges(text: str) -> None:
    assert NLSRConfig(safety_layers=text).safety_layers == text


@pytest.mark.parametrize("value", ["", "first", "3,", "1-2-3", "-1", "3 5", 3, None, [1]], ids=repr)
def test_other_layers_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"safety_layers=.* must be auto or like 10-15 or 3,5,7-9"):
        NLSRConfig(safety_layers=value)


@pytest.mark.parametrize("value", ["", " ", 3, None], ids=repr)
def test_a_dimension_needs_a_name(value: Any) -> None:
    with pytest.raises(ValueError, match=r"safety_dimension=.* must be a name"):
        NLSRConfig(safety_dimension=value)


@pytest.mark.parametrize("name", CHOICES)
def test_an_unknown_choice_is_refused_with_the_valid_ones(name: str) -> None:
    with pytest.raises(ValueError) as error:
        NLSRConfig(**{name: "nonsense"})
    assert f"{name}='nonsense' is not one of {', '.join(CHOICES[name])}" == str(error.value)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in CHOICES.items() for value in values])
def test_every_choice_is_accepted(name: str, value: str) -> None:
    assert getattr(NLSRConfig(**{name: value}), name) == value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(pytest.param(name, above(name), id=f"{name}-above") for name in RANGES),
        *(pytest.param(name, below(name), id=f"{name}-below") for name in RANGES),
        *(pytest.param(name, math.nan, id=f"{name}-nan") for name in RANGES if name not in WHOLE),
    ],
)
def test_a_number_out_of_range_is_refused_with_name_value_and_range(name: str, value: float) -> None:
    low, high, included = RANGES[name]
    with pytest.raises(ValueError) as error:
        NLSRConfig(**{name: value})
    assert f"{name}={value!r} must be in [{low}, {high}{']' if included else ')'}" == str(error.value)


@pytest.mark.parametrize("name", RANGES)
def test_the_ends_of_a_range_are_accepted_where_they_belong_to_it(name: str) -> None:
    low, high, included = RANGES[name]
    assert getattr(NLSRConfig(**{name: low}), name) == low
    if included:
        assert getattr(NLSRConfig(**{name: high}), name) == high


@pytest.mark.parametrize("value", ["1", None, True, [1]], ids=repr)
@pytest.mark.parametrize("name", RANGES)
def test_what_is_no_number_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name}=.* must be a(?: whole)? number"):
        NLSRConfig(**{name: value})


@pytest.mark.parametrize("name", WHOLE)
def test_a_fraction_is_no_whole_number(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}=2\.5 must be a whole number"):
        NLSRConfig(**{name: 2.5})


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_is_true_or_false_and_nothing_else(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=1 must be true or false"):
        NLSRConfig(**{name: 1})


# ---- JSON


@pytest.mark.parametrize("preset", PRESETS)
def test_json_round_trip(preset: str) -> None:
    config = NLSRConfig.from_preset(preset, beta=0.25, nlsr_seed=7)
    text = json.dumps(config.to_dict(), allow_nan=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert NLSRConfig.from_dict(json.loads(text)) == config


def test_unknown_keys_warn_by_name_and_the_rest_is_read() -> None:
    values = {**NLSRConfig(beta=0.5).to_dict(), "zeta": 1, "eta": 2}
    with pytest.warns(UserWarning, match=rf"unknown keys eta, zeta \(schema {SCHEMA_VERSION}\); upgrade peft_nlsr"):
        assert NLSRConfig.from_dict(values) == NLSRConfig(beta=0.5)
    assert "zeta" in values and "schema_version" in values


@pytest.mark.parametrize(("version", "advice"), [(SCHEMA_VERSION + 1, "upgrade peft_nlsr"), ("1", "write it again")])
def test_settings_of_another_schema_are_refused(tmp_path: Path, version: Any, advice: str) -> None:
    values = {**NLSRConfig().to_dict(), "schema_version": version, "zeta": 1}
    words = f"found schema_version {version!r} in these settings, this version of peft_nlsr reads {SCHEMA_VERSION}"
    with pytest.raises(CorruptFileError, match=rf"{words}; {advice}"):
        NLSRConfig.from_dict(values)
    (tmp_path / CONFIG_NAME).write_text(json.dumps({"config": values}))
    with pytest.raises(CorruptFileError, match=rf"{CONFIG_NAME}: {words}"):
        NLSRConfig.from_pretrained(tmp_path)


def test_a_value_out_of_range_in_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / CONFIG_NAME).write_text(json.dumps({"config": {"sparsity": 1.5}}))
    with pytest.raises(ValueError, match=r"sparsity=1\.5 must be in \[0\.0, 1\.0\)"):
        NLSRConfig.from_pretrained(tmp_path)


def test_saved_settings_are_read_back(tmp_path: Path) -> None:
    config = NLSRConfig.from_preset("released", max_samples=3)
    assert config.save_pretrained(tmp_path / "new") == tmp_path / "new" / CONFIG_NAME
    assert NLSRConfig.from_pretrained(tmp_path / "new") == NLSRConfig.from_pretrained(str(tmp_path / "new")) == config
    assert [path.name for path in (tmp_path / "new").iterdir()] == [CONFIG_NAME]


def test_saving_keeps_the_record_beside_its_settings_and_refuses_others(tmp_path: Path) -> None:
    record = {"fingerprint_after": "abc", "method": "sum"}
    (tmp_path / CONFIG_NAME).write_text(json.dumps({"config": NLSRConfig().to_dict(), "record": record}))
    NLSRConfig().save_pretrained(tmp_path)
    before = (tmp_path / CONFIG_NAME).read_text()
    assert json.loads(before)["record"] == record
    with pytest.raises(PeftNLSRError, match="holds the record of a realignment that was made with other settings"):
        NLSRConfig(beta=0.1).save_pretrained(tmp_path)
    assert (tmp_path / CONFIG_NAME).read_text() == before


LABELS = {
    "default": NLSRConfig(),
    "default, 1 setting changed": NLSRConfig(beta=0.5),
    "paper": NLSRConfig.from_preset("paper"),
    "paper, 2 settings changed": NLSRConfig.from_preset("paper", sparsity=0.7, compress=False),
    "paper, 5 settings changed": NLSRConfig(preset="paper"),
    "released, 1 setting changed": NLSRConfig.from_preset("released", update="sum"),
    "released, 1 setting changed ": NLSRConfig.from_preset("released", score="wanda"),
    "released, 2 settings changed": NLSRConfig.from_preset("released", score="wanda", mask_unit="tensor"),
}


@pytest.mark.parametrize(("label", "config"), LABELS.items(), ids=LABELS)
def test_a_preset_whose_settings_were_changed_does_not_go_by_its_name_alone(label: str, config: NLSRConfig) -> None:
    assert config.preset_label == label.strip()
    assert NLSRConfig.from_preset(config.preset, **config.changed_settings()) == config


@pytest.mark.parametrize("update", ["sum", "swap", "least_squares"])
def test_what_auto_came_to_is_no_change_of_the_preset(update: str) -> None:
    assert NLSRConfig(update=update).preset_label == "default"


@pytest.mark.parametrize("source", ["user/not-cached", "/no/such/folder", "a b"])
def test_settings_that_cannot_be_found_are_one_clear_error(source: str) -> None:
    with pytest.raises(PeftNLSRError, match=f"no settings at '{source}': no such folder, and from the Hub"):
        NLSRConfig.from_pretrained(source)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param("{", "is not JSON", id="broken"),
        pytest.param("[1]", "a JSON list, expected an object", id="list"),
        pytest.param("{}", r"no 'config' object, found the keys \(none\)", id="empty"),
        pytest.param('{"record": {}}', "no 'config' object, found the keys record", id="record-only"),
        pytest.param('{"config": 3}', "no 'config' object", id="config-is-a-number"),
    ],
)
def test_a_file_that_holds_no_settings_is_refused_with_its_name(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / CONFIG_NAME).write_text(text)
    with pytest.raises(CorruptFileError, match=words) as error:
        NLSRConfig.from_pretrained(tmp_path)
    assert str(tmp_path / CONFIG_NAME) in str(error.value)


@pytest.mark.parametrize("text", ["{", "[1]"], ids=["broken", "list"])
def test_a_file_that_is_not_understood_is_not_overwritten(tmp_path: Path, text: str) -> None:
    (tmp_path / CONFIG_NAME).write_text(text)
    with pytest.raises(CorruptFileError, match=CONFIG_NAME):
        NLSRConfig().save_pretrained(tmp_path)
    assert (tmp_path / CONFIG_NAME).read_text() == text


def test_a_folder_without_settings_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(PeftNLSRError, match=CONFIG_NAME):
        NLSRConfig.from_pretrained(tmp_path)
