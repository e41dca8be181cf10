"""A round of 10 clients with 10 local steps each: ours, and the pattern of Flower's own example for language models.

    python -m benchmarks.round_speed [--repeats N] [--json FILE]

In that pattern (`examples/flowertune-llm`) each call of a client loads the model anew, puts a peft adapter on it, loads
the global weights, trains, and sends the adapter's weights back. Both get the same rows, new ones in every repetition,
so that ours has to compute their frozen states, and both run on all cores.
"""

import itertools
import statistics
import threading
from collections.abc import Sequence

import peft
import torch
from transformers import AutoModelForCausalLM

from benchmarks.harness import (
    ADAPTER,
    BACKBONE,
    Figure,
    arguments,
    load_backbone,
    measure_in_turn,
    random_row,
    report,
    start,
)
from benchmarks.step_speed import PEFT_CONFIGS
from clients.lanes import Lanes
from clients.local_training import ClientRows, train_cohort
from mops_fl.adapter import AdapterState
from mops_fl.config import TrainConfig
from mops_fl.encoding import EncodedRow
from mops_fl.model import PromptedModel
from mops_fl.sources import resolve_backbone
from mops_fl.state_cache import StateCache

NUM_CLIENTS, NUM_STEPS = 10, 10
# transformers sets the process-wide default dtype while it loads; Flower would have a process for each client.
LOADING = threading.Lock()
LORA = "peft LoRA (r 8, q and v)"
TRAIN = TrainConfig(lr=0.01, gate_lr_factor=1.0, batch_size=1, local_steps=NUM_STEPS, local_epochs=0)


def main() -> None:
    """Measure and report."""
    options = arguments(__doc__, repeats=3)
    lanes = Lanes.of_this_machine()
    numbers = itertools.count()

    def new_rows() -> list[list[EncodedRow]]:
        return [[random_row(next(numbers)) for _ in range(NUM_STEPS)] for _ in range(NUM_CLIENTS)]

    prompts, state = start()
    model = PromptedModel(load_backbone(), ADAPTER, prompts, StateCache(1 << 30))
    cases = {
        "MoPs, one resident model": lambda: resident_round(lanes, model, state, new_rows()),
        "peft LoRA, model loaded in each call": lambda: list(lanes.map(fresh_client, new_rows())),
    }
    seconds = measure_in_turn(cases, options.repeats)
    ours = statistics.median(seconds["MoPs, one resident model"])
    figures = [
        Figure(name, "s", values, f"{statistics.median(values) / ours:.2f} x our time")
        for name, values in seconds.items()
    ]
    report(f"Round of {NUM_CLIENTS} clients, {NUM_STEPS} steps each", figures, options.json)


def resident_round(lanes: Lanes, model: PromptedModel, state: AdapterState, rows: Sequence[list[EncodedRow]]) -> None:
    """As the trainer does it: a cohort for each lane."""
    clients = [ClientRows(own, (number,)) for number, own in enumerate(rows)]
    cohorts = [clients[lane :: lanes.count] for lane in range(lanes.count)]
    list(lanes.map(lambda cohort: train_cohort(model, state, cohort, TRAIN), cohorts))


def fresh_client(rows: Sequence[EncodedRow]) -> dict[str, torch.Tensor]:
    """One call of one client in the pattern of Flower's example."""
    with LOADING:
        model = AutoModelForCausalLM.from_pretrained(resolve_backbone(BACKBONE), dtype=torch.bfloat16)
        model = peft.get_peft_model(model, PEFT_CONFIGS[LORA]()).train()
    peft.set_peft_model_state_dict(model, peft.get_peft_model_state_dict(model))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for row in rows:
        labels = row.token_ids.clone()
        labels[: row.loss_start] = -100
        optimizer.zero_grad()
        model(input_ids=row.token_ids[None], labels=labels[None]).loss.backward()
        optimizer.step()
    weights: dict[str, torch.Tensor] = peft.get_peft_model_state_dict(model)
    return weights


if __name__ == "__main__":
    main()
