"""Where a model and Dolly are taken from when nothing is downloaded."""

import subprocess
import sys

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from mops_fl import fetch, sources
from mops_fl.errors import InputError

pytestmark = pytest.mark.usefixtures("no_network")


def _save_tiny_llama(folder):
    config = LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(config).save_pretrained(folder)


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


def test_the_argument_goes_before_the_environment_before_the_cache_before_the_sample(tmp_path, monkeypatch, dolly_hub):
    assert sources.resolve_dolly("").is_sample
    assert "not Dolly" in sources.resolve_dolly("").description
    dolly_hub(b"rows\n", b"rows\n")
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
