"""What of a client's reply is believed: exactly the arrays that were sent, finite, and counts that are possible."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from zipfile import BadZipFile

import numpy as np
from flwr.app import Array, ArrayRecord, RecordDict

from mops_fl.errors import InputError
from mops_fl.payload import ARRAYS, METRICS, shortened

_HEADER_SLACK_BYTES = 1024  # the same array may have a longer header from another numpy
_ROUNDING = 1e-3  # of the gate mass of one row, which is 1

_METRIC_NAMES = {"num-examples", "num-steps", "num-tokens", "loss-sum", "seconds", "gate-mass"}


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
    if names != ({ARRAYS, METRICS}, {ARRAYS}, _METRIC_NAMES):
        raise InputError("The reply does not hold exactly the adapter and its metrics; update the client's software.")
    arrays = content.array_records[ARRAYS]
    if list(arrays) != list(expected):
        raise InputError(f"The reply holds the arrays {shortened(list(arrays))}, not {list(expected)}.")
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
            raise InputError(f"Metric {name} is {shortened(metrics[name])}, not a positive count.")
    num_rows = metrics["num-steps"] * limits.rows_per_step
    for name, most in (("num-steps", limits.num_steps), ("num-tokens", num_rows * limits.tokens_per_row)):
        if metrics[name] > most:
            raise InputError(f"Metric {name} is {metrics[name]}, more than the {most} that were possible.")
    for name in ("loss-sum", "seconds"):
        if not isinstance(metrics[name], int | float) or not np.isfinite(metrics[name]):
            raise InputError(f"Metric {name} is {shortened(metrics[name])}, not a finite number.")
    mass = metrics["gate-mass"]
    if not isinstance(mass, list) or not np.isfinite(mass).all() or min(mass, default=0) < 0:
        raise InputError(f"Metric gate-mass is {shortened(mass)}, not a list of finite numbers of at least 0.")
    if sum(mass) > num_rows * (1 + _ROUNDING):
        raise InputError(f"Metric gate-mass adds up to {sum(mass):g}, more than the {num_rows} rows trained on.")
