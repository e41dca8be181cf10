"""Where a client, or the server, finds its trainer: a named Ray actor in a simulation, else this very process."""

import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

import ray

from mops_fl.config import Scalar

if TYPE_CHECKING:
    from clients.trainer import Trainer

# Calls that may wait in the actor at once; each is a client whose cohort is being trained.
_MAX_WAITING_CALLS = 1000


def connect(run_config: Mapping[str, Scalar]) -> "Trainer":
    """The trainer for this run-config; the first caller creates it.

    Inside Ray it is an actor that holds the GPU, if there is one, and is started again should it die: the clients'
    own actors stay small and never import torch. Elsewhere it lives in this process.

    Raises:
        InputError: the config is not valid.
    """
    settings = json.dumps(dict(run_config), sort_keys=True)
    return _remote_trainer(settings) if ray.is_initialized() else _local_trainer(settings)


@functools.lru_cache(maxsize=1)
def _local_trainer(settings: str) -> "Trainer":
    from clients.trainer import Trainer  # here, so that whoever only asks an actor does not import torch

    return Trainer(json.loads(settings))


@functools.lru_cache(maxsize=1)
def _remote_trainer(settings: str) -> "Trainer":
    actor = (
        ray.remote(_TrainerActor)
        .options(
            name=f"trainer-{hashlib.sha256(settings.encode()).hexdigest()[:16]}",
            get_if_exists=True,
            num_cpus=0,
            num_gpus=1 if ray.cluster_resources().get("GPU") else 0,
            max_restarts=-1,
            max_task_retries=-1,
            max_concurrency=_MAX_WAITING_CALLS,
        )
        .remote(settings)
    )
    return cast("Trainer", _RemoteTrainer(actor))


class _TrainerActor:
    """What Ray runs in the trainer's process."""

    def __init__(self, settings: str) -> None:
        self._settings = settings

    def call(self, method: str, *args: object) -> Any:  # noqa: ANN401
        return getattr(_local_trainer(self._settings), method)(*args)


class _RemoteTrainer:
    """The methods of `Trainer`, each carried out by the actor; its errors arrive as they were raised."""

    def __init__(self, actor: Any) -> None:  # noqa: ANN401
        self._actor = actor

    def __getattr__(self, method: str) -> Callable[..., Any]:
        def call(*args: object) -> Any:  # noqa: ANN401
            try:
                return ray.get(self._actor.call.remote(method, *args))
            except ray.exceptions.RayTaskError as error:
                raise error.cause from error

        return call
