"""The same app through Flower's own command, `flwr run`."""

import contextlib
import json
import shutil
import socket
import sys
from pathlib import Path

import psutil
import pytest
import tomli_w

import experiments

pytestmark = pytest.mark.slow


@pytest.fixture
def superlink_port(environment):
    """A free port for the SuperLink that `flwr run` leaves running; that one is ended afterwards."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        environment["FLWR_LOCAL_SUPERLINK_HTTP_API_PORT"] = str(probe.getsockname()[1])
    yield
    for process in psutil.process_iter(["cmdline"]):
        try:
            ours = process.environ().get("FLWR_HOME") == environment["FLWR_HOME"]
        except psutil.Error:
            continue
        if ours and any("flower-super" in part for part in process.info["cmdline"] or ()):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()


def test_flwr_run_runs_the_same_app(started, superlink_port, run_config, tmp_path):
    app = shutil.copytree(Path(experiments.__file__).parent / "dolly", tmp_path / "app")
    values = run_config({"output-dir": str(tmp_path / "run")})
    (tmp_path / "values.toml").write_text(tomli_w.dumps(values), encoding="utf-8")
    federation = f"num-supernodes={values['num-clients']} client-resources-num-cpus=1"
    command = [Path(sys.executable).with_name("flwr"), "run", app, "--stream", "--run-config", tmp_path / "values.toml"]
    process = started(*command, "--federation-config", federation)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert (tmp_path / "run" / "summary.json").is_file(), output + errors
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert summary["status"] == "complete", output + errors
    assert summary["rounds"] == 2
