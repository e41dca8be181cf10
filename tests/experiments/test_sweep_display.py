"""A sweep's live table."""

import io

import tomli_w
from rich.console import Console

from experiments import sweep_command
from experiments.sweep import read_sweep


def test_name_of_a_row_is_no_markup(sweep_content, tmp_path):
    sweep_content["rows"] = {"x[/b]": {}}
    del sweep_content["paper"]
    (tmp_path / "sweep.toml").write_text(tomli_w.dumps(sweep_content), encoding="utf-8")
    runs = read_sweep(tmp_path / "sweep.toml", tmp_path / "out").runs
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with sweep_command._shown(console, runs, {one.folder: "waiting" for one in runs}):
        pass
    assert "x[/b]" in console.file.getvalue()


def test_table_longer_than_the_terminal_shows_what_runs_what_ended_last_and_how_many(sweep_content, tmp_path):
    del sweep_content["paper"]
    sweep_content["rows"] = {f"row {number}": {} for number in range(24)}
    (tmp_path / "sweep.toml").write_text(tomli_w.dumps(sweep_content), encoding="utf-8")
    runs = read_sweep(tmp_path / "sweep.toml", tmp_path / "out").runs
    assert len(runs) == 96
    console = Console(file=io.StringIO(), force_terminal=True, width=100, height=24)

    def shown():
        return ["".join(segment.text for segment in line) for line in console.render_lines(say)]

    with sweep_command._shown(console, runs, {one.folder: "waiting" for one in runs}) as say:
        for one in runs[:60]:
            say(one, f"failed, see {tmp_path / ('a' * 60)}.log")
        say(runs[60], "running")
        lines = shown()
        assert len(lines) <= 24
        assert "96 runs: 60 failed, 1 running, 35 waiting" in lines[-1]
        assert [line.split()[2] for line in lines[3:-2]] == [
            one.row.split()[1] for one in runs[61 - len(lines[3:-2]) : 61]
        ]
        assert "running" in lines[-3]
    assert len(shown()) >= 100
