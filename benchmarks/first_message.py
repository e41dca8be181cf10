"""Seconds of the first message to a SuperNode, and of those after it: the model is loaded once, not for each.

    python -m benchmarks.first_message [--repeats N] [--json FILE]

Flower starts a process for every message. A launcher stands here in a SuperNode's place and starts one for each of
three train messages of 10 steps to one client of the Dolly app, on the data that `flower-simulation` would take. Each
repetition has a launcher, and so a trainer process, of its own. Beside the whole time stands that of training alone.
"""

import multiprocessing
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.harness import ADAPTER, HIDDEN, RUN_CONFIG, Figure, arguments, report
from mops_fl.adapter import initial_state
from mops_fl.payload import INPUT_PROMPTS, Cohort, TrainRequest

NUM_STEPS, CLIENT = 10, 5
ROUNDS = {1: "first message", 2: "second message", 3: "third message"}
# What Flower's process does with a message; the trainer process is for what Flower starts under this name.
MESSAGE = """
import pickle, sys
import clients.client_app
from clients.resident import connect
values, client, request = pickle.load(open(sys.argv[1], "rb"))
sys.argv[0] = "flwr-clientapp"
print(connect(values).train(client, request).seconds)
"""


def main() -> None:
    """Measure and report."""
    options = arguments(__doc__, repeats=3)
    spawn = multiprocessing.get_context("spawn")
    measured = []
    with tempfile.TemporaryDirectory() as folder:
        paths = {number: write_message(Path(folder) / f"{number}.pickle", number) for number in ROUNDS}
        for _ in range(options.repeats):
            with spawn.Pool(1) as pool:
                measured.append(pool.apply(supernode, (paths,)))
    figures = []
    for number, name in ROUNDS.items():
        whole, training = zip(*(one[number] for one in measured), strict=True)
        figures.append(Figure(name, "s", whole, f"of it training {statistics.median(training):.2f} s"))
    report(f"Messages to a SuperNode, {NUM_STEPS} steps each", figures, options.json)


def write_message(path: Path, number: int) -> Path:
    """A round's train message, with an adapter as it starts."""
    values = RUN_CONFIG | {"local-steps": NUM_STEPS}
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randn(ADAPTER.num_prompts, HIDDEN, generator=generator) * 0.1
    adapter = {name: tensor.numpy() for name, tensor in initial_state(ADAPTER, prompts, generator).items()}
    request = TrainRequest(number, Cohort((CLIENT,), 0, 1), adapter, {INPUT_PROMPTS: prompts.numpy()})
    path.write_bytes(pickle.dumps((values, CLIENT, request)))
    return path


def supernode(paths: dict[int, Path]) -> dict[int, tuple[float, float]]:
    """Each message's seconds, and those of training, by a process of its own."""
    seconds = {}
    for number, path in paths.items():
        with path.with_suffix(".out").open("w+") as output:  # the trainer process keeps it open
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", MESSAGE, path], check=True, stdout=output)
            elapsed = time.perf_counter() - began
            output.seek(0)
            seconds[number] = (elapsed, float(output.read().split()[-1]))
    return seconds


if __name__ == "__main__":
    main()
