"""On a CUDA device: the whole of a run, cut off and gone on with, and the numbers that the CPU gives."""

import json

import numpy as np
import pytest
import torch

from clients import resident
from clients.local_training import Training
from experiments.cli import main
from mops_fl.adapter_folder import load_adapter
from mops_fl.config import METHODS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("method", METHODS)
def test_central_run_on_a_gpu_ends_where_one_on_the_cpu_does(run_config, tmp_path, monkeypatch, method):
    def train(name):
        resident._build_trainer.cache_clear()
        values = run_config({"method": method, "evaluate-every": 1, "output-dir": str(tmp_path / name)})
        text = " ".join(f"{key}={json.dumps(value)}" for key, value in values.items())
        return main(["train", "--app", "experiments.dolly", "-c", text])

    def interrupted(self, num_steps):
        if self._steps_done:
            raise KeyboardInterrupt
        advance(self, num_steps)

    advance = Training.advance
    with monkeypatch.context() as patch:
        patch.setattr(Training, "advance", interrupted)
        assert train("gpu") == 130
    resident._build_trainer.cache_clear()
    assert main(["train", "--app", "experiments.dolly", "--resume", str(tmp_path / "gpu")]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        assert train("cpu") == 0
    devices = [json.loads((tmp_path / name / "summary.json").read_text())["device"] for name in ("gpu", "cpu")]
    assert devices == [torch.cuda.get_device_name(), "cpu"]
    on_gpu, on_cpu = (load_adapter(tmp_path / name / "adapter").arrays for name in ("gpu", "cpu"))
    for name, array in on_cpu.items():
        np.testing.assert_allclose(on_gpu[name], array, rtol=0, atol=1e-3, err_msg=name)
