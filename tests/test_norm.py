"""LayerNorm and the work around it, every implementation against float64 formulas; Triton's interpreted on CPU."""

import pytest
import torch
from implementations import BOUND, DEVICES, IN_DTYPES, NAMES, SHAPES, draw

import kernels_ref
from siglip2_packed.measure import relative_error
from siglip2_packed.ops import norm

pytestmark = pytest.mark.usefixtures("poisoned")


def functions(name):
    return [function.of(name) for function in norm.FUNCTIONS]


def leaf(x):
    return x.to(torch.float64, copy=True).requires_grad_()


def exact_norm(x, weight, bias, eps):
    return kernels_ref.ops.layer_norm(x.double(), weight.double(), bias.double(), eps)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "dtype"), IN_DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_layer_norm(name, dtype, shape, device):
    layer_norm, _, _ = functions(name)
    x, weight, bias = draw(device, dtype, shape, shape[1:], shape[1:])
    out, total = layer_norm(x, weight, bias, 1e-6)
    assert total is None and out.dtype == dtype
    assert relative_error(out, exact_norm(x, weight, bias, 1e-6)) <= BOUND[dtype]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "dtype"), IN_DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("placed", [False, True])
def test_layer_norm_with_biases_that_waited(name, dtype, shape, waits, placed, device):
    layer_norm, _, _ = functions(name)
    x, weight, bias, late = draw(device, dtype, shape, *[shape[1:]] * 3)
    precise = torch.promote_types(dtype, torch.float32)
    waiting = draw(device, precise, shape[1:])[0] if waits else None
    place = (torch.full_like(x, float("nan")), torch.full_like(late, float("nan"), dtype=torch.float32))
    out, total = layer_norm(x, weight, bias, 1e-3, waiting, late, *[place] * placed)
    assert name == "eager" or not placed or (out is place[0] and total is place[1])
    expected = late.double() + waiting if waits else late.double()
    assert total.dtype == precise and relative_error(total, expected) <= 1e-6
    assert out.dtype == dtype
    # torch rounds x + total to the dtype of x first
    bound = BOUND[dtype] * (4 if name == "eager" and precise != dtype else 1)
    assert relative_error(out, exact_norm(x + expected, weight, bias, 1e-3)) <= bound


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "dtype"), IN_DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_add_layer_norm(name, dtype, shape, device):
    _, add_layer_norm, _ = functions(name)
    x, update, weight, bias, shift = draw(device, dtype, shape, shape, *[shape[1:]] * 3)
    out, total = add_layer_norm(x, update, weight, bias, 1e-6, shift)
    assert out.dtype == total.dtype == dtype
    assert relative_error(total, x.double() + update + shift) <= BOUND[dtype]
    assert relative_error(out, exact_norm(x + update, weight, bias, 1e-6)) <= BOUND[dtype]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "dtype"), IN_DTYPES)
@pytest.mark.parametrize("with_update", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_layer_norm_backward(name, dtype, shape, with_update, device):
    _, add_layer_norm, layer_norm_backward_ = functions(name)
    grad, residual, x, update = draw(device, dtype, *[shape] * 4)
    weight, bias = draw(device, dtype, shape[1:], shape[1:])
    h, w, b = (leaf(y) for y in (x + update if with_update else x, weight, bias))
    out = exact_norm(h, w, b, 1e-6)
    dh, dw, db = torch.autograd.grad(out, (h, w, b), grad.double())
    dh = dh + residual
    expected = dh, out.detach(), dw, db, *((dh.sum(0), residual.double().sum(0)) if with_update else ())

    again = add_layer_norm(x, update, weight, bias, 1e-6, bias)[0]
    given = grad.clone(), residual, x, update.clone() if with_update else None, weight, bias, 1e-6
    in_place = layer_norm_backward_(*given, place=given[3])
    out, sums = layer_norm_backward_(grad, residual, x, update if with_update else None, weight, bias, 1e-6)
    assert torch.equal(in_place[0], out) and torch.equal(in_place[1], sums) and torch.equal(given[0], grad)
    if with_update:  # the forward's output once more: h is rounded as there, and summed in the same order
        assert (out != again).double().mean() <= (0 if name == "triton" and device == "cpu" else 0.02)
    if name == "triton" and with_update:
        assert in_place[0] is given[3]
    names = "dh", "out", "dweight", "dbias", *(("dh_sum", "residual_sum") if with_update else ())
    for what, result, ref in zip(names, (grad, out, *sums), expected, strict=True):
        assert result.dtype == dtype and relative_error(result, ref) <= 2 * BOUND[dtype], what


def results(name, x, update, residual, weight, bias, shift, waiting):
    """Of all functions, on rows and vectors as they lie."""
    layer_norm, add_layer_norm, layer_norm_backward_ = functions(name)
    yield layer_norm(x, weight, bias, 1e-6)[0]
    yield from layer_norm(x, weight, bias, 1e-6, waiting, shift)
    yield from add_layer_norm(x, update, weight, bias, 1e-6, shift)
    for some in (None, update):
        grad = x.clone(memory_format=torch.contiguous_format)
        yield from layer_norm_backward_(grad, residual, x, some, weight, bias, 1e-6)
        yield grad


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
def test_vectors_that_are_columns_of_something_else(name, device):
    *rows, vectors = draw(device, torch.float32, *[(5, 72)] * 3, (72, 4))
    strided = list(results(name, *rows, *vectors.unbind(1)))
    assert len(strided) == 11
    assert all(map(torch.equal, strided, results(name, *rows, *vectors.t().contiguous())))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("strided", ["x", "update", "residual"])
def test_rows_that_are_part_of_something_else(name, strided, device):
    wide, vectors = draw(device, torch.float32, (5, 3, 72), (4, 72))
    parts = dict(zip(("x", "update", "residual"), wide.unbind(1)))
    plain = {what: rows.contiguous() for what, rows in parts.items()}
    assert not parts[strided].is_contiguous()
    expected = results(name, **plain, **vectors_by_name(vectors))
    found = results(name, **(plain | {strided: parts[strided]}), **vectors_by_name(vectors))
    assert all(map(torch.equal, found, expected))


def vectors_by_name(vectors):
    return dict(zip(("weight", "bias", "shift", "waiting"), vectors))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
def test_no_rows(name, device):
    layer_norm, add_layer_norm, layer_norm_backward_ = functions(name)
    x, weight, bias = draw(device, torch.float32, (0, 72), (72,), (72,))
    assert layer_norm(x, weight, bias, 1e-6)[0].shape == (0, 72)
    for waiting, expected in ((None, bias), (weight, weight + bias)):
        out, total = layer_norm(x, weight, bias, 1e-6, waiting, bias)
        assert out.shape == (0, 72) and torch.equal(total, expected)
    assert all(y.shape == (0, 72) for y in add_layer_norm(x, x, weight, bias, 1e-6, bias))
    for update, sums in ((None, 2), (x, 4)):
        out, found = layer_norm_backward_(x.clone(), x, x, update, weight, bias, 1e-6)
        assert out.shape == (0, 72) and found.shape == (sums, 72) and (found == 0).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", [0, 5])
def test_biases_that_wait_are_left_as_they_are(name, rows, device):
    """One is a parameter, the other what the norm before gave, which whoever called it may still have."""
    layer_norm, _, _ = functions(name)
    x, weight, bias = draw(device, torch.float32, (rows, 72), (72,), (72,))
    kept = bias.clone()
    _, total = layer_norm(x, weight, bias, 1e-6, None, bias)
    _, more = layer_norm(x, weight, bias, 1e-6, total, bias)
    assert torch.equal(bias, kept) and torch.equal(total, kept) and torch.equal(more, kept + kept)
