"""The MLP's products with GELU as their epilogue: when they run, and on a Hopper card what they compute."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import kernels_ref
from siglip2_packed import PackedPatches, Siglip2PackedVisionModel, fused
from siglip2_packed.measure import relative_error
from siglip2_packed.ops import gelu
from siglip2_packed.ops.segments import Segments

EPILOGUES = "gelu", "keep", "backward"
BOUND = {torch.float16: 6e-4, torch.bfloat16: 5e-3}


@pytest.fixture
def kernels(monkeypatch):
    from siglip2_packed.ops.triton.arguments import hopper_kernels

    module = hopper_kernels("mlp_hopper") or pytest.skip("this Triton has no such Gluon")
    monkeypatch.setattr(module, "FEW_ROWS", 1)
    monkeypatch.setattr(module, "NARROW", 1)
    return module


def arguments(epilogue, T, D, F, dtype, device="cpu"):
    """x, weight and bias; or dout, weight and wide."""
    generator = torch.Generator().manual_seed(T)
    shapes = ((T, D), (D, F), (T, F)) if epilogue == "backward" else ((T, D), (F, D), (F,))
    x, weight, other = (torch.randn(shape, generator=generator) for shape in shapes)
    return [y.to(device, dtype) for y in (x, weight * D**-0.5, other)]


def call(op, epilogue, x, weight, other):
    if epilogue == "backward":
        active = torch.empty_like(other)
        return [*op.linear_gelu_backward(x, weight, other, active), active]
    if epilogue == "keep":
        return list(op.linear_gelu_keep(x, weight, other))
    return [op.linear_gelu(x, weight, other)]


def exactly(epilogue, x, weight, other):
    """In float64, what `call` returns."""
    x, weight, other = x.double(), weight.double(), other.double()
    if epilogue == "backward":
        wide = other.requires_grad_()
        active = kernels_ref.ops.gelu_tanh(wide)
        (dwide,) = torch.autograd.grad(active, wide, x @ weight)
        return [dwide, dwide.sum(0), active.detach()]
    wide = x @ weight.t() + other
    return [wide, kernels_ref.ops.gelu_tanh(wide)] if epilogue == "keep" else [kernels_ref.ops.gelu_tanh(wide)]


@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_any_device_computes_them(epilogue):
    given = arguments(epilogue, 13 * 19, 72, 200, torch.float32)
    for result, exact in zip(call(gelu, epilogue, *given), exactly(epilogue, *given), strict=True):
        assert relative_error(result, exact) <= 2e-6


def test_where_the_kernels_fit(kernels, monkeypatch):
    monkeypatch.setattr(kernels, "capability", lambda x: 90)
    x, weight, bias = arguments("gelu", 5, 72, 200, torch.bfloat16)
    assert kernels.fits(x, weight, bias) and kernels.fits(x.half(), weight.half(), bias.half())
    assert kernels.fits(torch.zeros(5, 3, 72, dtype=x.dtype)[:, 1], weight, bias)
    assert not kernels.fits(x.float(), weight.float(), bias.float())
    assert not kernels.fits(x, weight.half(), bias)
    assert not kernels.fits(x[:1].expand(5, 72), weight, bias)  # one row for all
    assert not kernels.fits(torch.zeros(5, 144, dtype=x.dtype)[:, ::2], weight, bias)
    assert not kernels.fits(x, weight, torch.zeros(400, dtype=x.dtype)[::2])
    assert not kernels.fits(x, weight.to("meta"), bias)
    assert not kernels.fits(torch.zeros(5, 76, dtype=x.dtype)[:, :72], weight, bias)  # rows begin between 16 bytes
    assert not kernels.fits(x, weight, torch.zeros(201, dtype=x.dtype)[1:])
    monkeypatch.setattr(kernels, "capability", lambda x: 100)
    assert not kernels.fits(x, weight, bias)


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("outcome", ["does not compile", "is wrong", "is NaN"])
def test_what_fails_its_check_never_runs(kernels, monkeypatch, caplog, epilogue, outcome):
    """The reason is logged once, and the product goes where it went before."""
    from siglip2_packed.ops.triton import arguments as triton_arguments

    def attempt(*_):
        if outcome == "does not compile":
            raise RuntimeError("no such layout")
        return "kernel", 0.5 if outcome == "is wrong" else float("nan")

    for module in (kernels, triton_arguments):
        monkeypatch.setattr(module, "capability", lambda x: 90)
    monkeypatch.setattr(gelu, "on_triton", lambda x: x.dtype == torch.float16)
    monkeypatch.setattr("siglip2_packed.ops.triton.gelu.gelu_backward_", gelu_backward_in_torch)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(kernels, "_kernels", {})
    monkeypatch.setattr(kernels, "_try", attempt)
    monkeypatch.setattr(kernels, "_launch", lambda *_: pytest.fail("launched"))
    given = arguments(epilogue, 13 * 19, 72, 200, torch.float16)
    for _ in range(2):
        for result, exact in zip(call(gelu, epilogue, *given), exactly(epilogue, *given), strict=True):
            assert relative_error(result, exact) <= 2e-3
    reason = {"does not compile": "no such layout", "is wrong": "5.0e-01", "is NaN": "nan"}[outcome]
    (message,) = [record.getMessage() for record in caplog.records if record.name == "siglip2_packed"]
    assert reason in message and f"MLP ({epilogue}, 72 to 200 columns)" in message


def gelu_backward_in_torch(grad, x, out):
    grad.copy_(torch.ops.aten.gelu_backward(grad, x, approximate="tanh"))
    out.copy_(kernels_ref.ops.gelu_tanh(x))
    return grad.sum(0)


def test_few_rows_narrow_products_and_graphs_being_captured_are_left_to_cublas(kernels, monkeypatch):
    monkeypatch.setattr(kernels, "capability", lambda x: 90)
    monkeypatch.setattr(kernels, "FEW_ROWS", 6)
    monkeypatch.setattr(kernels, "_kernels", {})
    monkeypatch.setattr(kernels, "_checked", lambda *key: "kernel")
    capturing = True
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)

    def found(T=6, D=72):
        return kernels._kernel_for("gelu", *arguments("gelu", T, D, 200, torch.float16))

    assert found() is None
    capturing = False
    assert found() == "kernel" and found(T=5) is None and found(D=64) is None
    capturing = True
    assert found() == "kernel"  # checked before


def test_what_does_not_fit_is_left_to_torch(kernels, monkeypatch, caplog):
    monkeypatch.setattr(kernels, "capability", lambda x: 90)
    monkeypatch.setattr(kernels, "_kernels", {})
    monkeypatch.setattr(kernels, "_checked", lambda *key: "kernel")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def misaligned(y):
        return torch.zeros(y.numel() + 1, dtype=y.dtype)[1:].view(y.shape)

    for epilogue in ("gelu", "keep"):
        x, weight, bias = arguments(epilogue, 5, 72, 200, torch.float16)
        assert kernels._kernel_for(epilogue, x, weight, bias) == "kernel"
        for others in ((weight, misaligned(bias)), (weight, bias[:-8]), (weight[:, :64], bias), (weight[:-8], bias)):
            assert kernels._kernel_for(epilogue, x, *others) is None
        assert kernels._kernel_for(epilogue, *arguments(epilogue, 5, 72, 204, torch.float16)) is None
    dout, weight, wide = arguments("backward", 5, 72, 200, torch.float16)
    assert kernels._kernel_for("backward", dout, weight, wide, wide) == "kernel"
    for others in (
        (weight, misaligned(wide), wide),
        (weight, wide, misaligned(wide)),
        (weight, wide[:, :-8], wide),
        (weight, wide, wide[:-1]),
        (weight[:-8], wide, wide),
    ):
        assert kernels._kernel_for("backward", dout, *others) is None
    assert not caplog.records


def test_who_follows_the_calls_sees_the_products(kernels, monkeypatch):
    monkeypatch.setattr(gelu, "on_triton", lambda x: True)
    monkeypatch.setattr("siglip2_packed.ops.triton.arguments.capability", lambda x: 90)
    x = torch.zeros(5, 72)
    assert gelu._hopper(x) is kernels
    with FlopCounterMode(display=False):
        assert gelu._hopper(x) is None


@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_the_check_has_tile_after_tile_for_each_warpgroup(kernels, monkeypatch, epilogue):
    grids = []
    monkeypatch.setattr(kernels, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(kernels, "run_compiled", lambda kernel, grid, arguments: grids.append(grid))
    monkeypatch.setattr(kernels, "mlp_kernel", SimpleNamespace(warmup=lambda *args, **kwargs: "kernel"))
    kernel, error = kernels._try(torch.device("cpu"), torch.float16, 1152, 4304, epilogue)
    plan = kernels.PLANS[epilogue]
    tiles = (4 * plan.rows + 37) // plan.rows * (4304 // plan.columns)
    assert kernel == "kernel" and error != error  # nothing has been computed
    assert len(grids) == 1 and grids[0][0] >= 2 and tiles >= 8 * grids[0][0]


@pytest.fixture
def launches(kernels, monkeypatch):
    """The epilogues launched, but for self-checks."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    names, launch, check = [], kernels._launch, kernels._checked

    def checked(*key):
        before = len(names)
        kernel = check(*key)
        del names[before:]
        return kernel

    monkeypatch.setattr(kernels, "_checked", checked)
    monkeypatch.setattr(kernels, "_launch", lambda *args, **kwargs: (names.append(args[1]), launch(*args, **kwargs)))
    return names


@pytest.fixture
def poisoned(monkeypatch):
    """Fresh buffers hold NaN, so that what a kernel leaves unwritten shows."""
    empty = torch.empty

    def filled(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", filled)
    monkeypatch.setattr(torch, "empty_like", lambda x, **kwargs: filled(x.shape, dtype=x.dtype, device=x.device))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda x, *shape: filled(*shape, dtype=x.dtype, device=x.device))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize(("D", "F"), [(1152, 4304), (768, 3072), (72, 200), (320, 8)])
def test_against_float64(launches, poisoned, dtype, epilogue, D, F):
    for T in (1, 64, 13 * 19, 8 * 32, 1000, 4096 + 37):
        given = arguments(epilogue, T, D, F, dtype, "cuda")
        exact = exactly(epilogue, *given)
        first = call(gelu, epilogue, *given)
        for result, expected in zip(first, exact, strict=True):
            assert result.dtype == dtype and relative_error(result, expected) <= BOUND[dtype]
        for _ in range(10):
            for result, before in zip(call(gelu, epilogue, *given), first, strict=True):
                assert torch.equal(result, before)
    assert launches == [epilogue] * 66


@pytest.mark.gpu
@pytest.mark.parametrize("T", [100, 2048 + 5])
def test_nothing_is_written_beyond_the_last_row(launches, T):
    """`active` takes the place of `wide`, in the rows of a larger buffer."""
    dout, weight, wide = arguments("backward", T, 1152, 4304, torch.bfloat16, "cuda")
    exact = exactly("backward", dout, weight, wide)
    around = torch.full((T + 130, 4304), 7.0, dtype=wide.dtype, device="cuda")
    around[:T] = wide
    dwide, sums = gelu.linear_gelu_backward(dout, weight, around[:T], around[:T])
    for result, expected in zip((dwide, sums, around[:T]), exact, strict=True):
        assert relative_error(result, expected) <= BOUND[wide.dtype]
    assert (around[T:] == 7).all() and launches == ["backward"]


@pytest.mark.gpu
def test_strided_rows_and_rows_that_do_not_fit(launches):
    x, weight, bias = arguments("gelu", 300, 320, 400, torch.bfloat16, "cuda")
    (expected,) = call(gelu, "gelu", x, weight, bias)
    wide = torch.stack((x, x + 1), 1)
    assert torch.equal(gelu.linear_gelu(wide[:, 0], weight, bias), expected)
    assert len(launches) == 2
    odd = torch.nn.functional.pad(x, (0, 4))[:, :320]  # rows begin between 16 bytes: cuBLAS'
    assert relative_error(gelu.linear_gelu(odd, weight, bias), expected.double()) <= BOUND[x.dtype]
    assert len(launches) == 2


@pytest.mark.gpu
def test_in_a_cuda_graph_and_on_streams_that_overlap(launches):
    given = [arguments("keep", 1000 + i, 1152, 4304, torch.bfloat16, "cuda") for i in range(4)]
    expected = [call(gelu, "keep", *some) for some in given]
    streams = [torch.cuda.Stream() for _ in given]
    torch.cuda.synchronize()
    found = []
    for _, (some, stream) in itertools.product(range(5), zip(given, streams)):
        with torch.cuda.stream(stream):
            found.append(call(gelu, "keep", *some))
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        captured = [call(gelu, "keep", *some) for some in given]
    graph.replay()
    torch.cuda.synchronize()
    for results in (found, captured):
        for pair, (wide, active) in zip(results, itertools.cycle(expected)):
            assert torch.equal(pair[0], wide) and torch.equal(pair[1], active)
    assert launches == ["keep"] * 28


@pytest.fixture
def trained(checkpoint):
    """A model of 12 layers, and what its step wants: 2,304 patches of nine images."""
    model = Siglip2PackedVisionModel.from_pretrained(
        checkpoint("base"), dtype=torch.bfloat16, attn_implementation="triton"
    ).to("cuda")
    patches = torch.randn(9 * 256, 768, generator=torch.Generator().manual_seed(0))
    return model, PackedPatches(patches, [(1, 8, 32)] * 9).to("cuda")


def gradients(out, grad, model, **how):
    found = torch.autograd.grad(out, list(model.encoder.parameters()), grad, **how)
    assert all(x.isfinite().all() for x in found)
    return found


@pytest.mark.gpu
def test_the_encoder_runs_on_them(launches, trained):
    model, packed = trained
    with torch.no_grad():
        model(**packed)
    assert launches == ["gelu"] * 12
    launches.clear()
    out = model(**packed).last_hidden_state
    grad = torch.randn_like(out)
    first = gradients(out, grad, model, retain_graph=True)
    assert launches == ["keep"] * 12 + ["backward"] * 12
    for how in ({"retain_graph": True}, {}):
        assert all(torch.equal(x, y) for x, y in zip(gradients(out, grad, model, **how), first))


@pytest.mark.gpu
def test_gradients_that_are_one_row_for_all(launches, trained):
    """Of a sum: the layer's gradient is a row, expanded, which no copy engine brings."""
    block = trained[0].encoder.layers[0]
    parameters = [p for name, p in block.named_parameters() if name != "self_attn.k_proj.bias"]  # whose gradient is 0
    x = torch.randn(9 * 256, 768, device="cuda", dtype=torch.bfloat16)
    segments = Segments([256] * 9, "cuda")
    row = torch.randn(768, device="cuda", dtype=torch.bfloat16)
    found = []
    for grad in (row.expand(len(x), 768), row.repeat(len(x), 1)):
        out = fused.layer(block, x, segments, "triton")
        found.append(torch.autograd.grad(out, parameters, grad))
    assert launches == ["keep", "keep", "backward"]
    for theirs, ours in zip(*found):
        assert relative_error(ours, theirs.double()) <= 2e-2
