import json

import pytest

from clients.trainer import Trainer
from experiments import compress_command
from experiments.cli import main
from experiments.compress_command import prune_if_missing
from mops_fl.compressed import COMPRESSION_RECEIPT, NotPrunedError, SeveralPrunedError
from mops_fl.config import DataConfig, read_section
from mops_fl.own_rows import load_server_rows

SMALL = "num-rows=210 server-rows=35 max-length=64 dtype='float32'"


@pytest.fixture
def press(tiny_model_folder, tmp_path, monkeypatch):
    """``press("--recipe", ...)``: the command on the tiny model and the bundled sample, with a cache of its own."""
    monkeypatch.setenv("MOPS_CACHE", str(tmp_path / "cache"))

    def run(*arguments):
        small = ["--run-config", SMALL, "--calibration-rows", "5", "--calibration-length", "48"]
        return main(["compress", "--backbone", str(tiny_model_folder), *small, *arguments])

    return run


def test_command_prunes_once_and_says_what_came_out(press, tiny_model_folder, tmp_path, capsys):
    assert press("--recipe", "sparsegpt:2:4") == 0
    first = capsys.readouterr().out
    (folder,) = (tmp_path / "cache" / "compressed").iterdir()
    receipt = json.loads((folder / COMPRESSION_RECEIPT).read_text())
    assert receipt["recipe"] == "sparsegpt:2:4"
    assert receipt["calibration"]["rows"] == 5
    for part in ("28 of 28 matrices pruned", "50.00% of 28 matrices", "every group of 28 of 28", receipt["key"]):
        assert part in " ".join(first.split())
    assert str(folder) in first
    assert f"{receipt['perplexity']['after']:.2f} pruned" in " ".join(first.split())

    assert press("--recipe", "sparsegpt:2:4") == 0
    second = capsys.readouterr().out
    assert "matrices pruned" not in second
    assert str(folder) in second


def test_llmcompressors_own_output_is_kept_in(press, capfd):
    assert press("--recipe", "wanda:75%") == 0
    captured = capfd.readouterr()
    assert captured.err == ""
    assert "Sparsifying" not in captured.out
    assert "WARNING" not in captured.out


def test_rows_are_those_of_the_named_file(press, tmp_path, capsys):
    assert press("--recipe", "wanda:75%", "--data", str(tmp_path / "none.jsonl")) == 2
    assert "none.jsonl, which does not exist" in capsys.readouterr().err


def test_choice_among_several_is_left_to_the_run(run_config, monkeypatch):
    def several(_):
        raise SeveralPrunedError("pruned more than once")

    monkeypatch.setattr(compress_command, "resolve_model", several)
    prune_if_missing(run_config({"compression": "wanda:75%"}), say=pytest.fail)


def test_model_named_by_a_key_that_nobody_has_is_not_made_under_another(run_config):
    with pytest.raises(NotPrunedError, match="is not in the cache"):
        prune_if_missing(run_config({"compression": "wanda:75%@1a2b"}), say=pytest.fail)


@pytest.mark.parametrize("evaluate_on", ["server", "clients"])
def test_run_with_own_rows_takes_what_was_pruned_with_its_run_config(press, run_config, tmp_path, evaluate_on):
    own = f"partitioner='own-rows' evaluate-on='{evaluate_on}'"
    assert press("--recipe", "wanda:75%", "--run-config", own) == 0
    (folder,) = (tmp_path / "cache" / "compressed").iterdir()
    receipt = json.loads((folder / COMPRESSION_RECEIPT).read_text())
    values = run_config({"partitioner": "own-rows", "evaluate-on": evaluate_on, "compression": "wanda:75%"})
    data = load_server_rows(read_section(DataConfig, values), with_test=evaluate_on == "server")
    assert set(receipt["calibration"]["rows-sha256"]) <= {row.sha256 for row in data.server}
    assert Trainer(values).setting().data_sha256 == data.sha256
    assert prune_if_missing(values, say=pytest.fail) == f"wanda:75%@{receipt['key']}"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--recipe", "sparsegpt:75"], "`compression` is 'sparsegpt:75'"),
        (["--recipe", "wanda:75%", "--calibration-rows", "0"], "`calibration-rows` is 0"),
        (["--recipe", "wanda:75%", "--calibration-rows", "35"], "35 calibration rows are asked for"),
        (["--recipe", "wanda:75%", "--calibration-length", "3"], "`calibration-length` is 3"),
        (["--recipe", "wanda:75%", "--backbone", "no/model"], "run `mops-fl fetch --backbone no/model`"),
        (["--recipe", "wanda:75%", "--app", "experiments.nothing"], "There is no app 'experiments.nothing'"),
    ],
)
def test_bad_input_ends_with_one_sentence_and_code_2(arguments, reason, press, capsys):
    assert press(*arguments) == 2
    assert reason in capsys.readouterr().err
