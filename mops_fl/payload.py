"""The wire contract: what each message and its reply carry, as Flower records. Nothing else leaves a client.

Train    `arrays`   the adapter, name -> float32
         `frozen`   the input prompts P1, and what rows are routed by where no gate does it
         `config`   server-round, cohort (partition ids trained together), cohort-number, num-cohorts
Reply    `arrays`   the trained adapter, same names and shapes
         `metrics`  num-examples, num-steps, num-tokens, loss-sum (nats), seconds, gate-mass (one number per expert)
Evaluate `arrays`, `frozen` as above, neither for the bare model
         `config`   tasks, by name
Reply    `metrics`  loss-sum (nats), num-tokens and num-rows of each task, gate-mass (task after task, each expert)
Query    nothing
Reply    `config`   partition-id, num-examples, trainer (clients that name the same one can be trained together),
                    backbone-sha256, data-sha256; if the rows are the client's own also its tasks and the rows-per-task
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.typing import NDArray

from mops_fl.config import to_key
from mops_fl.errors import InputError
from mops_fl.foreign_text import one_line

ARRAYS = "arrays"
FROZEN = "frozen"
CONFIG = "config"
METRICS = "metrics"
INPUT_PROMPTS = "input-prompts"
SERVER_ROUND = "server-round"
COHORT = "cohort"
COHORT_NUMBER = "cohort-number"
NUM_COHORTS = "num-cohorts"
TASKS = "tasks"
NOT_NUMBERED = -1  # the partition id of a client with rows of its own, until the server has numbered it

Arrays = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Cohort:
    """Clients that one trainer trains in one batch.

    Attributes:
        members: their partition ids.
        number: which of the trainer's cohorts this is in the round, from 0.
        count: cohorts that the trainer gets in the round; they may run at once.
    """

    members: tuple[int, ...]
    number: int
    count: int


@dataclass(frozen=True)
class TrainRequest:
    """What one client is asked.

    Attributes:
        server_round: round, from 1.
        cohort: who is trained in one batch, this client among them.
        adapter: the global adapter.
        frozen: P1 `(K', D)` as `input-prompts`, and what else the server trained or made before round 1.
    """

    server_round: int
    cohort: Cohort
    adapter: Arrays
    frozen: Arrays


@dataclass(frozen=True)
class TrainResult:
    """What one client answers.

    Attributes:
        adapter: the adapter after local training.
        num_examples: rows the client holds.
        num_steps: optimiser steps taken.
        num_tokens: tokens that carried loss, over all steps.
        loss_sum: their summed loss in nats.
        seconds: this client's share of the training time.
        gate_mass: summed gate score of each expert over the rows trained on; empty without a gate.
    """

    adapter: Arrays
    num_examples: int
    num_steps: int
    num_tokens: int
    loss_sum: float
    seconds: float
    gate_mass: tuple[float, ...]


@dataclass(frozen=True)
class ClientInfo:
    """What a node says of itself.

    Attributes:
        partition_id: which client it is, or `NOT_NUMBERED`.
        num_examples: rows it trains on.
        trainer: name of the resident trainer that works for it.
        backbone_sha256: of the weights it trains on, see `mops_fl.compressed.backbone_sha256`.
        own_rows: if its rows are its own and no part of a shared set, how many it has of each of its tasks.
        data_sha256: of the shared set that its rows are dealt from, see `mops_fl.data.TaskData`; empty if they are
            its own.
    """

    partition_id: int
    num_examples: int
    trainer: str
    backbone_sha256: str
    own_rows: Mapping[str, int] | None = None
    data_sha256: str = ""


@dataclass(frozen=True)
class EvaluateRequest:
    """What one client is asked to measure on the rows that it keeps back.

    Attributes:
        tasks: tasks in the order of the answer.
        adapter: the adapter; empty for the model without prompts.
        frozen: as in `TrainRequest`; empty likewise.
    """

    tasks: tuple[str, ...]
    adapter: Arrays
    frozen: Arrays


@dataclass(frozen=True)
class EvaluateResult:
    """What one client measured: sums over its rows of each task.

    Attributes:
        loss_sum: nats, per task.
        num_tokens: tokens that carried loss, per task.
        num_rows: rows, per task.
        gate_mass: summed gate score of each expert, task after task; empty without a gate.
    """

    loss_sum: tuple[float, ...]
    num_tokens: tuple[int, ...]
    num_rows: tuple[int, ...]
    gate_mass: tuple[float, ...]


# Names of the numbers in the reply to a train message.
TRAIN_METRICS = {to_key(field.name) for field in fields(TrainResult)} - {"adapter"}


def to_record(arrays: Arrays) -> ArrayRecord:
    """Arrays as a record, bit for bit."""
    return ArrayRecord({name: Array(np.ascontiguousarray(array)) for name, array in arrays.items()})


def from_record(record: ArrayRecord) -> dict[str, NDArray[np.float32]]:
    """A record as arrays, bit for bit."""
    return {name: array.numpy() for name, array in record.items()}


def encode_request(arrays: ArrayRecord, frozen: ArrayRecord, server_round: int, cohort: Cohort) -> RecordDict:
    """The content of a train message."""
    config = ConfigRecord(
        {
            SERVER_ROUND: server_round,
            COHORT: list(cohort.members),
            COHORT_NUMBER: cohort.number,
            NUM_COHORTS: cohort.count,
        }
    )
    return RecordDict({ARRAYS: arrays, FROZEN: frozen, CONFIG: config})


def decode_request(content: RecordDict) -> TrainRequest:
    """A train message's content."""
    config: dict[str, Any] = dict(content.config_records[CONFIG])
    return TrainRequest(
        server_round=config[SERVER_ROUND],
        cohort=Cohort(tuple(config[COHORT]), config[COHORT_NUMBER], config[NUM_COHORTS]),
        adapter=from_record(content.array_records[ARRAYS]),
        frozen=from_record(content.array_records[FROZEN]),
    )


def encode_result(result: TrainResult) -> RecordDict:
    """The content of a reply."""
    return RecordDict({ARRAYS: to_record(result.adapter), METRICS: MetricRecord(metrics_of(result))})


def metrics_of(result: TrainResult | EvaluateResult) -> dict[str, Any]:
    """A result's numbers under their wire names."""
    numbers = {to_key(name): value for name, value in vars(result).items() if name != "adapter"}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in numbers.items()}


def encode_info(info: ClientInfo) -> RecordDict:
    """The answer to the query who a node is."""
    config = ConfigRecord(
        {
            "partition-id": info.partition_id,
            "num-examples": info.num_examples,
            "trainer": info.trainer,
            "backbone-sha256": info.backbone_sha256,
            "data-sha256": info.data_sha256,
        }
    )
    if info.own_rows is not None:
        config[TASKS] = list(info.own_rows)
        config["rows-per-task"] = list(info.own_rows.values())
    return RecordDict({CONFIG: config})


def decode_info(content: RecordDict) -> ClientInfo:
    """A node's answer to the query who it is.

    Raises:
        InputError: it is not one.
    """
    config: dict[str, Any] = dict(content.config_records.get(CONFIG, {}))
    kinds = {"partition-id": int, "num-examples": int, "trainer": str, "backbone-sha256": str, "data-sha256": str}
    if any(type(config.get(name)) is not kind for name, kind in kinds.items()) or config["num-examples"] < 0:
        raise InputError(f"It answers {one_line(config)}, not who it is; update its software.")
    return ClientInfo(
        config["partition-id"],
        config["num-examples"],
        config["trainer"],
        config["backbone-sha256"],
        _own_rows(config),
        config["data-sha256"],
    )


def _own_rows(config: Mapping[str, Any]) -> dict[str, int] | None:
    if TASKS not in config:
        return None
    tasks, counts = config[TASKS], config.get("rows-per-task")
    if not isinstance(tasks, list) or not isinstance(counts, list) or len(tasks) != len(counts):
        raise InputError(f"It answers {one_line(config)}, not its rows of each task; update its software.")
    if any(type(count) is not int or count < 0 for count in counts):
        raise InputError(f"It answers {one_line(config)}, in which a task's rows are no count; update its software.")
    return dict(zip(tasks, counts, strict=True))


def encode_evaluate_request(request: EvaluateRequest) -> RecordDict:
    """The content of an evaluate message."""
    return RecordDict(
        {
            ARRAYS: to_record(request.adapter),
            FROZEN: to_record(request.frozen),
            CONFIG: ConfigRecord({TASKS: list(request.tasks)}),
        }
    )


def decode_evaluate_request(content: RecordDict) -> EvaluateRequest:
    """An evaluate message's content."""
    config: dict[str, Any] = dict(content.config_records[CONFIG])
    return EvaluateRequest(
        tasks=tuple(config[TASKS]),
        adapter=from_record(content.array_records[ARRAYS]),
        frozen=from_record(content.array_records[FROZEN]),
    )


def encode_evaluate_result(result: EvaluateResult) -> RecordDict:
    """The content of the reply to an evaluate message."""
    return RecordDict({METRICS: MetricRecord(metrics_of(result))})
