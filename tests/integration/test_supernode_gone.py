"""A SuperNode that dies in a round and comes back: a real SuperLink, our strategy, an app without a model."""

import contextlib
import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

BIN = Path(sys.executable).parent

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

PROJECT = """
[project]
name = "counting"
version = "0.1.0"
dependencies = []
[tool.flwr.app]
publisher = "nobody"
[tool.flwr.app.components]
serverapp = "counting_server:app"
clientapp = "counting_client:app"
[tool.flwr.app.config]
"""
SERVER = """
import json
import numpy as np
from flwr.serverapp import ServerApp
from experiments.nodes import RollCall, find_clients
from experiments.reply_guard import ReplyGuard
from mops_fl.payload import to_record
from mops_fl.reply_check import ReplyLimits
from strategies.aggregation import AggregationConfig, build_aggregate
from strategies.fedprompt import Acceptance, FedPrompt
from strategies.sampling import ClientSampler

app = ServerApp()

def on_round(report):
    with open({reports!r}, "a") as file:
        failures = [(failure.client, failure.reason) for failure in report.failures]
        print(json.dumps([report.server_round, report.totals["num-steps"], failures]), file=file)

@app.main()
def main(grid, context):
    grid = ReplyGuard(grid)
    clients = find_clients(grid, 2, "weights", "", patience_seconds=60)
    sampler = ClientSampler(clients, clients_per_round=2, cohort_size=1, seed=0)
    strategy = FedPrompt(
        sampler, weighting="uniform", aggregate=build_aggregate(AggregationConfig("mean", 0.2, 0, 1, 0.0, 1)),
        acceptance=Acceptance(ReplyLimits(5, 2, 100), 0.0, 1), frozen=to_record({{}}), rounds_done=0,
        on_round=on_round, connected=RollCall(sampler, "weights", ""),
    )
    strategy.start(grid=grid, initial_arrays=to_record({{"w": np.zeros(3, np.float32)}}), num_rounds=200, timeout=120)
"""
CLIENT = """
import time
import numpy as np
from flwr.app import Message
from flwr.clientapp import ClientApp
from mops_fl.payload import ClientInfo, TrainResult, encode_info, encode_result, from_record

app = ClientApp()

@app.query()
def describe(message, context):
    client = context.node_config["partition-id"]
    return Message(encode_info(ClientInfo(client, 10, f"trainer-{client}", "weights")), reply_to=message)

@app.train()
def train(message, context):
    time.sleep(2)
    adapter = {name: array + 1 for name, array in from_record(message.content["arrays"]).items()}
    return Message(encode_result(TrainResult(adapter, 10, 1, 5, 1.0, 0.1, ())), reply_to=message)
"""
# SuperNodes that are missed after 20 seconds; the SuperLink takes no interval below 10.
SUPERNODE = """
import sys
from flwr.client.grpc_rere_client import connection
from flwr.supercore import heartbeat
from flwr.supernode.cli import flower_supernode
connection.HEARTBEAT_DEFAULT_INTERVAL = heartbeat.HEARTBEAT_DEFAULT_INTERVAL = 10
sys.argv[0] = "flower-supernode"
flower_supernode()
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def federation(environment, tmp_path):
    """Starts and kills the processes of a SuperLink with two SuperNodes; at the end none is left."""
    environment |= {"FLWR_DISABLE_UPDATE_CHECK": "1", "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1"}
    running = {}
    control, fleet = free_port(), free_port()

    def start(name, *command):
        with (tmp_path / f"{name}.log").open("ab") as log:
            running[name] = subprocess.Popen(
                [str(part) for part in command], env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def start_node(client):
        start(
            f"node-{client}", sys.executable, "-c", SUPERNODE, "--insecure", "--grpc-rere",
            "--superlink", f"127.0.0.1:{fleet}", "--port", free_port(), "--node-config", f"partition-id={client}",
        )  # fmt: skip

    start(
        "superlink", BIN / "flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", control,
        "--fleet-api-type", "grpc-rere", "--fleet-api-address", f"127.0.0.1:{fleet}",
    )  # fmt: skip
    (tmp_path / "flwr-home/config.toml").write_text(
        f'[superlink]\ndefault = "local"\n[superlink.local]\naddress = "127.0.0.1:{control}"\ninsecure = true\n'
    )
    start_node.running = running
    start_node.run = lambda: subprocess.run(
        [BIN / "flwr", "run", tmp_path / "app", "local"], env=environment, capture_output=True, text=True, check=False
    )
    yield start_node
    for process in running.values():
        kill_with_children(process)


def kill_with_children(process):
    if process.poll() is None:
        parent = psutil.Process(process.pid)
        for member in [parent, *parent.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
    process.wait()


def wait_for_round(path, condition, seconds=150):
    """The first report after this call that meets the condition."""
    deadline, seen = time.monotonic() + seconds, len(lines_of(path))
    while time.monotonic() < deadline:
        for line in lines_of(path)[seen:]:
            if condition(*json.loads(line)):
                return json.loads(line)
        time.sleep(0.2)
    raise AssertionError(f"no such round within {seconds} s: {lines_of(path)[-3:]}")


def lines_of(path):
    return path.read_text().splitlines() if path.exists() else []


def test_round_goes_on_without_a_dead_supernode_and_asks_it_again_when_it_is_back(federation, tmp_path):
    reports = tmp_path / "reports.jsonl"
    (tmp_path / "counting_server.py").write_text(SERVER.format(reports=str(reports)))
    (tmp_path / "counting_client.py").write_text(CLIENT)
    (tmp_path / "app").mkdir()
    (tmp_path / "app/pyproject.toml").write_text(PROJECT)
    for client in (0, 1):
        federation(client)
    for _ in range(60):  # until the SuperLink answers
        submitted = federation.run()
        if submitted.returncode == 0:
            break
        time.sleep(1)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr

    wait_for_round(reports, lambda number, steps, failures: steps == 2 and not failures)
    kill_with_children(federation.running["node-1"])
    _, steps, [[client, _]] = wait_for_round(reports, lambda number, steps, failures: failures)
    assert (client, steps) == (1, 1)
    *_, [[client, _]] = wait_for_round(
        reports, lambda number, steps, failures: failures and "not connected" in failures[0][1]
    )
    assert client == 1
    federation(1)
    wait_for_round(reports, lambda number, steps, failures: steps == 2 and not failures)
