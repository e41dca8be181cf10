"""What every run does, federated or central: start, measurements, checkpoints, and the folder they leave."""

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping

from rich.console import Console

from clients.setting import Setting
from clients.trainer import Trainer
from experiments.checkpoint import Checkpoint, Progress, load_checkpoint, save_checkpoint
from experiments.config import ExperimentConfig
from experiments.display import Display
from experiments.durable import writing
from experiments.model_card import model_card
from experiments.report import print_perplexity_table, write_report
from experiments.run_folder import ALL_TASKS, PARTITION, RunFolder, only_finite, output_dir
from experiments.same_run import require_no_more_rounds, require_same_run, require_training
from mops_fl.adapter_folder import RUN_ADAPTER, AdapterDescription, SavedAdapter, save_adapter
from mops_fl.config import Scalar
from mops_fl.errors import RunError
from mops_fl.evaluation import Evaluation
from mops_fl.payload import Arrays
from strategies.fedprompt import RoundReport

_UNDER_WAY: "set[Run]" = set()  # of this process, in whichever thread


def mark_interrupted() -> None:
    """Say in the summary of every run that this process writes that it was interrupted.

    For whoever gets the signal: on Ray the run is in another thread. A run that another process writes may go on.
    """
    for run in tuple(_UNDER_WAY):
        run._folder.mark("interrupted")


class Run(ABC):
    """Owns the run folder and the progress; how a round is trained is the subclass's.

    Attributes:
        training: `federated` or `central`.
    """

    training: str

    def __init__(
        self, config: ExperimentConfig, run_config: Mapping[str, Scalar], trainer: Trainer, setting: Setting
    ) -> None:
        """Make the run folder, or open it and go back to its newest checkpoint, or to the start if it has none.

        Raises:
            InputError: the folder cannot be used, is that of another run, or another process writes there.
            RunError: it cannot be written any more.
        """
        self._config = config
        self._trainer = trainer
        self._setting = setting
        path = output_dir(run_config)
        self._checkpoint: Checkpoint | None = None
        if config.federation.resume:
            self._folder = RunFolder.open(path)
            self._claim = self._folder.claim()
            require_training(self._folder, self.training)
            require_same_run(self._folder, run_config, setting)
            self._checkpoint = load_checkpoint(path)
            rounds_done = self._checkpoint.progress.rounds_done if self._checkpoint else -1
            require_no_more_rounds(path, rounds_done, config.federation.num_server_rounds)
            self._folder.write_resumed({**run_config, "output-dir": str(path), "resume": False})
            self._folder.rewind(rounds_done)
        else:
            self._folder = RunFolder.create(path, {**run_config, "output-dir": str(path)})
            self._claim = self._folder.claim()
        self._folder.write_json(PARTITION, setting.manifest)
        self._progress = self._checkpoint.progress if self._checkpoint else Progress()
        self._began = time.monotonic() - self._progress.elapsed_seconds
        self._round_began = self._began
        self._console = Console(soft_wrap=True)
        self._display = Display(self._console, config.federation.num_server_rounds, self._progress.rounds_done)

    def run(self) -> None:
        """Train the rounds that are still to be done, then write adapter, summary and report.

        Raises:
            RunError: a round had too few usable replies, the run folder cannot be written any more, or nobody reads
                any more what the run prints.
        """
        _UNDER_WAY.add(self)
        try:
            with self._display:
                self._display.say(f"run folder: {self._folder.path}")
                self._display.setting(self._setting)
                checkpoint = self._checkpoint = self._checkpoint or self._prepare()
                self._round_began = time.monotonic()
                self._display.begin_rounds()
                if self._progress.rounds_done < self._config.federation.num_server_rounds:
                    self._train(checkpoint)
                elif not self._last_is_measured():  # it was not to be the last one when it was made
                    self._after_round(checkpoint.adapter, checkpoint.frozen, checkpoint.optimizer)
            self._finish(self._checkpoint)
        except BaseException as error:
            self._folder.mark("failed" if isinstance(error, Exception) else "interrupted")
            # What rich makes of a closed pipe; Flower's thread would swallow it. Flower ends a ServerApp by others.
            if isinstance(error, SystemExit) and isinstance(error.__context__, BrokenPipeError):
                raise RunError("Nobody reads any more what the run prints; go on with --resume.") from error
            raise
        finally:
            _UNDER_WAY.discard(self)
            self._claim.close()

    @abstractmethod
    def _train(self, checkpoint: Checkpoint) -> None:
        """Train the rounds after the checkpoint; call `_after_training` and `_after_round` for each."""

    def _evaluate(self, adapter: Arrays, frozen: Arrays) -> Evaluation:
        """Measure an adapter."""
        return self._trainer.evaluate(adapter, frozen)

    def _evaluate_bare(self) -> Evaluation:
        """Measure the model without prompts."""
        return self._trainer.evaluate_bare()

    def _prepare(self) -> Checkpoint:
        """Measure the bare model, pretrain on the server's rows, measure again; this is round 0."""
        progress = self._progress
        bare = self._evaluate_bare()
        progress.perplexity_bare = bare.perplexity()
        self._log_evaluation(bare, "perplexity-bare")
        self._display.say(f"test perplexity of the model without prompts: {progress.perplexity_bare[ALL_TASKS]:.3f}")
        start = self._trainer.prepare()
        if start.gate_accuracy is not None:
            self._log("server", "gate-accuracy", start.gate_accuracy)
            self._display.say(f"gate pretrained: right on {start.gate_accuracy:.0%} of the server's rows")
        before = self._evaluate(start.adapter, start.frozen)
        progress.perplexity_before = progress.perplexity = before.perplexity()
        self._log_evaluation(before, "perplexity")
        self._display.evaluation(0, progress.perplexity)
        return self._save(start.adapter, start.frozen, {})

    def _after_training(self, report: RoundReport) -> None:
        progress = self._progress
        totals = report.totals
        seconds = time.monotonic() - self._round_began
        progress.rounds_done = report.server_round
        progress.client_steps += totals["num-steps"]
        progress.num_tokens += totals["num-tokens"]
        progress.train_seconds += seconds
        progress.bytes_up += report.bytes_up
        progress.bytes_down += report.bytes_down
        progress.failures += len(report.failures)
        for failure in report.failures:
            client = str(failure.client)
            progress.failures_by_client[client] = progress.failures_by_client.get(client, 0) + 1
        self._log("train", "loss", totals["loss-sum"] / totals["num-tokens"])
        self._log("train", "tokens-per-second", totals["num-tokens"] / seconds)
        self._log("train", "round-seconds", seconds)
        self._log("train", "bytes-up", report.bytes_up)
        self._log("train", "bytes-down", report.bytes_down)
        self._log("train", "failures", len(report.failures))
        for name, value in report.drift.items():
            self._log("train", name, value)
        for expert, mass in enumerate(totals["gate-mass"]):
            self._log("train", f"gate-mass-expert-{expert}", mass)
        self._display.round(report, progress.client_steps, seconds)

    def _after_round(self, adapter: Arrays, frozen: Arrays, optimizer: Arrays | None = None) -> None:
        federation, progress = self._config.federation, self._progress
        is_last = progress.rounds_done == federation.num_server_rounds
        if is_last or progress.rounds_done % federation.evaluate_every == 0:
            evaluation = self._evaluate(adapter, frozen)
            progress.perplexity = evaluation.perplexity()
            self._log_evaluation(evaluation, "perplexity")
            self._display.evaluation(progress.rounds_done, progress.perplexity)
        self._save(adapter, frozen, optimizer or {})
        self._round_began = time.monotonic()

    def _last_is_measured(self) -> bool:
        """Whether the newest perplexity is the last round's; what a process left that died while logging it is not."""
        logged = [
            entry["value"]
            for entry in self._folder.metrics()
            if (entry["round"], entry["metric"], entry["task"]) == (self._progress.rounds_done, "perplexity", ALL_TASKS)
        ]
        return logged[-1:] == [only_finite(self._progress.perplexity[ALL_TASKS])]

    def _save(self, adapter: Arrays, frozen: Arrays, optimizer: Arrays) -> Checkpoint:
        self._progress.elapsed_seconds = time.monotonic() - self._began
        checkpoint = self._checkpoint = Checkpoint(adapter, frozen, self._progress, optimizer)
        self._folder.sync()  # a checkpoint of this round says that its metrics are there
        save_checkpoint(self._folder.path, checkpoint)
        self._write_summary("running", checkpoint)
        return checkpoint

    def _finish(self, checkpoint: Checkpoint) -> None:
        with writing(self._folder.path):
            arrays = {**checkpoint.adapter, **checkpoint.frozen}
            description = self._description()
            saved = SavedAdapter(description, arrays, model_card(self._folder, description))
            save_adapter(self._folder.path / RUN_ADAPTER, saved)
            self._write_summary("complete", checkpoint)
            report = write_report(self._folder)
        print_perplexity_table(self._folder.results(), self._console)
        self._display.say(f"report: {report}")

    def _description(self) -> AdapterDescription:
        client = self._config.client
        return AdapterDescription(
            adapter=client.adapter,
            backbone=client.backbone,
            backbone_sha256=self._setting.backbone_sha256,
            data=client.data,
            tasks=self._setting.tasks,
            experts=self._experts(),
        )

    def _log_evaluation(self, evaluation: Evaluation, metric: str) -> None:
        for task, value in evaluation.perplexity().items():
            self._log("test", metric, value, task)
        for task, scores in zip(evaluation.tasks, evaluation.gate or (), strict=bool(evaluation.gate)):
            for expert, score in enumerate(scores):
                self._log("test", f"gate-expert-{expert}", score, task)

    def _log(self, split: str, metric: str, value: float, task: str = ALL_TASKS) -> None:
        self._folder.log(
            round=self._progress.rounds_done,
            client_steps=self._progress.client_steps,
            split=split,
            task=task,
            metric=metric,
            value=value,
            seconds=time.monotonic() - self._began,
        )

    def _write_summary(self, status: str, checkpoint: Checkpoint) -> None:
        """The run's result so far; rewritten after every round, so that a run that is cut off leaves a valid one."""
        client, progress = self._config.client, self._progress
        self._folder.write_summary(
            {
                "status": status,
                "training": self.training,
                "method": client.adapter.method,
                "backbone": client.backbone.backbone,
                "compression": client.backbone.compression,
                "quantization": client.backbone.quantization,
                "dataset": client.data.dataset,
                "data_description": self._setting.data_description,
                "data_is_sample": self._setting.data_is_sample,
                "data_sha256": self._setting.data_sha256,
                "backbone_sha256": self._setting.backbone_sha256,
                "held_out_tasks": list(self._setting.tasks[len(self._setting.trained_tasks) :]),
                "truncated_rows": self._setting.rows["truncated"],
                "seed": client.partition.seed,
                "rounds": progress.rounds_done,
                "client_steps": progress.client_steps,
                "num_clients": client.partition.num_clients,
                "clients_per_round": self._config.federation.clients_per_round,
                "trainable_parameters": sum(array.size for array in checkpoint.adapter.values()),
                **({"experts": experts} if (experts := self._experts()) else {}),
                "perplexity": progress.perplexity,
                "perplexity_before": progress.perplexity_before,
                "perplexity_bare": progress.perplexity_bare,
                "train_seconds": progress.train_seconds,
                "elapsed_seconds": progress.elapsed_seconds,
                "tokens_per_second": progress.num_tokens / progress.train_seconds if progress.train_seconds else 0.0,
                "peak_memory_bytes": self._trainer.peak_memory_bytes(),
                "bytes_up": progress.bytes_up,
                "bytes_down": progress.bytes_down,
                "failures": progress.failures,
                "failures_by_client": progress.failures_by_client,
                **self._results(),
                "device": self._setting.device,
                "dtype": self._setting.dtype,
            }
        )

    def _results(self) -> dict[str, object]:
        """What the summary tells beside, of this kind of run."""
        return {}

    def _experts(self) -> tuple[tuple[str, ...], ...]:
        """The tasks each expert was pretrained for; empty where no gate was."""
        adapter = self._config.client.adapter
        learnt = adapter.routing == "nearest" or self._config.client.pretrain.gate_epochs
        if not (adapter.gated and learnt and self._setting.rows["server"]):
            return ()
        tasks, num_experts = self._setting.trained_tasks, adapter.num_experts
        return tuple(tasks[expert % len(tasks) :: num_experts] for expert in range(num_experts))
