"""Loss of rows on a frozen model: rows packed one behind the other, the head on the positions that carry loss.

Letters: `R` rows, `T` packed positions, `K'` prompts, `n` tokens of a row, `D` hidden size, `E` experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mops_fl.backbone import Backbone
from mops_fl.encoding import EncodedRow


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
