import json

import numpy as np
import pytest

from mops_fl import adapter_folder
from mops_fl.adapter_folder import AdapterDescription, SavedAdapter, load_adapter, save_adapter
from mops_fl.config import BackboneConfig
from mops_fl.errors import InputError

ARRAYS = {
    "prompts": np.array([[1e-45, -0.0, 1 / 3], [3.4028235e38, 1.0, -2.5]], np.float32),
    "gate.w1": np.arange(6, dtype=np.float32).reshape(2, 3).T,  # not contiguous
    "input-prompts": np.zeros((0, 3), np.float32),
}


@pytest.fixture
def saved(adapter_config, data_config):
    description = AdapterDescription(
        adapter=adapter_config(gating="embedding"),
        backbone=BackboneConfig("owner/model", "sparsegpt:2:4", "int8", "auto", "backbone"),
        backbone_sha256="ab" * 32,
        data=data_config(max_length=77),
        tasks=("closed_qa", "open_qa"),
        experts=(("closed_qa",), ("open_qa",), ()),
    )
    return SavedAdapter(description, ARRAYS, "# A card\n")


def edit(path, change):
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def test_adapter_comes_back_bit_for_bit_with_its_description_and_card(tmp_path, saved):
    save_adapter(tmp_path / "adapter", saved)
    loaded = load_adapter(tmp_path / "adapter")
    assert set(loaded.arrays) == set(ARRAYS)
    for name, array in ARRAYS.items():
        assert (loaded.arrays[name].dtype, loaded.arrays[name].shape) == (np.float32, array.shape)
        assert loaded.arrays[name].tobytes() == np.ascontiguousarray(array).tobytes()
    assert loaded.description == saved.description
    assert loaded.card == saved.card


def test_files_say_what_they_are_and_not_where_the_data_lay(tmp_path, saved):
    save_adapter(tmp_path, saved)
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["format-version"] == 2
    assert config["adapter"]["gating"] == "embedding"
    assert config["backbone"]["compression"] == "sparsegpt:2:4"
    assert config["template"][0] == "### Instruction:\n"
    assert "data-path" not in config["data"]


def test_experts_are_named_by_their_tasks_or_numbers(saved, adapter_config):
    assert saved.description.expert_names == ("closed_qa", "open_qa", "expert 2")
    changed = AdapterDescription(**{**vars(saved.description), "experts": ()})
    assert changed.expert_names == ("expert 0", "expert 1", "expert 2")
    shared = AdapterDescription(**{**vars(saved.description), "experts": (("open_qa",), ("closed_qa",), ("open_qa",))})
    assert shared.expert_names == ("open_qa 0", "closed_qa", "open_qa 2")
    no_gate = AdapterDescription(**{**vars(saved.description), "adapter": adapter_config(method="fedprompt")})
    assert no_gate.expert_names == ()


def test_saving_again_replaces_the_adapter(tmp_path, saved):
    save_adapter(tmp_path, saved)
    save_adapter(tmp_path, SavedAdapter(saved.description, {"prompts": np.ones((1, 2), np.float32)}, "other"))
    loaded = load_adapter(tmp_path)
    assert {name: array.tolist() for name, array in loaded.arrays.items()} == {"prompts": [[1.0, 1.0]]}
    assert loaded.card == "other"


@pytest.mark.parametrize("name", ["adapter.safetensors", "adapter_config.json"])
def test_folder_without_one_of_its_files_is_refused(tmp_path, saved, name):
    save_adapter(tmp_path, saved)
    (tmp_path / name).unlink()
    with pytest.raises(InputError, match="no readable adapter"):
        load_adapter(tmp_path)


def test_card_may_be_missing_or_edited(tmp_path, saved):
    save_adapter(tmp_path, saved)
    (tmp_path / "README.md").write_text("mine", encoding="utf-8")
    assert load_adapter(tmp_path).card == "mine"
    (tmp_path / "README.md").unlink()
    assert load_adapter(tmp_path).card == ""


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("adapter.safetensors", lambda data: data[:-1]),
        ("adapter.safetensors", lambda data: b""),
        ("adapter_config.json", lambda data: data[:-4]),
        ("adapter_config.json", lambda data: b"\xff" + data),
    ],
)
def test_damaged_file_is_refused(tmp_path, saved, name, damage):
    save_adapter(tmp_path, saved)
    path = tmp_path / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match="no readable adapter"):
        load_adapter(tmp_path)


def test_edited_arrays_are_refused(tmp_path, saved):
    save_adapter(tmp_path, saved)
    path = tmp_path / "adapter.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # still a valid file, with another number in it
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"safetensors is not the file that adapter_config.json describes"):
        load_adapter(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config["adapter"].update(gating="attention"),
        lambda config: config["backbone"].update(sha256="cd" * 32),
        lambda config: config.pop("checksum"),
        lambda config: config.pop("sha256"),
        lambda config: config.update({"more": 1}),
    ],
)
def test_edited_config_is_refused(tmp_path, saved, change):
    save_adapter(tmp_path, saved)
    edit(tmp_path / "adapter_config.json", change)
    with pytest.raises(InputError, match="was edited"):
        load_adapter(tmp_path)


@pytest.mark.parametrize("version", [None, 0, 3])
def test_another_format_version_is_refused(tmp_path, saved, version):
    save_adapter(tmp_path, saved)
    edit(tmp_path / "adapter_config.json", lambda config: config.update({"format-version": version}))
    with pytest.raises(InputError, match=f"format version {version}, this software reads 2"):
        load_adapter(tmp_path)


def test_first_format_version_is_refused_with_the_way_out(tmp_path, saved):
    save_adapter(tmp_path, saved)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"format-version": 1, "method": "mops"}))
    with pytest.raises(InputError, match=r"format version 1.* --resume RUN"):
        load_adapter(tmp_path)


def test_another_template_is_refused(tmp_path, saved, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("mops_fl.adapter_folder.TEMPLATE", ("Q: ", " ", " A: "))
        save_adapter(tmp_path, saved)
    with pytest.raises(InputError, match="another template"):
        load_adapter(tmp_path)


def test_settings_that_this_software_does_not_know_are_refused(tmp_path, saved, monkeypatch):
    def fewer(section):
        return {key: value for key, value in table(section).items() if key != "gating"}

    table = adapter_folder._table
    with monkeypatch.context() as patch:
        patch.setattr(adapter_folder, "_table", fewer)
        save_adapter(tmp_path, saved)
    with pytest.raises(InputError, match=r"written by mops-fl .*`gating`"):
        load_adapter(tmp_path)


def test_config_that_is_no_object_is_refused(tmp_path, saved):
    save_adapter(tmp_path, saved)
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(InputError, match="no JSON object"):
        load_adapter(tmp_path)
