"""What a client with rows of its own tells of them is refused unless it is a count for each task."""

import pytest
from flwr.app import ConfigRecord, RecordDict

from mops_fl.errors import InputError
from mops_fl.payload import decode_info

INFO = {"partition-id": -1, "num-examples": 3, "trainer": "a", "backbone-sha256": "c0ffee", "data-sha256": ""}


@pytest.mark.parametrize(
    ("tasks", "counts"),
    [(["a", "b"], [1]), ("a", [1]), (["a"], 1), (["a"], [-1]), (["a"], [1.0]), (["a"], ["1"]), (["a"], None)],
)
def test_rows_of_ones_own_that_are_no_counts_are_refused(tasks, counts):
    config = {**INFO, "tasks": tasks, **({} if counts is None else {"rows-per-task": counts})}
    with pytest.raises(InputError, match="update its software"):
        decode_info(RecordDict({"config": ConfigRecord(config)}))
