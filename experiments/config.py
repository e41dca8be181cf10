"""The whole run-config of an experiment, read once."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from clients.config import ClientConfig
from mops_fl.config import (
    OWN_EMBEDDING,
    Scalar,
    read_section,
    require_at_least,
    require_choice,
    require_not_negative,
    require_positive,
    section_keys,
    to_key,
)
from mops_fl.errors import InputError
from strategies.aggregation import AggregationConfig, check_cohort_size
from strategies.fedprompt import WEIGHTINGS
from strategies.privacy import NoiseConfig


@dataclass(frozen=True)
class FederationConfig:
    """Rounds, sampling and evaluation.

    Attributes:
        clients_per_round: clients sampled in each round (paper: 10).
        num_server_rounds: rounds (paper: 20).
        cohort_size: most clients trained in one batch.
        weighting: `uniform` (paper), `num-examples` or `gate-mass` (see `strategies.mops.MoPs`).
        server_weight: what the server's own training counts beside the clients', in clients; 0: it does not train.
        round_timeout: seconds after which a round goes on without the replies that are missing.
        evaluate_every: rounds between two evaluations; the start and the last round are always evaluated.
        output_dir: the run's folder; empty: `runs/<dataset>-<method>-<UTC time>`.
        resume: go on from the last complete round in `output_dir`.
    """

    clients_per_round: int
    num_server_rounds: int
    cohort_size: int
    weighting: str
    server_weight: float
    round_timeout: float
    evaluate_every: int
    output_dir: str
    resume: bool

    def __post_init__(self) -> None:
        require_choice("weighting", self.weighting, WEIGHTINGS)
        require_not_negative("server-weight", self.server_weight)
        require_positive("round-timeout", self.round_timeout)
        for name in ("clients_per_round", "num_server_rounds", "cohort_size", "evaluate_every"):
            require_at_least(to_key(name), getattr(self, name), 1)


@dataclass(frozen=True)
class ExperimentConfig:
    """Everything a run is made of."""

    client: ClientConfig
    federation: FederationConfig
    aggregation: AggregationConfig
    noise: NoiseConfig

    @classmethod
    def from_run_config(cls, run_config: Mapping[str, Scalar]) -> "ExperimentConfig":
        """Read and check every key.

        Raises:
            InputError: a key is missing, unknown, of the wrong type or out of range, or two keys contradict.
        """
        known = ClientConfig.keys() | section_keys(FederationConfig, AggregationConfig, NoiseConfig)
        if unknown := sorted(set(run_config) - known):
            raise InputError(f"Unknown run-config key `{unknown[0]}`; known are: {', '.join(sorted(known))}.")
        config = cls(
            ClientConfig.from_run_config(run_config),
            read_section(FederationConfig, run_config),
            read_section(AggregationConfig, run_config),
            read_section(NoiseConfig, run_config),
        )
        adapter = config.client.adapter
        if not adapter.gated and config.federation.weighting == "gate-mass":
            raise InputError(
                f"`weighting` is 'gate-mass', but {adapter.method} has no gate; choose uniform or num-examples."
            )
        num_clients, per_round = config.client.partition.num_clients, config.federation.clients_per_round
        if per_round > num_clients:
            raise InputError(
                f"`clients-per-round` is {per_round}, but `num-clients` is {num_clients}; lower one or raise the other."
            )
        check_cohort_size(config.aggregation, per_round)
        if config.federation.server_weight and not config.client.data.server_rows:
            raise InputError("`server-weight` is above 0, but `server-rows` is 0; give the server rows to train on.")
        config._require_equal_clients()
        return config

    def _require_equal_clients(self) -> None:
        """Robust aggregation and privacy count every client alike, and no one else.

        Raises:
            InputError: another key says otherwise, or both are wanted at once.
        """
        federation, aggregation = self.federation, self.aggregation.aggregation
        private = self.noise.clip_norm > 0
        if private and aggregation != "mean":
            raise InputError(
                f"`aggregation` is {aggregation!r}, but `clip-norm` needs the mean, whose noise is known to suffice; "
                "set one of them back."
            )
        if private or aggregation != "mean":
            reason = "`clip-norm` is set" if private else f"`aggregation` is {aggregation!r}"
            if federation.weighting != "uniform":
                raise InputError(f"{reason}, which counts all clients alike; set `weighting` to 'uniform'.")
            if federation.server_weight:
                raise InputError(f"{reason}, which counts clients only; set `server-weight` to 0.")


def with_absolute_models(run_config: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """The values with the paths of local models absolute, as a run writes them into its folder."""
    names = {key: str(run_config[key]) for key in ("backbone", "gate-embedding")}
    if names["gate-embedding"] == OWN_EMBEDDING:  # no model's name, whatever folder there is
        del names["gate-embedding"]
    absolute = {key: str(Path(name).absolute()) for key, name in names.items() if name and Path(name).is_dir()}
    return {**run_config, **absolute}
