"""`mops-fl evaluate`: what it refuses before the answers are made, and that nothing of them is lost afterwards."""

import json
import math

import pytest
import torch

from experiments import evaluate_command
from experiments.cli import main
from mops_fl.encoding import EncodedRow
from mops_fl.mops_model import MopsModel


@pytest.fixture
def evaluate(make_usable_run, tmp_path):
    """``evaluate({"task": rows, ...}, "--no-generation")``: the exit code, on rows of such tasks."""

    run = make_usable_run()

    def call(sizes, *options):
        lines = [
            {"instruction": f"Say {task} {i}.", "context": "", "response": "x", "category": task}
            for task, size in sizes.items()
            for i in range(size)
        ]
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
        return main(["evaluate", "--adapter", str(run.path), "--data", str(tmp_path / "rows.jsonl"), *options])

    return call


def test_answers_that_would_leave_the_window_are_refused_before_anything_is_measured(evaluate, capsys, monkeypatch):
    monkeypatch.setattr(evaluate_command, "answer_rows", lambda *_: pytest.fail("answered"))
    assert evaluate({"open_qa": 2}, "--max-new-tokens", "600") == 2  # the tiny model has 512 positions
    assert "has room for 498 tokens, of question and answer together" in capsys.readouterr().err


def test_window_has_room_for_any_answer_that_is_not_made(evaluate):
    assert evaluate({"open_qa": 2}, "--max-new-tokens", "600", "--no-generation") == 0


def test_names_of_tasks_are_shown_as_they_are(evaluate, capsys):
    assert evaluate({"qa [easy]": 1, "x[/b]": 1}, "--no-generation") == 0
    table = capsys.readouterr().out
    assert "qa [easy]" in table
    assert "x[/b]" in table


@pytest.mark.parametrize(
    "shipped", [{"repetition_penalty": 1.5}, {"no_repeat_ngram_size": 1}, {"suppress_tokens": list(range(90))}]
)
def test_answer_is_the_likeliest_token_each_time_whatever_the_backbone_ships(make_usable_run, shipped):
    model = MopsModel.from_pretrained(make_usable_run(method="lora").path)
    model.generation_config.update(**shipped)
    tokens = list(b"abababab")
    for _ in range(12):
        likeliest = int(model(torch.tensor([tokens])).logits[0, -1].argmax())
        tokens.append(likeliest)
        if likeliest in model.generation_config.eos_token_id:
            break
    expected = model.tokenizer.decode(tokens[8:], skip_special_tokens=True).strip()
    row = EncodedRow(0, torch.tensor(tokens[:8]), 8, 8, 0, False)
    assert evaluate_command.answer_rows(model, [row], 12, 1) == {0: expected}


def test_answers_are_written_before_anything_is_printed(evaluate, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate_command, "_table", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate({"open_qa": 2}, "--max-new-tokens", "1", "--json", str(tmp_path / "out.json"))
    assert len(json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["answers"]) == 2


def test_perplexity_without_bound_is_null_in_the_file(evaluate, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate_command, "_to_json", lambda *_: {"perplexity": {"all": math.inf}})
    assert evaluate({"open_qa": 2}, "--no-generation", "--json", str(tmp_path / "out.json")) == 0
    assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8")) == {"perplexity": {"all": None}}


def test_full_disk_costs_the_file_but_not_the_table(evaluate, capsys):
    assert evaluate({"open_qa": 2}, "--no-generation", "--json", "/dev/full") == 2
    captured = capsys.readouterr()
    assert "open qa" in captured.out
    assert captured.err == "mops-fl: /dev/full cannot be written (No space left on device); choose another file.\n"


def test_name_that_stands_for_all_tasks_is_refused(evaluate, capsys):
    assert evaluate({"open_qa": 2, "all": 1}, "--no-generation") == 2
    assert "has a task named 'all', which stands for all tasks together; rename it" in capsys.readouterr().err
    assert evaluate({"open_qa": 2, "all": 1}, "--no-generation", "--tasks", "open_qa") == 0


def test_task_file_of_that_name_is_refused(tmp_path):
    content = {"Definition": ["Say it."], "Instances": [{"input": "Q", "output": ["A"]}]}
    (tmp_path / "all.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(evaluate_command.InputError, match="has a task named 'all'"):
        evaluate_command.read_rows(tmp_path / "all.json", "", 0)
