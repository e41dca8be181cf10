"""Fixtures of the tests that start processes: their environment, the command, and what must not be left behind."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import tomli_w

BIN = Path(sys.executable).parent


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


def survivors(environment, patience_seconds=10.0):
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
