"""`mops-fl deploy-demo`: a whole deployment on this machine's loopback, from fresh keys to the result.

A SuperLink and SuperNodes with TLS and authentication, each SuperNode with a data file of its own, as different
organisations would run them, see docs/deployment.md. Nothing is left but the run folder.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import numpy as np
import tomli_w
from flwr.common.config import parse_config_args
from rich.console import Console
from rich.table import Table

from experiments.app_folder import AppFolder
from experiments.compress_command import prune_if_missing
from experiments.config import ExperimentConfig
from experiments.deployment import CONNECTION, DeploymentError, LocalDeployment
from experiments.measurements import series
from experiments.run_folder import CONFIG, RunFolder, output_dir, require_empty
from experiments.signals import exit_code, raise_on_signals
from mops_fl.compressed import resolve_model
from mops_fl.config import Scalar
from mops_fl.data import DOLLY_TASKS, Row, read_dolly
from mops_fl.errors import InputError
from mops_fl.recipe import PruningRecipe
from mops_fl.sources import resolve_dolly
from partitioning import OWN_ROWS
from partitioning.registry import PartitionConfig, partition_rows

SERVER_ROWS_PER_TASK = 20
CLIENT_ROWS = 100
# What the demo decides itself, and the option that it goes by.
OWN_KEYS = {
    "num-clients": "--nodes", "num-server-rounds": "--rounds", "data-path": "--data", "server-rows": "",
    "partitioner": "", "evaluate-on": "",
}  # fmt: skip
# What `flwr run --stream` says beside what the run itself prints.
_CHATTER = re.compile(r"(\x1b\[\d+m)?(INFO|WARNING) ?(\x1b\[0m)?:|Using SuperLink|Successfully (started|installed)")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `deploy-demo`."""
    parser.add_argument(
        "--app", default="experiments.dolly", metavar="NAME", help="an app on Dolly (default: %(default)s)"
    )
    parser.add_argument("--data", type=Path, metavar="FILE", help="rows in Dolly's columns, cut into the nodes' files")
    parser.add_argument("--nodes", type=int, default=3, help="SuperNodes (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds (default: %(default)s)")
    parser.add_argument("--insecure", action="store_true", help="without TLS and authentication")
    parser.add_argument(
        "-c", "--run-config", action="append", default=[], metavar="TEXT", help='"key=value key=value" or a TOML file'
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Deploy, run, show the result, end everything.

    Returns:
        The exit code: 0 done, 1 failed, 130 Ctrl-C, 143 SIGTERM.

    Raises:
        InputError: the options, the data or the configuration cannot be used.
    """
    run_config = _run_config(args)
    console = Console(soft_wrap=True, highlight=False)
    raise_on_signals()
    with tempfile.TemporaryDirectory(prefix="mops-") as scratch:
        deployment = LocalDeployment(Path(scratch), insecure=args.insecure)
        try:
            with deployment:
                files = cut_data(args.data, Path(scratch), args.nodes, int(run_config["seed"]))
                run_config["data-path"] = str(files[0])
                # By its key the nodes, which do not have the server's rows, know it among others of the recipe.
                run_config["compression"] = prune_if_missing(run_config, lambda line: console.print(line, markup=False))
                _start(deployment, files, console)
                _run(deployment, AppFolder.find(args.app), run_config)
            output = output_dir(run_config)
            if not (output / CONFIG).is_file():
                raise DeploymentError("The run did not even begin")
            _show(RunFolder.open(output), console)
            return 0
        except DeploymentError as error:
            code, reason = 1, str(error)
        except KeyboardInterrupt as interrupt:
            code, reason = exit_code(interrupt), "interrupted"
        print(f"mops-fl deploy-demo: {reason}; the logs end with", file=sys.stderr)
        print(deployment.tails(), file=sys.stderr)
        return code


def cut_data(data: Path | None, folder: Path, num_nodes: int, seed: int) -> list[Path]:
    """Cut a file into one for the server and one for each node, of other rows and with another mixture of tasks each.

    Args:
        data: rows in Dolly's columns; None: what `mops_fl.sources.resolve_dolly` finds.
        folder: where the files go.
        num_nodes: SuperNodes.
        seed: fixes who gets what.

    Returns:
        The server's file, then the nodes'.

    Raises:
        InputError: the file cannot be used, or has no row for one of them.
    """
    source = resolve_dolly(str(data or ""))
    rng = np.random.default_rng(seed)
    rows = [row for row in read_dolly(source.path) if row.task in DOLLY_TASKS]
    shuffled = [rows[i] for i in rng.permutation(len(rows))]
    server: list[Row] = []
    for task in DOLLY_TASKS:
        server += [row for row in shuffled if row.task == task][:SERVER_ROWS_PER_TASK]
    kept = {row.row_id for row in server}
    # From the other end, since of rare tasks the server has all the first ones.
    rest = [row for row in shuffled if row.row_id not in kept][-CLIENT_ROWS * num_nodes :]
    config = PartitionConfig("skewed-shards", num_nodes, seed, skew=5.0, dirichlet_alpha=1.0, shards_per_client=1)
    dealt = partition_rows([row.task for row in rest], config=config) if rest else [[]]
    if not all(dealt):
        raise InputError(
            f"{source.path} has {len(rows)} rows of Dolly's seven tasks, too few for {num_nodes} nodes beside the "
            f"server's {SERVER_ROWS_PER_TASK} of each task; give more rows, or fewer --nodes."
        )
    stem = source.path.name.partition(".")[0]
    parts = {f"{stem}-server": server}
    parts |= {f"{stem}-site-{number}": [rest[index] for index in rows] for number, rows in enumerate(dealt)}
    paths = [folder / f"{name}.jsonl" for name in parts]
    for path, part in zip(paths, parts.values(), strict=True):
        path.write_text("".join(_line(row) for row in part), encoding="utf-8")
    return paths


def _line(row: Row) -> str:
    fields = {name: getattr(row, name) for name in ("instruction", "context", "response")}
    return json.dumps({**fields, "category": row.task}) + "\n"


def _run_config(args: argparse.Namespace) -> dict[str, Scalar]:
    values = AppFolder.find(args.app).run_config(args.run_config)
    given = {key for text in args.run_config for key in parse_config_args([text])}
    if own := [f"`{key}`{option and f' (give {option})'}" for key, option in OWN_KEYS.items() if key in given]:
        raise InputError(f"deploy-demo itself sets {', '.join(own)}; take that out of --run-config.")
    if values["resume"]:
        raise InputError("deploy-demo deploys anew each time and cannot go on with a run; take `resume` out.")
    if values["dataset"] != "dolly":
        raise InputError(f"deploy-demo cuts a file in Dolly's columns, but {args.app} is on {values['dataset']}.")
    values |= {
        "num-clients": args.nodes,
        "num-server-rounds": args.rounds,
        "server-rows": SERVER_ROWS_PER_TASK * len(DOLLY_TASKS),
        "partitioner": OWN_ROWS,
        "evaluate-on": "clients",
        "output-dir": str(output_dir(values)),
    }
    if "clients-per-round" not in given:
        values["clients-per-round"] = min(args.nodes, int(values["clients-per-round"]))
    backbone = ExperimentConfig.from_run_config(values).client.backbone
    if backbone.compression == "none" or PruningRecipe.parse(backbone.compression).key:
        resolve_model(backbone)  # one that no key names depends on the server's rows, which are yet to be cut
    require_empty(output_dir(values))
    return values


def _start(deployment: LocalDeployment, files: Sequence[Path], console: Console) -> None:
    security = "without TLS and authentication" if deployment.insecure else "TLS, SuperNodes authenticated by key"
    console.print(f"starting a SuperLink and {len(files) - 1} SuperNodes on 127.0.0.1: {security}")
    console.print(f"  server: {files[0].name}, {_count(files[0])} rows to pretrain on")
    deployment.start_superlink()
    cores = sorted(os.sched_getaffinity(0))
    for number, path in enumerate(files[1:]):
        deployment.register(f"site-{number}")
        # Machines of their own would not get into each other's way.
        share = cores[number :: len(files) - 1] or [cores[number % len(cores)]]
        deployment.start_supernode(f"site-{number}", {"data-path": str(path)}, cores=share)
        console.print(f"  site-{number}: {path.name}, {_count(path)} rows that stay there")


def _count(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def _run(deployment: LocalDeployment, app: AppFolder, run_config: Mapping[str, Scalar]) -> None:
    """`flwr run`, as a user would, until it ends or a process of the deployment does."""
    with tempfile.NamedTemporaryFile("w", suffix=".toml", dir=deployment.folder) as values:
        values.write(tomli_w.dumps(run_config))
        values.flush()
        command = ["flwr", "run", str(app.path), CONNECTION, "--stream", "--run-config", values.name]
        process = subprocess.Popen(
            command,
            env=deployment.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        assert process.stdout is not None
        reader = threading.Thread(target=_pass_on, args=[process.stdout], daemon=True)
        reader.start()
        try:
            while process.poll() is None:
                deployment.check()
                time.sleep(0.2)
        finally:
            process.terminate()
            process.wait()
            reader.join()


def _pass_on(stream: IO[str]) -> None:
    for line in stream:
        if not _CHATTER.match(line) and line.strip():
            print(line, end="", flush=True)


def _show(folder: RunFolder, console: Console) -> None:
    """What the rounds took, and where everything is.

    Raises:
        DeploymentError: the run did not go to its end.
    """
    table = Table(title="Rounds")
    for column in ("round", "seconds", "loss"):
        table.add_column(column, justify="right")
    metrics = folder.metrics()
    seconds, losses = (series(metrics, name, split="train") for name in ("round-seconds", "loss"))
    for took, loss in zip(seconds, losses, strict=False):  # the run may have ended between the two
        table.add_row(str(took.round), f"{took.value:.1f}", f"{loss.value:.3f}")
    console.print(table)
    console.print(f"run folder: {folder.path}")
    status = (folder.summary or {}).get("status")
    if status != "complete":
        raise DeploymentError(f"The run is {status or 'cut off before its first round'}")
