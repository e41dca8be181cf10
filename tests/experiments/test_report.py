"""The report is one file that says everything and needs nothing from outside."""

from __future__ import annotations

import argparse
import base64
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from experiments import report, report_command, wording
from experiments.cli import main
from experiments.run_folder import RunFolder


@pytest.fixture
def without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of the text alone, which need not wait for the plots."""
    for name in ("plot_perplexity", "plot_gate", "plot_partition"):
        monkeypatch.setattr(report, name, lambda run, target: False)


def html_of(run: RunFolder) -> str:
    return report.write_report(run).read_text(encoding="utf-8")


def test_report_names_every_task_and_value_and_needs_no_network(make_run) -> None:
    run = make_run(after=20.0, bare=60.0)
    html = html_of(run)
    for text in [task.replace("_", " ") for task in run.partition["tasks"]] + [
        "MoPs",
        "SmolLM2-135M-Instruct",
        "clients-per-round",
    ]:
        assert text in html
    # before 40 -> after 20 is -50 %; closed_qa is 0.8 times as hard as the whole.
    assert "-50.0 %" in html
    row = re.search(r'<th scope="row">closed qa</th>(.*?)</tr>', html).group(1)
    assert re.findall(r">([^<>]+)</td>", row) == ["48.00", "32.00", "16.00", "-50.0 %"]
    assert not re.search(r"""(src|href)\s*=\s*["']?\s*(https?:)?//""", html)
    assert "<script" not in html
    assert "@import" not in html


def test_report_embeds_the_very_pngs_beside_it(make_run) -> None:
    run = make_run()
    embedded = [base64.b64decode(image) for image in re.findall(r"base64,([^\"]+)", html_of(run))]
    assert embedded == [(run.path / f"{name}.png").read_bytes() for name in ("perplexity", "gate", "partition")]


def test_report_says_when_the_run_was_resumed(make_run, without_plots) -> None:
    run = make_run()
    assert "resumed" not in html_of(run)
    run.write_resumed(run.config)
    assert f"resumed {run.manifest['resumed'][0]['started']}" in html_of(RunFolder.open(run.path))


def test_run_without_gate_has_no_gate_section(make_run) -> None:
    html = html_of(make_run(method="fedprompt"))
    assert "FedPrompt" in html
    assert "The gate" not in html


def test_complete_run_on_real_data_has_no_banner(make_run, without_plots) -> None:
    assert 'class="banner"' not in html_of(make_run())


def test_sample_data_and_a_run_cut_short_are_said_at_the_top(make_run, without_plots) -> None:
    html = html_of(make_run(summary={"data_is_sample": True, "status": "interrupted"}))
    assert html.index("Sample data.") < html.index("Perplexity per task")
    assert html.index("Status: interrupted.") < html.index("Perplexity per task")


def test_run_that_was_killed_before_its_start_was_measured_is_said_to_be_unfinished(make_run, without_plots) -> None:
    assert "Status: unfinished." in html_of(make_run(ended=False))


def test_run_that_got_nowhere_still_has_a_report(tmp_path: Path) -> None:
    html = html_of(RunFolder.create(tmp_path / "run", {"method": "mops"}))
    assert "Nothing was evaluated." in html


def test_text_from_the_run_cannot_become_markup(make_run, without_plots) -> None:
    html = html_of(make_run(summary={"data_description": "<img src=x>"}))
    assert "<img src=x>" not in html
    assert "&lt;img src=x&gt;" in html


def test_table_has_the_whole_set_last_and_a_dash_for_what_is_missing(make_run) -> None:
    summary = {**make_run(after=20.0).summary, "perplexity_bare": {"all": None}}
    console = Console(width=100)
    with console.capture() as capture:
        report.print_perplexity_table(summary, console)
    lines = [line for line in capture.get().splitlines() if "%" in line]
    assert len(lines) == 8
    assert re.findall(r"[-–+\d.]+", lines[-1]) == ["–", "40.00", "20.00", "-50.0"]  # noqa: RUF001


def test_names_in_the_table_are_shown_as_they_are(make_run) -> None:
    perplexity = {"qa [easy]": 2.0, "x[/b]": 3.0}
    summary = {**make_run().summary, "backbone": "tiny [small]", "perplexity": perplexity}
    console = Console(width=100)
    with console.capture() as capture:
        report.print_perplexity_table(summary, console)
    assert all(name in capture.get() for name in ("qa [easy]", "x[/b]", "tiny [small]"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (wording.perplexity_text(8.0), "8.00"),
        (wording.perplexity_text(123.456), "123.5"),
        (wording.perplexity_text(123456.7), "123,457"),
        (wording.bytes_text(999), "999 bytes"),
        (wording.bytes_text(61_957_600), "62 MB"),
        (wording.bytes_text(None), wording.NOTHING),
        (wording.seconds_text(59.94), "59.9 s"),
        (wording.seconds_text(754.2), "12 min 34 s"),
        (wording.seconds_text(7260), "2 h 1 min"),
    ],
)
def test_figures_are_written_for_people(text: str, expected: str) -> None:
    assert text == expected


def test_command_makes_each_report_and_prints_where(make_run, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [make_run(name).path for name in ("a", "b")]
    assert main(["report", *map(str, folders)]) == 0
    assert capsys.readouterr().out.split() == [str(folder / "report.html") for folder in folders]
    assert all((folder / "report.html").stat().st_size > 10_000 for folder in folders)


def test_report_can_be_read_without_a_mouse_and_without_eyes(make_run) -> None:
    html = html_of(make_run())
    assert html.count("<main>") == html.count("</main>") == 1
    regions = re.findall('<div class="scroll"([^>]*)>', html)
    assert len(regions) == 4
    assert all('tabindex="0" role="region" aria-label="' in attributes for attributes in regions)
    assert set(re.findall("<th(.*?)>", html)) == {' scope="col"', ' scope="col" class="number"', ' scope="row"'}
    assert "<tr><td" not in html


def test_output_without_a_sweep_is_refused(make_run, tmp_path: Path, capsys) -> None:
    run = make_run()
    assert main(["report", str(run.path), "--output", str(tmp_path / "there")]) == 2
    assert "no sweep is named; leave it out" in capsys.readouterr().err
    assert not (run.path / report.REPORT).exists()


def test_pipe_that_ends_early_says_nothing_against_the_folder(make_run, without_plots, monkeypatch) -> None:
    def end(*_) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", end)
    with pytest.raises(BrokenPipeError):
        report_command.run(argparse.Namespace(paths=[make_run().path], output=None))


def test_folder_that_cannot_be_written_is_one_sentence(make_run, without_plots, capsys) -> None:
    run = make_run()
    (run.path / report.REPORT).mkdir()
    assert main(["report", str(run.path)]) == 2
    error = capsys.readouterr().err
    assert "cannot be written (Is a directory)" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("command", ["report", "compare", "fetch", "certificates", ""])
def test_commands_that_read_folders_or_write_files_need_neither_torch_nor_flower(command) -> None:
    code = """
import atexit, sys
from experiments import cli
slow = {"torch", "transformers", "datasets", "ray", "flwr"}
atexit.register(lambda: print("loaded:", *slow & set(sys.modules)))
cli.main()
"""
    words = [*filter(None, [command]), "--help"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(" ".join(["usage: mops-fl", *words[:-1]]))
    assert done.stdout.endswith("loaded:\n")
