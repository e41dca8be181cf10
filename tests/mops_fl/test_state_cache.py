import os
import threading

import pytest
import torch

from mops_fl import state_cache
from mops_fl.state_cache import RowStates, StateCache


def states(row_id, num_tokens=3, dtype=torch.bfloat16):
    """64 bytes of tokens for three tokens in bfloat16, and 8 of pooled."""
    generator = torch.Generator().manual_seed(row_id)
    return RowStates(torch.randn(num_tokens, 10, generator=generator).to(dtype), torch.full((2,), float(row_id)))


ROW_BYTES = 60 + 8


def kept(cache, row_ids):
    """Which of the rows are there, bit by bit as they were put."""
    found = {row_id: cache.get(row_id) for row_id in row_ids}
    for row_id, row in found.items():
        if row is not None:
            expected = states(row_id, len(row.tokens), row.tokens.dtype)
            assert torch.equal(row.tokens, expected.tokens)
            assert torch.equal(row.pooled, expected.pooled)
    return [row_id for row_id, row in found.items() if row is not None]


def filled(cache, row_ids, **options):
    for row_id in row_ids:
        cache.put(row_id, states(row_id, **options))
    return cache


@pytest.mark.parametrize(
    ("capacity", "count"), [(0, 0), (ROW_BYTES - 1, 0), (3 * ROW_BYTES, 3), (4 * ROW_BYTES - 1, 3)]
)
def test_rows_up_to_exactly_the_bound_are_kept(capacity, count):
    cache = filled(StateCache(capacity), range(6))
    assert kept(cache, range(6)) == list(range(count))


def test_first_rows_stay_and_a_smaller_one_still_fills_the_gap():
    cache = filled(StateCache(2 * ROW_BYTES + 30), range(4))
    filled(cache, [9], num_tokens=1)
    assert kept(cache, [*range(4), 9]) == [0, 1, 9]


def test_row_put_again_counts_once():
    cache = filled(StateCache(2 * ROW_BYTES, 2 * 64), [1, 1, 1, 2, 3, 3, 3, 4])
    assert kept(cache, range(6)) == [1, 2, 3, 4]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_beyond_the_memory_go_to_the_file_bit_by_bit(dtype):
    row_bytes = 30 * dtype.itemsize
    cache = filled(StateCache(2 * (row_bytes + 8), 3 * (-row_bytes % 64 + row_bytes)), range(8), dtype=dtype)
    assert kept(cache, range(8)) == [0, 1, 2, 3, 4]
    mapped = cache.get(4).tokens.untyped_storage()
    assert mapped.data_ptr() == cache.get(3).tokens.untyped_storage().data_ptr()  # one mapping, not a copy each


def test_file_grows_segment_by_segment(monkeypatch):
    sizes = []
    map_file = state_cache._map_unnamed_file
    monkeypatch.setattr(state_cache, "_map_unnamed_file", lambda size: sizes.append(size) or map_file(size))
    monkeypatch.setattr(state_cache, "SEGMENT_BYTES", 128)
    cache = filled(StateCache(0, 320), range(3))
    assert sizes == [128, 128]
    filled(cache, range(3, 9))
    assert sizes == [128, 128, 64]
    assert kept(cache, range(9)) == [0, 1, 2, 3, 4]
    filled(cache, [20], num_tokens=100)  # longer than any segment
    assert cache.get(20) is None


def test_file_has_no_name_that_could_be_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(state_cache.tempfile, "tempdir", str(tmp_path))
    cache = filled(StateCache(0, 1 << 20), [1])
    assert kept(cache, [1]) == [1]
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_said_once_and_ends_the_keeping(monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    cache = filled(StateCache(ROW_BYTES, 1 << 20), range(4))
    assert kept(cache, range(4)) == [0]
    assert [record.getMessage() for record in caplog.records] == [
        "no more frozen states are kept: [Errno 28] No space left on device"
    ]


def test_many_threads_at_once():
    cache = StateCache(40 * ROW_BYTES, 40 * 64)
    threads = [threading.Thread(target=filled, args=(cache, range(100))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(kept(cache, range(100))) == 80
