"""`flower-simulation` on Ray, as a user starts it, with the tiny model."""

import json
import signal
import time
from pathlib import Path

import psutil
import pytest

import experiments
from mops_fl.adapter_folder import load_adapter

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

DOLLY = Path(experiments.__file__).parent / "dolly"
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
def faulty_app(tmp_path):
    """``faulty_app(condition, fault)``: a Flower app whose clients do `fault` when `condition` holds."""

    def make(condition, fault):
        (tmp_path / "faulty_client.py").write_text(FAULTY_CLIENT.format(condition=condition, fault=fault))
        folder = tmp_path / "faulty"
        folder.mkdir()
        app = (DOLLY / "pyproject.toml").read_text(encoding="utf-8")
        (folder / "pyproject.toml").write_text(app.replace("clients.client_app:app", "faulty_client:app"))
        return str(folder)

    return make


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def test_ray_and_inline_end_with_the_same_adapter_to_the_bit(simulate, tmp_path):
    adapters = []
    for backend in ("ray", "inline"):
        folder = tmp_path / backend
        process = simulate("--backend", backend, output_dir=str(folder))
        output, errors = process.communicate()
        assert process.returncode == 0, errors
        assert "made for this project" in output.splitlines()[0] + output.splitlines()[1]
        assert "raylet" not in output + errors
        assert summary_of(folder)["status"] == "complete"
        assert (folder / "report.html").is_file()
        adapters.append(load_adapter(folder / "adapter").arrays)
    on_ray, inline = adapters
    assert on_ray.keys() == inline.keys()
    assert all((on_ray[name] == inline[name]).all() for name in on_ray)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_in_seconds_and_it_can_be_resumed(simulate, tmp_path, number, code):
    process = simulate(num_server_rounds=500)
    for line in process.stdout:
        if line.startswith("round 3/"):  # the checkpoint of round 2 is written
            break
    process.send_signal(number)
    began = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert time.monotonic() - began < 15
    assert summary_of(tmp_path / "run")["status"] == "interrupted"
    assert summary_of(tmp_path / "run")["rounds"] >= 2


def test_a_failing_client_shows_its_traceback_once_and_the_run_goes_on(simulate, faulty_app, tmp_path):
    app = faulty_app('context.node_config["partition-id"] % 2', 'raise OSError("no space left on device")')
    process = simulate(app=app, clients_per_round=8)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    failures = summary_of(tmp_path / "run")["failures"]
    assert failures >= 6  # 8 of 10 clients, 5 of them odd, in each of two rounds
    assert output.count("faulty_client.py") == 1, output
    assert "OSError: no space left on device" in output
    assert "ClientAppException" not in errors
    assert output.count("as above") == failures - 1


def test_a_round_without_any_usable_reply_ends_the_run_with_code_1(simulate, faulty_app, tmp_path):
    process = simulate(app=faulty_app("True", 'raise OSError("no space left on device")'))
    _, errors = process.communicate()
    assert process.returncode == 1
    assert "Round 1 had no usable reply" in errors
    assert summary_of(tmp_path / "run")["status"] == "failed"


def test_a_killed_client_process_is_started_again_and_no_reply_is_lost(simulate, faulty_app, tmp_path):
    marker = tmp_path / "killed"
    fault = f"open({str(marker)!r}, 'w').close(); os.kill(os.getpid(), signal.SIGKILL)"
    process = simulate(app=faulty_app(f"not os.path.exists({str(marker)!r})", fault), num_server_rounds=5)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert marker.exists()
    assert summary_of(tmp_path / "run")["failures"] == 0


def test_a_killed_trainer_is_started_again_with_the_same_result(simulate, tmp_path, environment):
    adapters = []
    for name, kill in (("undisturbed", False), ("killed", True)):
        process = simulate(output_dir=str(tmp_path / name), num_server_rounds=6)
        for line in process.stdout:
            if kill and line.startswith("round 2/"):
                trainers = [
                    p for p in psutil.process_iter(["cmdline"]) if "_TrainerActor" in "".join(p.info["cmdline"] or ())
                ]
                ours = [p for p in trainers if p.environ().get("FLWR_HOME") == environment["FLWR_HOME"]]
                ours[0].kill()
        process.communicate()
        assert process.returncode == 0
        adapters.append(load_adapter(tmp_path / name / "adapter").arrays)
    undisturbed, killed = adapters
    assert all((undisturbed[name] == killed[name]).all() for name in undisturbed)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [({"inject_layer": 99}, "layers 0 to 3"), ({"num_clients": 400, "clients_per_round": 399}, "clients have rows")],
)
def test_bad_input_found_on_ray_ends_with_one_sentence_and_code_2(simulate, change, complaint):
    process = simulate(**change)
    _, errors = process.communicate()
    assert process.returncode == 2, errors
    assert complaint in errors
    assert errors.count("\n") == 1, errors
