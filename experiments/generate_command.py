"""`mops-fl generate`: answer instructions with a trained adapter."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from experiments.adapter_options import (
    add_adapter_options,
    add_generation_options,
    fix_sampling,
    load_model,
    print_gate,
    read_context,
    read_generation_options,
    require_room,
    require_utf8,
    stream_answer,
)
from mops_fl.errors import InputError


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `generate`."""
    add_adapter_options(parser)
    add_generation_options(parser)
    parser.add_argument("prompts", metavar="PROMPT", nargs="+", help="an instruction; -: one from each line of stdin")
    parser.add_argument("--context", metavar="FILE", type=Path, help="text that the instructions are about")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Answer each prompt on stdout, one behind the other.

    Returns:
        The exit code, 0.

    Raises:
        InputError: If an option is out of range, there is no prompt or one is not in UTF-8, or adapter, backbone or
            context are missing.
    """
    options, prompts = read_generation_options(args), _prompts(args.prompts)
    context = read_context(args.context) if args.context else ""
    model = load_model(args)
    fix_sampling(args)
    for number, prompt in enumerate(prompts):
        if number:
            print()
        inputs = model.encode([prompt], [context])
        require_room(model, inputs, args.max_new_tokens)
        if args.show_gate:
            print_gate(model, inputs)
        stream_answer(model, inputs, options)
    return 0


def _prompts(given: list[str]) -> list[str]:
    try:
        lines = [line for prompt in given for line in (sys.stdin if prompt == "-" else [prompt])]
    except UnicodeDecodeError as error:
        raise InputError(f"The instructions on stdin cannot be read ({error}); give text in UTF-8.") from error
    prompts = [line.strip() for line in lines if line.strip()]
    for prompt in prompts:
        require_utf8(prompt)
    if not prompts:
        raise InputError("There is no instruction to answer; give one, or one a line on stdin with -.")
    return prompts
