"""`mops-fl deploy-demo`, as a user starts it, with the tiny model."""

import signal
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
import tomli_w

from experiments.deploy_demo_command import OWN_KEYS
from experiments.run_folder import RunFolder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.fixture
def scratch():
    """Where the demo may write beside its run folder; a short path, for its sockets."""
    with tempfile.TemporaryDirectory(prefix="t-") as folder:
        yield Path(folder)


@pytest.fixture
def demo(started, environment, run_config, scratch, tmp_path):
    """``demo("--flag")``: a started `mops-fl deploy-demo` of one SuperNode and one round."""

    def start(*arguments, **changes):
        values = run_config({name.replace("_", "-"): value for name, value in changes.items()})
        values["output-dir"] = str(tmp_path / "run")
        for name in (*OWN_KEYS, "clients-per-round"):
            del values[name]
        (tmp_path / "values.toml").write_text(tomli_w.dumps(values), encoding="utf-8")
        environment["TMPDIR"] = str(scratch)
        command = ["deploy-demo", "--nodes", 1, "--rounds", 1, "-c", tmp_path / "values.toml", *arguments]
        return started(Path(sys.executable).with_name("mops-fl"), *command)

    return start


def left_behind(scratch):
    running = []
    for process in psutil.process_iter(["cmdline"]):
        try:
            if process.environ().get("TMPDIR", "").startswith(str(scratch)) and process.status() != "zombie":
                running.append(process.info["cmdline"])
        except psutil.Error:
            continue
    return running + [path for path in scratch.iterdir() if path.name.startswith("mops-")]


def test_demo_shows_its_result_and_leaves_only_the_run_folder(demo, scratch, tmp_path):
    process = demo()
    output, errors = process.communicate()
    assert process.returncode == 0, output + errors
    assert "TLS, SuperNodes authenticated" in output
    assert "site-0: dolly-sample-site-0.jsonl, 100 rows that stay there" in output
    for shown in ("Test perplexity", "open qa", "all tasks", "Rounds", "seconds", f"run folder: {tmp_path / 'run'}"):
        assert shown in output
    assert "INFO" not in output
    summary = RunFolder.open(tmp_path / "run").summary or {}
    assert (summary["status"], summary["rounds"], summary["num_clients"]) == ("complete", 1, 1)
    assert left_behind(scratch) == []


def test_ctrl_c_ends_the_demo_with_everything_that_it_started(demo, scratch):
    process = demo("--rounds", 500)
    assert any("test perplexity after round 0" in line for line in process.stdout)  # the rounds begin
    assert left_behind(scratch)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "deploy-demo: interrupted; the logs end with" in errors
    assert "superlink: " in errors
    assert left_behind(scratch) == []


def test_run_that_fails_shows_the_logs_and_ends_everything_also_without_tls(demo, scratch):
    process = demo("--insecure", "-c", "lr=1e30")
    output, errors = process.communicate()
    assert process.returncode == 1, output + errors
    assert "TLS, SuperNodes authenticated" not in output
    assert "test perplexity after round 0" in output
    assert "no usable reply" in output
    assert "site-0: " in errors
    assert left_behind(scratch) == []
