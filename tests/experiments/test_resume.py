"""A run that stopped goes on and ends, bit for bit, where an uninterrupted one does."""

import json
import os
import signal

import pytest
import tomli_w
import torch

from clients import resident
from clients import trainer as trainer_module
from experiments import simulation
from experiments.app_folder import AppFolder
from experiments.run_folder import RunFolder
from experiments.runtimes import run_inline
from mops_fl.adapter_folder import load_adapter
from mops_fl.errors import InputError
from mops_fl.sources import sample_path
from strategies.fedprompt import FedPrompt

pytestmark = pytest.mark.usefixtures("command_in_process")


@pytest.fixture
def run(run_config, tmp_path):
    """``run("name", key=value)``: a tiny run into ``tmp_path / "name"``, in a fresh trainer as in a new process."""

    def call(name, **changes):
        resident._build_trainer.cache_clear()
        values = run_config({"output-dir": str(tmp_path / name), "evaluate-every": 1})
        values |= {key.replace("_", "-"): value for key, value in changes.items()}
        run_inline(AppFolder.find("experiments.dolly"), values, catch_signals=lambda: None)
        return RunFolder.open(tmp_path / name)

    return call


def adapter_bits(folder):
    return {name: array.tobytes() for name, array in load_adapter(folder / "adapter").arrays.items()}


def measured(folder):
    return [
        (entry["round"], entry["client-steps"], entry["task"], entry["metric"], entry["value"])
        for entry in folder.metrics()
        if entry["metric"] not in ("tokens-per-second", "round-seconds")
    ]


@pytest.mark.parametrize("method", ["mops", "fedprompt"])
@pytest.mark.parametrize("seed", [0, 1])
def test_resumed_run_ends_where_an_uninterrupted_one_does(run, method, seed):
    straight = run("straight", method=method, seed=seed)
    first = run("run", method=method, seed=seed, num_server_rounds=1)
    before = first.summary
    assert adapter_bits(first.path) != adapter_bits(straight.path)

    resumed = run("run", method=method, seed=seed, num_server_rounds=2, resume=True)
    assert adapter_bits(resumed.path) == adapter_bits(straight.path)
    assert measured(resumed) == measured(straight)
    same = (
        "rounds",
        "client_steps",
        "perplexity",
        "perplexity_before",
        "perplexity_bare",
        "bytes_up",
        "bytes_down",
        "status",
    )
    assert {key: resumed.summary[key] for key in same} == {key: straight.summary[key] for key in same}
    assert resumed.summary["elapsed_seconds"] > before["elapsed_seconds"]
    assert {**resumed.config, "output-dir": ""} == {**straight.config, "output-dir": ""}


def test_interrupted_command_goes_on_with_resume(run, run_config, tmp_path, monkeypatch):
    straight = run("straight")
    values = run_config({"output-dir": str(tmp_path / "run"), "evaluate-every": 1})
    (tmp_path / "values.toml").write_text(tomli_w.dumps(values), encoding="utf-8")

    def command(*arguments):
        resident._build_trainer.cache_clear()
        every = ["--app", "experiments.dolly", "--backend", "inline", *arguments]
        return simulation.run(every)

    aggregate = FedPrompt.aggregate_train

    def interrupted(self, server_round, replies):
        if server_round == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return aggregate(self, server_round, replies)

    with monkeypatch.context() as patch:
        patch.setattr(FedPrompt, "aggregate_train", interrupted)
        assert command("--run-config", str(tmp_path / "values.toml")) == 130
    assert command("--resume", str(tmp_path / "run")) == 0
    assert json.loads((tmp_path / "run/summary.json").read_text(encoding="utf-8"))["status"] == "complete"
    assert adapter_bits(tmp_path / "run") == adapter_bits(straight.path)


def test_resume_passes_over_a_corrupt_newest_checkpoint(run, tmp_path):
    straight = run("straight")
    run("run")
    newest = tmp_path / "run/checkpoints/round-000002.safetensors"
    newest.write_bytes(newest.read_bytes()[:100])
    resumed = run("run", resume=True)
    assert adapter_bits(resumed.path) == adapter_bits(straight.path)


def test_resuming_a_run_that_has_ended_writes_its_adapter_again(run, tmp_path):
    whole = run("run")
    bits = adapter_bits(whole.path)
    config = whole.path / "adapter/adapter_config.json"
    config.write_text('{"format-version": 1}', encoding="utf-8")
    resumed = run("run", resume=True)
    assert adapter_bits(resumed.path) == bits
    assert measured(resumed) == measured(whole)


def test_run_that_is_to_end_earlier_is_measured_after_its_last_round(run):
    straight = run("straight", num_server_rounds=2, evaluate_every=3)
    longer = run("run", num_server_rounds=3, evaluate_every=3)
    (longer.path / "checkpoints/round-000003.safetensors").unlink()  # as if it was cut off in round 3
    shorter = run("run", num_server_rounds=2, evaluate_every=3, resume=True)
    assert shorter.summary["perplexity"] == straight.summary["perplexity"]
    assert measured(shorter) == measured(straight)
    assert adapter_bits(shorter.path) == adapter_bits(straight.path)


def test_run_that_has_more_rounds_than_it_is_to_have_is_not_gone_on_with(run):
    config = run("run").path / "config.toml"
    before = config.read_bytes()
    with pytest.raises(InputError, match="has 2 rounds done, more than `num-server-rounds`, which is 1; give 2 or mor"):
        run("run", num_server_rounds=1, resume=True)
    assert config.read_bytes() == before


def test_run_is_not_gone_on_with_on_other_values(run):
    run("run", num_server_rounds=1)
    with pytest.raises(InputError, match=r"was begun with lr = 0.01, not 0.02"):
        run("run", resume=True, lr=0.02)
    assert run("run", resume=True, num_server_rounds=2, round_timeout=99.0).summary["rounds"] == 2


def test_run_is_not_gone_on_with_where_auto_comes_to_another_dtype(run, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    run("run", num_server_rounds=1, dtype="auto")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    with pytest.raises(InputError, match="was begun in bfloat16, but `dtype` = 'auto' comes to float32 here; set it"):
        run("run", resume=True, dtype="auto")
    assert run("run", resume=True, dtype="bfloat16").summary["rounds"] == 2


def test_central_run_is_not_gone_on_with_as_a_federation_by_the_server_app(run):
    begun = run("run", num_server_rounds=1)
    begun.write_summary({**begun.summary, "training": "central"})
    with pytest.raises(InputError, match="is a central run; go on with it by `mops-fl train --resume`"):
        run("run", resume=True)


def test_run_is_not_gone_on_with_on_other_rows(run, tmp_path):
    lines = sample_path().read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(lines[::-1]), encoding="utf-8")
    before = run("run", num_server_rounds=1)
    figures = measured(before)
    with pytest.raises(InputError, match=r"was begun on other rows .*sample.* than there are now .*rows.jsonl"):
        run("run", resume=True, data_path=str(tmp_path / "rows.jsonl"))
    assert measured(RunFolder.open(before.path)) == figures


def test_run_is_not_gone_on_with_where_a_client_has_other_rows(run):
    begun = run("run", num_server_rounds=1)
    first, *others = begun.partition["clients"]
    per_task = {**first["per-task"], "open_qa": first["per-task"]["open_qa"] + 1}
    begun.write_json("partition.json", {**begun.partition, "clients": [*others, {**first, "per-task": per_task}]})
    with pytest.raises(InputError, match="was begun with other rows at its clients than they have now"):
        run("run", resume=True)
    begun.write_json("partition.json", {**begun.partition, "clients": [*others, first]})
    assert run("run", resume=True, num_server_rounds=2).summary["rounds"] == 2


def test_run_is_not_gone_on_with_on_other_weights(run, monkeypatch):
    run("run", num_server_rounds=1)
    monkeypatch.setattr(trainer_module, "backbone_sha256", lambda _: "others")
    with pytest.raises(InputError, match="was begun with other weights"):
        run("run", resume=True)
