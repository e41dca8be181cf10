"""MoPs' forward pass: frozen layers, expert prompts injected at layer `m`, a gate that weighs them per row.

    layers 0..m-1   on [P1 ; tokens]        frozen, without gradient, kept per row
    gate            on the pooled layer-m input of the row
    layers m..L-1   on [prompts ; tokens]   the trained prompts stand where P1 stood
    norm, head      on the positions that carry loss

Letters: `R` rows, `T` packed positions, `K` prompts, `n` tokens of a row, `D` hidden size, `E` experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from mops_fl.adapter import AdapterState, PromptAdapter
from mops_fl.backbone import Backbone, SharedPrefix
from mops_fl.config import AdapterConfig
from mops_fl.encoding import EncodedRow
from mops_fl.errors import InputError
from mops_fl.routing import Neighbours
from mops_fl.state_cache import RowStates, StateCache


@dataclass(frozen=True)
class RowLosses:
    """Losses of `R` rows, as sums and counts.

    Attributes:
        loss_sum: `(R,)` float32, summed negative log-likelihood in nats.
        num_tokens: `(R,)` float32, tokens that carry loss.
        scores: `(R, E)` the gate's scores, None without a gate.
    """

    loss_sum: Tensor
    num_tokens: Tensor
    scores: Tensor | None


class AdaptableModel(Protocol):
    """A frozen model and one way to adapt it; adapters are handed in per call.

    Attributes:
        backbone: the frozen model.
    """

    backbone: Backbone

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


class PromptedModel:
    """A backbone with input prompts P1 and an injection layer; adapters are handed in per call.

    Attributes:
        backbone: the frozen model.
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

    def _position_scale(self, scores: Tensor, lengths: list[int]) -> Tensor:
        """`(T,)`: the gate's score at each prompt, one at each token."""
        num_prompts = self._config.num_prompts
        per_prompt = scores.repeat_interleave(self._config.prompts_per_expert, dim=1)  # (R, K)
        ones = scores.new_ones(max(lengths))
        rows = zip(per_prompt, lengths, strict=True)
        return torch.cat([part for row, length in rows for part in (row, ones[: length - num_prompts])])

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
        states = RowStates(tokens, self._gate_input(row, tokens))
        self._cache.put(row.row_id, states)
        return states

    def _gate_input(self, row: EncodedRow, tokens: Tensor) -> Tensor:
        """What the gate looks at, given the layer-`m` input `(n, D)` of the row's tokens."""
        if self.backbone.embedder is not None:
            question = row.token_ids[: row.prompt_length]
            return self.backbone.embedder(str(self.backbone.tokenizer.decode(question, skip_special_tokens=True)))
        if self._config.pooling == "all":
            return torch.cat([self.transformed_prompts, tokens]).float().mean(0)
        return tokens[: row.prompt_length].float().mean(0)


def plain_losses(backbone: Backbone, prompts: Tensor, rows: Sequence[EncodedRow]) -> RowLosses:
    """Losses of the plain model, all layers, with `prompts` `(K', D)` before the token embeddings.

    This is how P1 is trained (differentiable with respect to `prompts`); with `K' = 0` it is the bare model.
    """
    prompts = prompts.to(backbone.device, backbone.dtype).expand(len(rows), -1, -1)
    hidden, lengths = packed(prompts, [embed(backbone, row) for row in rows])
    hidden = backbone.run_layers(hidden, lengths, 0, backbone.num_layers)
    return RowLosses(*packed_losses(backbone, hidden, lengths, rows), None)


def embed(backbone: Backbone, row: EncodedRow) -> Tensor:
    """Embeddings `(n, D)` of a row's tokens."""
    return backbone.embed(row.token_ids.to(backbone.device))


def packed(prompts: Tensor, tokens: list[Tensor]) -> tuple[Tensor, list[int]]:
    """Rows `[prompts ; tokens]` one behind the other: `(T, D)` and the length of each."""
    parts = [part for pair in zip(prompts, tokens, strict=True) for part in pair]
    return torch.cat(parts), [prompts.shape[1] + len(row) for row in tokens]


def packed_losses(
    backbone: Backbone, hidden: Tensor, lengths: list[int], rows: Sequence[EncodedRow]
) -> tuple[Tensor, Tensor]:
    """Loss sums and token counts `(R,)` from the last layer's packed output `(T, D)`.

    The head is applied to the positions that carry loss only: position `i - 1` predicts token `i`.
    """
    ends = torch.tensor(lengths).cumsum(0).tolist()
    counts = [len(row.token_ids) - row.loss_start for row in rows]
    positions = torch.cat([torch.arange(end - count - 1, end - 1) for end, count in zip(ends, counts, strict=True)])
    targets = torch.cat([row.token_ids[row.loss_start :] for row in rows])
    nll = backbone.token_nll(hidden[positions.to(hidden.device)], targets.to(hidden.device))
    num_tokens = torch.tensor(counts, device=nll.device)
    row_of_token = torch.arange(len(rows), device=nll.device).repeat_interleave(num_tokens)
    return nll.new_zeros(len(rows)).index_add(0, row_of_token, nll), num_tokens.float()


def check_inject_layer(layer: int, backbone: Backbone) -> None:
    """Refuse an injection layer that this backbone does not have.

    Raises:
        InputError: out of range.
    """
    if layer >= backbone.num_layers:
        last = backbone.num_layers - 1
        raise InputError(f"`inject-layer` is {layer}, but the backbone has layers 0 to {last}; choose one of them.")
