"""The resident trainer: one per device, owner of the only frozen model, however many clients there are.

Clients hand in requests that name their cohort. The first member to arrive sets the whole cohort training; the
others are answered from the same batch. So who is trained with whom depends on the request alone, never on who
arrived first, a cohort cannot wait for a member that is stuck in a queue, and a request that is sent again, to a
trainer that was started again, gets the same answer.
"""

import functools
import hashlib
import resource
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import cached_property
from typing import Any
from uuid import uuid4

import torch

from clients.config import ClientConfig
from clients.lanes import Lanes
from clients.local_training import ClientRows, Training, train_cohort
from clients.row_owners import RowOwners
from clients.setting import Setting, Start
from mops_fl.adapter import AdapterState
from mops_fl.backbone import Backbone
from mops_fl.compressed import backbone_sha256, calibrated_on, require_not_calibrated_on
from mops_fl.config import BackboneConfig, Scalar
from mops_fl.data import Row, TaskData
from mops_fl.encoding import EncodedRow, RowEncoder
from mops_fl.errors import InputError
from mops_fl.evaluation import Evaluation, by_length, evaluate, evaluate_bare
from mops_fl.methods import METHOD_OF
from mops_fl.model import AdaptableModel, check_inject_layer, check_window
from mops_fl.payload import (
    INPUT_PROMPTS,
    Arrays,
    ClientInfo,
    EvaluateRequest,
    EvaluateResult,
    TrainRequest,
    TrainResult,
)
from mops_fl.routing import check_num_experts
from mops_fl.state_cache import StateCache


class Trainer:
    """Trains cohorts, evaluates and pretrains on one frozen model; safe to call from many threads.

    Cohorts and evaluation batches run on the machine's lanes. What a call returns does not depend on what else runs.
    """

    def __init__(self, run_config: Mapping[str, Scalar], own_data: str = "") -> None:
        """Keep the config; data and model are loaded when first needed.

        Args:
            run_config: the run-config.
            own_data: file or folder with the rows of the one client that this trainer then works for; empty where
                clients share a data set.

        Raises:
            InputError: the config is not valid.
        """
        self._config = ClientConfig.from_run_config(run_config)
        self._owners = RowOwners(self._config, own_data)
        self._method = METHOD_OF[self._config.adapter.method]
        self._lanes = Lanes.of_this_machine()
        self._name = uuid4().hex
        self._lock = threading.RLock()  # held while anything is loaded, encoded or looked up
        self._cohorts: dict[tuple[Any, ...], Future[dict[int, TrainResult]]] = {}
        self._model: tuple[bytes, AdaptableModel] | None = None
        self._encoded: dict[int, EncodedRow] = {}

    def setting(self) -> Setting:
        """Load data and model and say what they are.

        Raises:
            InputError: no such model or data, a layer or positions that the model does not have, experts that would
                never be used, or a pruned model that has seen the test rows.
        """
        with self._lock:
            data = self._data
            require_not_calibrated_on(self._owners.measured_rows, self._backbone_config)
            check_num_experts(self._config.adapter, len(data.trained_tasks))
            check_window(self._config.data.max_length, self._config.adapter.num_prompts, self._backbone)
            train, test, server = (self._encode(part) for part in (data.train, data.test, data.server))
            return Setting(
                tasks=data.tasks,
                trained_tasks=data.trained_tasks,
                data_description=data.description,
                data_is_sample=data.is_sample,
                rows={
                    "train": len(train),
                    "test": len(self._test_rows) if self._config.trainer.evaluate_on == "server" else 0,
                    "server": len(server),
                    "truncated": sum(row.truncated for row in [*train, *test, *server]),
                },
                manifest=self._owners.manifest(),
                dtype=str(self._backbone.dtype).removeprefix("torch."),
                device=torch.cuda.get_device_name() if self._backbone.device.type == "cuda" else "cpu",
                hidden_size=self._backbone.hidden_size,
                num_layers=self._backbone.num_layers,
                backbone_sha256=self._backbone_sha256,
                data_sha256=data.sha256,
            )

    def describe(self, partition_id: int) -> ClientInfo:
        """What a client answers when asked who it is."""
        with self._lock:
            rows = self._owners.rows_of(partition_id)[0]
            own_rows = Counter(row.task for row in rows) if self._owners.own_data else None
            hashes = {"backbone_sha256": self._backbone_sha256, "data_sha256": self._owners.shared_sha256}
            return ClientInfo(partition_id, len(rows), self._name, own_rows=own_rows, **hashes)

    def prepare(self) -> Start:
        """Pretrain the input prompts and the gate on the server's rows."""
        with self._lock:
            backbone, rows, num_tasks = self._backbone, self._encode(self._data.server), len(self._data.trained_tasks)
        self._lanes.take_share(1)  # the input prompts are trained here, row by row
        generator = torch.Generator().manual_seed(self._config.partition.seed)
        start = self._method.start(
            backbone, rows, num_tasks, self._config.adapter, self._config.pretrain, generator, self._lanes.map
        )
        adapter = {name: tensor.numpy() for name, tensor in start.adapter.items()}
        frozen = {INPUT_PROMPTS: start.input_prompts, **(start.neighbours.to_frozen() if start.neighbours else {})}
        return Start(adapter, {name: tensor.numpy() for name, tensor in frozen.items()}, start.gate_accuracy)

    def evaluate(self, adapter: Arrays, frozen: Arrays) -> Evaluation:
        """Measure an adapter on the test rows."""
        with self._lock:
            model, rows = self._adaptable_model(frozen), self._test_rows
        return evaluate(model, model.adapter([_tensors(adapter)]), rows, self._data.tasks, spread=self._lanes.map)

    def evaluate_bare(self) -> Evaluation:
        """Measure the backbone without prompts on the test rows."""
        with self._lock:
            backbone, rows = self._backbone, self._test_rows
        return evaluate_bare(backbone, rows, self._data.tasks, spread=self._lanes.map)

    def evaluate_client(self, partition_id: int, request: EvaluateRequest) -> EvaluateResult:
        """Measure an adapter, or the backbone alone, on the rows that this client keeps back; sums of 0 without any."""
        with self._lock:
            rows = self._encode(self._owners.rows_of(partition_id)[1])
            model = self._adaptable_model(request.frozen) if request.adapter else None
        if not rows:
            nothing = (0,) * len(request.tasks)
            num_gated = self._config.adapter.num_gated if request.adapter else 0
            return EvaluateResult(nothing, nothing, nothing, nothing * num_gated)
        tasks, spread = self._data.tasks, self._lanes.map
        if model is None:
            measured = evaluate_bare(self._backbone, rows, tasks, spread=spread)
        else:
            measured = evaluate(model, model.adapter([_tensors(request.adapter)]), rows, tasks, spread=spread)
        return measured.sums(request.tasks, Counter(tasks[row.task] for row in rows))

    def train(self, partition_id: int, request: TrainRequest) -> TrainResult:
        """Train the cohort named in the request, once, and return this client's part of it.

        Raises:
            InputError: the client has no rows.
        """
        key = (request.server_round, request.cohort, _digest({**request.adapter, **request.frozen}))
        with self._lock:
            if key not in self._cohorts:
                current = {k: f for k, f in self._cohorts.items() if k[0] == request.server_round}
                training = self._lanes.submit(lambda: self._train_cohort(request), beside=request.cohort.count)
                self._cohorts = {**current, key: training}
            cohort = self._cohorts[key]
        try:
            results = cohort.result()
        except Exception:
            with self._lock:  # its cause may be mended before it is asked again
                self._cohorts = {k: f for k, f in self._cohorts.items() if f is not cohort}
            raise
        if partition_id not in results:
            raise InputError(f"Client {partition_id} has no rows to train on; ask another one.")
        return results[partition_id]

    def train_server(self, server_round: int, adapter: Arrays, frozen: Arrays) -> TrainResult:
        """Train on the server's own rows as a client does on its own."""
        with self._lock:
            model, rows = self._adaptable_model(frozen), self._encode(self._data.server)
        seed = (self._config.partition.seed, server_round, self._config.partition.num_clients)  # no client's
        learner = ClientRows(rows, seed)
        train = functools.partial(train_cohort, model, _tensors(adapter), [learner], self._config.train)
        (result,) = self._lanes.submit(train, beside=1).result()
        return result

    def train_centrally(self, adapter: Arrays, frozen: Arrays, num_steps: int) -> Training:
        """All rows of `central-rows` in one learner's hands, ready to take so many steps in the calling thread."""
        with self._lock:
            parts = {"clients": self._data.train, "server": self._data.server}
            model, rows = self._adaptable_model(frozen), self._encode(parts[self._config.trainer.central_rows])
        self._lanes.take_share(1)
        config = replace(self._config.train, local_steps=num_steps, local_epochs=0)
        return Training(model, _tensors(adapter), [ClientRows(rows, (self._config.partition.seed,))], config)

    def peak_memory_bytes(self) -> int:
        """Most memory this process has held: on the GPU if there is one, else resident."""
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    @property
    def _data(self) -> TaskData:
        return self._owners.data

    @cached_property
    def _backbone_config(self) -> BackboneConfig:
        return calibrated_on(self._data, self._config.backbone)

    @cached_property
    def _backbone(self) -> Backbone:
        backbone = Backbone.load(self._backbone_config)
        check_inject_layer(self._config.adapter.inject_layer, backbone)
        return backbone

    @cached_property
    def _backbone_sha256(self) -> str:
        return backbone_sha256(self._backbone_config)

    @cached_property
    def _encoder(self) -> RowEncoder:
        return RowEncoder(self._backbone.tokenizer, self._config.data, self._data.tasks)

    @cached_property
    def _test_rows(self) -> list[EncodedRow]:
        return by_length(self._encode(self._data.evaluation_rows(self._config.trainer.eval_rows)))

    def _encode(self, rows: Sequence[Row]) -> list[EncodedRow]:
        for row in rows:
            if row.row_id not in self._encoded:
                self._encoded[row.row_id] = self._encoder.encode(row)
        return [self._encoded[row.row_id] for row in rows]

    def _train_cohort(self, request: TrainRequest) -> dict[int, TrainResult]:
        with self._lock:
            model = self._adaptable_model(request.frozen)
            clients = {
                partition_id: ClientRows(
                    self._encode(rows),
                    seed=(self._config.partition.seed, request.server_round, partition_id),
                )
                for partition_id in request.cohort.members
                if (rows := self._owners.rows_of(partition_id)[0])
            }
        if not clients:
            return {}
        results = train_cohort(model, _tensors(request.adapter), list(clients.values()), self._config.train)
        return dict(zip(clients, results, strict=True))

    def _adaptable_model(self, frozen: Arrays) -> AdaptableModel:
        """The model with what the server froze; its cached states live as long as that stays the same."""
        digest = _digest(frozen)
        if self._model is None or self._model[0] != digest:
            config = self._config.trainer
            memory = config.cache_megabytes << 20
            if self._backbone.device.type == "cuda":  # the rest of the card is for the batches
                memory = min(memory, torch.cuda.mem_get_info(self._backbone.device)[0] // 2)
            cache = StateCache(memory, config.cache_file_megabytes << 20)
            model = self._method.model(self._backbone, self._config.adapter, _tensors(frozen), cache)
            self._model = (digest, model)
        return self._model[1]


def _tensors(arrays: Arrays) -> AdapterState:
    return {name: torch.tensor(array) for name, array in arrays.items()}


def _digest(arrays: Arrays) -> bytes:
    digest = hashlib.blake2b()
    for name, array in arrays.items():
        digest.update(name.encode())
        digest.update(array.tobytes())
    return digest.digest()
