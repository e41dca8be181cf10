"""Loading, saving and pushing adapters of the tiny model; the hub is a folder in its cache's layout, or a stand-in."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import mops_fl
from mops_fl import mops_model
from mops_fl.adapter import initial_state
from mops_fl.adapter_folder import AdapterDescription, SavedAdapter, load_adapter, save_adapter
from mops_fl.backbone import Backbone
from mops_fl.compressed import weights_sha256
from mops_fl.config import BackboneConfig
from mops_fl.data import Row
from mops_fl.encoding import RowEncoder, Turn
from mops_fl.errors import InputError
from mops_fl.mops_model import MopsModel
from mops_fl.payload import INPUT_PROMPTS
from mops_fl.weights import initial_weights

METHODS = ["mops", "fedprompt", "lora", "ia3"]
REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def make_adapter(tiny_model_folder, adapter_config, data_config, tmp_path):
    """``make_adapter("mops", "name")``: a saved adapter of the tiny model on disk."""

    def make(method="mops", name="adapter"):
        backbone_config = BackboneConfig(str(tiny_model_folder), "none", "none", "float32", "backbone")
        config, generator = adapter_config(method=method), torch.Generator().manual_seed(0)
        prompts = torch.randn(6, 32, generator=generator)
        if method in ("lora", "ia3"):
            state = initial_weights(Backbone.load(backbone_config), config, generator)
            prompts = prompts[:0]
        else:
            state = initial_state(config, prompts, generator)
        arrays = {name: array.numpy() for name, array in {**state, INPUT_PROMPTS: prompts}.items()}
        description = AdapterDescription(
            config, backbone_config, weights_sha256(tiny_model_folder), data_config(), ("a", "b", "c"), ()
        )
        save_adapter(tmp_path / name, SavedAdapter(description, arrays, "# Card\n"))
        return tmp_path / name

    return make


def answer_of(model):
    return model.generate(**model.encode(["Hello?"]), max_new_tokens=6, do_sample=False).tolist()


@pytest.mark.parametrize("method", METHODS)
def test_saved_and_loaded_again_it_answers_the_same(method, make_adapter, tmp_path):
    model = MopsModel.from_pretrained(make_adapter(method))
    model.save_pretrained(tmp_path / "again")
    again = MopsModel.from_pretrained(tmp_path / "again")
    assert answer_of(again) == answer_of(model)
    assert again.description == model.description
    assert (tmp_path / "again/README.md").read_text(encoding="utf-8") == "# Card\n"
    assert (model.dtype, model.device.type) == (torch.float32, "cpu")


def test_package_offers_the_class():
    assert mops_fl.MopsModel is MopsModel
    with pytest.raises(AttributeError, match="no attribute 'Other'"):
        mops_fl.Other  # noqa: B018


def test_run_folder_is_accepted_and_one_without_adapter_is_not(make_adapter, tmp_path):
    make_adapter(name="run/adapter")
    assert MopsModel.from_pretrained(tmp_path / "run").description.tasks == ("a", "b", "c")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no adapter"):
        MopsModel.from_pretrained(tmp_path / "empty")


def test_backbone_may_lie_elsewhere_or_be_loaded_already(make_adapter, tiny_model_folder, tmp_path):
    folder = make_adapter()
    expected = answer_of(MopsModel.from_pretrained(folder))
    copy = shutil.copytree(tiny_model_folder, tmp_path / "copy")
    assert answer_of(MopsModel.from_pretrained(folder, backbone=copy)) == expected
    loaded = Backbone.load(BackboneConfig(str(copy), "none", "none", "float32", "backbone"))
    model = MopsModel.from_pretrained(folder, backbone=loaded)
    assert model.backbone is loaded
    assert answer_of(model) == expected


def test_weights_spread_over_other_files_are_the_same_weights(make_adapter, tiny_model_folder, tmp_path):
    sharded = shutil.copytree(tiny_model_folder, tmp_path / "sharded")
    (sharded / "model.safetensors").unlink()
    Backbone.load(BackboneConfig(str(tiny_model_folder), "none", "none", "float32", "backbone")).model.save_pretrained(
        sharded, max_shard_size="40KB"
    )
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert weights_sha256(sharded) == weights_sha256(tiny_model_folder)
    MopsModel.from_pretrained(make_adapter(), backbone=sharded)


def test_another_backbone_is_refused(make_adapter, tiny_model, byte_tokenizer, tmp_path):
    other = tiny_model("llama")
    with torch.no_grad():
        other.model.layers[3].mlp.up_proj.weight[0, 0] += 0.5
    for part in (other, byte_tokenizer):
        part.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match=r"was trained on .* with weights of SHA-256 .*, but those in"):
        MopsModel.from_pretrained(make_adapter(), backbone=tmp_path / "other")
    loaded = Backbone.load(BackboneConfig(str(tmp_path / "other"), "none", "none", "float32", "backbone"))
    with pytest.raises(InputError, match="but those in"):
        MopsModel.from_pretrained(make_adapter(), backbone=loaded)


def test_backbone_quantised_otherwise_or_made_in_memory_is_refused(make_adapter, tiny_model_folder, tiny_backbone):
    loaded = Backbone.load(BackboneConfig(str(tiny_model_folder), "none", "nf4", "float32", "backbone"))
    with pytest.raises(InputError, match="trained with quantization none, the backbone has nf4"):
        MopsModel.from_pretrained(make_adapter(), backbone=loaded)
    with pytest.raises(InputError, match="made in memory"):
        MopsModel.from_pretrained(make_adapter(), backbone=tiny_backbone)


def test_missing_backbone_and_device_are_refused(make_adapter, tmp_path):
    with pytest.raises(InputError, match="mops-fl fetch"):
        MopsModel.from_pretrained(make_adapter(), backbone="nobody/nothing")
    with pytest.raises(InputError, match="device 'tpu9'"):
        MopsModel.from_pretrained(make_adapter(), device="tpu9")


def test_dtype_can_be_chosen(make_adapter):
    assert MopsModel.from_pretrained(make_adapter(), dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(InputError, match="`dtype` is 'float8'"):
        MopsModel.from_pretrained(make_adapter(), dtype="float8")


def test_questions_are_encoded_as_rows_are_in_training(make_adapter):
    model = MopsModel.from_pretrained(make_adapter())
    encoder = RowEncoder(model.tokenizer, model.description.data, ("a",))
    rows = [Row(0, "Sum up.", "A long text.", "Short.", "a"), Row(1, "Why?", "", "So.", "a")]
    inputs = model.encode([row.instruction for row in rows], [row.context for row in rows])
    for row, ids, mask in zip(rows, inputs["input_ids"], inputs["attention_mask"], strict=True):
        encoded = encoder.encode(row)
        assert ids[mask.bool()].tolist() == encoded.token_ids[: encoded.prompt_length].tolist()
        assert mask.tolist() == sorted(mask.tolist())  # padding on the left
    assert inputs["attention_mask"].sum(1).tolist() != [inputs["input_ids"].shape[1]] * 2


def test_conversation_is_its_turns_one_behind_the_other(make_adapter):
    model = MopsModel.from_pretrained(make_adapter())
    turns = [Turn("Who?", "", "Ada."), Turn("When?", "In a book.")]
    text = model.tokenizer.decode(model.encode_turns([turns])["input_ids"][0])
    assert text == (
        "### Instruction:\nWho?\n\n### Response:\nAda.<|end|>"
        "### Instruction:\nWhen?\n\n### Input:\nIn a book.\n\n### Response:\n"
    )


def test_turn_that_was_answered_with_nothing_ends_like_the_others(make_adapter):
    model = MopsModel.from_pretrained(make_adapter())
    question = Turn("Who?", "")
    text = model.tokenizer.decode(model.encode_turns([[question, question]])["input_ids"][0])
    assert text == "### Instruction:\nWho?\n\n### Response:\n<|end|>### Instruction:\nWho?\n\n### Response:\n"


def test_answers_of_a_batch_are_those_of_each_question(make_adapter):
    model = MopsModel.from_pretrained(make_adapter())
    questions, contexts = ["Say hello to the whole world.", "Why?"], ["", "Because."]
    together = model.answer(questions, contexts, max_new_tokens=8, do_sample=False)
    single = [
        model.answer([q], [c], max_new_tokens=8, do_sample=False)[0] for q, c in zip(questions, contexts, strict=True)
    ]
    assert together == single
    assert "###" not in together[0]


@pytest.fixture
def hub_cache(make_adapter, monkeypatch, tmp_path):
    """``owner/adapter`` as the hub's client leaves it in its cache; the hub itself is out of reach."""
    repository = tmp_path / "hub" / "models--owner--adapter"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(REVISION, encoding="utf-8")
    shutil.copytree(make_adapter(), repository / "snapshots" / REVISION)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "adapter"


@pytest.mark.parametrize("revision", [None, "main", REVISION])
def test_repository_in_the_hubs_cache_loads_offline(hub_cache, revision):
    found = MopsModel.from_pretrained("owner/adapter", revision=revision)
    assert answer_of(found) == answer_of(MopsModel.from_pretrained(hub_cache))


@pytest.mark.parametrize("name", ["owner/unknown", "not a/valid/name"])
def test_unknown_repository_is_refused(hub_cache, name):
    with pytest.raises(InputError, match="neither a folder nor an adapter"):
        MopsModel.from_pretrained(name)


def test_push_uploads_the_folder_into_a_repository(make_adapter, monkeypatch, tmp_path):
    calls = []

    class Hub:
        def __init__(self, token=None):
            calls.append(("token", token))

        def create_repo(self, repo_id, **options):
            calls.append(("create", repo_id, options))
            return SimpleNamespace(repo_id=f"me/{repo_id}")

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            calls.append(("upload", repo_id, commit_message))
            shutil.copytree(folder_path, tmp_path / "uploaded")
            return SimpleNamespace(commit_url="address")

    monkeypatch.setattr(mops_model, "HfApi", Hub)
    model = MopsModel.from_pretrained(make_adapter())
    assert model.push_to_hub("mine", private=True, token="secret") == "address"
    assert calls == [
        ("token", "secret"),
        ("create", "mine", {"private": True, "exist_ok": True}),
        ("upload", "me/mine", "Upload mops adapter"),
    ]
    uploaded = Path(tmp_path / "uploaded")
    assert {path.name for path in uploaded.iterdir()} == {"README.md", "adapter.safetensors", "adapter_config.json"}
    assert load_adapter(uploaded).description == model.description
