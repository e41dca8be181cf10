"""FedPrompt: federated averaging of whatever the adapter trains, with a sample of clients that a seed fixes.

Beside the sampling, two things differ from Flower's FedAvg. Replies are checked one by one, so that a broken or hostile
one is refused and counted instead of ending the run or spoiling the mean. And they are put in order before the sum,
which in floating point depends on it. How they are joined is `strategies.aggregation`'s or `strategies.privacy`'s.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from numpy.typing import NDArray

from mops_fl.errors import InputError, RunError
from mops_fl.foreign_text import error_text, one_line
from mops_fl.payload import ARRAYS, METRICS, TrainResult, encode_request, encode_result, from_record
from mops_fl.reply_check import ReplyLimits, check_result
from strategies.aggregation import Aggregate
from strategies.sampling import ClientSampler
from strategies.screening import overlong_updates
from strategies.totals import WEIGHT, num_bytes, sum_metrics

WEIGHTINGS = ("uniform", "num-examples", "gate-mass")


@dataclass(frozen=True)
class Failure:
    """A client without a usable reply.

    Attributes:
        client: its partition id.
        node_id: the SuperNode that was asked.
        reason: what went wrong, or why its reply was refused.
    """

    client: int
    node_id: int
    reason: str

    @property
    def who(self) -> str:
        """As it is called in messages."""
        return f"Client {self.client} (node {self.node_id})"


@dataclass(frozen=True)
class RoundReport:
    """What a round of training brought.

    Attributes:
        server_round: round, from 1.
        totals: sums over the usable replies of every metric in `mops_fl.payload`.
        drift: how far the participants ended from each other, see `FedPrompt.drift`.
        failures: the clients without a usable reply.
        bytes_down: arrays sent to the clients.
        bytes_up: arrays received from them.
    """

    server_round: int
    totals: Mapping[str, Any]
    drift: Mapping[str, float]
    failures: tuple[Failure, ...]
    bytes_down: int
    bytes_up: int


@dataclass(frozen=True)
class Acceptance:
    """What a round must bring.

    Attributes:
        limits: most that a reply may claim to have done.
        max_norm_ratio: an update so many times as long as the round's median is refused; 0: none is.
        min_replies: least usable replies.
    """

    limits: ReplyLimits
    max_norm_ratio: float
    min_replies: int


# (round, global adapter) -> what came of training on it.
Participant = Callable[[int, ArrayRecord], TrainResult]


class FedPrompt(FedAvg):
    """FedAvg of soft prompts (paper, Section 4: the federated baseline), and of any other adapter."""

    def __init__(
        self,
        sampler: ClientSampler,
        *,
        weighting: str,
        aggregate: Aggregate,
        acceptance: Acceptance,
        frozen: ArrayRecord,
        rounds_done: int,
        on_round: Callable[[RoundReport], None],
        num_experts: int = 0,
        connected: Callable[[Grid], Collection[int]] = lambda grid: set(grid.get_node_ids()),
        server: Participant | None = None,
        server_weight: float = 0.0,
    ) -> None:
        """Set the strategy up.

        Args:
            sampler: says who trains in which round.
            weighting: `uniform` (paper), `num-examples`, or, of methods with a gate, `gate-mass`.
            aggregate: joins the usable replies.
            acceptance: which replies are usable.
            frozen: the input prompts, and what rows are routed by where no gate does it; sent along with every message.
            rounds_done: rounds that an earlier process did; the next one is called `rounds_done + 1`.
            on_round: told about each round's replies.
            num_experts: experts whose use a reply must report; 0 without a gate.
            connected: the nodes that can be asked now.
            server: trains on the server's own rows in every round, beside the clients; None if it does not.
            server_weight: what it counts in the average, in clients of its size.
        """
        super().__init__(fraction_evaluate=0.0)
        self._sampler = sampler
        self._weighting = weighting
        self._aggregate = aggregate
        self._acceptance = acceptance
        self._frozen = frozen
        self._rounds_done = rounds_done
        self._on_round = on_round
        self._num_experts = num_experts
        self._connected = connected
        self._server = server
        self._server_weight = server_weight
        self._sent = ArrayRecord()
        self._asked: dict[int, int] = {}  # partition id -> node id
        self._absent: frozenset[int] = frozenset()  # of those the partition ids whose node is not connected
        self._bytes_down = 0

    def summary(self) -> None:
        """Nothing: the ServerApp shows the run's configuration."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message for each sampled client whose node is connected; it names the client's cohort."""
        number = self._rounds_done + server_round
        connected = self._connected(grid)  # first: a node may have come back under another id
        cohorts = self._sampler.cohorts(number)
        contents = {cohort: encode_request(arrays, self._frozen, number, cohort) for cohort in cohorts}
        self._sent = arrays
        # By turns: few messages may be in flight at once, and those should keep every cohort's trainer busy.
        turns = range(max(len(cohort.members) for cohort in cohorts))
        asked = [(cohort.members[turn], cohort) for turn in turns for cohort in cohorts if turn < len(cohort.members)]
        self._asked = {client: self._sampler.node_of[client] for client, _ in asked}
        self._absent = frozenset(client for client, node_id in self._asked.items() if node_id not in connected)
        present = [(client, cohort) for client, cohort in asked if client not in self._absent]
        self._bytes_down = sum(num_bytes(contents[cohort]) for _, cohort in present)
        return [
            Message(contents[cohort], message_type=MessageType.TRAIN, dst_node_id=self._asked[client])
            for client, cohort in present
        ]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Join the usable replies in the order of their partition ids.

        Raises:
            RunError: there are too few, or the server's own training came to nothing finite.
        """
        number = self._rounds_done + server_round
        usable, failures = self._screen(replies)
        if len(usable) < self._acceptance.min_replies:
            count = f"{len(usable) or 'no'} usable repl{'ies' if len(usable) > 1 else 'y'}"
            needed = f", {self._acceptance.min_replies} are needed" if usable else ""
            raise RunError(
                f"Round {number} had {count} from {len(self._asked)} clients{needed}. "
                f"{failures[0].who}: {failures[0].reason}"
            )
        bytes_up = sum(num_bytes(reply.content) for reply in usable)
        for reply in usable:
            self._weigh(reply.content, 1.0)
        if self._server:
            own = encode_result(self._server(number, self._sent))
            try:
                check_result(own, self._sent, self._acceptance.limits)
            except InputError as error:
                raise RunError(f"Round {number}: the server's own training cannot be used. {error}") from error
            self._weigh(own, self._server_weight)
            usable.append(Message(own, dst_node_id=0, message_type=MessageType.TRAIN))
        contents = [reply.content for reply in usable]
        # Before the replies are joined: Flower's median takes the arrays out of them.
        drift = self.drift([from_record(content.array_records[ARRAYS]) for content in contents])
        totals = sum_metrics(contents)
        arrays = self.adjust(self._aggregate(self._sent, usable), contents)
        self._on_round(RoundReport(number, dict(totals), drift, failures, self._bytes_down, bytes_up))
        return arrays, totals

    def adjust(self, average: ArrayRecord, contents: list[RecordDict]) -> ArrayRecord:
        """What the round ends with, given the weighted average of the usable replies: that average."""
        return average

    def drift(self, adapters: list[dict[str, NDArray[np.float32]]]) -> dict[str, float]:
        """Root mean square distance of a participant's numbers from the participants' mean.

        It is over all that is trained: runs that train other arrays, or keep a gate still, do not compare by it.
        """
        squares = {name: np.stack([adapter[name] for adapter in adapters]).var(0) for name in adapters[0]}
        return {"drift": float(np.sqrt(np.mean(np.concatenate([square.ravel() for square in squares.values()]))))}

    def check_reply(self, client: int, content: RecordDict) -> None:
        """Refuse what must not be averaged in.

        Raises:
            InputError: says what is wrong with the reply.
        """
        check_result(content, self._sent, self._acceptance.limits)
        metrics: Any = content.metric_records[METRICS]
        if len(metrics["gate-mass"]) != self._num_experts:
            raise InputError(f"Metric gate-mass is {one_line(metrics['gate-mass'])}, not {self._num_experts} numbers.")
        if metrics["num-examples"] > (known := self._sampler.clients[client].num_examples):
            raise InputError(f"Metric num-examples is {metrics['num-examples']}; the client told of {known} at first.")

    def _weigh(self, content: RecordDict, factor: float) -> None:
        metrics: Any = content.metric_records[METRICS]
        metrics[WEIGHT] = factor * (metrics["num-examples"] if self._weighting == "num-examples" else 1)

    def _screen(self, replies: Iterable[Message]) -> tuple[list[Message], tuple[Failure, ...]]:
        """The usable replies and the failures, each in the order of the partition ids."""
        client_of = {node_id: client for client, node_id in self._asked.items()}
        by_client = {client_of.get(reply.metadata.src_node_id, -1): reply for reply in replies}
        reasons = {client: self._failure(client, by_client.get(client)) for client in sorted(self._asked)}
        usable = {client: by_client[client] for client, reason in reasons.items() if reason is None}
        updates = {client: reply.content.array_records[ARRAYS] for client, reply in usable.items()}
        reasons |= overlong_updates(self._sent, updates, self._acceptance.max_norm_ratio)
        failures = tuple(Failure(client, self._asked[client], reason) for client, reason in reasons.items() if reason)
        return [reply for client, reply in usable.items() if reasons[client] is None], failures

    def _failure(self, client: int, reply: Message | None) -> str | None:
        """Why a reply cannot be used, None if it can."""
        if client in self._absent:
            return "its node is not connected"
        if reply is None:
            return "no answer in time"
        if reply.has_error():
            return error_text(reply)
        try:
            self.check_reply(client, reply.content)
        except InputError as error:
            return f"refused: {error}"
        return None
