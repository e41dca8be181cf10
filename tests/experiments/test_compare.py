"""Gains, spreads and warnings of a comparison, against figures worked out by hand."""

from __future__ import annotations

import math
from argparse import ArgumentParser
from pathlib import Path

import pytest

from experiments import compare
from mops_fl.errors import InputError


def rows(table: compare.ComparisonTable, block: int) -> dict[str, list[str]]:
    return {label: cells for label, *cells in table.blocks[block].rows}


def run_command(*arguments: object) -> int:
    parser = ArgumentParser()
    compare.add_options(parser)
    args = parser.parse_args(list(map(str, arguments)))
    return args.run(args)


def test_gain_is_positive_for_a_lower_perplexity() -> None:
    assert compare.gain_percent(20.0, 15.0) == 25.0
    assert compare.gain_percent(20.0, 22.0) == pytest.approx(-10.0)
    assert compare.gain_percent(None, 22.0) is None


def test_table_has_perplexity_gain_and_cost_of_every_run(make_run) -> None:
    first = make_run("a", after=20.0, method="fedprompt")
    (table,) = compare.comparison_tables([first, make_run("b", after=15.0)])
    assert table.columns == ["", "FedPrompt, seed 1", "MoPs, seed 1"]
    perplexity, gain, cost = (rows(table, block) for block in range(3))
    assert list(perplexity)[-1] == "all tasks"
    assert perplexity["all tasks"] == ["20.00", "15.00"]
    assert perplexity["creative writing"] == ["14.00", "10.50"]
    of_tasks = [value for task, value in first.results()["perplexity"].items() if task != "all"]
    alike = math.prod(of_tasks) ** (1 / len(of_tasks))
    assert perplexity["each task alike"] == [f"{alike:.2f}", f"{0.75 * alike:.2f}"]
    assert gain["all tasks"] == [compare.NOTHING, "+25.0 %"]
    assert cost["client steps"] == ["400", "400"]
    assert cost["trainable parameters"] == ["77,447", "77,447"]
    assert cost["sent by the clients"] == ["62 MB", "62 MB"]
    assert cost["training time"] == ["12 min 34 s", "12 min 34 s"]


def test_seeds_of_one_configuration_are_joined_to_mean_and_spread(make_run) -> None:
    runs = [make_run(f"f{seed}", after=after, seed=seed, method="fedprompt")
            for seed, after in ((1, 18.0), (2, 20.0), (3, 22.0))]  # fmt: skip
    runs += [make_run("m1", after=16.0), make_run("m2", after=14.0, seed=2)]
    _, table = compare.comparison_tables(runs)
    assert table.columns == ["", "FedPrompt, 3 seeds", "MoPs, 2 seeds"]
    # 18, 20, 22: mean 20, sample deviation 2. 16, 14: mean 15, deviation sqrt(2). Of seeds 1 and 2: 19 and 15.
    assert rows(table, 0)["all tasks"] == ["20.00 ± 2.00 (18.00-22.00)", "15.00 ± 1.41 (14.00-16.00)"]
    assert rows(table, 1)["all tasks"] == [compare.NOTHING, "+21.1 %"]


def test_no_gain_without_a_seed_that_both_have(make_run) -> None:
    runs = [make_run("a"), make_run("b", seed=2), make_run("c", method="fedprompt", seed=3)]
    _, table = compare.comparison_tables(runs)
    assert rows(table, 1)["all tasks"] == [compare.NOTHING, compare.NOTHING]


def test_key_that_only_newer_runs_have_does_not_part_seeds(make_run) -> None:
    runs = [make_run("old"), make_run("new", seed=2, gate_temperature=1.0)]
    runs.append(make_run("other", seed=3, gate_temperature=4.0))
    assert [[run.path.name for run in group.runs] for group in compare.seed_groups(runs)] == [["old", "new"], ["other"]]


@pytest.mark.parametrize(("sha256", "num_groups"), [("same", 1), ("other", 2), (None, 2)])
def test_same_data_under_another_path_does_not_part_seeds(make_run, sha256: str | None, num_groups: int) -> None:
    first = make_run("a", summary={"data_sha256": "same"}, data_path="here.jsonl.gz")
    second = make_run("b", summary={"data_sha256": sha256} if sha256 else {}, data_path="there.jsonl.gz", seed=2)
    assert len(compare.seed_groups([first, second])) == num_groups


def test_a_seed_that_was_run_again_counts_once_in_mean_and_gain(make_run) -> None:
    runs = [make_run("first1", after=10.0, method="fedprompt"), make_run("first2", after=20.0, seed=2,
                                                                         method="fedprompt")]  # fmt: skip
    runs += [make_run("a", after=9.0), make_run("again", after=11.0), make_run("b", after=20.0, seed=2)]
    _, table = compare.comparison_tables(runs)
    assert table.columns[1:] == ["FedPrompt, 2 seeds", "MoPs, 2 seeds in 3 runs"]
    assert rows(table, 0)["all tasks"] == ["15.00 ± 7.07 (10.00-20.00)"] * 2  # seed 1: 10, the mean of its two
    assert rows(table, 1)["all tasks"] == [compare.NOTHING, "+0.0 %"]


def test_another_rate_is_another_group(make_run) -> None:
    runs = [make_run("a", lr=0.01), make_run("b", lr=0.01, seed=2), make_run("c", lr=0.03)]
    groups = compare.seed_groups(runs)
    assert [(group.label, len(group.runs)) for group in groups] == [("MoPs, lr 0.01", 2), ("MoPs, lr 0.03", 1)]


def test_methods_rates_and_seeds_may_differ_without_a_warning(make_run) -> None:
    runs = [make_run("a"), make_run("b", method="fedprompt", lr=0.03), make_run("c", method="fedprompt", seed=2)]
    assert compare.fairness_warning(runs) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"summary": {"client_steps": 4000}}, "client steps (400 / 4,000)"),
        ({"dataset": "super_ni"}, "dataset (dolly / super_ni)"),
        ({"summary": {"data_is_sample": True}}, "dataset (dolly / dolly, bundled sample)"),
        ({"backbone": "other"}, "backbone (HuggingFaceTB/SmolLM2-135M-Instruct / other)"),
        ({"quantization": "int8"}, "quantization (none / int8)"),
        ({"eval_rows": 210}, "rows (eval-rows 0 / 210)"),
        ({"data_seed": 7}, "rows (data-seed 0 / 7)"),
        ({"num_clients": 50}, "num-clients (100 / 50)"),
        ({"clients_per_round": 5}, "clients-per-round (10 / 5)"),
        ({"skew": 1.0}, "skew (15.0 / 1.0)"),
        ({"partitioner": "iid"}, "partitioner (skewed-shards / iid)"),
        ({"batch_size": 4}, "batch-size (1 / 4)"),
        ({"server_weight": 1.0}, "server-weight (0.0 / 1.0)"),
        ({"local_steps": 80}, "local-steps (8 / 80)"),
        ({"evaluate_on": "clients"}, "rows (evaluate-on server / clients)"),
        ({"held_out_tasks": "open_qa"}, "rows (held-out-tasks '' / open_qa)"),
        ({"summary": {"training": "central"}}, "training (federated / central)"),
        ({"summary": {"dtype": "float32"}}, "dtype (bfloat16 / float32)"),
        ({"bare": 61.0}, "perplexity of the bare model (60.00 / 61.00)"),
        ({"summary": {"status": "interrupted"}}, "status (complete / interrupted)"),
    ],
)
def test_what_makes_a_comparison_unfair_is_named_in_one_line(make_run, change, said: str) -> None:
    usual = {"skew": 15.0, "partitioner": "skewed-shards", "batch_size": 1, "server_weight": 0.0, "held_out_tasks": ""}
    usual |= {"local_steps": 8, "evaluate_on": "server"}
    first = make_run("a", summary={"dtype": "bfloat16"}, **usual)
    warning = compare.fairness_warning([first, make_run("b", **{**usual, **change})])
    assert warning == f"Not a fair comparison, the runs differ in: {said}."


def test_command_writes_table_and_plot_and_says_where(make_run, tmp_path: Path, capsys) -> None:
    runs = [make_run("a", after=20.0), make_run("b", after=15.0, method="fedprompt", eval_rows=210)]
    target = tmp_path / "new" / "output"
    assert run_command(*(run.path for run in runs), "--output", target) == 0
    printed = capsys.readouterr().out
    assert f"written: {target / 'comparison.md'}" in printed
    assert "Not a fair comparison" in printed
    text = (target / "comparison.md").read_text(encoding="utf-8")
    assert "| all tasks | 20.00 | 15.00 |" in text
    assert f"| all tasks | {compare.NOTHING} | +25.0 % |" in text
    assert "> Not a fair comparison" in text
    assert (target / "comparison.png").stat().st_size > 5_000


def test_many_runs_lose_no_figure_in_a_narrow_terminal(make_run, monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    runs = [make_run(f"run{seed}", after=100.0 + seed, seed=seed) for seed in range(9)]
    run_command(*(run.path for run in runs))
    lines = capsys.readouterr().out.splitlines()
    line = next(line for line in lines if line.strip().startswith("all"))
    assert line.split()[-9:] == [f"{100 + seed}.0" for seed in range(9)]


def test_name_of_a_task_is_no_markup(make_run, capsys) -> None:
    perplexity = {"all": 20.0, "qa [easy]": 20.0, "x[/b]": 20.0}
    runs = [make_run(name, summary={"perplexity": perplexity}) for name in ("a", "b")]
    run_command(*(run.path for run in runs))
    printed = capsys.readouterr().out
    assert "qa [easy]" in printed
    assert "x[/b]" in printed


def test_value_that_tells_runs_apart_is_no_markup(make_run, capsys) -> None:
    runs = [make_run("a", tasks="[/x]*"), make_run("b", tasks="y*")]
    run_command(*(run.path for run in runs))
    assert "[/x]*" in capsys.readouterr().out


def test_output_is_beside_the_first_run_unless_named(make_run) -> None:
    runs = [make_run("a"), make_run("b", seed=2)]
    run_command(*(run.path for run in runs))
    assert (runs[0].path.parent / "comparison.md").is_file()


def test_one_run_alone_and_an_output_that_is_a_file_are_refused(make_run, tmp_path: Path) -> None:
    runs = [make_run("a"), make_run("b")]
    with pytest.raises(InputError, match="at least two"):
        run_command(runs[0].path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="choose another --output"):
        run_command(*(run.path for run in runs), "--output", tmp_path / "file")


def test_central_and_federated_runs_are_no_seeds_of_each_other(make_run) -> None:
    federated, central = make_run("a", after=20.0), make_run("b", after=10.0)
    central.write_summary({**central.summary, "training": "central"})
    assert [group.label for group in compare.seed_groups([federated, central])] == [
        "MoPs, training federated",
        "MoPs, training central",
    ]
    (table,) = compare.comparison_tables([federated, central])
    assert table.columns[1:] == ["MoPs, seed 1, training federated", "MoPs, seed 1, training central"]
