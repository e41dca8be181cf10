import json
import shutil

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from mops_fl.backbone import Backbone, resolve_dtype
from mops_fl.config import OWN_EMBEDDING, BackboneConfig
from mops_fl.errors import InputError

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]
LENGTHS = [11, 1, 7]
CPU = torch.device("cpu")
TOLERANCE = {"rtol": 0, "atol": 1e-5}


def token_ids(lengths):
    return torch.randint(300, (sum(lengths),), generator=torch.Generator().manual_seed(1))


def packed_logits(backbone, ids, lengths):
    hidden = backbone.run_layers(backbone.embed(ids), lengths, 0, backbone.num_layers)
    return backbone.model.lm_head(backbone.model.model.norm(hidden))


def config_of(folder, dtype="float32"):
    return BackboneConfig(
        str(folder), compression="none", quantization="none", dtype=dtype, gate_embedding=OWN_EMBEDDING
    )


CASES = [
    *[pytest.param(family, {}, id=family) for family in FAMILIES],
    pytest.param("mistral", {"sliding_window": 4}, id="mistral-window-below-the-sequence"),
    pytest.param("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}, id="qwen2-window"),
    pytest.param("llama", {"num_key_value_heads": 4}, id="llama-ungrouped"),
    pytest.param("llama", {"tie_word_embeddings": True}, id="llama-tied"),
    pytest.param(
        "llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}, id="llama-scaled-rope"
    ),
]


@pytest.mark.parametrize(("family", "options"), CASES)
def test_packed_rows_get_hugging_faces_own_logits(family, options, tiny_model, byte_tokenizer):
    backbone = Backbone(tiny_model(family, **options), byte_tokenizer)
    hugging_face = tiny_model(family, **options)
    ids = token_ids(LENGTHS)
    with torch.no_grad():
        rows = packed_logits(backbone, ids, LENGTHS).split(LENGTHS)
        for row, logits in zip(ids.split(LENGTHS), rows, strict=True):
            torch.testing.assert_close(logits, hugging_face(row[None]).logits[0], **TOLERANCE)


def test_window_of_mistral_is_in_force(tiny_model, byte_tokenizer):
    ids = token_ids([12])
    models = [Backbone(tiny_model("mistral", sliding_window=n), byte_tokenizer) for n in (4, 12)]
    narrow, wide = (packed_logits(model, ids, [12]) for model in models)
    assert torch.allclose(narrow[:4], wide[:4], atol=1e-5)
    assert (narrow[4:] - wide[4:]).abs().max() > 0.01


def test_layers_run_in_two_parts_are_the_whole(tiny_backbone):
    hidden = tiny_backbone.embed(token_ids(LENGTHS))
    whole = tiny_backbone.run_layers(hidden, LENGTHS, 0, 4)
    lower = tiny_backbone.run_layers(hidden, LENGTHS, 0, 3)
    assert torch.equal(tiny_backbone.run_layers(lower, LENGTHS, 3, 4), whole)
    assert torch.equal(tiny_backbone.run_layers(hidden, LENGTHS, 2, 2), hidden)


def test_positions_start_at_zero_in_each_row(tiny_backbone, monkeypatch):
    seen, rotary = [], tiny_backbone.model.model.rotary_emb.forward
    monkeypatch.setattr(
        tiny_backbone.model.model.rotary_emb, "forward", lambda x, ids: seen.append(ids.tolist()) or rotary(x, ids)
    )
    tiny_backbone.run_layers(torch.zeros(6, 32), [3, 1, 2], 1, 3)
    assert seen == [[[0, 1, 2, 0, 0, 1]]]


def test_token_nll_is_the_written_out_log_softmax(tiny_backbone):
    hidden = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([3, 299, 0, 7, 7])
    logits = tiny_backbone.model.lm_head(tiny_backbone.model.model.norm(hidden))
    expected = logits.exp().sum(1).log() - logits[torch.arange(5), targets]
    nll = tiny_backbone.token_nll(hidden, targets)
    assert nll.dtype == torch.float32
    torch.testing.assert_close(nll, expected, **TOLERANCE)


def test_everything_is_frozen_and_in_evaluation_mode(tiny_model, byte_tokenizer):
    model = tiny_model("llama", attention_dropout=0.5).train()
    backbone = Backbone(model, byte_tokenizer)
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())
    assert not any(module.training for module in backbone.model.modules())


def test_backbone_knows_its_sizes(tiny_backbone):
    assert (tiny_backbone.num_layers, tiny_backbone.hidden_size) == (4, 32)
    assert (tiny_backbone.dtype, tiny_backbone.device) == (torch.float32, CPU)
    assert tiny_backbone.embedding_weight.shape == (300, 32)


def test_model_that_is_no_llama_like_decoder_is_refused(byte_tokenizer):
    config = CONFIG_MAPPING["gpt2"](vocab_size=300, n_embd=32, n_layer=1, n_head=4)
    with pytest.raises(InputError, match=r"GPT2LMHeadModel has no `\.model\.layers`"):
        Backbone(AutoModelForCausalLM.from_config(config), byte_tokenizer)


def test_model_is_loaded_from_its_folder(tiny_model_folder, tiny_backbone):
    loaded = Backbone.load(config_of(tiny_model_folder))
    assert loaded.dtype == torch.float32
    assert loaded.tokenizer("a b").input_ids == tiny_backbone.tokenizer("a b").input_ids
    for name, tensor in tiny_backbone.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name].cpu(), tensor), name


def test_model_is_loaded_in_the_dtype_of_the_config(tiny_model_folder):
    loaded = Backbone.load(config_of(tiny_model_folder, "bfloat16"))
    assert loaded.dtype == torch.bfloat16
    assert {tensor.dtype for tensor in loaded.model.parameters()} == {torch.bfloat16}


def remove_weights(folder):
    (folder / "model.safetensors").unlink()


def name_an_unknown_family(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "perceptron"}))


def break_config(folder):
    (folder / "config.json").write_text("{")


def remove_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()


def break_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{")


def remove_config(folder):
    (folder / "config.json").unlink()


def cut_weights_short(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])


DAMAGES = [
    remove_weights,
    cut_weights_short,
    remove_config,
    break_config,
    name_an_unknown_family,
    remove_tokenizer,
    break_tokenizer,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_model_folder_that_cannot_be_read_is_refused_by_name(damage, tiny_model_folder, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_model_folder, folder)
    damage(folder)
    with pytest.raises(InputError, match="damaged"):
        Backbone.load(config_of(folder))


@pytest.mark.parametrize(("name", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_named_dtype_is_taken(name, dtype):
    assert resolve_dtype(name, CPU) is dtype


@pytest.mark.parametrize("avx512", [True, False])
@pytest.mark.parametrize("amx", [True, False])
def test_dtype_auto_is_bfloat16_where_the_processor_has_it(avx512, amx, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert resolve_dtype("auto", CPU) is (torch.bfloat16 if avx512 or amx else torch.float32)
