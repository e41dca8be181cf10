import json

import numpy as np
import pytest

from mops_fl.adapter_folder import load_adapter, save_adapter
from mops_fl.errors import InputError

ARRAYS = {
    "prompts": np.array([[1e-45, -0.0, 1 / 3], [3.4028235e38, 1.0, -2.5]], np.float32),
    "gate.w1": np.arange(6, dtype=np.float32).reshape(2, 3).T,  # not contiguous
    "input-prompts": np.zeros((0, 3), np.float32),
}
CONFIG = {"method": "mops", "inject_layer": 10, "gating": "attention", "tasks": ["closed_qa", "open_qa"]}


def test_adapter_comes_back_bit_for_bit_with_its_config(tmp_path):
    save_adapter(tmp_path / "adapter", ARRAYS, CONFIG)
    arrays, config = load_adapter(tmp_path / "adapter")
    assert set(arrays) == set(ARRAYS)
    for name, array in ARRAYS.items():
        assert (arrays[name].dtype, arrays[name].shape) == (np.float32, array.shape)
        assert arrays[name].tobytes() == np.ascontiguousarray(array).tobytes()
    assert config == {"format-version": 1, **CONFIG}


def test_saving_again_replaces_the_adapter(tmp_path):
    save_adapter(tmp_path, ARRAYS, CONFIG)
    save_adapter(tmp_path, {"prompts": np.ones((1, 2), np.float32)}, {"method": "fedprompt"})
    arrays, config = load_adapter(tmp_path)
    assert {name: array.tolist() for name, array in arrays.items()} == {"prompts": [[1.0, 1.0]]}
    assert config == {"format-version": 1, "method": "fedprompt"}


@pytest.mark.parametrize("name", ["adapter.safetensors", "adapter_config.json"])
def test_folder_without_one_of_its_files_is_refused(tmp_path, name):
    save_adapter(tmp_path, ARRAYS, CONFIG)
    (tmp_path / name).unlink()
    with pytest.raises(InputError, match="no readable adapter"):
        load_adapter(tmp_path)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("adapter.safetensors", lambda data: data[:-1]),
        ("adapter.safetensors", lambda data: b""),
        ("adapter_config.json", lambda data: data[:-4]),
        ("adapter_config.json", lambda data: b"\xff" + data),
    ],
)
def test_damaged_file_is_refused(tmp_path, name, damage):
    save_adapter(tmp_path, ARRAYS, CONFIG)
    path = tmp_path / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match="no readable adapter"):
        load_adapter(tmp_path)


@pytest.mark.parametrize("version", [None, 0, 2])
def test_another_format_version_is_refused(tmp_path, version):
    save_adapter(tmp_path, ARRAYS, CONFIG)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**CONFIG, "format-version": version}))
    with pytest.raises(InputError, match=f"format version {version}, this software reads 1"):
        load_adapter(tmp_path)


def test_config_that_is_no_object_is_refused(tmp_path):
    save_adapter(tmp_path, ARRAYS, CONFIG)
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(InputError, match="no JSON object"):
        load_adapter(tmp_path)
