"""Fixtures of the tests that start processes: their environment, the command, and what must not be left behind."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import tomli_w

import experiments
from mops_fl.errors import InputError
from mops_fl.fetch import DEFAULT_BACKBONE
from mops_fl.sources import resolve_backbone

BIN = Path(sys.executable).parent
CACHE = os.environ.get("MOPS_CACHE")  # before a test hides it
FAULTY_CLIENT = """
import os, signal
from clients import client_app
from flwr.clientapp import ClientApp

app = ClientApp()
app.query()(client_app.describe)

@app.train()
def train(message, context):
    if {condition}:
        {fault}
    return client_app.train(message, context)
"""


@pytest.fixture
def environment(tmp_path):
    """The variables of every process a test starts; `FLWR_HOME` tells them from other people's."""
    home = tmp_path / "flwr-home"
    home.mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FLWR_", "RAY_"))}
    kept["PATH"] = f"{BIN}{os.pathsep}{kept['PATH']}"  # `flwr run` starts others by name
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    return kept | {"FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0", "PYTHONPATH": path}


@pytest.fixture
def started(environment):
    """``started(*command)``: a process with its output piped; at the end nothing it started may be running."""
    processes = []

    def start(*command):
        process = subprocess.Popen(
            [str(part) for part in command],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
    left = survivors(environment)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    assert not left, f"left running: {[process.info['cmdline'] for process in left]}"


@pytest.fixture
def simulate(started, run_config, tmp_path):
    """``simulate("--flag", key=value)``: a started `flower-simulation` of a tiny run into ``tmp_path / "run"``."""

    def start(*arguments, app="experiments.dolly", **changes):
        values = run_config({name.replace("_", "-"): value for name, value in changes.items()})
        values.setdefault("output-dir", "")
        values["output-dir"] = values["output-dir"] or str(tmp_path / "run")
        (tmp_path / "values.toml").write_text(tomli_w.dumps(values), encoding="utf-8")
        configured = [] if "--resume" in arguments else ["--run-config", tmp_path / "values.toml"]
        return started(BIN / "flower-simulation", "--app", app, *configured, *arguments)

    return start


@pytest.fixture
def faulty_app(tmp_path):
    """``faulty_app(condition, fault)``: a Flower app whose clients do `fault` when `condition` holds."""

    def make(condition, fault):
        (tmp_path / "faulty_client.py").write_text(FAULTY_CLIENT.format(condition=condition, fault=fault))
        folder = tmp_path / "faulty"
        folder.mkdir()
        dolly = Path(experiments.__file__).parent / "dolly"
        app = (dolly / "pyproject.toml").read_text(encoding="utf-8")
        (folder / "pyproject.toml").write_text(app.replace("clients.client_app:app", "faulty_client:app"))
        return str(folder)

    return make


@pytest.fixture
def real_model(monkeypatch):
    """The default model that `mops-fl fetch` brought, on all cores; under MOPS_REQUIRE_MODEL a test fails without."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("MOPS_CACHE")
    if CACHE:
        monkeypatch.setenv("MOPS_CACHE", CACHE)
    try:
        resolve_backbone(DEFAULT_BACKBONE)
    except InputError as error:
        if os.environ.get("MOPS_REQUIRE_MODEL"):
            raise
        pytest.skip(str(error))


def survivors(environment, patience_seconds=30.0):
    """Processes with this test's environment that are still there after a while."""
    deadline = time.monotonic() + patience_seconds
    while left := [process for process in psutil.process_iter(["cmdline"]) if _is_ours(process, environment)]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.2)
    return left


def _is_ours(process, environment):
    try:
        return process.environ().get("FLWR_HOME") == environment["FLWR_HOME"] and process.status() != "zombie"
    except psutil.Error:
        return False
