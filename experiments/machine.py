"""What a run ran on: packages, processor, memory, and the commit of this source tree."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

PACKAGES = ("mops-fl", "flwr", "torch", "transformers", "ray", "datasets", "numpy", "peft")


def versions() -> dict[str, str]:
    """Python and the packages that matter, as installed."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def machine() -> dict[str, str | int]:
    """Platform, processor, cores and memory."""
    return {
        "platform": platform.platform(),
        "processor": _processor_name(),
        "cpus": os.cpu_count() or 1,
        "memory-bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def _processor_name() -> str:
    """The processor's model; Linux tells it only in /proc."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def git_revision() -> dict[str, str]:
    """The commit of this source tree, "-dirty" if changed since; empty where git does not track it."""
    here = Path(__file__)
    git = ["git", "-C", str(here.parent)]
    try:
        # An installed package may lie inside somebody else's repository, whose revision would say nothing.
        subprocess.run([*git, "ls-files", "--error-unmatch", here.name], check=True, capture_output=True)
        described = subprocess.run(
            [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"git-revision": described.stdout.strip()}
