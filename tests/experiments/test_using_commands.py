"""`mops-fl generate`, `chat` and `evaluate` on a run of the tiny model: answers and figures are the library's."""

import gzip
import io
import json
import shutil
import sys
from dataclasses import replace

import pytest
import tomli_w
import torch

from experiments import run as run_module
from experiments.adapter_options import gate_lines
from experiments.app_folder import AppFolder
from experiments.central_run import run_centrally
from experiments.cli import main
from experiments.measured_rows import run_rows
from experiments.run_folder import RunFolder
from experiments.runtimes import run_inline
from experiments.wording import perplexity_text
from mops_fl.config import DataConfig, read_section
from mops_fl.data import load_task_data
from mops_fl.encoding import Turn
from mops_fl.errors import InputError
from mops_fl.mops_model import MopsModel
from mops_fl.sources import sample_path
from mops_fl.text_metrics import score_texts

NEW = ["--max-new-tokens", "8"]


@pytest.fixture(scope="module")
def runs(run_config, tmp_path_factory):
    """Folders of a run of each kind of method, by method."""
    folders = {method: tmp_path_factory.mktemp("runs") / method for method in ("mops", "lora")}
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MOPS_DOLLY", raising=False)
        patch.setenv("MOPS_CACHE", str(tmp_path_factory.mktemp("empty-cache")))
        patch.setattr(torch, "set_num_threads", lambda _: None)
        patch.setattr(run_module, "write_report", lambda folder: folder.path / "report.html")
        for method, folder in folders.items():
            changes = {"output-dir": str(folder), "method": method, "num-server-rounds": 1}
            run_inline(AppFolder.find("experiments.dolly"), run_config(changes), catch_signals=lambda: None)
    return folders


@pytest.fixture
def run(runs):
    return runs["mops"]


@pytest.fixture
def model(run):
    return MopsModel.from_pretrained(run)


def library_answer(model, instruction, context="", **options):
    inputs = model.encode([instruction], [context])
    output = model.generate(**inputs, max_new_tokens=8, **{"do_sample": False, **options})
    return model.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_generate_answers_as_the_library_does(run, model, capsys, tmp_path):
    (tmp_path / "text.txt").write_text("A text.\n", encoding="utf-8")
    command = ["generate", "--adapter", str(run), *NEW, "Sum up.", "--context", str(tmp_path / "text.txt")]
    assert main(command) == 0
    captured = capsys.readouterr()
    assert captured.out == library_answer(model, "Sum up.", "A text.") + "\n"
    assert captured.err == ""


def test_generate_shows_the_gate_on_stderr_and_answers_on_stdout(run, model, capsys):
    assert main(["generate", "--adapter", str(run), *NEW, "--show-gate", "Why?"]) == 0
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


def test_method_without_gate_says_so(runs, capsys):
    assert main(["generate", "--adapter", str(runs["lora"]), *NEW, "--show-gate", "Why?"]) == 0
    captured = capsys.readouterr()
    assert captured.err == "lora has no gate\n"
    assert captured.out == library_answer(MopsModel.from_pretrained(runs["lora"]), "Why?") + "\n"


def test_prompts_come_from_stdin(run, model, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("Why?\n\nWho?\n"))
    assert main(["generate", "--adapter", str(run), *NEW, "-"]) == 0
    answers = [library_answer(model, prompt) + "\n" for prompt in ("Why?", "Who?")]
    assert capsys.readouterr().out == "\n".join(answers)


def test_generation_options_reach_the_model(run, model, capsys):
    def answer(*options):
        assert main(["generate", "--adapter", str(run), *NEW, "Why?", *options]) == 0
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
def test_wrong_options_are_refused(options, reason, run, capsys):
    assert main(["generate", "--adapter", str(run), "Why?", *options]) == 2
    assert reason in capsys.readouterr().err


def test_missing_adapter_and_prompt_are_refused(run, tmp_path, capsys, monkeypatch):
    assert main(["generate", "--adapter", str(tmp_path), "Why?"]) == 2
    assert "holds no adapter" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert main(["generate", "--adapter", str(run), "-"]) == 2
    assert "no instruction" in capsys.readouterr().err


@pytest.fixture
def chat(run, capsys, monkeypatch):
    """``chat("line", ...)``: what the command prints on stdout and stderr for lines of input."""

    def talk(*lines, options=()):
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
        assert main(["chat", "--adapter", str(run), *NEW, *options]) == 0
        return capsys.readouterr()

    return talk


def test_chat_keeps_the_conversation_until_it_is_told_to_forget(chat, model):
    first = library_answer(model, "Why?")
    inputs = model.encode_turns([[Turn("Why?", "", first.strip()), Turn("Who?", "")]])
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    second = model.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert chat("Why?", "Who?").out == f"{first}\n{second}\n"
    assert chat("Why?", "/new", "Who?").out == f"{first}\n{library_answer(model, 'Who?')}\n"


@pytest.mark.parametrize("there", [True, False])
def test_lines_typed_at_a_terminal_can_be_edited_where_python_can(there, run, capsys, monkeypatch):
    terminal = io.StringIO("Why?\n")
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stdin", terminal)
    monkeypatch.delitem(sys.modules, "readline", raising=False)
    if not there:
        monkeypatch.setitem(sys.modules, "readline", None)
    assert main(["chat", "--adapter", str(run), *NEW]) == 0
    assert (sys.modules.get("readline") is not None) == there


def test_chat_commands(chat, model, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("A text.", encoding="utf-8")
    found = chat(f"/context {path}", "Sum up.", "/quit", "Never asked.")
    assert found.out == library_answer(model, "Sum up.", "A text.") + "\n"
    found = chat("/context nowhere.txt", "/what", "/gate", "Why?", options=["--max-new-tokens", "3"])
    assert "nowhere.txt cannot be read" in found.err
    assert "/quit" in found.err
    assert "brainstorming" in found.err
    assert "brainstorming" in chat("Why?", options=["--show-gate"]).err


def test_chat_forgets_what_does_not_fit_and_refuses_what_never_could(chat, model):
    window = model.config.max_position_embeddings - 8 - 14  # new tokens, prompts
    long = "a" * (window - len("### Instruction:\n\n\n### Response:\n"))
    found = chat("Why?", long)
    assert found.out == f"{library_answer(model, 'Why?')}\n{library_answer(model, long)}\n"
    assert "longer than" in chat(long + "a").err
    # What was said before stays: the next answer is to both turns.
    answer = library_answer(model, "Why?").strip()
    inputs = model.encode_turns([[Turn("Why?", "", answer), Turn("Who?", "")]])
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert chat("Why?", long + "a", "Who?").out.splitlines()[-1] == model.tokenizer.decode(
        output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )


def evaluated(capsys, tmp_path, run, *options):
    assert main(["evaluate", "--adapter", str(run), "--json", str(tmp_path / "out.json"), *options]) == 0
    return json.loads((tmp_path / "out.json").read_text(encoding="utf-8")), capsys.readouterr().out


@pytest.fixture
def test_rows(run):
    """The rows on which the run measured itself."""
    folder = RunFolder.open(run)
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
def test_perplexity_is_what_the_run_reports(method, from_file, runs, test_rows, capsys, tmp_path):
    write_rows(tmp_path / "rows.jsonl", test_rows)
    source = ["--data", str(tmp_path / "rows.jsonl")] if from_file else []
    found, table = evaluated(capsys, tmp_path, runs[method], *source, "--no-generation")
    summary = RunFolder.open(runs[method]).summary
    assert {task: figures["perplexity"] for task, figures in found["tasks"].items()} == pytest.approx(
        summary["perplexity"], rel=1e-6
    )
    assert found["tasks"]["all"]["rows"] == len(test_rows) == 14
    assert "information extraction" in table
    assert found["answers"] == []
    if method == "mops":
        assert sum(found["tasks"]["open_qa"]["gate"]) == pytest.approx(1, abs=1e-5)
    else:
        assert "gate" not in found["tasks"]["open_qa"]


def test_answers_are_generated_and_scored(run, model, test_rows, capsys, tmp_path):
    whole = [row for row in test_rows if len(row.instruction + row.context + row.response) < 400]
    assert len(whole) > 6
    write_rows(tmp_path / "rows.jsonl.gz", whole)
    options = ["--data", str(tmp_path / "rows.jsonl.gz"), *NEW, "--batch-size", "3", "--max-length", "480"]
    found, table = evaluated(capsys, tmp_path, run, *options)
    for entry, row in zip(found["answers"], whole, strict=True):
        assert (entry["task"], entry["references"]) == (row.task, [row.response])
        assert entry["answer"] == library_answer(model, row.instruction, row.context).strip()
    expected = score_texts([e["answer"] for e in found["answers"]], [e["references"] for e in found["answers"]])
    assert found["tasks"]["all"]["rouge-l"] == pytest.approx(expected.rouge_l)
    assert found["tasks"]["all"]["exact-match"] == expected.exact_match
    assert "ROUGE-L" in table


def test_any_category_is_a_task_and_rows_can_be_few(run, test_rows, capsys, tmp_path):
    lines = [{"instruction": f"Say {i}.", "context": "", "response": "x", "category": f"own_{i % 2}"} for i in range(9)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    source = ["--data", str(tmp_path / "rows.jsonl"), "--no-generation"]
    found, _ = evaluated(capsys, tmp_path, run, *source)
    assert {task: figures["rows"] for task, figures in found["tasks"].items()} == {"own_0": 5, "own_1": 4, "all": 9}
    found, _ = evaluated(capsys, tmp_path, run, *source, "--rows", "4")
    assert {task: figures["rows"] for task, figures in found["tasks"].items()} == {"own_0": 2, "own_1": 2, "all": 4}
    found, _ = evaluated(capsys, tmp_path, run, *source, "--tasks", "own_1")
    assert set(found["tasks"]) == {"own_1", "all"}


@pytest.mark.parametrize("as_folder", [True, False])
def test_task_files_have_several_references(as_folder, run, model, capsys, tmp_path):
    answer = library_answer(model, "Say it.", "Q").strip()
    folder = tmp_path / "tasks"
    folder.mkdir()
    instances = [{"input": "Q", "output": ["nothing like it", answer]}]
    content = {"Definition": ["Say it."], "Instances": instances}
    (folder / "task001_say.json").write_text(json.dumps(content), encoding="utf-8")
    data = folder if as_folder else folder / "task001_say.json"
    found, _ = evaluated(capsys, tmp_path, run, "--data", str(data), *NEW, "--max-length", "400")
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
def test_wrong_evaluations_are_refused(options, reason, run, capsys):
    assert main(["evaluate", "--adapter", str(run), "--no-generation", *options]) == 2
    assert reason in capsys.readouterr().err


def test_adapter_without_its_run_knows_no_test_rows(run, capsys):
    assert main(["evaluate", "--adapter", str(run / "adapter"), "--no-generation"]) == 2
    assert "give rows with --data" in capsys.readouterr().err


def test_card_is_made_from_the_run(run):
    summary = RunFolder.open(run).summary
    card = (run / "adapter/README.md").read_text(encoding="utf-8")
    assert f"{summary['trainable_parameters']:,} trained parameters" in card
    assert "Sample data" in card
    assert f"| {perplexity_text(summary['perplexity']['open_qa'])} |" in card
    assert card.count("| open qa |") == 3  # perplexity, a row and a column of the gate's
    assert "base_model:" not in card  # a local folder is no repository of the hub
    assert str(run) not in card


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
def test_test_rows_that_are_not_the_runs_are_refused(key, value, reason, run, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / "run")
    folder = RunFolder.open(copy)
    manifest = {**folder.manifest, "config": {**folder.config, key: value}}
    (copy / "config.toml").write_text(tomli_w.dumps(manifest), encoding="utf-8")
    data_config = replace(read_section(DataConfig, folder.config), **({"data_seed": 7} if key == "data-seed" else {}))
    with pytest.raises(InputError, match=reason):
        run_rows(copy, data_config, "", 0)


def test_refused_evaluation_leaves_earlier_figures(capsys, tmp_path, run):
    (tmp_path / "out.json").write_text("earlier", encoding="utf-8")
    (tmp_path / "no-adapter").mkdir()
    options = ["--data", str(sample_path()), "--json", str(tmp_path / "out.json")]
    assert main(["evaluate", "--adapter", str(tmp_path / "no-adapter"), *options]) == 2
    assert (tmp_path / "out.json").read_text(encoding="utf-8") == "earlier"


def test_refused_evaluation_leaves_no_empty_file(capsys, tmp_path, run):
    (tmp_path / "no-adapter").mkdir()
    options = ["--data", str(sample_path()), "--json", str(tmp_path / "out.json")]
    assert main(["evaluate", "--adapter", str(tmp_path / "no-adapter"), *options]) == 2
    assert not (tmp_path / "out.json").exists()


def test_tasks_of_the_runs_own_rows_can_be_chosen(run, capsys, tmp_path):
    found, _ = evaluated(capsys, tmp_path, run, "--no-generation", "--tasks", "open_qa")
    assert set(found["tasks"]) == {"open_qa", "all"}
    assert main(["evaluate", "--adapter", str(run), "--no-generation", "--tasks", "poetry"]) == 2
    assert "poetry" in capsys.readouterr().err


def test_question_that_never_fits_is_refused(run, capsys, tmp_path):
    (tmp_path / "long.txt").write_text("word " * 500, encoding="utf-8")
    assert main(["generate", "--adapter", str(run), *NEW, "Sum up.", "--context", str(tmp_path / "long.txt")]) == 2
    assert "is longer than" in capsys.readouterr().err
