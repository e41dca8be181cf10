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
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from experiments.app_folder import AppFolder
from experiments.checkpoint import CHECKPOINTS
from experiments.config import ExperimentConfig, with_absolute_models
from experiments.run_folder import CONFIG, RunFolder
from mops_fl.config import DataConfig, Scalar, read_section
from mops_fl.data import load_task_data
from mops_fl.errors import InputError, RunError

TRAINING = ("federated", "central")
# What a run may be found as.
COMPLETE = "complete"
ELSEWHERE = "running elsewhere"
INTERRUPTED = "interrupted"
BROKEN = "broken"
WAITING = "waiting"


@dataclass(frozen=True)
class Planned:
    """One run of a sweep.

    Attributes:
        row: name of its row.
        method: name of its column.
        seed: its seed.
        training: `federated` or `central`.
        values: the whole run-config, output-dir included.
        defaults: the app's run-config; a folder without one of its keys is taken to have that value.
    """

    row: str
    method: str
    seed: int
    training: str
    values: Mapping[str, Scalar]
    defaults: Mapping[str, Scalar]

    @property
    def folder(self) -> Path:
        """Where the run's folder is, or will be."""
        return Path(str(self.values["output-dir"]))

    def find(self) -> RunFolder | None:
        """The run's folder, None if there is none yet.

        Raises:
            InputError: it was made with other values, or on other rows than those of a named data-path.
        """
        if not (self.folder / CONFIG).is_file():
            return None
        found = RunFolder.open(self.folder)
        made = {**self.defaults, **found.config}
        for key, value in with_absolute_models(self.values).items():
            if key not in ("output-dir", "data-path", "resume") and made[key] != value:
                raise InputError(
                    f"{self.folder} was made with {key} = {made[key]!r}, the sweep says {value!r}; "
                    "move that folder away, or change the sweep."
                )
        if self.values["data-path"] and not self._has_same_rows(found):
            raise InputError(
                f"{self.folder} was made on other rows (data-path {made['data-path']!r}) than those of "
                f"{self.values['data-path']}; move that folder away, or give its own data."
            )
        if (training := (found.summary or {}).get("training", self.training)) != self.training:
            raise InputError(f"{self.folder} is a {training} run, the sweep says {self.training}; move it away.")
        return found

    def _has_same_rows(self, found: RunFolder) -> bool:
        """By the hash that the run recorded; without one by path, of which a published folder keeps only the end."""
        recorded = (found.summary or {}).get("data_sha256")
        if recorded:
            return bool(recorded == _rows_sha256(read_section(DataConfig, self.values)))
        parts = Path(str(found.config.get("data-path", ""))).parts
        return bool(parts) and Path(str(self.values["data-path"])).expanduser().absolute().parts[-len(parts) :] == parts

    def finished(self) -> RunFolder | None:
        """Its folder, if it went to its end."""
        found = self.find()
        return found if found and _is_complete(found) else None

    def status(self) -> str:
        """`complete`, `running elsewhere`, `interrupted` (can be gone on with), `broken` (cannot) or `waiting`.

        Raises:
            InputError: as `find`, or the folder of a run that is not complete cannot be written.
        """
        found = self.find()
        if found is None:
            return WAITING
        if _is_complete(found):
            return COMPLETE
        try:
            found.claim().close()
        except InputError:  # a run has no checkpoint for its first minutes and is not broken for that
            return ELSEWHERE
        except RunError as error:
            raise InputError(str(error)) from error
        return INTERRUPTED if any((self.folder / CHECKPOINTS).glob("*")) else BROKEN

    def set_aside(self) -> None:
        """Rename the folder of a broken run, so that it can be run anew.

        Raises:
            InputError: another process writes there.
        """
        with RunFolder.open(self.folder).claim():
            self.folder.rename(self.folder.with_name(f"{self.folder.name}.broken-{datetime.now(UTC):%Y%m%d-%H%M%S}"))


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

    @property
    def num_seeds(self) -> int:
        """Of each row and method."""
        return len({run.seed for run in self.runs})

    def of(self, row: str, method: str) -> list[Planned]:
        """The runs of one cell, a seed each."""
        return [run for run in self.runs if (run.row, run.method) == (row, method)]


def read_sweep(path: Path, output: Path | None, data: Path | None = None) -> Sweep:
    """Read a sweep file and check every value of every run.

    Args:
        path: the TOML file.
        output: the folder that the run folders lie in; None for the file's own.
        data: the data-path of every run; None for what the file or the app says.

    Raises:
        InputError: it cannot be read, names something that is not known, or a run's config is not valid.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"The sweep {path} cannot be read ({error}).") from error
    _check_form(path, content, {"folder"} if output else set())
    title, app_name, seeds = content["title"], content["app"], content["seeds"]
    common, rows, methods, paper = content["values"], content["rows"], content["methods"], content.get("paper", {})
    output = (output or Path("runs") / content["folder"]).expanduser()  # no shell does it in `--output=~/runs`
    app = AppFolder.find(app_name)
    known = app.run_config(())
    runs = []
    for (row, of_row), (method, of_method), seed in product(rows.items(), methods.items(), seeds):
        changes = {**common, **of_row, **of_method, **({"data-path": str(data)} if data else {}), "seed": seed}
        training = changes.pop("training", TRAINING[0])
        if training not in TRAINING:
            raise InputError(f"{path} has `training` = {training!r}; choose one of: {', '.join(TRAINING)}.")
        if unknown := sorted(set(changes) - set(known)):
            raise InputError(f"{path} has the run-config key `{unknown[0]}`, which {app_name} does not know.")
        folder = output / f"{_slug(row)}-{_slug(method)}-seed{seed}"
        values = {**known, **changes, "output-dir": str(folder.absolute())}
        ExperimentConfig.from_run_config(values)
        runs.append(Planned(row, method, seed, training, values, known))
    if len({run.folder for run in runs}) < len(runs):
        raise InputError(f"{path} has two rows, methods or seeds of the same name but for signs; rename one.")
    return Sweep(path.stem, title, output, app_name, tuple(rows), tuple(methods), tuple(runs), paper)


def _is_complete(run: RunFolder) -> bool:
    return (run.summary or {}).get("status") == COMPLETE


@cache
def _rows_sha256(config: DataConfig) -> str:
    return load_task_data(config).sha256


def _check_form(path: Path, content: Mapping[str, Any], optional: AbstractSet[str]) -> None:
    """Refuse a sweep in which a key is missing, not known, or not of its form."""
    if missing := [key for key in _FORMS if key not in content and key not in optional | {"paper"}]:
        raise InputError(
            f"{path} has no {missing[0]!r}; a sweep needs title, folder, app, seeds, values, rows and methods."
        )
    if unknown := [key for key in content if key not in _FORMS]:
        raise InputError(f"{path} has `{unknown[0]}`, which a sweep does not know.")
    for key, value in content.items():
        is_so, form = _FORMS[key]
        if not is_so(value):
            raise InputError(f"{path} has `{key}` = {value!r}; it must be {form}.")
    for row, figures in content.get("paper", {}).items():
        if row not in content["rows"] or not set(figures) <= set(content["methods"]):
            raise InputError(f"{path} has figures of the paper's for {row!r}: {', '.join(figures)}; name the rows and "
                             "methods of the sweep.")  # fmt: skip


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _is_seeds(value: object) -> bool:
    return isinstance(value, list) and value != [] and all(type(seed) is int for seed in value)


def _is_tables(value: object) -> bool:
    return isinstance(value, dict) and value != {} and all(isinstance(inner, dict) for inner in value.values())


def _is_figures(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(row, dict) and all(type(figure) in (int, float) for figure in row.values()) for row in value.values()
    )


# Key of a sweep file -> whether a value is of its form, and that form in words.
_FORMS: Mapping[str, tuple[Callable[[object], bool], str]] = {
    "title": (_is_text, "a text"),
    "folder": (_is_text, "the name of a folder"),
    "app": (_is_text, "the name of an app, such as 'experiments.dolly'"),
    "seeds": (_is_seeds, "a list of whole numbers, such as [0, 1, 2]"),
    "values": (lambda value: isinstance(value, dict), "a table of run-config values"),
    "rows": (_is_tables, "a table of at least one row, each a table of run-config values or {}"),
    "methods": (_is_tables, "a table of at least one method, each a table of run-config values or {}"),
    "paper": (_is_figures, "a table of rows, each a table of methods and numbers"),
}


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")
