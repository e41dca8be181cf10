"""Processes of a simulation on Ray killed by SIGKILL: the run goes on, or is resumed, and ends with the same bits."""

import random
import signal
import time

import psutil
import pytest

from mops_fl.adapter_folder import load_adapter

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

VALUES = {"num_server_rounds": 6, "evaluate_every": 1}


@pytest.fixture
def straight(simulate, tmp_path):
    process = simulate("--backend", "inline", output_dir=str(tmp_path / "straight"), **VALUES)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return adapter_bits(tmp_path / "straight")


def adapter_bits(folder):
    return {name: array.tobytes() for name, array in load_adapter(folder / "adapter").arrays.items()}


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
    raise AssertionError(f"the run ended before round {number}")


@pytest.mark.parametrize(("who", "moment"), [("server", 0), ("everything", 1)])
def test_killed_simulation_is_resumed_to_the_same_bits(simulate, environment, straight, tmp_path, who, moment):
    process = simulate(**VALUES)
    draw = random.Random(moment)
    wait_for_round(process, draw.randint(1, 3))
    time.sleep(draw.uniform(0, 1))
    victims = [process.pid] if who == "server" else [victim.pid for victim, _ in processes_of(environment)]
    for pid in victims:
        try:
            psutil.Process(pid).send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    resumed = simulate("--resume", str(tmp_path / "run"))
    _, errors = resumed.communicate()
    assert resumed.returncode == 0, errors
    assert adapter_bits(tmp_path / "run") == straight


@pytest.mark.parametrize("name", ["_TrainerActor", "ClientAppActor"])
def test_killed_trainer_or_client_is_started_again_and_the_run_ends_with_the_same_bits(
    simulate, environment, straight, tmp_path, name
):
    process = simulate(**VALUES)
    wait_for_round(process, 2)
    victims = [victim for victim, command in processes_of(environment) if name in command]
    assert victims
    victims[0].kill()
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert adapter_bits(tmp_path / "run") == straight


def test_trainer_that_always_dies_ends_the_run_with_one_sentence(simulate, environment):
    process = simulate(num_server_rounds=500)
    wait_for_round(process, 1)
    deadline = time.monotonic() + 200
    while process.poll() is None and time.monotonic() < deadline:
        for victim, command in processes_of(environment):
            if "_TrainerActor" in command:
                victim.kill()
        time.sleep(0.2)
    _, errors = process.communicate()
    assert process.returncode == 1, errors
    assert "The trainer died again and again over the same work" in errors
