"""`mops-fl evaluate` on a run of the tiny model: its figures are the run's own, its answers the library's."""

import gzip
import json
import shutil
from dataclasses import replace

import pytest
import tomli_w

from experiments.app_folder import AppFolder
from experiments.central_run import run_centrally
from experiments.cli import main
from experiments.measured_rows import run_rows
from experiments.run_folder import RunFolder
from experiments.wording import perplexity_text
from mops_fl.config import DataConfig, read_section
from mops_fl.data import load_task_data
from mops_fl.errors import InputError
from mops_fl.sources import sample_path
from mops_fl.text_metrics import score_texts

NEW = ["--max-new-tokens", "8"]


def evaluated(capsys, tmp_path, trained_run, *options):
    assert main(["evaluate", "--adapter", str(trained_run), "--json", str(tmp_path / "out.json"), *options]) == 0
    return json.loads((tmp_path / "out.json").read_text(encoding="utf-8")), capsys.readouterr().out


@pytest.fixture
def measured_rows(trained_run):
    """The rows on which the run measured itself."""
    folder = RunFolder.open(trained_run)
    data = load_task_data(read_section(DataConfig, folder.config))
    return data.evaluation_rows(folder.config["eval-rows"])


def write_rows(path, rows):
    lines = [
        json.dumps({"instruction": r.instruction, "context": r.context, "response": r.response, "category": r.task})
        for r in rows
    ]
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")


@pytest.mark.parametrize("method", ["mops", "lora"])
@pytest.mark.parametrize("from_file", [True, False])
def test_perplexity_is_what_the_run_reports(method, from_file, trained_runs, measured_rows, capsys, tmp_path):
    write_rows(tmp_path / "rows.jsonl", measured_rows)
    source = ["--data", str(tmp_path / "rows.jsonl")] if from_file else []
    found, table = evaluated(capsys, tmp_path, trained_runs[method], *source, "--no-generation")
    summary = RunFolder.open(trained_runs[method]).summary
    assert {task: figures["perplexity"] for task, figures in found["tasks"].items()} == pytest.approx(
        summary["perplexity"], rel=1e-6
    )
    assert found["tasks"]["all"]["rows"] == len(measured_rows) == 14
    assert "information extraction" in table
    assert found["answers"] == []
    if method == "mops":
        assert sum(found["tasks"]["open_qa"]["gate"]) == pytest.approx(1, abs=1e-5)
    else:
        assert "gate" not in found["tasks"]["open_qa"]


def test_answers_are_generated_and_scored(trained_run, model, measured_rows, capsys, tmp_path, library_answer):
    whole = [row for row in measured_rows if len(row.instruction + row.context + row.response) < 400]
    assert len(whole) > 6
    write_rows(tmp_path / "rows.jsonl.gz", whole)
    options = ["--data", str(tmp_path / "rows.jsonl.gz"), *NEW, "--batch-size", "3", "--max-length", "480"]
    found, table = evaluated(capsys, tmp_path, trained_run, *options)
    for entry, row in zip(found["answers"], whole, strict=True):
        assert (entry["task"], entry["references"]) == (row.task, [row.response])
        assert entry["answer"] == library_answer(model, row.instruction, row.context).strip()
    expected = score_texts([e["answer"] for e in found["answers"]], [e["references"] for e in found["answers"]])
    assert found["tasks"]["all"]["rouge-l"] == pytest.approx(expected.rouge_l)
    assert found["tasks"]["all"]["exact-match"] == expected.exact_match
    assert "ROUGE-L" in table


def test_any_category_is_a_task_and_rows_can_be_few(trained_run, measured_rows, capsys, tmp_path):
    lines = [{"instruction": f"Say {i}.", "context": "", "response": "x", "category": f"own_{i % 2}"} for i in range(9)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    source = ["--data", str(tmp_path / "rows.jsonl"), "--no-generation"]
    found, _ = evaluated(capsys, tmp_path, trained_run, *source)
    assert {task: figures["rows"] for task, figures in found["tasks"].items()} == {"own_0": 5, "own_1": 4, "all": 9}
    found, _ = evaluated(capsys, tmp_path, trained_run, *source, "--rows", "4")
    assert {task: figures["rows"] for task, figures in found["tasks"].items()} == {"own_0": 2, "own_1": 2, "all": 4}
    found, _ = evaluated(capsys, tmp_path, trained_run, *source, "--tasks", "own_1")
    assert set(found["tasks"]) == {"own_1", "all"}


@pytest.mark.parametrize("as_folder", [True, False])
def test_task_files_have_several_references(as_folder, trained_run, model, capsys, tmp_path, library_answer):
    answer = library_answer(model, "Say it.", "Q").strip()
    folder = tmp_path / "tasks"
    folder.mkdir()
    instances = [{"input": "Q", "output": ["nothing like it", answer]}]
    content = {"Definition": ["Say it."], "Instances": instances}
    (folder / "task001_say.json").write_text(json.dumps(content), encoding="utf-8")
    data = folder if as_folder else folder / "task001_say.json"
    found, _ = evaluated(capsys, tmp_path, trained_run, "--data", str(data), *NEW, "--max-length", "400")
    assert found["tasks"]["task001_say"]["exact-match"] == 100
    assert found["answers"][0]["references"] == ["nothing like it", answer]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--data", "nowhere.jsonl"], "nowhere.jsonl cannot be read"),
        (["--rows", "-1"], "`rows` is -1"),
        (["--batch-size", "0"], "`batch-size` is 0"),
        (["--json", "nowhere/out.json"], "cannot be written"),
        (["--max-length", "3"], "`max-length` is 3"),
        (["--max-length", "0"], "`max-length` is 0"),
        # The tiny model has 512 positions, 14 of them for prompts.
        (["--max-length", "499"], "`max-length` is 499, but beside prompts and answer the backbone's window has"),
    ],
)
def test_wrong_evaluations_are_refused(options, reason, trained_run, capsys):
    assert main(["evaluate", "--adapter", str(trained_run), "--no-generation", *options]) == 2
    assert reason in capsys.readouterr().err


def test_adapter_without_its_run_knows_no_test_rows(trained_run, capsys):
    assert main(["evaluate", "--adapter", str(trained_run / "adapter"), "--no-generation"]) == 2
    assert "give rows with --data" in capsys.readouterr().err


def test_card_is_made_from_the_run(trained_run):
    summary = RunFolder.open(trained_run).summary
    card = (trained_run / "adapter/README.md").read_text(encoding="utf-8")
    assert f"{summary['trainable_parameters']:,} trained parameters" in card
    assert "Sample data" in card
    assert f"| {perplexity_text(summary['perplexity']['open_qa'])} |" in card
    assert card.count("| open qa |") == 3  # perplexity, a row and a column of the gate's
    assert "base_model:" not in card  # a local folder is no repository of the hub
    assert str(trained_run) not in card


def test_rows_of_a_server_whose_clients_have_their_own_are_measured_on(run_config, capsys, tmp_path):
    changes = {"partitioner": "own-rows", "central-rows": "server", "output-dir": str(tmp_path / "run")}
    run_centrally(AppFolder.find("experiments.dolly"), run_config(changes), catch_signals=lambda: None)
    summary = RunFolder.open(tmp_path / "run").summary
    found, _ = evaluated(capsys, tmp_path, tmp_path / "run", "--no-generation")
    assert found["tasks"]["all"]["perplexity"] == pytest.approx(summary["perplexity"]["all"], rel=1e-6)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("evaluate-on", "clients", "was measured on rows that its clients keep"),
        ("data-seed", 7, "are no longer there, others are"),
    ],
)
def test_test_rows_that_are_not_the_runs_are_refused(key, value, reason, trained_run, tmp_path, capsys):
    copy = shutil.copytree(trained_run, tmp_path / "run")
    folder = RunFolder.open(copy)
    manifest = {**folder.manifest, "config": {**folder.config, key: value}}
    (copy / "config.toml").write_text(tomli_w.dumps(manifest), encoding="utf-8")
    data_config = replace(read_section(DataConfig, folder.config), **({"data_seed": 7} if key == "data-seed" else {}))
    with pytest.raises(InputError, match=reason):
        run_rows(copy, data_config, "", 0)


def test_refused_evaluation_leaves_no_empty_file_and_earlier_figures_as_they_are(tmp_path):
    (tmp_path / "no-adapter").mkdir()
    file = tmp_path / "out.json"
    command = ["evaluate", "--adapter", str(tmp_path / "no-adapter"), "--data", str(sample_path()), "--json", str(file)]
    assert main(command) == 2
    assert not file.exists()
    file.write_text("earlier", encoding="utf-8")
    assert main(command) == 2
    assert file.read_text(encoding="utf-8") == "earlier"


def test_tasks_of_the_runs_own_rows_can_be_chosen(trained_run, capsys, tmp_path):
    found, _ = evaluated(capsys, tmp_path, trained_run, "--no-generation", "--tasks", "open_qa")
    assert set(found["tasks"]) == {"open_qa", "all"}
    assert main(["evaluate", "--adapter", str(trained_run), "--no-generation", "--tasks", "poetry"]) == 2
    assert "poetry" in capsys.readouterr().err
