"""What each of `mops_fl.config.METHODS` is made of."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mops_fl.backbone import Backbone
from mops_fl.config import PROMPTED, AdapterConfig, PretrainConfig
from mops_fl.encoding import EncodedRow
from mops_fl.evaluation import Spread
from mops_fl.model import AdaptableModel, PromptedModel
from mops_fl.payload import INPUT_PROMPTS
from mops_fl.pretraining import Pretrained, pretrain
from mops_fl.routing import EXPERTS, KEYS, Neighbours
from mops_fl.state_cache import StateCache
from mops_fl.weights import RULES, AdaptedModel, initial_weights


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        model: (backbone, config, what the server froze, cache) -> the model that is trained.
        start: what round 1 starts from; arguments as `mops_fl.pretraining.pretrain`.
    """

    model: Callable[[Backbone, AdapterConfig, Mapping[str, Tensor], StateCache], AdaptableModel]
    start: Callable[
        [Backbone, Sequence[EncodedRow], int, AdapterConfig, PretrainConfig, torch.Generator, Spread], Pretrained
    ]


def _start_of_weights(
    backbone: Backbone,
    rows: Sequence[EncodedRow],
    num_tasks: int,
    adapter_config: AdapterConfig,
    config: PretrainConfig,
    generator: torch.Generator,
    spread: Spread,
) -> Pretrained:
    """Adapters of weights have no prompts and learn nothing from the server's rows."""
    no_prompts = torch.zeros(0, backbone.hidden_size)
    weights = initial_weights(backbone, adapter_config, generator)
    return Pretrained(no_prompts, weights, gate_accuracy=None, neighbours=None)


def _prompted_model(
    backbone: Backbone, config: AdapterConfig, frozen: Mapping[str, Tensor], cache: StateCache
) -> AdaptableModel:
    neighbours = Neighbours.from_frozen(frozen, backbone.device)
    return PromptedModel(backbone, config, frozen[INPUT_PROMPTS], cache, neighbours)


def _adapted_model(
    backbone: Backbone, config: AdapterConfig, frozen: Mapping[str, Tensor], cache: StateCache
) -> AdaptableModel:
    """Adapters of weights change every layer, so that no state could be kept."""
    return AdaptedModel(backbone, config)


# What an adapter needs beside what is trained, by the names it has on the wire and on disk.
FROZEN_ARRAYS = (INPUT_PROMPTS, KEYS, EXPERTS)

METHOD_OF = {
    **dict.fromkeys(PROMPTED, Method(_prompted_model, pretrain)),
    **dict.fromkeys(RULES, Method(_adapted_model, _start_of_weights)),
}
