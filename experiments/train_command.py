"""`mops-fl train`: central training of what an app would train in a federation."""

import argparse
from pathlib import Path

from experiments.central_run import run_centrally
from experiments.simulation import add_app_options, run_app


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `train`."""
    add_app_options(parser)
    parser.add_argument("--resume", type=Path, metavar="RUN", help="go on with a run folder")
    parser.set_defaults(run=run, num_supernodes=None)


def run(args: argparse.Namespace) -> int:
    """Train; returns the exit code, as flower-simulation's."""
    return run_app("mops-fl train", args, run_centrally, training="central")
