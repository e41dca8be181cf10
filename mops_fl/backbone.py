"""The frozen language model, seen as embedding -> decoder layers -> norm -> head.

Letters: `T` positions of all packed rows together, `D` hidden size, `V` vocabulary; of a padded batch `B` rows, `q` new
positions and `S` with those in the cache.
"""

from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from mops_fl.attention import SharedPrefix, visibility
from mops_fl.compressed import resolve_model
from mops_fl.config import OWN_EMBEDDING, BackboneConfig
from mops_fl.embedder import TextEmbedder
from mops_fl.errors import InputError
from mops_fl.head_loss import head_nll
from mops_fl.supported import SUPPORTED_KINDS, refuse_experts, take_over_attention


class Backbone:
    """A frozen decoder-only model whose layers are run by an explicit loop.

    Rows are packed: `hidden` is `(T, D)`, all rows one behind the other, and `lengths` says where each ends.

    Attributes:
        model: the transformers model, all weights frozen, in evaluation mode.
        tokenizer: its tokenizer.
        num_layers: decoder layers `L`.
        hidden_size: `D`.
        dtype: the dtype of hidden states.
        device: where it lives.
        source: what it was loaded as; None for a model that was made in memory.
        embedder: another network that embeds questions for the gate; None: the gate looks at hidden states.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        source: BackboneConfig | None = None,
        embedder: TextEmbedder | None = None,
    ) -> None:
        """Freeze `model` and route its attention through `packed_attention`.

        Raises:
            InputError: the model has no `.model.layers`, or is more than the loop over them computes.
        """
        decoder: Any = getattr(model, "model", None)
        if not all(hasattr(decoder, part) for part in ("embed_tokens", "layers", "norm", "rotary_emb")):
            raise InputError(
                f"{type(model).__name__} has no `.model.layers` with rotary positions; use {SUPPORTED_KINDS}."
            )
        self.model: Any = model.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.source = source
        self.embedder = embedder
        self._decoder = decoder
        self.num_layers: int = len(decoder.layers)
        self.hidden_size: int = decoder.embed_tokens.weight.shape[1]
        self.dtype: torch.dtype = decoder.embed_tokens.weight.dtype
        self.device: torch.device = decoder.embed_tokens.weight.device
        take_over_attention(self)

    @classmethod
    def load(cls, config: BackboneConfig, device: str = "auto") -> "Backbone":
        """Load the model as the config has it pruned and quantised.

        Args:
            config: which model.
            device: as torch names it; `auto` is the GPU if there is one, else the CPU.

        Raises:
            InputError: the model is not on this machine, cannot be read, is not supported, or has experts and is to be
                quantised; or there is no such device.
        """
        folder = resolve_model(config)
        where = resolve_device(device)
        embedder = None
        if config.gate_embedding != OWN_EMBEDDING:
            embedder = TextEmbedder.load(config.gate_embedding, where)
        dtype = resolve_dtype(config.dtype, where)
        if where.type == "cuda":
            # cuDNN's attention makes a plan for each new shape, up to a second; here nearly every batch has its own.
            torch.backends.cuda.enable_cudnn_sdp(False)
        on_load = None
        if config.quantization != "none":
            # Here, since bitsandbytes takes seconds to import.
            from mops_fl.quantization import gpu_quantization, quantize_linears

            on_load = gpu_quantization(config.quantization, dtype) if where.type == "cuda" else None
        disable_progress_bar()  # loading takes a second; the run has a progress bar of its own
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, device_map=where, quantization_config=on_load, local_files_only=True
            )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise InputError(f"The model in {folder} cannot be loaded ({error}); fetch or copy it again.") from error
        if config.quantization != "none":
            refuse_experts(model, f"quantization {config.quantization}")
        backbone = cls(model, tokenizer, config, embedder)
        if config.quantization != "none" and where.type == "cpu":
            quantize_linears(backbone._decoder.layers, config.quantization)
        return backbone

    @property
    def layers(self) -> nn.ModuleList:
        """The `L` decoder layers."""
        layers: nn.ModuleList = self._decoder.layers
        return layers

    @property
    def window(self) -> int:
        """Positions that the model was made for."""
        positions: int = self._decoder.config.max_position_embeddings
        return positions

    @property
    def gate_input_size(self) -> int:
        """Numbers that the gate looks at: `D`, or those of the embedder."""
        return self.embedder.size if self.embedder else self.hidden_size

    @property
    def embedding_weight(self) -> Tensor:
        """`(V, D)` token embeddings."""
        weight: Tensor = self._decoder.embed_tokens.weight
        return weight

    def embed(self, token_ids: Tensor) -> Tensor:
        """Token embeddings `(T, D)` of ids `(T,)`, as the first layer takes them."""
        embedded: Tensor = self._decoder.embed_tokens(token_ids)
        return embedded

    def run_layers(
        self,
        hidden: Tensor,
        lengths: list[int],
        start: int,
        stop: int,
        *,
        value_scale: Tensor | None = None,
        hidden_scale: Tensor | None = None,
        prefix: SharedPrefix | None = None,
    ) -> Tensor:
        """Run layers `start .. stop - 1` on packed rows.

        Args:
            hidden: `(T, D)` input of layer `start`.
            lengths: length of each row; positions start at 0 in each.
            start: first layer.
            stop: one behind the last layer.
            value_scale: `(T,)` factor on attention onto each position (gating `attention`).
            hidden_scale: `(T,)` factor on the hidden states before every layer (gating `embedding`).
            prefix: positions before the row, for a single row; an empty one is filled with this row.

        Returns:
            `(T, D)` output of layer `stop - 1`.
        """
        hidden = hidden[None]
        first = prefix.length if prefix else 0
        position_ids = torch.cat([torch.arange(first, first + length) for length in lengths])[None].to(hidden.device)
        position_embeddings = self._decoder.rotary_emb(hidden, position_ids)
        for layer in self._decoder.layers[start:stop]:
            if hidden_scale is not None:
                hidden = hidden * hidden_scale.to(hidden.dtype)[:, None]
            hidden = layer(
                hidden,
                attention_mask=None,
                position_ids=position_ids,
                position_embeddings=position_embeddings,
                lengths=lengths,
                value_scale=value_scale,
                past_key_values=prefix,
            )
        if prefix is not None and not prefix.length:
            prefix.length = lengths[0]
        return hidden[0]

    def run_cached(
        self,
        hidden: Tensor,
        kept: Tensor,
        cache: Any,  # noqa: ANN401
        start: int,
        stop: int,
        *,
        hidden_scale: Tensor | None = None,
    ) -> Tensor:
        """Run layers `start .. stop - 1` on the new positions of a padded batch, behind those in the cache.

        Args:
            hidden: `(B, q, D)` input of layer `start`.
            kept: `(B, S)` bool, False at padding, of the cached positions and the new ones.
            cache: a `transformers.Cache`, or what has its `update`; gets the new positions' keys and values.
            start: first layer.
            stop: one behind the last layer.
            hidden_scale: `(B, q, 1)` factor on the hidden states before every layer (gating `embedding`).

        Returns:
            `(B, q, D)` output of layer `stop - 1`; of no meaning at padding.
        """
        positions = (kept.cumsum(1) - 1).clamp(min=0)
        num_queries = hidden.shape[1]
        position_ids = positions[:, -num_queries:]
        position_embeddings = self._decoder.rotary_emb(hidden, position_ids)
        visible = visibility(kept, positions, num_queries)
        for layer in self._decoder.layers[start:stop]:
            if hidden_scale is not None:
                hidden = hidden * hidden_scale
            hidden = layer(
                hidden,
                attention_mask=None,
                position_ids=position_ids,
                position_embeddings=position_embeddings,
                past_key_values=cache,
                visible=visible,
            )
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits `(..., V)` after the last layer's output `(..., D)`."""
        logits: Tensor = self.model.lm_head(self._decoder.norm(hidden))
        return logits

    def token_nll(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Negative log-likelihood, in nats and float32, of the token that follows each position.

        Args:
            hidden: `(N, D)` output of the last layer at the positions that carry loss.
            targets: `(N,)` ids of the tokens after them.

        Returns:
            `(N,)`.
        """
        head = self.model.lm_head
        return head_nll(self._decoder.norm(hidden), head.weight, head.bias, targets)


def resolve_device(name: str) -> torch.device:
    """`auto` becomes the GPU if there is one, else the CPU.

    Raises:
        InputError: torch knows no such device, or this machine has none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"The device {name!r} cannot be used ({error}); choose auto, cpu or cuda.") from error


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` becomes bfloat16 where the processor has matrix products for it, else float32."""
    if name != "auto":
        return torch.bfloat16 if name == "bfloat16" else torch.float32
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32
