import logging
from dataclasses import replace

import numpy as np
import pytest

from experiments import checkpoint as module
from experiments.checkpoint import Checkpoint, Progress, load_checkpoint, save_checkpoint
from mops_fl.errors import InputError

PROGRESS = Progress(
    rounds_done=1,
    client_steps=20,
    train_seconds=1.5,
    elapsed_seconds=2.25,
    num_tokens=345,
    bytes_up=1000,
    bytes_down=2000,
    failures=1,
    perplexity_bare={"all": 60.125},
    perplexity_before={"all": 1 / 3, "closed_qa": 7.0},
    perplexity={"all": float("inf")},
)
# The same name in both parts: neither may end up in the other.
ADAPTER = {
    "prompts": np.array([[1e-45, -0.0, 1 / 3]], np.float32),
    "both": np.arange(4, dtype=np.float32).reshape(2, 2).T,
}
FROZEN = {"input-prompts": np.array([[3.4e38]], np.float32), "both": np.array([9.0], np.float32)}


def save_rounds(folder, *rounds):
    for number in rounds:
        adapter = {**ADAPTER, "prompts": np.full((1, 3), number, np.float32)}
        save_checkpoint(folder, Checkpoint(adapter, FROZEN, replace(PROGRESS, rounds_done=number)))


def path_of(folder, number):
    return folder / "checkpoints" / f"round-{number:06d}.safetensors"


def assert_same_bits(actual, expected):
    assert set(actual) == set(expected)
    for name, array in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (array.dtype, array.shape)
        assert actual[name].tobytes() == np.ascontiguousarray(array).tobytes()


def test_checkpoint_comes_back_bit_for_bit(tmp_path):
    save_checkpoint(tmp_path, Checkpoint(ADAPTER, FROZEN, PROGRESS))
    loaded = load_checkpoint(tmp_path)
    assert_same_bits(loaded.adapter, ADAPTER)
    assert_same_bits(loaded.frozen, FROZEN)
    assert loaded.progress == PROGRESS


def test_newest_two_checkpoints_are_kept(tmp_path):
    save_rounds(tmp_path, 8, 9, 10, 11)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "round-000010.safetensors",
        "round-000011.safetensors",
    ]
    assert load_checkpoint(tmp_path).progress.rounds_done == 11


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: b"\xff" * 8 + data[8:],
        lambda data: data.replace(b"progress", b"regressp"),
        lambda data: data.replace(b"rounds_done", b"rounds_gone"),
    ],
    ids=["empty", "half", "one byte short", "length of header", "no progress", "unknown progress"],
)
def test_corrupt_newest_checkpoint_is_named_and_the_one_before_is_used(tmp_path, caplog, damage):
    save_rounds(tmp_path, 1, 2)
    newest = path_of(tmp_path, 2)
    newest.write_bytes(damage(newest.read_bytes()))
    with caplog.at_level(logging.WARNING):
        loaded = load_checkpoint(tmp_path)
    assert loaded.progress.rounds_done == 1
    assert loaded.adapter["prompts"].tolist() == [[1.0, 1.0, 1.0]]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert str(newest) in record.getMessage()


def test_no_readable_checkpoint_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="no readable checkpoint"):
        load_checkpoint(tmp_path)
    save_rounds(tmp_path, 1, 2)
    for number in (1, 2):
        path_of(tmp_path, number).write_bytes(b"garbage")
    with pytest.raises(InputError, match="no readable checkpoint"):
        load_checkpoint(tmp_path)


def test_interrupted_write_leaves_the_checkpoints_before_it(tmp_path, monkeypatch, caplog):
    save_rounds(tmp_path, 1)
    write = module.save_file

    def write_half(tensors, path, metadata):
        write(tensors, path, metadata=metadata)
        path.write_bytes(path.read_bytes()[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "save_file", write_half)
    with pytest.raises(KeyboardInterrupt):
        save_rounds(tmp_path, 2)
    assert load_checkpoint(tmp_path).progress.rounds_done == 1
    assert not caplog.records

    monkeypatch.setattr(module, "save_file", write)
    save_rounds(tmp_path, 2)
    assert load_checkpoint(tmp_path).progress.rounds_done == 2
