"""Fixtures for all tests: tiny random models, a byte tokenizer, a run-config for seconds, all offline."""

from __future__ import annotations

import os
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

# All are read at import. More threads than one only wait for each other when matrices are tiny.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
# Colours would stand amid the texts that are compared, and a proxy between the processes of this machine.
os.environ.pop("FORCE_COLOR", None)
os.environ.pop("TTY_COMPATIBLE", None)
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"

import pytest
import torch
from flwr.supercore.task_identity import TaskIdentity
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from mops_fl.backbone import Backbone
from mops_fl.config import Scalar

PROJECT = Path(__file__).parents[1]
EOS = "<|end|>"
TINY_SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    # Ten times the usual: attention is then far from uniform, and a mistake in it shows.
    "initializer_range": 0.2,
}
TINY_RUN = {
    "inject-layer": 2,
    "num-rows": 210,
    "server-rows": 35,
    "max-length": 64,
    "num-clients": 10,
    "clients-per-round": 3,
    "local-steps": 2,
    "num-server-rounds": 2,
    "cohort-size": 2,
    "eval-rows": 14,
    "dtype": "float32",
    "prompts-per-expert": 2,
    "gate-width": 8,
    "gate-epochs": 5,
    "input-prompt-steps": 2,
    "cache-megabytes": 16,
    "cache-file-megabytes": 16,
    "data-path": "",
}

TinyModel = Callable[..., PreTrainedModel]
RunConfig = Callable[..., dict[str, Scalar]]


def pytest_configure(config: pytest.Config) -> None:
    """Hide the GPUs, on which bits and timings are others, unless `-m` asks for them; no test has yet called CUDA."""
    if "gpu" not in config.option.markexpr.replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True)
def _own_surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Data and models of this machine are out of sight, and no test inherits another one's trainer."""
    monkeypatch.delenv("MOPS_DOLLY", raising=False)
    monkeypatch.delenv("MOPS_SUPER_NI", raising=False)
    monkeypatch.setenv("MOPS_CACHE", str(tmp_path_factory.getbasetemp() / "empty-cache"))
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # the trainer asks for all cores
    yield
    if resident := sys.modules.get("clients.resident"):
        resident._build_trainer.cache_clear()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own, which is not there yet."""
    monkeypatch.setenv("MOPS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def task_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Flower's runtimes set before a message can be made."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each of the 256 bytes, and an end of text; no begin of text, no merges."""
    return build_byte_tokenizer()


@pytest.fixture(scope="session")
def tiny_model() -> TinyModel:
    """``tiny_model("llama", **config)``: a new float32 model, always with the same random weights."""
    return build_tiny_model


@pytest.fixture
def tiny_backbone(byte_tokenizer: PreTrainedTokenizerFast) -> Backbone:
    """The tiny Llama with the byte tokenizer, a new one for each test."""
    return Backbone(build_tiny_model("llama"), byte_tokenizer)


@pytest.fixture(scope="session")
def tiny_model_folder(byte_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama and the byte tokenizer on disk, as `backbone` of a run-config."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    build_tiny_model("llama").save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def run_config(tiny_model_folder: Path) -> RunConfig:
    """``run_config({"method": "fedprompt"})``: the Dolly app's whole run-config, shrunk to the tiny model."""

    def make(overrides: Mapping[str, Scalar] | None = None) -> dict[str, Scalar]:
        app = tomllib.loads((PROJECT / "experiments/dolly/pyproject.toml").read_text(encoding="utf-8"))
        values = {**app["tool"]["flwr"]["app"]["config"], **TINY_RUN, "backbone": str(tiny_model_folder)}
        changes = {**(overrides or {})}
        assert set(changes) <= set(values), f"no such run-config keys: {set(changes) - set(values)}"
        return {**values, **changes}

    return make


def build_byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS)


def build_tiny_model(family: str, **config: object) -> PreTrainedModel:
    settings = CONFIG_MAPPING[family](**{**TINY_SIZES, **config})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32, attn_implementation="eager")
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:  # norms and biases start at one and zero, which would hide their loss
                    parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()
