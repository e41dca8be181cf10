"""A federated run on the server: the strategy trains the rounds over a Grid."""

import logging
from collections.abc import Mapping
from dataclasses import asdict

from flwr.app import ArrayRecord
from flwr.serverapp import Grid

from clients.setting import Setting
from clients.trainer import Trainer
from experiments.checkpoint import Checkpoint
from experiments.client_evaluation import evaluate_on_clients
from experiments.config import ExperimentConfig
from experiments.nodes import RollCall
from experiments.run import Run
from mops_fl.config import Scalar
from mops_fl.evaluation import Evaluation
from mops_fl.payload import Arrays, EvaluateRequest, TrainResult, from_record, to_record
from mops_fl.reply_check import ReplyLimits
from strategies.aggregation import Aggregate, build_aggregate, needed_replies
from strategies.fedprompt import Acceptance
from strategies.privacy import private_mean, spent_epsilon
from strategies.registry import STRATEGIES
from strategies.sampling import ClientSampler

logger = logging.getLogger(__name__)


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
        self._roll_call = RollCall(sampler, setting.backbone_sha256, setting.data_sha256)

    def _evaluate(self, adapter: Arrays, frozen: Arrays) -> Evaluation:
        if self._config.client.trainer.evaluate_on == "server":
            return super()._evaluate(adapter, frozen)
        request = EvaluateRequest(self._setting.tasks, adapter, frozen)
        evaluation, missing = self._ask_clients(request, self._config.client.adapter.num_gated)
        self._log("test", "missing-clients", missing)
        return evaluation

    def _evaluate_bare(self) -> Evaluation:
        if self._config.client.trainer.evaluate_on == "server":
            return super()._evaluate_bare()
        return self._ask_clients(EvaluateRequest(self._setting.tasks, {}, {}), num_experts=0)[0]

    def _ask_clients(self, request: EvaluateRequest, num_experts: int) -> tuple[Evaluation, int]:
        """What the connected clients measure, and how many are missing from it."""
        connected = self._roll_call(self._grid)
        nodes = [node_id for _, node_id in sorted(self._sampler.node_of.items())]
        evaluation, num_measured = evaluate_on_clients(
            self._grid,
            [node_id for node_id in nodes if node_id in connected],
            request,
            num_experts=num_experts,
            tokens_per_row=self._config.client.data.max_length,
            timeout_seconds=self._config.federation.round_timeout,
        )
        if missing := len(nodes) - num_measured:
            self._progress.evaluations_missing += missing
            logger.warning("The perplexity is that of %d of %d clients.", num_measured, len(nodes))
        return evaluation, missing

    def _train(self, checkpoint: Checkpoint) -> None:
        federation, rounds_done = self._config.federation, self._progress.rounds_done

        def server(server_round: int, arrays: ArrayRecord) -> TrainResult:
            return self._trainer.train_server(server_round, from_record(arrays), checkpoint.frozen)

        strategy = STRATEGIES[self._config.client.adapter.method](
            self._sampler,
            weighting=federation.weighting,
            aggregate=self._build_aggregate(),
            acceptance=self._acceptance(),
            frozen=to_record(checkpoint.frozen),
            rounds_done=rounds_done,
            on_round=self._after_training,
            num_experts=self._config.client.adapter.num_gated,
            connected=self._roll_call,
            server=server if federation.server_weight else None,
            server_weight=federation.server_weight,
        )

        def evaluate(server_round: int, arrays: ArrayRecord) -> None:
            # Flower calls this with round 0 before the first round; that state is measured and saved already.
            if server_round:
                self._note_release()
                self._after_round(from_record(arrays), checkpoint.frozen)

        strategy.start(
            grid=self._grid,
            initial_arrays=to_record(checkpoint.adapter),
            num_rounds=federation.num_server_rounds - rounds_done,
            timeout=federation.round_timeout,
            evaluate_fn=evaluate,
        )

    def _build_aggregate(self) -> Aggregate:
        noise = self._config.noise
        if noise.clip_norm:
            return private_mean(noise, self._config.federation.clients_per_round)
        return build_aggregate(self._config.aggregation)

    def _acceptance(self) -> Acceptance:
        client, aggregation = self._config.client, self._config.aggregation
        limits = ReplyLimits(client.train.local_steps, client.train.batch_size, client.data.max_length)
        # Clipping does what the ratio is for, and what is refused may not depend on the other clients' updates.
        ratio = 0.0 if self._config.noise.clip_norm else aggregation.max_norm_ratio
        return Acceptance(limits, ratio, max(aggregation.min_replies, needed_replies(aggregation)))

    def _note_release(self) -> None:
        """Before a noisy adapter can leave: if its round is made again, with other noise, both may have been seen."""
        if self._config.noise.noise_multiplier:
            self._folder.note_release(self._progress.rounds_done)
            self._folder.write_summary({**(self._folder.summary or {}), "privacy": self._privacy()})

    def _privacy(self) -> dict[str, float | int | None]:
        """What an onlooker can at most have learnt about any one client from all adapters so far."""
        noise, federation = self._config.noise, self._config.federation
        again = self._folder.releases()
        again.subtract(range(1, self._progress.rounds_done + 1))
        participations = self._sampler.most_participations(self._progress.rounds_done, again.elements())
        epsilon = None  # unbounded
        if noise.noise_multiplier and participations:
            epsilon = spent_epsilon(
                noise,
                num_clients=self._config.client.partition.num_clients,
                clients_per_round=federation.clients_per_round,
                participations=participations,
            )
        return {**asdict(noise), "epsilon": epsilon, "most_participations": participations}

    def _results(self) -> dict[str, object]:
        results: dict[str, object] = {"aggregation": self._config.aggregation.aggregation}
        if self._config.client.trainer.evaluate_on == "clients":
            results["evaluations_missing"] = self._progress.evaluations_missing
        return results | ({"privacy": self._privacy()} if self._config.noise.clip_norm else {})
