"""Who may know whom, and how large a file may grow."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "mops_fl": set(),
    "partitioning": set(),
    "clients": {"partitioning", "mops_fl"},
    "strategies": {"mops_fl"},
    "experiments": {"strategies", "clients", "partitioning", "mops_fl"},
}
MODULES = sorted(path.relative_to(ROOT) for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py"))
MOST_LINES = 330


def imported_packages(source, own_package):
    """The top-level packages that a module imports anywhere in it: in functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield own_package if node.level else node.module.partition(".")[0]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("import_module", "__import__"):
            yield from (arg.value.partition(".")[0] for arg in node.args if isinstance(arg, ast.Constant))


def test_imports_are_found_wherever_they_stand():
    source = """
import torch
from mops_fl import config
if TYPE_CHECKING:
    from strategies.mops import MoPs
def f():
    import experiments.simulation
    importlib.import_module("partitioning.registry")
    from . import sibling
"""
    found = set(imported_packages(source, "clients"))
    assert found == {"torch", "mops_fl", "strategies", "experiments", "partitioning", "clients"}


def test_modules_import_only_what_their_package_may():
    forbidden = []
    for path in MODULES:
        package = path.parts[0]
        ours = set(imported_packages((ROOT / path).read_text(encoding="utf-8"), package)) & set(MAY_IMPORT)
        forbidden += [f"{path} imports {other}" for other in sorted(ours - {package, *MAY_IMPORT[package]})]
    assert not forbidden, "\n".join(forbidden)


def test_modules_are_short_enough_to_read():
    lines = {path: len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in MODULES}
    too_long = [f"{path} has {count} lines" for path, count in lines.items() if count > MOST_LINES]
    assert not too_long, "\n".join(too_long)


def test_every_package_is_walked():
    assert {path.parts[0] for path in MODULES} == set(MAY_IMPORT)
    assert len(MODULES) > 30


def test_clients_own_process_never_imports_torch():
    # A simulation has as many of these processes as processor cores; the model lives in the trainer's.
    code = "import sys, clients.client_app; print(*{'torch', 'transformers'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


def test_wire_contract_is_the_only_module_that_clients_and_strategies_share():
    """Beside the typed settings and the error for bad input, which everything uses."""

    def modules_of(package):
        trees = (ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / package).rglob("*.py"))
        return {
            node.module for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module
        }

    shared = {name for name in modules_of("clients") & modules_of("strategies") if name.partition(".")[0] in MAY_IMPORT}
    assert shared - {"mops_fl.config", "mops_fl.errors"} == {"mops_fl.payload"}
