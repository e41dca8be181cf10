"""What the server trains on its own rows before round 1: the input prompts P1, and the gate.

Both methods get the same P1; only the gate's pretraining is MoPs' own (paper, Section 3.3): it sees instructions and
contexts with the name of their task, never a response.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mops_fl.adapter import AdapterState, Gate, initial_state
from mops_fl.backbone import Backbone
from mops_fl.config import AdapterConfig, PretrainConfig
from mops_fl.encoding import EncodedRow
from mops_fl.evaluation import Spread
from mops_fl.losses import plain_losses
from mops_fl.model import PromptedModel
from mops_fl.routing import Neighbours
from mops_fl.state_cache import StateCache


@dataclass(frozen=True)
class Pretrained:
    """Where round 1 starts.

    Attributes:
        input_prompts: `(K, D)` float32 P1, or `(0, D)`, frozen from here on.
        adapter: initial expert prompts and, for MoPs, the pretrained gate.
        gate_accuracy: share of the server's rows whose own experts together get the highest score; None without a gate,
            or if it was not pretrained.
        neighbours: what rows are routed by instead of a gate, None where a gate does.
    """

    input_prompts: Tensor
    adapter: AdapterState
    gate_accuracy: float | None
    neighbours: Neighbours | None


def pretrain(
    backbone: Backbone,
    rows: Sequence[EncodedRow],
    num_tasks: int,
    adapter_config: AdapterConfig,
    config: PretrainConfig,
    generator: torch.Generator,
    spread: Spread = map,
) -> Pretrained:
    """Train P1 on the plain model, draw the adapter, then train its gate on the pooled states.

    Args:
        backbone: the frozen model.
        rows: the server's rows; none means that nothing is pretrained.
        num_tasks: tasks that are trained on, `T`; the rows' numbers of tasks are below it.
        adapter_config: shapes and readings.
        config: steps and rates.
        generator: the only source of randomness.
        spread: runs the frozen layers over many rows.
    """
    num_prompts = adapter_config.num_prompts if config.input_prompts else 0
    prompts = sample_token_embeddings(backbone, num_prompts, generator)
    no_cache = StateCache(0)
    model = PromptedModel(backbone, adapter_config, prompts, no_cache)
    if rows and num_prompts:
        prompts = train_input_prompts(model, rows, config, generator)
        model = PromptedModel(backbone, adapter_config, prompts, no_cache)
    prompts = initial_prompts(model, adapter_config, generator)
    state = initial_state(adapter_config, prompts, generator, backbone.gate_input_size)
    accuracy = neighbours = None
    if rows and config.gate_epochs and "gate.w1" in state:
        state, accuracy = train_gate(state, model, rows, num_tasks, config, spread)
    elif adapter_config.gated and adapter_config.routing == "nearest":
        pooled, experts = gate_inputs(model, rows, adapter_config.num_experts, spread)
        neighbours = Neighbours.of(pooled, experts, adapter_config.num_experts)
    return Pretrained(model.input_prompts, state, accuracy, neighbours)


def train_input_prompts(
    model: PromptedModel, rows: Sequence[EncodedRow], config: PretrainConfig, generator: torch.Generator
) -> Tensor:
    """Prompt tuning of P1 on the plain model, all layers, no gate, no injection; one row a step."""
    prompts = model.input_prompts.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([prompts], lr=config.input_prompt_lr)
    for _ in range(config.input_prompt_steps):
        row = rows[int(torch.randint(len(rows), (), generator=generator))]
        losses = plain_losses(model.backbone, prompts, [row])
        optimizer.zero_grad()
        (losses.loss_sum / losses.num_tokens).sum().backward()
        optimizer.step()
    return prompts.detach()


def initial_prompts(model: PromptedModel, config: AdapterConfig, generator: torch.Generator) -> Tensor:
    """The `(K, D)` prompts injected at layer `m`, before any training.

    `random` is normal with the standard deviation of the token embeddings.
    """
    backbone = model.backbone
    if config.prompt_init == "vocabulary":
        return sample_token_embeddings(backbone, config.num_prompts, generator)
    if config.prompt_init == "transformed":
        return model.transformed_prompts.float().cpu()
    spread = backbone.embedding_weight.float().std().item()
    return torch.randn(config.num_prompts, backbone.hidden_size, generator=generator) * spread


def sample_token_embeddings(backbone: Backbone, count: int, generator: torch.Generator) -> Tensor:
    """Embeddings `(count, D)` of tokens drawn from the vocabulary, float32."""
    token_ids = torch.randint(len(backbone.embedding_weight), (count,), generator=generator)
    return backbone.embedding_weight[token_ids.to(backbone.device)].float().cpu()


def gate_inputs(
    model: PromptedModel, rows: Sequence[EncodedRow], num_groups: int, spread: Spread = map
) -> tuple[Tensor, Tensor]:
    """What the gate sees of the rows' questions `(R, D)`, and each row's own group of experts `(R,)`."""
    pooled = pooled_questions(model, rows, spread)
    return pooled, torch.tensor([row.task for row in rows], device=pooled.device) % num_groups


def pooled_questions(model: PromptedModel, rows: Sequence[EncodedRow], spread: Spread = map) -> Tensor:
    """What the gate sees of the rows' questions `(R, D)`, on the model's device."""
    # To the model's cache a question is another row than the one that goes on with its answer.
    questions = [replace(row, row_id=~row.row_id, token_ids=row.token_ids[: row.prompt_length]) for row in rows]
    return torch.stack(list(spread(lambda row: model.row_states([row])[0].pooled, questions)))


def train_gate(
    state: AdapterState,
    model: PromptedModel,
    rows: Sequence[EncodedRow],
    num_tasks: int,
    config: PretrainConfig,
    spread: Spread = map,
) -> tuple[AdapterState, float]:
    """Cross-entropy of the gate against the rows' tasks.

    Deviation: `gate-epochs` steps of Adam, each on all rows at once; the paper says "a few epochs".

    Our choice, where the paper has `E = T`: expert `e` and task `t` belong together if `e` and `t` are the same modulo
    `min(E, T)`. Of too few experts each has several tasks; of too many a task has several, whose scores count as one.

    Returns:
        The state with a trained gate, and the share of rows that end at their own experts.
    """
    num_groups = min(len(state["gate.b2"]), num_tasks)
    pooled, groups = gate_inputs(model, rows, num_groups, spread)
    gate = Gate([state]).to(pooled.device)
    optimizer = torch.optim.Adam(gate.parameters(), lr=config.gate_lr)
    for _ in range(config.gate_epochs):
        optimizer.zero_grad()
        F.cross_entropy(_of_groups(gate(pooled), num_groups), groups).backward()
        optimizer.step()
    with torch.no_grad():
        accuracy = (_of_groups(gate(pooled), num_groups).argmax(-1) == groups).float().mean().item()
    trained = {f"gate.{name}": p.detach()[0].cpu() for name, p in gate.named_parameters()}
    return {**state, **trained}, accuracy


def _of_groups(logits: Tensor, num_groups: int) -> Tensor:
    """Logits `(R, num_groups)` of groups of experts, given the experts' `(R, E)`: that of one expert is its own."""
    return torch.stack([logits[:, group::num_groups].logsumexp(1) for group in range(num_groups)], 1)
