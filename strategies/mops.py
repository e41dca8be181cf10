"""MoPs: expert prompts and gate are averaged together, and each client says how much its gate used each expert."""

import numpy as np
from flwr.app import Array, ArrayRecord, RecordDict
from numpy.typing import NDArray

from mops_fl.payload import ARRAYS, METRICS
from strategies.fedprompt import FedPrompt
from strategies.totals import WEIGHT


class MoPs(FedPrompt):
    """Federated MoPs (paper, Section 4): FedAvg of everything trainable, experts and gate.

    The round's `gate-mass`, summed over clients, shows which experts their rows went to. With the weighting `gate-mass`
    (ours, not the paper's) it also says whose prompts count: each expert's are averaged with the clients' masses on it
    as weights, so that a client whose gate never used it does not drag it back. Gates are averaged plainly.
    """

    def drift(self, adapters: list[dict[str, NDArray[np.float32]]]) -> dict[str, float]:
        """Beside that of everything, that of each expert's prompts."""
        variance = np.stack([adapter["prompts"] for adapter in adapters]).var(0).reshape(self._num_experts, -1)
        per_expert = {f"drift-expert-{e}": float(np.sqrt(v.mean())) for e, v in enumerate(variance)}
        return super().drift(adapters) | per_expert

    def adjust(self, average: ArrayRecord, contents: list[RecordDict]) -> ArrayRecord:
        """With the weighting `gate-mass`, the average of each expert's prompts by the clients' use of it."""
        if self._weighting != "gate-mass":
            return average
        metrics = [dict(content.metric_records[METRICS]) for content in contents]
        mass = np.array([np.multiply(one["gate-mass"], one[WEIGHT]) for one in metrics])  # (clients, experts)
        unused = mass.sum(0) == 0
        weights = np.where(unused, 1.0, mass) / np.where(unused, len(mass), mass.sum(0))
        prompts = np.stack([content.array_records[ARRAYS]["prompts"].numpy() for content in contents])
        experts = prompts.reshape(len(mass), mass.shape[1], -1, prompts.shape[2])  # (clients, experts, prompts, hidden)
        averaged = np.einsum("ce,cepd->epd", weights, experts).reshape(prompts.shape[1:])
        average["prompts"] = Array(averaged.astype(np.float32))
        return average
