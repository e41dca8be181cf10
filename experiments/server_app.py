"""The ServerApp: from a run-config to a finished run folder.

Everything that can be refused is refused before anything slow starts: first the config, then data and model, then
the clients, then the output folder.
"""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from clients.resident import connect
from experiments.config import ExperimentConfig
from experiments.federated_run import FederatedRun
from experiments.nodes import find_clients, numbered_as_before, with_own_rows
from experiments.reply_guard import ReplyGuard
from experiments.run_folder import RunFolder, output_dir
from partitioning import OWN_ROWS
from strategies.sampling import ClientSampler

app = ServerApp()

# A SuperNode on another machine may need a while to start; in a simulation all are there within a second.
NODE_PATIENCE_SECONDS = 30.0


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the experiment that the run-config describes."""
    grid = ReplyGuard(grid)
    config = ExperimentConfig.from_run_config(context.run_config)
    trainer = connect(context.run_config)
    setting = trainer.setting()
    num_clients = config.client.partition.num_clients
    hashes = setting.backbone_sha256, setting.data_sha256
    clients = find_clients(grid, num_clients, *hashes, patience_seconds=NODE_PATIENCE_SECONDS)
    if config.client.partition.partitioner == OWN_ROWS:
        if config.federation.resume:
            folder = RunFolder.open(output_dir(context.run_config))
            clients = numbered_as_before(clients, folder.partition or {"clients": []})
        setting = with_own_rows(setting, clients)
    sampler = ClientSampler(
        clients,
        clients_per_round=config.federation.clients_per_round,
        cohort_size=config.federation.cohort_size,
        seed=config.client.partition.seed,
    )
    FederatedRun(config, context.run_config, trainer, setting, grid, sampler).run()
