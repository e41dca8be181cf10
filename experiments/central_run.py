"""Central training: the same data, start, measurements and run folder as a federation, in one process, never averaged.

What a round is to a federation's clients, a segment is here: as many steps as all clients of a round take together. So
runs of both kinds can be laid over each other step by step.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch

from clients.resident import connect
from experiments.app_folder import AppFolder
from experiments.checkpoint import Checkpoint
from experiments.config import ExperimentConfig
from experiments.run import Run
from mops_fl.config import Scalar
from mops_fl.errors import InputError, RunError
from mops_fl.payload import metrics_of
from partitioning import OWN_ROWS
from strategies.fedprompt import RoundReport

# What says how clients share the work and are averaged -> its only value where there are none.
_WITHOUT_CLIENTS: Mapping[str, Scalar] = {
    "local-epochs": 0,
    "server-weight": 0,
    "weighting": "uniform",
    "aggregation": "mean",
    "clip-norm": 0,
}


class CentralRun(Run):
    """One learner on all training rows, whose optimiser is never started anew."""

    training = "central"

    def _train(self, checkpoint: Checkpoint) -> None:
        federation = self._config.federation
        segment = federation.clients_per_round * self._config.client.train.local_steps
        num_steps = segment * federation.num_server_rounds
        training = self._trainer.train_centrally(checkpoint.adapter, checkpoint.frozen, num_steps)
        done = self._progress.rounds_done
        if done:
            moments = {name: torch.tensor(array) for name, array in checkpoint.optimizer.items()}
            training.go_on(done * segment, moments)
        for number in range(done + 1, federation.num_server_rounds + 1):
            training.advance(segment)
            (result,) = training.results()
            if not all(np.isfinite(array).all() for array in (np.array(result.loss_sum), *result.adapter.values())):
                lr = self._config.client.train.lr
                raise RunError(f"Round {number}: the training is not finite any more; lower `lr`, which is {lr}.")
            self._after_training(
                RoundReport(number, metrics_of(result), drift={}, failures=(), bytes_down=0, bytes_up=0)
            )
            moments = training.optimizer_state()
            self._after_round(
                result.adapter, checkpoint.frozen, {name: value.numpy() for name, value in moments.items()}
            )


def run_centrally(app: AppFolder, run_config: Mapping[str, Scalar], *, catch_signals: Callable[[], None]) -> None:
    """Train centrally what the app would train in a federation; a `experiments.runtimes.Backend`.

    Raises:
        InputError: the config is not valid, or asks for what only a federation has.
    """
    config = ExperimentConfig.from_run_config(run_config)
    trainer_config, partition = config.client.trainer, config.client.partition
    if trainer_config.evaluate_on == "clients":
        raise InputError("`evaluate-on` is 'clients', but central training has none; set it to server.")
    if partition.partitioner == OWN_ROWS and trainer_config.central_rows == "clients":
        raise InputError("`partitioner` is 'own-rows', which only the clients have; set central-rows to server.")
    for key, value in _WITHOUT_CLIENTS.items():
        if run_config[key] != value:
            raise InputError(
                f"`{key}` is {run_config[key]!r}, but central training has no clients; set it to {value!r}."
            )
    catch_signals()
    trainer = connect(run_config)
    CentralRun(config, run_config, trainer, trainer.setting()).run()
