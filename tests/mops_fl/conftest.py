"""Fixtures for the model side: small configs, encoded rows of random tokens, adapter states, pruned models, a hub."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch

from mops_fl import fetch, sources
from mops_fl.adapter import AdapterState, initial_state
from mops_fl.compression import Calibration, compress
from mops_fl.config import AdapterConfig, BackboneConfig, DataConfig, read_section
from mops_fl.data import load_task_data
from mops_fl.encoding import EncodedRow
from mops_fl.recipe import PruningRecipe

AdapterConfigOf = Callable[..., AdapterConfig]
DataConfigOf = Callable[..., DataConfig]
MakeRow = Callable[..., EncodedRow]
MakeState = Callable[..., AdapterState]
BackboneConfigOf = Callable[..., BackboneConfig]
Press = Callable[..., Path]
CALIBRATION = Calibration(num_rows=7, max_length=48)


@pytest.fixture(scope="session")
def adapter_config() -> AdapterConfigOf:
    """``adapter_config(gating="embedding")``: three experts of two prompts at layer 2 of the tiny model's 4."""

    def make(**changes: str | int) -> AdapterConfig:
        values = {
            "method": "mops", "inject_layer": 2, "num_experts": 3, "prompts_per_expert": 2, "gating": "attention",
            "pooling": "question", "prompt_init": "random", "routing": "gate", "gate_width": 8,
            "gate_temperature": 1.0, "lora_rank": 2, "lora_alpha": 4.0,
        }  # fmt: skip
        return AdapterConfig(**{**values, **changes})

    return make


@pytest.fixture(scope="session")
def data_config() -> DataConfigOf:
    """``data_config(max_length=64)``: nothing is cut off, the response carries the loss."""

    def make(**changes: str | int | float) -> DataConfig:
        values = {
            "dataset": "dolly", "data_path": "", "tasks": "", "held_out_tasks": "",
            "data_seed": 0, "num_rows": 100, "test_fraction": 0.1,
            "server_rows": 14, "max_length": 1000, "loss_on": "response",
        }  # fmt: skip
        return DataConfig(**{**values, **changes})

    return make


@pytest.fixture(scope="session")
def make_row() -> MakeRow:
    """``make_row(3, num_tokens=12, prompt_length=8)``: a row of tokens drawn by its id."""

    def make(row_id: int, num_tokens: int = 12, prompt_length: int = 8, task: int = 0, **changes: int) -> EncodedRow:
        token_ids = torch.randint(300, (num_tokens,), generator=torch.Generator().manual_seed(row_id))
        values = {"prompt_length": prompt_length, "loss_start": prompt_length, "truncated": False}
        return EncodedRow(row_id=row_id, token_ids=token_ids, task=task, **{**values, **changes})

    return make


@pytest.fixture(scope="session")
def make_state() -> MakeState:
    """``make_state(config, seed)``: an adapter whose gate is far from flat, so that gating shows."""

    def make(config: AdapterConfig, seed: int = 0) -> AdapterState:
        generator = torch.Generator().manual_seed(seed)
        prompts = torch.randn(config.num_prompts, 32, generator=generator)
        state = initial_state(config, prompts, generator)
        gate = {
            name: 3 * tensor + 0.3 * torch.randn(tensor.shape, generator=generator)
            for name, tensor in state.items()
            if name != "prompts"
        }
        return {**state, **gate}

    return make


@pytest.fixture(scope="session")
def backbone_config() -> BackboneConfigOf:
    """``backbone_config(folder, "sparsegpt:75%")``: that model so pruned, in float32."""

    def make(backbone: object, compression: str = "none") -> BackboneConfig:
        return BackboneConfig(str(backbone), compression, "none", dtype="float32", gate_embedding="backbone")

    return make


@pytest.fixture(scope="session")
def press(run_config: Callable[..., dict[str, object]]) -> Press:
    """``press(model_folder, "wanda:75%")``: the folder in the cache that `compress` makes of it, on 7 short rows."""

    def make(model_folder: Path, recipe: str, calibration: Calibration = CALIBRATION, **overrides: object) -> Path:
        config = read_section(DataConfig, run_config(overrides))
        data = load_task_data(config)
        return compress(str(model_folder), PruningRecipe.parse(recipe), data, config, calibration, lambda _: None)

    return make


@pytest.fixture(scope="session")
def pruned(tiny_model_folder: Path, press: Press, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``pruned("wanda:75%")``: the folder that it makes of the tiny Llama, each made once, in a cache of their own."""
    cache = tmp_path_factory.mktemp("cache")
    folders: dict[str, Path] = {}

    def make(recipe: str) -> Path:
        if recipe not in folders:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("MOPS_CACHE", str(cache))
                folders[recipe] = press(tiny_model_folder, recipe)
        return folders[recipe]

    return make


@pytest.fixture
def no_network(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache, and a hub that fails the test if anything calls it."""

    def called(*_: object, **__: object) -> None:
        pytest.fail("a hub was called")

    for name in ("model_info", "dataset_info", "snapshot_download", "hf_hub_download"):
        monkeypatch.setattr(huggingface_hub, name, called)


@pytest.fixture
def no_hub() -> Callable[..., None]:
    """In the place of a function of the hub's: there is none."""

    def unreachable(*_: object, **__: object) -> None:
        raise OSError("Name or service not known\nmore lines")

    return unreachable


@pytest.fixture
def hub(no_network: None, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A hub with one model of three files; `files`, `hashes` and `calls` can be looked at and changed."""
    files = {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": b"weights"}
    hashes = {"model.safetensors": hashlib.sha256(b"weights").hexdigest()}
    state = SimpleNamespace(files=files, hashes=hashes, calls=[])

    def model_info(name: str, *, revision: str | None, files_metadata: bool, timeout: float) -> SimpleNamespace:
        assert files_metadata
        assert timeout <= 10
        state.calls.append(("info", name, revision))
        siblings = [
            SimpleNamespace(rfilename=file, lfs=SimpleNamespace(sha256=sha)) for file, sha in state.hashes.items()
        ]
        siblings.append(SimpleNamespace(rfilename="config.json", lfs=None))
        return SimpleNamespace(sha=revision or "a" * 40, siblings=siblings, card_data=SimpleNamespace(license="mit"))

    def snapshot_download(name: str, *, revision: str, local_dir: Path, **_: object) -> None:
        state.calls.append(("download", name, revision))
        for file, data in state.files.items():
            (Path(local_dir) / file).write_bytes(data)
        (Path(local_dir) / ".cache").mkdir()

    monkeypatch.setattr(huggingface_hub, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return state


@pytest.fixture
def dolly_hub(no_network: None, monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes, bytes], None]:
    """``dolly_hub(data, expected)``: a hub with `data` as Dolly, where that with the hash of `expected` is wanted."""

    def make(data: bytes, expected: bytes) -> None:
        def hf_hub_download(_: str, file: str, *, repo_type: str, revision: str, local_dir: Path, **__: object) -> None:
            assert (repo_type, revision) == ("dataset", sources.DOLLY_REVISION)
            (Path(local_dir) / file).write_bytes(data)

        monkeypatch.setattr(huggingface_hub, "dataset_info", lambda *_args, **_kwargs: None)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
        for module in (fetch, sources):
            monkeypatch.setattr(module, "DOLLY_SHA256", hashlib.sha256(expected).hexdigest())

    return make
