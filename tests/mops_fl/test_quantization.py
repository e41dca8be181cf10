import bitsandbytes
import pytest
import torch
from torch import nn

from mops_fl.backbone import Backbone
from mops_fl.config import BackboneConfig
from mops_fl.errors import InputError
from mops_fl.quantization import Int8Linear, Nf4Linear, quantize_linears, quantize_rows

IN, OUT, ROWS = 64, 48, 9
CASES = [(kind, bias) for kind in ("int8", "nf4") for bias in (True, False)]


def dense(bias=True, dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(IN, OUT, bias=bias).to(dtype).requires_grad_(False)


def activations(dtype=torch.float32, outliers=(3, 17)):
    x = torch.randn(ROWS, IN, generator=torch.Generator().manual_seed(1))
    x[2, list(outliers)] = torch.tensor([11.0, -30.0])[: len(outliers)]
    return x.to(dtype).requires_grad_()


def theirs(layer, kind):
    """bitsandbytes' own module, as transformers sets it up."""
    has_bias = layer.bias is not None
    if kind == "int8":
        module = bitsandbytes.nn.Linear8bitLt(IN, OUT, bias=has_bias, has_fp16_weights=False, threshold=6.0)
        module.weight = bitsandbytes.nn.Int8Params(layer.weight.clone(), requires_grad=False)
    else:
        module = bitsandbytes.nn.Linear4bit(IN, OUT, bias=has_bias, quant_type="nf4", compute_dtype=layer.weight.dtype)
        module.weight = bitsandbytes.nn.Params4bit(
            layer.weight.clone(), requires_grad=False, quant_type="nf4", compress_statistics=False
        )
    module.weight._quantize("cpu")
    module.bias = layer.bias
    return module.train(kind == "nf4")  # its evaluation mode on a CPU has another kernel, without gradients


def ours(layer, kind):
    return Int8Linear(layer) if kind == "int8" else Nf4Linear(layer)


def output_and_gradient(module, x):
    output = module(x)
    output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output.dtype))
    gradient, x.grad = x.grad, None
    return output.detach(), gradient


def distance(found, expected):
    return ((found - expected).float().norm() / expected.float().norm()).item()


@pytest.mark.parametrize(("kind", "bias"), CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-5), (torch.bfloat16, 2e-3)])
@pytest.mark.parametrize("outliers", [(), (3, 17)])
def test_output_and_gradient_are_those_of_bitsandbytes(kind, bias, dtype, tolerance, outliers):
    layer, x = dense(bias, dtype), activations(dtype, outliers)
    output, gradient = output_and_gradient(ours(layer, kind), x)
    expected, expected_gradient = output_and_gradient(theirs(layer, kind), x)
    assert output.dtype == gradient.dtype == dtype
    assert distance(output, expected) < tolerance
    assert distance(gradient, expected_gradient) < tolerance


@pytest.mark.parametrize(("kind", "least", "most"), [("int8", 1e-3, 2e-2), ("nf4", 5e-2, 0.15)])
def test_output_is_the_dense_one_up_to_the_rounding(kind, least, most):
    layer, x = dense(), activations()
    assert least < distance(ours(layer, kind)(x), layer(x)) < most


def test_row_is_rounded_to_127_steps_of_its_largest_magnitude():
    x = torch.tensor([[2.0, -1.0, 0.5, 0.0], [0.1, 0.0, 0.0, -0.05]])
    rounded, absmax, outliers = quantize_rows(x)
    assert rounded.tolist() == [[127, -64, 32, 0], [127, 0, 0, -64]]
    torch.testing.assert_close(absmax, torch.tensor([2.0, 0.1]), rtol=1e-3, atol=0)
    assert outliers.tolist() == []


def test_column_with_an_outlier_is_left_out_of_every_row():
    rounded, absmax, outliers = quantize_rows(torch.tensor([[1.0, 6.0], [0.5, 0.25]]))
    assert rounded.tolist() == [[127, 0], [127, 0]]
    assert absmax.tolist() == [1.0, 0.5]  # the outlier column counts where its value is none
    assert outliers.tolist() == [1]


def test_column_with_an_outlier_is_multiplied_in_full_precision():
    layer = dense(bias=False)
    x = torch.zeros(2, IN)
    x[0, 5] = 100.03  # rounded to 8 bit beside the others it would be off by up to 0.4
    x[:, 6] = 1.0
    output = Int8Linear(layer)(x)
    scale = layer.weight.abs().amax(1, keepdim=True) / 127
    expected = x @ ((layer.weight / scale).round() * scale).T
    assert distance(output, expected) < 1e-3


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_rows_of_zeros_and_weights_of_zeros_give_zeros(kind):
    layer = dense(bias=False)
    layer.weight[7] = 0
    x = activations().detach()
    x[4] = 0
    output = ours(layer, kind)(x)
    assert output.isfinite().all()
    assert (output[4] == 0).all()
    assert (output[:, 7] == 0).all()


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_pruned_weights_stay_zero(kind):
    layer = dense(bias=False)
    layer.weight[torch.rand(OUT, IN, generator=torch.Generator().manual_seed(3)) < 0.75] = 0
    seen = ours(layer, kind)(torch.eye(IN)).T
    assert (seen[layer.weight == 0] == 0).all()
    assert (seen != 0).any()


@pytest.mark.parametrize(("kind", "bytes_a_weight"), [("int8", 1.0), ("nf4", 0.5)])
def test_weights_are_kept_quantised(kind, bytes_a_weight):
    module = ours(dense(), kind)
    assert module.weight.nbytes == bytes_a_weight * IN * OUT
    assert not any(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_leading_dimensions_are_kept(kind):
    module, x = ours(dense(), kind), activations().detach()
    torch.testing.assert_close(module(x.reshape(3, 3, IN)), module(x).reshape(3, 3, OUT))


def test_every_matrix_of_the_decoder_layers_and_no_other_is_replaced(tiny_model):
    model = tiny_model("qwen2")
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    quantize_linears(model.model.layers, "int8")
    replaced = {name for name, module in model.named_modules() if isinstance(module, Int8Linear)}
    assert linears - replaced == {"lm_head"}
    assert len(replaced) == 4 * 7
    assert type(model.lm_head) is nn.Linear


@pytest.mark.parametrize(("kind", "module"), [("int8", Int8Linear), ("nf4", Nf4Linear)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_backbone_is_loaded_quantised(kind, module, dtype, tiny_model_folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    configs = [
        BackboneConfig(str(tiny_model_folder), "none", quantization, dtype, "backbone")
        for quantization in ("none", kind)
    ]
    plain, quantized = map(Backbone.load, configs)
    assert type(quantized.model.model.layers[3].mlp.down_proj) is module
    assert quantized.dtype == plain.dtype
    ids = torch.arange(40)
    before, found = (model.run_layers(model.embed(ids), [25, 15], 0, 4) for model in (plain, quantized))
    quantize_linears(plain.model.model.layers, kind)
    assert torch.equal(found, plain.run_layers(plain.embed(ids), [25, 15], 0, 4))
    assert distance(found, before) > 1e-3


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_model_with_experts_is_refused_since_most_of_it_would_stay_dense(kind, byte_tokenizer, tiny_model, tmp_path):
    tiny_model("qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16).save_pretrained(tmp_path)
    byte_tokenizer.save_pretrained(tmp_path)
    assert Backbone.load(BackboneConfig(str(tmp_path), "none", "none", "float32", "backbone"), "cpu").num_layers == 4
    with pytest.raises(InputError, match=f"Qwen3MoeForCausalLM has experts.* quantization {kind} would leave"):
        Backbone.load(BackboneConfig(str(tmp_path), "none", kind, "float32", "backbone"), "cpu")


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_gradient_reaches_what_stands_before_quantised_layers(kind, tiny_backbone):
    quantize_linears(tiny_backbone.model.model.layers, kind)
    hidden = torch.randn(12, 32, generator=torch.Generator().manual_seed(4), requires_grad=True)
    tiny_backbone.run_layers(hidden, [12], 0, 4).square().sum().backward()
    assert (hidden.grad.norm(dim=1) > 1e-3).all()
    assert not any(parameter.requires_grad for parameter in tiny_backbone.model.parameters())


def test_rows_side_by_side_change_a_row_by_no_more_than_the_rounding(tiny_backbone):
    """Outlier columns are chosen over all rows of a call: a row depends on its neighbours, by a rounding."""
    quantize_linears(tiny_backbone.model.model.layers, "int8")
    hidden = torch.randn(20, 32, generator=torch.Generator().manual_seed(5))
    hidden[15, 3] = 40.0
    together = tiny_backbone.run_layers(hidden, [12, 8], 0, 4)[:12]
    alone = tiny_backbone.run_layers(hidden[:12], [12], 0, 4)
    assert distance(together, alone) < 0.03
