"""Fixtures for commands and run folders: what a command changes in this process, and a fabricated run."""

from __future__ import annotations

import logging
import math
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tomli_w
import torch

from clients import resident
from experiments import run as run_module
from experiments import simulation
from experiments.app_folder import AppFolder
from experiments.cli import main
from experiments.run_folder import RunFolder
from experiments.runtimes import run_inline
from mops_fl.adapter import initial_state
from mops_fl.adapter_folder import RUN_ADAPTER, AdapterDescription, SavedAdapter, save_adapter
from mops_fl.backbone import Backbone
from mops_fl.compressed import weights_sha256
from mops_fl.config import AdapterConfig, BackboneConfig, DataConfig, Scalar, read_section
from mops_fl.data import DOLLY_TASKS
from mops_fl.mops_model import MopsModel
from mops_fl.payload import INPUT_PROMPTS
from mops_fl.weights import initial_weights

TASKS = list(DOLLY_TASKS)
ROUNDS = (0, 5, 10, 15, 20)
STEPS_PER_ROUND = 20

MakeRun = Callable[..., RunFolder]
RunConfig = Callable[..., dict[str, Scalar]]


@pytest.fixture
def command_in_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For commands run inside the test: no report; signal handlers and log levels are put back."""
    monkeypatch.setattr(run_module, "write_report", lambda folder: folder.path / "report.html")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    loggers = {name: logging.getLogger(name).level for name in ("flwr", "mops_fl")}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    for name, level in loggers.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """``make_run("name", method=..., after=...)``: a run whose overall test perplexity ends at ``after``."""

    def make(
        name: str = "run",
        after: float = 20.0,
        bare: float = 60.0,
        summary: dict[str, object] | None = None,
        ended: bool = True,
        **config: Scalar,
    ) -> RunFolder:
        values: dict[str, Scalar] = {
            "method": "mops",
            "backbone": "HuggingFaceTB/SmolLM2-135M-Instruct",
            "compression": "none",
            "quantization": "none",
            "dataset": "dolly",
            "seed": 1,
            "num-clients": 100,
            "clients-per-round": 10,
            "lr": 0.01,
            "data-seed": 0,
            "eval-rows": 0,
            "output-dir": str(tmp_path / name),
        }
        values |= {key.replace("_", "-"): value for key, value in config.items()}
        run = RunFolder.create(tmp_path / name, values)
        log_metrics(run, after=after, bare=bare)
        run.write_json("partition.json", partition())
        if ended:
            run.write_summary({**summary_of(values, after=after, bare=bare), **(summary or {})})
        return run

    return make


@pytest.fixture
def make_usable_run(make_run: MakeRun, run_config: RunConfig) -> MakeRun:
    """``make_usable_run("name", method="lora")``: such a run with an adapter of the tiny model, drawn at random."""

    def make(name: str = "run", **config: Scalar) -> RunFolder:
        values = run_config({key.replace("_", "-"): value for key, value in config.items()})
        adapter, backbone = read_section(AdapterConfig, values), read_section(BackboneConfig, values)
        generator = torch.Generator().manual_seed(int(values["seed"]))
        if adapter.method in ("lora", "ia3"):
            state = initial_weights(Backbone.load(backbone), adapter, generator)
            arrays = {
                key: tensor + 0.1 * torch.randn(tensor.shape, generator=generator) for key, tensor in state.items()
            }
        else:
            prompts = torch.randn(adapter.num_prompts, 32, generator=generator)
            arrays = {**initial_state(adapter, prompts, generator), INPUT_PROMPTS: prompts}
        experts = tuple((task,) for task in TASKS) if adapter.method == "mops" else ()
        sha256 = weights_sha256(Path(backbone.backbone))
        data = read_section(DataConfig, values)
        description = AdapterDescription(adapter, backbone, sha256, data, tuple(TASKS), experts)
        run = make_run(name, **{key.replace("-", "_"): value for key, value in values.items() if key != "output-dir"})
        saved = SavedAdapter(description, {key: tensor.numpy() for key, tensor in arrays.items()}, card="")
        save_adapter(run.path / RUN_ADAPTER, saved)
        return run

    return make


@pytest.fixture
def simulate(
    run_config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """``simulate("--flag", key=value)``: exit code, output and errors of a tiny run into ``tmp_path / "run"``.

    With ``--resume`` it is the run that is named.
    """

    def call(*arguments: str, app: str = "experiments.dolly", **changes: Scalar) -> tuple[int, str, str]:
        resident._build_trainer.cache_clear()
        configured = []
        if not any(argument.startswith("--resume") for argument in arguments):
            values = run_config({"output-dir": str(tmp_path / "run")})
            values |= {name.replace("_", "-"): value for name, value in changes.items()}
            (tmp_path / "values.toml").write_text(tomli_w.dumps(values), encoding="utf-8")
            configured = ["--run-config", str(tmp_path / "values.toml")]
        code = simulation.run(["--app", app, "--backend", "inline", *configured, *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture(scope="session")
def trained_runs(run_config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a run of each kind of method, by method; only to be read."""
    folders = {method: tmp_path_factory.mktemp("runs") / method for method in ("mops", "lora")}
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MOPS_DOLLY", raising=False)
        patch.setenv("MOPS_CACHE", str(tmp_path_factory.mktemp("empty-cache")))
        patch.setattr(torch, "set_num_threads", lambda _: None)
        patch.setattr(run_module, "write_report", lambda folder: folder.path / "report.html")
        for method, folder in folders.items():
            changes = {"output-dir": str(folder), "method": method, "num-server-rounds": 1}
            run_inline(AppFolder.find("experiments.dolly"), run_config(changes), catch_signals=lambda: None)
    return folders


@pytest.fixture
def trained_run(trained_runs: dict[str, Path]) -> Path:
    """Folder of a run of MoPs; only to be read."""
    return trained_runs["mops"]


@pytest.fixture
def model(trained_run: Path) -> MopsModel:
    """What `trained_run` trained."""
    return MopsModel.from_pretrained(trained_run)


@pytest.fixture(scope="session")
def library_answer() -> Callable[..., str]:
    """``library_answer(model, "Why?")``: eight tokens at most, by transformers' `generate` itself."""

    def answer(model: MopsModel, instruction: str, context: str = "", **options: object) -> str:
        inputs = model.encode([instruction], [context])
        output = model.generate(**inputs, max_new_tokens=8, **{"do_sample": False, **options})
        return str(model.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

    return answer


@pytest.fixture
def sweep_content(run_config: RunConfig) -> dict[str, object]:
    """Two rows, two methods, one of them central, two seeds of a tiny run."""
    values = {key: value for key, value in run_config().items() if key not in ("method", "seed", "output-dir", "lr")}
    return {
        "title": "Tiny",
        "folder": "tiny",
        "app": "experiments.dolly",
        "seeds": [0, 1],
        "values": {**values, "evaluate-every": 1},
        "rows": {"two experts": {"num-experts": 2}, "7 experts": {}},
        "methods": {
            "FedPrompt": {"method": "fedprompt", "lr": 0.01},
            "MoPs, central": {"method": "mops", "lr": 0.01, "training": "central"},
        },
        "paper": {"7 experts": {"FedPrompt": 11.99}},
    }


@pytest.fixture
def sweep(tmp_path: Path) -> Callable[..., int]:
    """``sweep(sweep_content, "--only", ...)``: exit code of `mops-fl sweep` on it, into ``tmp_path / "out"``."""

    def call(content: dict[str, object], *options: str) -> int:
        (tmp_path / "sweep.toml").write_text(tomli_w.dumps(content), encoding="utf-8")
        return main(["sweep", str(tmp_path / "sweep.toml"), "--output", str(tmp_path / "out"), *options])

    return call


def factor(task: str) -> float:
    """How much harder a task is than the whole set: 0.7, 0.8, ... 1.3."""
    return 0.7 + 0.1 * TASKS.index(task) if task in TASKS else 1.0


def log_metrics(run: RunFolder, after: float, bare: float) -> None:
    """Perplexity falls from twice ``after`` to ``after``; the gate starts nearly uniform and ends sharp."""
    for number in ROUNDS:
        progress = number / ROUNDS[-1]

        def log(metric: str, value: float, task: str = "all", split: str = "test", number: int = number) -> None:
            run.log(
                round=number, client_steps=number * STEPS_PER_ROUND, split=split, task=task, metric=metric,
                value=value, seconds=2.0 * number,
            )  # fmt: skip

        for task in ("all", *TASKS):
            log("perplexity", after * (1 + math.exp(-4 * progress) * (1 - progress)) * factor(task), task)
            if number == 0:
                log("perplexity-bare", bare * factor(task), task)
        if run.config["method"] == "mops":
            for expert in range(7):
                for column, task in enumerate(TASKS):
                    own = 1 / 7 + 0.6 * progress
                    log(f"gate-expert-{expert}", own if expert == column else (1 - own) / 6, task)
        log("loss", math.log(after), split="train")


def partition() -> dict[str, object]:
    """100 clients with 3 rows of every task; of each task one client has 45; client 99 has none at all."""
    clients = []
    for client in range(100):
        per_task = {task: 45 if client % 25 == 3 * i else 3 for i, task in enumerate(TASKS)}
        if client == 99:
            per_task = {}
        rows = sum(per_task.values())
        clients.append({"partition-id": client, "num-rows": rows, "per-task": per_task, "rows": []})
    return {"tasks": TASKS, "clients": clients}


def summary_of(config: dict[str, Scalar], after: float, bare: float) -> dict[str, object]:
    """The summary.json of a run that went to its end."""
    tasks = ("all", *TASKS)
    copied = ("method", "backbone", "compression", "quantization", "dataset", "seed")
    return {
        **{name: config[name] for name in copied},
        "status": "complete",
        "data_is_sample": False,
        "data_description": "Dolly, 5,000 rows of seven tasks (4,500 train, 500 test)",
        "truncated_rows": 12,
        "experts": [[task] for task in TASKS],
        "rounds": 20,
        "client_steps": 400,
        "num_clients": 100,
        "clients_per_round": 10,
        "trainable_parameters": 77_447,
        "perplexity": {task: after * factor(task) for task in tasks},
        "perplexity_before": {task: 2 * after * factor(task) for task in tasks},
        "perplexity_bare": {task: bare * factor(task) for task in tasks},
        "train_seconds": 754.2,
        "tokens_per_second": 1234.5,
        "peak_memory_bytes": 2_100_000_000,
        "bytes_up": 61_957_600,
        "bytes_down": 61_957_600,
        "failures": 1,
    }
