"""Whole runs in this process: real ServerApp, real ClientApp, real trainer, tiny model, bundled sample."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from clients import client_app
from experiments import run as run_module
from experiments.app_folder import AppFolder
from experiments.measurements import series
from experiments.run_folder import RunFolder
from experiments.runtimes import run_inline
from mops_fl.adapter_folder import load_adapter
from mops_fl.data import DOLLY_TASKS

GATE = {"gate.w1": (8, 32), "gate.b1": (8,), "gate.w2": (7, 8), "gate.b2": (7,)}
PROMPTS = {"prompts": (14, 32), "input-prompts": (14, 32)}


def run(run_config, folder, **changes):
    values = run_config({"output-dir": str(folder), **{key.replace("_", "-"): value for key, value in changes.items()}})
    run_inline(AppFolder.find("experiments.dolly"), values, catch_signals=lambda: None)
    return RunFolder.open(folder)


def adapter_bits(folder):
    arrays = load_adapter(folder.path / "adapter").arrays
    return {name: array.tobytes() for name, array in arrays.items()}


@pytest.fixture(scope="module", autouse=True)
def _surroundings(tmp_path_factory):
    """No data of this machine, and one thread: more only wait for each other on a model so small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MOPS_DOLLY", raising=False)
        patch.setenv("MOPS_CACHE", str(tmp_path_factory.mktemp("empty-cache")))
        patch.setattr(torch, "set_num_threads", lambda _: None)
        yield


@pytest.fixture(scope="module")
def complete(run_config, tmp_path_factory):
    """A run with everything, its report included; the others below leave that one out."""
    return run(run_config, tmp_path_factory.mktemp("runs") / "complete", evaluate_every=1)


@pytest.fixture
def quick_report(monkeypatch):
    monkeypatch.setattr(run_module, "write_report", lambda folder: folder.path / "report.html")


def test_summary_keeps_the_contract(complete):
    summary = complete.summary
    expected = {
        "status": "complete", "method": "mops", "compression": "none", "quantization": "none", "dataset": "dolly",
        "seed": 0, "rounds": 2, "num_clients": 10, "clients_per_round": 3, "failures": 0, "data_is_sample": True,
    }  # fmt: skip
    assert {key: summary[key] for key in expected} == expected
    assert summary["backbone"] == complete.config["backbone"]
    assert summary["client_steps"] == 2 * 3 * 2  # rounds, clients, steps
    assert summary["trainable_parameters"] == 14 * 32 + (8 * 32 + 8) + (7 * 8 + 7)
    for key in ("perplexity", "perplexity_before", "perplexity_bare"):
        assert set(summary[key]) == {"all", *DOLLY_TASKS}
        assert all(value > 1 for value in summary[key].values())
    assert summary["perplexity"] != summary["perplexity_before"] != summary["perplexity_bare"]
    for key in ("train_seconds", "tokens_per_second", "peak_memory_bytes", "bytes_up", "bytes_down"):
        assert summary[key] > 0
    # 3 clients, 2 rounds, float32, names and headers beside; P1 goes down only.
    assert 4 * 775 * 6 < summary["bytes_up"] < 4 * 775 * 6 + 6 * 5 * 150
    assert 4 * (775 + 14 * 32) * 6 < summary["bytes_down"] < 4 * (775 + 14 * 32) * 6 + 6 * 6 * 150
    assert summary["experts"] == [[task] for task in DOLLY_TASKS]


def test_config_holds_every_value_and_what_it_ran_on(complete, run_config):
    changes = {"output-dir": str(complete.path), "evaluate-every": 1}
    assert complete.config == run_config(changes)
    assert {"flwr", "torch", "transformers", "numpy", "python"} <= set(complete.manifest["versions"])


def test_metrics_cover_every_round(complete):
    metrics = complete.metrics()
    assert [point.round for point in series(metrics, "perplexity")] == [0, 1, 2]
    assert [point.client_steps for point in series(metrics, "perplexity")] == [0, 6, 12]
    assert [point.round for point in series(metrics, "loss", split="train")] == [1, 2]
    assert [point.round for point in series(metrics, "perplexity-bare")] == [0]
    for task in DOLLY_TASKS:
        assert [point.round for point in series(metrics, "perplexity", task)] == [0, 1, 2]
        scores = [series(metrics, f"gate-expert-{expert}", task) for expert in range(7)]
        for number in range(3):
            assert sum(points[number].value for points in scores) == pytest.approx(1, abs=1e-5)
    assert series(metrics, "perplexity")[-1].value == complete.summary["perplexity"]["all"]
    # Each row that was trained on has a gate mass of one: 3 clients, 2 steps, batches of 1.
    for number in range(2):
        masses = [series(metrics, f"gate-mass-expert-{e}", split="train")[number].value for e in range(7)]
        assert sum(masses) == pytest.approx(6, abs=1e-4)


def test_adapter_can_be_loaded_and_is_what_the_last_checkpoint_holds(complete):
    saved = load_adapter(complete.path / "adapter")
    arrays, description = saved.arrays, saved.description
    assert {name: array.shape for name, array in arrays.items()} == {**PROMPTS, **GATE}
    assert all(array.dtype == np.float32 and np.isfinite(array).all() for array in arrays.values())
    assert (description.adapter.method, description.adapter.inject_layer) == ("mops", 2)
    assert (description.tasks, description.experts) == (DOLLY_TASKS, tuple((task,) for task in DOLLY_TASKS))
    assert description.backbone.backbone == complete.config["backbone"]
    assert (description.data.max_length, description.data.data_path) == (64, "")
    checkpoint = run_module.load_checkpoint(complete.path)
    for name, array in {**checkpoint.adapter, **checkpoint.frozen}.items():
        assert array.tobytes() == arrays[name].tobytes()
    assert checkpoint.progress.rounds_done == 2


def test_folder_holds_partition_checkpoints_and_report(complete):
    clients = complete.partition["clients"]
    assert [client["partition-id"] for client in clients] == list(range(10))
    assert sum(client["num-rows"] for client in clients) == 189
    assert len(list((complete.path / "checkpoints").iterdir())) == 2
    assert (complete.path / "report.html").stat().st_size > 0
    assert list(complete.path.glob("**/*.png"))
    json.loads((complete.path / "summary.json").read_text(encoding="utf-8"))


@pytest.mark.usefixtures("quick_report")
def test_same_seed_gives_the_same_bits_and_another_seed_does_not(complete, run_config, tmp_path):
    again, other = run(run_config, tmp_path / "again"), run(run_config, tmp_path / "other", seed=1)
    assert adapter_bits(again) == adapter_bits(complete)
    assert again.summary["perplexity"] == complete.summary["perplexity"]
    assert all(other_bits != adapter_bits(complete)[name] for name, other_bits in adapter_bits(other).items())


@pytest.mark.usefixtures("quick_report")
def test_fedprompt_trains_prompts_and_no_gate(complete, run_config, tmp_path):
    folder = run(run_config, tmp_path / "run", method="fedprompt")
    saved = load_adapter(folder.path / "adapter")
    assert {name: array.shape for name, array in saved.arrays.items()} == PROMPTS
    assert saved.description.adapter.method == folder.summary["method"] == "fedprompt"
    assert folder.summary["trainable_parameters"] == 14 * 32
    assert not any(entry["metric"].startswith("gate") for entry in folder.metrics())
    # Both methods get the same input prompts and the same bare model.
    assert adapter_bits(folder)["input-prompts"] == adapter_bits(complete)["input-prompts"]
    assert folder.summary["perplexity_bare"] == complete.summary["perplexity_bare"]


@pytest.mark.usefixtures("quick_report")
def test_failing_client_is_left_out_counted_and_shown_once(run_config, tmp_path, monkeypatch, capsys):
    connect = client_app.connect

    def failing(*arguments):
        trainer = connect(*arguments)

        def train(partition_id, request):
            if partition_id == min(request.cohort.members):
                raise OSError("disk on fire")
            return trainer.train(partition_id, request)

        return SimpleNamespace(train=train, describe=trainer.describe)

    monkeypatch.setattr(client_app, "connect", failing)
    folder = run(run_config, tmp_path / "run", cohort_size=3)
    assert (folder.summary["status"], folder.summary["failures"]) == ("complete", 2)
    assert folder.summary["client_steps"] == 2 * 2 * 2
    assert [point.value for point in series(folder.metrics(), "failures", split="train")] == [1, 1]
    shown = capsys.readouterr().out
    assert shown.count("OSError: disk on fire") == 1
    assert shown.count("as above") == 1


@pytest.mark.usefixtures("quick_report")
def test_server_beside_the_clients_trains_as_one_more(run_config, tmp_path, complete):
    folder = run(run_config, tmp_path / "run", server_weight=1.0, evaluate_every=1)
    assert folder.summary["client_steps"] == complete.summary["client_steps"] * 4 // 3  # three clients and the server
    assert folder.summary["bytes_up"] == complete.summary["bytes_up"]
    assert adapter_bits(folder) != adapter_bits(complete)


def test_run_without_a_gate_keeps_what_its_rows_are_routed_by(run_config, tmp_path, quick_report):
    routed = run(run_config, tmp_path / "nearest", routing="nearest", weighting="gate-mass", num_server_rounds=1)
    saved = load_adapter(routed.path / "adapter")
    assert saved.description.adapter.routing == "nearest"
    shapes = {name: array.shape for name, array in saved.arrays.items()}
    assert shapes == {**PROMPTS, "neighbour-keys": (35, 32), "neighbour-experts": (35, 7)}
    metrics = routed.metrics()
    mass = [entry["value"] for entry in metrics if entry["metric"].startswith("gate-mass-expert-")]
    assert len(mass) == 7
    assert sum(mass) == 3 * 2  # clients, steps: each row has one expert
    assert all(f"drift-expert-{expert}" in {entry["metric"] for entry in metrics} for expert in range(7))
    assert "gate-accuracy" not in {entry["metric"] for entry in metrics}
    assert routed.summary["experts"] == [[task] for task in DOLLY_TASKS]


@pytest.mark.parametrize(
    ("changes", "experts"),
    [
        ({"num_experts": 9}, [[task] for task in (*DOLLY_TASKS, *DOLLY_TASKS[:2])]),
        ({"num_experts": 5}, [[*DOLLY_TASKS[0::5]], [*DOLLY_TASKS[1::5]], *([task] for task in DOLLY_TASKS[2:5])]),
        ({"server_rows": 0}, None),
    ],
)
@pytest.mark.usefixtures("quick_report")
def test_experts_are_named_by_what_they_were_pretrained_for(run_config, tmp_path, changes, experts):
    assert run(run_config, tmp_path / "run", num_server_rounds=1, **changes).summary.get("experts") == experts
