import math
from dataclasses import dataclass

import pytest

from mops_fl.config import (
    METHODS,
    AdapterConfig,
    BackboneConfig,
    DataConfig,
    PretrainConfig,
    TrainConfig,
    read_section,
    section_keys,
)
from mops_fl.errors import InputError


@dataclass(frozen=True)
class Section:
    num_rows: int
    lr: float
    name: str
    resume: bool


GOOD = {"num-rows": 3, "lr": 0.5, "name": "n", "resume": False}


def test_section_is_filled_by_its_kebab_case_keys():
    assert read_section(Section, {**GOOD, "of-another-section": 1}) == Section(3, 0.5, "n", False)


@pytest.mark.parametrize("key", GOOD)
def test_missing_key_is_named(key):
    with pytest.raises(InputError, match=f"no `{key}`"):
        read_section(Section, {k: v for k, v in GOOD.items() if k != key})


def test_int_is_accepted_for_a_float_and_becomes_one():
    lr = read_section(Section, {**GOOD, "lr": 2}).lr
    assert (lr, type(lr)) == (2.0, float)


@pytest.mark.parametrize(
    ("key", "value", "type_name"),
    [
        ("num-rows", True, "int"),
        ("num-rows", 3.0, "int"),
        ("num-rows", "3", "int"),
        ("lr", True, "float"),
        ("lr", "0.1", "float"),
        ("name", 3, "str"),
        ("resume", 1, "bool"),
        ("resume", "true", "bool"),
    ],
)
def test_value_of_another_type_is_refused_by_name(key, value, type_name):
    with pytest.raises(InputError, match=f"`{key}` is {value!r}; it must be of type {type_name}"):
        read_section(Section, {**GOOD, key: value})


def test_section_keys_are_kebab_case():
    assert section_keys(Section, TrainConfig) == {*GOOD, "gate-lr-factor", "batch-size", "local-steps", "local-epochs"}


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        (BackboneConfig, "compression", "sparsegpt"),
        (BackboneConfig, "quantization", "int4"),
        (BackboneConfig, "dtype", "float16"),
        (DataConfig, "dataset", "alpaca"),
        (DataConfig, "loss-on", "prompt"),
        (DataConfig, "num-rows", 1),
        (DataConfig, "server-rows", -1),
        (DataConfig, "max-length", 15),
        (DataConfig, "test-fraction", 0.0),
        (DataConfig, "test-fraction", 1.0),
        (DataConfig, "test-fraction", math.nan),
        (AdapterConfig, "gating", "softmax"),
        (AdapterConfig, "pooling", "mean"),
        (AdapterConfig, "prompt-init", "zero"),
        (AdapterConfig, "inject-layer", -1),
        (AdapterConfig, "num-experts", 0),
        (AdapterConfig, "prompts-per-expert", 0),
        (AdapterConfig, "gate-width", 0),
        (PretrainConfig, "input-prompt-steps", -1),
        (PretrainConfig, "gate-epochs", -1),
        (PretrainConfig, "input-prompt-lr", 0.0),
        (PretrainConfig, "gate-lr", -0.1),
        (TrainConfig, "lr", 0.0),
        (TrainConfig, "lr", math.inf),
        (TrainConfig, "lr", math.nan),
        (TrainConfig, "gate-lr-factor", -0.5),
        (TrainConfig, "gate-lr-factor", math.inf),
        (TrainConfig, "gate-lr-factor", math.nan),
        (TrainConfig, "batch-size", 0),
        (TrainConfig, "local-steps", 0),
        (TrainConfig, "local-epochs", -1),
    ],
)
def test_value_out_of_range_is_refused_by_name(section, key, value, run_config):
    values = run_config()
    read_section(section, values)
    with pytest.raises(InputError, match=key) as refusal:
        read_section(section, {**values, key: value})
    assert str(value) in str(refusal.value)


@pytest.mark.parametrize(
    ("section", "key", "choices"),
    [
        (BackboneConfig, "quantization", ("none", "int8", "nf4")),
        (BackboneConfig, "dtype", ("auto", "bfloat16", "float32")),
        (DataConfig, "loss-on", ("response", "all")),
        (AdapterConfig, "method", METHODS),
        (AdapterConfig, "gating", ("attention", "embedding")),
        (AdapterConfig, "pooling", ("question", "all")),
        (AdapterConfig, "prompt-init", ("random", "vocabulary", "transformed")),
    ],
)
def test_every_choice_is_accepted_and_a_refusal_lists_them(section, key, choices, run_config):
    for choice in choices:
        read_section(section, run_config({key: choice}))
    with pytest.raises(InputError, match=f"`{key}` is 'other'; choose one of: {', '.join(choices)}"):
        read_section(section, run_config({key: "other"}))


def test_number_of_prompts_is_experts_times_prompts_of_each(run_config):
    config = read_section(AdapterConfig, run_config({"num-experts": 3, "prompts-per-expert": 4}))
    assert config.num_prompts == 12


def test_only_mops_has_a_gate(run_config):
    configs = [read_section(AdapterConfig, run_config({"method": method, "num-experts": 3})) for method in METHODS]
    assert {config.method: config.num_gated for config in configs if config.gated} == {"mops": 3}
    assert {config.num_gated for config in configs if not config.gated} == {0}
