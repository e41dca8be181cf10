"""One-shot pruning of a model's decoder layers by llmcompressor."""

import contextlib
import io
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from mops_fl.errors import InputError
from mops_fl.recipe import BLOCK_SIZE, PruningRecipe
from mops_fl.supported import refuse_experts

DAMPENING = 0.01  # added to the Hessian's diagonal, as a share of its mean; SparseGPT's own value

Progress = Callable[[str], None]


def prune(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    recipe: PruningRecipe,
    calibration: Sequence[Tensor],
    progress: Progress,
) -> tuple[dict[str, Tensor], list[str]]:
    """Prune the model in `folder`, layer by layer, each on what the pruned layers below make of the calibration rows.

    Args:
        folder: the dense model; loaded in float32, whatever it is stored in.
        tokenizer: its tokenizer.
        recipe: how.
        calibration: token ids `(n,)` of each row.
        progress: told after every tenth of the work.

    Returns:
        The pruned weights by the names of their linear layers, float32, and llmcompressor's warnings.

    Raises:
        InputError: the model has experts, or a matrix does not divide into the recipe's groups.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    refuse_experts(model, f"pruning by {recipe}")
    linears = decoder_linears(model)
    _check_groups(linears, recipe)
    rows: Any = [{"input_ids": token_ids, "attention_mask": torch.ones_like(token_ids)} for token_ids in calibration]
    with _quiet():
        from llmcompressor import reset_session

        modifier, oneshot = _load(recipe)
        with _heard(progress, len(linears)) as warnings:
            oneshot(model=model, processor=tokenizer, dataset=DataLoader(rows, batch_size=1), recipe=modifier)
        reset_session()  # it would hold the float32 model from here on
    return {name: linear.weight.detach().cpu() for name, linear in linears.items()}, warnings


def decoder_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers that are pruned, by name: every linear one but the head."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.endswith("lm_head")
    }


def _load(recipe: PruningRecipe) -> tuple[Any, Any]:
    """The recipe as llmcompressor's modifier, and the function that applies it."""
    with contextlib.redirect_stdout(io.StringIO()):  # it says so at import if there is no GPU
        from llmcompressor import oneshot
        from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier

    # llmcompressor counts as the recipe does: of every M, the N of least importance become zero.
    options: dict[str, Any] = {
        "sparsity": recipe.sparsity,
        "mask_structure": "{}:{}".format(*(recipe.group or (0, 0))),
        "targets": ["Linear"],
        "ignore": ["re:.*lm_head"],
    }
    if recipe.algorithm == "wanda":
        return WandaPruningModifier(**options), oneshot
    return SparseGPTModifier(**options, block_size=BLOCK_SIZE, dampening_frac=DAMPENING), oneshot


def _check_groups(linears: dict[str, nn.Linear], recipe: PruningRecipe) -> None:
    for name, linear in linears.items():
        if recipe.group is not None and linear.in_features % recipe.group[1]:
            raise InputError(
                f"{name} has {linear.in_features} columns, which do not divide into groups of {recipe.group[1]}; "
                "choose another N:M, or a share such as 75%."
            )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep in two progress bars for each layer, and what torch and bitsandbytes have to say of their own insides."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


@contextlib.contextmanager
def _heard(progress: Progress, num_linears: int) -> Iterator[list[str]]:
    """Turn llmcompressor's log into progress, and its warnings about the pruning into the list that is yielded."""
    from loguru import logger

    warnings: list[str] = []
    started = 0

    def listen(message: Any) -> None:  # noqa: ANN401
        nonlocal started
        text = message.record["message"]
        if message.record["level"].name == "WARNING":
            warnings.append(text)
        elif text.startswith("Sparsifying"):
            started += 1
            if 10 * started // num_linears > 10 * (started - 1) // num_linears:
                progress(f"{started} of {num_linears} matrices pruned")

    logger.remove()
    sink = logger.add(listen, level="INFO", filter="llmcompressor.modifiers")
    try:
        yield warnings
    finally:
        logger.remove(sink)
