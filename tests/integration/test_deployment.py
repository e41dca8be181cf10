"""A SuperLink and SuperNodes over gRPC, with TLS and authentication, and what they refuse. One SuperLink serves all."""

import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from pathlib import Path

import grpc
import psutil
import pytest
import tomli_w
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

import experiments
from experiments import certificates as certificates_module
from experiments.certificates import make_node_key, make_server_certificate
from experiments.deployment import CONNECTION, LocalDeployment, end
from mops_fl.adapter_folder import load_adapter
from mops_fl.data import DOLLY_TASKS

pytestmark = pytest.mark.slow

APPS = Path(experiments.__file__).parent
PATIENCE_SECONDS = 120.0
# `flwr run` whose bundle is changed after it was built and signed off by its own list of hashes.
EDITED_RUN = """
import importlib, io, sys, zipfile
run = importlib.import_module("flwr.cli.run.run")
build = run.build_fab_from_disk

def edited(app):
    source = zipfile.ZipFile(io.BytesIO(build(app)))
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as copy:
        for name in source.namelist():
            content = source.read(name)
            if name == "pyproject.toml":
                assert b"\\nlr = 0.01" in content
                content = content.replace(b"\\nlr = 0.01", b"\\nlr = 9.99")
            copy.writestr(name, content)
    return target.getvalue()

run.build_fab_from_disk = edited
from flwr.cli.app import app
sys.argv[0] = "flwr"
app()
"""


@pytest.fixture(scope="module")
def deployment():
    """A SuperLink; at the end nothing that was started beside it is left."""
    with tempfile.TemporaryDirectory(prefix="t-") as folder:
        with LocalDeployment(Path(folder)) as running:
            running.start_superlink()
            yield running
        assert running._left() == []


@pytest.fixture
def supernode(deployment):
    """``supernode(name, ...)`` as `LocalDeployment.start_supernode`; ended with the test."""
    processes = []

    def start(name, node_config=None, **options):
        processes.append((name, deployment.start_supernode(name, node_config or {"partition-id": 0}, **options)))
        return processes[-1][1]

    yield start
    for name, process in processes:
        process.terminate()
        end(process)
        del deployment._processes[name]


@pytest.fixture
def flwr_run(deployment, run_config, tmp_path):
    """``flwr_run(**changes)``: submit a tiny run into ``tmp_path / "run"`` and wait for its end."""

    def submit(*command, app="dolly", **changes):
        values = run_config({name.replace("_", "-"): value for name, value in changes.items()})
        values["output-dir"] = str(tmp_path / "run")
        (tmp_path / "values.toml").write_text(tomli_w.dumps(values), encoding="utf-8")
        arguments = ["run", APPS / app, CONNECTION, "--stream", "--run-config", tmp_path / "values.toml"]
        finished = subprocess.run(
            [*(command or ["flwr"]), *map(str, arguments)],
            env=deployment.environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        return finished.stdout + finished.stderr

    return submit


def status_of(deployment, output):
    """What the SuperLink says of the run whose submission printed `output`."""
    run_id = re.search(r"Successfully started run (\d+)", output).group(1)
    (run,) = json.loads(deployment.flwr("ls", CONNECTION, "--run-id", run_id, "--format", "json"))["runs"]
    return run["status"]


def wait_for(deployment, name, text):
    deadline = time.monotonic() + PATIENCE_SECONDS
    while text not in deployment.log_of(name).read_text(encoding="utf-8"):
        assert time.monotonic() < deadline, deployment.tail(name)
        time.sleep(0.2)


def wait_until_refused(deployment, name, process):
    """It ends, or fails to connect and tries again; it never gets an id."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while process.poll() is None and "Connection attempt failed" not in deployment.log_of(name).read_text("utf-8"):
        assert time.monotonic() < deadline, deployment.tail(name)
        time.sleep(0.2)
    assert "SuperNode ID" not in deployment.log_of(name).read_text(encoding="utf-8")


def own_rows(path, site, tasks):
    """A file of rows with a text that is found again wherever it should not be."""
    lines = [
        {"instruction": f"secret-{site}-{task}-{n}", "context": "", "response": f"answer {n}", "category": task}
        for task in tasks
        for n in range(6)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def own_task_files(folder, tasks):
    folder.mkdir()
    for task in tasks:
        instances = [{"input": f"{task}: {n} and {n}?", "output": [str(2 * n)]} for n in range(6)]
        content = {"Definition": ["Add them up."], "Instances": instances}
        (folder / f"{task}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def trainers(deployment):
    """Those of the deployment's SuperNodes."""
    return {
        process.pid: process.info["create_time"]
        for process in psutil.process_iter(["cmdline", "create_time", "environ", "status"])
        if "clients.trainer_process" in (process.info["cmdline"] or [])
        and (process.info["environ"] or {}).get("FLWR_HOME") == deployment.environment["FLWR_HOME"]
        and process.info["status"] != psutil.STATUS_ZOMBIE
    }


def test_clients_train_on_their_own_files_which_never_leave_them(deployment, supernode, flwr_run, tmp_path):
    before = trainers(deployment)
    sites = {"site-a": DOLLY_TASKS[:3], "site-b": DOLLY_TASKS[2:]}
    for name, tasks in sites.items():
        deployment.register(name)
        supernode(name, {"data-path": str(own_rows(tmp_path / f"{name}.jsonl", name, tasks))})
    settings = {"num_clients": 2, "clients_per_round": 2, "partitioner": "own-rows", "evaluate_on": "clients"}
    output = flwr_run(**settings, num_server_rounds=1)

    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert summary["status"] == "complete", output
    assert (summary["rounds"], summary["failures"], summary["client_steps"]) == (1, 0, 4)
    assert set(summary["perplexity"]) == {"all", *DOLLY_TASKS}
    assert all(array.any() for array in load_adapter(tmp_path / "run" / "adapter").arrays.values())
    clients = json.loads((tmp_path / "run" / "partition.json").read_text(encoding="utf-8"))["clients"]
    assert sorted(client["num-rows"] for client in clients) == [15, 25]  # of each six, five are trained on
    assert [client["rows"] for client in clients] == [[], []]

    on_the_server = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    on_the_server += [path for path in deployment.folder.glob("*") if path.is_file()]
    assert "state.db" in {path.name for path in on_the_server}
    assert not [path for path in on_the_server if b"secret-" in path.read_bytes()]

    # Each SuperNode answered all its messages with one trainer, and the next run's with the same.
    started = {pid: created for pid, created in trainers(deployment).items() if pid not in before}
    assert len(started) == 2
    shutil.rmtree(tmp_path / "run")
    output = flwr_run(**{**settings, "evaluate_on": "server"}, num_server_rounds=1, seed=0)
    assert json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))["status"] == "complete", output
    assert {pid: created for pid, created in trainers(deployment).items() if pid not in before} == started


def test_clients_train_on_their_own_folders_of_task_files(deployment, supernode, flwr_run, tmp_path):
    for name, tasks in {"tasks-a": ("task1", "task2"), "tasks-b": ("task2", "task3")}.items():
        deployment.register(name)
        supernode(name, {"data-path": str(own_task_files(tmp_path / name, tasks))})
    servers = own_task_files(tmp_path / "server", ("task1", "task2", "task3"))
    output = flwr_run(
        app="super_ni", dataset="super-ni", data_path=str(servers),
        num_clients=2, clients_per_round=2, partitioner="own-rows", evaluate_on="clients", num_experts=3,
        num_server_rounds=1,
    )  # fmt: skip
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert summary["status"] == "complete", output
    assert (summary["failures"], summary["evaluations_missing"]) == (0, 0)
    assert set(summary["perplexity"]) == {"all", "task1", "task2", "task3"}
    clients = json.loads((tmp_path / "run" / "partition.json").read_text(encoding="utf-8"))["clients"]
    assert sorted(list(client["per-task"].values()) for client in clients) == [[0, 5, 5], [5, 5, 0]]


def test_supernode_whose_key_is_not_registered_is_refused(deployment, supernode):
    make_node_key(deployment.folder / "keys", "stranger")
    process = supernode("stranger")
    assert process.wait(PATIENCE_SECONDS) != 0
    assert "SuperNode ID" not in deployment.log_of("stranger").read_text(encoding="utf-8")


def test_supernode_that_trusts_another_authority_does_not_connect(deployment, supernode, tmp_path):
    make_server_certificate(tmp_path, ["localhost"])
    deployment.register("careful")
    process = supernode("careful", options=["--root-certificates", tmp_path / "ca.crt"])
    wait_until_refused(deployment, "careful", process)


class Calls(grpc.GenericRpcHandler):
    """Notes which methods are called and has none of them."""

    def __init__(self):
        self.methods = []

    def service(self, handler_call_details):
        self.methods.append(handler_call_details.method)


@pytest.fixture
def fleet_server():
    """``fleet_server(folder)``: a gRPC server with the folder's certificate, its address and what was called there."""
    servers = []

    def start(folder):
        calls = Calls()
        server = grpc.server(ThreadPoolExecutor(2), handlers=[calls])
        pair = (folder / "server.key").read_bytes(), (folder / "server.crt").read_bytes()
        port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair]))
        server.start()
        servers.append(server)
        return f"127.0.0.1:{port}", calls

    yield start
    for server in servers:
        server.stop(None)


def test_superlink_with_an_expired_certificate_is_not_spoken_to(
    deployment, supernode, fleet_server, tmp_path, monkeypatch
):
    class TwoYearsAgo(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) - timedelta(days=730)

    deployment.register("punctual")
    shutil.copytree(deployment.certificates, tmp_path / "expired")
    shutil.copytree(deployment.certificates, tmp_path / "valid")
    with monkeypatch.context() as patch:
        patch.setattr(certificates_module, "datetime", TwoYearsAgo)
        make_server_certificate(tmp_path / "expired", ["localhost"], days=30)
    address, calls = fleet_server(tmp_path / "expired")
    process = supernode("punctual", options=["--superlink", address])
    wait_until_refused(deployment, "punctual", process)
    assert calls.methods == []
    # The same server is spoken to when only the date is another.
    deployment.register("prompt")
    address, calls = fleet_server(tmp_path / "valid")
    supernode("prompt", options=["--superlink", address])
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not calls.methods:
        assert time.monotonic() < deadline, deployment.tail("prompt")
        time.sleep(0.2)


def test_edited_bundle_does_not_start(deployment, flwr_run, tmp_path):
    output = flwr_run(sys.executable, "-c", EDITED_RUN)
    assert "hashes couldn't be verified" in output, output
    assert not (tmp_path / "run").exists()
    assert status_of(deployment, output) == "finished:failed"


def test_supernode_that_asks_for_a_signature_refuses_a_bundle_without(deployment, supernode, flwr_run, tmp_path):
    trusted = tmp_path / "trusted.yaml"
    key = Ed25519PrivateKey.generate().public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    trusted.write_text(f"fpk_test: '{key.decode()}'\n", encoding="utf-8")
    deployment.register("strict")
    supernode("strict", options=["--trusted-entities", trusted])
    wait_for(deployment, "strict", "SuperNode ID")
    output = flwr_run(num_clients=1, clients_per_round=1)
    assert "The FAB could not be verified" in output, output
    assert not (tmp_path / "run").exists()
