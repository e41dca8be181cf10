"""`mops-fl report`: everything that is drawn and tabulated, made again from what runs have left."""

import argparse
from pathlib import Path

from experiments.report import write_report
from experiments.run_folder import RunFolder
from experiments.sweep import read_sweep
from experiments.sweep_table import write_sweep_report
from mops_fl.errors import InputError


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `report` to the parser of `mops-fl`."""
    parser = subparsers.add_parser(
        "report", help="make a run's plots and report.html again, or a sweep's tables and curves"
    )
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
    sweeps = [read_sweep(path, args.output) for path in args.paths if path.suffix == ".toml"]
    runs = [RunFolder.open(path) for path in args.paths if path.suffix != ".toml"]
    if args.output and not sweeps:
        raise InputError(
            "--output is where the run folders of sweeps are, and no sweep is named; leave it out, since a run's "
            "report is written into the run's folder."
        )
    for folder in runs:
        try:
            report = write_report(folder)
        except OSError as error:
            raise InputError(
                f"{folder.path} cannot be written ({error.strerror}); mend its permissions, or copy it and report on "
                "the copy."
            ) from error
        print(report)
    for sweep in sweeps:
        print(write_sweep_report(sweep) + f"\nwritten: {sweep.output / sweep.name}.md")
    return 0
