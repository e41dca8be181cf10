"""`mops-fl train`: central training of what an app would train in a federation."""

import argparse
from pathlib import Path

from experiments.central_run import run_centrally
from experiments.simulation import run_app


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `train` to the parser of `mops-fl`."""
    parser = subparsers.add_parser("train", help="train centrally, on all rows, for as many steps as a federation")
    parser.add_argument("--app", required=True, metavar="NAME", help="experiments.dolly, .dolly.lora, ..., or a folder")
    parser.add_argument("--data", type=Path, metavar="PATH", help="as for flower-simulation")
    parser.add_argument(
        "-c",
        "--run-config",
        action="append",
        default=[],
        metavar="TEXT",
        help='"key=value key=value" or a TOML file; may be repeated',
    )
    parser.set_defaults(run=run, num_supernodes=None, resume=None)


def run(args: argparse.Namespace) -> int:
    """Train; returns the exit code, as flower-simulation's."""
    return run_app("mops-fl train", args, run_centrally, resumable=False)
