"""The ClientApp: decode a message, ask the trainer, encode the answer. The same in simulation and deployment."""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from clients.resident import connect
from mops_fl.errors import InputError
from mops_fl.payload import (
    NOT_NUMBERED,
    decode_evaluate_request,
    decode_request,
    encode_evaluate_result,
    encode_info,
    encode_result,
)
from partitioning import OWN_ROWS

if TYPE_CHECKING:
    from clients.trainer import Trainer

app = ClientApp()
logger = logging.getLogger(__name__)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train this client's adapter for one round."""
    request = decode_request(message.content)
    # A client with rows of its own is known by the number that the server gave it, and never shares a cohort.
    partition_id = request.cohort.members[0] if _own_data(context) else _partition_id(context)
    return _answer(message, context, lambda trainer: encode_result(trainer.train(partition_id, request)))


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Measure the adapter on the rows that this client keeps back."""
    request, partition_id = decode_evaluate_request(message.content), _partition_id(context)
    return _answer(
        message, context, lambda trainer: encode_evaluate_result(trainer.evaluate_client(partition_id, request))
    )


@app.query()
def describe(message: Message, context: Context) -> Message:
    """Say which client this is and how many rows it holds."""
    partition_id = _partition_id(context)
    return _answer(message, context, lambda trainer: encode_info(trainer.describe(partition_id)))


def _answer(message: Message, context: Context, work: Callable[["Trainer"], RecordDict]) -> Message:
    """The reply, or an error that says nothing about rows that are the client's own."""
    own_data = _own_data(context)
    try:
        return Message(work(connect(context.run_config, own_data)), reply_to=message)
    except InputError:
        raise  # one sentence of ours
    except Exception as error:
        if not own_data:
            raise
        logger.exception("The server is told only the kind of this error")  # its text may quote a row
        raise RuntimeError(f"The client failed with {type(error).__name__}; its own log says why.") from None


def _own_data(context: Context) -> str:
    """The path of the client's own rows; empty where clients share a data set."""
    data_path = str(context.node_config.get("data-path", ""))
    own_rows = context.run_config["partitioner"] == OWN_ROWS
    if own_rows and not data_path:
        raise InputError(
            "`partitioner` is 'own-rows', but this SuperNode has none; start it with --node-config "
            "'data-path=\"/path/to/rows.jsonl\"'."
        )
    if data_path and not own_rows:
        raise InputError("This SuperNode has rows of its own and takes part in runs with partitioner='own-rows' only.")
    return data_path


def _partition_id(context: Context) -> int:
    if _own_data(context):
        return NOT_NUMBERED
    partition_id = context.node_config.get("partition-id")
    if not isinstance(partition_id, int):
        raise InputError('This SuperNode has no partition-id; start it with --node-config "partition-id=0".')
    return partition_id
