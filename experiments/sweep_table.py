"""What a sweep came to: perplexity beside the paper's, gains, what reaching the first method cost, curves."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.compare import gain_percent
from experiments.report import NOTHING, bytes_text, percent_text, perplexity_text, seconds_text
from experiments.run_folder import ALL_TASKS, RunFolder
from experiments.sweep import Planned, Sweep
from experiments.sweep_plot import plot_sweep


def write_sweep_report(sweep: Sweep) -> str:
    """Write a sweep's tables and curves beside its run folders, from those that are complete.

    Returns:
        The text of the tables, Markdown.
    """
    finished = {(row, method): _finished(sweep.of(row, method)) for row in sweep.rows for method in sweep.methods}
    sweep.output.mkdir(parents=True, exist_ok=True)
    text = sweep_markdown(sweep, finished)
    if plot_sweep(finished, sweep.output / f"{sweep.name}.png"):
        text += f"\n![Test perplexity over client steps]({sweep.name}.png)\n"
    (sweep.output / f"{sweep.name}.md").write_text(text, encoding="utf-8")
    return text


def sweep_markdown(sweep: Sweep, finished: Mapping[tuple[str, str], Sequence[RunFolder]]) -> str:
    """The tables of a sweep, given the complete runs of each row and method."""
    first = sweep.methods[0]
    lines = [f"## {sweep.title}", "", _perplexity_note(sweep), "", *_data_warning(finished)]
    gains = [f"{method} against {first}" for method in sweep.methods[1:]]
    lines += [_line(["", "bare model", *sweep.methods, *gains]), _line(["---"] * (2 + len(sweep.methods) + len(gains)))]
    for row in sweep.rows:
        runs = [finished[row, method] for method in sweep.methods]
        cells = [
            _cell(of_method, sweep.paper.get(row, {}).get(method))
            for method, of_method in zip(sweep.methods, runs, strict=True)
        ]
        bare = next((run.results()["perplexity_bare"][ALL_TASKS] for of in runs for run in of), None)
        gain = [percent_text(_gain(runs[0], of_method)) for of_method in runs[1:]]
        lines.append(_line([row, perplexity_text(bare), *cells, *gain]))
    lines += [
        "",
        f"Cost of reaching {first}'s mean final perplexity (first measurement at or below it, first seed):",
        "",
    ]
    lines += [_line(["", "method", "client steps", "seconds", "sent by the clients"]), _line(["---"] * 5)]
    for row in sweep.rows:
        target = _mean(finished[row, first])
        for method in sweep.methods:
            for run in finished[row, method][:1]:
                lines.append(_line([row, method, *_cost_to(run, target)]))
    return "\n".join(lines) + "\n"


def _perplexity_note(sweep: Sweep) -> str:
    seeds = len({run.seed for run in sweep.runs})
    spread = ", mean ± standard deviation over seeds" if seeds > 1 else ", one seed"
    papers = "; in brackets the paper's, of another model and more steps" if sweep.paper else ""
    return f"Test perplexity after training{spread}{papers}."


def _data_warning(finished: Mapping[tuple[str, str], Sequence[RunFolder]]) -> list[str]:
    """What is said of the runs' rows before the tables, if anything."""
    data_of: dict[str, set[object]] = {}
    results = [(row, run.results()) for (row, _), runs in finished.items() for run in runs]
    for row, result in results:
        data_of.setdefault(row, set()).add(result.get("data_sha256"))
    unfair = [row for row, data in data_of.items() if len(data - {None}) > 1]
    sampled = any(result.get("data_is_sample") for _, result in results)
    lines = [f"> Not a fair comparison: the runs of {', '.join(unfair)} are on different data."] if unfair else []
    lines += ["> Some or all runs are on the bundled sample, which is no real data set."] if sampled else []
    return [part for line in lines for part in (line, "")]


def _finished(planned: Sequence[Planned]) -> list[RunFolder]:
    return [run for one in planned if one.status() == "complete" and (run := one.find())]


def _final(run: RunFolder) -> float:
    return float(run.results()["perplexity"][ALL_TASKS])


def _mean(runs: Sequence[RunFolder]) -> float | None:
    return statistics.fmean(map(_final, runs)) if runs else None


def _gain(first: Sequence[RunFolder], other: Sequence[RunFolder]) -> float | None:
    """Of the means over the seeds that both have."""
    common = {run.config["seed"] for run in first} & {run.config["seed"] for run in other}
    means = (_mean([run for run in runs if run.config["seed"] in common]) for runs in (first, other))
    return gain_percent(*means)


def _cell(runs: Sequence[RunFolder], paper: float | None) -> str:
    values = [_final(run) for run in runs]
    text = perplexity_text(_mean(runs)) if values else NOTHING
    if len(values) > 1:
        text += f" ± {perplexity_text(statistics.stdev(values))}"
    return f"{text} ({paper})" if paper is not None else text


def _cost_to(run: RunFolder, target: float | None) -> list[str]:
    """Client steps, seconds and bytes until the test perplexity was first at or below the target."""
    for entry in run.metrics():
        if _is_perplexity(entry) and entry["round"] and entry["value"] is not None and entry["value"] <= (target or 0):
            results = run.results()
            bytes_up = results["bytes_up"] * entry["round"] / results["rounds"]
            return [f"{entry['client-steps']:,}", seconds_text(entry["seconds"]), bytes_text(bytes_up)]
    return ["not reached", NOTHING, NOTHING]


def _is_perplexity(entry: dict[str, Any]) -> bool:
    return (entry["metric"], entry["task"], entry["split"]) == ("perplexity", ALL_TASKS, "test")


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
