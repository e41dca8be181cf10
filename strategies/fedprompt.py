"""FedPrompt: federated averaging of whatever the adapter trains, with a sample of clients that a seed fixes.

Beside the sampling, two things differ from Flower's FedAvg. Replies are checked one by one, so that a broken one is
refused and counted instead of ending the run or spoiling the mean. And they are put in order before the sum, which
in floating point depends on it.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from numpy.typing import NDArray

from mops_fl.errors import InputError
from mops_fl.payload import ARRAYS, METRICS, TrainResult, check_result, encode_request, encode_result, from_record
from strategies.sampling import ClientSampler

WEIGHTINGS = ("uniform", "num-examples", "gate-mass")
WEIGHT = "weight"


class RoundError(RuntimeError):
    """A round ended without a single usable reply."""


@dataclass(frozen=True)
class RoundReport:
    """What a round of training brought.

    Attributes:
        server_round: round, from 1.
        totals: sums over the usable replies of every metric in `mops_fl.payload`.
        drift: how far the participants ended from each other, see `FedPrompt.drift`.
        failures: one text for each client without a usable reply.
        bytes_down: arrays sent to the clients.
        bytes_up: arrays received from them.
    """

    server_round: int
    totals: Mapping[str, Any]
    drift: Mapping[str, float]
    failures: tuple[str, ...]
    bytes_down: int
    bytes_up: int


# (round, global adapter) -> what came of training on it.
Participant = Callable[[int, ArrayRecord], TrainResult]


class FedPrompt(FedAvg):
    """FedAvg of soft prompts (paper, Section 4: the federated baseline), and of any other adapter."""

    def __init__(
        self,
        sampler: ClientSampler,
        *,
        weighting: str,
        frozen: ArrayRecord,
        rounds_done: int,
        on_round: Callable[[RoundReport], None],
        server: Participant | None = None,
        server_weight: float = 0.0,
    ) -> None:
        """Set the strategy up.

        Args:
            sampler: says who trains in which round.
            weighting: `uniform` (paper), `num-examples`, or, of methods with a gate, `gate-mass`.
            frozen: the input prompts, sent along with every message.
            rounds_done: rounds that an earlier process did; the next one is called `rounds_done + 1`.
            on_round: told about each round's replies.
            server: trains on the server's own rows in every round, beside the clients; None if it does not.
            server_weight: what it counts in the average, in clients of its size.
        """
        super().__init__(fraction_evaluate=0.0, weighted_by_key=WEIGHT, train_metrics_aggr_fn=sum_metrics)
        self._sampler = sampler
        self._weighting = weighting
        self._frozen = frozen
        self._rounds_done = rounds_done
        self._on_round = on_round
        self._server = server
        self._server_weight = server_weight
        self._sent = ArrayRecord()
        self._asked: dict[int, int] = {}  # node id -> partition id
        self._bytes_down = 0

    def summary(self) -> None:
        """Nothing: the ServerApp shows the run's configuration."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message for each sampled client; it names the client's cohort."""
        number = self._rounds_done + server_round
        cohorts = self._sampler.cohorts(number)
        contents = {cohort: encode_request(arrays, self._frozen, number, cohort) for cohort in cohorts}
        self._sent = arrays
        # By turns: few messages may be in flight at once, and those should keep every cohort's trainer busy.
        turns = range(max(len(cohort.members) for cohort in cohorts))
        asked = [(cohort.members[turn], cohort) for turn in turns for cohort in cohorts if turn < len(cohort.members)]
        self._asked = {self._sampler.node_of[client]: client for client, _ in asked}
        self._bytes_down = sum(num_bytes(contents[cohort]) for _, cohort in asked)
        return [
            Message(contents[cohort], message_type=MessageType.TRAIN, dst_node_id=self._sampler.node_of[client])
            for client, cohort in asked
        ]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average the usable replies in the order of their partition ids.

        Raises:
            RoundError: there is none.
        """
        by_client = {self._asked.get(reply.metadata.src_node_id, -1): reply for reply in replies}
        failures = {client: self._failure(by_client.get(client)) for client in sorted(self._asked.values())}
        usable = [by_client[client] for client, failure in failures.items() if failure is None]
        reasons = tuple(f"Client {client}: {failure}" for client, failure in failures.items() if failure)
        number = self._rounds_done + server_round
        if not usable:
            raise RoundError(f"Round {number} had no usable reply from {len(failures)} clients. {reasons[0]}")
        bytes_up = sum(num_bytes(reply.content) for reply in usable)
        for reply in usable:
            self._weigh(reply.content, 1.0)
        if self._server:
            own = encode_result(self._server(number, self._sent))
            self._weigh(own, self._server_weight)
            usable.append(Message(own, dst_node_id=0, message_type=MessageType.TRAIN))
        arrays, totals = super().aggregate_train(server_round, usable)
        if arrays is not None and totals is not None:
            contents = [reply.content for reply in usable]
            arrays = self.adjust(arrays, contents)
            drift = self.drift([from_record(content.array_records[ARRAYS]) for content in contents])
            self._on_round(RoundReport(number, dict(totals), drift, reasons, self._bytes_down, bytes_up))
        return arrays, totals

    def adjust(self, average: ArrayRecord, contents: list[RecordDict]) -> ArrayRecord:
        """What the round ends with, given the weighted average of the usable replies: that average."""
        return average

    def drift(self, adapters: list[dict[str, NDArray[np.float32]]]) -> dict[str, float]:
        """Root mean square distance of a participant's numbers from the participants' mean."""
        squares = {name: np.stack([adapter[name] for adapter in adapters]).var(0) for name in adapters[0]}
        return {"drift": float(np.sqrt(np.mean(np.concatenate([square.ravel() for square in squares.values()]))))}

    def check_reply(self, content: RecordDict, expected: ArrayRecord) -> None:
        """Refuse what must not be averaged in.

        Raises:
            InputError: says what is wrong with the reply.
        """
        check_result(content, expected)
        mass: Any = content.metric_records[METRICS]["gate-mass"]
        if len(mass) != self.num_experts(expected):
            raise InputError(f"Metric gate-mass is {mass}, not {self.num_experts(expected)} numbers.")

    def num_experts(self, arrays: ArrayRecord) -> int:
        """Experts whose use a reply must report: none, without a gate."""
        return 0

    def _weigh(self, content: RecordDict, factor: float) -> None:
        metrics: Any = content.metric_records[METRICS]
        metrics[WEIGHT] = factor * (metrics["num-examples"] if self._weighting == "num-examples" else 1)

    def _failure(self, reply: Message | None) -> str | None:
        """Why a reply cannot be used, None if it can."""
        if reply is None:
            return "no answer in time"
        if reply.has_error():
            return reply.error.reason or f"error {reply.error.code}"
        try:
            self.check_reply(reply.content, self._sent)
        except InputError as error:
            return f"refused: {error}"
        return None


def sum_metrics(contents: list[RecordDict], weighted_by_key: str) -> MetricRecord:
    """Sum the clients' counts and sums; means are made of these, never of means."""
    totals: dict[str, Any] = {}
    for content in contents:
        for name, value in content.metric_records[METRICS].items():
            if isinstance(value, list):
                totals[name] = np.add(totals.get(name, [0.0] * len(value)), value).tolist()
            elif name != weighted_by_key:
                totals[name] = totals.get(name, 0) + value
    return MetricRecord(totals)


def num_bytes(content: RecordDict) -> int:
    """Bytes of the arrays in a message."""
    return sum(record.count_bytes() for record in content.array_records.values())
