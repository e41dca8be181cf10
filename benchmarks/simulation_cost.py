"""What a simulation costs beside the training: memory with 1 and 10 clients at once, seconds a round with many clients.

    python -m benchmarks.simulation_cost memory|rounds [--repeats N] [--json FILE]

`memory` runs `flower-simulation` on Ray with the real model and adds up the proportional set size of all its
processes, four times a second. `rounds` runs it with a tiny random model and one step a client, so that what is left is
Flower's, the strategy's and the run folder's work, with 100, 1,000 and 10,000 clients of which 10 are active.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.harness import BACKBONE, Figure, report
from mops_fl.sources import resolve_backbone

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def main() -> None:
    """Measure one of the two and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("memory", "rounds"))
    parser.add_argument("--repeats", type=int, default=2, help="repetitions (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = {"memory": memory, "rounds": rounds}[options.what](Path(folder), options.repeats)
    report(f"Simulation on Ray: {options.what}", figures, options.json)


def memory(folder: Path, repeats: int) -> list[Figure]:
    """Peak memory of all processes of a run with 1 and with 10 active clients."""
    figures = []
    for clients in (1, 10):
        values = [
            simulate(
                folder / f"{clients}-{repetition}",
                f"clients-per-round={clients} cohort-size=5 num-server-rounds=3 local-steps=4 eval-rows=70",
            )
            / 2**30
            for repetition in range(repeats)
        ]
        figures.append(Figure(f"{clients} active", "GiB", values))
    ratio = f"{figures[1].median / figures[0].median:.2f} x that of 1 active"
    return [figures[0], Figure(figures[1].case, figures[1].unit, figures[1].values, ratio)]


def rounds(folder: Path, repeats: int) -> list[Figure]:
    """Seconds before the first round, and of a round, with ever more clients."""
    tiny = folder / "tiny"
    tokenizer = AutoTokenizer.from_pretrained(resolve_backbone(BACKBONE))
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **TINY)).save_pretrained(tiny)
    tokenizer.save_pretrained(tiny)
    starts, per_round = [], []
    for clients in (100, 1000, 10000):
        ends = []
        for repetition in range(repeats):
            run = folder / f"{clients}-{repetition}"
            began = time.time()
            simulate(
                run,
                f"backbone='{tiny}' num-clients={clients} inject-layer=2 num-server-rounds=20 local-steps=1 "
                "evaluate-every=100 eval-rows=14 input-prompt-steps=1 gate-epochs=1 max-length=32",
            )
            ends.append((began, round_ends(run)))
        starts.append(
            Figure(f"before round 1, {clients:,} clients", "s", [first - began for began, (first, _) in ends])
        )
        per_round.append(Figure(f"a round, {clients:,} clients", "s", [seconds for _, (_, seconds) in ends]))
    base = per_round[0].median
    return starts + [
        Figure(one.case, one.unit, one.values, f"{one.median / base:.2f} x that of 100") for one in per_round
    ]


def round_ends(run: Path) -> tuple[float, float]:
    """Wall-clock time at the end of round 1, and mean seconds of the rounds after it."""
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    ends = {entry["round"]: entry["seconds"] for entry in entries if entry["metric"] == "loss"}
    started = (run / "config.toml").stat().st_mtime  # written when the clients are known and the clock starts
    return started + ends[1], (ends[max(ends)] - ends[1]) / (max(ends) - 1)


def simulate(output: Path, values: str) -> float:
    """Run the command to its end; returns the peak of its processes' proportional set sizes, in bytes."""
    command = Path(sys.executable).parent / "flower-simulation"
    process = subprocess.Popen(
        [command, "--app", "experiments.dolly", "-c", f"{values} output-dir='{output}'"],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
    )
    peak = 0
    while process.poll() is None:
        peak = max(peak, tree_bytes(psutil.Process(process.pid)))
        time.sleep(0.25)
    if process.returncode:
        raise SystemExit(f"flower-simulation ended with {process.returncode}")
    return peak


def tree_bytes(root: psutil.Process) -> int:
    """Proportional set size of a process and all below it: shared pages count once in all."""
    total = 0
    for process in [root, *root.children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:
            continue  # it has just ended
    return total


if __name__ == "__main__":
    main()
