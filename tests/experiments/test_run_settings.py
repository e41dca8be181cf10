"""What the run-config says reaches what it is for: privacy, strategy, measurements, resumed runs."""

from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments import federated_run
from experiments.app_folder import AppFolder
from experiments.inline import InlineGrid
from experiments.measurements import series
from experiments.nodes import RollCall
from experiments.run_folder import RunFolder
from experiments.runtimes import run_inline
from experiments.same_run import require_same_run
from mops_fl.errors import InputError, RunError
from strategies.mops import MoPs

pytestmark = pytest.mark.usefixtures("command_in_process")

MAY_CHANGE = {
    "output-dir",
    "resume",
    "data-path",
    "num-server-rounds",
    "evaluate-every",
    "round-timeout",
    "cache-megabytes",
    "cache-file-megabytes",
    "min-replies",
    "dtype",
}


@pytest.fixture
def run(run_config, tmp_path):
    def call(name="run", **changes):
        values = run_config(
            {"output-dir": str(tmp_path / name), **{k.replace("_", "-"): v for k, v in changes.items()}}
        )
        run_inline(AppFolder.find("experiments.dolly"), values, catch_signals=lambda: None)
        return RunFolder.open(tmp_path / name)

    return call


def test_private_run_clips_every_update_and_adds_the_noise_that_it_accounts_for(run):
    def update(name, **changes):
        folder = run(name, num_server_rounds=1, **changes).path / "checkpoints"
        start, end = (load_file(folder / f"round-{number:06d}.safetensors") for number in (0, 1))
        return np.concatenate([(end[key] - start[key]).ravel() for key in start if key.startswith("adapter/")])

    assert np.linalg.norm(update("plain")) > 0.1
    assert np.linalg.norm(update("clipped", clip_norm=1e-3)) < 1.01e-3
    noise = update("noisy", clip_norm=1e-3, noise_multiplier=1000.0)  # on the sum of three: 1 for each of 775 numbers
    assert noise.std() == pytest.approx(1 / 3, rel=0.15)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"weighting": "num-examples", "server_weight": 2.5}, {"weighting": "num-examples", "server_weight": 2.5}),
        (
            {"aggregation": "krum", "krum_malicious": 1, "clients_per_round": 6},
            {"min_replies": 5, "max_norm_ratio": 100.0},
        ),
        ({"clip_norm": 1.0, "seed": 3, "max_length": 50}, {"max_norm_ratio": 0.0, "seed": 3, "limits": (2, 1, 50)}),
    ],
)
def test_strategy_gets_what_the_run_config_says(run, monkeypatch, changes, expected):
    found = {}

    class Seen(MoPs):
        def __init__(self, sampler, **options):
            accepted = options["acceptance"]
            limits = accepted.limits
            found.update(
                options,
                seed=sampler._seed,
                max_norm_ratio=accepted.max_norm_ratio,
                min_replies=accepted.min_replies,
                limits=(limits.num_steps, limits.rows_per_step, limits.tokens_per_row),
            )
            raise RunError("seen")

    monkeypatch.setitem(federated_run.STRATEGIES, "mops", Seen)
    with pytest.raises(RunError, match="seen"):
        run(**changes)
    assert {key: found[key] for key in expected} == expected
    assert isinstance(found["connected"], RollCall)


def test_reply_that_cannot_be_read_costs_a_run_that_reply_alone(run, monkeypatch):
    pull, broken = InlineGrid.pull_messages, []

    def unreadable(self, message_ids):
        replies = list(pull(self, message_ids))
        if any(reply.metadata.message_type == "train" for reply in replies) and not broken:
            broken.append(replies)
            raise TypeError("no such shape")
        return replies

    monkeypatch.setattr(InlineGrid, "pull_messages", unreadable)
    summary = run().summary
    assert (summary["status"], summary["failures"], summary["client_steps"]) == ("complete", 1, 2 * 3 * 2 - 2)


def test_rounds_between_two_measurements_are_as_many_as_asked_for(run):
    folder = run(num_server_rounds=3, evaluate_every=2)
    assert [point.round for point in series(folder.metrics(), "perplexity")] == [0, 2, 3]


def test_every_value_that_changes_what_a_round_comes_to_is_kept(run_config, tmp_path):
    values = run_config()
    folder = RunFolder.create(tmp_path / "run", values)
    setting = SimpleNamespace(dtype="", data_sha256="", backbone_sha256="")
    refused = set()
    for key, value in values.items():
        other = not value if isinstance(value, bool) else value + 1 if isinstance(value, int | float) else f"{value}x"
        try:
            require_same_run(folder, {**values, key: other}, setting)
        except InputError:
            refused.add(key)
    assert set(values) - refused == MAY_CHANGE
