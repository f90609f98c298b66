"""The LayerNorm and GELU kernels against float64 formulas; interpreted on CPU, compiled on CUDA."""

import pytest
import torch

import kernels_ref
from siglip2_packed.measure import relative_error
from siglip2_packed.ops import columns as columns_op
from siglip2_packed.ops import gelu as gelu_op
from siglip2_packed.ops import layer_norm as norm_op
from siglip2_packed.ops.positions import places, resize_positions
from siglip2_packed.ops.triton import columns as column_kernels
from siglip2_packed.ops.triton import gelu as gelu_kernels
from siglip2_packed.ops.triton import layer_norm as norm_kernels
from siglip2_packed.ops.triton.positions import add_positions

INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled, not interpreted")
DEVICES = [pytest.param("cpu", marks=INTERPRETED), pytest.param("cuda", marks=pytest.mark.gpu)]
SHAPES = [(1, 8), (5, 64), (13, 72), (3, 1152), (37, 200)]
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
BOUND = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """Fresh buffers hold NaN, so that what a kernel leaves unwritten shows."""

    def poison(make):
        def filled(*args, **kwargs):
            out = make(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        return filled

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))


def draw(device, dtype, *shapes):
    generator = torch.Generator().manual_seed(0)
    return [(3 * torch.randn(shape, generator=generator, device="cpu") + 1).to(device, dtype) for shape in shapes]


def exact_norm(x, weight, bias, eps):
    return kernels_ref.ops.layer_norm(x.double(), weight.double(), bias.double(), eps)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("op", [norm_op, norm_kernels])
def test_layer_norm(op, shape, dtype, device):
    x, update, weight, bias, shift = draw(device, dtype, shape, shape, shape[1:], shape[1:], shape[1:])
    bound = BOUND[dtype]
    out = op.layer_norm(x, weight, bias, 1e-6)
    assert relative_error(out if op is norm_kernels else out[0], exact_norm(x, weight, bias, 1e-6)) <= bound
    late_norm = norm_kernels.late_layer_norm if op is norm_kernels else op.layer_norm
    (carry,) = draw(device, torch.float32, shape[1:])
    for waiting in (None, carry):
        out, total = late_norm(x, weight, bias, 1e-3, waiting, shift)
        expected = shift.double() if waiting is None else shift.double() + waiting
        assert total.dtype == torch.float32 and relative_error(total, expected) <= 1e-6
        if op is norm_kernels or dtype == torch.float32:  # torch rounds x + total to the dtype of x first
            assert relative_error(out, exact_norm(x + expected, weight, bias, 1e-3)) <= bound
    out, total = op.add_layer_norm(x, update, weight, bias, 1e-6, shift)
    assert relative_error(total, x.double() + update + shift) <= bound
    assert relative_error(out, exact_norm(x + update, weight, bias, 1e-6)) <= bound


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_update", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("op", [norm_op, norm_kernels])
def test_layer_norm_backward(op, shape, with_update, dtype, device):
    grad, residual, x, update = draw(device, dtype, *[shape] * 4)
    weight, bias = draw(device, dtype, shape[1:], shape[1:])
    h = (x + update if with_update else x).double().requires_grad_()
    w, b = weight.double().requires_grad_(), bias.double().requires_grad_()
    out = exact_norm(h, w, b, 1e-6)
    dh, dw, db = torch.autograd.grad(out, (h, w, b), grad.double())
    dh = dh + residual
    expected = dh, out.detach(), dw, db, *((dh.sum(0), residual.double().sum(0)) if with_update else ())
    again = op.add_layer_norm(x, update, weight, bias, 1e-6, bias)[0]
    given = grad.clone(), residual, x, update.clone() if with_update else None, weight, bias, 1e-6
    in_place = op.layer_norm_backward_(*given, place=given[3])
    out, sums = op.layer_norm_backward_(grad, residual, x, update if with_update else None, weight, bias, 1e-6)
    assert torch.equal(in_place[0], out) and torch.equal(in_place[1], sums) and torch.equal(given[0], grad)
    if with_update:  # the forward's output once more: h is rounded as there, and summed in the same order
        assert (out != again).double().mean() <= (0 if op is norm_kernels and device == "cpu" else 0.02)
    if op is norm_kernels and with_update:
        assert in_place[0] is given[3]
    names = "dh", "out", "dweight", "dbias", *(("dh_sum", "residual_sum") if with_update else ())
    for name, result, ref in zip(names, (grad, out, *sums), expected, strict=True):
        assert result.dtype == dtype and relative_error(result, ref) <= 2 * BOUND[dtype], name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (70, 1000)])
@pytest.mark.parametrize("op", [gelu_op, gelu_kernels])
def test_gelu_backward(op, shape, dtype, device):
    grad, x = draw(device, dtype, shape, shape)
    exact = x.double().requires_grad_()
    out = kernels_ref.ops.gelu_tanh(exact)
    (dx,) = torch.autograd.grad(out, exact, grad.double())
    for active in (torch.empty_like(x), x):
        dx_, kept = grad.clone(), x.clone()
        sums = op.gelu_backward_(dx_, x, active)
        assert active is x or torch.equal(x, kept)
        for result, ref in ((active, out.detach()), (sums, dx.sum(0)), (dx_, dx)):
            assert result.dtype == dtype and relative_error(result, ref) <= 2 * BOUND[dtype]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (70, 1000), (300, 130)])
def test_columns(shape, dtype, device):
    (x,) = draw(device, dtype, shape)
    sums = column_kernels.column_sums(x)
    assert sums.dtype == dtype and relative_error(sums, x.double().sum(0)) <= BOUND[dtype]
    out = column_kernels.transposed(x)
    assert out.is_contiguous() and torch.equal(out, x.t())
    wide = torch.cat((x, x), 1)
    assert torch.equal(column_kernels.column_sums(wide[:, : shape[1]]), sums)
    assert torch.equal(column_kernels.transposed(wide[:, : shape[1]]), out)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 37, 300])
@pytest.mark.parametrize("few", [301, 0])
def test_gradients_of_weights_and_biases(rows, few, dtype, device, monkeypatch):
    """Few rows and many, by other kernels."""
    monkeypatch.setattr(columns_op, "FEW_ROWS", few)
    a, b = draw(device, dtype, (rows, 200), (rows, 72))
    product, sums = columns_op.product_over_rows(a, b), columns_op.column_sums(a)
    assert product.shape == (200, 72) and product.is_contiguous() and product.dtype == sums.dtype == dtype
    for result, exact in ((product, a.double().t() @ b.double()), (sums, a.double().sum(0))):
        assert (result - exact).norm() <= BOUND[dtype] * exact.norm()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("groups", [1, 128, 129, 300])
def test_fold_adds_any_number_of_partial_sums(groups, device):
    (sums,) = draw(device, torch.float32, (groups, 33))
    assert relative_error(column_kernels.fold(sums, torch.float32), sums.double().sum(0)) <= BOUND[torch.float32]


@pytest.mark.parametrize("device", DEVICES)
def test_rows_wider_than_the_device_has_programs_for(device):
    x, grad = draw(device, torch.float32, (20, 5000), (20, 5000))
    assert relative_error(column_kernels.column_sums(x), x.double().sum(0)) <= BOUND[torch.float32]
    sums = gelu_kernels.gelu_backward_(grad, x, x)
    assert relative_error(sums, grad.double().sum(0)) <= BOUND[torch.float32]


@pytest.mark.parametrize("device", DEVICES)
def test_strided_weights(device):
    """Vectors of the norm and biases that are columns of something else."""
    x, update, vectors = draw(device, torch.float32, (5, 72), (5, 72), (72, 4))

    def run(weight, bias, shift, carry):
        yield norm_kernels.layer_norm(x, weight, bias, 1e-6)
        yield from norm_kernels.late_layer_norm(x, weight, bias, 1e-6, carry, shift)
        yield from norm_kernels.add_layer_norm(x, update, weight, bias, 1e-6, shift)
        yield from norm_kernels.layer_norm_backward_(x.clone(), x, x, update, weight, bias, 1e-6)

    for strided, plain in zip(run(*vectors.unbind(1)), run(*vectors.t().contiguous()), strict=True):
        assert torch.equal(strided, plain)


def test_a_compiled_kernel_is_looked_for_once(monkeypatch):
    """For each device, dtypes, alignment and constexprs; misaligned tensors never get an aligned kernel."""
    from siglip2_packed.ops.triton import arguments

    class Kernel:
        def warmup(self, *args, grid, **options):
            looked.append(args)
            return len(looked)

    looked, ran, kernels = [], [], (Kernel(), Kernel())
    monkeypatch.setattr(arguments, "INTERPRETED", False)
    monkeypatch.setattr(arguments, "_compiled", {})
    monkeypatch.setattr(arguments, "run_compiled", lambda compiled, grid, args: ran.append(compiled))
    x = torch.zeros(9)
    for kernel, tensors, constexprs in [
        (kernels[0], (x, x), (8, True)),
        (kernels[0], (x[4:], x), (8, True)),  # 16 bytes on: the same
        (kernels[0], (x, x.half()), (8, True)),
        (kernels[0], (x, x), (8, False)),
        (kernels[1], (x, x), (8, True)),
        (kernels[0], (x, x[1:]), (8, True)),  # misaligned
        (kernels[0], (x, x[1:]), (8, True)),
        (kernels[0], (x, x), (8, True)),
    ]:
        arguments.launch(kernel, (1, 1, 1), tensors, (5,), constexprs, num_warps=1)
    assert ran == [1, 1, 2, 3, 4, 5, 6, 1]
    x = torch.zeros(9, dtype=torch.int8)
    arguments.launch(kernels[0], (1, 1, 1), (x[1:],), (5,), (8,), num_warps=1)
    arguments.launch(kernels[0], (1, 1, 1), (x,), (5,), (8,), num_warps=1)
    assert ran[8:] == [7, 8]  # nor is theirs remembered for aligned ones
    for options in ({"num_warps": 1}, {"num_warps": 1, "num_stages": 2}, {"num_warps": 1, "num_stages": 3}) * 2:
        arguments.launch(kernels[0], (1, 1, 1), (x,), (5,), (9,), **options)
    assert ran[10:] == [9, 10, 11] * 2


@pytest.mark.parametrize("device", DEVICES)
def test_gelu_is_finite_far_from_zero(device):
    x = torch.tensor([[-6e4, -300.0, -20.0, 0.0, 20.0, 300.0, 6e4, 1.0]], device=device)
    dx, out = torch.ones_like(x), torch.empty_like(x)
    gelu_kernels.gelu_backward_(dx, x, out)
    assert torch.allclose(out, torch.nn.functional.gelu(x, approximate="tanh"), atol=1e-6)
    assert dx[0, :3].abs().max() == 0 and (dx[0, 4:7] == 1).all()


@pytest.mark.parametrize("device", DEVICES)
def test_no_rows_and_strided_rows(device):
    x, weight, bias = draw(device, torch.float32, (0, 72), (72,), (72,))
    assert norm_kernels.layer_norm(x, weight, bias, 1e-6).shape == (0, 72)
    out, total = norm_kernels.late_layer_norm(x, weight, bias, 1e-6, weight, bias)
    assert out.shape == (0, 72) and torch.equal(total, weight + bias)
    assert (norm_kernels.layer_norm_backward_(x, x, x, None, weight, bias, 1e-6)[1] == 0).all()
    assert (gelu_kernels.gelu_backward_(x, x, x) == 0).all()
    assert (column_kernels.column_sums(x) == 0).all() and column_kernels.transposed(x).shape == (72, 0)

    (wide,) = draw(device, torch.float32, (5, 3, 72))
    x = wide[:, 1]
    assert torch.equal(
        norm_kernels.layer_norm(x, weight, bias, 1e-6),
        norm_kernels.layer_norm(x.contiguous(), weight, bias, 1e-6),
    )
    plain = [y.contiguous() for y in wide.unbind(1)]
    expected = norm_kernels.layer_norm_backward_(plain[0].clone(), *plain, weight, bias, 1e-6)
    for i in range(3):  # residual, x, update: each of them strided
        some = [y if j == i else z for j, (y, z) in enumerate(zip(wide.unbind(1), plain))]
        result = norm_kernels.layer_norm_backward_(plain[0].clone(), *some, weight, bias, 1e-6)
        assert all(map(torch.equal, result, expected))


@pytest.mark.parametrize("device", DEVICES)
def test_operators_are_registered_as_torch_expects(device):
    x, update, weight, bias = draw(device, torch.float32, (5, 64), (5, 64), (64,), (64,))
    ops = torch.ops.siglip2_packed
    torch.library.opcheck(ops.layer_norm, (x, weight, bias, 1e-6))
    torch.library.opcheck(ops.late_layer_norm, (x, weight, bias, 1e-6, None, bias))
    torch.library.opcheck(ops.late_layer_norm, (x, weight, bias, 1e-6, weight, bias))
    torch.library.opcheck(ops.late_layer_norm, (x[:0], weight, bias, 1e-6, None, bias))
    torch.library.opcheck(ops.late_layer_norm, (x.half(), weight.half(), bias.half(), 1e-6, None, bias.half()))
    torch.library.opcheck(ops.add_layer_norm, (x, update, weight, bias, 1e-6, bias))
    torch.library.opcheck(ops.layer_norm_backward_, (x.clone(), x, x, update, weight, bias, 1e-6))
    torch.library.opcheck(ops.layer_norm_backward_, (x.clone(), x, x, None, weight, bias, 1e-6))
    torch.library.opcheck(ops.gelu_backward_, (x.clone(), update, torch.empty_like(x)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("D", [72, pytest.param(1152, marks=pytest.mark.gpu)])
def test_positions_are_those_of_the_torch_path(D, device):
    grids = [(1, 13, 19), (1, 8, 32), (2, 2, 3), (1, 16, 16), (1, 7, 1), (1, 1, 20), (1, 40, 2)]
    rows = sum(t * h * w for t, h, w in grids)
    x, table = draw(device, torch.float32, (rows + 3, D), (256, D))
    images, image_of_row = places(tuple(grids), torch.device(device))
    image_of_row = torch.nn.functional.pad(image_of_row, (0, 3), value=-1)
    out = add_positions(x, table, images, image_of_row)
    expected = x[:rows].double() + resize_positions(table, grids).double()
    assert (out[:rows] - expected).abs().max() <= 1e-5
    assert (out[rows:] == 0).all()
    identity = slice(13 * 19 + 256 + 12, 13 * 19 + 512 + 12)
    assert torch.equal(out[identity], x[identity] + table)
