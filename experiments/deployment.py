"""A SuperLink and SuperNodes on this machine's loopback: what `docs/deployment.md` does by hand, started and ended."""

import os
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

import psutil
import tomli_w

from experiments.certificates import AUTHORITY_CERTIFICATE, SERVER_CERTIFICATE, SERVER_KEY, make_server_certificate
from experiments.certificates import make_node_key as make_key

CONNECTION = "demo"
_START_SECONDS = 60.0
_END_SECONDS = 10.0
_TAIL_LINES = 15


class DeploymentError(RuntimeError):
    """A process of the deployment did not start, or ended before its time; the text holds its log's last lines."""


class LocalDeployment:
    """A SuperLink, the SuperNodes that are started beside it, and whatever these start; all end with the `with` block.

    Attributes:
        folder: keys, logs and the SuperLink's state.
        insecure: neither TLS nor authentication.
        certificates: folder with the authority's and the SuperLink's certificates.
        environment: variables of all processes, also for `flwr` commands, whose connection is called `CONNECTION`.
    """

    def __init__(self, folder: Path, *, insecure: bool = False) -> None:
        """Make the certificates and the configuration; nothing is started yet.

        Args:
            folder: an empty one, for keys, logs and the SuperLink's state; its path must be short.
            insecure: neither TLS nor authentication.
        """
        self.certificates = folder / "certificates"
        self.folder = folder
        self.insecure = insecure
        self._fleet_port, self._control_port = free_port(), free_port()
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "FLWR_HOME": str(folder / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "TMPDIR": str(folder),
            "OMP_WAIT_POLICY": "PASSIVE",  # several trainers share the cores; none should spin while it waits
        }
        connection: dict[str, object] = {"address": f"127.0.0.1:{self._control_port}"}
        if insecure:
            connection["insecure"] = True
        else:
            make_server_certificate(self.certificates, ["localhost"])
            connection["root-certificates"] = str(self.certificates / AUTHORITY_CERTIFICATE)
        (folder / "flwr").mkdir()
        configuration = {"superlink": {"default": CONNECTION, CONNECTION: connection}}
        (folder / "flwr" / "config.toml").write_text(tomli_w.dumps(configuration), encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start_superlink(self) -> None:
        """Start the SuperLink and wait until it answers.

        Raises:
            DeploymentError: it does not.
        """
        folder = self.certificates
        if self.insecure:
            security: list[object] = ["--insecure"]
        else:
            security = [
                "--ssl-ca-certfile", folder / AUTHORITY_CERTIFICATE,
                "--ssl-certfile", folder / SERVER_CERTIFICATE,
                "--ssl-keyfile", folder / SERVER_KEY,
                "--enable-supernode-auth",
            ]  # fmt: skip
        command = ["flower-superlink", *security, "--host", "127.0.0.1", "--port", self._control_port,
                   "--fleet-api-type", "grpc-rere", "--fleet-api-address", f"127.0.0.1:{self._fleet_port}",
                   "--database", self.folder / "state.db"]  # fmt: skip
        self._start("superlink", command)
        deadline = time.monotonic() + _START_SECONDS
        while not self._is_healthy(folder / AUTHORITY_CERTIFICATE):
            self.check()
            if time.monotonic() > deadline:
                raise DeploymentError(f"The SuperLink does not answer.\n{self.tail('superlink')}")
            time.sleep(0.2)

    def register(self, name: str) -> None:
        """Make a key pair for a SuperNode and register its public half.

        Raises:
            DeploymentError: the SuperLink refuses it.
        """
        make_key(self.folder / "keys", name)
        if not self.insecure:
            self.flwr("supernode", "register", self.folder / "keys" / f"{name}.pub", CONNECTION, "--name", name)

    def start_supernode(
        self,
        name: str,
        node_config: Mapping[str, str | int],
        *,
        options: Sequence[object] = (),
        cores: Sequence[int] = (),
    ) -> subprocess.Popen[bytes]:
        """Start a SuperNode that has its key from `register`; it is not waited for.

        Args:
            name: its name, that of its key and of its log.
            node_config: what its ClientApp finds in its node-config.
            options: further options of `flower-supernode`, or others in place of those that it is given here.
            cores: processor cores that it and its trainer may use; all for none.
        """
        security: list[object] = ["--insecure"]
        if not self.insecure:
            security = ["--root-certificates", self.certificates / AUTHORITY_CERTIFICATE,
                        "--auth-supernode-private-key", self.folder / "keys" / name]  # fmt: skip
        values = " ".join(f'{key}="{value}"' if isinstance(value, str) else f"{key}={value}"
                          for key, value in node_config.items())  # fmt: skip
        command = [
            "flower-supernode", "--grpc-rere", *security, "--superlink", f"127.0.0.1:{self._fleet_port}",
            "--port", free_port(), "--node-config", values, *options,
        ]  # fmt: skip
        process = self._start(name, command)
        if cores:
            psutil.Process(process.pid).cpu_affinity(list(cores))
        return process

    def flwr(self, *arguments: object) -> str:
        """Run a `flwr` command against the SuperLink; returns what it printed.

        Raises:
            DeploymentError: it failed.
        """
        command = ["flwr", *map(str, arguments)]
        result = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        if result.returncode:
            raise DeploymentError(f"`{' '.join(command[:3])}` failed.\n{result.stdout}{result.stderr}")
        return result.stdout

    def check(self) -> None:
        """Raise `DeploymentError` if a process that was started has ended."""
        for name, process in self._processes.items():
            if process.poll() is not None:
                raise DeploymentError(f"The {name} ended with code {process.returncode}.\n{self.tail(name)}")

    def tail(self, name: str) -> str:
        """The last lines of a process's log."""
        lines = self.log_of(name).read_text(encoding="utf-8", errors="replace").splitlines()
        lines = [line for line in lines if "uvicorn.access" not in line]
        return "\n".join(f"  {name}: {line}" for line in lines[-_TAIL_LINES:])

    def tails(self) -> str:
        """The last lines of all logs."""
        return "\n".join(map(self.tail, self._processes))

    def log_of(self, name: str) -> Path:
        """The file that a process's output goes to."""
        return self.folder / f"{name}.log"

    def stop(self) -> None:
        """End all processes, and those that they started, however these are related by now."""
        for process in reversed(self._processes.values()):
            process.terminate()
        for process in self._processes.values():
            end(process)
        deadline = time.monotonic() + _END_SECONDS
        while left := self._left():
            if time.monotonic() > deadline:
                for other in left:
                    with suppress(psutil.NoSuchProcess):
                        other.kill()
            time.sleep(0.1)

    def _start(self, name: str, command: list[object]) -> subprocess.Popen[bytes]:
        with self.log_of(name).open("wb") as log:
            # In a session of its own, so that Ctrl-C reaches this process alone, which then ends them in order.
            process = subprocess.Popen(
                list(map(str, command)), env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
        self._processes[name] = process
        return process

    def _is_healthy(self, authority: Path) -> bool:
        scheme, context = ("http", None) if self.insecure else ("https", ssl.create_default_context(cafile=authority))
        try:
            with urllib.request.urlopen(
                f"{scheme}://127.0.0.1:{self._control_port}/health", timeout=2, context=context
            ):
                return True
        except OSError:
            return False

    def _left(self) -> list[psutil.Process]:
        """Processes with this deployment's variables; a trainer is no longer anybody's child."""
        left = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("FLWR_HOME") == self.environment["FLWR_HOME"]:
                    left.append(process)
            except psutil.Error:
                continue
        return [process for process in left if process.pid != os.getpid()]


def end(process: subprocess.Popen[bytes]) -> None:
    """Wait for a process that was asked to end, and kill it if it does not."""
    try:
        process.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def free_port() -> int:
    """A TCP port of the loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
