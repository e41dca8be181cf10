"""The folder a run leaves behind; every table, plot and report is made from it alone."""

from __future__ import annotations

import fcntl
import json
import math
import os
import sys
import tomllib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import tomli_w

from experiments.durable import PARTIAL, write_durably, writing
from experiments.machine import git_revision, machine, versions
from mops_fl.config import Scalar
from mops_fl.errors import InputError, RunError

CONFIG = "config.toml"
METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
PARTITION = "partition.json"
RELEASES = "releases.json"
LOCK = ".lock"
COPIED = ("method", "backbone", "compression", "quantization", "dataset", "seed")
ALL_TASKS = "all"

T = TypeVar("T")


class RunFolder:
    """One run's folder; only its configuration is kept in memory, so a run can be read while it writes."""

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        """Take the folder ``path`` whose config.toml says ``manifest``; see ``create`` and ``open``."""
        self.path = path
        self.manifest = manifest

    @classmethod
    def create(cls, path: Path, config: Mapping[str, Scalar]) -> RunFolder:
        """Make a new run folder and write its config.toml.

        Args:
            path: a folder that does not exist yet, or is empty.
            config: every resolved run-config value, by its kebab-case name.

        Raises:
            InputError: if the folder holds something already, or cannot be written.
        """
        require_empty(path)
        run = cls(path, _process())
        try:
            with writing(path):
                path.mkdir(parents=True, exist_ok=True)
            run.write_config(config)
        except RunError as error:
            reason = error.__cause__.strerror if isinstance(error.__cause__, OSError) else error
            raise InputError(
                f"The run folder {path} cannot be written ({reason}); choose another output-dir."
            ) from error
        return run

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Open an existing run folder, and read each of its files once to find out that they are whole.

        Raises:
            InputError: if ``path`` is no run folder, or a file in it is corrupt (the message names the file).
        """
        if not (path / CONFIG).is_file():
            raise InputError(f"{path} is not a run folder (it has no {CONFIG}); name a folder that a run has left.")
        manifest = _read(path / CONFIG, tomllib.loads)
        if not isinstance(manifest.get("config"), dict):
            raise InputError(f"{path / CONFIG} has no [config] table; restore it or run again.")
        run = cls(path, manifest)
        _ = run.summary, run.partition, run.releases(), run.metrics()
        return run

    @property
    def config(self) -> dict[str, Scalar]:
        """Every resolved run-config value, by its kebab-case name."""
        return dict(self.manifest["config"])

    @property
    def summary(self) -> dict[str, Any] | None:
        """What summary.json says, or None as long as the run's start has not been measured."""
        return self._read_json(SUMMARY)

    @property
    def partition(self) -> dict[str, Any] | None:
        """What partition.json says about which client owns which rows, or None if there is no such file."""
        return self._read_json(PARTITION)

    def log(
        self,
        *,
        round: int,
        client_steps: int,
        split: str,
        task: str,
        metric: str,
        value: float,
        seconds: float,
    ) -> None:
        """Append one line to metrics.jsonl; a value that is not finite becomes ``null``.

        Args:
            round: 0 before training, then from 1.
            client_steps: optimiser steps that all clients together have made so far.
            split: "train" or "test".
            task: a task's name, or "all" for the whole set.
            metric: such as "perplexity" or "gate-expert-0".
            value: what was measured.
            seconds: since the start of the run.
        """
        entry = {
            "round": round,
            "client-steps": client_steps,
            "split": split,
            "task": task,
            "metric": metric,
            "value": float(value),
            "seconds": float(seconds),
        }
        line = json.dumps(only_finite(entry), allow_nan=False) + "\n"
        with writing(self.path / METRICS), (self.path / METRICS).open("ab") as file:
            file.write(line.encode())

    def sync(self) -> None:
        """Return when every line logged so far would outlive a loss of power."""
        with writing(self.path / METRICS), (self.path / METRICS).open("ab") as file:
            os.fsync(file.fileno())

    def note_release(self, round: int) -> None:
        """Count that a round's result is about to leave the server; returns when this would outlive a loss of power."""
        releases = self.releases()
        releases[round] += 1
        self.write_json(RELEASES, releases)

    def releases(self) -> Counter[int]:
        """How often each round's result was about to leave the server; of rounds without noise nothing is noted."""
        return Counter({int(number): times for number, times in (self._read_json(RELEASES) or {}).items()})

    def claim(self) -> BinaryIO:
        """Keep other processes from writing here, until the file that is returned is closed.

        What a killed process had not finished writing is removed.

        Raises:
            InputError: another process writes here.
            RunError: the folder cannot be written.
        """
        with writing(self.path):
            claim = (self.path / LOCK).open("wb")  # for writing, or NFS grants no lock
            try:
                fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                claim.close()
                raise InputError(f"{self.path} is being written by another process; wait for it or stop it.") from error
            for unfinished in self.path.rglob(f"*{PARTIAL}"):
                unfinished.unlink()
        return claim

    def mark(self, status: str) -> None:
        """Say in the summary how the run ended, if it got as far as writing one and does not say so yet."""
        summary = self.summary or {}
        if summary.get("status") == "running":
            with suppress(RunError):  # the disk that ended the run may still be full
                self.write_summary({**summary, "status": status})

    def rewind(self, last_round: int) -> None:
        """Drop what was logged after a round, all of it for -1: a resumed run logs that again."""
        kept = [entry for entry in self.metrics() if entry["round"] <= last_round]
        write_durably(self.path / METRICS, "".join(json.dumps(entry) + "\n" for entry in kept).encode())

    def metrics(self) -> list[dict[str, Any]]:
        """Every whole line of metrics.jsonl in the order written; a torn last line is left out."""
        path = self.path / METRICS
        if not path.exists():
            return []
        whole_lines = _read(path, lambda text: text[: text.rfind("\n") + 1].splitlines())
        entries = []
        for number, line in enumerate(whole_lines, start=1):
            entry = _read_line(line)
            if entry is None:
                raise InputError(f"{path} is corrupt in line {number}; remove that line or restore the file.")
            entries.append(entry)
        return entries

    def results(self) -> dict[str, Any]:
        """The summary; without one, what the configuration tells, with ``status`` "unfinished"."""
        config = self.config
        return self.summary or {**{name: config[name] for name in COPIED if name in config}, "status": "unfinished"}

    def write_config(self, config: Mapping[str, Scalar]) -> None:
        """Write config.toml with these values and what else it says already."""
        self.manifest = {**self.manifest, "config": dict(config)}
        write_durably(self.path / CONFIG, tomli_w.dumps(self.manifest).encode())

    def write_resumed(self, config: Mapping[str, Scalar]) -> None:
        """Write config.toml with these values, and in `resumed` what process goes on with the run."""
        self.manifest = {**self.manifest, "resumed": [*self.manifest.get("resumed", []), _process()]}
        self.write_config(config)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json in one step: a reader sees the old file or the new one, never half of it."""
        self.write_json(SUMMARY, summary)

    def write_json(self, name: str, content: object) -> None:
        """Write the JSON file ``name`` in one step; numbers that are not finite become ``null``."""
        text = json.dumps(only_finite(content), indent=2, allow_nan=False) + "\n"
        write_durably(self.path / name, text.encode())

    def _read_json(self, name: str) -> dict[str, Any] | None:
        path = self.path / name
        if not path.exists():
            return None
        content = _read(path, json.loads)
        if not isinstance(content, dict):
            raise InputError(f"{path} is corrupt (it holds no JSON object); restore it or run again.")
        return content


def output_dir(run_config: Mapping[str, Scalar]) -> Path:
    """The absolute path of a run's folder: as configured, else `runs/<dataset>-<method>-<UTC time>`."""
    default = f"runs/{run_config['dataset']}-{run_config['method']}-{datetime.now(UTC):%Y%m%d-%H%M%S-%f}"
    return Path(str(run_config["output-dir"] or default)).expanduser().absolute()


def require_empty(path: Path) -> None:
    """Refuse a folder for a new run in which there is something already, but for what a killed run had not finished.

    Raises:
        InputError: `path` is a file, or a folder that is not empty.
    """
    if path.exists() and (not path.is_dir() or any(entry.suffix != PARTIAL for entry in path.iterdir())):
        raise InputError(f"The folder {path} is not empty; name another folder or empty it.")


def _process() -> dict[str, Any]:
    """When this process began to write, and what it is."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": _without_token(sys.argv),
        **git_revision(),
        "versions": versions(),
        "machine": machine(),
    }


def _without_token(command: Sequence[str]) -> list[str]:
    """The command, without the secret with which Flower's process of a ServerApp authenticates itself."""
    return ["***" if before == "--token" else part for before, part in zip(["", *command], command, strict=False)]


def _read(path: Path, parse: Callable[[str], T]) -> T:
    try:
        return parse(path.read_text(encoding="utf-8"))
    # Broken JSON, TOML and UTF-8 are all reported as kinds of ValueError.
    except ValueError as error:
        raise InputError(f"{path} is corrupt ({error}); restore it or run again.") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check its permissions.") from error


def _read_line(line: str) -> dict[str, Any] | None:
    """One metrics line, or None if it is not what ``log`` writes."""
    keys = {"round", "client-steps", "split", "task", "metric", "value", "seconds"}
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and keys <= entry.keys() else None


def only_finite(content: object) -> object:
    """``content`` with every NaN and infinity, which JSON does not know, replaced by None."""
    if isinstance(content, float) and not math.isfinite(content):
        return None
    if isinstance(content, Mapping):
        return {name: only_finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [only_finite(value) for value in content]
    return content
