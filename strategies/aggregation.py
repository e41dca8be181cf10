"""How usable replies become the next global adapter: the mean, or one of Flower's robust strategies.

Each is Flower's own strategy object, of which only `aggregate_train` is used; who is asked and what is accepted is
`strategies.fedprompt`'s.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from flwr.app import ArrayRecord, Message
from flwr.serverapp.strategy import FedAvg, FedMedian, FedTrimmedAvg, MultiKrum

from mops_fl.config import require_at_least, require_choice
from mops_fl.errors import InputError
from strategies.totals import WEIGHT

AGGREGATIONS = ("mean", "median", "trimmed-mean", "krum")

# (global adapter that was sent, usable replies in the order of their clients) -> the next global adapter.
Aggregate = Callable[[ArrayRecord, list[Message]], ArrayRecord]


@dataclass(frozen=True)
class AggregationConfig:
    """What is accepted from the clients and how it is joined.

    Attributes:
        aggregation: `mean` (paper), or robust: `median` or `trimmed-mean` of each number, or `krum`, the reply nearest
            to the others (Blanchard et al. 2017, arXiv 1703.02757).
        trimmed_fraction: trimmed-mean: share of the replies cut off at either end, number by number.
        krum_malicious: krum: hostile clients that a round may have; it needs two more honest ones than twice that.
        krum_selected: krum: so many of the nearest replies are averaged (1: Krum, more: Multi-Krum).
        max_norm_ratio: an update so many times as long as the round's median is refused; 0: none is.
        min_replies: a round with fewer usable replies ends the run.
    """

    aggregation: str
    trimmed_fraction: float
    krum_malicious: int
    krum_selected: int
    max_norm_ratio: float
    min_replies: int

    def __post_init__(self) -> None:
        require_choice("aggregation", self.aggregation, AGGREGATIONS)
        if not 0 <= self.trimmed_fraction < 0.5:
            raise InputError(f"`trimmed-fraction` is {self.trimmed_fraction}; it must be at least 0 and below 0.5.")
        require_at_least("krum-malicious", self.krum_malicious, 0)
        require_at_least("krum-selected", self.krum_selected, 1)
        if not (self.max_norm_ratio == 0 or 1 < self.max_norm_ratio < float("inf")):
            raise InputError(f"`max-norm-ratio` is {self.max_norm_ratio}; it must be 0 or a number above 1.")
        require_at_least("min-replies", self.min_replies, 1)


def check_cohort_size(config: AggregationConfig, clients_per_round: int) -> None:
    """Refuse rules that so many replies cannot satisfy.

    Raises:
        InputError: says which key to change.
    """
    if config.min_replies > clients_per_round:
        raise InputError(
            f"`min-replies` is {config.min_replies}, but only {clients_per_round} clients are asked in a round; lower "
            "it or raise `clients-per-round`."
        )
    if (needed := needed_replies(config)) > clients_per_round:
        rule = {
            "krum": f"to stand {config.krum_malicious} hostile ones and select {config.krum_selected}",
            "trimmed-mean": f"to cut off one at either end at a `trimmed-fraction` of {config.trimmed_fraction}",
        }[config.aggregation]
        raise InputError(
            f"`aggregation` is {config.aggregation!r}, which needs {needed} clients in a round {rule}, but "
            f"`clients-per-round` is {clients_per_round}; raise it."
        )


def needed_replies(config: AggregationConfig) -> int:
    """Least usable replies of which a round's rule still does what it is for."""
    if config.aggregation == "krum":
        return max(2 * config.krum_malicious + 3, config.krum_selected)
    if config.aggregation == "trimmed-mean" and config.trimmed_fraction:
        # Flower cuts off int(fraction * replies) at either end: with too few, none, and what is left is the mean.
        least = math.ceil(1 / config.trimmed_fraction)
        return least if int(config.trimmed_fraction * least) else least + 1
    return 1


def build_aggregate(config: AggregationConfig) -> Aggregate:
    """Flower's strategy of that name as a function."""
    strategy: FedAvg
    if config.aggregation == "median":
        strategy = FedMedian(weighted_by_key=WEIGHT)
    elif config.aggregation == "trimmed-mean":
        strategy = FedTrimmedAvg(weighted_by_key=WEIGHT, beta=config.trimmed_fraction)
    elif config.aggregation == "krum":
        strategy = MultiKrum(
            weighted_by_key=WEIGHT,
            num_malicious_nodes=config.krum_malicious,
            num_nodes_to_select=config.krum_selected,
        )
    else:
        strategy = FedAvg(weighted_by_key=WEIGHT)

    def aggregate(sent: ArrayRecord, replies: list[Message]) -> ArrayRecord:
        arrays, _ = strategy.aggregate_train(0, replies)
        assert arrays is not None  # there is a reply
        return arrays

    return aggregate
