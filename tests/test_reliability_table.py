"""docs/reliability.md says how each fault is tested: those tests exist."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
NAMED = set(re.findall(r"`(test_\w+)`", TEXT))
# Below a table's header stands a line of dashes.
ROWS = [row for table in re.findall(r"^\|[-|]+\|\n((?:\|.*\n)+)", TEXT, re.MULTILINE) for row in table.splitlines()]
DEFINED = {
    node.name
    for path in (ROOT / "tests").rglob("test_*.py")
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    if isinstance(node, ast.FunctionDef)
}


def test_tests_named_in_the_table_exist():
    missing = sorted(NAMED - DEFINED)
    assert not missing, "\n".join(missing)


def test_every_row_of_the_table_names_a_test():
    assert len(ROWS) > 25
    for row in ROWS:
        assert DEFINED & set(re.findall(r"`(test_\w+)`", row)), row
