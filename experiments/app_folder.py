"""Flower apps by dotted name: `experiments.dolly` is a folder, `experiments.dolly.fedprompt` an overlay in it."""

import importlib.util
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
from flwr.common.config import get_fused_config_from_dir, get_project_config, parse_config_args

from mops_fl.config import Scalar
from mops_fl.errors import InputError


@dataclass(frozen=True)
class AppFolder:
    """A Flower app on this machine.

    Attributes:
        path: the folder with its pyproject.toml.
        overlays: TOML files whose values replace the app's.
    """

    path: Path
    overlays: tuple[Path, ...]

    @classmethod
    def find(cls, name: str) -> "AppFolder":
        """Find an app by folder or dotted name, the last part of which may be an overlay.

        Raises:
            InputError: there is none.
        """
        package, *rest = name.split(".")
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
        roots = [Path.cwd() / package, *map(Path, (spec and spec.submodule_search_locations) or ())]
        for candidate in (Path(name), *(root.joinpath(*rest) for root in roots)):
            if (candidate / "pyproject.toml").is_file():
                return cls(candidate.resolve(), ())
            overlay = candidate if candidate.suffix == ".toml" else candidate.parent / f"{candidate.name}.toml"
            if overlay.is_file() and (overlay.parent / "pyproject.toml").is_file():
                return cls(overlay.parent.resolve(), (overlay.resolve(),))
        raise InputError(
            f"There is no app {name!r}; give a folder with a pyproject.toml or a name like experiments.dolly."
        )

    def components(self) -> tuple[str, str]:
        """The module paths of its ServerApp and ClientApp."""
        components = self._project()["tool"]["flwr"]["app"]["components"]
        return components["serverapp"], components["clientapp"]

    def run_config(self, overrides: Sequence[str]) -> dict[str, Scalar]:
        """The app's values, then the overlays', then `overrides` (each a TOML file or `key=value ...`).

        Raises:
            InputError: a file or a text that is not TOML, or a key that the app does not have.
        """
        values: dict[str, Scalar] = {}
        try:
            for override in (*map(str, self.overlays), *overrides):
                _check_pairs(override)
                values |= parse_config_args([override])
            self._project()
            known = get_fused_config_from_dir(self.path, {})
        except (ValueError, OSError, click.ClickException) as error:
            raise InputError(f"The run-config cannot be used: {str(error).strip()}") from error
        if unknown := sorted(set(values) - set(known)):
            raise InputError(f"Unknown run-config key `{unknown[0]}`; known are: {', '.join(sorted(known))}.")
        return {**known, **values}

    def _project(self) -> Mapping[str, dict[str, dict[str, dict[str, dict[str, str]]]]]:
        try:
            return get_project_config(self.path)
        except ValueError as error:
            raise InputError(f"{self.path / 'pyproject.toml'} is not a Flower app: {error}") from error


def _check_pairs(text: str) -> None:
    """Flower passes over whatever is not `key=value`; a setting with spaces around its `=` would be lost."""
    if text.endswith(".toml"):
        return
    pairs = re.compile(r"(\S+?)=(?:'[^']*'|\"[^\"]*\"|\S+)")
    for key, count in Counter(pairs.findall(text)).items():
        if count > 1:
            raise InputError(f"The run-config text {text!r} gives `{key}` {count} times; give it once.")
    if pairs.sub("", text).strip():
        raise InputError(f"The run-config text {text!r} is not of the form key=value, without spaces around the =.")
