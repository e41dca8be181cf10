"""Generation behind a cache, against the packed forward pass that training and evaluation use, token for token."""

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from mops_fl.adapter_folder import AdapterDescription, SavedAdapter
from mops_fl.backbone import Backbone
from mops_fl.config import BackboneConfig
from mops_fl.encoding import EncodedRow
from mops_fl.errors import InputError
from mops_fl.mops_model import MopsModel
from mops_fl.payload import INPUT_PROMPTS
from mops_fl.routing import Neighbours
from mops_fl.weights import initial_weights

NUM_NEW = 12
LENGTHS = (9, 4, 6)
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 5},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    "qwen3": {},
}
READINGS = [
    pytest.param({}, id="attention"),
    pytest.param({"gating": "embedding"}, id="embedding"),
    pytest.param({"pooling": "all"}, id="pooling-all"),
    pytest.param({"inject_layer": 0}, id="layer-0"),
    pytest.param({"gate_temperature": 4.0}, id="temperature"),
    pytest.param({"routing": "nearest"}, id="nearest"),
    pytest.param({"method": "fedprompt"}, id="fedprompt"),
    pytest.param({"method": "lora"}, id="lora"),
    pytest.param({"method": "ia3"}, id="ia3"),
]
# A packed row has the first token of the response behind its question, which counts where all positions are pooled.
NOT_POOLING_ALL = pytest.mark.parametrize("changes", [case for case in READINGS if case.id != "pooling-all"])


@pytest.fixture
def make_model(tiny_model, byte_tokenizer, adapter_config, data_config, make_state):
    """``make_model("mistral", num_input_prompts=4, gating="embedding")``: with random arrays that matter."""

    def make(family="llama", num_input_prompts=6, **changes):
        backbone = Backbone(tiny_model(family, **FAMILIES[family]), byte_tokenizer)
        config = adapter_config(**changes)
        generator = torch.Generator().manual_seed(1)
        if config.method in ("lora", "ia3"):
            num_input_prompts = 0
            state = {
                name: array + 0.3 * torch.randn(array.shape, generator=generator)
                for name, array in initial_weights(backbone, config, generator).items()
            }
        else:
            state = make_state(config)
        state[INPUT_PROMPTS] = torch.randn(num_input_prompts, 32, generator=generator)
        if config.routing == "nearest":
            state = {name: array for name, array in state.items() if not name.startswith("gate.")}
            keys, experts = torch.randn(5, 32, generator=generator), torch.tensor([0, 1, 2, 0, 1])
            state |= Neighbours.of(keys, experts, config.num_experts).to_frozen()
        description = AdapterDescription(
            config,
            BackboneConfig("tiny", "none", "none", "float32", "backbone"),
            "",
            data_config(),
            ("a", "b", "c"),
            (),
        )
        model = MopsModel(backbone, SavedAdapter(description, {name: a.numpy() for name, a in state.items()}, ""))
        model.generation_config.eos_token_id = None  # a random model ends anywhere
        return model

    return make


def questions(lengths=LENGTHS):
    """Left-padded token ids and mask of random rows; padding is id 7, which must not matter."""
    rows = [torch.randint(256, (n,), generator=torch.Generator().manual_seed(n)) for n in lengths]
    width = max(lengths)
    ids = torch.stack([torch.cat([torch.full((width - len(row),), 7), row]) for row in rows])
    mask = torch.stack([torch.arange(width) >= width - len(row) for row in rows]).long()
    return rows, {"input_ids": ids, "attention_mask": mask}


def packed_logits(model, token_ids, prompt_length, monkeypatch):
    """Logits behind each token from `prompt_length - 1` on, out of the losses' own forward pass."""
    seen = []

    def keep_logits(hidden, targets):
        seen.append(model.backbone.logits(hidden))
        return torch.zeros(len(targets))

    row = EncodedRow(0, torch.cat([token_ids, token_ids[:1]]), prompt_length, prompt_length, 0, False)
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(model.backbone, "token_nll", keep_logits)
        model.adaptable.losses(model.adapter, [row])
    return seen[0]


def greedy_by_losses(model, question, monkeypatch):
    """The slow way: the whole forward pass again for every token."""
    tokens = question
    for _ in range(NUM_NEW):
        logits = packed_logits(model, tokens, len(question), monkeypatch)[-1]
        tokens = torch.cat([tokens, logits.argmax()[None]])
    return tokens[len(question) :]


def new_tokens(model, inputs, **options):
    output = model.generate(**inputs, max_new_tokens=NUM_NEW, **options)
    return output[:, inputs["input_ids"].shape[1] :]


@NOT_POOLING_ALL
def test_padded_forward_gives_the_packed_logits(changes, make_model, monkeypatch):
    model = make_model(**changes)
    rows, inputs = questions()
    with torch.no_grad():
        logits = model(**inputs, prompt_length=inputs["input_ids"].shape[1]).logits
    for row, found in zip(rows, logits, strict=True):
        expected = packed_logits(model, row, len(row), monkeypatch)[-1]
        torch.testing.assert_close(found[-1], expected, rtol=0, atol=1e-4)
    assert logits.shape == (3, 9, 300)


@pytest.mark.parametrize("changes", READINGS)
def test_forward_goes_on_behind_its_cache_one_or_several_tokens_at_a_time(changes, make_model):
    model = make_model("mistral", 4, **changes)
    ids = questions((9,))[1]["input_ids"]
    with torch.no_grad():
        whole = model(ids, prompt_length=5).logits
        first = model(ids[:, :5])
        second = model(ids[:, 5:6], past_key_values=first.past_key_values)
        third = model(ids[:, 6:], past_key_values=second.past_key_values)
    parts = torch.cat([part.logits for part in (first, second, third)], 1)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@NOT_POOLING_ALL
def test_greedy_batch_is_the_slow_way_row_by_row_token_for_token(family, changes, make_model, monkeypatch):
    model = make_model(family, **changes)
    rows, inputs = questions()
    found = new_tokens(model, inputs, do_sample=False)
    for row, tokens in zip(rows, found, strict=True):
        assert tokens.tolist() == greedy_by_losses(model, row, monkeypatch).tolist()


@pytest.mark.parametrize("num_input_prompts", [0, 4, 6])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_input_prompts_may_be_fewer_than_prompts_or_none(family, num_input_prompts, make_model, monkeypatch):
    model = make_model(family, num_input_prompts)
    rows, inputs = questions()
    for row, tokens in zip(rows, new_tokens(model, inputs, do_sample=False), strict=True):
        assert tokens.tolist() == greedy_by_losses(model, row, monkeypatch).tolist()


BEAMS = {"num_beams": 4, "num_return_sequences": 2, "do_sample": False}
SAMPLING = {"do_sample": True, "temperature": 0.8, "top_p": 0.95}


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        # Beams are put in another order in the cache and taken several times: more than a greedy search asks of it.
        *[pytest.param(*case.values, BEAMS, id=f"beams-{case.id}") for case in READINGS],
        pytest.param({}, SAMPLING, id="sampling"),
    ],
)
def test_with_cache_as_without(changes, options, make_model):
    model = make_model(**changes)
    _, inputs = questions()
    outputs = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        outputs.append(new_tokens(model, inputs, use_cache=use_cache, **options))
    assert outputs[0].tolist() == outputs[1].tolist()


def test_beams_of_a_batch_are_those_of_each_row(make_model):
    model = make_model()
    rows, inputs = questions()
    options = {"num_beams": 3, "do_sample": False}
    batch = new_tokens(model, inputs, **options)
    single = [new_tokens(model, {"input_ids": row[None]}, **options)[0].tolist() for row in rows]
    assert batch.tolist() == single
    greedy = new_tokens(model, inputs, do_sample=False)
    assert batch.tolist() != greedy.tolist()


def test_gate_is_the_one_of_the_losses_and_matters(make_model, monkeypatch):
    model = make_model()
    rows, inputs = questions()
    scores = model.gate(**inputs)
    expected = torch.cat(
        [model.adaptable.losses(model.adapter, [EncodedRow(0, row, len(row), 1, 0, False)]).scores for row in rows]
    )
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)
    assert scores.std(0).max() > 0.01
    before = new_tokens(model, inputs, do_sample=False)
    with torch.no_grad():
        model.adapter.gate.b2 += torch.tensor([5.0, -5.0, 0.0])
    assert new_tokens(model, inputs, do_sample=False).tolist() != before.tolist()


def test_gate_is_computed_once_for_a_sequence(make_model, monkeypatch):
    model = make_model()
    calls, scores = [], model.adapter.scores
    monkeypatch.setattr(model.adapter, "scores", lambda *given: calls.append(len(given[0])) or scores(*given))
    new_tokens(model, questions()[1])
    assert calls == [3]


def test_nothing_is_left_on_the_backbone(make_model, tiny_model):
    model = make_model("qwen2")
    untouched = tiny_model("qwen2", **FAMILIES["qwen2"])
    _, inputs = questions()
    first = new_tokens(model, inputs, do_sample=False)
    ids = inputs["input_ids"][:1]
    with torch.no_grad():
        hidden = model.backbone.run_layers(model.backbone.embed(ids[0]), [9], 0, 4)
        torch.testing.assert_close(model.backbone.logits(hidden), untouched(ids).logits[0], rtol=0, atol=1e-5)
    assert new_tokens(model, inputs, do_sample=False).tolist() == first.tolist()
    assert not [name for name, module in model.backbone.model.named_modules() if module._forward_hooks]


def test_stopping(make_model):
    model = make_model()
    _, inputs = questions((9,))
    free = new_tokens(model, inputs, do_sample=False)[0].tolist()

    class AfterThree(StoppingCriteria):
        def __call__(self, input_ids, scores, **_):
            return torch.tensor([input_ids.shape[1] >= 9 + 3] * len(input_ids))

    criteria = StoppingCriteriaList([AfterThree()])
    stopped = model.generate(**inputs, max_new_tokens=NUM_NEW, do_sample=False, stopping_criteria=criteria)
    assert stopped[0, 9:].tolist() == free[:3]
    config = GenerationConfig(max_new_tokens=NUM_NEW, do_sample=False, eos_token_id=free[4])
    ended = model.generate(**inputs, generation_config=config)[0, 9:].tolist()
    assert ended == free[: free.index(free[4]) + 1]
    place, text = next(
        (i, text) for i, token in enumerate(free) if (text := model.tokenizer.decode([token])).isascii() and text
    )
    output = model.generate(**inputs, max_new_tokens=NUM_NEW, do_sample=False, stop_strings=[text])
    assert output[0, 9:].tolist() == free[: place + 1]


def test_streaming(make_model):
    model = make_model()
    _, inputs = questions((9,))

    class Collector(BaseStreamer):
        def __init__(self):
            self.pieces = []

        def put(self, value):
            self.pieces += value.flatten().tolist()

        def end(self):
            self.pieces.append("end")

    streamer = Collector()
    output = model.generate(**inputs, max_new_tokens=5, do_sample=False, streamer=streamer)
    assert streamer.pieces == [*output[0].tolist(), "end"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"cache_implementation": "static"}, "its own cache"),
        ({"generation_config": GenerationConfig(cache_implementation="static")}, "its own cache"),
        ({"past_key_values": DynamicCache()}, "its own cache"),
        ({"prefill_chunk_size": 4}, "input whole"),
        ({"generation_config": GenerationConfig(prefill_chunk_size=4)}, "input whole"),
    ],
)
def test_what_the_gate_could_not_follow_is_refused(options, reason, make_model):
    with pytest.raises(InputError, match=reason):
        make_model().generate(**questions()[1], max_new_tokens=2, **options)


def test_adapters_share_a_backbone(make_model):
    """LoRA and IA3 wrap matrices of the one backbone, each only where it works itself."""
    _, inputs = questions()
    alone = {method: make_model(method=method) for method in ("mops", "lora", "ia3")}
    expected = {method: new_tokens(model, inputs, do_sample=False).tolist() for method, model in alone.items()}
    backbone = alone["mops"].backbone
    together = {method: MopsModel(backbone, model._saved) for method, model in alone.items()}
    assert len({str(tokens) for tokens in expected.values()}) == 3
    for method, model in together.items():
        assert new_tokens(model, inputs, do_sample=False).tolist() == expected[method]
