"""Models side by side on one backbone: each answers as it does alone, and the bare one as Hugging Face's."""

import pytest
import torch

from experiments.explore_models import load_exhibits, require_one_backbone
from mops_fl.errors import InputError
from mops_fl.mops_model import MopsModel

METHODS = ["fedprompt", "mops", "lora", "ia3"]


def answer_of(model):
    return model.generate(**model.encode(["Why is that?"]), max_new_tokens=12, do_sample=False)


@pytest.fixture
def runs(make_usable_run):
    return [make_usable_run(method, method=method) for method in METHODS]


@pytest.fixture
def exhibits(runs):
    return load_exhibits(runs, None, "auto", "auto")


def test_bare_model_answers_as_hugging_face_does_without_us(exhibits, tiny_model):
    bare = exhibits[0]
    assert (bare.label, bare.run) == ("bare model", None)
    inputs = bare.model.encode(["Why is that?"])
    expected = tiny_model("llama").generate(
        **inputs, max_new_tokens=12, do_sample=False, eos_token_id=bare.model.generation_config.eos_token_id,
        pad_token_id=bare.model.generation_config.pad_token_id,
    )  # fmt: skip
    assert torch.equal(answer_of(bare.model), expected)


def test_models_share_one_backbone_and_answer_as_each_does_alone(exhibits, runs):
    assert len({id(exhibit.model.backbone) for exhibit in exhibits}) == 1
    assert [exhibit.label for exhibit in exhibits] == ["bare model", "FedPrompt", "MoPs", "LoRA", "IA3"]
    answers = [answer_of(exhibit.model) for exhibit in exhibits]
    for answer, run in zip(answers[1:], runs, strict=True):
        assert torch.equal(answer, answer_of(MopsModel.from_pretrained(run.path)))
    assert len({tuple(answer[0].tolist()) for answer in answers}) == len(answers)


def test_labels_name_seeds_where_they_differ(make_usable_run):
    runs = [make_usable_run(f"seed{seed}", seed=seed) for seed in (0, 1)]
    labels = [exhibit.label for exhibit in load_exhibits(runs, None, "auto", "auto")]
    assert labels == ["bare model", "MoPs, seed 0", "MoPs, seed 1"]


def test_runs_of_other_backbones_are_refused_before_any_is_loaded(
    make_usable_run, tiny_model, byte_tokenizer, tmp_path
):
    other = tiny_model("llama")
    with torch.no_grad():
        other.model.layers[3].mlp.up_proj.weight[0, 0] += 0.5
    for part in (other, byte_tokenizer):
        part.save_pretrained(tmp_path / "other-model")
    first = make_usable_run("first")
    others = [
        make_usable_run("weights", backbone=str(tmp_path / "other-model")),
        make_usable_run("quantised", quantization="nf4"),
    ]
    require_one_backbone([first, first])
    for run, word in zip(others, ("other-model", "nf4"), strict=True):
        with pytest.raises(InputError, match=rf"first was trained on .*{word}.*explore only runs of one backbone"):
            require_one_backbone([first, run])
