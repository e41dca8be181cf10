import ast
import importlib
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Private parts of flwr that `experiments.runtimes` and `experiments.app_folder` build on.
PRIVATE = [
    ("flwr.common.config", "get_fused_config_from_dir"),
    ("flwr.common.config", "get_project_config"),
    ("flwr.common.config", "parse_config_args"),
    ("flwr.common.constant", "ErrorCode"),
    ("flwr.common.constant", "RUN_ID_NUM_BYTES"),
    ("flwr.common.constant", "SUPERLINK_NODE_ID"),
    ("flwr.common.constant", "TASK_ID_NUM_BYTES"),
    ("flwr.server.superlink.linkstate.utils", "generate_rand_int_from_bytes"),
    ("flwr.simulation.run_simulation", "_run_simulation"),
    ("flwr.supercore.constant", "NOOP_FEDERATION_ID"),
    ("flwr.supercore.run", "Run"),
    ("flwr.supercore.task_identity", "TaskIdentity"),
    ("flwr.supercore.telemetry", "EventType"),
]
HINT = "private parts of flwr 1.39 have moved: adapt experiments/runtimes.py and its kin to flwr"


def test_flwr_is_the_version_whose_private_parts_are_used():
    assert version("flwr").startswith("1.39."), f"{HINT} {version('flwr')}"


@pytest.mark.parametrize(("module", "name"), PRIVATE)
def test_private_part_of_flwr_is_where_it_was(module, name):
    try:
        found = hasattr(importlib.import_module(module), name)
    except ImportError:
        found = False
    assert found, f"{HINT} {version('flwr')} ({module}.{name})"


def test_runtimes_can_be_imported():
    try:
        importlib.import_module("experiments.runtimes")
    except ImportError as error:
        pytest.fail(f"{HINT} {version('flwr')} ({error})")


def test_command_sets_its_switches_before_flwr_and_ray_are_imported():
    # Both read the environment when they are imported.
    body = ast.parse((ROOT / "experiments/simulation.py").read_text(encoding="utf-8")).body
    kinds = [ast.unparse(node).partition("(")[0] for node in body]
    switches = [i for i, kind in enumerate(kinds) if kind == "os.environ.setdefault"]
    imports = [
        i
        for i, node in enumerate(body)
        if isinstance(node, ast.ImportFrom) and node.module.startswith(("experiments", "flwr"))
    ]
    assert len(switches) >= 5
    assert max(switches) < min(imports)
