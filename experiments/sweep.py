"""A sweep: the rows x methods x seeds that one TOML file names, each a run folder of its own.

    title = "..."                             # of the table
    folder = "dolly_studies"                  # below runs/, for the run folders; sweeps may share one, and so runs
    app = "experiments.dolly"                 # whose values are changed
    seeds = [0, 1, 2]
    [values]                                  # of every run, such as: num-server-rounds = 10
    [rows."75 %"]                             # of every run in this row, such as: compression = "sparsegpt:75%"
    [methods.MoPs]                            # of every run in this column, such as: method = "mops", lr = 0.03
    [paper."75 %"]                            # the paper's figures, such as: MoPs = 9.45

A column with `training = "central"` is trained centrally. The first column is what the others are compared with.
"""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from experiments.app_folder import AppFolder
from experiments.checkpoint import CHECKPOINTS
from experiments.config import ExperimentConfig
from experiments.run_folder import CONFIG, RunFolder
from mops_fl.config import Scalar
from mops_fl.errors import InputError

TRAINING = ("federated", "central")


@dataclass(frozen=True)
class Planned:
    """One run of a sweep.

    Attributes:
        row: name of its row.
        method: name of its column.
        seed: its seed.
        training: `federated` or `central`.
        values: the whole run-config, output-dir included.
    """

    row: str
    method: str
    seed: int
    training: str
    values: Mapping[str, Scalar]

    @property
    def folder(self) -> Path:
        """Where the run's folder is, or will be."""
        return Path(str(self.values["output-dir"]))

    def find(self) -> RunFolder | None:
        """The run's folder, None if there is none yet.

        Raises:
            InputError: it was made with other values.
        """
        if not (self.folder / CONFIG).is_file():
            return None
        found = RunFolder.open(self.folder)
        local = Path(str(self.values["backbone"]))
        wanted = {**self.values, "backbone": str(local.absolute())} if local.is_dir() else self.values
        for key, value in wanted.items():
            if key not in ("output-dir", "data-path", "resume") and found.config.get(key, value) != value:
                raise InputError(
                    f"{self.folder} was made with {key} = {found.config[key]!r}, the sweep says {value!r}; "
                    "move that folder away, or change the sweep."
                )
        if (training := (found.summary or {}).get("training", self.training)) != self.training:
            raise InputError(f"{self.folder} is a {training} run, the sweep says {self.training}; move it away.")
        return found

    def status(self) -> str:
        """`complete`, `interrupted` (can be gone on with), `broken` (cannot) or `waiting`."""
        found = self.find()
        if found is None:
            return "waiting"
        if (found.summary or {}).get("status") == "complete":
            return "complete"
        return "interrupted" if any((self.folder / CHECKPOINTS).glob("*")) else "broken"


@dataclass(frozen=True)
class Sweep:
    """What a sweep file says.

    Attributes:
        name: of its file.
        title: of its table.
        output: the folder that its run folders lie in.
        app: whose runs these are.
        rows: their names, in order.
        methods: their names, in order.
        runs: row by row, in each method by method, in each seed by seed.
        paper: row -> method -> the paper's figure.
    """

    name: str
    title: str
    output: Path
    app: str
    rows: tuple[str, ...]
    methods: tuple[str, ...]
    runs: tuple[Planned, ...]
    paper: Mapping[str, Mapping[str, float]]

    def of(self, row: str, method: str) -> list[Planned]:
        """The runs of one cell, a seed each."""
        return [run for run in self.runs if (run.row, run.method) == (row, method)]


def read_sweep(path: Path, output: Path | None) -> Sweep:
    """Read a sweep file and check every value of every run.

    Args:
        path: the TOML file.
        output: the folder that the run folders lie in; None for the file's own.

    Raises:
        InputError: it cannot be read, names something that is not known, or a run's config is not valid.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        title, app_name, seeds = content.pop("title"), content.pop("app"), content.pop("seeds")
        common, rows, methods = content.pop("values"), content.pop("rows"), content.pop("methods")
        paper, output = content.pop("paper", {}), output or Path("runs") / content.pop("folder")
        content.pop("folder", None)
    except KeyError as error:
        raise InputError(
            f"{path} has no {error}; a sweep needs title, folder, app, seeds, values, rows and methods."
        ) from error
    except (OSError, ValueError) as error:
        raise InputError(f"The sweep {path} cannot be read ({error}).") from error
    if content:
        raise InputError(f"{path} has `{next(iter(content))}`, which a sweep does not know.")
    _check_paper(path, paper, rows, methods)
    app = AppFolder.find(app_name)
    known = app.run_config(())
    runs = []
    for (row, of_row), (method, of_method), seed in product(rows.items(), methods.items(), seeds):
        changes = {**common, **of_row, **of_method, "seed": seed}
        training = changes.pop("training", TRAINING[0])
        if training not in TRAINING:
            raise InputError(f"{path} has `training` = {training!r}; choose one of: {', '.join(TRAINING)}.")
        if unknown := sorted(set(changes) - set(known)):
            raise InputError(f"{path} has the run-config key `{unknown[0]}`, which {app_name} does not know.")
        folder = output / f"{_slug(row)}-{_slug(method)}-seed{seed}"
        values = {**known, **changes, "output-dir": str(folder.absolute())}
        ExperimentConfig.from_run_config(values)
        runs.append(Planned(row, method, seed, training, values))
    if len({run.folder for run in runs}) < len(runs):
        raise InputError(f"{path} has two rows, methods or seeds of the same name but for signs; rename one.")
    return Sweep(path.stem, title, output, app_name, tuple(rows), tuple(methods), tuple(runs), paper)


def _check_paper(path: Path, paper: Mapping[str, Any], rows: Mapping[str, Any], methods: Mapping[str, Any]) -> None:
    for row, figures in paper.items():
        if row not in rows or not set(figures) <= set(methods):
            raise InputError(f"{path} has figures of the paper's for {row!r}: {', '.join(figures)}; name the rows and "
                             "methods of the sweep.")  # fmt: skip


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")
