"""Which experts a row uses without a trained gate: those of the server's row whose question is nearest to its own.

The comparison that the paper leaves out. Nothing here is trained or averaged; the server's rows travel with P1, as
embeddings.

Letters: `S` rows of the server, `R` rows to be routed, `E` experts, `D` size of a gate input.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mops_fl.config import AdapterConfig
from mops_fl.errors import InputError

KEYS, EXPERTS = "neighbour-keys", "neighbour-experts"


@dataclass(frozen=True)
class Neighbours:
    """Rows whose expert is known.

    Attributes:
        keys: `(S, D)` float32 gate inputs, each of length one.
        experts: `(S, E)` float32, one at the row's own expert.
    """

    keys: Tensor
    experts: Tensor

    @classmethod
    def of(cls, pooled: Tensor, experts: Tensor, num_experts: int) -> "Neighbours":
        """From the gate inputs `(S, D)` of rows and the number `(S,)` of each one's expert."""
        return cls(F.normalize(pooled.float()).cpu(), F.one_hot(experts.cpu(), num_experts).float())

    @classmethod
    def from_frozen(cls, frozen: Mapping[str, Tensor], device: torch.device) -> "Neighbours | None":
        """From what travels beside the adapter; None if there are none."""
        return cls(frozen[KEYS].to(device), frozen[EXPERTS].to(device)) if KEYS in frozen else None

    def to_frozen(self) -> dict[str, Tensor]:
        """What travels beside the adapter."""
        return {KEYS: self.keys, EXPERTS: self.experts}

    def scores(self, pooled: Tensor) -> Tensor:
        """Scores `(R, E)` of rows with gate inputs `(R, D)`: one at the expert of the nearest key, by cosine."""
        cosines = F.normalize(pooled.float()) @ self.keys.T  # (R, S)
        return self.experts[cosines.argmax(1)]


def check_num_experts(config: AdapterConfig, num_tasks: int) -> None:
    """Refuse experts that no row would ever be routed to.

    Raises:
        InputError: rows go to their neighbours' expert, and there are more experts than tasks that are trained on.
    """
    if config.gated and config.routing == "nearest" and config.num_experts > num_tasks:
        raise InputError(
            f"`num-experts` is {config.num_experts}, but with `routing` 'nearest' each of the {num_tasks} tasks has "
            f"one and the others would never be used; set it to at most {num_tasks}."
        )
