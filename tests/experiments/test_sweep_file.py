"""What a sweep file says, and what is wrong with one."""

from pathlib import Path

import pytest
import tomli_w

import experiments
from experiments.cli import main
from experiments.sweep import read_sweep
from mops_fl.errors import InputError

pytestmark = pytest.mark.usefixtures("command_in_process")

TABLES = sorted((Path(experiments.__file__).parent / "tables").rglob("*.toml"))


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
def test_bad_sweep_is_refused_in_one_sentence_before_anything_runs(sweep, sweep_content, capsys, change, complaint):
    changed = {key: value for key, value in {**sweep_content, **change}.items() if value is not None}
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


def test_run_folders_are_below_runs_where_the_file_says(sweep_content, tmp_path):
    (tmp_path / "sweep.toml").write_text(tomli_w.dumps(sweep_content), encoding="utf-8")
    found = read_sweep(tmp_path / "sweep.toml", None)
    assert found.runs[0].folder == Path("runs/tiny/two-experts-fedprompt-seed0").absolute()


def test_output_may_have_any_signs_in_its_name(sweep_content, tmp_path):
    sweep_content = {**sweep_content, "rows": {"7 experts": {}}, "seeds": [0]}
    (tmp_path / "sweep.toml").write_text(tomli_w.dumps(sweep_content), encoding="utf-8")
    output = tmp_path / "a \"b\" 'c' = \U0001d53d"
    assert main(["sweep", str(tmp_path / "sweep.toml"), "--output", str(output), "--only", "*fedprompt*"]) == 0
    assert (output / "7-experts-fedprompt-seed0" / "summary.json").is_file()


def test_tilde_in_the_output_is_the_home_folder(sweep_content, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "sweep.toml").write_text(tomli_w.dumps(sweep_content), encoding="utf-8")
    assert read_sweep(tmp_path / "sweep.toml", Path("~/out")).runs[0].folder.parent == tmp_path / "out"
