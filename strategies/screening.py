"""Updates compared with each other: one that is far longer than the others is broken or hostile."""

import statistics
from collections.abc import Mapping

import numpy as np
from flwr.app import ArrayRecord


def overlong_updates(sent: ArrayRecord, replies: Mapping[int, ArrayRecord], max_ratio: float) -> dict[int, str]:
    """Why an update is refused, for each one that is.

    Of one or two updates, or where half of them are zero, none can be called the odd one out.

    Args:
        sent: the global adapter.
        replies: client -> the adapter that it sent back; names, shapes and dtypes are those of `sent`.
        max_ratio: times the median of the updates' lengths (Euclidean norm) that is still accepted; 0: anything.
    """
    if not max_ratio or len(replies) < 3:
        return {}
    norms = {client: _update_norm(sent, arrays) for client, arrays in replies.items()}
    median = statistics.median(norms.values())
    return {
        client: f"refused: Its update is {norm:.3g} long, {norm / median:.0f} times the round's median of {median:.3g}."
        for client, norm in norms.items()
        if norm > max_ratio * median > 0
    }


def _update_norm(sent: ArrayRecord, arrays: ArrayRecord) -> float:
    """In float64, where no finite float32 overflows when squared."""
    differences = (arrays[name].numpy().astype(np.float64) - sent[name].numpy() for name in sent)
    return float(np.sqrt(sum(np.sum(np.square(difference)) for difference in differences)))
