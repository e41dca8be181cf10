import pytest
import torch
from transformers import BertConfig, BertModel

from mops_fl.backbone import Backbone
from mops_fl.compressed import backbone_sha256, weights_sha256
from mops_fl.config import OWN_EMBEDDING, BackboneConfig, PretrainConfig
from mops_fl.embedder import TextEmbedder
from mops_fl.errors import InputError
from mops_fl.model import PromptedModel
from mops_fl.pretraining import pretrain
from mops_fl.state_cache import StateCache

TEXT = "Name three rivers."
CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def bert_folder(byte_tokenizer, tmp_path_factory):
    """A tiny encoder, narrower than the backbone, with 40 positions."""
    folder = tmp_path_factory.mktemp("tiny-bert")
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(BertConfig(vocab_size=300, max_position_embeddings=40, **sizes)).save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    return folder


def backbone_with(embedding, tiny_model_folder):
    return Backbone.load(BackboneConfig(str(tiny_model_folder), "none", "none", "float32", str(embedding)))


def test_embedding_is_the_mean_of_the_last_hidden_states(bert_folder, byte_tokenizer):
    hidden = BertModel.from_pretrained(bert_folder)(**byte_tokenizer(TEXT, return_tensors="pt")).last_hidden_state
    torch.testing.assert_close(TextEmbedder.load(str(bert_folder), CPU)(TEXT), hidden[0].mean(0))


def test_text_is_cut_where_the_models_positions_end(bert_folder):
    embed = TextEmbedder.load(str(bert_folder), CPU)
    assert torch.equal(embed("x" * 30 + "y" * 100), embed("x" * 30 + "y" * 10))
    assert not torch.equal(embed("x" * 30 + "y" * 10), embed("x" * 30 + "y" * 9))


@pytest.mark.parametrize("routing", ["gate", "nearest"])
def test_gate_sees_the_question_alone_as_the_other_model_does(
    routing, bert_folder, tiny_model_folder, adapter_config, make_row
):
    backbone = backbone_with(bert_folder, tiny_model_folder)
    assert backbone.gate_input_size == 24
    rows = [make_row(i, task=i % 3) for i in range(6)]
    config = adapter_config(routing=routing)
    pretraining = PretrainConfig(True, 1, 0.01, 2, 0.01)
    start = pretrain(backbone, rows, 3, config, pretraining, torch.Generator().manual_seed(0))
    model = PromptedModel(backbone, config, start.input_prompts, StateCache(0), start.neighbours)
    question = backbone.tokenizer.decode(rows[0].token_ids[:8], skip_special_tokens=True)
    pooled = model.row_states(rows[:1])[0].pooled
    assert torch.equal(pooled, backbone.embedder(question))
    scores = model.losses(model.adapter([start.adapter]), rows[:1]).scores
    padded = torch.stack([torch.cat([torch.tensor([7, 7]), rows[0].token_ids[:8]]), make_row(9).token_ids[:10]])
    kept = torch.arange(10) >= torch.tensor([[2], [0]])
    in_generation = model.gate_scores(model.adapter([start.adapter]), padded, kept)
    torch.testing.assert_close(in_generation[:1], scores, rtol=0, atol=1e-6)
    assert (start.gate_accuracy is None) == (routing == "nearest")
    if routing == "nearest":
        assert scores.tolist() == [[1, 0, 0]]  # row 0 is among the server's rows, and so its own nearest
    else:
        assert start.adapter["gate.w1"].shape == (8, 24)
        gate = model.adapter([start.adapter]).gate
        assert torch.equal(scores, gate(pooled[None]).softmax(-1))


def test_a_decoder_can_be_the_embedder_too(tiny_model_folder):
    assert backbone_with(tiny_model_folder, tiny_model_folder).gate_input_size == 32


def test_hash_of_the_frozen_weights_covers_the_second_network(bert_folder, tiny_model_folder, tmp_path):
    other = BertModel.from_pretrained(bert_folder)
    with torch.no_grad():
        other.embeddings.LayerNorm.bias[0] += 1e-6
    other.save_pretrained(tmp_path)
    alone, first, second = (
        backbone_sha256(BackboneConfig(str(tiny_model_folder), "none", "none", "float32", str(embedding)))
        for embedding in (OWN_EMBEDDING, bert_folder, tmp_path)
    )
    assert alone == weights_sha256(tiny_model_folder)
    assert len({alone, first, second}) == 3


def test_a_model_that_cannot_be_read_is_refused(tiny_model_folder, tmp_path):
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match=r"(?s)gate's embedding model .* cannot be loaded .* fetch or copy it again"):
        backbone_with(tmp_path, tiny_model_folder)
    with pytest.raises(InputError, match="neither a local folder nor in the cache"):
        backbone_with("no/such-model", tiny_model_folder)
