"""Typed settings of the model, the data and the optimiser, read from Flower's flat run-config.

Values live in TOML files, types and rules live here: no dataclass field has a default. `read_section` turns the
kebab-case keys of a run-config into one frozen dataclass and refuses what is missing or of another type.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TypeVar, get_type_hints

from mops_fl.errors import InputError
from mops_fl.recipe import PruningRecipe

DATASETS = ("dolly", "super-ni")
# FedPrompt and central prompt tuning are MoPs' prompts without its gate.
PROMPTED = ("mops", "fedprompt")
METHODS = (*PROMPTED, "lora", "ia3")
# The value of `gate-embedding` that names no other model.
OWN_EMBEDDING = "backbone"

Scalar = bool | int | float | str
Section = TypeVar("Section")


@dataclass(frozen=True)
class BackboneConfig:
    """The frozen language model.

    Attributes:
        backbone: Hugging Face id or local folder of a decoder-only model.
        compression: `none`, or a `mops_fl.recipe.PruningRecipe` such as `sparsegpt:75%` that `mops-fl compress` has
            carried out.
        quantization: `none`, `int8` (LLM.int8) or `nf4` (4-bit NormalFloat), of the decoder layers' matrices.
        dtype: `bfloat16`, `float32`, or `auto`: bfloat16 where the processor multiplies it natively.
        gate_embedding: what the gate, or the routing by neighbours, looks at: the `backbone`'s own hidden states, or
            the embedding that another model gives the question: a Hugging Face id or local folder.
    """

    backbone: str
    compression: str
    quantization: str
    dtype: str
    gate_embedding: str

    def __post_init__(self) -> None:
        if self.compression != "none":
            PruningRecipe.parse(self.compression)
        require_choice("quantization", self.quantization, ("none", "int8", "nf4"))
        require_choice("dtype", self.dtype, ("auto", "bfloat16", "float32"))


@dataclass(frozen=True)
class DataConfig:
    """The rows, their split and how they become tokens.

    Attributes:
        dataset: `dolly`, or `super-ni`: task files in the schema of Super-Natural Instructions.
        data_path: dolly: `.jsonl` or `.jsonl.gz`; empty: `MOPS_DOLLY`, the fetched copy, or the bundled sample.
            super-ni: a checkout or a folder of task files; empty: `MOPS_SUPER_NI` or the fetched copy.
        tasks: comma-separated names or patterns of the tasks used, see `mops_fl.task_choice`; empty: the paper's
            seven, and of task files that are others, all.
        held_out_tasks: those of them, named likewise, that nobody trains on; they are tested all the same.
        data_seed: seed of the draw and of the split, kept apart from `seed` so that runs of several seeds are
            measured on the same rows, be they the server's test rows or those that clients of a shared set keep back.
        num_rows: rows of the protocol, train and test together (paper: 5,000).
        test_fraction: share of those kept for testing (paper: 0.1).
        server_rows: rows the server holds for pretraining, neither a client's nor the test's.
        max_length: most tokens of one row, prompts not counted.
        loss_on: `response` tokens or `all` tokens carry loss.
    """

    dataset: str
    data_path: str
    tasks: str
    held_out_tasks: str
    data_seed: int
    num_rows: int
    test_fraction: float
    server_rows: int
    max_length: int
    loss_on: str

    def __post_init__(self) -> None:
        require_choice("dataset", self.dataset, DATASETS)
        require_choice("loss-on", self.loss_on, ("response", "all"))
        require_at_least("num-rows", self.num_rows, 2)
        require_at_least("server-rows", self.server_rows, 0)
        require_at_least("max-length", self.max_length, 16)
        require_at_least("data-seed", self.data_seed, 0)
        if not 0 < self.test_fraction < 1:
            raise InputError(f"test-fraction is {self.test_fraction}; set it between 0 and 1, for instance 0.1.")


@dataclass(frozen=True)
class AdapterConfig:
    """What is trained: `num_experts` groups of soft prompts and the gate that weighs them, or a baseline's arrays.

    Attributes:
        method: one of `METHODS`; `mops_fl.methods` says what each is made of.
        inject_layer: layer `m` whose input gets the trained prompts (paper: 10 of 32).
        num_experts: `E` (paper: 7, one per task).
        prompts_per_expert: `P` (paper: 10).
        gating: `attention` scales the attention onto the prompts, `embedding` their hidden states.
        pooling: gate input is the mean over the `question` (instruction and context) or over `all` positions.
        prompt_init: `random`, `vocabulary` (embeddings of sampled tokens) or `transformed` (the input prompts as
            they arrive at layer `m`).
        routing: the experts of a row are weighed by the trained `gate` (paper), or are those of the `nearest` of the
            server's rows.
        gate_width: hidden size of the gate.
        gate_temperature: the gate's logits are divided by it once the gate is pretrained (paper: 1); above 1 the
            scores of experts are more alike.
        lora_rank: `r` of LoRA's matrices.
        lora_alpha: LoRA's change is scaled by this over the rank.
    """

    method: str
    inject_layer: int
    num_experts: int
    prompts_per_expert: int
    gating: str
    pooling: str
    prompt_init: str
    routing: str
    gate_width: int
    gate_temperature: float
    lora_rank: int
    lora_alpha: float

    def __post_init__(self) -> None:
        require_choice("method", self.method, METHODS)
        require_choice("gating", self.gating, ("attention", "embedding"))
        require_choice("pooling", self.pooling, ("question", "all"))
        require_choice("prompt-init", self.prompt_init, ("random", "vocabulary", "transformed"))
        require_at_least("inject-layer", self.inject_layer, 0)
        require_at_least("num-experts", self.num_experts, 1)
        require_at_least("prompts-per-expert", self.prompts_per_expert, 1)
        require_choice("routing", self.routing, ("gate", "nearest"))
        require_at_least("gate-width", self.gate_width, 1)
        require_positive("gate-temperature", self.gate_temperature)
        if self.routing == "nearest" and self.gate_temperature != 1:
            raise InputError(
                f"`gate-temperature` is {self.gate_temperature}, but `routing` is 'nearest', which has no gate; "
                "set gate-temperature to 1."
            )
        require_at_least("lora-rank", self.lora_rank, 1)
        require_positive("lora-alpha", self.lora_alpha)

    @property
    def gated(self) -> bool:
        """Whether experts are weighed for each row, by a trained gate or by the row's neighbours."""
        return self.method == "mops"

    @property
    def num_gated(self) -> int:
        """Experts that are weighed for each row; 0 without a gate."""
        return self.num_experts if self.gated else 0

    @property
    def num_prompts(self) -> int:
        """`K = E * P`."""
        return self.num_experts * self.prompts_per_expert


@dataclass(frozen=True)
class PretrainConfig:
    """What the server trains on its own rows before round 1.

    Attributes:
        input_prompts: whether there are any input prompts P1 (paper: yes).
        input_prompt_steps: steps on the input prompts P1 (paper: 20).
        input_prompt_lr: their Adam learning rate.
        gate_epochs: passes over the server's instructions when the gate learns the tasks; 0 leaves it random.
        gate_lr: its Adam learning rate.
    """

    input_prompts: bool
    input_prompt_steps: int
    input_prompt_lr: float
    gate_epochs: int
    gate_lr: float

    def __post_init__(self) -> None:
        require_at_least("input-prompt-steps", self.input_prompt_steps, 0)
        require_at_least("gate-epochs", self.gate_epochs, 0)
        require_positive("input-prompt-lr", self.input_prompt_lr)
        require_positive("gate-lr", self.gate_lr)


@dataclass(frozen=True)
class TrainConfig:
    """Local training of one client.

    Attributes:
        lr: Adam learning rate of the prompts.
        gate_lr_factor: the gate's learning rate is this times `lr` (paper: 1); 0 keeps the pretrained gate.
        batch_size: rows per client and step (paper: 1).
        local_steps: steps per client and round (paper: 250).
        local_epochs: passes over its rows after which a client stops earlier than that (paper: 0, never).
    """

    lr: float
    gate_lr_factor: float
    batch_size: int
    local_steps: int
    local_epochs: int

    def __post_init__(self) -> None:
        require_positive("lr", self.lr)
        require_not_negative("gate-lr-factor", self.gate_lr_factor)
        require_at_least("batch-size", self.batch_size, 1)
        require_at_least("local-steps", self.local_steps, 1)
        require_at_least("local-epochs", self.local_epochs, 0)

    def num_steps(self, num_rows: int) -> int:
        """Steps of a client with so many rows, at least one."""
        if not self.local_epochs:
            return self.local_steps
        return min(self.local_steps, math.ceil(self.local_epochs * num_rows / self.batch_size))


def read_section(section: type[Section], run_config: Mapping[str, Scalar]) -> Section:
    """Fill one config dataclass from the kebab-case keys of a run-config.

    Raises:
        InputError: a key is missing or its value has another type.
    """
    values: dict[str, Scalar] = {}
    for name, expected in get_type_hints(section).items():
        key = to_key(name)
        if key not in run_config:
            raise InputError(f"The run-config has no `{key}`; add it to the app's [tool.flwr.app.config].")
        value = run_config[key]
        if expected is float and type(value) is int:
            value = float(value)
        if type(value) is not expected:
            raise InputError(f"`{key}` is {value!r}; it must be of type {expected.__name__}.")
        values[name] = value
    return section(**values)


def section_keys(*sections: type) -> set[str]:
    """The run-config keys that the given dataclasses read."""
    return {to_key(field.name) for section in sections for field in fields(section)}


def to_key(name: str) -> str:
    """The kebab-case run-config key of a snake_case field."""
    return name.replace("_", "-")


def require_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a value outside a fixed list."""
    if value not in choices:
        raise InputError(f"`{key}` is {value!r}; choose one of: {', '.join(choices)}.")


def require_at_least(key: str, value: int, least: int) -> None:
    """Refuse a number below a bound."""
    if value < least:
        raise InputError(f"`{key}` is {value}; it must be at least {least}.")


def require_positive(key: str, value: float) -> None:
    """Refuse zero, negative and non-finite numbers."""
    if not 0 < value < float("inf"):
        raise InputError(f"`{key}` is {value}; it must be a positive number.")


def require_not_negative(key: str, value: float) -> None:
    """Refuse negative and non-finite numbers."""
    if not 0 <= value < float("inf"):
        raise InputError(f"`{key}` is {value}; it must be a number of at least 0.")
