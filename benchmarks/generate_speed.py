"""Tokens a second of generation: MoPs, the baselines, and the bare Hugging Face model.

    python -m benchmarks.generate_speed [--repeats N] [--json FILE]

One question of 83 tokens, and four at once, each answered with 64 tokens, greedily. The bare model is the same
checkpoint in the same dtype as transformers loads it, with its own attention, and without prompts. Adapters are those
of the Dolly app, as they start.
"""

import dataclasses
import statistics
from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM

from benchmarks.harness import ADAPTER, BACKBONE, RUN_CONFIG, Figure, arguments, measure_in_turn, report
from mops_fl.adapter import initial_state
from mops_fl.adapter_folder import AdapterDescription, SavedAdapter
from mops_fl.backbone import Backbone
from mops_fl.config import AdapterConfig, BackboneConfig, DataConfig, read_section
from mops_fl.mops_model import MopsModel
from mops_fl.payload import INPUT_PROMPTS
from mops_fl.sources import resolve_backbone
from mops_fl.weights import initial_weights

NUM_QUESTION, NUM_NEW = 83, 64
BATCHES = (1, 4)
BARE = "bare Hugging Face model"
CASES = {
    "MoPs": ADAPTER,
    "MoPs, gating by embedding": dataclasses.replace(ADAPTER, gating="embedding"),
    "FedPrompt": dataclasses.replace(ADAPTER, method="fedprompt"),
    "LoRA": dataclasses.replace(ADAPTER, method="lora"),
    "IA3": dataclasses.replace(ADAPTER, method="ia3"),
}


def main() -> None:
    """Measure and report."""
    options = arguments(__doc__, repeats=5)
    backbone = Backbone.load(dataclasses.replace(read_section(BackboneConfig, RUN_CONFIG), backbone=BACKBONE))
    models = {BARE: AutoModelForCausalLM.from_pretrained(resolve_backbone(BACKBONE), dtype=backbone.dtype)}
    models[BARE].to(backbone.device)
    models |= {name: build(backbone, config) for name, config in CASES.items()}
    cases = {(name, size): generation(model, size, backbone) for size in BATCHES for name, model in models.items()}
    seconds = measure_in_turn(cases, options.repeats)
    figures = []
    for (name, size), values in seconds.items():
        share = statistics.median(seconds[BARE, size]) / statistics.median(values)
        rates = [size * NUM_NEW / value for value in values]
        figures.append(Figure(f"{name}, {size} at once", "tokens/s", rates, f"{share:.2f} x the bare model's"))
    report("Generation", figures, options.json)


def build(backbone: Backbone, config: AdapterConfig) -> MopsModel:
    """An adapter as it starts."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randn(config.num_prompts, backbone.hidden_size, generator=generator) * 0.1
    if config.method in ("lora", "ia3"):
        state, prompts = initial_weights(backbone, config, generator), prompts[:0]
    else:
        state = initial_state(config, prompts, generator)
    arrays = {name: array.numpy() for name, array in {**state, INPUT_PROMPTS: prompts}.items()}
    data = read_section(DataConfig, RUN_CONFIG)
    return MopsModel(backbone, SavedAdapter(AdapterDescription(config, backbone.source, "", data, (), ()), arrays, ""))


def generation(model, size: int, backbone: Backbone) -> Callable[[], object]:
    """Answer `size` questions with `NUM_NEW` tokens each."""
    token_ids = torch.randint(1000, (size, NUM_QUESTION), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": token_ids.to(backbone.device)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return lambda: model.generate(**inputs, max_new_tokens=NUM_NEW, min_new_tokens=NUM_NEW, do_sample=False)


if __name__ == "__main__":
    main()
