"""Answers of several models to one question, as they grow; whoever asks, one thread computes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import StoppingCriteriaList, TextIteratorStreamer

from experiments.adapter_options import require_room
from experiments.explore_models import Exhibit

if TYPE_CHECKING:
    from transformers import BatchEncoding

    from mops_fl.mops_model import MopsModel


class Answer(NamedTuple):
    """What an exhibit has answered so far; `note` says how fast and why it ended, once it has."""

    place: int
    text: str
    note: str


class Answerer:
    """Computes for one request at a time; an answer that nobody waits for any more ends within a token."""

    def __init__(self, exhibits: Sequence[Exhibit]) -> None:
        """Take the models, which share one backbone."""
        self._exhibits = exhibits
        self._worker = ThreadPoolExecutor(max_workers=1)
        self._closing = threading.Event()

    def gate_scores(self, instruction: str, context: str) -> list[list[float] | None]:
        """The gate's score of each expert for a question, for each exhibit; None for those without a gate.

        Raises:
            InputError: the question alone would not fit into the backbone's window.
        """
        return self._worker.submit(self._gate_scores, instruction, context).result()

    def stream(self, instruction: str, context: str, options: dict[str, Any]) -> Iterator[Answer]:
        """The exhibits' answers one behind the other, each handed out whenever it has grown.

        Args:
            instruction: the question.
            context: the passage it is about, empty for none.
            options: those of `MopsModel.generate`.

        Raises:
            InputError: question and answer would not fit into the backbone's window.
        """
        for place, exhibit in enumerate(self._exhibits):
            inputs = exhibit.model.encode([instruction], [context])
            require_room(exhibit.model, inputs, options["max_new_tokens"])
            for text, note in self._stream_one(exhibit.model, inputs, options):
                yield Answer(place, text, note)

    def close(self) -> None:
        """End what is being computed, and the thread."""
        self._closing.set()
        self._worker.shutdown(cancel_futures=True)

    def _gate_scores(self, instruction: str, context: str) -> list[list[float] | None]:
        scores = []
        for model in (exhibit.model for exhibit in self._exhibits):
            inputs = model.encode([instruction], [context])
            require_room(model, inputs, max_new_tokens=1)
            scores.append(model.gate(**inputs))
        return [None if score is None else score[0].tolist() for score in scores]

    def _stream_one(
        self, model: MopsModel, inputs: BatchEncoding, options: dict[str, Any]
    ) -> Iterator[tuple[str, str]]:
        given_up = threading.Event()

        def stop(token_ids: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:  # noqa: ANN401 - transformers' hook
            ended = given_up.is_set() or self._closing.is_set()
            return torch.full((len(token_ids),), ended, device=token_ids.device)

        stopping = StoppingCriteriaList([stop])
        streamer = TextIteratorStreamer(model.tokenizer, skip_prompt=True, skip_special_tokens=True)

        def generate() -> int:
            try:
                output = model.generate(**inputs, **options, streamer=streamer, stopping_criteria=stopping)
                return int(output.shape[1] - inputs["input_ids"].shape[1])
            finally:
                streamer.on_finalized_text("", stream_end=True)  # else a failure would leave the reader waiting

        text, started = "", time.perf_counter()
        running = self._worker.submit(generate)
        try:
            for piece in streamer:
                text += piece
                yield text, ""
            num_tokens, seconds = running.result(), time.perf_counter() - started
        finally:
            given_up.set()
        ended = ", cut off at the limit" if num_tokens >= options["max_new_tokens"] else ""
        yield text.strip(), f"{num_tokens} tokens, {num_tokens / seconds:.0f} a second{ended}"
