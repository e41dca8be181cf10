"""What the trainer tells of itself: facts about data and model, and where round 1 starts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mops_fl.payload import Arrays


@dataclass(frozen=True)
class Start:
    """What the server starts round 1 from.

    Attributes:
        adapter: the initial adapter, name -> float32.
        frozen: what else is sent, under its wire names: the input prompts P1, and what rows are routed by where no
            gate does it.
        gate_accuracy: see `mops_fl.pretraining.Pretrained`.
    """

    adapter: Arrays
    frozen: Arrays
    gate_accuracy: float | None


@dataclass(frozen=True)
class Setting:
    """Facts about data and model that only the trainer knows.

    Attributes:
        tasks: task names, those held out last.
        trained_tasks: the first of them, those not held out.
        data_description: where the rows come from.
        data_is_sample: whether they are the bundled sample.
        rows: number of rows: `train`, `test` (those that the server measures; 0 if clients do), `server`, and
            `truncated`, of all that are on this machine, test rows that are not measured among them.
        manifest: the partition, see `partitioning.manifest`.
        dtype: of the backbone's hidden states.
        device: where it runs.
        hidden_size: the backbone's.
        num_layers: the backbone's.
        backbone_sha256: of the frozen weights, see `mops_fl.compressed.backbone_sha256`.
        data_sha256: of the rows that are on this machine.
    """

    tasks: tuple[str, ...]
    trained_tasks: tuple[str, ...]
    data_description: str
    data_is_sample: bool
    rows: Mapping[str, int]
    manifest: dict[str, Any]
    dtype: str
    device: str
    hidden_size: int
    num_layers: int
    backbone_sha256: str
    data_sha256: str
