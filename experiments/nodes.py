"""Who is out there: wait for the SuperNodes and ask each which client it is."""

import time

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from mops_fl.errors import InputError
from mops_fl.payload import ClientInfo, decode_info

# Flower looks through all waiting messages for each one that it delivers, so that many at once take ever longer.
_QUESTIONS_AT_ONCE = 200


def find_clients(grid: Grid, num_clients: int, *, patience_seconds: float) -> dict[int, ClientInfo]:
    """Wait until `num_clients` nodes are connected, then ask each for its partition id and row count.

    A simulation starts its ServerApp before its nodes; whoever samples at once samples among too few.

    Args:
        grid: the connection to the nodes.
        num_clients: nodes that must be there.
        patience_seconds: how long to wait while no further node arrives.

    Returns:
        Node id -> client, in order of the partition ids.

    Raises:
        InputError: too few nodes came, one could not answer, or two are the same client.
    """
    node_ids = _wait_for_nodes(grid, num_clients, patience_seconds)
    clients: dict[int, ClientInfo] = {}
    for first in range(0, len(node_ids), _QUESTIONS_AT_ONCE):
        clients |= _ask(grid, node_ids[first : first + _QUESTIONS_AT_ONCE], timeout=60 + patience_seconds)
    partition_ids = sorted(info.partition_id for info in clients.values())
    if partition_ids != list(range(num_clients)):
        raise InputError(
            f"The nodes are the clients {partition_ids[:20]}, not 0 to {num_clients - 1} once each; "
            "give every SuperNode its own partition-id."
        )
    return dict(sorted(clients.items(), key=lambda item: item[1].partition_id))


def _ask(grid: Grid, node_ids: list[int], timeout: float) -> dict[int, ClientInfo]:
    questions = [
        Message(content=RecordDict(), message_type=MessageType.QUERY, dst_node_id=node_id) for node_id in node_ids
    ]
    clients: dict[int, ClientInfo] = {}
    for reply in grid.send_and_receive(questions, timeout=timeout):
        if reply.has_error():
            raise InputError(f"Node {reply.metadata.src_node_id} cannot take part: {reply.error.reason}")
        clients[reply.metadata.src_node_id] = decode_info(reply.content)
    return clients


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
