import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from clients.local_training import ClientRows, train_cohort
from clients.trainer import Trainer
from mops_fl import compressed, compression
from mops_fl.adapter import initial_state
from mops_fl.backbone import Backbone
from mops_fl.compressed import (
    COMPRESSION_RECEIPT,
    NotPrunedError,
    SeveralPrunedError,
    calibrated_on,
    compressed_path,
    fingerprint,
    prefer_with_weights,
    resolve_model,
    weights_sha256,
)
from mops_fl.compression import Calibration, compress, compression_key, inspect_weights, split_server_rows
from mops_fl.config import AdapterConfig, BackboneConfig, DataConfig, TrainConfig, read_section
from mops_fl.data import load_task_data
from mops_fl.encoding import RowEncoder
from mops_fl.errors import InputError
from mops_fl.model import PromptedModel
from mops_fl.pruning import decoder_linears
from mops_fl.quantization import quantize_linears
from mops_fl.recipe import PruningRecipe
from mops_fl.state_cache import StateCache

CALIBRATION = Calibration(num_rows=7, max_length=48)
RECIPES = [
    "sparsegpt:75%",
    "sparsegpt:7:8",
    "sparsegpt:3:4",
    "sparsegpt:2:4",
    "sparsegpt:4:8",
    "wanda:75%",
    "wanda:2:4",
]


@pytest.fixture(scope="module")
def pruned(tiny_model_folder, run_config, tmp_path_factory):
    """``pruned(recipe)``: the folder that it makes of the tiny Llama, each made once, in a cache of their own."""
    cache = tmp_path_factory.mktemp("cache")
    folders = {}

    def make(recipe):
        if recipe not in folders:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("MOPS_CACHE", str(cache))
                folders[recipe] = press(tiny_model_folder, run_config, recipe)
        return folders[recipe]

    return make


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOPS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def press(model_folder, run_config, recipe, calibration=CALIBRATION, **overrides):
    config = read_section(DataConfig, run_config(overrides))
    data = load_task_data(config)
    return compress(str(model_folder), PruningRecipe.parse(recipe), data, config, calibration, lambda _: None)


def receipt_of(folder):
    return json.loads((folder / COMPRESSION_RECEIPT).read_text())


def matrices(folder):
    return {
        name: linear.weight for name, linear in decoder_linears(AutoModelForCausalLM.from_pretrained(folder)).items()
    }


def config_of(backbone, compression="none", quantization="none"):
    return BackboneConfig(str(backbone), compression, quantization, dtype="float32", gate_embedding="backbone")


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
    receipt = receipt_of(pruned("sparsegpt:3:4"))
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


def test_calibration_and_measurement_rows_are_the_servers_and_no_others(run_config):
    data = load_task_data(read_section(DataConfig, run_config()))
    calibration, measured = split_server_rows(data, 7)
    server, others = set(data.server), {row.row_id for row in data.train + data.test}
    assert len(calibration) == 7
    assert len(measured) == 28
    assert {*calibration, *measured} <= server
    assert not {row.row_id for row in (*calibration, *measured)} & others
    assert not set(calibration) & set(measured)
    assert {row.task for row in calibration} == set(data.tasks)


def test_pruning_sees_exactly_the_calibration_rows(tiny_model_folder, run_config, cache, monkeypatch):
    seen = []
    monkeypatch.setattr(compression, "prune", lambda *args: seen.append(args[3]) or ({}, []))
    folder = press(tiny_model_folder, run_config, "sparsegpt:75%")
    config = read_section(DataConfig, run_config({"max-length": 48}))
    data = load_task_data(config)
    tokenizer = Backbone.load(config_of(tiny_model_folder)).tokenizer
    rows = split_server_rows(data, 7)[0]
    expected = [RowEncoder(tokenizer, config, data.tasks).encode(row).token_ids.tolist() for row in rows]
    assert [ids.tolist() for ids in seen[0]] == expected
    calibration = receipt_of(folder)["calibration"]
    assert calibration["rows-sha256"] == [row.sha256 for row in rows]
    assert (calibration["dataset"], calibration["data-sha256"]) == ("dolly", data.sha256)


def test_model_that_was_calibrated_on_test_rows_is_refused(tiny_model_folder, run_config, cache, monkeypatch):
    monkeypatch.setattr(compression, "prune", lambda *_: ({}, []))
    folder = press(tiny_model_folder, run_config, "wanda:75%", Calibration(num_rows=30, max_length=48))
    wanted = {"backbone": str(folder), "compression": "wanda:75%"}
    Trainer(run_config(wanted)).setting()
    with pytest.raises(InputError, match=r"pruned by wanda:75%@\w+ was calibrated on \d+ of the rows .* measured on"):
        Trainer(run_config({**wanted, "data-seed": 1})).setting()
    receipt = receipt_of(folder)
    del receipt["calibration"]["rows-sha256"]
    (folder / COMPRESSION_RECEIPT).write_text(json.dumps(receipt))
    Trainer(run_config({**wanted, "data-seed": 1})).setting()


def test_model_that_was_calibrated_on_rows_of_the_runs_server_is_taken_and_no_other(
    tiny_model_folder, run_config, cache, monkeypatch
):
    monkeypatch.setattr(compression, "prune", lambda *_: ({}, []))
    config = config_of(tiny_model_folder, "wanda:75%")
    data = [load_task_data(read_section(DataConfig, run_config({"data-seed": seed}))) for seed in range(3)]
    made = [press(tiny_model_folder, run_config, "wanda:75%", **{"data-seed": seed}) for seed in range(2)]
    assert [resolve_model(calibrated_on(own, config)) for own in data[:2]] == made
    for foreign in (data[2], replace(data[0], server=data[0].server[:10])):
        with pytest.raises(NotPrunedError, match="pruned by wanda:75% on other rows than those of this run's server"):
            calibrated_on(foreign, config)
    named = replace(config, compression=f"wanda:75%@{receipt_of(made[0])['key']}")
    assert calibrated_on(data[2], named) == named
    # A client with rows of its own does not have the server's, and takes what there is if that is one.
    client = replace(data[0], server=())
    with pytest.raises(SeveralPrunedError, match="pruned by wanda:75% more than once"):
        resolve_model(calibrated_on(client, config))
    shutil.rmtree(made[1])
    assert resolve_model(calibrated_on(client, config)) == made[0]


def test_of_several_models_of_a_recipe_an_adapter_finds_the_one_with_its_weights(
    tiny_model_folder, run_config, cache, monkeypatch
):
    config = config_of(tiny_model_folder, "wanda:75%")
    monkeypatch.setattr(compression, "prune", lambda *_: ({}, []))
    made = [press(tiny_model_folder, run_config, "wanda:75%", **{"data-seed": seed}) for seed in range(2)]
    weights = load_file(made[1] / "model.safetensors")
    save_file({**weights, "model.norm.weight": weights["model.norm.weight"] + 1}, made[1] / "model.safetensors")
    for folder in made:
        assert resolve_model(prefer_with_weights(weights_sha256(folder), config)) == folder
    with pytest.raises(SeveralPrunedError):
        resolve_model(prefer_with_weights("of another model", config))


@pytest.mark.parametrize("num_rows", [0, 35, 100])
def test_too_few_rows_to_calibrate_and_measure_are_refused(num_rows, run_config):
    data = load_task_data(read_section(DataConfig, run_config()))
    with pytest.raises(InputError, match=f"{num_rows} calibration rows are asked for and the server has 35"):
        split_server_rows(data, num_rows)


def test_same_inputs_are_pruned_once(tiny_model_folder, run_config, cache, monkeypatch):
    calls = []
    monkeypatch.setattr(compression, "prune", lambda *args: calls.append(args) or ({}, []))
    first = press(tiny_model_folder, run_config, "sparsegpt:75%")
    assert press(tiny_model_folder, run_config, "sparsegpt:75%") == first
    assert len(calls) == 1


def test_pruning_again_gives_the_same_weights_to_the_bit(pruned, tiny_model_folder, run_config, cache):
    first, second = pruned("sparsegpt:75%"), press(tiny_model_folder, run_config, "sparsegpt:75%")
    assert first.name == second.name
    again = matrices(second)
    assert all(torch.equal(weight, again[name]) for name, weight in matrices(first).items())


def test_key_changes_with_everything_that_the_weights_depend_on(monkeypatch):
    recipe, rows = PruningRecipe.parse("sparsegpt:75%"), [torch.arange(3), torch.arange(2)]
    keys = [
        compression_key("model", recipe, rows),
        compression_key("other", recipe, rows),
        compression_key("model", PruningRecipe.parse("sparsegpt:3:4"), rows),
        compression_key("model", recipe, rows[:1]),
        compression_key("model", recipe, [torch.arange(3), torch.arange(3)]),
    ]
    monkeypatch.setattr(compression, "version", lambda name: "0")
    keys.append(compression_key("model", recipe, rows))
    assert len(set(keys)) == 6


def test_fingerprint_changes_with_a_weight(tiny_model_folder, tmp_path, tiny_model):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-6
    model.save_pretrained(tmp_path)
    assert fingerprint(tmp_path) != fingerprint(tiny_model_folder)
    assert fingerprint(tiny_model_folder) == fingerprint(tiny_model_folder)


def test_model_without_safetensors_has_no_fingerprint(tiny_model_folder, tmp_path):
    shutil.copy(tiny_model_folder / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"weights")
    with pytest.raises(InputError, match="no weights in safetensors"):
        fingerprint(tmp_path)


def test_failure_leaves_nothing_that_could_be_taken_for_a_model(tiny_model_folder, run_config, cache, monkeypatch):
    def fail(*_):
        raise RuntimeError("the machine went away")

    monkeypatch.setattr(compression, "inspect_weights", fail)
    with pytest.raises(RuntimeError, match="went away"):
        press(tiny_model_folder, run_config, "wanda:75%")
    assert list((cache / "compressed").iterdir()) == []
    with pytest.raises(InputError, match="run `mops-fl compress"):
        resolve_model(config_of(tiny_model_folder, "wanda:75%"))


def test_torn_folder_in_the_cache_is_not_used(pruned, tiny_model_folder, cache):
    torn = compressed_path(str(tiny_model_folder), PruningRecipe.parse("sparsegpt:75%"), "0123")
    shutil.copytree(pruned("sparsegpt:75%"), torn)
    (torn / COMPRESSION_RECEIPT).unlink()
    with pytest.raises(InputError, match="not in the cache"):
        resolve_model(config_of(tiny_model_folder, "sparsegpt:75%"))


def test_backbone_is_loaded_pruned(pruned, tiny_model_folder, monkeypatch):
    folder = pruned("sparsegpt:75%")
    monkeypatch.setenv("MOPS_CACHE", str(folder.parents[1]))
    loaded = Backbone.load(config_of(tiny_model_folder, "sparsegpt:75%"))
    for name, weight in matrices(folder).items():
        assert torch.equal(loaded.model.get_submodule(name).weight.cpu(), weight)


def test_model_that_is_not_in_the_cache_is_refused_with_the_command(tiny_model_folder):
    command = f"run `mops-fl compress --backbone {tiny_model_folder} --recipe sparsegpt:2:4`"
    with pytest.raises(InputError, match=command):
        Backbone.load(config_of(tiny_model_folder, "sparsegpt:2:4"))


def test_model_of_another_backbone_is_not_taken(pruned, tiny_model_folder, tmp_path, tiny_model, monkeypatch):
    monkeypatch.setenv("MOPS_CACHE", str(pruned("sparsegpt:75%").parents[1]))
    other = tmp_path / tiny_model_folder.name
    tiny_model("llama", initializer_range=0.1).save_pretrained(other)
    with pytest.raises(InputError, match="not in the cache"):
        resolve_model(config_of(other, "sparsegpt:75%"))


def test_of_several_calibrations_one_is_named_by_its_key(tiny_model_folder, run_config, cache):
    folders = [
        press(tiny_model_folder, run_config, "wanda:75%", Calibration(num_rows, max_length=48)) for num_rows in (5, 6)
    ]
    keys = [receipt_of(folder)["key"] for folder in folders]
    with pytest.raises(InputError, match="pruned by wanda:75% more than once") as refusal:
        resolve_model(config_of(tiny_model_folder, "wanda:75%"))
    assert all(f"wanda:75%@{key}" in str(refusal.value) for key in keys)
    for folder, key in zip(folders, keys, strict=True):
        assert resolve_model(config_of(tiny_model_folder, f"wanda:75%@{key[:6]}")) == folder


def test_pruned_model_is_found_without_the_dense_one(pruned, tiny_model_folder, tmp_path, monkeypatch):
    folder = pruned("sparsegpt:75%")
    monkeypatch.setenv("MOPS_CACHE", str(tmp_path))
    monkeypatch.setattr(compressed, "cached_model_path", lambda _: tmp_path / "nothing")
    shutil.copytree(folder, tmp_path / "compressed" / folder.name)
    receipt = tmp_path / "compressed" / folder.name / COMPRESSION_RECEIPT
    receipt.write_text(json.dumps({**receipt_of(folder), "backbone": "some/model"}))
    assert resolve_model(config_of("some/model", "sparsegpt:75%")) == receipt.parent
    with pytest.raises(InputError, match="not in the cache"):
        resolve_model(config_of("other/model", "sparsegpt:75%"))


def test_pruned_folder_may_be_named_itself_if_the_config_says_how_it_was_pruned(pruned):
    folder = pruned("sparsegpt:75%")
    assert resolve_model(config_of(folder, "sparsegpt:75%")) == folder
    for compression_value in ("none", "sparsegpt:3:4"):
        with pytest.raises(InputError, match=r"is pruned by sparsegpt:75%; set `compression` to that"):
            resolve_model(config_of(folder, compression_value))


def test_pruned_model_is_not_pruned_again(pruned, run_config, cache):
    with pytest.raises(InputError, match="pruned already"):
        press(pruned("sparsegpt:75%"), run_config, "wanda:90%")


def test_matrix_that_does_not_divide_into_groups_is_refused(byte_tokenizer, tiny_model, run_config, cache, tmp_path):
    tiny_model("llama", intermediate_size=36).save_pretrained(tmp_path / "odd")
    byte_tokenizer.save_pretrained(tmp_path / "odd")
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.down_proj has 36 columns"):
        press(tmp_path / "odd", run_config, "sparsegpt:7:8")


def test_model_with_experts_is_refused_since_most_of_it_would_stay_dense(
    byte_tokenizer, tiny_model, run_config, cache, tmp_path
):
    tiny_model("qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16).save_pretrained(
        tmp_path / "moe"
    )
    byte_tokenizer.save_pretrained(tmp_path / "moe")
    with pytest.raises(InputError, match=r"Qwen3MoeForCausalLM has experts.* pruning by sparsegpt:75% would leave"):
        press(tmp_path / "moe", run_config, "sparsegpt:75%")
    assert not list(cache.glob("compressed/*"))


def test_without_llmcompressor_one_sentence_says_what_to_install(tiny_model_folder, run_config, monkeypatch):
    monkeypatch.setattr(compression.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"pip install 'mops-fl\[compress\]'"):
        press(tiny_model_folder, run_config, "sparsegpt:75%")


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
def test_weights_stay_as_they_are_to_the_bit_through_training(quantization, pruned, run_config):
    backbone = Backbone.load(config_of(pruned("sparsegpt:75%"), "sparsegpt:75%"))
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
