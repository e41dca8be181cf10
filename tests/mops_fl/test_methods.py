import pytest

from mops_fl.errors import InputError
from mops_fl.methods import METHODS, require_method


def test_only_mops_has_a_gate():
    assert {name for name, method in METHODS.items() if method.gated} == {"mops"}


def test_unknown_method_is_refused_with_those_there_are():
    with pytest.raises(InputError, match="`method` is 'mop'; choose one of: mops, fedprompt, lora, ia3"):
        require_method("mop")
