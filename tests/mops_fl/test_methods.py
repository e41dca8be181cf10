from mops_fl.config import METHODS
from mops_fl.methods import METHOD_OF


def test_every_method_is_made_of_something():
    assert set(METHOD_OF) == set(METHODS)
