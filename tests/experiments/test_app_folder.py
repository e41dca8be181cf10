import tomllib
from pathlib import Path

import pytest

from experiments.app_folder import AppFolder
from mops_fl.errors import InputError

DOLLY = Path(__file__).parents[2] / "experiments/dolly"
APP = """
[project]
name = "tiny"
version = "1.0.0"
description = "An app"
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "me"
[tool.flwr.app.components]
serverapp = "server:app"
clientapp = "client:app"
[tool.flwr.app.config]
lr = 0.1
rounds = 3
name = "plain"
"""


@pytest.fixture
def app(tmp_path):
    """An app with an overlay, in a folder of its own."""
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny/pyproject.toml").write_text(APP)
    (tmp_path / "tiny/fast.toml").write_text('lr = 0.5\nname = "fast"\n')
    return tmp_path / "tiny"


@pytest.mark.parametrize("name", ["experiments.dolly", str(DOLLY), f"{DOLLY}/"])
def test_app_is_found_by_dotted_name_and_by_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the installed package answers wherever one is
    assert AppFolder.find(name) == AppFolder(DOLLY, ())


@pytest.mark.parametrize("name", ["experiments.dolly.fedprompt", f"{DOLLY}/fedprompt.toml", f"{DOLLY}/fedprompt"])
def test_overlay_is_found_by_dotted_name_and_by_file(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert AppFolder.find(name) == AppFolder(DOLLY, (DOLLY / "fedprompt.toml",))


@pytest.mark.parametrize("name", ["tiny", "./tiny", "tiny/fast", "tiny.fast", "tiny/fast.toml"])
def test_app_is_found_from_the_working_directory(name, app, monkeypatch):
    monkeypatch.chdir(app.parent)
    overlays = (app / "fast.toml",) if "fast" in name else ()
    assert AppFolder.find(name) == AppFolder(app, overlays)


@pytest.mark.parametrize(
    "name", ["experiments.alpaca", "experiments.dolly.alpaca", "nowhere", "no/such/folder", "tiny/x.toml"]
)
def test_unknown_app_is_refused_by_name(name, app, monkeypatch):
    monkeypatch.chdir(app.parent)
    with pytest.raises(InputError, match=f"no app '{name}'; give a folder"):
        AppFolder.find(name)


def test_components_are_the_installed_modules():
    assert AppFolder.find("experiments.dolly").components() == ("experiments.server_app:app", "clients.client_app:app")


def test_run_config_without_overrides_is_the_apps():
    values = tomllib.loads((DOLLY / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["flwr"]["app"]["config"]
    assert AppFolder.find("experiments.dolly").run_config(()) == values


def test_overlay_wins_over_the_app_and_the_command_line_over_both(app):
    plain, fast = AppFolder.find(str(app)), AppFolder.find(str(app / "fast.toml"))
    assert plain.run_config(()) == {"lr": 0.1, "rounds": 3, "name": "plain"}
    assert fast.run_config(()) == {"lr": 0.5, "rounds": 3, "name": "fast"}
    assert fast.run_config(["lr=0.9 rounds=4"]) == {"lr": 0.9, "rounds": 4, "name": "fast"}
    assert plain.run_config(["lr=0.9", "rounds=4 lr=0.8"]) == {"lr": 0.8, "rounds": 4, "name": "plain"}


def test_toml_file_overrides_like_text_and_the_later_one_wins(app):
    (app / "mine.toml").write_text("rounds = 7\nlr = 0.3\n")
    found = AppFolder.find(str(app / "fast.toml"))
    assert found.run_config([str(app / "mine.toml")]) == {"lr": 0.3, "rounds": 7, "name": "fast"}
    assert found.run_config([str(app / "mine.toml"), "lr=0.4"])["lr"] == 0.4
    assert found.run_config(["lr=0.4", str(app / "mine.toml")])["lr"] == 0.3


def test_quoted_text_keeps_its_spaces(app):
    assert AppFolder.find(str(app)).run_config(["name='a b' lr=1.5"]) == {"lr": 1.5, "rounds": 3, "name": "a b"}


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["name=plain-text-without-quotes"], "invalid format"),
        (["lr=[0.1]"], "lr"),
        (["missing.toml"], "missing.toml"),
    ],
)
def test_override_that_cannot_be_used_is_refused(overrides, complaint, app):
    with pytest.raises(InputError, match=f"run-config cannot be used: .*{complaint}"):
        AppFolder.find(str(app)).run_config(overrides)


def test_unknown_key_is_refused_and_the_known_ones_are_listed(app):
    with pytest.raises(InputError, match="Unknown run-config key `learning-rate`; known are: lr, name, rounds"):
        AppFolder.find(str(app)).run_config(["learning-rate=0.1"])


def test_toml_file_that_is_broken_is_refused(app):
    (app / "mine.toml").write_text("rounds = \n")
    with pytest.raises(InputError, match="run-config cannot be used"):
        AppFolder.find(str(app)).run_config([str(app / "mine.toml")])


@pytest.mark.parametrize("line", ['clientapp = "client:app"', 'publisher = "me"', 'name = "tiny"'])
def test_folder_that_is_not_a_flower_app_is_refused(app, line):
    (app / "pyproject.toml").write_text(APP.replace(line, ""))
    with pytest.raises(InputError, match=r"pyproject.toml is not a Flower app: .*"):
        AppFolder.find(str(app)).run_config(())


@pytest.mark.parametrize("name", [".", "", "/"])
def test_folder_without_an_app_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no app"):
        AppFolder.find(name)


@pytest.mark.parametrize("text", ["lr 0.5", "lr = 0.5", "lr=0.5 fast", "nonsense"])
def test_text_that_is_not_key_value_is_refused_and_not_passed_over(app, text):
    with pytest.raises(InputError, match="key=value"):
        AppFolder.find(str(app)).run_config([text])


def test_key_that_one_text_gives_twice_is_named(app):
    with pytest.raises(InputError, match="gives `lr` 2 times; give it once"):
        AppFolder.find(str(app)).run_config(["lr=0.5 name='lr=1 lr=2' lr=0.6"])
