"""Seconds of a training step per row: cohorts of several sizes, kept and unkept frozen states, and peft's methods.

    python -m benchmarks.step_speed [--repeats N] [--json FILE]

A step is forward, backward and Adam on one row of 138 tokens (55 of them response) and 70 prompts, the averages of
Dolly at the default length. The share is of the machine's own bfloat16 rate on one large matrix product, measured
between the repetitions; it counts the products with the frozen weights only. "On all lanes" is how the trainer runs:
a cohort on each core, one thread each; peft gets the same, a model on each core.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import peft
import torch
from transformers import AutoModelForCausalLM

from benchmarks.harness import (
    ADAPTER,
    BACKBONE,
    NUM_PROMPTS,
    NUM_RESPONSE,
    NUM_TOKENS,
    Figure,
    arguments,
    load_backbone,
    matmul_gigaflop_per_second,
    measure_in_turn,
    random_row,
    report,
    start,
)
from clients.lanes import Lanes
from clients.local_training import client_losses
from mops_fl.adapter import AdapterState, PromptAdapter
from mops_fl.model import PromptedModel
from mops_fl.sources import resolve_backbone
from mops_fl.state_cache import StateCache

CAUSAL = peft.TaskType.CAUSAL_LM
PEFT_CONFIGS = {
    "peft prompt tuning": lambda: peft.PromptTuningConfig(task_type=CAUSAL, num_virtual_tokens=NUM_PROMPTS),
    "peft LoRA (r 8, q and v)": lambda: peft.LoraConfig(task_type=CAUSAL, r=8, target_modules=["q_proj", "v_proj"]),
    "peft IA3": lambda: peft.IA3Config(
        task_type=CAUSAL,
        target_modules=["k_proj", "v_proj", "down_proj"],
        feedforward_modules=["down_proj"],
    ),
}


@dataclass(frozen=True)
class Case:
    """One thing to time: `run()` trains `rows` rows, with `gigaflop` in products with frozen weights (0: not known)."""

    rows: int
    gigaflop: float
    run: Callable[[], object]


def main() -> None:
    """Measure and report."""
    options = arguments(__doc__, repeats=7)
    lanes = Lanes.of_this_machine()
    lanes.take_share(1)
    cases = {**our_cases(lanes), **peft_cases(lanes)}
    rates: list[float] = []
    runs = {name: case.run for name, case in cases.items()}
    seconds = measure_in_turn({"rate": lambda: rates.append(matmul_gigaflop_per_second()), **runs}, options.repeats)
    rate = statistics.median(rates)
    per_row = {name: [value / case.rows for value in seconds[name]] for name, case in cases.items()}
    ours = statistics.median(per_row["MoPs, cohorts of 5 on all lanes"])
    figures = [Figure("bfloat16 matrix product, all threads", "GFLOP/s", rates)]
    for name, case in cases.items():
        ratio = f"{statistics.median(per_row[name]) / ours:.2f} x our time on all lanes"
        share = case.gigaflop / case.rows / statistics.median(per_row[name]) / rate
        figures.append(Figure(name, "s/row", per_row[name], f"{ratio}, {share:.0%} of the rate" if share else ratio))
    report("Training step", figures, options.json)


def our_cases(lanes: Lanes) -> dict[str, Case]:
    """MoPs steps on one resident model."""
    backbone = load_backbone()
    prompts, state = start()
    layers, head = backbone.model.model.layers, backbone.model.lm_head
    upper = gigaflop(layers[ADAPTER.inject_layer :], NUM_TOKENS + NUM_PROMPTS, 4) + gigaflop(head, NUM_RESPONSE, 4)
    lower = gigaflop(layers[: ADAPTER.inject_layer], NUM_TOKENS, 2)
    kept, unkept = (PromptedModel(backbone, ADAPTER, prompts, StateCache(size)) for size in (1 << 30, 0))
    cases = {
        f"MoPs, cohort of {size}": Case(size, size * upper, mops_step(kept, state, size)) for size in (1, 2, 5, 10)
    }
    unkept_step = mops_step(unkept, state, 5)
    cases["MoPs, cohort of 5, frozen states not kept"] = Case(5, 5 * (upper + lower), unkept_step)
    steps = [mops_step(kept, state, 5, first_row=5 * lane) for lane in range(lanes.count)]
    rows = 5 * lanes.count
    cases["MoPs, cohorts of 5 on all lanes"] = Case(rows, rows * upper, on_all_lanes(lanes, steps))
    return cases


def mops_step(model: PromptedModel, state: AdapterState, size: int, first_row: int = 0) -> Callable[[], object]:
    """One step of every client of a cohort."""
    adapter = PromptAdapter([state] * size)
    optimizer = torch.optim.Adam(adapter.parameters(), lr=1e-2)
    rows = [random_row(first_row + number) for number in range(size)]

    def step() -> None:
        losses = model.losses(adapter, rows)
        optimizer.zero_grad()
        client_losses(losses, size).sum().backward()
        optimizer.step()

    return step


def peft_cases(lanes: Lanes) -> dict[str, Case]:
    """The same row through peft's methods, as their documentation sets them up; a model for each lane."""
    cases = {}
    for name, config in PEFT_CONFIGS.items():
        steps = [peft_step(config()) for _ in range(lanes.count)]
        cases[name] = Case(1, 0.0, steps[0])
        cases[f"{name} on all lanes"] = Case(lanes.count, 0.0, on_all_lanes(lanes, steps))
    return cases


def peft_step(config: peft.PeftConfig) -> Callable[[], object]:
    """A training step of a freshly loaded model with this adapter."""
    model = AutoModelForCausalLM.from_pretrained(resolve_backbone(BACKBONE), dtype=torch.bfloat16)
    model = peft.get_peft_model(model, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    row = random_row(0)
    labels = row.token_ids.clone()
    labels[: row.loss_start] = -100
    batch = {"input_ids": row.token_ids[None], "labels": labels[None]}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])

    def step() -> None:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()

    return step


def on_all_lanes(lanes: Lanes, steps: list[Callable[[], object]]) -> Callable[[], object]:
    """The steps side by side."""
    return lambda: list(lanes.map(lambda step: step(), steps))


def gigaflop(module: torch.nn.Module, positions: int, flop_per_weight: int) -> float:
    """Products with a module's matrices: 2 a weight and position in the forward pass, as many in the backward pass."""
    weights = sum(p.numel() for p in module.parameters() if p.dim() == 2)
    return flop_per_weight * weights * positions / 1e9


if __name__ == "__main__":
    main()
