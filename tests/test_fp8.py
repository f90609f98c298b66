"""Float8 inference: what is refused, how rows are quantised, and features near the bfloat16 model's."""

import pytest
import torch
import torch.nn.functional as F
from implementations import DEVICES, INTERPRETED, NAMES

from siglip2_packed import PackedPatches, Siglip2PackedVisionModel, fp8
from siglip2_packed.fp8 import Float8Linear, quantize_fp8
from siglip2_packed.graphs import CUDAGraphs
from siglip2_packed.measure import relative_error
from siglip2_packed.ops.attention import VarlenAttention
from siglip2_packed.ops.float8 import QUANTIZE_ROWS, quantize
from siglip2_packed.ops.segments import Segments

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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("C", [1152, 4304])
@pytest.mark.parametrize("how", ["plain", "norm", "gelu", "add", "add norm"])
def test_quantised_in_one_pass(how, C, name, device):
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
    norm = (weight, bias, 1e-6) if "norm" in how else None
    rows, scale, total = QUANTIZE_ROWS.of(name)(x, update, norm, how == "gelu")
    assert rows.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32 and scale.shape == (len(x), 1)
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
    bound = 0.12 if name == "triton" and device == "cpu" else 0.04  # interpreted, float8 is truncated, not rounded
    assert relative_error(rows.float() * scale, exact) <= bound


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
def test_no_rows(name, device):
    x = torch.empty(0, 64, device=device)
    rows, scale, total = QUANTIZE_ROWS.of(name)(x)
    assert rows.shape == total.shape == (0, 64) and scale.shape == (0, 1) and rows.dtype == torch.float8_e4m3fn


@INTERPRETED
@pytest.mark.parametrize("name", NAMES)
def test_an_unscaled_product_is_the_linear_layer_once_added(name):
    quantize_rows = QUANTIZE_ROWS.of(name)
    linear = torch.nn.Linear(64, 48, dtype=torch.bfloat16)
    x, stream = torch.randn(5, 64) * torch.tensor([1e-3, 1.0, 30.0, 1.0, 1e3])[:, None], torch.randn(5, 48)
    rows, scales, _ = quantize_rows(x)
    float8 = Float8Linear(linear.weight, linear.bias)
    update = float8.unscaled(rows, scales)
    _, _, total = quantize_rows(stream, (update[0].float(), *update[1:3], update[3].float()))
    exact = stream + (rows.float() * scales) @ (float8.weight.float() * float8.scale) + float8.bias.float()
    assert relative_error(total, exact) <= 5e-3
    assert relative_error(float8.weight.float() * float8.scale, linear.weight.t()) <= 0.04


@INTERPRETED
def test_each_layer_is_quantised_for_its_own_width(checkpoint, monkeypatch):
    """Layers may differ, as pruned ones do."""
    encoder = Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny"), dtype=torch.bfloat16).encoder
    widths = [96, 128, 160, 48][: len(encoder.layers)]
    for block, width in zip(encoder.layers, widths):
        block.mlp.fc1, block.mlp.fc2 = torch.nn.Linear(64, width).bfloat16(), torch.nn.Linear(width, 64).bfloat16()
    asked = []
    monkeypatch.setattr(fp8, "quantize_rows", lambda x, F: asked.append(F) or QUANTIZE_ROWS.of("eager"))
    monkeypatch.setattr(fp8.Float8Linear, "forward", lambda self, *rows: scaled(*self.unscaled(*rows)))
    x, attention = torch.randn(12, 64).bfloat16(), VarlenAttention(Segments([5, 7]), "eager")
    with torch.no_grad():
        expected, _ = encoder(x, attention)
    out, _ = fp8.Float8Encoder(encoder.layers)(x, attention)
    assert asked == widths and relative_error(out, expected.double()) <= 0.1


def scaled(product, rows, columns, bias):
    return (product * rows * columns + bias).to(bias.dtype)


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
