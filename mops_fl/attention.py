"""Attention over rows packed into one sequence, with the gate on the prompts' values.

Rows of different lengths stand one behind the other in a single sequence `(1, H, T, d)`, so that no position is
padding; each row attends, causally, to itself only, or, a single row, to a prefix and itself. The gate of MoPs
multiplies the attention weights onto prompt `j` by its score `g_j` after the softmax (paper, Section 3.2). Since
`sum_j a_ij g_j v_j`, scaling the value vectors is the same thing, and any attention kernel can be used below.

Generation runs a padded batch behind a cache instead; `visibility` then says who sees whom.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PACKED_ATTENTION = "mops_packed"

# Sliding window or None -> mask `(B, 1, q, S)`, True where a query sees a key; None where each sees all.
Visibility = Callable[[int | None], Tensor | None]

# What decoder layers hand on and causal attention of a frozen model has no use for.
UNUSED_KEYWORDS = {"dropout", "position_ids", "use_cache"}


class SharedPrefix:
    """Keys and values of positions that stand before every row, computed once.

    Decoder layers take it as transformers' `past_key_values`: the first pass fills it, later ones only read.

    Attributes:
        length: its positions, 0 until it is filled.
    """

    def __init__(self) -> None:
        self.length = 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: object) -> tuple[Tensor, Tensor]:
        """Keys and values `(1, G, S + T, d)` of the prefix and a row; the first call of a layer sets its prefix."""
        if layer_idx not in self._layers:
            self._layers[layer_idx] = (key, value)
            return key, value
        prefix_key, prefix_value = self._layers[layer_idx]
        return torch.cat([prefix_key, key], 2), torch.cat([prefix_value, value], 2)

    def put_into(self, cache: Cache, num_rows: int) -> None:
        """Begin the cache of `num_rows` rows with these positions, in the layers that ran on them."""
        for layer_idx, (key, value) in self._layers.items():
            cache.update(key.expand(num_rows, -1, -1, -1), value.expand(num_rows, -1, -1, -1), layer_idx)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    scaling: float,
    lengths: list[int] | None = None,
    visible: Visibility | None = None,
    value_scale: Tensor | None = None,
    sliding_window: int | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """Attend within each packed row; the signature is that of transformers' attention functions.

    Args:
        module: the attention module of the decoder layer.
        query: `(1, H, T, d)`.
        key: `(1, G, T, d)` with `H` a multiple of `G` (grouped queries); for a single row behind a prefix of `S`
            positions `(1, G, S + T, d)`.
        value: as `key`.
        attention_mask: always None, the rows are causal.
        scaling: factor on the scores before the softmax.
        lengths: length of each row; they sum to `T`.
        visible: given instead of `lengths`: the rows are a padded batch, query `(B, H, q, d)`, key `(B, G, S, d)`.
        value_scale: `(T,)` factor on the value vectors: the gate's score at prompts, one elsewhere.
        sliding_window: number of last positions a query sees, None for all.
        others: what else the layer asks for, such as a soft cap of the scores or attention sinks; all None.

    Returns:
        `(1, T, H, d)` and None for the weights, which are never formed as such.

    Raises:
        NotImplementedError: the layer has a mask of its own, or asks for something else that is not here.
    """
    asked = {"attention_mask": attention_mask, **others}
    if unknown := [name for name, value in asked.items() if value is not None and name not in UNUSED_KEYWORDS]:
        raise NotImplementedError(f"attention with {' and '.join(unknown)} is not implemented")
    if lengths is None:
        assert visible is not None
        return sdpa_attention_forward(module, query, key, value, visible(sliding_window), scaling=scaling)
    if value_scale is not None:
        value = value * value_scale.to(value.dtype)[:, None]
    attend = _fused_attention if query.is_cuda else _matmul_attention
    return attend(query, key, value, lengths, scaling, sliding_window).transpose(1, 2), None


def visibility(kept: Tensor, positions: Tensor, num_queries: int) -> Visibility:
    """Who sees whom in a padded batch: each query the kept keys at its own position and before.

    Going by positions, not by places, lets padding stand anywhere; a padding query sees something too, so that no
    softmax is over nothing.

    Args:
        kept: `(B, S)` bool, False at padding.
        positions: `(B, S)` position of each place in its row.
        num_queries: the queries `q` are the last places.
    """

    @functools.cache
    def visible(window: int | None) -> Tensor | None:
        distance = positions[:, -num_queries:, None] - positions[:, None]  # (B, q, S)
        seen = kept[:, None] & (distance >= 0)
        if window is not None:
            seen &= distance < window
        return None if num_queries == 1 and bool(seen.all()) else seen[:, None]

    return visible


def _matmul_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scaling: float, window: int | None
) -> Tensor:
    """Row by row as plain matrix products: on CPUs several times faster than the library's fused kernel."""
    key_lengths = lengths if len(lengths) > 1 else [key.shape[2]]
    rows = zip(query.split(lengths, 2), key.split(key_lengths, 2), value.split(key_lengths, 2), strict=True)
    return torch.cat([_matmul_attention_of_row(q, k, v, scaling, window) for q, k, v in rows], 2)


def _matmul_attention_of_row(q: Tensor, k: Tensor, v: Tensor, scaling: float, window: int | None) -> Tensor:
    _, num_heads, length, size = q.shape
    num_groups, num_keys = k.shape[1:3]
    q = q.reshape(num_groups, -1, size) * scaling
    scores = (q @ k[0].transpose(1, 2)).view(num_groups, -1, length, num_keys)
    weights = (scores + _causal_bias(length, num_keys, window, q.dtype, q.device)).softmax(-1)
    return (weights.view(num_groups, -1, num_keys) @ v[0]).view(1, num_heads, length, size)


def _fused_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scaling: float, window: int | None
) -> Tensor:
    """All rows in one call of the library's kernel, padded behind their ends, where no causal query looks."""
    grouped = query.shape[1] != key.shape[1]
    if len(lengths) > 1:
        padded, kept = _padding(tuple(lengths), query.device)
        query, key, value = (packed[0, :, padded].transpose(0, 1) for packed in (query, key, value))
    length, num_keys = query.shape[2], key.shape[2]
    causal = length == num_keys and (window is None or length <= window)
    bias = None if causal else _causal_bias(length, num_keys, window, query.dtype, query.device)
    attended = F.scaled_dot_product_attention(
        query, key, value, attn_mask=bias, is_causal=causal, scale=scaling, enable_gqa=grouped
    )
    return attended if len(lengths) == 1 else attended.transpose(0, 1).flatten(1, 2)[None, :, kept]


@functools.lru_cache(maxsize=8)
def _padding(lengths: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """`(R, longest)` the packed position at each padded one, and `(T,)` the padded position of each packed one."""
    starts = torch.tensor(lengths).cumsum(0) - torch.tensor(lengths)
    columns = torch.arange(max(lengths))
    inside = columns < torch.tensor(lengths)[:, None]
    # Padding reads here and there: the backward pass adds up one by one what was read from the same place.
    anywhere = torch.arange(inside.numel()).view_as(inside) % sum(lengths)
    padded = torch.where(inside, starts[:, None] + columns, anywhere)
    return padded.to(device), inside.flatten().nonzero()[:, 0].to(device)


# Every layer of a pass asks again, for each of its rows. 64 of 1,094 positions are 146 MiB in bfloat16 at the most. A
# view of one large square would need no such number, but adding it takes longer: 2 to 6 % of the whole attention.
@functools.lru_cache(maxsize=64)
def _causal_bias(length: int, num_keys: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`(length, num_keys)`: zero where a query may look, minus infinity elsewhere; the last query sees every key."""
    last_key = num_keys - length  # of the first query
    visible = torch.ones(length, num_keys, dtype=torch.bool, device=device).tril(last_key)
    if window is not None:
        visible = visible.triu(last_key + 1 - window)
    return torch.zeros(length, num_keys, dtype=dtype, device=device).masked_fill(~visible, float("-inf"))


ALL_ATTENTION_FUNCTIONS.register(PACKED_ATTENTION, packed_attention)
