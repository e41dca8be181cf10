"""Whole runs, inline, into which a fault is put: each goes on, or ends with one sentence and a code that is not 0."""

import errno
import os
import re
import subprocess
import threading

import numpy as np
import pytest
import tomli_w

from clients import client_app, resident, trainer
from experiments import durable, federated_run, simulation
from experiments.app_folder import AppFolder
from experiments.display import Display
from experiments.measurements import series
from experiments.run_folder import RunFolder
from experiments.runtimes import run_inline
from mops_fl.adapter_folder import load_adapter
from mops_fl.errors import RunError
from mops_fl.payload import ARRAYS, METRICS, from_record, to_record
from mops_fl.sources import sample_path
from strategies.fedprompt import FedPrompt
from strategies.privacy import NoiseConfig, spent_epsilon

pytestmark = pytest.mark.usefixtures("command_in_process")

SPENT = ("epsilon", "most_participations")


@pytest.fixture
def command(run_config, tmp_path, capsys):
    """``command("--flag", key=value)``: exit code, output and errors of a tiny run into ``tmp_path / "run"``."""

    def call(*arguments, resume=None, **changes):
        resident._build_trainer.cache_clear()
        configured = ["--resume", str(resume)] if resume else ["--run-config", str(tmp_path / "values.toml")]
        if not resume:
            values = run_config({"output-dir": str(tmp_path / "run")})
            values |= {name.replace("_", "-"): value for name, value in changes.items()}
            (tmp_path / "values.toml").write_text(tomli_w.dumps(values), encoding="utf-8")
        code = simulation.run(["--app", "experiments.dolly", "--backend", "inline", *configured, *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def tamper(monkeypatch):
    """``tamper(change)``: ``change(reply, client)`` is done to every reply before it is sent."""

    def install(change):
        encode = client_app.encode_result
        train = trainer.Trainer.train
        client = threading.local()

        def remember(self, partition_id, request):
            client.partition_id, client.request = partition_id, request
            return train(self, partition_id, request)

        def encoded(result):
            content = encode(result)
            change(content, client.partition_id, client.request)
            return content

        monkeypatch.setattr(trainer.Trainer, "train", remember)
        monkeypatch.setattr(client_app, "encode_result", encoded)

    return install


def one_sentence(errors):
    assert errors.startswith("flower-simulation: ")
    assert errors.count("\n") == 1, errors
    assert "Traceback" not in errors
    return errors


def scaled(content, factor):
    arrays = from_record(content[ARRAYS])
    content[ARRAYS] = to_record({name: np.float32(factor) * array for name, array in arrays.items()})


BROKEN = {
    "not finite": lambda content: content[ARRAYS].update(to_record({"gate.b2": np.full(7, np.nan, np.float32)})),
    "shape": lambda content: content[ARRAYS].update(to_record({"gate.b2": np.zeros(8, np.float32)})),
    "dtype": lambda content: content[ARRAYS].update(to_record({"gate.b2": np.zeros(7)})),
    "missing array": lambda content: content[ARRAYS].pop("gate.b2"),
    "extra array": lambda content: content[ARRAYS].update(to_record({"more": np.zeros(7, np.float32)})),
    "no rows": lambda content: content[METRICS].update({"num-examples": 0}),
    "negative steps": lambda content: content[METRICS].update({"num-steps": -2}),
    "rows it does not have": lambda content: content[METRICS].update({"num-examples": 10**12}),
    "1000 times as long": lambda content: scaled(content, 1e5),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_update_is_refused_counted_and_named_and_the_others_are_averaged(command, tamper, tmp_path, fault):
    broken = []  # in each round one

    def change(content, client, request):
        if client == min(request.cohort.members):
            broken.append(client)
            BROKEN[fault](content)

    tamper(change)
    code, output, errors = command(cohort_size=10, clients_per_round=6)
    assert (code, errors) == (0, "")
    run = RunFolder.open(tmp_path / "run")
    assert run.summary["failures"] == 2
    assert set(run.summary["failures_by_client"]) == {str(client) for client in broken}
    assert [point.value for point in series(run.metrics(), "failures", split="train")] == [1, 1]
    named = re.findall(r"Client (\d+) \(node (\d+)\): (refused: |as above)", output)
    assert [(int(client), int(node)) for client, node, _ in named] == [(client, client + 1) for client in broken]
    assert named[0][2] == "refused: "  # a reason that came before is not written out again
    assert run.summary["client_steps"] == 2 * 5 * 2  # rounds, usable replies, local steps
    assert all(np.abs(array).max() < 10 for array in load_adapter(tmp_path / "run/adapter").arrays.values())


def test_two_hostile_clients_of_ten_do_harm_to_the_mean_and_little_to_krum(command, tamper, tmp_path):
    def change(content, client, request):
        if client < 2:
            adapter = {name: 2 * request.adapter[name] - array for name, array in from_record(content[ARRAYS]).items()}
            content[ARRAYS] = to_record(adapter)
            scaled(content, -30.0)

    def moved(**changes):
        folder = tmp_path / "-".join(str(value) for value in changes.values())
        assert command(clients_per_round=10, output_dir=str(folder), num_server_rounds=1, **changes)[0] == 0
        assert RunFolder.open(folder).summary["failures"] == 0
        assert RunFolder.open(folder).summary["aggregation"] == changes["aggregation"]
        return np.abs(load_adapter(folder / "adapter").arrays["prompts"]).max()

    honest = moved(aggregation="mean", max_norm_ratio=0.0)
    tamper(change)
    assert moved(aggregation="mean", max_norm_ratio=0.5 + 1e6) > 3 * honest
    for robust in ("median", "trimmed-mean", "krum"):
        assert moved(aggregation=robust, max_norm_ratio=1e6) < 1.5 * honest


def test_reply_that_never_comes_costs_the_round_its_time_limit_and_nothing_else(command, tamper, tmp_path):
    never = threading.Event()
    stuck = []

    def change(content, client, request):
        if request.server_round == 1 and not stuck:
            stuck.append(client)
            never.wait(60)

    tamper(change)
    code, output, _ = command(round_timeout=4.0, cohort_size=3)
    never.set()
    assert code == 0
    summary = RunFolder.open(tmp_path / "run").summary
    assert summary["failures_by_client"] == {str(stuck[0]): 1}
    assert "no answer in time" in output


def test_too_few_replies_end_the_run_with_code_1_and_it_can_be_resumed(command, monkeypatch, tmp_path):
    train = trainer.Trainer.train

    def failing(self, partition_id, request):
        if request.server_round == 2 and partition_id == min(request.cohort.members):
            raise MemoryError("no memory")
        return train(self, partition_id, request)

    assert command(output_dir=str(tmp_path / "straight"), cohort_size=3)[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "train", failing)
        code, _, errors = command(min_replies=3, cohort_size=3)
    assert code == 1
    assert errors.startswith("flower-simulation: Round 2 had 2 usable replies from 3 clients, 3 are needed.")
    assert RunFolder.open(tmp_path / "run").summary["status"] == "failed"
    assert command(resume=tmp_path / "run")[0] == 0
    resumed, straight = (load_adapter(tmp_path / name / "adapter").arrays for name in ("run", "straight"))
    assert all((resumed[name] == straight[name]).all() for name in straight)


@pytest.mark.parametrize("writes", [1, 4, 6, 9])
def test_full_disk_ends_the_run_with_one_sentence_and_it_can_be_resumed(command, monkeypatch, tmp_path, writes):
    assert command(output_dir=str(tmp_path / "straight"))[0] == 0
    fsync, left = os.fsync, [writes]

    def full(descriptor):
        left[0] -= 1
        if left[0] <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(durable.os, "fsync", full)
        code, _, errors = command()
    assert code == (2 if writes == 1 else 1)
    assert "cannot be written (No space left on device)" in one_sentence(errors)
    if (tmp_path / "run/config.toml").exists():
        assert command(resume=tmp_path / "run")[0] == 0
    else:
        assert command()[0] == 0
    resumed, straight = (load_adapter(tmp_path / name / "adapter").arrays for name in ("run", "straight"))
    assert all((resumed[name] == straight[name]).all() for name in straight)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("this user may not mount")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_disk_that_is_really_full_and_then_read_only(command, small_disk):
    code, _, errors = command(output_dir=str(small_disk / "run"), num_server_rounds=20)
    assert code == 1
    assert "cannot be written (No space left on device)" in one_sentence(errors)
    subprocess.run(["mount", "-o", "remount,size=10m", small_disk], check=True)
    assert command(resume=small_disk / "run")[0] == 0

    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for code, _, errors in (command(resume=small_disk / "run"), command(output_dir=str(small_disk / "another"))):
        assert code in (1, 2)
        assert "cannot be written (Read-only file system)" in one_sentence(errors)


def test_pipe_that_nobody_reads_any_more_ends_the_run_with_one_sentence(command, monkeypatch, tmp_path):
    def closed(*_):
        try:
            raise BrokenPipeError
        except BrokenPipeError:
            raise SystemExit(1)  # noqa: B904  # as rich's Console does

    monkeypatch.setattr(Display, "round", closed)
    code, _, errors = command()
    assert code == 1
    assert "Nobody reads any more what the run prints; go on with --resume." in one_sentence(errors)
    assert RunFolder.open(tmp_path / "run").summary["status"] == "interrupted"


def test_end_that_flower_asks_for_is_handed_on(command, monkeypatch, tmp_path):
    def stopped(*_):
        raise SystemExit(0)  # as Flower's handler of SIGTERM does in a ServerApp

    monkeypatch.setattr(Display, "round", stopped)
    with pytest.raises(SystemExit, match="0"):
        command()
    assert RunFolder.open(tmp_path / "run").summary["status"] == "interrupted"


def test_output_folder_that_cannot_be_made_is_refused(command, tmp_path):
    (tmp_path / "file").write_text("no folder")
    code, _, errors = command(output_dir=str(tmp_path / "file/run"))
    assert code == 2
    assert "cannot be written (Not a directory); choose another output-dir" in one_sentence(errors)


def test_private_run_says_its_epsilon_and_goes_on_counting_when_resumed(command, monkeypatch, tmp_path):
    values = {"clip_norm": 1.0, "noise_multiplier": 2.0, "num_server_rounds": 3}
    assert command(output_dir=str(tmp_path / "straight"), **values)[0] == 0
    straight = RunFolder.open(tmp_path / "straight").summary["privacy"]
    assert straight["epsilon"] > 1
    assert straight["most_participations"] in (2, 3)

    aggregate = FedPrompt.aggregate_train

    def interrupted(self, server_round, replies):
        if server_round == 2:
            raise KeyboardInterrupt
        return aggregate(self, server_round, replies)

    with monkeypatch.context() as patch:
        patch.setattr(FedPrompt, "aggregate_train", interrupted)
        assert command(**values)[0] == 130
    assert RunFolder.open(tmp_path / "run").summary["rounds"] == 1
    assert command(resume=tmp_path / "run")[0] == 0
    assert RunFolder.open(tmp_path / "run").summary["privacy"] == straight


def test_private_round_whose_result_was_seen_before_the_cut_costs_its_clients_twice(command, monkeypatch, tmp_path):
    ask, asked = federated_run.evaluate_on_clients, []

    def cut_off_when_round_1_is_measured(*arguments, **options):
        answer = ask(*arguments, **options)
        asked.append(answer)
        if len(asked) == 3:  # after the bare model and round 0
            raise KeyboardInterrupt
        return answer

    values = {"clip_norm": 1.0, "noise_multiplier": 2.0, "evaluate_on": "clients", "num_server_rounds": 1}
    with monkeypatch.context() as patch:
        patch.setattr(federated_run, "evaluate_on_clients", cut_off_when_round_1_is_measured)
        assert command(**values)[0] == 130
    assert [RunFolder.open(tmp_path / "run").summary["privacy"][key] for key in SPENT] == [epsilon_of(1), 1]
    assert command(resume=tmp_path / "run")[0] == 0
    assert [RunFolder.open(tmp_path / "run").summary["privacy"][key] for key in SPENT] == [epsilon_of(2), 2]


def test_private_round_that_a_corrupt_checkpoint_takes_back_costs_its_clients_twice(command, tmp_path):
    values = {"clip_norm": 1.0, "noise_multiplier": 2.0, "num_clients": 3, "num_server_rounds": 2}
    assert command(**values)[0] == 0
    newest = tmp_path / "run/checkpoints/round-000002.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    assert command(resume=tmp_path / "run")[0] == 0
    assert [RunFolder.open(tmp_path / "run").summary["privacy"][key] for key in SPENT] == [epsilon_of(3), 3]
    assert command(resume=tmp_path / "run")[0] == 0  # makes no round again
    assert RunFolder.open(tmp_path / "run").summary["privacy"]["most_participations"] == 3


def epsilon_of(participations):
    noise = NoiseConfig(1.0, 2.0, 1e-5)
    return spent_epsilon(noise, num_clients=10, clients_per_round=3, participations=participations)


def test_private_run_that_only_clips_has_no_epsilon(command, tmp_path):
    assert command(clip_norm=1.0, num_server_rounds=1)[0] == 0
    assert RunFolder.open(tmp_path / "run").summary["privacy"]["epsilon"] is None


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"clip_norm": 1.0, "aggregation": "median"}, "`aggregation` is 'median', but `clip-norm` needs the mean"),
        ({"clip_norm": 1.0, "weighting": "num-examples"}, "`clip-norm` is set, which counts all clients alike"),
        ({"clip_norm": 1.0, "server_weight": 1.0}, "set `server-weight` to 0"),
        ({"aggregation": "krum", "weighting": "gate-mass", "clients_per_round": 9}, "counts all clients alike"),
        ({"aggregation": "krum"}, "needs 7 clients in a round"),
        ({"round_timeout": 0.0}, "`round-timeout` is 0.0"),
    ],
)
def test_contradicting_values_are_refused(command, tmp_path, changes, complaint):
    code, _, errors = command(**changes)
    assert code == 2
    assert complaint in one_sentence(errors)
    assert not (tmp_path / "run").exists()


def test_run_that_flower_itself_starts_says_that_it_failed(run_config, tmp_path, monkeypatch):
    def fail(*_):
        raise RunError("too few")

    monkeypatch.setattr(FedPrompt, "aggregate_train", fail)
    values = run_config({"output-dir": str(tmp_path / "run")})
    with pytest.raises(RunError):
        run_inline(AppFolder.find("experiments.dolly"), values, catch_signals=lambda: None)
    assert RunFolder.open(tmp_path / "run").summary["status"] == "failed"


def test_clients_that_have_other_rows_are_refused_before_the_first_round(command, run_config, tmp_path, monkeypatch):
    lines = sample_path().read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "real.jsonl").write_text("".join(lines[::-1]), encoding="utf-8")
    elsewhere = trainer.Trainer(run_config())  # that machine has the bundled sample
    monkeypatch.setattr(client_app, "connect", lambda run_config, own_data="": elsewhere)
    code, _, errors = command("--data", str(tmp_path / "real.jsonl"))
    assert code == 2
    assert errors.count("\n") == 1
    assert "cannot take part: it has other rows than the server" in errors
    assert not (tmp_path / "run/metrics.jsonl").exists()
