"""The hub is a stand-in with the file names and columns of the real one; nothing here touches a network."""

import argparse
import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest

from experiments import fetch_command
from mops_fl import fetch_super_ni, sources
from mops_fl.data import load_task_data
from mops_fl.errors import InputError
from mops_fl.task_files import PAPER_TASKS, Instance, read_task_file

ROWS = 20

pytestmark = pytest.mark.usefixtures("cache")


def line(task, number, target, **changes):
    fields = {"task_name": task, "id": f"{task}-{number}", "definition": f"Do {task}.", "inputs": f"in {number}"}
    return json.dumps({**fields, "targets": target, **changes}, ensure_ascii=False)


def lines_of(task):
    """Twenty instances, the first with a second reference on the next line, as the hub has them."""
    return [line(task, 0, "first"), line(task, 0, "second"), *[line(task, i, f"out {i}") for i in range(1, ROWS)]]


@pytest.fixture
def hub(monkeypatch):
    """A hub with the seven files and others; `files`, `hashes` and `downloads` can be looked at and changed."""
    files = {f"train/{task}_train.jsonl": "\n".join(lines_of(task)) for task in PAPER_TASKS[:6]}
    files[f"test/{PAPER_TASKS[6]}_test.jsonl"] = "\n".join(lines_of(PAPER_TASKS[6]))
    files |= {"README.md": "", "train/task1001_other_train.jsonl": "", f"{PAPER_TASKS[0]}_notes.jsonl": ""}
    hashes = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in files.items() if "/" in name}
    state = SimpleNamespace(files=files, hashes=hashes, downloads=[])

    def dataset_info(name, *, revision, files_metadata, timeout):
        assert (name, revision, files_metadata) == (sources.SUPER_NI_ID, sources.SUPER_NI_REVISION, True)
        assert timeout <= 10
        lfs = {file: SimpleNamespace(sha256=sha256) for file, sha256 in state.hashes.items()}
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=file, lfs=lfs.get(file)) for file in state.files])

    def hf_hub_download(name, file, *, repo_type, revision, local_dir, **_kwargs):
        assert (name, repo_type, revision) == (sources.SUPER_NI_ID, "dataset", sources.SUPER_NI_REVISION)
        state.downloads.append(file)
        path = Path(local_dir) / file
        path.parent.mkdir(exist_ok=True)
        path.write_text(state.files[file], encoding="utf-8")
        return str(path)

    monkeypatch.setattr(huggingface_hub, "dataset_info", dataset_info)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    return state


def leftovers(cache):
    return sorted(path.name for path in (cache / "data").glob("*"))


def test_seven_tasks_come_from_the_hub_once_as_task_files(hub, cache):
    folder = fetch_super_ni.fetch_super_ni()
    assert folder == cache / "data/super-ni" == sources.resolve_super_ni("").path
    assert sorted(path.stem for path in (folder / "tasks").iterdir()) == sorted(PAPER_TASKS)
    receipt = sources.read_receipt(folder / sources.RECEIPT)
    assert (receipt["source"], receipt["revision"]) == ("hub", sources.SUPER_NI_REVISION)
    assert len(hub.downloads) == 7
    assert leftovers(cache) == ["super-ni"]
    assert fetch_super_ni.fetch_super_ni() == folder
    assert len(hub.downloads) == 7, "the second call must not ask the hub"


@pytest.mark.usefixtures("hub")
def test_what_came_is_the_data_of_a_run(data_config):
    fetch_super_ni.fetch_super_ni()
    data = load_task_data(data_config(dataset="super-ni", num_rows=70, server_rows=14))
    assert data.tasks == PAPER_TASKS
    assert sources.SUPER_NI_ID in data.description
    assert sources.SUPER_NI_REVISION[:8] in data.description
    assert {row.instruction for row in data.train if row.task == PAPER_TASKS[3]} == {f"Do {PAPER_TASKS[3]}."}


def test_lines_of_one_instance_become_its_references(tmp_path):
    lines = [
        line("task1", 7, "red", inputs="Same words.\u2028Two lines."),  # str.splitlines would cut here
        line("task1", 8, "blue", inputs="Same words."),
        line("task1", 7, "rouge", inputs="Same words.\u2028Two lines."),
        line("task1", 9, "green", inputs="Same words."),
    ]
    (tmp_path / "lines.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    content = fetch_super_ni.task_from_lines(tmp_path / "lines.jsonl")
    (tmp_path / "task1.json").write_text(json.dumps(content))
    task = read_task_file(tmp_path / "task1.json")
    assert task.definition == "Do task1."
    assert task.instances == (
        Instance("Same words.\u2028Two lines.", ("red", "rouge")),
        Instance("Same words.", ("blue",)),
        Instance("Same words.", ("green",)),
    )


@pytest.mark.parametrize("bad", ["{", "[]", json.dumps({"id": "a", "inputs": "b", "definition": "c"}), ""])
def test_line_that_is_not_as_the_hubs_are_is_refused_and_nothing_stays(bad, hub, cache):
    file = f"train/{PAPER_TASKS[1]}_train.jsonl"
    hub.files[file] = "\n".join([*lines_of(PAPER_TASKS[1])[:4], bad, "{}"])
    hub.hashes = {}
    with pytest.raises(InputError, match=rf"Line 5 of {PAPER_TASKS[1]}_train\.jsonl .* lacks id, definition"):
        fetch_super_ni.fetch_super_ni()
    assert leftovers(cache) == []


def test_file_that_differs_from_the_hubs_hash_is_refused_and_nothing_stays(hub, cache):
    hub.files[f"train/{PAPER_TASKS[2]}_train.jsonl"] += "\n" + line(PAPER_TASKS[2], 99, "more")
    with pytest.raises(InputError, match="is corrupt or not the expected file"):
        fetch_super_ni.fetch_super_ni()
    assert leftovers(cache) == []


def test_task_that_the_hub_lacks_is_named_before_anything_is_downloaded(hub, cache):
    del hub.files[f"train/{PAPER_TASKS[2]}_train.jsonl"]
    with pytest.raises(InputError, match=f"has no file of {PAPER_TASKS[2]}: clone github.com/allenai"):
        fetch_super_ni.fetch_super_ni()
    assert hub.downloads == []
    assert leftovers(cache) == []


def test_without_a_hub_it_says_where_else_the_data_is(monkeypatch, cache):
    def no_hub(*_args, **_kwargs):
        raise OSError("Name or service not known\nmore lines")

    monkeypatch.setattr(huggingface_hub, "dataset_info", no_hub)
    with pytest.raises(InputError, match=r"could not be had from the hub \(Name or service not known\): clone github"):
        fetch_super_ni.fetch_super_ni()
    assert leftovers(cache) == []


def test_folder_that_was_left_half_is_refused(hub, cache):
    (cache / "data/super-ni").mkdir(parents=True)
    with pytest.raises(InputError, match="is incomplete: delete it"):
        fetch_super_ni.fetch_super_ni()
    assert hub.downloads == []


@pytest.mark.usefixtures("hub")
def test_the_command_fetches_it_only_if_asked_and_says_whence_it_came(tmp_path, capsys):
    def run(*words):
        parser = argparse.ArgumentParser()
        fetch_command.add_options(parser)
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model/config.json").write_text("{}")
        args = parser.parse_args(["--backbone", str(tmp_path / "model"), "--no-data", *words])
        assert fetch_command.run(args) == 0
        return capsys.readouterr().out.splitlines()[3:]

    assert run() == []
    expected = [f"  from hub {sources.SUPER_NI_REVISION[:12]}, licence: {sources.SUPER_NI_LICENCE}"]
    expected.append(f"  {sources.cached_super_ni_path()}")
    assert run("--super-ni") == [f"{sources.SUPER_NI_ID}: fetched", *expected]
    assert run("--super-ni") == [f"{sources.SUPER_NI_ID}: already there", *expected]
