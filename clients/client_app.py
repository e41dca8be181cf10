"""The ClientApp: decode a message, ask the trainer, encode the answer. The same in simulation and deployment."""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from clients.resident import connect
from mops_fl.errors import InputError
from mops_fl.payload import decode_request, encode_info, encode_result

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train this client's adapter for one round."""
    result = connect(context.run_config).train(_partition_id(context), decode_request(message.content))
    return Message(encode_result(result), reply_to=message)


@app.query()
def describe(message: Message, context: Context) -> Message:
    """Say which client this is and how many rows it holds."""
    info = connect(context.run_config).describe(_partition_id(context))
    return Message(encode_info(info), reply_to=message)


def _partition_id(context: Context) -> int:
    partition_id = context.node_config.get("partition-id")
    if not isinstance(partition_id, int):
        raise InputError('This SuperNode has no partition-id; start it with --node-config "partition-id=0".')
    return partition_id
