"""Dolly comes from a hub, which is a stand-in here, once; and what `mops-fl fetch` says of it and of the model."""

import argparse
import hashlib
import json

import huggingface_hub
import pytest

from experiments import fetch_command
from mops_fl import fetch, sources
from mops_fl.errors import InputError

pytestmark = pytest.mark.usefixtures("no_network")


def _run_command(*words):
    parser = argparse.ArgumentParser()
    fetch_command.add_options(parser)
    args = parser.parse_args(words)
    return fetch_command.run(args)


def test_dolly_comes_from_the_hub_once(monkeypatch, cache, dolly_hub, no_hub):
    dolly_hub(b"rows\n", b"rows\n")
    path = fetch.fetch_dolly()
    assert path == cache / "data" / "databricks-dolly-15k.jsonl"
    assert sorted(file.name for file in path.parent.iterdir()) == [
        path.name,
        "databricks-dolly-15k.receipt.json",
    ]
    receipt = json.loads((path.parent / "databricks-dolly-15k.receipt.json").read_text())
    assert receipt["revision"] == sources.DOLLY_REVISION
    assert receipt["licence"] == "CC BY-SA 3.0"
    source = sources.resolve_dolly("")
    assert (source.path, source.is_sample, source.revision) == (path, False, sources.DOLLY_REVISION)
    monkeypatch.setattr(huggingface_hub, "dataset_info", no_hub)
    assert fetch.fetch_dolly() == path


def test_a_corrupt_dolly_is_refused(dolly_hub):
    dolly_hub(b"other\n", b"rows\n")
    with pytest.raises(InputError, match=hashlib.sha256(b"other\n").hexdigest()):
        fetch.fetch_dolly()
    assert not sources.cached_dolly_path().exists()
    sources.cached_dolly_path().write_bytes(b"cut of")
    with pytest.raises(InputError, match="delete it and fetch it again"):
        sources.resolve_dolly("")


def test_without_a_hub_dolly_is_none_and_one_line_says_so(monkeypatch, capsys, no_hub):
    monkeypatch.setattr(huggingface_hub, "dataset_info", no_hub)
    assert fetch.fetch_dolly() is None
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "Name or service not known" in lines[0]
    assert "MOPS_DOLLY" in lines[0]


def test_the_command_says_what_came_from_where_and_then_that_it_is_there(hub, capsys, dolly_hub):
    dolly_hub(b"rows\n", b"rows\n")
    assert _run_command("--backbone", "some/model") == 0
    folder, dolly = sources.resolve_backbone("some/model"), sources.resolve_dolly("")
    assert capsys.readouterr().out.splitlines() == [
        "some/model: fetched",
        "  from hub aaaaaaaaaaaa, licence: mit",
        f"  {folder}",
        f"{dolly.description}: fetched",
        f"  from hub {sources.DOLLY_REVISION[:12]}, licence: CC BY-SA 3.0",
        f"  {dolly.path}",
    ]
    assert _run_command("--backbone", "some/model") == 0
    assert capsys.readouterr().out.count("already there") == 2
    assert len(hub.calls) == 2


def test_the_command_names_the_sample_where_there_is_no_dolly(hub, monkeypatch, capsys, no_hub):
    monkeypatch.setattr(huggingface_hub, "dataset_info", no_hub)
    assert _run_command("--backbone", "some/model") == 0
    assert "not Dolly itself" in capsys.readouterr().out
    assert _run_command("--backbone", "some/model", "--no-data") == 0
    assert "Dolly" not in capsys.readouterr().out
