"""A federated run on the server: the strategy trains the rounds over a Grid."""

from collections.abc import Mapping

from flwr.app import ArrayRecord
from flwr.serverapp import Grid

from clients.trainer import Setting, Trainer
from experiments.checkpoint import Checkpoint
from experiments.client_evaluation import evaluate_on_clients
from experiments.config import ExperimentConfig
from experiments.run import Run
from mops_fl.config import Scalar
from mops_fl.evaluation import Evaluation
from mops_fl.methods import METHODS
from mops_fl.payload import Arrays, EvaluateRequest, TrainResult, from_record, to_record
from strategies.registry import STRATEGIES
from strategies.sampling import ClientSampler

# A round may take hours on a slow client; what comes later is counted as missing.
ROUND_TIMEOUT_SECONDS = 6 * 3600.0


class FederatedRun(Run):
    """The strategy calls back after every round."""

    training = "federated"

    def __init__(
        self,
        config: ExperimentConfig,
        run_config: Mapping[str, Scalar],
        trainer: Trainer,
        setting: Setting,
        grid: Grid,
        sampler: ClientSampler,
    ) -> None:
        """Take what a `Run` needs, the nodes, and who is sampled among them.

        Raises:
            InputError: the run folder cannot be used.
        """
        super().__init__(config, run_config, trainer, setting)
        self._grid = grid
        self._sampler = sampler

    def _evaluate(self, adapter: Arrays, frozen: Arrays) -> Evaluation:
        if self._config.client.trainer.evaluate_on == "server":
            return super()._evaluate(adapter, frozen)
        config = self._config.client.adapter
        num_experts = config.num_experts if METHODS[config.method].gated else 0
        return self._ask_clients(EvaluateRequest(self._setting.tasks, adapter, frozen), num_experts)

    def _evaluate_bare(self) -> Evaluation:
        if self._config.client.trainer.evaluate_on == "server":
            return super()._evaluate_bare()
        return self._ask_clients(EvaluateRequest(self._setting.tasks, {}, {}), num_experts=0)

    def _ask_clients(self, request: EvaluateRequest, num_experts: int) -> Evaluation:
        nodes = self._sampler.node_of.values()
        return evaluate_on_clients(
            self._grid, nodes, request, num_experts=num_experts, timeout_seconds=ROUND_TIMEOUT_SECONDS
        )

    def _train(self, checkpoint: Checkpoint) -> None:
        federation, rounds_done = self._config.federation, self._progress.rounds_done

        def server(server_round: int, arrays: ArrayRecord) -> TrainResult:
            return self._trainer.train_server(server_round, from_record(arrays), checkpoint.frozen)

        strategy = STRATEGIES[self._config.client.adapter.method](
            self._sampler,
            weighting=federation.weighting,
            frozen=to_record(checkpoint.frozen),
            rounds_done=rounds_done,
            on_round=self._after_training,
            server=server if federation.server_weight else None,
            server_weight=federation.server_weight,
        )

        def evaluate(server_round: int, arrays: ArrayRecord) -> None:
            # Flower calls this with round 0 before the first round; that state is measured and saved already.
            if server_round:
                self._after_round(from_record(arrays), checkpoint.frozen)

        strategy.start(
            grid=self._grid,
            initial_arrays=to_record(checkpoint.adapter),
            num_rounds=federation.num_server_rounds - rounds_done,
            timeout=ROUND_TIMEOUT_SECONDS,
            evaluate_fn=evaluate,
        )
