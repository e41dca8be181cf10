"""`mops-fl compress`: prune the backbone once, on the server's rows, into the cache."""

import argparse
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from clients.config import ClientConfig
from clients.row_owners import RowOwners
from experiments.app_folder import AppFolder
from mops_fl.compressed import (
    NotPrunedError,
    SeveralPrunedError,
    calibrated_on,
    read_compression_receipt,
    resolve_model,
)
from mops_fl.config import Scalar, require_at_least
from mops_fl.recipe import PruningRecipe

CALIBRATION_ROWS, CALIBRATION_LENGTH = 64, 512


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `compress`."""
    parser.add_argument(
        "--recipe", metavar="RECIPE", required=True, help="such as sparsegpt:75%%, sparsegpt:2:4 or wanda:7:8"
    )
    parser.add_argument("--backbone", metavar="NAME", help="hub id or local folder (default: the app's)")
    parser.add_argument("--data", metavar="FILE", help="rows to calibrate on, as in a run (default: the app's)")
    parser.add_argument(
        "--app", metavar="APP", default="experiments.dolly", help="whose server rows are meant (default: %(default)s)"
    )
    parser.add_argument(
        "--run-config", metavar="VALUES", action="append", default=[], help='as for a run, such as "data-seed=1"'
    )
    parser.add_argument(
        "--calibration-rows", metavar="N", type=int, default=CALIBRATION_ROWS, help="(default: %(default)s)"
    )
    parser.add_argument(
        "--calibration-length",
        metavar="N",
        type=int,
        default=CALIBRATION_LENGTH,
        help="most tokens of each (default: %(default)s)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prune, unless that was done before, and print what came out.

    Returns:
        The exit code, 0.

    Raises:
        InputError: If a value is wrong, or model, data or llmcompressor are missing.
    """
    recipe = PruningRecipe.parse(args.recipe)
    run_config = AppFolder.find(args.app).run_config(args.run_config)
    given = {"backbone": args.backbone, "data-path": args.data, "compression": args.recipe}
    run_config |= {key: value for key, value in given.items() if value is not None}
    config = ClientConfig.from_run_config(run_config)
    backbone = config.backbone.backbone
    require_at_least("calibration-rows", args.calibration_rows, 1)
    require_at_least("calibration-length", args.calibration_length, 16)

    # Slow imports, not needed to refuse a wrong value.
    from mops_fl.compression import Calibration, compress

    console = Console(highlight=False)
    data = RowOwners(config, own_data="").data
    console.print(f"{backbone}, {recipe}, calibrated on rows of the server's: {data.description}", markup=False)
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("loading", total=None)
        calibration = Calibration(args.calibration_rows, args.calibration_length)
        folder = compress(
            backbone,
            recipe,
            data,
            config.data,
            calibration,
            lambda line: bar.update(task, description=line) if console.is_terminal else console.print(line),
        )
    console.print(_table(read_compression_receipt(folder)))
    console.print(str(folder), markup=False, soft_wrap=True)
    return 0


def prune_if_missing(run_config: Mapping[str, Scalar], say: Callable[[str], None]) -> str:
    """Prune the backbone that a run-config names as its `compression` says, unless that was done on its server's rows.

    Returns:
        The `compression`, with the key of the model if there is one alone that was pruned on those rows.

    Raises:
        InputError: model, data or llmcompressor are missing.
    """
    config = ClientConfig.from_run_config(run_config)
    backbone = config.backbone
    if backbone.compression == "none":
        return backbone.compression
    from mops_fl.compression import Calibration, compress

    data = RowOwners(config, own_data="").data
    try:
        resolve_model(calibrated_on(data, backbone))
    except SeveralPrunedError:
        pass  # the run says which there are
    except NotPrunedError:
        recipe = PruningRecipe.parse(backbone.compression)
        if recipe.key:  # what is made here would be another one
            raise
        compress(
            backbone.backbone,
            recipe,
            data,
            config.data,
            Calibration(CALIBRATION_ROWS, CALIBRATION_LENGTH),
            say,
        )
    return calibrated_on(data, backbone).compression


def _table(receipt: Mapping[str, Any]) -> Table:
    table = Table(title=f"{receipt['backbone']} pruned by {receipt['recipe']}, key {receipt['key']}", show_header=False)
    calibration, perplexity, sizes = receipt["calibration"], receipt["perplexity"], receipt["bytes"]
    sparsity = [layer["sparsity"] for layer in receipt["layers"].values()]
    table.add_row(
        "zeros", f"{receipt['sparsity']:.2%} of {len(sparsity)} matrices, {min(sparsity):.2%} to {max(sparsity):.2%}"
    )
    patterns = [layer["pattern"] for layer in receipt["layers"].values() if "pattern" in layer]
    if patterns:
        table.add_row("pattern", f"in every group of {sum(patterns)} of {len(patterns)} matrices")
    table.add_row(
        "perplexity, no prompts",
        f"{perplexity['before']:.2f} dense, {perplexity['after']:.2f} pruned, on {perplexity['rows']} rows",
    )
    table.add_row("calibration", f"{calibration['rows']} rows, {calibration['tokens']} tokens")
    table.add_row("size", f"{sizes['dense'] / 1e6:.0f} MB as stored, {sizes['sparse'] / 1e6:.0f} MB if stored sparse")
    table.add_row("pruning", f"{receipt['seconds']:.0f} s")
    for warning in receipt["warnings"]:
        table.add_row("warning", warning)
    return table
