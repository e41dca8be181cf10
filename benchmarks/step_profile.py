"""Where a training step's time goes on one thread, and what the ways to make it faster bring that are not taken.

    python -m benchmarks.step_profile [--repeats N] [--json FILE]

A cohort of five rows, as in `benchmarks.step_speed`. Compared are: MLP and norms through `torch.compile`; a product
with weights that oneDNN has packed beforehand; the library's chunked cross entropy of a linear layer.
"""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks.harness import ADAPTER, NUM_RESPONSE, Figure, arguments, load_backbone, measure_in_turn, report, start
from benchmarks.step_speed import mops_step
from mops_fl.backbone import Backbone
from mops_fl.head_loss import head_nll
from mops_fl.model import PromptedModel
from mops_fl.state_cache import StateCache

GROUPS = {
    "products with frozen weights": ("aten::mm",),
    "attention products": ("aten::bmm",),
    "softmax, of attention and head": ("aten::_softmax", "aten::_softmax_backward_data"),
}


def main() -> None:
    """Measure and report."""
    options = arguments(__doc__, repeats=5)
    torch.set_num_threads(1)
    backbone = load_backbone()
    prompts, state = start()
    step = mops_step(PromptedModel(backbone, ADAPTER, prompts, StateCache(1 << 30)), state, 5)
    figures = shares(step, options.repeats)
    figures += compare("weights packed by oneDNN, the product", *packed_product(backbone), repeats=options.repeats)
    figures += compare("chunked linear_cross_entropy, the head", *chunked_head(backbone), repeats=options.repeats)
    figures += compiled(backbone, step, options.repeats)
    report("Where a step's time goes", figures, options.json)


def shares(step: Callable[[], object], repeats: int) -> list[Figure]:
    """Per cent of the step's time, by kind of operation."""
    step()
    values: dict[str, list[float]] = {name: [] for name in (*GROUPS, "everything else")}
    for _ in range(repeats):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            step()
        times = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
        total = sum(times.values())
        for name, keys in GROUPS.items():
            values[name].append(100 * sum(times.get(key, 0.0) for key in keys) / total)
        values["everything else"].append(100 - sum(values[name][-1] for name in GROUPS))
    return [Figure(name, "%", found) for name, found in values.items()]


def compare(name: str, ours: Callable[[], object], other: Callable[[], object], *, repeats: int) -> list[Figure]:
    """Seconds of the other way over seconds of ours, in each repetition."""
    seconds = measure_in_turn({"ours": ours, "other": other}, repeats)
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["other"], strict=True)]
    return [Figure(name, "x our time", ratios)]


def packed_product(backbone: Backbone) -> tuple[Callable[[], object], Callable[[], object]]:
    """A product with one MLP matrix, plain and with packed weights."""
    weight = backbone.layers[0].mlp.up_proj.weight.detach()
    x = torch.randn(1040, weight.shape[1], dtype=weight.dtype)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, len(x))

    def plain() -> None:
        for _ in range(50):
            F.linear(x, weight)

    def prepared() -> None:
        for _ in range(50):
            torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")

    return plain, prepared


def chunked_head(backbone: Backbone) -> tuple[Callable[[], object], Callable[[], object]]:
    """Loss of the head and its gradient, ours and the library's."""
    weight = backbone.model.lm_head.weight
    hidden = torch.randn(5 * NUM_RESPONSE, weight.shape[1], dtype=weight.dtype, requires_grad=True)
    targets = torch.randint(len(weight), (len(hidden),))
    options = torch.nn.LinearCrossEntropyOptions()

    def ours() -> None:
        head_nll(hidden, weight, None, targets).sum().backward()

    def library() -> None:
        F.linear_cross_entropy(hidden, weight, targets, reduction="none", options=options).sum().backward()

    return ours, library


def compiled(backbone: Backbone, step: Callable[[], object], repeats: int) -> list[Figure]:
    """The whole step with compiled MLPs and norms over the plain one, and the seconds that compiling takes."""
    modules = [
        m for layer in backbone.layers for m in (layer.mlp, layer.input_layernorm, layer.post_attention_layernorm)
    ]
    plain = [module.forward for module in modules]
    fused = [torch.compile(forward, dynamic=True) for forward in plain]

    def with_forwards(forwards: list[Callable[..., torch.Tensor]]) -> Callable[[], object]:
        def run() -> None:
            for module, forward in zip(modules, forwards, strict=True):
                module.forward = forward
            step()

        return run

    began = time.perf_counter()
    with_forwards(fused)()
    seconds = time.perf_counter() - began
    ratio = compare("torch.compile of MLP and norms", with_forwards(plain), with_forwards(fused), repeats=repeats)
    return [*ratio, Figure("torch.compile, the first step", "s", [seconds])]


if __name__ == "__main__":
    main()
