"""Float8 inference: what is refused, how rows are quantised, and features near the bfloat16 model's."""

import pytest
import torch
import torch.nn.functional as F

from siglip2_packed import PackedPatches, Siglip2PackedVisionModel
from siglip2_packed.fp8 import Float8Linear, quantize, quantize_fp8
from siglip2_packed.graphs import CUDAGraphs
from siglip2_packed.measure import relative_error

INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled, not interpreted")
GRIDS = [(1, 13, 19), (1, 8, 32), (2, 3, 4), (1, 7, 1)]


def test_rows_keep_their_scale():
    x = torch.randn(5, 64) * torch.tensor([1e-6, 1e-3, 1.0, 1e3, 0.0])[:, None]
    rows, scale = quantize(x)
    assert rows.dtype == torch.float8_e4m3fn and scale.shape == (5, 1)
    assert relative_error(rows[:4].float() * scale[:4], x[:4]) <= 0.04
    for row, back in zip(x[:4], rows[:4].float() * scale[:4]):
        assert relative_error(back, row) <= 0.04
    assert (rows[4].float() == 0).all()


def test_what_cannot_be_quantised_says_why(checkpoint):
    with pytest.raises(ValueError, match="CUDA"):
        quantize_fp8(Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny")))
    with pytest.raises(ValueError, match="multiples of 16"):
        Float8Linear(torch.randn(8, 16), torch.randn(8))


@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=INTERPRETED), pytest.param("cuda", marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("C", [1152, 4304])
@pytest.mark.parametrize("how", ["plain", "norm", "gelu", "add", "add norm"])
def test_quantised_in_one_pass(how, C, device):
    from siglip2_packed.ops.triton.float8 import quantize_rows

    dtype, rows = (torch.bfloat16, 37) if device == "cuda" else (torch.float32, 7)
    generator = torch.Generator().manual_seed(0)

    def random(*shape, dtype=dtype):
        return torch.randn(*shape, generator=generator, device="cpu").to(device, dtype)

    x, product = random(2, rows, C)
    weight, bias, shift = random(3, C)
    for row, peak in enumerate((0, 255, 256, 1023, 1024, C - 1)):
        x[row, peak] = 50.0
        weight[peak] = 3.0
    if how in ("plain", "gelu"):
        x[-1] = 0
    row_scale, column_scale = (random(*shape, dtype=torch.float32).abs() for shape in ((rows, 1), (1, C)))
    update = (product, row_scale, column_scale, shift) if "add" in how else None
    rows, scale, total = quantize_rows(x, update, (weight, bias, 1e-6) if "norm" in how else None, how == "gelu")
    exact = x.double()
    if update:
        exact += product.double() * row_scale * column_scale + shift
    assert total.dtype == x.dtype and relative_error(total, exact) <= (2e-3 if update else 0)
    exact = total.double()
    if "norm" in how:
        exact = F.layer_norm(exact, (C,), weight.double(), bias.double(), 1e-6)
    if how == "gelu":
        exact = F.gelu(exact, approximate="tanh")
    largest = exact.abs().amax(1, keepdim=True).clamp_min(1e-12)
    assert ((scale * 448 - largest).abs() <= (1e-5 if device == "cuda" else 2e-6) * largest).all()
    bound = 0.04 if device == "cuda" else 0.12  # interpreted, float8 is truncated, not rounded
    assert relative_error(rows.float() * scale, exact) <= bound


@INTERPRETED
def test_an_unscaled_product_is_the_linear_layer_once_added():
    from siglip2_packed.ops.triton.float8 import quantize_rows

    linear = torch.nn.Linear(64, 48, dtype=torch.bfloat16)
    x, stream = torch.randn(5, 64) * torch.tensor([1e-3, 1.0, 30.0, 1.0, 1e3])[:, None], torch.randn(5, 48)
    rows, scales, _ = quantize_rows(x)
    float8 = Float8Linear(linear.weight, linear.bias)
    update = float8.unscaled(rows, scales)
    _, _, total = quantize_rows(stream, (update[0].float(), *update[1:3], update[3].float()))
    exact = stream + (rows.float() * scales) @ (float8.weight.float() * float8.scale) + float8.bias.float()
    assert relative_error(total, exact) <= 5e-3
    assert relative_error(float8.weight.float() * float8.scale, linear.weight.t()) <= 0.04


@pytest.mark.gpu
def test_features_are_near_the_bfloat16_models(checkpoint, patches):
    model = Siglip2PackedVisionModel.from_pretrained(checkpoint("base"), dtype=torch.bfloat16).to("cuda")
    packed = PackedPatches(patches(GRIDS, patch_dim=768), GRIDS).to("cuda")
    with torch.no_grad():
        expected = model(**packed, output_hidden_states=True)
        out = quantize_fp8(model)(**packed, output_hidden_states=True)
    assert len(out.hidden_states) == len(expected.hidden_states)
    for x, ref in ((out.last_hidden_state, expected.last_hidden_state), (out.pooler_output, expected.pooler_output)):
        assert F.cosine_similarity(x.double(), ref.double(), dim=-1).min() > 0.99
    replayed = CUDAGraphs(model, [len(packed["pixel_values"])])(**packed)
    assert relative_error(replayed.last_hidden_state, out.last_hidden_state.double()) <= 2e-2
    empty = model(**PackedPatches(patches([], patch_dim=768), []).to("cuda"))
    assert empty.last_hidden_state.shape == (0, 768)
