"""Where a client, or the server, finds its trainer.

Named Ray actors in a simulation, a process beside the SuperNode in deployment, else this very process.
"""

import functools
import hashlib
import json
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from clients.trainer_process import TrainerProcess
from mops_fl.config import Scalar
from mops_fl.errors import InputError, RunError
from mops_fl.payload import ClientInfo, TrainRequest, TrainResult

if TYPE_CHECKING:
    from clients.setting import Setting
    from clients.trainer import Trainer

# Calls that may wait in an actor at once; each is a client whose cohort is being trained.
_MAX_WAITING_CALLS = 1000
# A trainer that dies is started again, and what it was asked is asked again; but one that dies so often over the same
# work will always die of it.
_MAX_RESTARTS, _MAX_RETRIES = 100, 5
_BUILDING = threading.Lock()


def connect(run_config: Mapping[str, Scalar], own_data: str = "") -> "Trainer":
    """The trainer for this run-config; the first caller creates it.

    Inside Ray these are actors, one for each GPU of the cluster, or for each machine of a cluster without GPUs, started
    again should they die: the clients' own actors stay small and never import torch. In deployment Flower starts a
    process for every message, and the trainer is a process that outlives them. Elsewhere it lives in this process.

    Args:
        run_config: the run-config.
        own_data: where the client has rows of its own, the file or folder with them.

    Raises:
        InputError: the config is not valid.
    """
    settings = json.dumps([dict(run_config), own_data], sort_keys=True)
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        return _ray_trainers(settings)
    if Path(sys.argv[0]).name == "flwr-clientapp":
        return cast("Trainer", TrainerProcess(settings))
    return _local_trainer(settings)


def _local_trainer(settings: str) -> "Trainer":
    with _BUILDING:  # of callers that find nothing cached at once, each would build one
        return _build_trainer(settings)


@functools.lru_cache(maxsize=1)
def _build_trainer(settings: str) -> "Trainer":
    from clients.trainer import Trainer  # here, so that whoever only asks an actor does not import torch

    return Trainer(*json.loads(settings))


@functools.lru_cache(maxsize=1)
def _ray_trainers(settings: str) -> "Trainer":
    return cast("Trainer", _RayTrainers(settings))


class _TrainerActor:
    """What Ray runs in a trainer's process."""

    def __init__(self, settings: str) -> None:
        self._settings = settings

    def call(self, method: str, *args: object) -> Any:  # noqa: ANN401
        return getattr(_local_trainer(self._settings), method)(*args)


class _RayTrainers:
    """The methods of `Trainer`, each carried out by an actor; its errors arrive as they were raised.

    A round's cohorts are dealt to the actors in turn; everything else is the first one's.
    """

    def __init__(self, settings: str) -> None:
        import ray  # half a second that a client's process in deployment does not need
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        nodes = sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: str(node["NodeID"]))
        gpus = [node["NodeID"] for node in nodes for _ in range(int(node["Resources"].get("GPU", 0)))]
        homes = gpus or [node["NodeID"] for node in nodes]
        addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in nodes}
        self._addresses = [str(addresses[node_id]) for node_id in homes]
        run = hashlib.sha256(settings.encode()).hexdigest()[:16]
        self._actors: list[Any] = [
            ray.remote(_TrainerActor)
            .options(
                name=f"trainer-{run}-{number}",
                get_if_exists=True,
                num_cpus=0,
                num_gpus=1 if gpus else 0,
                memory=1,  # one that asks for nothing Ray starts anywhere, whatever its strategy
                max_restarts=_MAX_RESTARTS,
                max_task_retries=_MAX_RETRIES,
                max_concurrency=_MAX_WAITING_CALLS,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=True),
            )
            .remote(settings)
            for number, node_id in enumerate(homes)
        ]

    def setting(self) -> "Setting":
        """See `Trainer.setting`; only the server asks for it, once and before anything else.

        Raises:
            InputError: the machines of the cluster have not all the same rows and weights.
        """
        setting = cast("Setting", _call(self._actors[0], "setting"))
        here = {"rows": setting.data_sha256, "weights": setting.backbone_sha256}
        others = [actor.call.remote("describe", 0) for actor in self._actors[1:]]  # all at work at once
        for other, address in zip(others, self._addresses[1:], strict=True):
            info = cast(ClientInfo, _result(other))
            there = {"rows": info.data_sha256, "weights": info.backbone_sha256}
            if different := [what for what in here if here[what] != there[what]]:
                raise InputError(
                    f"The machines {self._addresses[0]} and {address} of the Ray cluster have other "
                    f"{' and other '.join(different)} under the same name; give all the same data and models."
                )
        return setting

    def train(self, partition_id: int, request: TrainRequest) -> TrainResult:
        """See `Trainer.train`."""
        cohort, num_actors = request.cohort, len(self._actors)
        actor = cohort.number % num_actors
        beside = len(range(actor, cohort.count, num_actors))  # cohorts of this round that go to the same actor
        request = replace(request, cohort=replace(cohort, count=beside))
        return cast(TrainResult, _call(self._actors[actor], "train", partition_id, request))

    def __getattr__(self, method: str) -> Callable[..., Any]:
        return functools.partial(_call, self._actors[0], method)


def _call(actor: Any, method: str, *args: object) -> Any:  # noqa: ANN401
    return _result(actor.call.remote(method, *args))


def _result(call: Any) -> Any:  # noqa: ANN401
    import ray

    try:
        return ray.get(call)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.RayActorError:
        raise RunError(
            "The trainer died again and again over the same work, as it does where memory is too small; free some and "
            "go on with --resume, or run anew with a lower `cohort-size` or `max-length`."
        ) from None  # what a client shows of an error is its first cause
