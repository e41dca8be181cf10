"""Tokens a second of generation: MoPs behind its cache, the baselines, and the bare Hugging Face model.

    python -m benchmarks.generate_speed [--repeats N] [--json FILE]

One question of 83 tokens, and four at once, each answered with 64 tokens, greedily. The bare model is the same
checkpoint in the same dtype as transformers loads it, with its own attention, and without prompts.
"""

import statistics

import torch
from transformers import AutoModelForCausalLM

from benchmarks.harness import BACKBONE, Figure, arguments, measure_in_turn, report
from mops_fl.adapter import initial_state
from mops_fl.adapter_folder import AdapterDescription, SavedAdapter
from mops_fl.backbone import Backbone
from mops_fl.config import AdapterConfig, BackboneConfig, DataConfig
from mops_fl.mops_model import MopsModel
from mops_fl.payload import INPUT_PROMPTS
from mops_fl.sources import resolve_backbone
from mops_fl.weights import initial_weights

NUM_QUESTION, NUM_NEW = 83, 64
BATCHES = (1, 4)
CASES = {"MoPs": "mops", "MoPs, gating by embedding": "mops", "FedPrompt": "fedprompt", "LoRA": "lora", "IA3": "ia3"}
DATA = DataConfig("dolly", "", "", 0, 5000, 0.1, 700, 256, "response")


def main() -> None:
    """Measure and report."""
    options = arguments(__doc__, repeats=5)
    backbone_config = BackboneConfig(BACKBONE, "none", "none", "auto")
    backbone = Backbone.load(backbone_config)
    bare = AutoModelForCausalLM.from_pretrained(
        resolve_backbone(BACKBONE), dtype=backbone.dtype, device_map=backbone.device
    )
    models = {"bare Hugging Face model": bare}
    for name, method in CASES.items():
        gating = "embedding" if "embedding" in name else "attention"
        models[name] = build(backbone, AdapterConfig(method, 10, 7, 10, gating, "question", "random", 128, 8, 16.0))
    cases = {
        f"{name}, {size} at once": generation(model, size, backbone)
        for size in BATCHES
        for name, model in models.items()
    }
    seconds = measure_in_turn(cases, options.repeats)
    figures = []
    for case, values in seconds.items():
        size = int(case.rpartition(", ")[2].split()[0])
        of_bare = statistics.median(seconds[f"bare Hugging Face model, {size} at once"]) / statistics.median(values)
        rates = [size * NUM_NEW / value for value in values]
        figures.append(Figure(case, "tokens/s", rates, f"{of_bare:.2f} x the bare model's"))
    report("Generation", figures, options.json)


def build(backbone: Backbone, config: AdapterConfig) -> MopsModel:
    """An adapter of the default size, as it starts."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randn(config.num_prompts, backbone.hidden_size, generator=generator) * 0.1
    if config.method in ("lora", "ia3"):
        state, prompts = initial_weights(backbone, config, generator), prompts[:0]
    else:
        state = initial_state(config, prompts, generator)
    arrays = {name: array.numpy() for name, array in {**state, INPUT_PROMPTS: prompts}.items()}
    return MopsModel(backbone, SavedAdapter(AdapterDescription(config, backbone.source, "", DATA, (), ()), arrays, ""))


def generation(model, size, backbone):
    """Answer `size` questions with `NUM_NEW` tokens each."""
    token_ids = torch.randint(1000, (size, NUM_QUESTION), generator=torch.Generator().manual_seed(0))
    inputs = {
        "input_ids": token_ids.to(backbone.device),
        "attention_mask": torch.ones_like(token_ids).to(backbone.device),
    }
    length = {"max_new_tokens": NUM_NEW, "min_new_tokens": NUM_NEW, "do_sample": False}
    return lambda: model.generate(**inputs, **length)


if __name__ == "__main__":
    main()
