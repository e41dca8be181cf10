"""Which folders a sweep takes for its own runs, and what state it finds them in."""

import pytest
import tomli_w

from experiments.run_folder import RunFolder
from experiments.sweep import read_sweep
from mops_fl.config import DataConfig, read_section
from mops_fl.data import load_task_data
from mops_fl.errors import InputError
from mops_fl.sources import sample_path


@pytest.fixture
def plan(tmp_path, run_config):
    """``plan(data=..., **values)``: the one run of a tiny sweep."""

    def call(data=None, **values):
        config = {key: value for key, value in run_config().items() if key not in ("seed", "output-dir")}
        content = {"title": "Tiny", "folder": "tiny", "app": "experiments.dolly", "seeds": [0], "rows": {"row": {}}}
        content |= {"values": {**config, **{key.replace("_", "-"): value for key, value in values.items()}}}
        (tmp_path / "sweep.toml").write_text(tomli_w.dumps({**content, "methods": {"MoPs": {}}}), encoding="utf-8")
        return read_sweep(tmp_path / "sweep.toml", tmp_path / "out", data).runs[0]

    return call


def made(planned, summary=None, **changes):
    """The folder that the run would have left; a change to None takes the key away."""
    config = {**planned.values, **{key.replace("_", "-"): value for key, value in changes.items()}}
    run = RunFolder.create(planned.folder, {key: value for key, value in config.items() if value is not None})
    if summary is not None:
        run.write_summary({"status": "complete", **summary})
    return run


def test_key_that_an_older_folder_lacks_counts_as_the_apps_default(plan):
    made(plan(), {}, gate_temperature=None)
    assert plan().find() is not None
    with pytest.raises(InputError, match=r"made with gate-temperature = 1.0, the sweep says 4.0"):
        plan(gate_temperature=4.0).find()


@pytest.mark.parametrize("key", ["backbone", "gate-embedding"])
def test_local_model_is_the_same_by_a_relative_path(plan, tiny_model_folder, monkeypatch, key):
    monkeypatch.chdir(tiny_model_folder.parent)
    planned = plan(**{key: tiny_model_folder.name})
    made(planned, {}, **{key: str(tiny_model_folder)})
    assert planned.find() is not None


def test_run_on_other_data_than_those_named_is_refused(plan, tmp_path):
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    made(plan(), {}, data_path=str(paths[0]))
    assert plan().find() is not None  # no data are named
    assert plan(paths[0]).find() is not None
    with pytest.raises(InputError, match=r"made on other rows .*a\.jsonl.* than those of .*b\.jsonl"):
        plan(paths[1]).find()


def test_published_folder_that_keeps_only_the_name_of_the_data_is_accepted(plan, tmp_path):
    made(plan(), {}, data_path="a.jsonl")
    assert plan(tmp_path / "a.jsonl").find() is not None
    with pytest.raises(InputError, match="other rows"):
        plan(tmp_path / "ba.jsonl").find()


def test_same_rows_in_another_place_are_known_by_their_hash(plan, tmp_path):
    lines = sample_path().read_text(encoding="utf-8").splitlines(keepends=True)
    for name, order in (("same", 1), ("other", -1)):
        (tmp_path / f"{name}.jsonl").write_text("".join(lines[::order]), encoding="utf-8")
    planned = plan(tmp_path / "same.jsonl")
    made(plan(), {"data_sha256": sample_hash(planned)}, data_path=str(sample_path()))
    assert planned.find() is not None
    with pytest.raises(InputError, match="other rows"):
        plan(tmp_path / "other.jsonl").find()


def sample_hash(planned):
    return load_task_data(read_section(DataConfig, {**planned.values, "data-path": ""})).sha256


def test_run_that_another_process_has_begun_is_not_broken(plan):
    run = made(plan())
    with run.claim():
        assert plan().status() == "running elsewhere"
        with pytest.raises(InputError, match="being written by another process"):
            plan().set_aside()
    assert plan().status() == "broken"
    plan().set_aside()
    assert plan().status() == "waiting"
    assert len(list(run.path.parent.glob("row-mops-seed0.broken-*"))) == 1
