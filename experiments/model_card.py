"""The model card of a run's adapter: a README.md, as repositories on the hub have it, made from the run's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from experiments.measurements import perplexity_rows, task_names
from experiments.plots import gate_maps
from experiments.report import TEMPLATES
from experiments.run_folder import RunFolder
from experiments.wording import backbone_name, method_name, percent_text, perplexity_text, readable
from mops_fl.adapter_folder import AdapterDescription
from mops_fl.config import PROMPTED


def model_card(run: RunFolder, description: AdapterDescription) -> str:
    """Markdown with the data, the protocol, the perplexities and the gate of a run that has ended."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters.update(perplexity=perplexity_text, percent=percent_text, readable=readable)
    summary, metrics = run.results(), run.metrics()
    maps = gate_maps(metrics)
    last = maps[max(maps)] if maps else None
    name = description.backbone.backbone
    return environment.get_template("model_card.md.j2").render(
        description=description,
        method=method_name(summary),
        backbone=backbone_name(summary),
        hub_id="" if Path(name).expanduser().exists() else name,
        dataset=summary["dataset"],
        training=summary["training"],
        parameters=summary["trainable_parameters"],
        data_is_sample=summary["data_is_sample"],
        facts=_facts(run, description),
        rows=perplexity_rows(summary),
        gate=[] if last is None else list(zip(task_names(metrics), last.T.tolist(), strict=True)),
        expert_names=description.expert_names,
    )


def _facts(run: RunFolder, description: AdapterDescription) -> list[tuple[str, Any]]:
    """What was trained, on what, and how, as labels and values."""
    summary, config = run.results(), run.config
    adapter, backbone = description.adapter, description.backbone
    learnt_from = f"{summary['num_clients']} clients, {summary['clients_per_round']} a round, {config['partitioner']}"
    if summary["training"] == "central":
        learnt_from = f"all rows of the {config['central-rows']} together"
    facts: list[tuple[str, Any]] = [
        ("backbone", Path(backbone.backbone).name if Path(backbone.backbone).exists() else backbone.backbone),
        ("SHA-256 of its weights", f"`{description.backbone_sha256}`"),
        ("compression, quantization", f"{backbone.compression}, {backbone.quantization}"),
        ("data", f"{summary['data_description']} ({summary['dataset']})"),
        ("most tokens a row", description.data.max_length),
        ("training", f"{summary['training']}, {summary['rounds']} rounds, {summary['client_steps']} steps in all"),
        ("learnt from", learnt_from),
        ("seed", summary["seed"]),
    ]
    if adapter.method in PROMPTED:
        facts += [
            (
                "prompts",
                f"{adapter.num_experts} experts of {adapter.prompts_per_expert}, before layer {adapter.inject_layer}",
            ),
            ("started as", adapter.prompt_init),
        ]
    if adapter.gated:
        facts += [("gating", adapter.gating), ("gate's input", f"mean over {adapter.pooling}")]
    if adapter.method == "lora":
        facts += [("rank, alpha", f"{adapter.lora_rank}, {adapter.lora_alpha:g}")]
    return facts
