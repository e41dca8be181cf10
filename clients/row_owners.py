"""Which rows a client trains on and which it keeps back, whether they were dealt to it or are its own."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from clients.config import ClientConfig
from mops_fl.data import Row, TaskData, load_task_data, spread_rows
from mops_fl.errors import InputError
from mops_fl.own_rows import keep_back, load_own_rows, load_server_rows
from partitioning import OWN_ROWS
from partitioning.manifest import build_manifest
from partitioning.registry import partition_rows


class RowOwners:
    """The rows of an experiment and their owners, as far as this machine has them; loaded when first asked for."""

    def __init__(self, config: ClientConfig, own_data: str) -> None:
        """Take the config.

        Args:
            config: the config.
            own_data: file or folder with the rows of the one client that is known here; empty where clients share a
                data set, and on the server.
        """
        self._config = config
        self.own_data = own_data

    @cached_property
    def data(self) -> TaskData:
        """All rows that there are on this machine."""
        if self.own_data:
            return load_own_rows(self._config.data, self.own_data)
        if self._config.partition.partitioner == OWN_ROWS:
            return load_server_rows(self._config.data, with_test=self._config.trainer.evaluate_on == "server")
        return load_task_data(self._config.data)

    @cached_property
    def shared_sha256(self) -> str:
        """Of the data set that rows are dealt from; empty for a client's own, of which nothing is told."""
        return "" if self.own_data else self.data.sha256

    @property
    def measured_rows(self) -> Sequence[Row]:
        """Those on this machine that are measured on: the test rows, or the clients', who each keep some back."""
        return self.data.test if self._config.trainer.evaluate_on == "server" else self.data.train

    def rows_of(self, partition_id: int) -> tuple[Sequence[Row], Sequence[Row]]:
        """The rows that a client trains on, and those that it keeps back to be measured on.

        Which of a shared set are kept back is drawn before they are dealt, by `data_seed` alone: runs of several seeds
        are measured on the same rows. Only a client that is dealt no others trains on one of them, the first.

        Raises:
            InputError: there is no such client.
        """
        rows = self.data.train if self.own_data else self._dealt_to(partition_id)
        if self._config.trainer.evaluate_on == "server":
            return rows, ()
        if self.own_data:
            return keep_back(rows, self._config.data.test_fraction, self._config.data.data_seed)
        kept_back, measured = self._kept_back
        if all(row.row_id in kept_back for row in rows):
            return rows[:1], [row for row in rows[1:] if row.row_id in measured]
        return (
            [row for row in rows if row.row_id not in kept_back],
            [row for row in rows if row.row_id in measured],
        )

    def manifest(self) -> dict[str, Any]:
        """See `partitioning.manifest`."""
        return build_manifest(self._dealt, [row.task for row in self.data.train], self._config.partition)

    @cached_property
    def _kept_back(self) -> tuple[set[int], set[int]]:
        """Ids of the rows of a shared set that its clients keep back, and of the `eval_rows` of them measured on."""
        _, kept_back = keep_back(self.data.train, self._config.data.test_fraction, self._config.data.data_seed)
        measured = spread_rows(kept_back, self._config.trainer.eval_rows)
        return {row.row_id for row in kept_back}, {row.row_id for row in measured}

    @cached_property
    def _dealt(self) -> list[list[int]]:
        if self._config.partition.partitioner == OWN_ROWS:
            return [[] for _ in range(self._config.partition.num_clients)]
        try:
            return partition_rows([row.task for row in self.data.train], config=self._config.partition)
        except ValueError as error:
            raise InputError(str(error)) from error

    def _dealt_to(self, partition_id: int) -> list[Row]:
        if not 0 <= partition_id < len(self._dealt):
            raise InputError(
                f"There is no client {partition_id}: num-clients is {len(self._dealt)}; "
                "start as many SuperNodes as num-clients."
            )
        return [self.data.train[index] for index in self._dealt[partition_id]]
