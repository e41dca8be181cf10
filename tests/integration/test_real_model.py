"""The laptop default, shortened, on the real model that `mops-fl fetch` brought."""

import json
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.usefixtures("real_model")]


def test_training_lowers_the_perplexity_of_the_real_model(started, tmp_path):
    settings = (
        "num-rows=350 server-rows=70 eval-rows=28 num-clients=20 num-server-rounds=1 local-steps=4 lr=0.03 "
        f"output-dir='{tmp_path / 'run'}'"
    )
    process = started(
        Path(sys.executable).with_name("flower-simulation"), "--app", "experiments.dolly", "--run-config", settings
    )
    output, errors = process.communicate()
    assert process.returncode == 0, output + errors
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert summary["perplexity"]["all"] < summary["perplexity_before"]["all"]
    assert summary["client_steps"] == 10 * 4
