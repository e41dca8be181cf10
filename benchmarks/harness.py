"""What the benchmarks share: cases measured in turn, the machine's own rate, and one JSON file per benchmark.

Times on a shared machine drift, so all cases of a benchmark are measured in turn, several times over, in one process,
and compared by ratio.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from experiments.app_folder import AppFolder
from experiments.machine import git_revision, machine, versions
from mops_fl.adapter import AdapterState, initial_state
from mops_fl.backbone import Backbone
from mops_fl.config import AdapterConfig, BackboneConfig, read_section
from mops_fl.encoding import EncodedRow

BACKBONE = "HuggingFaceTB/SmolLM2-135M-Instruct"
HIDDEN = 576  # numbers of a hidden state of it
RUN_CONFIG = AppFolder.find("experiments.dolly").run_config(())
ADAPTER = read_section(AdapterConfig, RUN_CONFIG)
# Averages of Dolly at the default length.
NUM_TOKENS, NUM_RESPONSE, NUM_PROMPTS = 138, 55, ADAPTER.num_prompts


@dataclass(frozen=True)
class Figure:
    """One measured quantity.

    Attributes:
        case: what was measured.
        unit: of the values.
        values: one for each repetition.
        note: what else is to be said about it, for instance a ratio.
    """

    case: str
    unit: str
    values: Sequence[float]
    note: str = ""

    @property
    def median(self) -> float:
        """The middle value."""
        return statistics.median(self.values)

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """As a line of a table: case, median, least to most, note."""
        spread = f"{min(self.values):.3g} to {max(self.values):.3g}"
        return self.case, f"{self.median:.3g} {self.unit}", spread, self.note


def measure_in_turn(cases: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each case in each repetition, after one that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for repetition in range(repeats + 1):
        for name, run in cases.items():
            began = time.perf_counter()
            run()
            if repetition:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def matmul_gigaflop_per_second(seconds: float = 0.5) -> float:
    """What one bfloat16 product of the model's own shape reaches now, on all threads of this process."""
    x, weight = torch.randn(1040, HIDDEN, dtype=torch.bfloat16), torch.randn(1536, HIDDEN, dtype=torch.bfloat16)
    count, began = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - began) < seconds:
        x @ weight.T
        count += 1
    return 2 * x.shape[0] * weight.numel() * count / elapsed / 1e9


def load_backbone(dtype: str = "bfloat16", quantization: str = "none") -> Backbone:
    """The benchmarks' model, dense."""
    return Backbone.load(BackboneConfig(BACKBONE, "none", quantization, dtype, "backbone"))


def start() -> tuple[torch.Tensor, AdapterState]:
    """Input prompts and an adapter as it starts, the same each time."""
    prompts = torch.randn(NUM_PROMPTS, HIDDEN, generator=torch.Generator().manual_seed(0)) * 0.1
    return prompts, initial_state(ADAPTER, prompts, torch.Generator().manual_seed(0))


def random_row(row_id: int) -> EncodedRow:
    """A row of average shape."""
    start = NUM_TOKENS - NUM_RESPONSE
    token_ids = torch.randint(1000, (NUM_TOKENS,), generator=torch.Generator().manual_seed(row_id))
    return EncodedRow(row_id, token_ids, start, start, 0, False)


def arguments(description: str, repeats: int) -> argparse.Namespace:
    """The options that all benchmarks take."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=repeats, help="repetitions (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    return parser.parse_args()


def report(title: str, figures: Sequence[Figure], target: Path | None) -> None:
    """Print a table, and write the figures with the machine and the versions if a file is named."""
    table = Table("case", "median", "least to most", "", title=title)
    for figure in figures:
        table.add_row(*figure.cells)
    Console().print(table)
    if target:
        target.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "title": title,
            "machine": machine(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "versions": versions(),
            **git_revision(),
            "figures": [asdict(figure) for figure in figures],
        }
        target.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
