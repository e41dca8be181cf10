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
from zipfile import BadZipFile

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

_HEADER_SLACK_BYTES = 1024  # the same array may have a longer header from another numpy
_ROUNDING = 1e-3  # of the gate mass of one row, which is 1

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


@dataclass(frozen=True)
class ReplyLimits:
    """Most that a reply may claim to have done in a round.

    Attributes:
        num_steps: optimiser steps.
        rows_per_step: rows of one step.
        tokens_per_row: tokens of one row.
    """

    num_steps: int
    rows_per_step: int
    tokens_per_row: int


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


def check_result(content: RecordDict, expected: ArrayRecord, limits: ReplyLimits) -> None:
    """Refuse a reply that must not be averaged in.

    Args:
        content: a reply's content; anything may be in it.
        expected: the arrays that were sent.
        limits: most that the client was asked to do.

    Raises:
        InputError: records or metrics are missing or extra, arrays are larger than those that were sent, shapes or
            dtypes differ, a value is not finite, or a count is not positive or beyond its limit.
    """
    names = set(content), set(content.array_records), set(content.metric_records.get(METRICS, {}))
    if names != ({ARRAYS, METRICS}, {ARRAYS}, _METRIC_NAMES):
        raise InputError("The reply does not hold exactly the adapter and its metrics; update the client's software.")
    arrays = content.array_records[ARRAYS]
    if list(arrays) != list(expected):
        raise InputError(f"The reply holds the arrays {_shortened(list(arrays))}, not {list(expected)}.")
    for name, array in arrays.items():
        _check_array(name, array, expected[name])
    _check_metrics(dict(content.metric_records[METRICS]), limits)


def _check_array(name: str, array: Array, expected: Array) -> None:
    if len(array.data) > len(expected.data) + _HEADER_SLACK_BYTES:
        raise InputError(f"Array {name} takes {len(array.data):,} bytes, not {len(expected.data):,} as was sent.")
    try:
        values = array.numpy()
    except (ValueError, TypeError, EOFError, OSError, SyntaxError, MemoryError, BadZipFile) as error:
        raise InputError(f"Array {name} cannot be decoded ({error}).") from error
    if not isinstance(values, np.ndarray):  # numpy opens an archive of arrays just as well
        raise InputError(f"Array {name} cannot be decoded (it is a {type(values).__name__}).")
    for shape, dtype in ((array.shape, array.dtype), (values.shape, values.dtype)):
        if (tuple(shape), str(dtype)) != (tuple(expected.shape), expected.dtype):
            raise InputError(f"Array {name} is {dtype} {tuple(shape)}, not {expected.dtype} {tuple(expected.shape)}.")
    if not np.isfinite(values).all():
        raise InputError(f"Array {name} holds values that are not finite; lower the client's learning rate.")


def _check_metrics(metrics: Mapping[str, Any], limits: ReplyLimits) -> None:
    for name in ("num-examples", "num-steps", "num-tokens"):
        if type(metrics[name]) is not int or metrics[name] <= 0:
            raise InputError(f"Metric {name} is {_shortened(metrics[name])}, not a positive count.")
    num_rows = metrics["num-steps"] * limits.rows_per_step
    for name, most in (("num-steps", limits.num_steps), ("num-tokens", num_rows * limits.tokens_per_row)):
        if metrics[name] > most:
            raise InputError(f"Metric {name} is {metrics[name]}, more than the {most} that were possible.")
    for name in ("loss-sum", "seconds"):
        if not isinstance(metrics[name], int | float) or not np.isfinite(metrics[name]):
            raise InputError(f"Metric {name} is {_shortened(metrics[name])}, not a finite number.")
    mass = metrics["gate-mass"]
    if not isinstance(mass, list) or not np.isfinite(mass).all() or min(mass, default=0) < 0:
        raise InputError(f"Metric gate-mass is {_shortened(mass)}, not a list of finite numbers of at least 0.")
    if sum(mass) > num_rows * (1 + _ROUNDING):
        raise InputError(f"Metric gate-mass adds up to {sum(mass):g}, more than the {num_rows} rows trained on.")


def _shortened(value: object) -> str:
    text = str(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def encode_info(info: ClientInfo) -> RecordDict:
    """The answer to the query who a node is."""
    config = ConfigRecord(
        {"partition-id": info.partition_id, "num-examples": info.num_examples, "trainer": info.trainer}
    )
    return RecordDict({CONFIG: config})


def decode_info(content: RecordDict) -> ClientInfo:
    """A node's answer to the query who it is.

    Raises:
        InputError: it is not one.
    """
    config: dict[str, Any] = dict(content.config_records.get(CONFIG, {}))
    kinds = {"partition-id": int, "num-examples": int, "trainer": str}
    if any(type(config.get(name)) is not kind for name, kind in kinds.items()) or config["num-examples"] < 0:
        raise InputError(f"It answers {_shortened(config)}, not who it is; update its software.")
    return ClientInfo(config["partition-id"], config["num-examples"], config["trainer"])
