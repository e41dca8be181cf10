"""Which models the explicit loop over decoder layers computes rightly: read in the config, then tried on a few tokens.

A family that scales embeddings or logits, or whose layers mix positions other than by plain causal attention, would
else be silently wrong.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from mops_fl.attention import PACKED_ATTENTION, SharedPrefix
from mops_fl.errors import InputError

if TYPE_CHECKING:
    from mops_fl.backbone import Backbone

SUPPORTED_KINDS = (
    "a decoder of embedding, layers of full or sliding-window attention, norm and head, such as Llama, Mistral, Qwen2 "
    "or Qwen3"
)
# As transformers names them in `layer_types`. The others are convolutions, recurrences or sparse attention, for which
# packed rows are a single one.
LAYER_TYPES = {"full_attention", "sliding_attention"}
# Plain language: in what a model knows, less comes of rounding than in tokens put together at random.
ROWS = ("Water boils at one hundred degrees, and it freezes at zero.", "The capital of France is Paris.")
PREFIX_LENGTH = 4  # of the first row


@torch.no_grad()
def take_over_attention(backbone: Backbone) -> None:
    """Route a model's attention through `packed_attention`, and make sure that it still computes what it did.

    Raises:
        InputError: it does not, or cannot be run.
    """
    model = backbone.model
    try:
        reason = _peculiarity(model.config.get_text_config()) or _deviation(backbone)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        # Whatever layers of another kind trip over.
        first_line, *_ = str(error).splitlines() or [type(error).__name__]
        raise _refusal(model, f"its layers cannot be run one by one: {first_line}") from error
    if reason:
        raise _refusal(model, reason)


def has_experts(layers: nn.Module) -> bool:
    """Whether decoder layers hold the matrices of many experts in one parameter, which is then no linear layer."""
    return any(parameter.dim() > 2 for parameter in layers.parameters())


def refuse_experts(model: nn.Module, change: str) -> None:
    """Refuse a change of the linear layers that would leave out most of the weights.

    Args:
        model: whose layers are to be changed.
        change: what is to be done to them, as a noun.

    Raises:
        InputError: the model has experts.
    """
    if has_experts(model):
        raise InputError(
            f"{type(model).__name__} has experts, most of its weights, which {change} would leave as they are; "
            "use it as it is, or a model without experts."
        )


def _refusal(model: nn.Module, reason: str) -> InputError:
    return InputError(f"{type(model).__name__} is not supported as a backbone ({reason}); use {SUPPORTED_KINDS}.")


def _peculiarity(config: Any) -> str | None:  # noqa: ANN401
    """What the config says that the loop does not do."""
    if getattr(config, "final_logit_softcapping", None) is not None:
        return "its logits are capped"
    if others := sorted({*(getattr(config, "layer_types", None) or ())} - LAYER_TYPES):
        return f"it has layers of {' and '.join(others)}"
    return None


def _deviation(backbone: Backbone) -> str | None:
    """What differs between the model's own forward pass and the loop; switches the attention between the two."""
    model, tokenizer = backbone.model, backbone.tokenizer
    rows = [torch.tensor(tokenizer(row).input_ids, device=backbone.device) for row in ROWS]
    # No causal row sees the padding behind its end.
    padded = model(pad_sequence(rows, batch_first=True)).logits.float()
    of_rows = [logits[: len(row)] for logits, row in zip(padded, rows, strict=True)]
    expected = torch.cat([*of_rows, of_rows[0][PREFIX_LENGTH:]])
    model.config._attn_implementation = PACKED_ATTENTION
    hidden = _packed_and_behind_prefix(backbone, rows)
    found = backbone.logits(hidden).float()

    # Measured on SmolLM2, dense and pruned: 1e-6 in float32; 0.02 in bfloat16, which rounds differently with another
    # kernel; 0.1 with quantised weights, which make more of it. So do routers, which send a token to another expert.
    tolerance = 1e-1
    if backbone.dtype == torch.float32:
        tolerance = 1e-4
    elif has_experts(backbone.layers):
        tolerance = 5e-1
    if getattr(model, "is_quantized", False):
        tolerance = 5e-1
    if not bool((found - expected).abs().mean() <= tolerance * expected.std()):
        return "it is not just embedding, layers, norm and head"
    # Rounding evens out over the tokens, a cap or a scale of the logits does not. In nats, of the likeliest tokens.
    likeliest = expected.argmax(1)
    shift = backbone.token_nll(hidden, likeliest).mean() - cross_entropy(expected, likeliest)
    return None if bool(shift.abs() <= tolerance) else "its logits are not just its head's"


def _packed_and_behind_prefix(backbone: Backbone, rows: list[Tensor]) -> Tensor:
    """The last layer's output: of all positions of the rows, then of the first one's end behind its begin."""
    embedded = backbone.embed(torch.cat(rows))
    packed = backbone.run_layers(embedded, [len(row) for row in rows], 0, backbone.num_layers)
    begin, end = embedded[: len(rows[0])].tensor_split([PREFIX_LENGTH])
    prefix = SharedPrefix()
    backbone.run_layers(begin, [len(begin)], 0, backbone.num_layers, prefix=prefix)
    behind = backbone.run_layers(end, [len(end)], 0, backbone.num_layers, prefix=prefix)
    return torch.cat([packed, behind])
