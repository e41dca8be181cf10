import io
import json
import signal
from pathlib import Path

import pytest
import tomli_w
from rich.console import Console

import experiments
from experiments import run as run_module
from experiments import sweep_command
from experiments.cli import main
from experiments.run_folder import RunFolder
from experiments.sweep import read_sweep
from experiments.wording import NOTHING, percent_text, perplexity_text
from mops_fl.errors import InputError
from mops_fl.sources import sample_path

TABLES = sorted((Path(experiments.__file__).parent / "tables").rglob("*.toml"))


pytestmark = pytest.mark.usefixtures("command_in_process")


@pytest.fixture
def content(run_config):
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
def sweep(tmp_path):
    """``sweep(content, "--only", ...)``: exit code of `mops-fl sweep` on it, into ``tmp_path / "out"``."""

    def call(content, *options):
        (tmp_path / "sweep.toml").write_text(tomli_w.dumps(content), encoding="utf-8")
        return main(["sweep", str(tmp_path / "sweep.toml"), "--output", str(tmp_path / "out"), *options])

    return call


def summaries(tmp_path):
    return {path.parent.name: json.loads(path.read_text()) for path in (tmp_path / "out").glob("*/summary.json")}


def test_every_row_method_and_seed_is_run_once_and_put_into_a_table(sweep, content, tmp_path, capsys, monkeypatch):
    assert sweep(content) == 0
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
    assert sweep(content) == 0


def test_only_the_chosen_runs_are_run(sweep, content, tmp_path):
    assert sweep(content, "--only", "7-*-fedprompt-seed1") == 0
    assert set(summaries(tmp_path)) == {"7-experts-fedprompt-seed1"}
    assert sweep(content, "--only", "8-*") == 2


def test_gain_is_over_the_seeds_that_both_methods_have(sweep, content, tmp_path):
    content["rows"] = {"7 experts": {}}
    assert sweep(content, "--only", "*-fedprompt-*") == 0
    assert sweep(content, "--only", "*-mops-*-seed1") == 0
    found = {name: summary["perplexity"]["all"] for name, summary in summaries(tmp_path).items()}
    first, other = found["7-experts-fedprompt-seed1"], found["7-experts-mops-central-seed1"]
    assert found["7-experts-fedprompt-seed0"] != first
    assert f"| {percent_text(100 * (first - other) / first)} |" in (tmp_path / "out" / "sweep.md").read_text()


def test_output_that_cannot_be_written_is_one_sentence(sweep, content, tmp_path, capsys):
    (tmp_path / "out").write_text("")
    assert sweep(content, "--only", "7-*-fedprompt-seed1") == 2
    error = capsys.readouterr().err
    assert "choose another --output" in error
    assert error.count("\n") == 1


def test_report_of_a_sweep_runs_nothing(sweep, content, tmp_path, monkeypatch, capsys):
    assert sweep(content, "--only", "7-*-fedprompt-seed1") == 0
    monkeypatch.setattr(sweep_command, "run_app", lambda *_, **__: pytest.fail("run"))
    capsys.readouterr()
    assert main(["report", str(tmp_path / "sweep.toml"), "--output", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "sweep.png").stat().st_size > 10_000
    assert f"| two experts | {' | '.join([NOTHING] * 4)} |" in capsys.readouterr().out


def test_run_that_fails_is_left_and_the_others_go_on(sweep, content, tmp_path):
    content["rows"]["7 experts"]["num-clients"] = 400  # more than there are rows: some are empty
    content["rows"]["7 experts"]["clients-per-round"] = 399
    content["seeds"] = [0]
    assert sweep(content) == 1
    found = summaries(tmp_path)
    assert found["two-experts-fedprompt-seed0"]["status"] == "complete"
    assert "7-experts-fedprompt-seed0" not in found
    log = (tmp_path / "out" / "7-experts-fedprompt-seed0.log").read_text()
    assert "clients have rows" in log


def test_interrupted_run_is_gone_on_with_and_a_broken_one_is_kept_aside(sweep, content, tmp_path, monkeypatch):
    only = ("--only", "7-*-seed0")
    after_round, calls = run_module.Run._after_round, []

    def stop(self, *arguments):
        after_round(self, *arguments)
        calls.append(self.training)
        raise KeyboardInterrupt(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(run_module.Run, "_after_round", stop)
        assert sweep(content, *only) == 128 + signal.SIGTERM
        assert sweep(content, "--only", "7-*-central-seed0") == 128 + signal.SIGTERM
    assert calls == ["federated", "central"]
    for checkpoint in (tmp_path / "out" / "7-experts-mops-central-seed0" / "checkpoints").iterdir():
        checkpoint.unlink()
    assert sweep(content, *only) == 0
    found = summaries(tmp_path)
    assert found["7-experts-fedprompt-seed0"]["status"] == "complete"
    assert found["7-experts-mops-central-seed0"]["status"] == "complete"
    (aside,) = [name for name in found if ".broken-" in name]
    assert aside.startswith("7-experts-mops-central-seed0.broken-")
    assert found[aside]["status"] == "interrupted"
    metrics = RunFolder.open(tmp_path / "out" / "7-experts-fedprompt-seed0").metrics()
    assert sum(entry["metric"] == "loss" and entry["round"] == 1 for entry in metrics) == 1  # not from the start again


def test_folder_of_another_run_is_never_taken_for_this_one(sweep, content, tmp_path, capsys):
    assert sweep(content, "--only", "7-*-fedprompt-seed1") == 0
    content["methods"]["FedPrompt"]["lr"] = 0.02
    assert sweep(content) == 2
    assert "made with lr = 0.01, the sweep says 0.02" in capsys.readouterr().err


def test_run_that_goes_on_elsewhere_is_skipped_and_shown_so(sweep, content, tmp_path, monkeypatch, capsys):
    def begun_elsewhere(program, args, backend, *, training):
        claims.append(RunFolder.create(later.folder, later.values).claim())
        return 1

    claims = []
    monkeypatch.setattr(sweep_command, "run_app", begun_elsewhere)
    content["rows"] = {"7 experts": {}}
    (tmp_path / "sweep.toml").write_text(tomli_w.dumps(content), encoding="utf-8")
    later = read_sweep(tmp_path / "sweep.toml", tmp_path / "out").runs[1]  # taken while the one before it is run
    assert sweep(content, "--only", "*-fedprompt-*") == 1
    claims.pop().close()
    printed = capsys.readouterr().out
    assert "7-experts-fedprompt-seed0: failed" in printed
    assert "7-experts-fedprompt-seed1: running elsewhere" in printed
    assert later.status() == "broken"  # still there


def test_sweep_with_a_run_that_diverged_goes_to_its_end(sweep, content, tmp_path, capsys):
    (tmp_path / "sweep.toml").write_text(tomli_w.dumps(content), encoding="utf-8")
    planned = read_sweep(tmp_path / "sweep.toml", tmp_path / "out").of("7 experts", "FedPrompt")[0]
    figures = {"perplexity": {"all": None}, "perplexity_bare": {"all": 12.5}, "client_steps": 12}
    RunFolder.create(planned.folder, planned.values).write_summary({"status": "complete", **figures})
    assert sweep(content, "--only", "7-*-fedprompt-seed0") == 0
    assert "| 7 experts | 12.50 | diverged (11.99) (1 of 2 seeds) |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [(RuntimeError("no space on the GPU"), 1, "failed, see"), (KeyboardInterrupt(), 130, "interrupted")],
)
def test_failure_while_pruning_is_the_runs_own(sweep, content, tmp_path, monkeypatch, capsys, error, code, said):
    def fail(values, say):
        raise error

    monkeypatch.setattr(sweep_command, "prune_if_missing", fail)
    assert sweep(content, "--only", "7-*-fedprompt-*") == code
    printed = capsys.readouterr().out
    assert f"7-experts-fedprompt-seed0: {said}" in printed
    assert ("7-experts-fedprompt-seed1: failed" in printed) == (code == 1)  # the others go on
    if code == 1:
        assert "no space on the GPU" in (tmp_path / "out" / "7-experts-fedprompt-seed0.log").read_text()


def test_missing_pruned_model_is_made_first(sweep, content, monkeypatch):
    asked = []
    monkeypatch.setattr(sweep_command, "prune_if_missing", lambda values, say: asked.append(values["compression"]))
    assert sweep(content, "--only", "7-*-fedprompt-seed1") == 0
    assert asked == ["none"]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"title": None}, "has no 'title'"),
        ({"colour": "red"}, "has `colour`, which a sweep does not know"),
        ({"app": "experiments.nothing"}, "no app 'experiments.nothing'"),
        ({"values": {"rate": 1}}, "run-config key `rate`"),
        ({"rows": {"a": {"lr": -1.0}}}, "`lr` is -1.0"),
        ({"methods": {"a": {"training": "remote"}}}, "`training` = 'remote'"),
        ({"rows": {"a b": {}, "a-b": {}}}, "of the same name but for signs"),
        ({"paper": {"no row": {"FedPrompt": 1.0}}}, "figures of the paper's for 'no row'"),
        ({"seeds": 3}, "`seeds` = 3; it must be a list of whole numbers"),
        ({"seeds": []}, "`seeds` = []; it must be a list of whole numbers"),
        ({"rows": ["a"]}, "`rows` = ['a']; it must be a table of at least one row"),
        ({"rows": {"a": 3}}, "`rows` = {'a': 3}; it must be a table of at least one row"),
        ({"methods": {}}, "`methods` = {}; it must be a table of at least one method"),
        ({"paper": {"7 experts": 3.0}}, "`paper` = {'7 experts': 3.0}; it must be a table of rows"),
        ({"app": 3}, "`app` = 3; it must be the name of an app"),
        ({"values": 3}, "`values` = 3; it must be a table"),
    ],
)
def test_bad_sweep_is_refused_in_one_sentence_before_anything_runs(sweep, content, capsys, change, complaint):
    changed = {key: value for key, value in {**content, **change}.items() if value is not None}
    if "rows" in change or "methods" in change:
        changed.pop("paper", None)
        changed["methods"] = change.get("methods", {"FedPrompt": {"method": "fedprompt"}})
    assert sweep(changed) == 2
    errors = capsys.readouterr().err
    assert complaint in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_tables_that_come_with_the_package_are_valid(path, tmp_path):
    sweep = read_sweep(path, tmp_path)
    assert len(sweep.runs) == len(sweep.rows) * len(sweep.methods) * len({run.seed for run in sweep.runs})


def test_table_at_the_papers_size_has_its_number_of_client_steps(tmp_path):
    (path,) = [path for path in TABLES if path.stem == "paper_dolly_federated"]
    for run in read_sweep(path, tmp_path).runs:
        values = run.values
        assert values["clients-per-round"] * values["local-steps"] * values["num-server-rounds"] == 50_000
        assert (values["num-clients"], values["lr"], values["batch-size"]) == (100, 0.001, 1)


def test_unreadable_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_sweep(tmp_path / "nothing.toml", tmp_path)


def test_run_folders_are_below_runs_where_the_file_says(content, tmp_path):
    (tmp_path / "sweep.toml").write_text(tomli_w.dumps(content), encoding="utf-8")
    found = read_sweep(tmp_path / "sweep.toml", None)
    assert found.runs[0].folder == Path("runs/tiny/two-experts-fedprompt-seed0").absolute()


def test_output_may_have_any_signs_in_its_name(content, tmp_path):
    content = {**content, "rows": {"7 experts": {}}, "seeds": [0]}
    (tmp_path / "sweep.toml").write_text(tomli_w.dumps(content), encoding="utf-8")
    output = tmp_path / "a \"b\" 'c' = \U0001d53d"
    assert main(["sweep", str(tmp_path / "sweep.toml"), "--output", str(output), "--only", "*fedprompt*"]) == 0
    assert (output / "7-experts-fedprompt-seed0" / "summary.json").is_file()


def test_tilde_in_the_output_is_the_home_folder(content, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "sweep.toml").write_text(tomli_w.dumps(content), encoding="utf-8")
    assert read_sweep(tmp_path / "sweep.toml", Path("~/out")).runs[0].folder.parent == tmp_path / "out"


def test_kind_of_training_that_changed_is_refused(sweep, content, capsys):
    only = ("--only", "7-*-central-seed0")
    assert sweep(content, *only) == 0
    del content["methods"]["MoPs, central"]["training"]
    assert sweep(content, *only) == 2
    assert "is a central run, the sweep says federated" in capsys.readouterr().err


def test_table_says_where_the_data_are_the_sample_or_differ(sweep, content, tmp_path, capsys, monkeypatch):
    content["seeds"], content["rows"] = [0], {"7 experts": {}}
    assert sweep(content, "--only", "7-experts-fedprompt-seed0") == 0
    assert "on the bundled sample" in capsys.readouterr().out
    lines = sample_path().read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(lines[::-1]), encoding="utf-8")
    assert sweep(content, "--data", str(tmp_path / "rows.jsonl")) == 2
    assert "was made on other rows" in capsys.readouterr().err
    monkeypatch.setenv("MOPS_DOLLY", str(tmp_path / "rows.jsonl"))
    assert sweep(content) == 0
    differing = "dataset (dolly, bundled sample / dolly); rows (data_sha256 "
    assert f"Not a fair comparison: the runs of 7 experts differ in: {differing}" in capsys.readouterr().out


def test_name_of_a_row_is_no_markup(content, tmp_path):
    content["rows"] = {"x[/b]": {}}
    del content["paper"]
    (tmp_path / "sweep.toml").write_text(tomli_w.dumps(content), encoding="utf-8")
    runs = read_sweep(tmp_path / "sweep.toml", tmp_path / "out").runs
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with sweep_command._shown(console, runs, {one.folder: "waiting" for one in runs}):
        pass
    assert "x[/b]" in console.file.getvalue()


def test_table_longer_than_the_terminal_shows_what_runs_what_ended_last_and_how_many(content, tmp_path):
    del content["paper"]
    content["rows"] = {f"row {number}": {} for number in range(24)}
    (tmp_path / "sweep.toml").write_text(tomli_w.dumps(content), encoding="utf-8")
    runs = read_sweep(tmp_path / "sweep.toml", tmp_path / "out").runs
    assert len(runs) == 96
    console = Console(file=io.StringIO(), force_terminal=True, width=100, height=24)

    def shown():
        return ["".join(segment.text for segment in line) for line in console.render_lines(say)]

    with sweep_command._shown(console, runs, {one.folder: "waiting" for one in runs}) as say:
        for one in runs[:60]:
            say(one, f"failed, see {tmp_path / ('a' * 60)}.log")
        say(runs[60], "running")
        lines = shown()
        assert len(lines) <= 24
        assert "96 runs: 60 failed, 1 running, 35 waiting" in lines[-1]
        assert [line.split()[2] for line in lines[3:-2]] == [
            one.row.split()[1] for one in runs[61 - len(lines[3:-2]) : 61]
        ]
        assert "running" in lines[-3]
    assert len(shown()) >= 100
