"""A folder of the cache appears whole or not at all, and a full disk says what it is."""

from pathlib import Path

import pytest
from safetensors import SafetensorError

from mops_fl.errors import InputError
from mops_fl.fetch import staged


def write_bytes():
    Path("/dev/full").write_bytes(b"content")


def write_weights():
    # What safetensors makes of a full disk; it would put a file of its own in the place of /dev/full.
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("write", [write_bytes, write_weights])
def test_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, write):
    with pytest.raises(InputError, match=r"cannot be written \(.*No space left on device.*make room"):  # noqa: SIM117
        with staged(tmp_path / "cache" / "model"):
            write()
    assert not list((tmp_path / "cache").iterdir())


def test_errors_that_no_disk_is_to_blame_for_stay_what_they_are(tmp_path):
    with pytest.raises(ConnectionResetError), staged(tmp_path / "cache" / "model"):
        raise ConnectionResetError("the hub is gone")
    assert not list((tmp_path / "cache").iterdir())
