"""`flower-simulation` on Ray, as a user starts it, with the tiny model."""

import json
import signal

import pytest

from mops_fl.adapter_folder import load_adapter

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def test_ray_and_inline_end_with_the_same_adapter_to_the_bit(simulate, tmp_path):
    adapters = []
    for backend in ("ray", "inline"):
        folder = tmp_path / backend
        process = simulate("--backend", backend, output_dir=str(folder))
        output, errors = process.communicate()
        assert process.returncode == 0, errors
        assert "made for this project" in output.splitlines()[0] + output.splitlines()[1]
        assert "raylet" not in output + errors
        assert summary_of(folder)["status"] == "complete"
        assert (folder / "report.html").is_file()
        adapters.append(load_adapter(folder / "adapter").arrays)
    on_ray, inline = adapters
    assert on_ray.keys() == inline.keys()
    assert all((on_ray[name] == inline[name]).all() for name in on_ray)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_in_seconds_and_leaves_a_valid_folder(simulate, tmp_path, number, code):
    process = simulate(num_server_rounds=500)
    for line in process.stdout:
        if line.startswith("round 3/"):  # the checkpoint of round 2 is written
            break
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert summary_of(tmp_path / "run")["status"] == "interrupted"
    assert summary_of(tmp_path / "run")["rounds"] >= 2


def test_a_failing_client_shows_its_traceback_once_and_the_run_goes_on(simulate, faulty_app, tmp_path):
    app = faulty_app('context.node_config["partition-id"] % 2', 'raise OSError("no space left on device")')
    process = simulate(app=app, clients_per_round=8)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    failures = summary_of(tmp_path / "run")["failures"]
    assert failures >= 6  # 8 of 10 clients, 5 of them odd, in each of two rounds
    assert output.count("faulty_client.py") == 1, output
    assert "OSError: no space left on device" in output
    assert "ClientAppException" not in errors
    assert output.count("as above") == failures - 1


def test_a_round_without_any_usable_reply_ends_the_run_with_code_1(simulate, faulty_app, tmp_path):
    process = simulate(app=faulty_app("True", 'raise OSError("no space left on device")'))
    _, errors = process.communicate()
    assert process.returncode == 1
    assert "Round 1 had no usable reply" in errors
    assert summary_of(tmp_path / "run")["status"] == "failed"


def test_bad_input_found_on_ray_ends_with_one_sentence_and_code_2(simulate):
    process = simulate(inject_layer=99)
    _, errors = process.communicate()
    assert process.returncode == 2, errors
    assert "layers 0 to 3" in errors
    assert errors.count("\n") == 1, errors
