"""The wire contract: what a train message and its reply carry, as Flower records.

Message  `arrays`   the adapter, name -> float32
         `frozen`   the input prompts P1, and what rows are routed by where no gate does it
         `config`   server-round, cohort (partition ids trained together), cohort-number, num-cohorts
Reply    `arrays`   the trained adapter, same names and shapes
         `metrics`  num-examples, num-steps, num-tokens, loss-sum (nats), seconds, gate-mass (one number per expert)
Query    `config`   partition-id, num-examples, trainer (clients that name the same one can be trained together)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.typing import NDArray

from mops_fl.errors import InputError

ARRAYS = "arrays"
FROZEN = "frozen"
CONFIG = "config"
METRICS = "metrics"
INPUT_PROMPTS = "input-prompts"
SERVER_ROUND = "server-round"
COHORT = "cohort"
COHORT_NUMBER = "cohort-number"
NUM_COHORTS = "num-cohorts"

Arrays = Mapping[str, NDArray[np.float32]]

_METRIC_NAMES = {"num-examples", "num-steps", "num-tokens", "loss-sum", "seconds", "gate-mass"}


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
        partition_id: which client it is.
        num_examples: rows it holds.
        trainer: name of the resident trainer that works for it.
    """

    partition_id: int
    num_examples: int
    trainer: str


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
    metrics = MetricRecord(
        {
            "num-examples": result.num_examples,
            "num-steps": result.num_steps,
            "num-tokens": result.num_tokens,
            "loss-sum": result.loss_sum,
            "seconds": result.seconds,
            "gate-mass": list(result.gate_mass),
        }
    )
    return RecordDict({ARRAYS: to_record(result.adapter), METRICS: metrics})


def check_result(content: RecordDict, expected: ArrayRecord) -> None:
    """Refuse a reply that must not be averaged in.

    Args:
        content: a reply's content; anything may be in it.
        expected: the arrays that were sent.

    Raises:
        InputError: records or metrics are missing or extra, shapes or dtypes differ, a value is not finite, or a
            count is not positive.
    """
    names = set(content), set(content.array_records), set(content.metric_records.get(METRICS, {}))
    if names != ({ARRAYS, METRICS}, {ARRAYS}, _METRIC_NAMES):
        raise InputError("The reply does not hold exactly the adapter and its metrics; update the client's software.")
    arrays = content.array_records[ARRAYS]
    if list(arrays) != list(expected):
        raise InputError(f"The reply holds the arrays {list(arrays)}, not {list(expected)}.")
    for name, array in arrays.items():
        _check_array(name, array, expected[name])
    _check_metrics(dict(content.metric_records[METRICS]))


def _check_array(name: str, array: Array, expected: Array) -> None:
    try:
        values = array.numpy()
    except (ValueError, TypeError, EOFError, OSError) as error:
        raise InputError(f"Array {name} cannot be decoded ({error}).") from error
    for shape, dtype in ((array.shape, array.dtype), (values.shape, values.dtype)):
        if (tuple(shape), str(dtype)) != (tuple(expected.shape), expected.dtype):
            raise InputError(f"Array {name} is {dtype} {tuple(shape)}, not {expected.dtype} {tuple(expected.shape)}.")
    if not np.isfinite(values).all():
        raise InputError(f"Array {name} holds values that are not finite; lower the client's learning rate.")


def _check_metrics(metrics: Mapping[str, Any]) -> None:
    for name in ("num-examples", "num-steps", "num-tokens"):
        if type(metrics[name]) is not int or metrics[name] <= 0:
            raise InputError(f"Metric {name} is {metrics[name]}, not a positive count.")
    for name in ("loss-sum", "seconds"):
        if not isinstance(metrics[name], int | float) or not np.isfinite(metrics[name]):
            raise InputError(f"Metric {name} is {metrics[name]}, not a finite number.")
    mass = metrics["gate-mass"]
    if not isinstance(mass, list) or not np.isfinite(mass).all() or min(mass, default=0) < 0:
        raise InputError(f"Metric gate-mass is {mass}, not a list of finite numbers of at least 0.")


def encode_info(info: ClientInfo) -> RecordDict:
    """The answer to the query who a node is."""
    config = ConfigRecord(
        {"partition-id": info.partition_id, "num-examples": info.num_examples, "trainer": info.trainer}
    )
    return RecordDict({CONFIG: config})


def decode_info(content: RecordDict) -> ClientInfo:
    """A node's answer to the query who it is."""
    config: dict[str, Any] = dict(content.config_records[CONFIG])
    return ClientInfo(config["partition-id"], config["num-examples"], config["trainer"])
