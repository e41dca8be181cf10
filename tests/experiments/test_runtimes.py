import ast
import inspect
import threading
from importlib.metadata import version
from pathlib import Path
from queue import Queue
from types import SimpleNamespace

from flwr.server.superlink.fleet.vce import vce_api
from flwr.server.superlink.linkstate import InMemoryLinkState

from experiments.runtimes import deliver_messages

ROOT = Path(__file__).parents[2]

HINT = "adapt experiments/runtimes.py, and what else imports private parts of flwr 1.39, to flwr"


def test_flwr_is_the_version_whose_private_parts_are_used():
    assert version("flwr").startswith("1.39."), f"{HINT} {version('flwr')}"


def test_command_sets_its_switches_before_flwr_and_ray_are_imported():
    # Both read the environment when they are imported.
    body = ast.parse((ROOT / "experiments/simulation.py").read_text(encoding="utf-8")).body
    kinds = [ast.unparse(node).partition("(")[0] for node in body]
    switches = [i for i, kind in enumerate(kinds) if kind == "os.environ.setdefault"]
    imports = [
        i
        for i, node in enumerate(body)
        if isinstance(node, ast.ImportFrom) and node.module.startswith(("experiments", "flwr"))
    ]
    assert len(switches) >= 5
    assert max(switches) < min(imports)


def test_messages_are_delivered_once_in_the_order_they_were_sent():
    sent = [message_to(node) for node in (5, 3, 9, 3)]
    state = FakeLinkState(sent)
    queue, stopped = Queue(), threading.Event()
    worker = threading.Thread(target=deliver_messages, args=(state, queue, {3: 0, 5: 1, 9: 2}, stopped))
    worker.start()
    delivered = [queue.get(timeout=5) for _ in sent]
    stopped.set()
    worker.join(timeout=5)
    assert not worker.is_alive()
    assert [message.metadata.dst_node_id for message in delivered] == [5, 3, 9, 3]
    assert queue.empty()


def test_delivery_takes_the_arguments_of_flowers_own():
    own = inspect.signature(vce_api.add_messages_to_queue).parameters
    assert len(inspect.signature(deliver_messages).parameters) == len(own) == 4
    source = inspect.getsource(InMemoryLinkState)
    assert "self.message_ins_store" in source, HINT
    assert "self.lock" in source, HINT


class FakeLinkState:
    """The part of Flower's that delivery uses."""

    def __init__(self, messages):
        self.lock = threading.Lock()
        self.message_ins_store = {str(number): message for number, message in enumerate(messages)}

    def get_message_ins(self, node_id, limit):
        for message in self.message_ins_store.values():
            if message.metadata.dst_node_id == node_id and not message.metadata.delivered_at:
                message.metadata.delivered_at = "now"
                return [message]
        return []


def message_to(node):
    return SimpleNamespace(metadata=SimpleNamespace(dst_node_id=node, delivered_at=""))
