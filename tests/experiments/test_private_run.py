"""Whole private runs: what they say they spent, also when they were cut off."""

import pytest

from experiments import federated_run
from experiments.run_folder import RunFolder
from strategies.fedprompt import FedPrompt
from strategies.privacy import NoiseConfig, spent_epsilon

pytestmark = pytest.mark.usefixtures("command_in_process")

SPENT = ("epsilon", "most_participations")


def epsilon_of(participations):
    noise = NoiseConfig(1.0, 2.0, 1e-5)
    return spent_epsilon(noise, num_clients=10, clients_per_round=3, participations=participations)


def test_private_run_says_its_epsilon_and_goes_on_counting_when_resumed(simulate, monkeypatch, tmp_path):
    values = {"clip_norm": 1.0, "noise_multiplier": 2.0, "num_server_rounds": 3}
    assert simulate(output_dir=str(tmp_path / "straight"), **values)[0] == 0
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
        assert simulate(**values)[0] == 130
    assert RunFolder.open(tmp_path / "run").summary["rounds"] == 1
    assert simulate("--resume", str(tmp_path / "run"))[0] == 0
    assert RunFolder.open(tmp_path / "run").summary["privacy"] == straight


def test_private_round_whose_result_was_seen_before_the_cut_costs_its_clients_twice(simulate, monkeypatch, tmp_path):
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
        assert simulate(**values)[0] == 130
    assert [RunFolder.open(tmp_path / "run").summary["privacy"][key] for key in SPENT] == [epsilon_of(1), 1]
    assert simulate("--resume", str(tmp_path / "run"))[0] == 0
    assert [RunFolder.open(tmp_path / "run").summary["privacy"][key] for key in SPENT] == [epsilon_of(2), 2]


def test_private_round_that_a_corrupt_checkpoint_takes_back_costs_its_clients_twice(simulate, tmp_path):
    values = {"clip_norm": 1.0, "noise_multiplier": 2.0, "num_clients": 3, "num_server_rounds": 2}
    assert simulate(**values)[0] == 0
    newest = tmp_path / "run/checkpoints/round-000002.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    assert simulate("--resume", str(tmp_path / "run"))[0] == 0
    assert [RunFolder.open(tmp_path / "run").summary["privacy"][key] for key in SPENT] == [epsilon_of(3), 3]
    assert simulate("--resume", str(tmp_path / "run"))[0] == 0  # makes no round again
    assert RunFolder.open(tmp_path / "run").summary["privacy"]["most_participations"] == 3


def test_private_run_that_only_clips_has_no_epsilon(simulate, tmp_path):
    assert simulate(clip_norm=1.0, num_server_rounds=1)[0] == 0
    assert RunFolder.open(tmp_path / "run").summary["privacy"]["epsilon"] is None
