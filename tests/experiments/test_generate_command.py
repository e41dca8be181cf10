"""`mops-fl generate` on a run of the tiny model: its answers are the library's."""

import io

import pytest

from experiments.adapter_options import gate_lines
from experiments.cli import main
from mops_fl.mops_model import MopsModel

NEW = ["--max-new-tokens", "8"]


def test_generate_answers_as_the_library_does(trained_run, model, capsys, tmp_path, library_answer):
    (tmp_path / "text.txt").write_text("A text.\n", encoding="utf-8")
    command = ["generate", "--adapter", str(trained_run), *NEW, "Sum up.", "--context", str(tmp_path / "text.txt")]
    assert main(command) == 0
    captured = capsys.readouterr()
    assert captured.out == library_answer(model, "Sum up.", "A text.") + "\n"
    assert captured.err == ""


def test_generate_shows_the_gate_on_stderr_and_answers_on_stdout(trained_run, model, capsys, library_answer):
    assert main(["generate", "--adapter", str(trained_run), *NEW, "--show-gate", "Why?"]) == 0
    captured = capsys.readouterr()
    scores = model.gate(**model.encode(["Why?"]))[0].tolist()
    assert captured.err.splitlines() == gate_lines(model.description.expert_names, scores)
    assert "information extraction" in captured.err
    assert captured.out == library_answer(model, "Why?") + "\n"


def test_bars_are_as_long_as_the_scores():
    lines = gate_lines(["a_b", "c"], [0.9, 0.1])
    assert lines == ["  a b  " + "█" * 27 + " " * 3 + "  0.90", "  c    " + "█" * 3 + " " * 27 + "  0.10"]


@pytest.mark.parametrize("width", [40, 80])
def test_bars_of_long_names_fit_the_terminal(width):
    tasks = [f"task{number:03d}_scan_structured_text_generation_command_{number}" for number in range(7)]
    lines = gate_lines([*tasks, ", ".join(tasks)], [1.0, *[0.0] * 7], width)
    assert {len(line) for line in lines} == {width}
    assert len({line[: 2 + width // 2] for line in lines}) == 8
    assert lines[1].startswith("  task001 sc")


def test_method_without_gate_says_so(trained_runs, capsys, library_answer):
    assert main(["generate", "--adapter", str(trained_runs["lora"]), *NEW, "--show-gate", "Why?"]) == 0
    captured = capsys.readouterr()
    assert captured.err == "lora has no gate\n"
    assert captured.out == library_answer(MopsModel.from_pretrained(trained_runs["lora"]), "Why?") + "\n"


def test_prompts_come_from_stdin(trained_run, model, capsys, monkeypatch, library_answer):
    monkeypatch.setattr("sys.stdin", io.StringIO("Why?\n\nWho?\n"))
    assert main(["generate", "--adapter", str(trained_run), *NEW, "-"]) == 0
    answers = [library_answer(model, prompt) + "\n" for prompt in ("Why?", "Who?")]
    assert capsys.readouterr().out == "\n".join(answers)


def test_generation_options_reach_the_model(trained_run, model, capsys, library_answer):
    def answer(*options):
        assert main(["generate", "--adapter", str(trained_run), *NEW, "Why?", *options]) == 0
        return capsys.readouterr().out

    greedy = answer()
    assert answer("--beams", "3") == library_answer(model, "Why?", num_beams=3) + "\n" != greedy
    assert answer("--repetition-penalty", "5.0") == library_answer(model, "Why?", repetition_penalty=5.0) + "\n"
    sampled = answer("--temperature", "2.0", "--seed", "1")
    assert sampled == answer("--temperature", "2.0", "--seed", "1")
    assert sampled != greedy
    assert answer("--temperature", "2.0", "--top-p", "1e-9", "--seed", "1") == greedy
    letter = next(letter for letter in greedy if letter.isascii() and letter.strip())
    assert answer("--stop", letter) == greedy[: greedy.index(letter) + 1] + "\n" != greedy


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--max-new-tokens", "0"], "`max-new-tokens` is 0"),
        (["--temperature", "-1"], "`temperature` is -1.0"),
        (["--temperature", "1e-40"], "it must be 0 or at least 0.001"),
        (["--top-p", "0"], "`top-p` is 0.0"),
        (["--beams", "0"], "`beams` is 0"),
        (["--repetition-penalty", "0"], "`repetition-penalty` is 0.0"),
        (["--seed", "-1"], "`seed` is -1"),
        (["--seed", "4294967296"], "`seed` is 4294967296; it must be from 0 to 4294967295"),
        # The tiny model has 512 positions, 14 of them for prompts.
        (["--max-new-tokens", "600"], "the backbone's window has room for 498 tokens, of question and answer"),
        (["--context", "nowhere.txt"], "nowhere.txt cannot be read"),
        (["--device", "tpu9"], "device 'tpu9' cannot be used"),
        (["--backbone", "nobody/nothing"], "mops-fl fetch"),
    ],
)
def test_wrong_options_are_refused(options, reason, trained_run, capsys):
    assert main(["generate", "--adapter", str(trained_run), "Why?", *options]) == 2
    assert reason in capsys.readouterr().err


def test_missing_adapter_and_prompt_are_refused(trained_run, tmp_path, capsys, monkeypatch):
    assert main(["generate", "--adapter", str(tmp_path), "Why?"]) == 2
    assert "holds no adapter" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert main(["generate", "--adapter", str(trained_run), "-"]) == 2
    assert "no instruction" in capsys.readouterr().err


def test_question_that_never_fits_is_refused(trained_run, capsys, tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("word " * 500, encoding="utf-8")
    assert main(["generate", "--adapter", str(trained_run), *NEW, "Sum up.", "--context", str(path)]) == 2
    assert "is longer than" in capsys.readouterr().err
