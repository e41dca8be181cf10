import pytest
import torch

from mops_fl import supported
from mops_fl.backbone import Backbone
from mops_fl.errors import InputError

LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
QWEN_NEXT = {**LINEAR, "num_experts": 0, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
UNCAPPED = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
ACCEPTED = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "ministral": {"sliding_window": 8},
    "mixtral": {},
    "qwen2": {},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3": {},
    "qwen3_moe": {},
    "gemma": {},
    "gemma2": {**UNCAPPED, "query_pre_attn_scalar": 8},
    "phi3": {"sliding_window": 8, "pad_token_id": 0},
    "olmo2": {},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "granite": {},
    "smollm3": {"pad_token_id": 0},
    "starcoder2": {"sliding_window": 8},
    "glm4": {"pad_token_id": 0},
    "exaone4": {"sliding_window": 8},
}


@pytest.fixture
def model_with_head(tiny_model):
    """``model_with_head("gemma2", dtype, 60)``: the tiny model with so many times the logits."""

    def build(family, dtype, factor, **options):
        model = tiny_model(family, **options)
        model.lm_head.weight = torch.nn.Parameter(factor * model.lm_head.weight)
        return model.to(dtype)

    return build


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ACCEPTED)
def test_family_of_embedding_attention_norm_and_head_is_accepted(family, dtype, tiny_model, byte_tokenizer):
    assert Backbone(tiny_model(family, **ACCEPTED[family]).to(dtype), byte_tokenizer).num_layers == 4


REFUSED = [
    ("gemma2", torch.float32, 1, {}, "its logits are capped"),
    ("gemma2", torch.bfloat16, 60, {}, "its logits are capped"),
    ("gemma2", torch.bfloat16, 1, {"final_logit_softcapping": None}, "attention with softcap is not implemented"),
    ("gpt_oss", torch.bfloat16, 30, {"num_local_experts": 4}, "attention with s_aux is not implemented"),
    ("qwen3_next", torch.float32, 1, QWEN_NEXT, "it has layers of linear_attention"),
    ("qwen3_5_text", torch.float32, 1, LINEAR, "it has layers of linear_attention"),
    ("olmo_hybrid", torch.bfloat16, 1, {**LINEAR, "pad_token_id": 0}, "it has layers of linear_attention"),
    ("minimax", torch.float32, 1, {"num_local_experts": 2}, "it has layers of linear_attention"),
    ("gemma3_text", torch.float32, 1, {}, "its layers cannot be run one by one"),
    ("stablelm", torch.float32, 1, {}, "its layers cannot be run one by one: AssertionError"),
    ("nemotron", torch.float32, 1, {}, "its layers cannot be run one by one: AssertionError"),
    ("granite", torch.float32, 1, {"logits_scaling": 3.0}, "not just embedding, layers, norm and head"),
    ("cohere", torch.float32, 1, {}, "not just embedding, layers, norm and head"),
    ("granite", torch.bfloat16, 1, {"logits_scaling": 1.1}, "its logits are not just its head's"),
]


@pytest.mark.parametrize(("family", "dtype", "factor", "options", "reason"), REFUSED)
def test_family_that_does_more_is_refused_in_one_sentence(
    family, dtype, factor, options, reason, model_with_head, byte_tokenizer
):
    with pytest.raises(
        InputError, match=rf"ForCausalLM is not supported as a backbone \(.*{reason}.*\); use .* Qwen3\.$"
    ):
        Backbone(model_with_head(family, dtype, factor, **options), byte_tokenizer)


@pytest.mark.parametrize(("family", "options"), [("qwen3_next", QWEN_NEXT), ("minimax", {"num_local_experts": 2})])
def test_layers_that_mix_rows_are_noticed_also_if_the_config_does_not_say_so(
    family, options, tiny_model, byte_tokenizer, monkeypatch
):
    monkeypatch.setattr(supported, "LAYER_TYPES", {*supported.LAYER_TYPES, "linear_attention"})
    with pytest.raises(InputError, match="is not supported as a backbone"):
        Backbone(tiny_model(family, **options), byte_tokenizer)
