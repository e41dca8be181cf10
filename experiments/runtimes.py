"""The two ways to run an app on one machine: on Ray through Flower's simulation engine, or inline.

Most of what this project uses of flwr's private parts is here; a test names the version that has them.
"""

import importlib
import logging
import threading
from collections.abc import Callable, Mapping
from queue import Queue
from typing import Protocol

import ray
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import RUN_ID_NUM_BYTES, SUPERLINK_NODE_ID, TASK_ID_NUM_BYTES
from flwr.server.superlink.fleet.vce import vce_api
from flwr.server.superlink.linkstate import InMemoryLinkState
from flwr.server.superlink.linkstate.utils import generate_rand_int_from_bytes
from flwr.serverapp import ServerApp
from flwr.simulation.run_simulation import _run_simulation
from flwr.supercore.constant import NOOP_FEDERATION_ID
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.supercore.telemetry import EventType

from experiments.app_folder import AppFolder
from experiments.inline import InlineGrid
from mops_fl.config import Scalar


class Backend(Protocol):
    """One way to run an app."""

    def __call__(self, app: AppFolder, run_config: Mapping[str, Scalar], *, catch_signals: Callable[[], None]) -> None:
        """Run it to its end; `catch_signals` is called as soon as signal handlers can be set."""
        ...


def run_on_ray(app: AppFolder, run_config: Mapping[str, Scalar], *, catch_signals: Callable[[], None]) -> None:
    """Run the app on Flower's simulation engine, one Ray actor for each processor core, one trainer for all.

    Args:
        app: the app.
        run_config: its configuration.
        catch_signals: called once Ray runs; Ray replaces signal handlers that are set earlier.
    """
    serverapp, clientapp = app.components()
    run = Run.create_empty(generate_rand_int_from_bytes(RUN_ID_NUM_BYTES))
    run.primary_task_id = generate_rand_int_from_bytes(TASK_ID_NUM_BYTES)
    run.federation_id = NOOP_FEDERATION_ID
    run.override_config = dict(run_config)
    _identify(run.run_id)
    vce_api.add_messages_to_queue = deliver_messages  # type: ignore[assignment]
    ray.init(include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    catch_signals()
    try:
        _run_simulation(
            num_supernodes=int(run_config["num-clients"]),
            exit_event=EventType.PYTHON_API_RUN_SIMULATION_LEAVE,
            client_app_attr=clientapp,
            server_app_attr=serverapp,
            server_app_context=_server_context(run.run_id, run_config),
            backend_name="ray",
            # An actor that dies is started again; without this it would fail every later message at once.
            backend_config={
                "client_resources": {"num_cpus": 1, "num_gpus": 0, "max_restarts": 100, "max_task_retries": 1}
            },
            app_dir=str(app.path),
            run=run,
            is_app=True,
        )
    finally:
        ray.shutdown()


def run_inline(app: AppFolder, run_config: Mapping[str, Scalar], *, catch_signals: Callable[[], None]) -> None:
    """Run the app in this process, without Ray: same strategies, same clients, same trainer, same results."""
    serverapp, clientapp = (_load(component) for component in app.components())
    assert isinstance(serverapp, ServerApp)
    assert isinstance(clientapp, ClientApp)
    catch_signals()
    serverapp(inline_grid(clientapp, run_config), _server_context(1, run_config))


def inline_grid(app: ClientApp, run_config: Mapping[str, Scalar]) -> InlineGrid:
    """As many virtual clients in this process as the run-config says."""
    _identify(run_id=1)
    return InlineGrid(app, int(run_config["num-clients"]), run_config)


def deliver_messages(
    state: InMemoryLinkState, queue: Queue[Message], nodes: Mapping[int, int], stopped: threading.Event
) -> None:
    """Hand the messages that wait in the engine to its workers, in the order they were sent.

    In place of Flower's own, which asks once for every node whether there is a message for it, and looks at every
    message each time: a round of 10,000 nodes then costs more than their training.
    """
    while not stopped.is_set():
        with state.lock:
            waiting = [m.metadata.dst_node_id for m in state.message_ins_store.values() if not m.metadata.delivered_at]
        for node_id in dict.fromkeys(waiting):
            for message in state.get_message_ins(node_id=node_id, limit=1):
                queue.put(message)
        stopped.wait(0.02)


def _server_context(run_id: int, run_config: Mapping[str, Scalar]) -> Context:
    return Context(
        run_id=run_id,
        node_id=SUPERLINK_NODE_ID,
        node_config={},
        state=RecordDict(),
        run_config=dict(run_config),
    )


def _identify(run_id: int) -> None:
    """Messages are stamped with these."""
    TaskIdentity.task_id = 1
    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = SUPERLINK_NODE_ID


def _load(component: str) -> object:
    module, _, attribute = component.partition(":")
    return getattr(importlib.import_module(module), attribute)
