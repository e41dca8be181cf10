"""A process killed at any moment leaves a run that `--resume` ends with the same bits as one that was never stopped.

The runs are forked from a server that has imported everything once, and end by SIGKILL: after a random share of their
processor time, or just before a random file operation in the run folder, where the moment matters most.
"""

import functools
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import threading
import time

import pytest

from mops_fl.adapter_folder import load_adapter

FILE_EVENTS = ("open", "os.rename", "os.remove", "os.mkdir")
TIMED, AT_FILES = 10, 10
INFLUENCED_BY_TIME = ("train_seconds", "elapsed_seconds", "tokens_per_second", "peak_memory_bytes")


def simulate(folder, values, prepare):
    """In a process of its own: start the run, or resume it if there is one, as the command does."""
    from clients import trainer
    from experiments import run, runtimes, simulation
    from experiments.app_folder import AppFolder

    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    run.write_report = lambda folder: folder.path / "report.html"
    trainer.torch.set_num_threads = lambda _: None
    report = prepare(folder)
    if (folder / "config.toml").exists():
        values = simulation._resumed_config(folder, values, [], "federated")
    runtimes.run_inline(AppFolder.find("experiments.dolly"), values, catch_signals=lambda: None)
    if report:
        report()


def live(folder):
    """Nothing is done to the run."""


def measure(results, folder):
    """Tells how much there is to be killed in: seconds of processor time, and file operations."""
    operations = watch_files(folder, lambda count: None)
    began = time.process_time()
    return lambda: results.put((time.process_time() - began, operations[0]))


def die_after(seconds, folder):
    deadline = time.process_time() + seconds

    def watch():
        while time.process_time() < deadline:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def die_before_file_operation(number, folder):
    watch_files(folder, lambda count: os.kill(os.getpid(), signal.SIGKILL) if count == number else None)


def watch_files(folder, on_operation):
    operations = [0]

    def hook(event, args):
        if event in FILE_EVENTS and str(args[0]).startswith(str(folder)):
            operations[0] += 1
            on_operation(operations[0])

    sys.addaudithook(hook)
    return operations


@pytest.fixture(scope="module")
def fork(run_config):
    """``fork(folder, prepare)``: the exit code of a run into that folder."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["clients.trainer", "experiments.simulation", "experiments.server_app"])
    values = run_config({"num-server-rounds": 3, "evaluate-every": 1, "eval-rows": 7})

    def run(folder, prepare=live):
        process = context.Process(target=simulate, args=(folder, {**values, "output-dir": str(folder)}, prepare))
        process.start()
        process.join()
        return process.exitcode

    run.queue = context.Queue()
    return run


@pytest.fixture(scope="module")
def straight(fork, tmp_path_factory):
    """A run that was never stopped: its outcome, its seconds of processor time, and its number of file operations."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    assert fork(folder, functools.partial(measure, fork.queue)) == 0
    return outcome(folder), *fork.queue.get()


def outcome(folder):
    """All that two runs of the same seed share."""
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    metrics = [
        {key: value for key, value in entry.items() if key != "seconds"}
        for entry in entries
        if entry["metric"] not in ("tokens-per-second", "round-seconds")
    ]
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    adapter = {name: array.tobytes() for name, array in load_adapter(folder / "adapter").arrays.items()}
    return adapter, metrics, {key: value for key, value in summary.items() if key not in INFLUENCED_BY_TIME}


def die_at_some_time(fork, folder, seconds):
    """Kill the run after ``seconds``, or earlier: a run on a warm machine may be over before that moment comes."""
    while (exit_code := fork(folder, functools.partial(die_after, seconds))) == 0:
        shutil.rmtree(folder)
        seconds /= 2
    return exit_code


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(TIMED + AT_FILES))
def test_run_killed_at_a_random_moment_ends_with_the_same_bits(fork, straight, tmp_path, moment):
    expected, seconds, num_operations = straight
    draw = random.Random(moment)
    if moment < TIMED:
        exit_code = die_at_some_time(fork, tmp_path / "run", draw.uniform(0.02, 0.9) * seconds)
    else:
        exit_code = fork(
            tmp_path / "run", functools.partial(die_before_file_operation, draw.randint(1, num_operations))
        )
    assert exit_code == -signal.SIGKILL
    assert fork(tmp_path / "run") == 0
    assert outcome(tmp_path / "run") == expected


def test_run_that_is_killed_again_and_again_still_ends_with_the_same_bits(fork, straight, tmp_path):
    expected, _, num_operations = straight
    kills = 0
    while fork(tmp_path / "run", functools.partial(die_before_file_operation, num_operations // 3)) != 0:
        kills += 1
        assert kills < 20
    assert kills >= 2
    assert outcome(tmp_path / "run") == expected
