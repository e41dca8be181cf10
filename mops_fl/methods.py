"""The methods by name: what a run-config's `method` may say, and what each is made of."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mops_fl.backbone import Backbone
from mops_fl.config import GATED, AdapterConfig, PretrainConfig
from mops_fl.encoding import EncodedRow
from mops_fl.errors import InputError
from mops_fl.evaluation import Spread
from mops_fl.model import AdaptableModel, PromptedModel
from mops_fl.payload import INPUT_PROMPTS
from mops_fl.pretraining import Pretrained, pretrain
from mops_fl.routing import EXPERTS, KEYS, Neighbours
from mops_fl.state_cache import StateCache
from mops_fl.weights import AdaptedModel, initial_weights


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        gated: whether it has a gate.
        model: (backbone, config, what the server froze, cache) -> the model that is trained.
        start: what round 1 starts from; arguments as `mops_fl.pretraining.pretrain`.
    """

    gated: bool
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

_WEIGHTS = Method(gated=False, model=_adapted_model, start=_start_of_weights)
METHODS = {
    **{name: Method(gated=gated, model=_prompted_model, start=pretrain) for name, gated in GATED.items()},
    "lora": _WEIGHTS,
    "ia3": _WEIGHTS,
}


def require_method(name: str) -> Method:
    """The method of this name.

    Raises:
        InputError: no such method.
    """
    if name not in METHODS:
        raise InputError(f"`method` is {name!r}; choose one of: {', '.join(METHODS)}.")
    return METHODS[name]
