"""Central differential privacy: every client's update is clipped, and noise hides what any one of them contributed.

Clipping and noise are Flower's `DifferentialPrivacyServerSideFixedClipping` (McMahan et al. 2018, arXiv 1710.06963),
the epsilon is that of Flower's accountant (Renyi differential privacy, Google's dp-accounting).
"""

from dataclasses import dataclass

import numpy as np
from flwr.app import ArrayRecord, Message, MessageType, RecordDict
from flwr.serverapp import (
    GaussianPrivacyEvent,
    NeighboringRelation,
    PrivacyConfig,
    RdpAccountant,
    SamplingMethod,
)
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg

from mops_fl.config import require_not_negative, require_positive
from mops_fl.errors import InputError
from mops_fl.payload import ARRAYS, METRICS
from strategies.aggregation import Aggregate
from strategies.totals import WEIGHT


@dataclass(frozen=True)
class NoiseConfig:
    """Clipping and noise.

    Attributes:
        clip_norm: most length of one client's update; 0: no clipping and no noise.
        noise_multiplier: standard deviation of the noise on the sum of a round's updates, in units of `clip_norm`; 0:
            updates are clipped only.
        privacy_delta: the delta at which epsilon is stated; below 1 / `num-clients`, or it says nothing.
    """

    clip_norm: float
    noise_multiplier: float
    privacy_delta: float

    def __post_init__(self) -> None:
        require_not_negative("clip-norm", self.clip_norm)
        require_not_negative("noise-multiplier", self.noise_multiplier)
        if self.noise_multiplier and not self.clip_norm:
            raise InputError("`noise-multiplier` is set, but `clip-norm` is 0; noise is measured by it: set both.")
        require_positive("privacy-delta", self.privacy_delta)
        if self.privacy_delta >= 1:
            raise InputError(f"`privacy-delta` is {self.privacy_delta}; it must be below 1, for instance 0.00001.")


def private_mean(config: NoiseConfig, clients_per_round: int) -> Aggregate:
    """The mean of the clipped updates of all clients asked, with noise.

    A client without a usable reply counts as one whose update is zero. So the mean is always over as many, and what one
    client can change never depends on who else failed.

    The noise comes from the operating system, not from the run's seed: whoever can compute it can take it off again.
    """
    strategy = DifferentialPrivacyServerSideFixedClipping(
        FedAvg(weighted_by_key=WEIGHT),
        config.noise_multiplier,
        np.float64(config.clip_norm),  # divided by an update's length, which may be 0: no error with this type
        clients_per_round,
    )

    def aggregate(sent: ArrayRecord, replies: list[Message]) -> ArrayRecord:
        unchanged = RecordDict({ARRAYS: sent, METRICS: replies[0].content[METRICS]})
        silent = Message(unchanged, dst_node_id=0, message_type=MessageType.TRAIN)
        strategy.current_arrays = sent
        np.random.seed()  # Flower draws from this generator, which anybody may have seeded
        with np.errstate(divide="ignore"):
            arrays, _ = strategy.aggregate_train(0, [*replies, *[silent] * (clients_per_round - len(replies))])
        assert arrays is not None  # there are as many replies as clients
        return arrays

    return aggregate


def spent_epsilon(config: NoiseConfig, *, num_clients: int, clients_per_round: int, participations: int) -> float:
    """The epsilon at `privacy_delta` of the client that took part most often.

    Who takes part when follows from the run's seed, which is no secret, so sampling hides nobody: no amplification is
    claimed. For the same reason a client pays only for the rounds that it was asked in.

    Args:
        config: clipping and noise.
        num_clients: clients in all.
        clients_per_round: clients asked in a round.
        participations: most rounds that any one client was asked in.
    """
    relation, sampling = NeighboringRelation.ADD_OR_REMOVE_ONE, SamplingMethod.NO_AMPLIFICATION
    accountant = RdpAccountant(PrivacyConfig(config.privacy_delta, num_clients, relation, sampling))
    accountant.compose(GaussianPrivacyEvent(config.noise_multiplier, clients_per_round, num_clients), participations)
    return accountant.get_privacy_spent().epsilon
