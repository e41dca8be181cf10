import pytest

from mops_fl.errors import InputError
from mops_fl.recipe import PruningRecipe


@pytest.mark.parametrize(
    ("text", "algorithm", "sparsity", "group"),
    [
        ("sparsegpt:75%", "sparsegpt", 0.75, None),
        ("sparsegpt:87.5%", "sparsegpt", 0.875, None),
        ("wanda:90%", "wanda", 0.9, None),
        ("sparsegpt:7:8", "sparsegpt", 7 / 8, (7, 8)),
        ("sparsegpt:3:4", "sparsegpt", 3 / 4, (3, 4)),
        ("sparsegpt:2:4", "sparsegpt", 1 / 2, (2, 4)),
        ("wanda:4:8", "wanda", 1 / 2, (4, 8)),
    ],
)
def test_recipe_is_read_and_written_the_same(text, algorithm, sparsity, group):
    recipe = PruningRecipe.parse(text)
    assert recipe == PruningRecipe(algorithm, sparsity, group, key="")
    assert str(recipe) == text


def test_ways_to_write_one_share_are_one_recipe():
    assert {str(PruningRecipe.parse(f"sparsegpt:{share}%")) for share in ("75", "75.0", "075")} == {"sparsegpt:75%"}


def test_key_is_read_and_left_out_of_the_normal_form():
    recipe = PruningRecipe.parse("sparsegpt:2:4@00af")
    assert (recipe.key, recipe.group, str(recipe)) == ("00af", (2, 4), "sparsegpt:2:4")


@pytest.mark.parametrize(
    "text",
    [
        *("sparsegpt", "sparsegpt:", "sparsegpt:75", "75%", "gptq:75%", "magnitude:75%", "sparsegpt:75%@"),
        *("sparsegpt:2:4:8", "sparsegpt:0%", "sparsegpt:100%", "sparsegpt:0:4", "sparsegpt:4:4", "sparsegpt:5:4"),
        *("sparsegpt:1:3", "sparsegpt:0:0", "sparsegpt:1:256"),
    ],
)
def test_recipe_that_prunes_nothing_everything_or_unclearly_is_refused(text):
    with pytest.raises(InputError, match=f"`compression` is '{text}'"):
        PruningRecipe.parse(text)
