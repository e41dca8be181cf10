"""The part of the run-config that a client reads."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_type_hints

from mops_fl.config import (
    OWN_EMBEDDING,
    AdapterConfig,
    BackboneConfig,
    DataConfig,
    PretrainConfig,
    Scalar,
    TrainConfig,
    read_section,
    require_at_least,
    require_choice,
    section_keys,
)
from mops_fl.errors import InputError
from partitioning.registry import PartitionConfig


@dataclass(frozen=True)
class TrainerConfig:
    """The trainer's own settings.

    Attributes:
        eval_rows: test rows that are measured, or rows that clients of a shared set keep back, spread evenly over the
            tasks; 0 for all. Clients with rows of their own measure on all that they keep back.
        evaluate_on: the `server` measures on its test rows, or each of the `clients` on rows that it keeps back.
        central_rows: what central training learns from, the `clients`' rows or the `server`'s.
        cache_megabytes: most memory for frozen hidden states, in MiB, on a GPU at most half of what the model leaves
            free; 0 keeps none there.
        cache_file_megabytes: most bytes of a memory-mapped file for those that the memory cannot take, in MiB.
    """

    eval_rows: int
    evaluate_on: str
    central_rows: str
    cache_megabytes: int
    cache_file_megabytes: int

    def __post_init__(self) -> None:
        require_at_least("eval-rows", self.eval_rows, 0)
        require_choice("evaluate-on", self.evaluate_on, ("server", "clients"))
        require_choice("central-rows", self.central_rows, ("clients", "server"))
        require_at_least("cache-megabytes", self.cache_megabytes, 0)
        require_at_least("cache-file-megabytes", self.cache_file_megabytes, 0)


@dataclass(frozen=True)
class ClientConfig:
    """Everything a client, and the trainer behind it, needs to know."""

    backbone: BackboneConfig
    data: DataConfig
    adapter: AdapterConfig
    pretrain: PretrainConfig
    train: TrainConfig
    partition: PartitionConfig
    trainer: TrainerConfig

    @classmethod
    def from_run_config(cls, run_config: Mapping[str, Scalar]) -> "ClientConfig":
        """Read the sections.

        Raises:
            InputError: a key is missing or holds a bad value.
        """
        try:
            config = cls(**{name: read_section(kind, run_config) for name, kind in get_type_hints(cls).items()})
        except InputError:
            raise
        except ValueError as error:
            raise InputError(str(error)) from error
        if config.trainer.evaluate_on == "clients" and config.data.held_out_tasks:
            raise InputError("`held-out-tasks` are tested where `evaluate-on` is 'server'; change one of them.")
        if config.adapter.prompt_init == "transformed" and not config.pretrain.input_prompts:
            raise InputError("`prompt-init` is 'transformed', but `input-prompts` is false; change one of them.")
        if config.adapter.pooling == "all" and config.backbone.gate_embedding != OWN_EMBEDDING:
            raise InputError(
                "`pooling` is 'all', but the model of `gate-embedding` sees the question only; change one."
            )
        if not config.data.server_rows:
            if config.adapter.routing == "nearest":
                raise InputError("`routing` is 'nearest', but `server-rows` is 0; give the server rows to route by.")
            if config.trainer.central_rows == "server":
                raise InputError("`central-rows` is 'server', but `server-rows` is 0; change one of them.")
        return config

    @staticmethod
    def keys() -> set[str]:
        """The run-config keys read here."""
        return section_keys(*get_type_hints(ClientConfig).values())
