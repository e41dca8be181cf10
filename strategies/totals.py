"""Sums over replies: means are made of counts and sums, never of means."""

from typing import Any

import numpy as np
from flwr.app import MetricRecord, RecordDict

from mops_fl.payload import METRICS

WEIGHT = "weight"


def sum_metrics(contents: list[RecordDict]) -> MetricRecord:
    """Sum the clients' counts and sums."""
    totals: dict[str, Any] = {}
    for content in contents:
        for name, value in content.metric_records[METRICS].items():
            if isinstance(value, list):
                totals[name] = np.add(totals.get(name, [0.0] * len(value)), value).tolist()
            elif name != WEIGHT:
                totals[name] = totals.get(name, 0) + value
    return MetricRecord(totals)


def num_bytes(content: RecordDict) -> int:
    """Bytes of the arrays in a message."""
    return sum(record.count_bytes() for record in content.array_records.values())
