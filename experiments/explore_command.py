"""`mops-fl explore`: a page that asks trained runs and their bare model the same, and shows what the gate decides."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import warnings
from pathlib import Path

from experiments.adapter_options import add_backbone_options
from experiments.run_folder import RunFolder
from mops_fl.errors import InputError

PORT = 7860


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `explore`."""
    add_backbone_options(parser)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="run folders, all of one backbone")
    parser.add_argument(
        "--port", metavar="N", type=int, default=PORT, help="0: any free one (default: %(default)s); loopback only"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Load the models and serve the page until Ctrl-C.

    Returns:
        The exit code, 0.

    Raises:
        InputError: gradio is missing, the port cannot be used, a run is none or has no readable adapter, they are of
            different backbones, or the backbone is missing.
    """
    if importlib.util.find_spec("gradio") is None:
        raise InputError("The page needs gradio, which is not installed: pip install 'mops-fl[explore]'.")
    if not 0 <= args.port <= 65535:
        raise InputError(f"`port` is {args.port}; it must be between 0 and 65535.")
    runs = [RunFolder.open(path) for path in args.runs]
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # gradio shows its own to users
    from experiments.explore_answers import Answerer
    from experiments.explore_models import load_exhibits, require_one_backbone
    from experiments.explore_page import build_page
    from experiments.explore_server import build_app, listen, serve

    require_one_backbone(runs)
    with listen(args.port) as listener:
        print(f"loading {len(runs)} runs on one backbone ...", file=sys.stderr)
        exhibits = load_exhibits(runs, args.backbone, args.device, args.dtype)
        answerer = Answerer(exhibits)
        try:
            serve(build_app(build_page(exhibits, answerer), runs), listener)
        finally:
            answerer.close()
    return 0
