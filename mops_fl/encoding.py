"""From a row to tokens: one template, truncation that keeps what matters, and where the loss starts."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mops_fl.config import DataConfig
from mops_fl.data import Row
from mops_fl.errors import InputError

INSTRUCTION = "### Instruction:\n"
CONTEXT = "\n\n### Input:\n"
RESPONSE = "\n\n### Response:\n"
TEMPLATE = (INSTRUCTION, CONTEXT, RESPONSE)


@dataclass(frozen=True)
class Turn:
    """One question of a conversation.

    Attributes:
        instruction: what is asked.
        context: the passage it is asked about, empty if there is none.
        response: the answer; empty for the question that is yet to be answered.
    """

    instruction: str
    context: str
    response: str = ""


@dataclass(frozen=True)
class EncodedRow:
    """One row as tokens.

    Attributes:
        row_id: the row's id.
        token_ids: `(n,)` int64: template, instruction, context, response, end of text.
        prompt_length: tokens before the response.
        loss_start: index of the first token that is predicted with loss.
        task: index of the row's task.
        truncated: whether anything had to be cut.
    """

    row_id: int
    token_ids: Tensor
    prompt_length: int
    loss_start: int
    task: int
    truncated: bool


class RowEncoder:
    """Encodes rows for one tokenizer, at most `max_length` tokens each.

    Of a row that is too long, instruction and context get the room that the response leaves, and at least half of it;
    of these the context loses its end first. The response gets what they leave, and loses its end.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: DataConfig, tasks: tuple[str, ...]) -> None:
        """Take the tokenizer.

        Raises:
            InputError: `max_length` leaves no room for a response.
        """
        self._tokenizer = tokenizer
        self._config = config
        self._tasks = tasks
        self._opening = opening_tokens(tokenizer)
        self._before, self._after = self._tokens(INSTRUCTION), self._tokens(RESPONSE)
        template = len(self._opening) + len(self._before) + len(self._after)
        if config.max_length < template + 2:
            raise InputError(
                f"`max-length` is {config.max_length}, too short for the template; set at least {template + 2}."
            )

    def encode(self, row: Row) -> EncodedRow:
        """The row's tokens."""
        instruction = self._tokens(row.instruction)
        context = self._tokens(CONTEXT + row.context) if row.context else []
        response = [*self._tokens(row.response), self._tokenizer.eos_token_id]
        full_length = len(instruction) + len(context) + len(response)

        room = self._config.max_length - len(self._opening) - len(self._before) - len(self._after)
        reserved = min(len(response), room // 2)
        instruction = instruction[: room - reserved]
        context = context[: room - reserved - len(instruction)]
        response = response[: room - len(instruction) - len(context)]

        prompt = [*self._opening, *self._before, *instruction, *context, *self._after]
        return EncodedRow(
            row_id=row.row_id,
            token_ids=torch.tensor(prompt + response),
            prompt_length=len(prompt),
            loss_start=len(prompt) if self._config.loss_on == "response" else 1,
            task=self._tasks.index(row.task),
            truncated=len(instruction) + len(context) + len(response) < full_length,
        )

    def _tokens(self, text: str) -> list[int]:
        return text_tokens(self._tokenizer, text)


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn]) -> list[int]:
    """A conversation up to where the answer to its last turn begins; nothing is cut off.

    A single turn is what `RowEncoder` makes of a row before its response.
    """
    token_ids = opening_tokens(tokenizer)
    for number, turn in enumerate(turns, start=1):
        context = CONTEXT + turn.context if turn.context else ""
        for text in (INSTRUCTION, turn.instruction, context, RESPONSE, turn.response):
            token_ids += text_tokens(tokenizer, text)
        if number < len(turns):  # what was answered with nothing ends all the same
            token_ids.append(tokenizer.eos_token_id)
    return token_ids


def opening_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A begin-of-text token for tokenizers that have one."""
    return list(tokenizer("").input_ids)


def text_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a piece of text, nothing put before or behind it; what looks like a control token is text."""
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids)
