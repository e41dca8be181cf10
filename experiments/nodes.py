"""Who is out there: wait for the SuperNodes and ask each which client it is."""

import logging
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from clients.setting import Setting
from mops_fl.errors import InputError
from mops_fl.foreign_text import error_text, one_line
from mops_fl.payload import NOT_NUMBERED, ClientInfo, decode_info
from strategies.sampling import ClientSampler

logger = logging.getLogger(__name__)

# Flower looks through all waiting messages for each one that it delivers, so that many at once take ever longer.
_QUESTIONS_AT_ONCE = 200
# A round waits no longer for a node that does not say who it is.
_NEWCOMER_PATIENCE_SECONDS = 60.0


def find_clients(
    grid: Grid, num_clients: int, backbone_sha256: str, data_sha256: str, *, patience_seconds: float
) -> dict[int, ClientInfo]:
    """Wait until `num_clients` nodes are connected, then ask each for its partition id and row count.

    A simulation starts its ServerApp before its nodes; whoever samples at once samples among too few.

    Args:
        grid: the connection to the nodes.
        num_clients: nodes that must be there.
        backbone_sha256: of the weights that all must have.
        data_sha256: of the rows that are dealt to all who have none of their own.
        patience_seconds: how long to wait while no further node arrives.

    Returns:
        Node id -> client, in order of the partition ids. Clients with rows of their own are numbered by their node ids,
        which a SuperNode that authenticates itself keeps.

    Raises:
        InputError: too few nodes came, one could not answer, has other weights or is dealt other rows, or two are the
            same client.
    """
    node_ids = _wait_for_nodes(grid, num_clients, patience_seconds)
    clients: dict[int, ClientInfo] = {}
    for first in range(0, len(node_ids), _QUESTIONS_AT_ONCE):
        asked = node_ids[first : first + _QUESTIONS_AT_ONCE]
        answers, complaints = _ask(grid, asked, backbone_sha256, data_sha256, timeout=60 + patience_seconds)
        if complaints:
            raise InputError(complaints[0])
        clients |= answers
    if clients and all(info.partition_id == NOT_NUMBERED for info in clients.values()):
        return _number(clients, num_clients)
    partition_ids = sorted(info.partition_id for info in clients.values())
    if partition_ids != list(range(num_clients)):
        raise InputError(
            f"The nodes are the clients {partition_ids[:20]}, not 0 to {num_clients - 1} once each; "
            "give every SuperNode its own partition-id."
        )
    return dict(sorted(clients.items(), key=lambda item: item[1].partition_id))


class RollCall:
    """Who is connected before a round, with the clients that have come back under another node id.

    A SuperNode that was started again is another node to the SuperLink, unless it authenticates itself.
    """

    def __init__(self, sampler: ClientSampler, backbone_sha256: str, data_sha256: str) -> None:
        """Keep `sampler`'s nodes up to date with those that have these weights, and these rows or their own."""
        self._sampler = sampler
        self._backbone_sha256 = backbone_sha256
        self._data_sha256 = data_sha256

    def __call__(self, grid: Grid) -> set[int]:
        """The connected nodes; the sampler is told of those that moved."""
        connected = set(grid.get_node_ids())
        node_of = self._sampler.node_of
        gone = {client for client, node_id in node_of.items() if node_id not in connected}
        if gone and (strangers := connected - set(node_of.values())):
            self._welcome(grid, sorted(strangers), gone)
        return connected

    def _welcome(self, grid: Grid, strangers: list[int], gone: set[int]) -> None:
        hashes = self._backbone_sha256, self._data_sha256
        answers, complaints = _ask(grid, strangers, *hashes, timeout=_NEWCOMER_PATIENCE_SECONDS)
        for complaint in complaints:
            logger.warning("%s", complaint)
        for node_id, info in answers.items():
            # Whoever claims to be a client that is still connected is not believed.
            returned = [client for client in sorted(gone) if self._is(client, info)]
            if returned:
                gone.remove(returned[0])
                self._sampler.move(returned[0], node_id, info.trainer)

    def _is(self, client: int, info: ClientInfo) -> bool:
        if info.partition_id == NOT_NUMBERED:  # its number was the server's; its rows tell it from the others
            return self._sampler.clients[client].own_rows == info.own_rows
        return client == info.partition_id


def numbered_as_before(clients: Mapping[int, ClientInfo], partition: Mapping[str, Any]) -> dict[int, ClientInfo]:
    """The clients with rows of their own under the numbers that they had when the run began, by which it samples them.

    A node id is another one after a restart without authentication. So they are known again by how many rows of each
    task they have; of several with the same counts the one with the lower node id gets the lower number.

    Args:
        clients: node id -> client, in order of the node ids.
        partition: what the run's folder says of its clients, see `RunFolder.partition`.

    Returns:
        Node id -> client, in order of the numbers; unchanged where these are not the run's clients.
    """
    left, numbered = dict(clients), {}
    for entry in sorted(partition["clients"], key=lambda entry: int(entry["partition-id"])):
        per_task = Counter(entry["per-task"])
        same = [node_id for node_id, info in left.items() if Counter(info.own_rows) == per_task]
        if same:
            numbered[same[0]] = replace(left.pop(same[0]), partition_id=entry["partition-id"])
    return numbered if len(numbered) == len(clients) == len(partition["clients"]) else dict(clients)


def with_own_rows(setting: Setting, clients: Mapping[int, ClientInfo]) -> Setting:
    """The setting with the clients' own rows: how many of each task every client has, and not which.

    Raises:
        InputError: a client has a task that the server does not know.
    """
    entries = []
    for node_id, info in clients.items():
        own_rows = info.own_rows or {}
        if unknown := sorted(set(own_rows) - set(setting.tasks)):
            raise InputError(
                f"Node {node_id} has rows of the task {one_line(repr(unknown[0]))}, which is none of the server's "
                f"({', '.join(setting.tasks)}); name the tasks of the federation in `tasks`."
            )
        per_task = {task: own_rows.get(task, 0) for task in setting.tasks}
        entries.append(
            {"partition-id": info.partition_id, "num-rows": info.num_examples, "per-task": per_task, "rows": []}
        )
    num_rows = sum(info.num_examples for info in clients.values())
    return replace(
        setting,
        data_description=f"{len(clients)} clients' own rows, and the server's: {setting.data_description}",
        rows={**setting.rows, "train": num_rows},
        manifest={**setting.manifest, "num-rows": num_rows, "tasks": list(setting.tasks), "clients": entries},
    )


def _number(clients: Mapping[int, ClientInfo], num_clients: int) -> dict[int, ClientInfo]:
    if len(clients) != num_clients:
        raise InputError(
            f"{len(clients)} SuperNodes with rows of their own are connected, but num-clients is {num_clients}; "
            f"set num-clients={len(clients)}, or stop those that do not belong to this run."
        )
    return {node_id: replace(clients[node_id], partition_id=number) for number, node_id in enumerate(sorted(clients))}


def _ask(
    grid: Grid, node_ids: list[int], backbone_sha256: str, data_sha256: str, timeout: float
) -> tuple[dict[int, ClientInfo], list[str]]:
    """Who the nodes are, and what is wrong with those that did not tell, or have other weights or rows."""
    questions = [
        Message(content=RecordDict(), message_type=MessageType.QUERY, dst_node_id=node_id) for node_id in node_ids
    ]
    clients: dict[int, ClientInfo] = {}
    reasons: dict[int, object] = dict.fromkeys(node_ids, "no answer in time who it is; its log may say why")
    for reply in grid.send_and_receive(questions, timeout=timeout):
        node_id = reply.metadata.src_node_id
        if reply.has_error():
            reasons[node_id] = error_text(reply)
            continue
        try:
            info = decode_info(reply.content)
            if info.backbone_sha256 != backbone_sha256:
                raise InputError(
                    "it has other weights under the name of backbone or gate-embedding; copy the server's folder there "
                    "and start it again"
                )
            if info.own_rows is None and info.data_sha256 != data_sha256:
                raise InputError(
                    "it has other rows than the server, whose are to be dealt; give its machine the same data (by "
                    "data-path, MOPS_DOLLY or MOPS_SUPER_NI, or `mops-fl fetch`) and start it again"
                )
            clients[node_id] = info
        except InputError as error:
            reasons[node_id] = error
    return clients, [
        f"Node {node_id} cannot take part: {reason}" for node_id, reason in reasons.items() if node_id not in clients
    ]


def _wait_for_nodes(grid: Grid, num_clients: int, patience_seconds: float) -> list[int]:
    seen, deadline = 0, time.monotonic() + patience_seconds
    while len(node_ids := list(grid.get_node_ids())) < num_clients:
        if len(node_ids) > seen:
            seen, deadline = len(node_ids), time.monotonic() + patience_seconds
        if time.monotonic() > deadline:
            raise InputError(
                f"{len(node_ids)} SuperNodes are connected, but num-clients is {num_clients}; start more, lower "
                f"num-clients, or simulate them with --federation-config 'num-supernodes={num_clients}'."
            )
        time.sleep(0.1)
    return node_ids
