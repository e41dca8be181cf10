"""What the commands that use a trained adapter have in common: which one, how it generates, what its gate decided."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from experiments.wording import readable, shortened
from mops_fl.config import require_at_least, require_positive
from mops_fl.errors import InputError

if TYPE_CHECKING:
    from transformers import BatchEncoding

    from mops_fl.mops_model import MopsModel

BAR_WIDTH = 30
# Options of transformers' `generate`: the likeliest token each time, whatever settings the backbone ships.
GREEDY: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1.0,
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length"), 0),
    **dict.fromkeys(("temperature", "top_p", "top_k", "min_new_tokens", "encoder_repetition_penalty")),
    **dict.fromkeys(("bad_words_ids", "sequence_bias", "suppress_tokens", "begin_suppress_tokens")),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty")),
    **dict.fromkeys(("guidance_scale", "watermarking_config")),
}
# Spaces and figures of a line that shows a score.
BESIDE_BAR = 10
HIGHEST_SEED = 2**32 - 1
# Divided by less, logits may overflow.
LOWEST_TEMPERATURE = 0.001


def add_adapter_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which adapter, on what."""
    add_backbone_options(parser)
    parser.add_argument(
        "--adapter", metavar="RUN", required=True, help="run folder, adapter folder, or repository on the hub"
    )


def add_backbone_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say on what it runs."""
    parser.add_argument("--backbone", metavar="NAME", help="where the backbone is, if not where the adapter says")
    parser.add_argument("--device", metavar="NAME", default="auto", help="cpu, cuda, or auto (default: %(default)s)")
    parser.add_argument(
        "--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="auto: as in training (default)"
    )


def add_generation_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how answers are made."""
    parser.add_argument("--max-new-tokens", metavar="N", type=int, default=256, help="(default: %(default)s)")
    parser.add_argument(
        "--temperature", metavar="T", type=float, default=0.0, help="0: always the likeliest token (default)"
    )
    parser.add_argument(
        "--top-p", metavar="P", type=float, default=1.0, help="sample from the likeliest tokens that add up to P"
    )
    parser.add_argument("--beams", metavar="N", type=int, default=1, help="beam search; then nothing is streamed")
    parser.add_argument(
        "--repetition-penalty", metavar="R", type=float, default=1.0, help="above 1 against loops, such as 1.2"
    )
    parser.add_argument("--stop", metavar="TEXT", action="append", help="end an answer behind this text")
    parser.add_argument("--seed", metavar="N", type=int, help="make sampling repeatable")
    parser.add_argument("--show-gate", action="store_true", help="show which experts fired (on stderr)")


def load_model(args: argparse.Namespace) -> MopsModel:
    """The model that `add_adapter_options` name.

    Raises:
        InputError: see `MopsModel.from_pretrained`.
    """
    from mops_fl.mops_model import MopsModel  # slow to import, and not needed to refuse a wrong value

    return MopsModel.from_pretrained(args.adapter, args.backbone, args.device, args.dtype)


def read_generation_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `generate` that `add_generation_options` name.

    Raises:
        InputError: one is out of range.
    """
    require_at_least("max-new-tokens", args.max_new_tokens, 1)
    require_at_least("beams", args.beams, 1)
    require_positive("repetition-penalty", args.repetition_penalty)
    if args.seed is not None:
        require_seed(args.seed)
    if args.temperature and not LOWEST_TEMPERATURE <= args.temperature < math.inf:
        raise InputError(f"`temperature` is {args.temperature}; it must be 0 or at least {LOWEST_TEMPERATURE}.")
    if not 0 < args.top_p <= 1:
        raise InputError(f"`top-p` is {args.top_p}; it must be above 0 and at most 1.")
    sampling = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p} if args.temperature else {}
    return {
        **(sampling or GREEDY),
        "max_new_tokens": args.max_new_tokens,
        "num_beams": args.beams,
        "repetition_penalty": args.repetition_penalty,
        "stop_strings": args.stop,
    }


def require_seed(seed: int) -> None:
    """Refuse what no generator of random numbers takes.

    Raises:
        InputError: it is out of range.
    """
    if not 0 <= seed <= HIGHEST_SEED:
        raise InputError(f"`seed` is {seed}; it must be from 0 to {HIGHEST_SEED}.")


def read_context(path: Path) -> str:
    """The text of a file.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The context {path} cannot be read ({error}); give a text file in UTF-8.") from error


def require_utf8(text: str) -> None:
    """Refuse what the tokenizer cannot read.

    Raises:
        InputError: it was made from bytes that are not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"The instruction cannot be read ({error}); give text in UTF-8.") from error


def fix_sampling(args: argparse.Namespace) -> None:
    """Make the answers to come repeatable, if a seed is given."""
    if args.seed is not None:
        from transformers import set_seed

        set_seed(args.seed)


def room_for_question(model: MopsModel, max_new_tokens: int) -> int:
    """Most tokens of a question with its context, beside prompts and answer, in the backbone's window.

    Raises:
        InputError: the answer leaves none.
    """
    window: int = model.config.max_position_embeddings
    room = window - model.adaptable.num_prompts
    if max_new_tokens >= room:
        raise InputError(
            f"`max-new-tokens` is {max_new_tokens}, but beside the prompts the backbone's window has room for {room} "
            "tokens, of question and answer together; choose fewer."
        )
    return room - max_new_tokens


def require_room(model: MopsModel, inputs: BatchEncoding, max_new_tokens: int) -> None:
    """Refuse what does not fit, before memory is taken for it.

    Raises:
        InputError: question and answer are longer than the backbone's window.
    """
    room = room_for_question(model, max_new_tokens)
    if inputs["input_ids"].shape[1] > room:
        raise InputError(f"The question with its context is longer than {room} tokens; shorten it or the answer.")


def stream_answer(model: MopsModel, inputs: BatchEncoding, options: dict[str, Any]) -> str:
    """Print the answer to one question on stdout while it is made; beams show only at the end.

    Returns:
        The answer.
    """
    from transformers import TextStreamer

    streams = options["num_beams"] == 1
    streamer = TextStreamer(model.tokenizer, skip_prompt=True, skip_special_tokens=True) if streams else None
    output = model.generate(**inputs, **options, streamer=streamer)
    text: str = model.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    if not streams:
        print(text)
    return text


def print_gate(model: MopsModel, inputs: BatchEncoding) -> None:
    """Which experts fire for one question, as bars on stderr."""
    scores = model.gate(**inputs)
    if scores is None:
        print(f"{model.description.adapter.method} has no gate", file=sys.stderr)
    else:
        width = Console(stderr=True).width if sys.stderr.isatty() else None
        print("\n".join(gate_lines(model.description.expert_names, scores[0].tolist(), width)), file=sys.stderr)


def gate_lines(names: Sequence[str], scores: Sequence[float], width: int | None = None) -> list[str]:
    """A line for each expert: name, bar, score.

    Args:
        names: of the experts.
        scores: of the experts, from 0 to 1.
        width: most characters of a line, to which names are shortened; None: as many as they take.
    """
    for_name, bar = max(map(len, names)), BAR_WIDTH
    if width is not None:
        bar = max(1, min(bar, width // 2 - BESIDE_BAR))
        for_name = max(1, min(for_name, width - BESIDE_BAR - bar))
    return [
        f"  {shortened(readable(name), for_name):{for_name}}  {'█' * round(bar * score):{bar}}  {score:.2f}"
        for name, score in zip(names, scores, strict=True)
    ]
