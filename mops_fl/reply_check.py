"""What of a client's reply is believed: exactly the arrays that were sent, finite, and counts that are possible."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, RecordDict

from mops_fl.errors import InputError
from mops_fl.foreign_text import one_line
from mops_fl.payload import ARRAYS, METRICS, TRAIN_METRICS, EvaluateResult

_HEADER_SLACK_BYTES = 1024  # the same array may have a longer header from another numpy
_MOST_LOSS = 700  # of a token, in nats; a perplexity beyond exp(700) is no float any more
_MOST_ROWS = 2**32  # of a client and task; the sums over clients then stay far from the end of an int64
_ROUNDING = 1e-3  # of the gate mass of one row, which is 1


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
    if names != ({ARRAYS, METRICS}, {ARRAYS}, TRAIN_METRICS):
        raise InputError("The reply does not hold exactly the adapter and its metrics; update the client's software.")
    arrays = content.array_records[ARRAYS]
    if list(arrays) != list(expected):
        raise InputError(f"The reply holds the arrays {one_line(list(arrays))}, not {list(expected)}.")
    for name, array in arrays.items():
        _check_array(name, array, expected[name])
    _check_metrics(dict(content.metric_records[METRICS]), limits)


def checked_sums(content: RecordDict, num_tasks: int, num_experts: int, tokens_per_row: int) -> EvaluateResult:
    """The measurement of an evaluation's reply, if it can be added to others.

    Args:
        content: a reply's content; anything may be in it.
        num_tasks: tasks that were asked for.
        num_experts: experts of the adapter's gate, 0 without one.
        tokens_per_row: most that one row may have.

    Raises:
        InputError: it does not hold one possible sum for each task, and for each of its experts.
    """
    metrics: dict[str, Any] = dict(content.metric_records.get(METRICS, {}))
    lengths = {"loss-sum": num_tasks, "num-tokens": num_tasks, "num-rows": num_tasks}
    lengths["gate-mass"] = num_tasks * num_experts
    if set(metrics) != set(lengths):
        raise InputError("The reply does not hold exactly the sums of an evaluation; update the client's software.")
    for name, length in lengths.items():
        values = metrics[name]
        if not isinstance(values, list) or len(values) != length:
            raise InputError(f"Metric {name} is not a list of {length} numbers.")
        if not np.isfinite(values).all() or min(values, default=0) < 0:
            raise InputError(f"Metric {name} is {one_line(values)}, not finite numbers of at least 0.")
        if name.startswith("num-") and any(type(value) is not int for value in values):
            raise InputError(f"Metric {name} is {one_line(values)}, not counts.")
    num_rows, num_tokens = metrics["num-rows"], metrics["num-tokens"]
    if max(num_rows, default=0) > _MOST_ROWS:
        raise InputError(f"Metric num-rows is {one_line(num_rows)}, more rows than any client has.")
    if any(count > tokens_per_row * rows for count, rows in zip(num_tokens, num_rows, strict=True)):
        raise InputError(f"Metric num-tokens is {one_line(num_tokens)}, more than so few rows can have.")
    if any(loss > _MOST_LOSS * n for loss, n in zip(metrics["loss-sum"], num_tokens, strict=True)):
        raise InputError(f"Metric loss-sum is {one_line(metrics['loss-sum'])}, more than any loss of so few tokens.")
    for task in range(num_tasks):
        mass = sum(metrics["gate-mass"][task * num_experts : (task + 1) * num_experts])
        if mass > num_rows[task] * (1 + _ROUNDING):
            raise InputError(f"Metric gate-mass adds up to {mass:g} in a task, more than its {num_rows[task]} rows.")
    return EvaluateResult(**{name.replace("-", "_"): tuple(metrics[name]) for name in lengths})


def _check_array(name: str, array: Array, expected: Array) -> None:
    if len(array.data) > len(expected.data) + _HEADER_SLACK_BYTES:
        raise InputError(f"Array {name} takes {len(array.data):,} bytes, not {len(expected.data):,} as was sent.")
    try:
        values = array.numpy()
    except Exception as error:  # numpy hands a header to Python's parser, which fails in many ways
        raise InputError(f"Array {name} cannot be decoded ({one_line(error)}).") from error
    if not isinstance(values, np.ndarray):  # numpy opens an archive of arrays just as well
        raise InputError(f"Array {name} cannot be decoded (it is a {type(values).__name__}).")
    for shape, dtype in ((array.shape, array.dtype), (values.shape, values.dtype)):
        if (tuple(shape), str(dtype)) != (tuple(expected.shape), expected.dtype):
            found = one_line(f"{dtype} {tuple(shape)}")
            raise InputError(f"Array {name} is {found}, not {expected.dtype} {tuple(expected.shape)}.")
    if not np.isfinite(values).all():
        raise InputError(f"Array {name} holds values that are not finite; lower the client's learning rate.")


def _check_metrics(metrics: Mapping[str, Any], limits: ReplyLimits) -> None:
    for name in ("num-examples", "num-steps", "num-tokens"):
        if type(metrics[name]) is not int or metrics[name] <= 0:
            raise InputError(f"Metric {name} is {one_line(metrics[name])}, not a positive count.")
    num_rows = metrics["num-steps"] * limits.rows_per_step
    for name, most in (("num-steps", limits.num_steps), ("num-tokens", num_rows * limits.tokens_per_row)):
        if metrics[name] > most:
            raise InputError(f"Metric {name} is {metrics[name]}, more than the {most} that were possible.")
    for name in ("loss-sum", "seconds"):
        if not isinstance(metrics[name], int | float) or not np.isfinite(metrics[name]):
            raise InputError(f"Metric {name} is {one_line(metrics[name])}, not a finite number.")
    mass = metrics["gate-mass"]
    if not isinstance(mass, list) or not np.isfinite(mass).all() or min(mass, default=0) < 0:
        raise InputError(f"Metric gate-mass is {one_line(mass)}, not a list of finite numbers of at least 0.")
    if sum(mass) > num_rows * (1 + _ROUNDING):
        raise InputError(f"Metric gate-mass adds up to {sum(mass):g}, more than the {num_rows} rows trained on.")
