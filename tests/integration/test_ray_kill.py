"""Processes of a simulation on Ray killed by SIGKILL: the run goes on, or is resumed, and ends with the same bits."""

import contextlib
import random
import signal
import time

import psutil
import pytest

from experiments.run_folder import RunFolder
from mops_fl.adapter_folder import load_adapter

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

# A round takes tenths of a second, so that a kill within `LATEST_SECONDS` of an early one is long before the last.
ROUNDS, LATEST_SECONDS = 30, 0.5
VALUES = {"num_server_rounds": ROUNDS, "evaluate_every": 1}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return tmp_path_factory.mktemp("undisturbed") / "run"


@pytest.fixture
def straight(simulate, undisturbed):
    """The adapter of a run that nothing disturbs; the first test makes it."""
    if not undisturbed.exists():
        process = simulate("--backend", "inline", output_dir=str(undisturbed), **VALUES)
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    return adapter_bits(undisturbed)


def adapter_bits(folder):
    return {name: array.tobytes() for name, array in load_adapter(folder / "adapter").arrays.items()}


def last_round(folder):
    return max(entry["round"] for entry in RunFolder.open(folder).metrics())


def processes_of(environment):
    for process in psutil.process_iter(["cmdline"]):
        try:
            if process.environ().get("FLWR_HOME") == environment["FLWR_HOME"]:
                yield process, "".join(process.info["cmdline"] or ())
        except psutil.Error:
            continue


def wait_for_round(process, number):
    for line in process.stdout:
        if line.startswith(f"round {number}/"):
            return
    raise AssertionError(f"the run ended before round {number}: {process.stderr.read()}")


@pytest.mark.parametrize(("who", "moment"), [("server", 0), ("everything", 1)])
def test_killed_simulation_is_resumed_to_the_same_bits(simulate, environment, straight, tmp_path, who, moment):
    process = simulate(**VALUES)
    draw = random.Random(moment)
    wait_for_round(process, draw.randint(1, 3))
    time.sleep(draw.uniform(0, LATEST_SECONDS))
    server = psutil.Process(process.pid)
    for victim in [server] if who == "server" else [victim for victim, _ in processes_of(environment)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert last_round(tmp_path / "run") < ROUNDS
    resumed = simulate("--resume", str(tmp_path / "run"))
    _, errors = resumed.communicate()
    assert resumed.returncode == 0, errors
    assert adapter_bits(tmp_path / "run") == straight


def test_killed_trainer_is_started_again_and_the_run_ends_with_the_same_bits(simulate, environment, straight, tmp_path):
    process = simulate(**VALUES)
    wait_for_round(process, 2)
    victims = [victim for victim, command in processes_of(environment) if "_TrainerActor" in command]
    assert victims
    victims[0].kill()
    assert last_round(tmp_path / "run") < ROUNDS
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert adapter_bits(tmp_path / "run") == straight


def test_killed_client_is_started_again_and_the_run_ends_with_the_same_bits(simulate, faulty_app, straight, tmp_path):
    marker = tmp_path / "killed"
    fault = f"open({str(marker)!r}, 'w').close(); os.kill(os.getpid(), signal.SIGKILL)"
    process = simulate(app=faulty_app(f"not os.path.exists({str(marker)!r})", fault), **VALUES)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert marker.exists()
    assert RunFolder.open(tmp_path / "run").summary["failures"] == 0
    assert adapter_bits(tmp_path / "run") == straight


def test_trainer_that_always_dies_ends_the_run_with_one_sentence(simulate, environment):
    process = simulate(num_server_rounds=500)
    wait_for_round(process, 1)
    command = psutil.Process(process.pid)
    while process.poll() is None:
        for victim in command.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # ended while this looked at it
                if "_TrainerActor" in "".join(victim.cmdline()):
                    victim.kill()
        time.sleep(0.02)  # less than a trainer needs to get anything done
    _, errors = process.communicate()
    assert process.returncode == 1, errors
    assert "The trainer died again and again over the same work" in errors
