"""Where pruned models lie in the cache, and how a run finds its own."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from mops_fl import compressed, compression
from mops_fl.backbone import Backbone
from mops_fl.compressed import (
    COMPRESSION_RECEIPT,
    compressed_path,
    fingerprint,
    read_compression_receipt,
    resolve_model,
)
from mops_fl.compression import Calibration, compression_key
from mops_fl.errors import InputError
from mops_fl.pruning import decoder_linears
from mops_fl.recipe import PruningRecipe


def matrices(folder):
    return {
        name: linear.weight for name, linear in decoder_linears(AutoModelForCausalLM.from_pretrained(folder)).items()
    }


def test_same_inputs_are_pruned_once(tiny_model_folder, cache, monkeypatch, press):
    calls = []
    monkeypatch.setattr(compression, "prune", lambda *args: calls.append(args) or ({}, []))
    first = press(tiny_model_folder, "sparsegpt:75%")
    assert press(tiny_model_folder, "sparsegpt:75%") == first
    assert len(calls) == 1


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


def test_failure_leaves_nothing_that_could_be_taken_for_a_model(
    tiny_model_folder, cache, monkeypatch, press, backbone_config
):
    def fail(*_):
        raise RuntimeError("the machine went away")

    monkeypatch.setattr(compression, "inspect_weights", fail)
    with pytest.raises(RuntimeError, match="went away"):
        press(tiny_model_folder, "wanda:75%")
    assert list((cache / "compressed").iterdir()) == []
    with pytest.raises(InputError, match="run `mops-fl compress"):
        resolve_model(backbone_config(tiny_model_folder, "wanda:75%"))


def test_torn_folder_in_the_cache_is_not_used(pruned, tiny_model_folder, cache, backbone_config):
    torn = compressed_path(str(tiny_model_folder), PruningRecipe.parse("sparsegpt:75%"), "0123")
    shutil.copytree(pruned("sparsegpt:75%"), torn)
    (torn / COMPRESSION_RECEIPT).unlink()
    with pytest.raises(InputError, match="not in the cache"):
        resolve_model(backbone_config(tiny_model_folder, "sparsegpt:75%"))


def test_backbone_is_loaded_pruned(pruned, tiny_model_folder, monkeypatch, backbone_config):
    folder = pruned("sparsegpt:75%")
    monkeypatch.setenv("MOPS_CACHE", str(folder.parents[1]))
    loaded = Backbone.load(backbone_config(tiny_model_folder, "sparsegpt:75%"))
    for name, weight in matrices(folder).items():
        assert torch.equal(loaded.model.get_submodule(name).weight.cpu(), weight)


def test_model_that_is_not_in_the_cache_is_refused_with_the_command(tiny_model_folder, backbone_config):
    command = f"run `mops-fl compress --backbone {tiny_model_folder} --recipe sparsegpt:2:4`"
    with pytest.raises(InputError, match=command):
        Backbone.load(backbone_config(tiny_model_folder, "sparsegpt:2:4"))


def test_model_of_another_backbone_is_not_taken(
    pruned, tiny_model_folder, tmp_path, tiny_model, monkeypatch, backbone_config
):
    monkeypatch.setenv("MOPS_CACHE", str(pruned("sparsegpt:75%").parents[1]))
    other = tmp_path / tiny_model_folder.name
    tiny_model("llama", initializer_range=0.1).save_pretrained(other)
    with pytest.raises(InputError, match="not in the cache"):
        resolve_model(backbone_config(other, "sparsegpt:75%"))


def test_of_several_calibrations_one_is_named_by_its_key(tiny_model_folder, cache, press, backbone_config):
    folders = [press(tiny_model_folder, "wanda:75%", Calibration(num_rows, max_length=48)) for num_rows in (5, 6)]
    keys = [read_compression_receipt(folder)["key"] for folder in folders]
    with pytest.raises(InputError, match="pruned by wanda:75% more than once") as refusal:
        resolve_model(backbone_config(tiny_model_folder, "wanda:75%"))
    assert all(f"wanda:75%@{key}" in str(refusal.value) for key in keys)
    for folder, key in zip(folders, keys, strict=True):
        assert resolve_model(backbone_config(tiny_model_folder, f"wanda:75%@{key[:6]}")) == folder


def test_pruned_model_is_found_without_the_dense_one(pruned, tmp_path, monkeypatch, backbone_config):
    folder = pruned("sparsegpt:75%")
    monkeypatch.setenv("MOPS_CACHE", str(tmp_path))
    monkeypatch.setattr(compressed, "cached_model_path", lambda _: tmp_path / "nothing")
    shutil.copytree(folder, tmp_path / "compressed" / folder.name)
    receipt = tmp_path / "compressed" / folder.name / COMPRESSION_RECEIPT
    receipt.write_text(json.dumps({**read_compression_receipt(folder), "backbone": "some/model"}))
    assert resolve_model(backbone_config("some/model", "sparsegpt:75%")) == receipt.parent
    with pytest.raises(InputError, match="not in the cache"):
        resolve_model(backbone_config("other/model", "sparsegpt:75%"))


def test_pruned_folder_may_be_named_itself_if_the_config_says_how_it_was_pruned(pruned, backbone_config):
    folder = pruned("sparsegpt:75%")
    assert resolve_model(backbone_config(folder, "sparsegpt:75%")) == folder
    for compression_value in ("none", "sparsegpt:3:4"):
        with pytest.raises(InputError, match=r"is pruned by sparsegpt:75%; set `compression` to that"):
            resolve_model(backbone_config(folder, compression_value))
