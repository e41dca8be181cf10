"""MoPs' forward pass: frozen layers, expert prompts injected at layer `m`, a gate that weighs them per row.

    layers 0..m-1   on [P1 ; tokens]        frozen, without gradient, kept per row
    gate            on the pooled layer-m input of the row
    layers m..L-1   on [prompts ; tokens]   the trained prompts stand where P1 stood
    norm, head      on the positions that carry loss

Generation runs the same on a padded batch, the lower layers' cache holding `[P1 ; tokens]` and the upper ones'
`[prompts ; tokens]`. All that the gate does to a sequence is in that cache once the first pass is over, so the tokens
that follow run through the layers as those of the plain model.

Letters: `R` rows, `T` packed positions, `K` prompts, `n` tokens of a row, `D` hidden size, `E` experts; of a padded
batch `B` rows.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, DynamicCache

from mops_fl.adapter import AdapterState, PromptAdapter
from mops_fl.attention import SharedPrefix
from mops_fl.backbone import Backbone
from mops_fl.config import AdapterConfig
from mops_fl.encoding import EncodedRow
from mops_fl.errors import InputError
from mops_fl.losses import RowLosses, embed, packed, packed_losses
from mops_fl.routing import Neighbours
from mops_fl.state_cache import RowStates, StateCache


class AdaptableModel(Protocol):
    """A frozen model and one way to adapt it; adapters are handed in per call.

    Attributes:
        backbone: the frozen model.
        num_prompts: positions that stand before the tokens in the cache of the last layer.
    """

    backbone: Backbone
    num_prompts: int

    def adapter(self, states: Sequence[AdapterState]) -> Any:  # noqa: ANN401
        """Adapters of these states, where the backbone is."""
        ...

    def losses(self, adapter: Any, rows: Sequence[EncodedRow]) -> RowLosses:  # noqa: ANN401
        """Loss of each row under the adapter that owns it.

        Args:
            adapter: `J` adapters that `adapter` made.
            rows: `R` rows, a multiple of `J`, owner by owner.

        Returns:
            Sums and counts per row; differentiable with respect to the adapter's parameters only.
        """
        ...

    def run_cached(
        self,
        adapter: Any,  # noqa: ANN401
        token_ids: Tensor,
        kept: Tensor,
        cache: Cache,
        prompt_length: int,
    ) -> Tensor:
        """The last layer's output at new tokens of a padded batch, whose earlier ones are in the cache.

        Args:
            adapter: one adapter that `adapter` made.
            token_ids: `(B, n)` new tokens; all there are for an empty cache.
            kept: `(B, N)` bool, False at padding, of all tokens so far.
            cache: of the sequence; gets the new positions.
            prompt_length: so many first tokens are question and context; the gate goes by them.

        Returns:
            `(B, n, D)`; of no meaning at padding.
        """
        ...

    def gate_scores(self, adapter: Any, token_ids: Tensor, kept: Tensor) -> Tensor | None:  # noqa: ANN401
        """The gate's scores `(B, E)` of questions with their contexts `(B, n)`; None without a gate."""
        ...


class GatedValues:
    """Stands before a cache in the first pass of a sequence and stores the value vectors scaled by the gate.

    All later attention, in this pass and after it, then has the gate in it.
    """

    def __init__(self, cache: Cache, scale: Tensor) -> None:
        """Take the cache and `scale` `(B, S)`, one at tokens."""
        self._cache = cache
        self._scale = scale[:, None, :, None]

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: object) -> tuple[Tensor, Tensor]:
        """Keys and values `(B, G, S, d)` as decoder layers hand them to a cache."""
        stored: tuple[Tensor, Tensor] = self._cache.update(key, value * self._scale.to(value.dtype), layer_idx)
        return stored


class PromptedModel:
    """A backbone with input prompts P1 and an injection layer; adapters are handed in per call.

    Attributes:
        backbone: the frozen model.
        num_prompts: `K`.
        input_prompts: `(K', D)` float32 P1, frozen; `K'` may differ from `K`, even be 0.
        transformed_prompts: `(K', D)` P1 as it arrives at layer `m`, in the backbone's dtype.
    """

    def __init__(
        self,
        backbone: Backbone,
        config: AdapterConfig,
        input_prompts: Tensor,
        cache: StateCache,
        neighbours: Neighbours | None = None,
    ) -> None:
        """Check the layer and keep the parts; rows are routed by `neighbours`, where given, instead of a gate.

        Raises:
            InputError: `inject-layer` is not a layer of this backbone.
        """
        check_inject_layer(config.inject_layer, backbone)
        self.backbone = backbone
        self.num_prompts = config.num_prompts
        self.input_prompts = input_prompts
        self._config = config
        self._cache = cache
        self._neighbours = neighbours
        self._prefix: SharedPrefix | None = None
        self.transformed_prompts = self._run_input_prompts()

    def adapter(self, states: Sequence[AdapterState]) -> PromptAdapter:
        """Adapters of these states, where the backbone is."""
        return PromptAdapter(states).to(self.backbone.device)

    @torch.no_grad()
    def row_states(self, rows: Sequence[EncodedRow]) -> list[RowStates]:
        """The layer-`m` input of each row, from the cache or computed.

        Rows are computed one by one: bfloat16 rounds differently in another batch, and what a row gets must not
        depend on which rows happened to be missing.
        """
        return [self._cache.get(row.row_id) or self._compute_states(row) for row in rows]

    def losses(self, adapter: PromptAdapter, rows: Sequence[EncodedRow]) -> RowLosses:
        """Loss of each row under the adapter that owns it, see `AdaptableModel.losses`."""
        states = self.row_states(rows)
        scores = self.scores(adapter, torch.stack([row.pooled for row in states]))
        prompts = adapter.prompts_of_rows(len(rows)).to(self.backbone.dtype)
        hidden, lengths = packed(prompts, [row.tokens for row in states])
        scale = None if scores is None else self._position_scale(scores, lengths)
        by_attention = self._config.gating == "attention"
        hidden = self.backbone.run_layers(
            hidden,
            lengths,
            self._config.inject_layer,
            self.backbone.num_layers,
            value_scale=scale if by_attention else None,
            hidden_scale=None if by_attention else scale,
        )
        return RowLosses(*packed_losses(self.backbone, hidden, lengths, rows), scores)

    def scores(self, adapter: PromptAdapter, pooled: Tensor) -> Tensor | None:
        """Weights `(R, E)` of the experts for rows with gate inputs `(R, D)`; None where nothing weighs them."""
        if self._neighbours is not None:
            return self._neighbours.scores(pooled)
        return adapter.scores(pooled, self._config.gate_temperature)

    def run_cached(
        self, adapter: PromptAdapter, token_ids: Tensor, kept: Tensor, cache: Cache, prompt_length: int
    ) -> Tensor:
        """The last layer's output at new tokens, see `AdaptableModel.run_cached`."""
        layer, begins = self._config.inject_layer, cache.get_seq_length(self._config.inject_layer) == 0
        hidden = self._run_lower(token_ids, kept, cache, begins)
        upper_cache: Cache | GatedValues = cache
        scale = None
        if begins:
            scores = self.scores(adapter, self._gate_inputs(token_ids, hidden, kept, prompt_length))
            hidden = torch.cat([adapter.prompts_of_rows(len(hidden)).to(hidden.dtype), hidden], 1)
            if scores is not None:
                scale = self._place_scale(scores, hidden.shape[1])
        if scale is not None and self._config.gating == "attention":
            upper_cache, scale = GatedValues(cache, scale), None
        hidden = self.backbone.run_cached(
            hidden,
            behind(self.num_prompts, kept),
            upper_cache,
            layer,
            self.backbone.num_layers,
            hidden_scale=None if scale is None else scale[..., None].to(hidden.dtype),
        )
        return hidden[:, -token_ids.shape[1] :]

    @torch.no_grad()
    def gate_scores(self, adapter: PromptAdapter, token_ids: Tensor, kept: Tensor) -> Tensor | None:
        """The gate's scores, see `AdaptableModel.gate_scores`."""
        hidden = self._run_lower(token_ids, kept, DynamicCache(), begins=True)
        return self.scores(adapter, self._gate_inputs(token_ids, hidden, kept, token_ids.shape[1]))

    def _run_lower(self, token_ids: Tensor, kept: Tensor, cache: Cache, begins: bool) -> Tensor:
        """Layer `m`'s input `(B, n, D)` at new tokens."""
        if begins and self._prefix is not None:
            self._prefix.put_into(cache, len(token_ids))
        hidden = self.backbone.embed(token_ids)
        kept = behind(len(self.input_prompts), kept)
        return self.backbone.run_cached(hidden, kept, cache, 0, self._config.inject_layer)

    def _gate_inputs(self, token_ids: Tensor, hidden: Tensor, kept: Tensor, prompt_length: int) -> Tensor:
        """What the gate looks at, `(B, D)`, given a padded batch's tokens `(B, n)` and their layer-`m` input."""
        rows = zip(token_ids, hidden, kept[:, : token_ids.shape[1]], strict=True)
        lengths = kept[:, :prompt_length].sum(1).tolist()
        return torch.stack(
            [
                self._gate_input(ids[own], states[own][:n], n)
                for (ids, states, own), n in zip(rows, lengths, strict=True)
            ]
        )

    def _place_scale(self, scores: Tensor, num_places: int) -> Tensor:
        """`(B, S)`: the gate's score at each prompt, one at the places behind them."""
        per_prompt = scores.repeat_interleave(self._config.prompts_per_expert, dim=1)  # (B, K)
        return F.pad(per_prompt, (0, num_places - self.num_prompts), value=1.0)

    def _position_scale(self, scores: Tensor, lengths: list[int]) -> Tensor:
        """`(T,)`: the gate's score at each prompt, one at each token."""
        places = self._place_scale(scores, max(lengths))
        return torch.cat([row[:length] for row, length in zip(places, lengths, strict=True)])

    @torch.no_grad()
    def _run_input_prompts(self) -> Tensor:
        """P1 at layer `m`; its keys and values are kept, since causal rows behind it never change them."""
        hidden = self.input_prompts.to(self.backbone.device, self.backbone.dtype)
        if not len(hidden):
            return hidden
        self._prefix = SharedPrefix()
        return self.backbone.run_layers(hidden, [len(hidden)], 0, self._config.inject_layer, prefix=self._prefix)

    def _compute_states(self, row: EncodedRow) -> RowStates:
        tokens = embed(self.backbone, row)
        tokens = self.backbone.run_layers(tokens, [len(tokens)], 0, self._config.inject_layer, prefix=self._prefix)
        states = RowStates(tokens, self._gate_input(row.token_ids, tokens, row.prompt_length))
        self._cache.put(row.row_id, states)
        return states

    def _gate_input(self, token_ids: Tensor, tokens: Tensor, prompt_length: int) -> Tensor:
        """What the gate looks at, given a row's tokens `(n,)` and their layer-`m` input `(n, D)`.

        Deviation: the few words that the template puts before and behind question and context count as theirs.
        """
        if self.backbone.embedder is not None:
            question = self.backbone.tokenizer.decode(token_ids[:prompt_length], skip_special_tokens=True)
            return self.backbone.embedder(str(question))
        if self._config.pooling == "all":
            return torch.cat([self.transformed_prompts, tokens]).float().mean(0)
        return tokens[:prompt_length].float().mean(0)


def behind(num_prompts: int, kept: Tensor) -> Tensor:
    """`kept` `(B, N)` of tokens with prompts before them: `(B, K + N)`."""
    return F.pad(kept, (num_prompts, 0), value=True)


def check_window(max_length: int, num_prompts: int, backbone: Backbone) -> None:
    """Refuse rows that prompts would push out of the backbone's window; without prompts too, so that all read alike.

    Raises:
        InputError: too long.
    """
    if max_length + num_prompts > backbone.window:
        raise InputError(
            f"`max-length` is {max_length}, which with {num_prompts} prompts is more than the backbone's "
            f"{backbone.window} positions; lower it to {backbone.window - num_prompts}."
        )


def check_inject_layer(layer: int, backbone: Backbone) -> None:
    """Refuse an injection layer that this backbone does not have.

    Raises:
        InputError: out of range.
    """
    if layer >= backbone.num_layers:
        last = backbone.num_layers - 1
        raise InputError(f"`inject-layer` is {layer}, but the backbone has layers 0 to {last}; choose one of them.")
