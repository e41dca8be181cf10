"""LoRA and IA3: adapters of the frozen layers' own matrices, the baselines that train no prompts.

    LoRA (arXiv 2106.09685)   y = W x + (alpha / r) B A x          of q_proj and v_proj
    IA3  (arXiv 2205.05638)   y = l * (W x)  of k_proj and v_proj;  y = W (l * x)  of down_proj

Which matrices, and how they start, is as in Hugging Face's peft for Llama. peft keeps one adapter on the module; here
each row of a packed batch has its own client's, so that a cohort is trained in one pass, as prompts are.

Letters: `J` adapters, `T` packed positions, `r` rank. Rows stand owner by owner, as in `mops_fl.adapter`.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from mops_fl.adapter import Adapter, AdapterState
from mops_fl.backbone import Backbone
from mops_fl.config import AdapterConfig
from mops_fl.encoding import EncodedRow
from mops_fl.errors import InputError
from mops_fl.losses import RowLosses, plain_losses

Change = Callable[[nn.Module, Tensor], Tensor]

# What the adapted matrices of the forward pass that this thread is in do; empty outside of one.
_CHANGES: ContextVar[Mapping[str, Change]] = ContextVar("changes", default=MappingProxyType({}))


class AdaptedLinear(nn.Module):
    """A frozen matrix, and the change that the pass at hand makes to it."""

    def __init__(self, base: nn.Module, name: str) -> None:
        super().__init__()
        self.base = base
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        """`(1, T, in)` to `(1, T, out)`."""
        change = _CHANGES.get().get(self.name)
        output: Tensor = self.base(x) if change is None else change(self.base, x)
        return output


class WeightAdapter(Adapter):
    """`J` sets of trained arrays beside the frozen matrices."""

    def __init__(self, states: Sequence[AdapterState]) -> None:
        """Stack states of equal shapes."""
        super().__init__()
        self._names = list(states[0])
        self._stacked = nn.ParameterList(torch.stack([state[name].float() for state in states]) for name in self._names)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Name in a state -> parameter."""
        return dict(zip(self._names, self._stacked, strict=True))


class AdaptedModel:
    """A backbone whose matrices are adapted; has no prompts, and nothing in it that stays the same from step to step.

    Attributes:
        backbone: the frozen model.
        num_prompts: none.
    """

    num_prompts = 0

    def __init__(self, backbone: Backbone, config: AdapterConfig) -> None:
        """Put an `AdaptedLinear` around each matrix that the method changes, unless one is there.

        Raises:
            InputError: a layer has no such matrix.
        """
        self.backbone = backbone
        self._config = config
        self._rule = RULES[config.method]
        for name, linear in _targets(backbone, config.method).items():
            parent, _, attribute = name.rpartition(".")
            setattr(backbone.layers.get_submodule(parent), attribute, AdaptedLinear(linear, name))

    def adapter(self, states: Sequence[AdapterState]) -> WeightAdapter:
        """Adapters of these states, where the backbone is."""
        return WeightAdapter(states).to(self.backbone.device)

    def losses(self, adapter: WeightAdapter, rows: Sequence[EncodedRow]) -> RowLosses:
        """Loss of each row under the adapter that owns it; see `mops_fl.model.AdaptableModel.losses`."""
        lengths = torch.tensor([len(row.token_ids) for row in rows])
        per_adapter = lengths.view(adapter.num_adapters, -1).sum(1).tolist()
        with self._changed_by(adapter, per_adapter):
            return plain_losses(self.backbone, torch.zeros(0, self.backbone.hidden_size), rows)

    def run_cached(self, adapter: WeightAdapter, token_ids: Tensor, kept: Tensor, cache: Cache, _: int) -> Tensor:
        """The last layer's output at new tokens; see `mops_fl.model.AdaptableModel.run_cached`."""
        with self._changed_by(adapter, [token_ids.shape[1]]):
            hidden = self.backbone.embed(token_ids)
            return self.backbone.run_cached(hidden, kept, cache, 0, self.backbone.num_layers)

    def gate_scores(self, adapter: WeightAdapter, token_ids: Tensor, kept: Tensor) -> None:
        """There is no gate."""

    @contextmanager
    def _changed_by(self, adapter: WeightAdapter, per_adapter: list[int]) -> Iterator[None]:
        """The matrices with each adapter's change on its own positions, `per_adapter` many one behind the other."""
        arrays: dict[str, list[Tensor]] = {}
        for name, parameter in adapter.trainable().items():
            arrays.setdefault(name.rpartition(".")[0], []).append(parameter.to(self.backbone.dtype))
        changes = {name: self._rule.change(name, parts, per_adapter, self._config) for name, parts in arrays.items()}
        token = _CHANGES.set(changes)
        try:
            yield
        finally:
            _CHANGES.reset(token)


def initial_weights(backbone: Backbone, config: AdapterConfig, generator: torch.Generator) -> AdapterState:
    """An adapter that changes nothing yet, however it is drawn.

    Raises:
        InputError: a layer has no matrix that the method changes.
    """
    rule = RULES[config.method]
    return {
        f"{name}.{part}": tensor
        for name, linear in _targets(backbone, config.method).items()
        for part, tensor in rule.start(name, linear, config, generator).items()
    }


@dataclass(frozen=True)
class Rule:
    """How a method changes matrices.

    Attributes:
        targets: the matrices within each layer.
        start: (name, matrix, config, generator) -> arrays of one matrix, in the order that `change` takes them.
        change: (name, arrays with leading `J`, positions of each adapter, config) -> what the matrix then does.
    """

    targets: tuple[str, ...]
    start: Callable[[str, Any, AdapterConfig, torch.Generator], AdapterState]
    change: Callable[[str, list[Tensor], list[int], AdapterConfig], Change]


def _start_lora(_: str, linear: Any, config: AdapterConfig, generator: torch.Generator) -> AdapterState:  # noqa: ANN401
    bound = 1 / math.sqrt(linear.in_features)  # Kaiming's uniform with a = sqrt(5), as peft draws it
    drawn = torch.rand(config.lora_rank, linear.in_features, generator=generator)
    return {"a": (2 * drawn - 1) * bound, "b": torch.zeros(linear.out_features, config.lora_rank)}


def _change_lora(_: str, arrays: list[Tensor], lengths: list[int], config: AdapterConfig) -> Change:
    a, b = arrays  # (J, r, in), (J, out, r)
    scaling = config.lora_alpha / config.lora_rank

    def change(base: nn.Module, x: Tensor) -> Tensor:
        parts = x.split(lengths, 1)
        deltas = [part @ a[j].T @ b[j].T for j, part in enumerate(parts)]
        output: Tensor = base(x) + scaling * torch.cat(deltas, 1)
        return output

    return change


def _start_ia3(name: str, linear: Any, _: AdapterConfig, __: torch.Generator) -> AdapterState:  # noqa: ANN401
    return {"scale": torch.ones(linear.in_features if _scales_input(name) else linear.out_features)}


def _change_ia3(name: str, arrays: list[Tensor], lengths: list[int], _: AdapterConfig) -> Change:
    (scale,) = arrays

    def scaled(hidden: Tensor) -> Tensor:  # (B, T, in or out)
        parts = zip(hidden.split(lengths, 1), scale, strict=True)
        return torch.cat([part * of_adapter for part, of_adapter in parts], 1)

    if _scales_input(name):
        return lambda base, x: base(scaled(x))
    return lambda base, x: scaled(base(x))


def _scales_input(name: str) -> bool:
    return name.endswith("down_proj")


RULES = {
    "lora": Rule(("self_attn.q_proj", "self_attn.v_proj"), _start_lora, _change_lora),
    "ia3": Rule(("self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj"), _start_ia3, _change_ia3),
}


def _targets(backbone: Backbone, method: str) -> dict[str, Any]:
    """Name within the layers -> frozen matrix, in the order of the layers.

    Raises:
        InputError: one is missing, as where projections are fused or layers have experts.
    """
    modules = dict(backbone.layers.named_modules())
    names = [f"{layer}.{target}" for layer in range(backbone.num_layers) for target in RULES[method].targets]
    if missing := [name for name in names if name not in modules]:
        raise InputError(
            f"{type(backbone.model).__name__} has no layers.{missing[0]}, which the method {method} changes; choose "
            "method mops or fedprompt, or a backbone such as Llama, Mistral, Qwen2 or Qwen3."
        )
    found = {name: modules[name] for name in names}
    return {name: module.base if isinstance(module, AdaptedLinear) else module for name, module in found.items()}
