"""Fixtures for strategies: one that has asked its clients to train, and replies to it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from numpy.typing import NDArray

from mops_fl.payload import ClientInfo, TrainResult, encode_result, to_record
from mops_fl.reply_check import ReplyLimits
from strategies.aggregation import Aggregate, AggregationConfig, build_aggregate
from strategies.fedprompt import Acceptance, FedPrompt, RoundReport
from strategies.sampling import ClientSampler

FROZEN = {"input-prompts": np.zeros((2, 3), np.float32)}  # 24 bytes


@pytest.fixture(autouse=True)
def _task_identity(task_identity: None) -> None:
    """Each of these tests makes messages."""


class Round:
    """A strategy whose clients 0 .. n - 1, on the nodes 90, 91, ..., have all been asked to train."""

    def __init__(
        self,
        strategy_class: type[FedPrompt],
        adapter: Mapping[str, NDArray[np.float32]],
        num_clients: int = 3,
        weighting: str = "uniform",
        rounds_done: int = 0,
        cohort_size: int = 2,
        aggregate: Aggregate | None = None,
        max_norm_ratio: float = 0.0,
        min_replies: int = 1,
        absent: Collection[int] = (),
        num_experts: int = 0,
    ) -> None:
        clients = {90 + i: ClientInfo(i, 10, "shared", "weights") for i in range(num_clients)}
        self.reports: list[RoundReport] = []
        self.strategy = strategy_class(
            ClientSampler(clients, clients_per_round=num_clients, cohort_size=cohort_size, seed=0),
            weighting=weighting,
            aggregate=aggregate or build_aggregate(AggregationConfig("mean", 0.2, 2, 1, 0.0, 1)),
            acceptance=Acceptance(ReplyLimits(5, 2, 50), max_norm_ratio, min_replies),
            connected=lambda grid: set(clients) - {90 + client for client in absent},
            frozen=to_record(FROZEN),
            rounds_done=rounds_done,
            on_round=self.reports.append,
            num_experts=num_experts,
        )
        self.messages = list(self.strategy.configure_train(1, to_record(adapter), ConfigRecord(), grid=None))

    def message_to(self, client: int) -> Message:
        (message,) = (m for m in self.messages if m.metadata.dst_node_id == 90 + client)
        message.metadata.__dict__["_message_id"] = f"message-{client}"  # the SuperLink's part
        return message

    def reply(self, client: int, result: TrainResult) -> Message:
        return self.reply_with(client, encode_result(result))

    def reply_with(self, client: int, content: RecordDict) -> Message:
        return Message(content, reply_to=self.message_to(client))


@pytest.fixture
def ask() -> Callable[..., Round]:
    """``ask(FedPrompt, adapter, num_clients=3, weighting="uniform", ...)``: see ``Round``."""
    return Round
