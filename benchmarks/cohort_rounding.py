"""How far a client trained in a cohort ends from the same client trained alone, by number format.

    python -m benchmarks.cohort_rounding [--repeats N] [--json FILE]

In exact arithmetic there is no difference. Matrix products of another height add up in another order, and bfloat16
keeps eight bits of each sum; LLM.int8 chooses the columns that it does not round over all rows of a call. Five MoPs
steps of three clients with rows of their own; each repetition has other rows. For comparison: how far the same
training on one thread ends from the one on all threads.
"""

from collections.abc import Sequence

import numpy as np

from benchmarks.harness import ADAPTER, Figure, arguments, load_backbone, random_row, report, start
from clients.lanes import Lanes
from clients.local_training import ClientRows, train_cohort
from mops_fl.config import TrainConfig
from mops_fl.model import PromptedModel
from mops_fl.payload import TrainResult
from mops_fl.state_cache import StateCache

NUM_CLIENTS, NUM_STEPS = 3, 5
TRAIN = TrainConfig(lr=0.01, gate_lr_factor=1.0, batch_size=1, local_steps=NUM_STEPS, local_epochs=0)


def main() -> None:
    """Measure and report."""
    options = arguments(__doc__, repeats=3)
    prompts, state = start()
    lanes = Lanes.of_this_machine()
    figures = []
    for dtype, quantization in (("float32", "none"), ("bfloat16", "none"), ("bfloat16", "int8")):
        model = PromptedModel(load_backbone(dtype, quantization), ADAPTER, prompts, StateCache(1 << 30))
        cohort: dict[str, list[float]] = {"prompts": [], "loss": []}
        threads: dict[str, list[float]] = {"prompts": [], "loss": []}
        for repetition in range(options.repeats):
            clients = [
                ClientRows([random_row(100 * repetition + 10 * j + i) for i in range(NUM_STEPS)], (repetition, j))
                for j in range(NUM_CLIENTS)
            ]
            lanes.take_share(1)
            together = train_cohort(model, state, clients, TRAIN)
            alone = [train_cohort(model, state, [client], TRAIN)[0] for client in clients]
            lanes.take_share(lanes.count)
            one_thread = train_cohort(model, state, clients, TRAIN)
            moved = float(np.abs(together[0].adapter["prompts"] - prompts.numpy()).mean())
            for kept, others in ((cohort, alone), (threads, one_thread)):
                kept["prompts"].append(prompt_distance(together, others) / moved)
                kept["loss"].append(loss_distance(together, others))
        weights = dtype if quantization == "none" else f"{dtype}, {quantization}"
        for name, kept in (("cohort and alone", cohort), ("all threads and one", threads)):
            figures.append(Figure(f"{weights}, {name}: prompts", "of the way moved", kept["prompts"]))
            figures.append(Figure(f"{weights}, {name}: training loss", "relative", kept["loss"]))
    report("Rounding of a cohort", figures, options.json)


def prompt_distance(results: Sequence[TrainResult], others: Sequence[TrainResult]) -> float:
    """Mean difference of the trained prompts' numbers."""
    pairs = zip(results, others, strict=True)
    return float(np.mean([np.abs(a.adapter["prompts"] - b.adapter["prompts"]).mean() for a, b in pairs]))


def loss_distance(results: Sequence[TrainResult], others: Sequence[TrainResult]) -> float:
    """Mean relative difference of the clients' losses over all steps."""
    return float(np.mean([abs(a.loss_sum / b.loss_sum - 1) for a, b in zip(results, others, strict=True)]))


if __name__ == "__main__":
    main()
