"""Which clients train in a round, and who of them is trained in one batch."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np

from mops_fl.errors import InputError
from mops_fl.payload import ClientInfo, Cohort


class ClientSampler:
    """Samples clients by partition id with a seeded generator; a round's sample depends on seed and round alone.

    Flower's own sampling draws node ids with the global generator, and node ids are random in every run.

    Attributes:
        clients: partition id -> what the client said of itself at first; where it is trained follows it when it moves.
        node_of: partition id -> node id, of the clients that have rows; the others are never asked.
    """

    def __init__(
        self, clients: Mapping[int, ClientInfo], *, clients_per_round: int, cohort_size: int, seed: int
    ) -> None:
        """Take the clients in.

        Args:
            clients: node id -> who it is.
            clients_per_round: clients of one round.
            cohort_size: most clients that one trainer trains in one batch.
            seed: fixes every round's sample.

        Raises:
            InputError: fewer clients have rows than a round needs.
        """
        self.node_of = {info.partition_id: node_id for node_id, info in clients.items() if info.num_examples}
        if clients_per_round > len(self.node_of):
            raise InputError(
                f"`clients-per-round` is {clients_per_round}, but only {len(self.node_of)} of {len(clients)} clients "
                "have rows; lower it, or give more rows."
            )
        self.clients = {info.partition_id: info for info in clients.values()}
        self._clients_per_round = clients_per_round
        self._cohort_size = cohort_size
        self._seed = seed

    def move(self, client: int, node_id: int, trainer: str) -> None:
        """From now on a client is asked at another node; what it said of its rows at first still counts."""
        self.node_of[client] = node_id
        self.clients[client] = replace(self.clients[client], trainer=trainer)

    def most_participations(self, num_rounds: int, again: Iterable[int] = ()) -> int:
        """How often the client was sampled that was sampled most, in the first rounds and those made `again`."""
        rounds = [*range(1, num_rounds + 1), *again]
        counts = Counter(client for number in rounds for client in self._sample(number))
        return max(counts.values(), default=0)

    def cohorts(self, server_round: int) -> list[Cohort]:
        """A round's clients, dealt in turn into as few cohorts as their size allows, each on one trainer."""
        sampled = self._sample(server_round)
        cohorts = []
        for trainer in sorted({self.clients[client].trainer for client in sampled}):
            members = [client for client in sampled if self.clients[client].trainer == trainer]
            count = math.ceil(len(members) / self._cohort_size)
            cohorts += [Cohort(tuple(members[number::count]), number, count) for number in range(count)]
        return cohorts

    def _sample(self, server_round: int) -> list[int]:
        rng = np.random.default_rng([self._seed, server_round])
        return sorted(rng.choice(sorted(self.node_of), self._clients_per_round, replace=False).tolist())
