import logging
from dataclasses import replace

import numpy as np
import pytest

from experiments import durable
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
    assert list(actual) == list(expected)
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
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),
        lambda data: data.replace(b'bytes_up\\": 1000', b'bytes_up\\": 1001'),
    ],
    ids=["empty", "half", "one byte short", "length of header", "no progress", "unknown progress", "a bit", "a digit"],
)
def test_corrupt_newest_checkpoint_is_named_and_the_one_before_is_used(tmp_path, caplog, damage):
    save_rounds(tmp_path, 1, 2)
    newest = path_of(tmp_path, 2)
    whole = newest.read_bytes()
    newest.write_bytes(damage(whole))
    assert newest.read_bytes() != whole
    with caplog.at_level(logging.WARNING):
        loaded = load_checkpoint(tmp_path)
    assert loaded.progress.rounds_done == 1
    assert loaded.adapter["prompts"].tolist() == [[1.0, 1.0, 1.0]]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert str(newest) in record.getMessage()


def test_only_corrupt_checkpoints_are_an_input_error_but_none_at_all_are_not(tmp_path):
    assert load_checkpoint(tmp_path) is None
    save_rounds(tmp_path, 1, 2)
    for number in (1, 2):
        path_of(tmp_path, number).write_bytes(b"garbage")
    with pytest.raises(InputError, match="no readable checkpoint"):
        load_checkpoint(tmp_path)


def test_interrupted_write_leaves_the_checkpoints_before_it(tmp_path, monkeypatch, caplog):
    save_rounds(tmp_path, 1)

    def die(*_):
        raise KeyboardInterrupt

    for step in ("fsync", "open"):  # half written; written, but under its temporary name
        with monkeypatch.context() as patch:
            patch.setattr(durable.os, step, die)
            with pytest.raises(KeyboardInterrupt):
                save_rounds(tmp_path, 2)
        if step == "fsync":
            assert load_checkpoint(tmp_path).progress.rounds_done == 1
    assert not caplog.records
    save_rounds(tmp_path, 2)
    assert load_checkpoint(tmp_path).progress.rounds_done == 2


def test_optimizer_state_comes_back_and_is_part_of_the_checksum(tmp_path):
    moments = {"prompts/exp_avg": np.array([1.5], np.float32), "prompts/step": np.array(3.0, np.float32)}
    save_checkpoint(tmp_path, Checkpoint(ADAPTER, FROZEN, PROGRESS, moments))
    assert_same_bits(load_checkpoint(tmp_path).optimizer, moments)
