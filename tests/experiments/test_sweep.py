"""`mops-fl sweep`: what it runs, leaves, skips and goes on with, and the table that comes out."""

import json
import signal

import pytest
import tomli_w

from experiments import run as run_module
from experiments import sweep_command
from experiments.cli import main
from experiments.run_folder import RunFolder
from experiments.sweep import read_sweep
from experiments.wording import NOTHING, percent_text, perplexity_text
from mops_fl.sources import sample_path

pytestmark = pytest.mark.usefixtures("command_in_process")


def summaries(tmp_path):
    return {path.parent.name: json.loads(path.read_text()) for path in (tmp_path / "out").glob("*/summary.json")}


def test_every_row_method_and_seed_is_run_once_and_put_into_a_table(
    sweep, sweep_content, tmp_path, capsys, monkeypatch
):
    assert sweep(sweep_content) == 0
    found = summaries(tmp_path)
    assert set(found) == {
        f"{row}-{method}-seed{seed}"
        for row in ("two-experts", "7-experts")
        for method in ("fedprompt", "mops-central")
        for seed in (0, 1)
    }
    assert {summary["status"] for summary in found.values()} == {"complete"}
    assert {name: summary["training"] == "central" for name, summary in found.items()} == {
        name: "central" in name for name in found
    }
    printed = capsys.readouterr().out
    assert "two-experts-fedprompt-seed0: running" in printed
    table = (tmp_path / "out" / "sweep.md").read_text()
    assert table in printed
    values = [found[f"7-experts-fedprompt-seed{seed}"]["perplexity"]["all"] for seed in (0, 1)]
    (row,) = [line for line in table.splitlines() if line.startswith("| 7 experts | ") and "(11.99)" in line]
    assert f"| {perplexity_text(sum(values) / 2)} ± " in row

    # Again: nothing is left to do.
    monkeypatch.setattr(sweep_command, "run_app", lambda *_, **__: pytest.fail("run again"))
    assert sweep(sweep_content) == 0


def test_only_the_chosen_runs_are_run(sweep, sweep_content, tmp_path):
    assert sweep(sweep_content, "--only", "7-*-fedprompt-seed1") == 0
    assert set(summaries(tmp_path)) == {"7-experts-fedprompt-seed1"}
    assert sweep(sweep_content, "--only", "8-*") == 2


def test_gain_is_over_the_seeds_that_both_methods_have(sweep, sweep_content, tmp_path):
    sweep_content["rows"] = {"7 experts": {}}
    assert sweep(sweep_content, "--only", "*-fedprompt-*") == 0
    assert sweep(sweep_content, "--only", "*-mops-*-seed1") == 0
    found = {name: summary["perplexity"]["all"] for name, summary in summaries(tmp_path).items()}
    first, other = found["7-experts-fedprompt-seed1"], found["7-experts-mops-central-seed1"]
    assert found["7-experts-fedprompt-seed0"] != first
    assert f"| {percent_text(100 * (first - other) / first)} |" in (tmp_path / "out" / "sweep.md").read_text()


def test_output_that_cannot_be_written_is_one_sentence(sweep, sweep_content, tmp_path, capsys):
    (tmp_path / "out").write_text("")
    assert sweep(sweep_content, "--only", "7-*-fedprompt-seed1") == 2
    error = capsys.readouterr().err
    assert "choose another --output" in error
    assert error.count("\n") == 1


def test_report_of_a_sweep_runs_nothing(sweep, sweep_content, tmp_path, monkeypatch, capsys):
    assert sweep(sweep_content, "--only", "7-*-fedprompt-seed1") == 0
    monkeypatch.setattr(sweep_command, "run_app", lambda *_, **__: pytest.fail("run"))
    capsys.readouterr()
    assert main(["report", str(tmp_path / "sweep.toml"), "--output", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "sweep.png").stat().st_size > 10_000
    assert f"| two experts | {' | '.join([NOTHING] * 4)} |" in capsys.readouterr().out


def test_run_that_fails_is_left_and_the_others_go_on(sweep, sweep_content, tmp_path):
    sweep_content["rows"]["7 experts"]["num-clients"] = 400  # more than there are rows: some are empty
    sweep_content["rows"]["7 experts"]["clients-per-round"] = 399
    sweep_content["seeds"] = [0]
    assert sweep(sweep_content) == 1
    found = summaries(tmp_path)
    assert found["two-experts-fedprompt-seed0"]["status"] == "complete"
    assert "7-experts-fedprompt-seed0" not in found
    log = (tmp_path / "out" / "7-experts-fedprompt-seed0.log").read_text()
    assert "clients have rows" in log


def test_interrupted_run_is_gone_on_with_and_a_broken_one_is_kept_aside(sweep, sweep_content, tmp_path, monkeypatch):
    only = ("--only", "7-*-seed0")
    after_round, calls = run_module.Run._after_round, []

    def stop(self, *arguments):
        after_round(self, *arguments)
        calls.append(self.training)
        raise KeyboardInterrupt(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(run_module.Run, "_after_round", stop)
        assert sweep(sweep_content, *only) == 128 + signal.SIGTERM
        assert sweep(sweep_content, "--only", "7-*-central-seed0") == 128 + signal.SIGTERM
    assert calls == ["federated", "central"]
    for checkpoint in (tmp_path / "out" / "7-experts-mops-central-seed0" / "checkpoints").iterdir():
        checkpoint.unlink()
    assert sweep(sweep_content, *only) == 0
    found = summaries(tmp_path)
    assert found["7-experts-fedprompt-seed0"]["status"] == "complete"
    assert found["7-experts-mops-central-seed0"]["status"] == "complete"
    (aside,) = [name for name in found if ".broken-" in name]
    assert aside.startswith("7-experts-mops-central-seed0.broken-")
    assert found[aside]["status"] == "interrupted"
    metrics = RunFolder.open(tmp_path / "out" / "7-experts-fedprompt-seed0").metrics()
    assert sum(entry["metric"] == "loss" and entry["round"] == 1 for entry in metrics) == 1  # not from the start again


def test_folder_of_another_run_is_never_taken_for_this_one(sweep, sweep_content, tmp_path, capsys):
    assert sweep(sweep_content, "--only", "7-*-fedprompt-seed1") == 0
    sweep_content["methods"]["FedPrompt"]["lr"] = 0.02
    assert sweep(sweep_content) == 2
    assert "made with lr = 0.01, the sweep says 0.02" in capsys.readouterr().err


def test_run_that_goes_on_elsewhere_is_skipped_and_shown_so(sweep, sweep_content, tmp_path, monkeypatch, capsys):
    def begun_elsewhere(program, args, backend, *, training):
        claims.append(RunFolder.create(later.folder, later.values).claim())
        return 1

    claims = []
    monkeypatch.setattr(sweep_command, "run_app", begun_elsewhere)
    sweep_content["rows"] = {"7 experts": {}}
    (tmp_path / "sweep.toml").write_text(tomli_w.dumps(sweep_content), encoding="utf-8")
    later = read_sweep(tmp_path / "sweep.toml", tmp_path / "out").runs[1]  # taken while the one before it is run
    assert sweep(sweep_content, "--only", "*-fedprompt-*") == 1
    claims.pop().close()
    printed = capsys.readouterr().out
    assert "7-experts-fedprompt-seed0: failed" in printed
    assert "7-experts-fedprompt-seed1: running elsewhere" in printed
    assert later.status() == "broken"  # still there


def test_sweep_with_a_run_that_diverged_goes_to_its_end(sweep, sweep_content, tmp_path, capsys):
    (tmp_path / "sweep.toml").write_text(tomli_w.dumps(sweep_content), encoding="utf-8")
    planned = read_sweep(tmp_path / "sweep.toml", tmp_path / "out").of("7 experts", "FedPrompt")[0]
    figures = {"perplexity": {"all": None}, "perplexity_bare": {"all": 12.5}, "client_steps": 12}
    RunFolder.create(planned.folder, planned.values).write_summary({"status": "complete", **figures})
    assert sweep(sweep_content, "--only", "7-*-fedprompt-seed0") == 0
    assert "| 7 experts | 12.50 | diverged (11.99) (1 of 2 seeds) |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [(RuntimeError("no space on the GPU"), 1, "failed, see"), (KeyboardInterrupt(), 130, "interrupted")],
)
def test_failure_while_pruning_is_the_runs_own(sweep, sweep_content, tmp_path, monkeypatch, capsys, error, code, said):
    def fail(values, say):
        raise error

    monkeypatch.setattr(sweep_command, "prune_if_missing", fail)
    assert sweep(sweep_content, "--only", "7-*-fedprompt-*") == code
    printed = capsys.readouterr().out
    assert f"7-experts-fedprompt-seed0: {said}" in printed
    assert ("7-experts-fedprompt-seed1: failed" in printed) == (code == 1)  # the others go on
    if code == 1:
        assert "no space on the GPU" in (tmp_path / "out" / "7-experts-fedprompt-seed0.log").read_text()


def test_missing_pruned_model_is_made_first(sweep, sweep_content, monkeypatch):
    asked = []
    monkeypatch.setattr(sweep_command, "prune_if_missing", lambda values, say: asked.append(values["compression"]))
    assert sweep(sweep_content, "--only", "7-*-fedprompt-seed1") == 0
    assert asked == ["none"]


def test_kind_of_training_that_changed_is_refused(sweep, sweep_content, capsys):
    only = ("--only", "7-*-central-seed0")
    assert sweep(sweep_content, *only) == 0
    del sweep_content["methods"]["MoPs, central"]["training"]
    assert sweep(sweep_content, *only) == 2
    assert "is a central run, the sweep says federated" in capsys.readouterr().err


def test_table_says_where_the_data_are_the_sample_or_differ(sweep, sweep_content, tmp_path, capsys, monkeypatch):
    sweep_content["seeds"], sweep_content["rows"] = [0], {"7 experts": {}}
    assert sweep(sweep_content, "--only", "7-experts-fedprompt-seed0") == 0
    assert "on the bundled sample" in capsys.readouterr().out
    lines = sample_path().read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(lines[::-1]), encoding="utf-8")
    assert sweep(sweep_content, "--data", str(tmp_path / "rows.jsonl")) == 2
    assert "was made on other rows" in capsys.readouterr().err
    monkeypatch.setenv("MOPS_DOLLY", str(tmp_path / "rows.jsonl"))
    assert sweep(sweep_content) == 0
    differing = "dataset (dolly, bundled sample / dolly); rows (data_sha256 "
    assert f"Not a fair comparison: the runs of 7 experts differ in: {differing}" in capsys.readouterr().out
