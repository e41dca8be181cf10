"""One small federation on the real model and data, run again and again from the same start with other rules."""

from dataclasses import dataclass

import numpy as np
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from clients import client_app
from clients.resident import connect
from experiments.app_folder import AppFolder
from experiments.config import ExperimentConfig
from experiments.runtimes import inline_grid
from mops_fl.config import Scalar
from mops_fl.payload import ARRAYS, from_record, to_record
from mops_fl.reply_check import ReplyLimits
from strategies.aggregation import Aggregate
from strategies.fedprompt import Acceptance, RoundReport
from strategies.registry import STRATEGIES
from strategies.sampling import ClientSampler

# Small enough that a dozen of these federations are run in a few minutes on two cores.
SMALL: dict[str, Scalar] = {
    "num-server-rounds": 2,
    "local-steps": 4,
    "max-length": 96,
    "server-rows": 70,
    "eval-rows": 35,
}


@dataclass(frozen=True)
class Outcome:
    """What a federation came to.

    Attributes:
        perplexity: of all test rows at the end; NaN if the adapter is not finite any more.
        refused: replies that were refused, over all rounds.
    """

    perplexity: float
    refused: int


class Federation:
    """The Dolly app's federation; model, rows and start are loaded once."""

    def __init__(self, **changes: Scalar) -> None:
        """Prepare it with more of the app's values changed, names with underscores."""
        app = AppFolder.find("experiments.dolly")
        self.values = app.run_config(()) | SMALL | {name.replace("_", "-"): value for name, value in changes.items()}
        self.config = ExperimentConfig.from_run_config(self.values)
        self._trainer = connect(self.values)
        self._start = self._trainer.prepare()

    def sampler(self) -> ClientSampler:
        """Who is sampled when."""
        partition, federation = self.config.client.partition, self.config.federation
        return ClientSampler(
            {1 + client: self._trainer.describe(client) for client in range(partition.num_clients)},
            clients_per_round=federation.clients_per_round,
            cohort_size=federation.cohort_size,
            seed=partition.seed,
        )

    def run(self, aggregate: Aggregate, max_norm_ratio: float, app: ClientApp = client_app.app) -> Outcome:
        """Train all rounds and measure."""
        reports: list[RoundReport] = []
        train = self.config.client.train
        limits = ReplyLimits(train.local_steps, train.batch_size, self.config.client.data.max_length)
        strategy = STRATEGIES[self.config.client.adapter.method](
            self.sampler(),
            weighting="uniform",
            aggregate=aggregate,
            acceptance=Acceptance(limits, max_norm_ratio, min_replies=1),
            frozen=to_record(self._start.frozen),
            rounds_done=0,
            on_round=reports.append,
            num_experts=self.config.client.adapter.num_experts,
        )
        rounds, grid = self.config.federation.num_server_rounds, inline_grid(app, self.values)
        result = strategy.start(grid=grid, initial_arrays=to_record(self._start.adapter), num_rounds=rounds)
        perplexity = self._trainer.evaluate(from_record(result.arrays), self._start.frozen).perplexity()["all"]
        return Outcome(perplexity, sum(len(report.failures) for report in reports))

    def start_perplexity(self) -> float:
        """Before the first round."""
        return self._trainer.evaluate(self._start.adapter, self._start.frozen).perplexity()["all"]


def hostile_app(num_hostile: int, factor: float) -> ClientApp:
    """The usual ClientApp, but the first `num_hostile` clients send `factor` times their update."""
    app = ClientApp()
    app.query()(client_app.describe)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        reply = client_app.train(message, context)
        if int(context.node_config["partition-id"]) < num_hostile:
            sent, trained = (from_record(one.content.array_records[ARRAYS]) for one in (message, reply))
            claimed = {name: sent[name] + np.float32(factor) * (trained[name] - sent[name]) for name in sent}
            reply.content[ARRAYS] = to_record(claimed)
        return reply

    return app
