"""Seconds per client step and their share of the machine's own matrix-product rate, beside peft on the same rows.

    python benchmarks/step_speed.py [--json FILE]

A step is forward, backward and Adam on one row of 138 tokens (55 of them response) and 70 prompts, the averages of
Dolly at this length. Everything is measured in turn, several times over, in one process: on a shared machine compare
the ratios, not the seconds.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import peft
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from mops_fl.adapter import Adapter, initial_state
from mops_fl.backbone import Backbone
from mops_fl.config import AdapterConfig, BackboneConfig
from mops_fl.encoding import EncodedRow
from mops_fl.model import PromptedModel, RowStates
from mops_fl.sources import resolve_backbone
from mops_fl.state_cache import StateCache

BACKBONE = "HuggingFaceTB/SmolLM2-135M-Instruct"
NUM_TOKENS, NUM_RESPONSE, NUM_PROMPTS, REPEATS = 138, 55, 70, 5
ADAPTER = AdapterConfig("mops", 10, 7, 10, "attention", "question", "random", 128)


@dataclass(frozen=True)
class Case:
    """One thing to time: `step()` trains `rows` rows, with about `gigaflop` in matrix products."""

    name: str
    rows: int
    gigaflop: float
    step: Callable[[], object]


def main() -> None:
    """Measure, print a table, write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the figures to this file")
    target = parser.parse_args().json
    cases = [*our_cases((1, 5, 10)), *peft_cases()]
    peak_rate = partial(matmul_gigaflop_per_second, torch.bfloat16)
    seconds: dict[str, list[float]] = {case.name: [] for case in cases}
    rates = [peak_rate()]
    for case in cases:
        case.step()  # warm-up
    for _ in range(REPEATS):
        for case in cases:
            began = time.perf_counter()
            case.step()
            seconds[case.name].append((time.perf_counter() - began) / case.rows)
        rates.append(peak_rate())
    show(cases, seconds, statistics.median(rates))
    if target:
        figures = {
            "machine": platform.platform(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "bf16-gigaflop-per-second": rates,
            "seconds-per-row": seconds,
        }
        Path(target).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def our_cases(cohort_sizes: tuple[int, ...]) -> list[Case]:
    """A MoPs step for cohorts of several sizes; the layers below the prompts are computed before, as in a run."""
    backbone = Backbone.load(BackboneConfig(BACKBONE, "none", "none", "bfloat16"))
    cache: StateCache[RowStates] = StateCache(1 << 30)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randn(NUM_PROMPTS, backbone.hidden_size, generator=generator) * 0.1
    model = PromptedModel(backbone, ADAPTER, prompts, cache)
    state = initial_state(ADAPTER, prompts, generator)
    layers = backbone.model.model.layers[ADAPTER.inject_layer :]
    per_row = gigaflop_per_row(layers, backbone.model.lm_head.weight.numel())
    cases = []
    for size in cohort_sizes:
        adapter = Adapter([state] * size)
        optimizer = torch.optim.Adam(adapter.parameters(), lr=1e-2)
        rows = [random_row(row_id) for row_id in range(size)]
        step = partial(mops_step, model, adapter, optimizer, rows)
        cases.append(Case(f"MoPs, cohort of {size}", size, size * per_row, step))
    return cases


def mops_step(model: PromptedModel, adapter: Adapter, optimizer: torch.optim.Optimizer, rows: list[EncodedRow]) -> None:
    """One step of every client of a cohort."""
    losses = model.losses(adapter, rows)
    optimizer.zero_grad()
    (losses.loss_sum / losses.num_tokens).sum().backward()
    optimizer.step()


def peft_cases() -> list[Case]:
    """The same row through peft's prompt tuning, LoRA and IA3, as their documentation sets them up."""
    causal = peft.TaskType.CAUSAL_LM
    configs = {
        "peft prompt tuning": peft.PromptTuningConfig(task_type=causal, num_virtual_tokens=NUM_PROMPTS),
        "peft LoRA (r 8, q and v)": peft.LoraConfig(task_type=causal, r=8, target_modules=["q_proj", "v_proj"]),
        "peft IA3": peft.IA3Config(
            task_type=causal,
            target_modules=["k_proj", "v_proj", "down_proj"],
            feedforward_modules=["down_proj"],
        ),
    }
    return [Case(name, 1, 0.0, peft_step(config)) for name, config in configs.items()]


def peft_step(config: peft.PeftConfig) -> Callable[[], None]:
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


def random_row(row_id: int) -> EncodedRow:
    """A row of average shape."""
    start = NUM_TOKENS - NUM_RESPONSE
    token_ids = torch.randint(1000, (NUM_TOKENS,), generator=torch.Generator().manual_seed(row_id))
    return EncodedRow(row_id, token_ids, start, start, 0, False)


def gigaflop_per_row(layers: torch.nn.ModuleList, head_weights: int) -> float:
    """Matrix products of one row's forward and backward pass; the frozen weights get no gradient."""
    weights = sum(p.numel() for p in layers.parameters() if p.dim() == 2)
    return 4 * (weights * (NUM_TOKENS + NUM_PROMPTS) + head_weights * NUM_RESPONSE) / 1e9


def matmul_gigaflop_per_second(dtype: torch.dtype) -> float:
    """What the machine reaches on one large product of the model's own shape, now."""
    x, weight = torch.randn(1040, 576, dtype=dtype), torch.randn(1536, 576, dtype=dtype)
    count, began = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - began) < 0.5:
        x @ weight.T
        count += 1
    return 2 * x.shape[0] * weight.numel() * count / elapsed / 1e9


def show(cases: list[Case], seconds: dict[str, list[float]], rate: float) -> None:
    """A row per case: median seconds, their spread, ratio to our single step, share of the matrix-product rate."""
    ours = statistics.median(seconds[cases[0].name])
    table = Table("case", "s per row", "min-max", "times our single step", "share of bf16 rate")
    for case in cases:
        median = statistics.median(seconds[case.name])
        share = f"{case.gigaflop / case.rows / median / rate:.0%}" if case.gigaflop else ""
        spread = f"{min(seconds[case.name]):.3f}-{max(seconds[case.name]):.3f}"
        table.add_row(case.name, f"{median:.3f}", spread, f"{median / ours:.2f}", share)
    console = Console()
    console.print(f"bf16 matrix products: {rate:.0f} GFLOP/s on {torch.get_num_threads()} threads")
    console.print(table)


if __name__ == "__main__":
    main()
