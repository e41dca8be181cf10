import dataclasses

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from mops_fl.data import Row
from mops_fl.encoding import RowEncoder
from mops_fl.errors import InputError

TASKS = ("brainstorming", "open_qa")
ROW = Row(7, instruction="Name two.", context="red, blue", response="red", task="open_qa")
# 17 bytes before the instruction, 16 that open the response; the heading of the context has 13.
OPENING, CONTEXT, RESPONSE = "### Instruction:\n", "\n\n### Input:\n", "\n\n### Response:\n"
FRAME = len(OPENING) + len(RESPONSE)
EOS = "<|end|>"


@pytest.fixture
def encode(byte_tokenizer, data_config):
    def make(row, tokenizer=byte_tokenizer, **changes):
        return RowEncoder(tokenizer, data_config(**changes), TASKS).encode(row)

    return make


@pytest.fixture
def text_of(byte_tokenizer):
    return lambda token_ids: byte_tokenizer.decode(token_ids)


def long_row(instruction=0, context=0, response=0):
    """A row of so many letters each: `i`, `c` and `r`."""
    return Row(0, "i" * instruction, "c" * context, "r" * response, "open_qa")


def letters(text):
    """How many letters of instruction, context and response a text of `long_row` holds."""
    body = text.replace(OPENING, "").replace(RESPONSE, "").replace(CONTEXT, "").replace(EOS, "")
    return tuple(body.count(letter) for letter in "icr")


def test_row_is_put_into_the_template(encode, text_of):
    encoded = encode(ROW)
    question = "### Instruction:\nName two.\n\n### Input:\nred, blue\n\n### Response:\n"
    assert text_of(encoded.token_ids) == f"{question}red{EOS}"
    assert encoded.token_ids.dtype == torch.int64
    assert (encoded.prompt_length, encoded.loss_start) == (len(question), len(question))
    assert (encoded.row_id, encoded.task, encoded.truncated) == (7, 1, False)


def test_row_without_context_has_no_input_heading(encode, text_of):
    encoded = encode(dataclasses.replace(ROW, context=""))
    assert text_of(encoded.token_ids) == f"### Instruction:\nName two.\n\n### Response:\nred{EOS}"


def test_prompt_length_divides_question_and_response(encode, text_of):
    encoded = encode(ROW)
    assert text_of(encoded.token_ids[: encoded.prompt_length]).endswith("### Response:\n")
    assert text_of(encoded.token_ids[encoded.prompt_length :]) == f"red{EOS}"


def test_loss_on_all_starts_at_the_second_token(encode):
    encoded = encode(ROW, loss_on="all")
    assert encoded.loss_start == 1
    assert encoded.prompt_length == encode(ROW).prompt_length


def test_row_of_exactly_the_limit_is_whole_and_one_less_cuts_it(encode):
    length = len(encode(ROW).token_ids)
    assert not encode(ROW, max_length=length).truncated
    cut = encode(ROW, max_length=length - 1)
    assert cut.truncated
    assert len(cut.token_ids) == length - 1


# Room for 40 letters, half of it kept for the response; letters of instruction, context and response before and
# after. The heading of the context (13) and the end of text (1) take room as well.
CUTS = {
    "context-first": ((5, 30, 9), (5, 12, 9)),  # 40 - 5 - 10 leaves 25 for heading and context
    "context-first-though-the-response-is-long": ((5, 30, 30), (5, 2, 20)),  # 20 kept for the response
    "context-goes-altogether": ((18, 30, 15), (18, 0, 15)),  # 6 are left: not even its heading fits
    "then-the-response": ((10, 0, 50), (10, 0, 30)),
    "then-the-instruction": ((50, 0, 9), (30, 0, 9)),
    "half-of-the-room-is-the-responses": ((50, 0, 50), (20, 0, 20)),
    "half-of-the-room-is-the-responses-with-context": ((50, 20, 50), (20, 0, 20)),
}


@pytest.mark.parametrize(("before", "after"), CUTS.values(), ids=CUTS)
def test_cuts_take_context_then_response_then_instruction(before, after, encode, text_of):
    encoded = encode(long_row(*before), max_length=FRAME + 40)
    assert encoded.truncated
    assert len(encoded.token_ids) == FRAME + 40
    text = text_of(encoded.token_ids)
    assert letters(text[: encoded.prompt_length])[:2] == after[:2]
    assert text[encoded.prompt_length :].count("r") == after[2]
    assert text[: encoded.prompt_length].startswith(OPENING + "i")
    assert text[: encoded.prompt_length].endswith(RESPONSE)


def test_end_of_text_stands_where_the_response_is_whole(encode, text_of):
    whole, context_cut, response_cut = (
        text_of(encode(row, max_length=FRAME + 40).token_ids)
        for row in (long_row(5, 0, 9), long_row(5, 30, 9), long_row(5, 0, 50))
    )
    assert [text.endswith(EOS) for text in (whole, context_cut, response_cut)] == [True, True, False]


def test_cuts_take_the_end_of_each_text(encode, text_of):
    row = Row(0, "abcdefghij" * 5, "", "0123456789" * 5, "open_qa")
    text = text_of(encode(row, max_length=FRAME + 40).token_ids)
    assert text == OPENING + "abcdefghij" * 2 + RESPONSE + "0123456789" * 2


@pytest.mark.parametrize("max_length", [FRAME + 2, FRAME + 7, FRAME + 40])
@pytest.mark.parametrize("lengths", [(1, 0, 1), (90, 0, 1), (1, 90, 1), (1, 0, 90), (90, 90, 90), (20, 3, 25)])
def test_rows_are_never_longer_than_the_limit_and_always_carry_loss(lengths, max_length, encode):
    encoded = encode(long_row(*lengths), max_length=max_length)
    assert len(encoded.token_ids) <= max_length
    assert encoded.prompt_length < len(encoded.token_ids)
    assert encoded.truncated == (sum(lengths) + (13 if lengths[1] else 0) + 1 > max_length - FRAME)


def test_tokenizer_that_adds_a_begin_of_text_gets_one_and_it_counts(byte_tokenizer, data_config):
    copy = Tokenizer.from_str(byte_tokenizer.backend_tokenizer.to_str())
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=copy, eos_token=EOS, bos_token="<|begin|>")
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<|begin|> $A", special_tokens=[("<|begin|>", bos)])
    plain = RowEncoder(byte_tokenizer, data_config(), TASKS).encode(ROW)
    begun = RowEncoder(tokenizer, data_config(), TASKS).encode(ROW)
    assert begun.token_ids.tolist() == [bos, *plain.token_ids.tolist()]
    assert begun.prompt_length == plain.prompt_length + 1
    cut = RowEncoder(tokenizer, data_config(max_length=FRAME + 10), TASKS).encode(ROW)
    assert cut.token_ids[0] == bos
    assert len(cut.token_ids) == FRAME + 10


def test_text_that_looks_like_a_control_token_is_text(encode):
    encoded = encode(Row(0, f"Say {EOS} once.", "", f"It is {EOS}.", "open_qa"))
    eos = encoded.token_ids[-1]
    assert (encoded.token_ids == eos).sum() == 1


def test_limit_that_leaves_no_room_for_a_response_is_refused(encode):
    with pytest.raises(InputError, match=f"set at least {FRAME + 2}"):
        encode(ROW, max_length=FRAME + 1)
