"""`flower-simulation --app experiments.dolly`: virtual clients on this machine, in the foreground.

Flower's own command of this name is gone since 1.27. Like it, this one runs an app's ServerApp and ClientApps on Ray;
unlike `flwr run` it ends with the run, and its exit code says how: 0 done, 1 failed, 2 bad input, 130 Ctrl-C.
"""

import argparse
import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

# Before flwr and ray are imported: they read these at import time.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's default runs the trainer at the lowest priority

# A client actor's own exit at the end of a run, which Ray takes for a failure because failed calls are retried.
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "ClientAppActor.terminate")

from experiments.app_folder import AppFolder
from experiments.config import ExperimentConfig, with_absolute_models
from experiments.display import own_traceback
from experiments.run import mark_interrupted
from experiments.run_folder import RunFolder, output_dir, require_empty
from experiments.runtimes import Backend, run_inline, run_on_ray
from experiments.same_run import require_training
from experiments.signals import exit_code, raise_on_signals
from mops_fl.compressed import SeveralPrunedError, resolve_model
from mops_fl.config import Scalar
from mops_fl.errors import InputError, RunError, refusal
from mops_fl.sources import resolve_data
from partitioning import OWN_ROWS

_BACKENDS: dict[str, Backend] = {"ray": run_on_ray, "inline": run_inline}


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command and end the process; threads of Flower's that still wait for replies must not keep it."""
    code = run(argv)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    args = _parser().parse_args(argv)
    return run_app("flower-simulation", args, _BACKENDS[args.backend], training="federated")


def run_app(program: str, args: argparse.Namespace, backend: Backend, *, training: str) -> int:
    """Run an app, and say in one sentence on the standard error how it ended if not well.

    Args:
        program: the command, as it should call itself.
        args: `app`, `data`, `num_supernodes`, `run_config` and `resume`, as this command's options.
        backend: what carries the run out.
        training: what it does, `federated` or `central`; only a run of that kind can be gone on with.

    Returns:
        The exit code.
    """
    logging.getLogger("flwr").setLevel(logging.CRITICAL)  # the run prints its own progress and failures
    code, message = 0, ""
    try:
        app = AppFolder.find(args.app)
        run_config = _resolve_config(app, args, training)
        backend(app, run_config, catch_signals=raise_on_signals)
    except InputError as error:
        code, message = 2, str(error)
    except RunError as error:
        code, message = 1, own_traceback(str(error))
    except KeyboardInterrupt as interrupt:
        code, message = exit_code(interrupt), "interrupted; go on with --resume"
        mark_interrupted()
    except OSError as error:
        code, message = 1, refusal(error) or traceback.format_exc()
    except Exception:  # the last line of defence: show it, exit with 1
        code, message = 1, traceback.format_exc()
    if message:
        print(f"{program}: {message}", file=sys.stderr)
    return code


def _resolve_config(app: AppFolder, args: argparse.Namespace, training: str) -> dict[str, Scalar]:
    """Every value of the run, paths absolute, checked as far as that goes without loading anything.

    Raises:
        InputError: something is wrong with it.
    """
    if args.resume:
        overrides = [*args.run_config, *filter(None, (args.data, args.num_supernodes))]
        run_config = _resumed_config(args.resume, app.run_config(()), overrides, training)
    else:
        run_config = app.run_config(args.run_config)
        if run_config.get("resume"):
            raise InputError(
                "The key `resume` is for `flwr run`; here, go on with `--resume RUN` in place of --run-config."
            )
        run_config["output-dir"] = str(output_dir(run_config))
    if args.data:
        run_config["data-path"] = str(args.data)
    if args.num_supernodes is not None:
        run_config["num-clients"] = args.num_supernodes
    config = ExperimentConfig.from_run_config(run_config).client
    if training == "federated" and config.partition.partitioner == OWN_ROWS:
        raise InputError(
            f"`partitioner` is {OWN_ROWS!r}, but clients that are simulated have no rows of their own; choose one that "
            "deals rows out, or deploy the app to real clients."
        )
    source = resolve_data(config.data.dataset, config.data.data_path)
    if source.revision is None and not source.is_sample:  # named by data-path or by a variable: recorded either way
        run_config["data-path"] = str(source.path.absolute())
    run_config = with_absolute_models(run_config)
    with contextlib.suppress(SeveralPrunedError):  # the trainer, which knows the data, may tell them apart
        resolve_model(config.backbone)
    if not args.resume:
        require_empty(Path(str(run_config["output-dir"])))
    return run_config


def _resumed_config(
    folder: Path, app_config: dict[str, Scalar], overrides: Sequence[object], training: str
) -> dict[str, Scalar]:
    if overrides:
        raise InputError("--resume goes on with the run's own configuration; leave all other options away.")
    folder = folder.expanduser().absolute()  # no shell does it in `--resume=~/run`
    interrupted = RunFolder.open(folder)
    require_training(interrupted, training)
    run_config = {**app_config, **interrupted.config}
    return {**run_config, "output-dir": str(folder), "resume": True}


def add_app_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of every command that runs an app: which, on what data, with which values."""
    parser.add_argument(
        "--app", required=True, metavar="NAME", help="experiments.dolly, .dolly.fedprompt, .super_ni, or a folder"
    )
    parser.add_argument(
        "--data", type=Path, metavar="PATH", help="a file of rows, or a folder of task files (see data-path)"
    )
    parser.add_argument(
        "-c",
        "--run-config",
        action="append",
        default=[],
        metavar="TEXT",
        help='"key=value key=value" or a TOML file; may be repeated',
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("flower-simulation", description="Simulate a federation on this machine.")
    add_app_options(parser)
    parser.add_argument("--num-supernodes", type=int, metavar="N", help="virtual clients (default: num-clients)")
    parser.add_argument(
        "--backend",
        choices=sorted(_BACKENDS),
        default="ray",
        help="ray, or inline: one process (default: ray)",
    )
    parser.add_argument("--resume", type=Path, metavar="RUN", help="go on with a run folder")
    return parser
