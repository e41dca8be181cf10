"""What SparseGPT and Wanda make of the weights, and what the receipt says of it."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from clients.local_training import ClientRows, train_cohort
from mops_fl import compression
from mops_fl.adapter import initial_state
from mops_fl.backbone import Backbone
from mops_fl.compressed import (
    read_compression_receipt,
)
from mops_fl.compression import inspect_weights
from mops_fl.config import AdapterConfig, DataConfig, TrainConfig, read_section
from mops_fl.data import load_task_data
from mops_fl.encoding import RowEncoder
from mops_fl.errors import InputError
from mops_fl.model import PromptedModel
from mops_fl.pruning import decoder_linears
from mops_fl.quantization import quantize_linears
from mops_fl.recipe import PruningRecipe
from mops_fl.state_cache import StateCache

RECIPES = [
    "sparsegpt:75%",
    "sparsegpt:7:8",
    "sparsegpt:3:4",
    "sparsegpt:2:4",
    "sparsegpt:4:8",
    "wanda:75%",
    "wanda:2:4",
]


def matrices(folder):
    return {
        name: linear.weight for name, linear in decoder_linears(AutoModelForCausalLM.from_pretrained(folder)).items()
    }


@pytest.mark.parametrize("text", RECIPES)
def test_every_matrix_has_the_zeros_of_the_recipe(text, pruned):
    recipe = PruningRecipe.parse(text)
    weights = matrices(pruned(text))
    assert len(weights) == 4 * 7
    for name, weight in weights.items():
        zeros = weight == 0
        assert zeros.float().mean().item() == pytest.approx(recipe.sparsity, abs=0.01), name
        if recipe.group:
            num_zeros, size = recipe.group
            assert (zeros.unflatten(1, (-1, size)).sum(2) == num_zeros).all(), name


def test_embeddings_norms_and_head_stay_as_they_were(pruned, tiny_model):
    found = AutoModelForCausalLM.from_pretrained(pruned("sparsegpt:75%"))
    changed = {name + ".weight" for name in decoder_linears(found)}
    for name, tensor in tiny_model("llama").state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor) == (name not in changed), name


def test_sparsegpt_makes_up_for_what_it_prunes_and_wanda_does_not(pruned, tiny_model):
    dense = decoder_linears(tiny_model("llama"))["model.layers.0.mlp.up_proj"].weight
    kept = {name: matrices(pruned(name))["model.layers.0.mlp.up_proj"] for name in ("sparsegpt:2:4", "wanda:2:4")}
    same = {name: (weight == dense)[weight != 0].float().mean().item() for name, weight in kept.items()}
    assert same["wanda:2:4"] == 1
    assert same["sparsegpt:2:4"] < 0.6


def test_receipt_says_what_the_weights_say(pruned):
    receipt = read_compression_receipt(pruned("sparsegpt:3:4"))
    assert receipt["recipe"] == "sparsegpt:3:4"
    assert receipt["sparsity"] == 0.75
    assert len(receipt["layers"]) == 28
    assert {(layer["sparsity"], layer["pattern"]) for layer in receipt["layers"].values()} == {(0.75, True)}
    assert receipt["calibration"]["rows"] == 7
    assert 7 * 16 < receipt["calibration"]["tokens"] <= 7 * 48
    assert receipt["perplexity"]["rows"] == 28
    assert receipt["perplexity"]["before"] != receipt["perplexity"]["after"]
    matrix_weights = 4 * (32 * 32 * 2 + 32 * 16 * 2 + 32 * 48 * 3)
    sizes = receipt["bytes"]
    assert sizes["dense"] - sizes["sparse"] == matrix_weights * 3 // 4 * 4 - matrix_weights // 8


def test_pattern_that_is_broken_in_one_group_is_seen(tiny_model):
    model = tiny_model("llama")
    with torch.no_grad():
        for linear in decoder_linears(model).values():
            linear.weight[:, ::2] = 0
            linear.weight[7, :4] = 0  # more zeros than the pattern asks for do not break it
        linear.weight[5, 44] = 1
    layers = inspect_weights(model, PruningRecipe.parse("sparsegpt:2:4"))["layers"]
    assert [layer["pattern"] for layer in layers.values()] == [True] * 27 + [False]


def test_pruning_again_gives_the_same_weights_to_the_bit(pruned, tiny_model_folder, cache, press):
    first, second = pruned("sparsegpt:75%"), press(tiny_model_folder, "sparsegpt:75%")
    assert first.name == second.name
    again = matrices(second)
    assert all(torch.equal(weight, again[name]) for name, weight in matrices(first).items())


def test_pruned_model_is_not_pruned_again(pruned, cache, press):
    with pytest.raises(InputError, match="pruned already"):
        press(pruned("sparsegpt:75%"), "wanda:90%")


def test_matrix_that_does_not_divide_into_groups_is_refused(byte_tokenizer, tiny_model, cache, tmp_path, press):
    tiny_model("llama", intermediate_size=36).save_pretrained(tmp_path / "odd")
    byte_tokenizer.save_pretrained(tmp_path / "odd")
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.down_proj has 36 columns"):
        press(tmp_path / "odd", "sparsegpt:7:8")


def test_model_with_experts_is_refused_since_most_of_it_would_stay_dense(
    byte_tokenizer, tiny_model, cache, tmp_path, press
):
    tiny_model("qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16).save_pretrained(
        tmp_path / "moe"
    )
    byte_tokenizer.save_pretrained(tmp_path / "moe")
    with pytest.raises(InputError, match=r"Qwen3MoeForCausalLM has experts.* pruning by sparsegpt:75% would leave"):
        press(tmp_path / "moe", "sparsegpt:75%")
    assert not list(cache.glob("compressed/*"))


def test_without_llmcompressor_one_sentence_says_what_to_install(tiny_model_folder, monkeypatch, press):
    monkeypatch.setattr(compression.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"pip install 'mops-fl\[compress\]'"):
        press(tiny_model_folder, "sparsegpt:75%")


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
def test_weights_stay_as_they_are_to_the_bit_through_training(quantization, pruned, run_config, backbone_config):
    backbone = Backbone.load(backbone_config(pruned("sparsegpt:75%"), "sparsegpt:75%"))
    if quantization != "none":
        quantize_linears(backbone.model.model.layers, quantization)
    before = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    values = run_config({"local-steps": 4, "lr": 0.1})
    adapter, data_config = read_section(AdapterConfig, values), read_section(DataConfig, values)
    data = load_task_data(data_config)
    encoder = RowEncoder(backbone.tokenizer, data_config, data.tasks)
    rows = [encoder.encode(row) for row in data.train[:6]]
    model = PromptedModel(backbone, adapter, torch.randn(3, 32), StateCache(0))
    start = initial_state(adapter, torch.randn(adapter.num_prompts, 32), torch.Generator())
    (result,) = train_cohort(model, start, [ClientRows(rows, (0,))], read_section(TrainConfig, values))
    assert not torch.equal(torch.tensor(result.adapter["prompts"]), start["prompts"])
    after = backbone.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
