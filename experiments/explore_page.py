"""The page of `mops-fl explore`: a question, answers side by side, what the gates did, the runs' figures."""

from __future__ import annotations

import argparse
from base64 import b64encode
from collections.abc import Iterator, Sequence
from io import BytesIO
from typing import Any

import gradio as gr
from matplotlib.figure import Figure

from experiments.adapter_options import read_generation_options
from experiments.compare import fairness_warning
from experiments.explore_answers import Answerer
from experiments.explore_figures import draw_gate, example_rows, perplexity_table
from experiments.explore_models import Exhibit
from experiments.report import REPORT
from experiments.wording import readable
from mops_fl.errors import InputError

WRITING = "writing …"
# Names that every system has a font for: the page asks nobody for one.
FONTS, MONOSPACE_FONTS = ("system-ui", "sans-serif"), ("ui-monospace", "monospace")
CSS = """
.gradio-container {max-width: min(1320px, 100vw) !important; margin: 0 auto !important}
.note {min-height: 1.6em; opacity: .65; font-size: .9em}
.wide {overflow-x: auto !important}
.wide img {width: 100%; min-width: 640px}
.wide :is(th, td) {white-space: nowrap}
#perplexity table {width: 100%; min-width: 480px; font-variant-numeric: tabular-nums}
#perplexity :is(table, thead, tbody, tr, th, td) {border: 0}
#perplexity :is(th, td) {border-bottom: 1px solid var(--border-color-primary); padding: .35em .8em}
#perplexity :is(th, td):not(:first-child) {text-align: right}
#perplexity tr:last-child td {border-bottom: 0}
"""


def theme() -> gr.themes.Base:
    """Calm colours and the system's own fonts."""
    return gr.themes.Default(primary_hue="blue", neutral_hue="slate", font=FONTS, font_mono=MONOSPACE_FONTS)


def build_page(exhibits: Sequence[Exhibit], answerer: Answerer) -> gr.Blocks:
    """The page for these models; `answerer` computes."""
    runs = [exhibit.run for exhibit in exhibits if exhibit.run]
    labels = [exhibit.label for exhibit in exhibits if exhibit.run]
    page = gr.Blocks(title="mops-fl explore", analytics_enabled=False)
    with page:
        gr.Markdown(_heading(exhibits))
        instruction, context, options, ask, stop = _question(exhibits)
        texts, notes = _answers(exhibits)
        gates = _gates(exhibits)
        gr.Markdown("## Test perplexity of the runs")
        gr.Markdown(perplexity_table(runs, labels), elem_classes="wide", elem_id="perplexity")
        gr.Markdown(_remarks(exhibits))
        shown = [*texts, *notes, *(part for parts in gates.values() for part in parts)]

        def answer(instruction: str, context: str, *values: float) -> Iterator[dict[Any, Any]]:
            """Gates first, then the answers as they grow."""
            question = instruction.strip(), context.strip()
            if not question[0]:
                gr.Warning("Type an instruction first.", title="Nothing to answer")
                yield dict.fromkeys(notes, "")
                return
            generation = _generation_options(*values)
            try:
                scores = answerer.gate_scores(*question)
                yield dict.fromkeys((*texts, *notes), "") | _gate_updates(exhibits, gates, scores)
                for place, text, note in answerer.stream(*question, generation):
                    yield {texts[place]: text, notes[place]: note or WRITING}
            except InputError as error:
                gr.Warning(str(error), title="Not answered")

        asked = gr.on(
            [ask.click, instruction.submit], answer, [instruction, context, *options], shown,
            concurrency_limit=1, show_progress="hidden", api_name="answer",
        )  # fmt: skip
        # An update that was on its way would else write over the note.
        stop.click(None, cancels=[asked]).then(_stopped, notes, notes, api_visibility="private")
    return page


def _stopped(*notes: str) -> list[str]:
    return ["stopped" if note == WRITING else note for note in notes]


def _heading(exhibits: Sequence[Exhibit]) -> str:
    model = exhibits[0].model
    name = model.description.backbone.backbone.rstrip("/").rpartition("/")[2]
    dtype = str(model.dtype).removeprefix("torch.")
    *others, last = (exhibit.label for exhibit in exhibits)
    return (
        f"# Ask the {', '.join(others)} and {last}\n\n"
        f"One question, answers side by side, one model after the other. All share one frozen {name} "
        f"({dtype} on {model.device.type}); nothing leaves this machine."
    )


def _question(exhibits: Sequence[Exhibit]) -> tuple[Any, Any, list[Any], Any, Any]:
    """Instruction, context, sliders, and the buttons that begin and end."""
    with gr.Row():
        instruction = gr.Textbox(label="Instruction", lines=3, max_lines=8, min_width=300, autofocus=True,
                                 placeholder="Shift+Enter asks", elem_id="instruction")  # fmt: skip
        context = gr.Textbox(label="Context, if it is about a text", lines=3, max_lines=8, min_width=300,
                             elem_id="context")  # fmt: skip
    _, model, run = exhibits[1]
    rows = example_rows(run, model.description.data) if run else ()
    if rows:
        gr.Examples(
            [[row.instruction, row.context] for row in rows], [instruction, context], label="Examples, one a task",
            example_labels=[readable(row.task) for row in rows], cache_examples=False,
        )  # fmt: skip
    with gr.Accordion("How answers are made", open=False), gr.Row():
        options = [
            gr.Slider(8, 512, 96, step=8, label="Longest answer, in tokens", min_width=200),
            gr.Slider(0, 2, 0, step=0.1, label="Temperature (0: always the likeliest token)", min_width=200),
            gr.Slider(1, 2, 1.2, step=0.05, label="Penalty on repetition (1: none)", min_width=200),
        ]
    with gr.Row():
        ask = gr.Button("Ask", variant="primary", elem_id="ask", scale=3, min_width=120)
        stop = gr.Button("Stop", elem_id="stop", scale=1, min_width=80)
    return instruction, context, options, ask, stop


def _answers(exhibits: Sequence[Exhibit]) -> tuple[list[Any], list[Any]]:
    """A column for each model: its answer, and how fast it came."""
    texts, notes = [], []
    with gr.Row(equal_height=True):
        for exhibit in exhibits:
            with gr.Column(min_width=280):
                texts.append(gr.Textbox(label=exhibit.label, lines=7, max_lines=18, interactive=False,
                                        buttons=["copy"], elem_classes="answer"))  # fmt: skip
                notes.append(gr.Markdown(elem_classes="note"))
    return texts, notes


def _gates(exhibits: Sequence[Exhibit]) -> dict[int, tuple[Any, Any]]:
    """Place of each exhibit with a gate -> its bars and its map."""
    gates = {}
    for place, (label, model, run) in enumerate(exhibits):
        names = model.description.expert_names
        if run and names:
            gr.Markdown(
                f"## What the gate of {label} does\n\n"
                "The bars say how much each expert counts for this input. The map shows the same, framed, beside the "
                "means over the test rows of each task when the run was last evaluated."
            )
            with gr.Row():
                bars = gr.Label(label="weights of the experts for this input", show_label=False, scale=2,
                                num_top_classes=len(names), show_heading=False, min_width=300,
                                elem_id=f"gate-{place}")  # fmt: skip
                with gr.Column(scale=5, min_width=300):
                    heat_map = gr.HTML(_image(draw_gate(run, names, None)), elem_classes="wide")
            gates[place] = (bars, heat_map)
    return gates


def _gate_updates(
    exhibits: Sequence[Exhibit], gates: dict[int, tuple[Any, Any]], scores: Sequence[list[float] | None]
) -> dict[Any, Any]:
    """What the bars and maps show for one input's scores."""
    updates: dict[Any, Any] = {}
    for place, (bars, heat_map) in gates.items():
        names, run = exhibits[place].model.description.expert_names, exhibits[place].run
        own = scores[place]
        if run is None or own is None:
            continue
        updates[bars] = {readable(name): score for name, score in zip(names, own, strict=True)}
        updates[heat_map] = _image(draw_gate(run, names, own))
    return updates


def _image(figure: Figure | None) -> str:
    """A figure as HTML that needs no file."""
    if figure is None:
        return ""
    png = BytesIO()
    figure.savefig(png)
    source = b64encode(png.getvalue()).decode("ascii")
    return f'<img alt="mean gate scores by task, and those of this input" src="data:image/png;base64,{source}">'


def _remarks(exhibits: Sequence[Exhibit]) -> str:
    """Whether the runs can be compared, and where more stands about each."""
    runs = [exhibit.run for exhibit in exhibits if exhibit.run]
    reports = [
        f"[{exhibit.label}](report/{number})"
        for number, exhibit in enumerate(exhibit for exhibit in exhibits if exhibit.run)
        if exhibit.run and (exhibit.run.path / REPORT).is_file()
    ]
    lines = [fairness_warning(runs) or "", f"Reports: {', '.join(reports)}" if reports else ""]
    return "\n\n".join(line for line in lines if line)


def _generation_options(max_new_tokens: float, temperature: float, repetition_penalty: float) -> dict[str, Any]:
    return read_generation_options(
        argparse.Namespace(
            max_new_tokens=int(max_new_tokens), temperature=temperature, repetition_penalty=repetition_penalty,
            top_p=1.0, beams=1, stop=None, seed=None,
        )
    )  # fmt: skip
