"""`mops-fl report`: everything that is drawn and tabulated, made again from what runs have left."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.durable import writing
from experiments.report import write_report
from experiments.run_folder import RunFolder
from experiments.sweep_table import write_sweep_report
from mops_fl.errors import InputError

if TYPE_CHECKING:
    from experiments.sweep import Sweep


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `report`."""
    parser.add_argument(
        "paths", metavar="RUN|SWEEP", nargs="+", type=Path,
        help="folder that a run has left, or a sweep's TOML file, such as experiments/tables/dolly_federated.toml",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="where the run folders of sweeps are (default: as each file says)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the report of each folder and print where; write the tables of each sweep and print them.

    Returns:
        The exit code, 0.

    Raises:
        InputError: one is neither a run folder nor a sweep, a file of a run is corrupt, a folder cannot be written, or
            an output is named without a sweep.
    """
    files = [path for path in args.paths if path.suffix == ".toml"]
    sweeps = _read_sweeps(files, args.output) if files else []
    runs = [RunFolder.open(path) for path in args.paths if path.suffix != ".toml"]
    if args.output and not sweeps:
        raise InputError(
            "--output is where the run folders of sweeps are, and no sweep is named; leave it out, since a run's "
            "report is written into the run's folder."
        )
    for folder in runs:
        with writing(folder.path, "mend its permissions, or copy it and report on the copy", InputError):
            report = write_report(folder)
        print(report)
    for sweep in sweeps:
        print(write_sweep_report(sweep) + f"\nwritten: {sweep.output / sweep.name}.md")
    return 0


def _read_sweeps(files: Sequence[Path], output: Path | None) -> list[Sweep]:
    from experiments.sweep import read_sweep  # slow to import, and not needed to report on runs

    return [read_sweep(path, output) for path in files]
