"""The MLP's wide product and GELU, every implementation against float64; Triton's interpreted on CPU, Hopper's on a
card of compute capability 9.0.
"""

import importlib
import itertools

import pytest
import torch
from implementations import BOUND, DEVICES, IN_DTYPES, INTERPRETED, NAMES, SHAPES, draw

import kernels_ref
from siglip2_packed import PackedPatches, Siglip2PackedVisionModel, fused
from siglip2_packed.measure import relative_error
from siglip2_packed.ops import mlp
from siglip2_packed.ops.attention import VarlenAttention
from siglip2_packed.ops.runtime import choice
from siglip2_packed.ops.runtime.check import missing
from siglip2_packed.ops.segments import Segments

FUNCTIONS = {"gelu": mlp.LINEAR_GELU, "keep": mlp.LINEAR_GELU_KEEP, "backward": mlp.LINEAR_GELU_BACKWARD}
HALF = [torch.float16, torch.bfloat16]
PRODUCT_BOUND = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}
CPU, GPU = INTERPRETED, pytest.mark.gpu
IMPLEMENTATIONS = [
    *[pytest.param("eager", what, "cpu", dtype) for what in FUNCTIONS for dtype in PRODUCT_BOUND],
    *[pytest.param("eager", what, "cuda", dtype, marks=GPU) for what in FUNCTIONS for dtype in PRODUCT_BOUND],
    *[pytest.param("triton", "backward", "cpu", dtype, marks=CPU) for dtype in (torch.float32, torch.float16)],
    *[pytest.param("triton", "backward", "cuda", dtype, marks=GPU) for dtype in (torch.float32, *HALF)],
    *[pytest.param("hopper", what, "cuda", dtype, marks=GPU) for what in FUNCTIONS for dtype in HALF],
]
"""Name, function, device and dtype of all there are."""


def arguments(what, T, D, F, dtype, device="cpu"):
    """x, weight and bias; or dout, weight and wide."""
    generator = torch.Generator().manual_seed(T)
    shapes = ((T, D), (D, F), (T, F)) if what == "backward" else ((T, D), (F, D), (F,))
    x, weight, other = (torch.randn(shape, generator=generator) for shape in shapes)
    return [y.to(device, dtype) for y in (x, weight * D**-0.5, other)]


def call(name, what, x, weight, other):
    function = FUNCTIONS[what].of(name)
    if what == "backward":
        active = torch.empty_like(other)
        return [*function(x, weight, other, active), active]
    return list(function(x, weight, other)) if what == "keep" else [function(x, weight, other)]


def exactly(what, x, weight, other):
    """In float64, what `call` returns."""
    x, weight, other = (y.to(torch.float64, copy=True) for y in (x, weight, other))
    if what == "backward":
        wide = other.requires_grad_()
        active = kernels_ref.ops.gelu_tanh(wide)
        (dwide,) = torch.autograd.grad(active, wide, x @ weight)
        return [dwide, dwide.sum(0), active.detach()]
    wide = x @ weight.t() + other
    return [wide, kernels_ref.ops.gelu_tanh(wide)] if what == "keep" else [kernels_ref.ops.gelu_tanh(wide)]


def missing_here(name):
    if name != "hopper":
        return None
    if torch.cuda.get_device_capability() != (9, 0):
        return "needs compute capability 9.0"
    return missing("siglip2_packed.ops.mlp.hopper")


@pytest.fixture
def _present(request):
    if reason := missing_here(request.getfixturevalue("name")):
        pytest.skip(reason)


def product_bound(device, dtype):
    return PRODUCT_BOUND[dtype] * (10 if device == "cuda" and dtype == torch.float32 else 1)  # cuBLASLt's own GELU


@pytest.mark.usefixtures("_present", "poisoned")
@pytest.mark.parametrize(("name", "what", "device", "dtype"), IMPLEMENTATIONS)
@pytest.mark.parametrize(("T", "D", "F"), [(13 * 19, 72, 200), (1, 320, 8)])
def test_products_with_gelu(name, what, device, dtype, T, D, F):
    given = arguments(what, T, D, F, dtype, device)
    kept = [y.clone() for y in given]
    bound = product_bound(device, dtype)
    for result, exact in zip(call(name, what, *given), exactly(what, *given), strict=True):
        assert result.dtype == dtype and relative_error(result, exact) <= bound
    assert all(map(torch.equal, given, kept))


@pytest.mark.usefixtures("_present", "poisoned")
@pytest.mark.parametrize(("name", "what", "device", "dtype"), IMPLEMENTATIONS)
def test_rows_weights_and_biases_lie_anywhere(name, what, device, dtype):
    """Part of something else, beginning between 16 bytes, one row for all; with padding between rows."""
    x, weight, other = arguments(what, 30, 72, 200, dtype, device)
    expected = call(name, what, x, weight, other)

    def misaligned(y):
        return torch.cat((y.new_zeros(1), y.flatten()))[1:].view(y.shape)

    def same(*given):
        for result, exact in zip(call(name, what, *given), expected, strict=True):
            assert torch.equal(result, exact) or relative_error(result, exact.double()) <= product_bound(device, dtype)

    same(torch.stack((x, x + 1), 1)[:, 0], weight, other)
    same(torch.nn.functional.pad(x, (0, 4))[:, :72], weight, other)
    same(x.t().contiguous().t(), weight, other)
    same(misaligned(x), weight, other)
    same(x, misaligned(weight), other)
    if what != "backward":  # wide is contiguous, as the forward left it
        same(x, weight, misaligned(other))
        same(x, weight, torch.stack((other, other), 1)[:, 0])
    row = x[:1].expand(30, 72)
    found, expected = call(name, what, row, weight, other), exactly(what, row, weight, other)
    for result, exact in zip(found, expected, strict=True):
        assert relative_error(result, exact) <= product_bound(device, dtype)


@pytest.mark.parametrize("what", FUNCTIONS)
def test_widths_that_do_not_fit_each_other_are_an_error(what):
    """Of every implementation, before anything is launched."""
    x, weight, other = arguments(what, 5, 72, 200, torch.float16)
    for name in FUNCTIONS[what].modules:
        if FUNCTIONS[what].missing(name) is None:
            with pytest.raises((RuntimeError, ValueError), match="72"):
                call(name, what, x, weight[:-8] if what == "backward" else weight[:, :-8], other)


@pytest.mark.usefixtures("_present")
@pytest.mark.parametrize(("name", "what", "device", "dtype"), [x for x in IMPLEMENTATIONS if x.values[1] == "backward"])
@pytest.mark.parametrize("T", [100, pytest.param(2048 + 5, marks=GPU)])
def test_nothing_is_written_beyond_the_last_row(name, what, device, dtype, T):
    """`active` takes the place of `wide`, in the rows of a larger buffer."""
    D, F = (1152, 4304) if device == "cuda" else (72, 200)
    dout, weight, wide = arguments(what, T, D, F, dtype, device)
    exact = exactly(what, dout, weight, wide)
    around = torch.full((T + 130, F), 7.0, dtype=dtype, device=device)
    around[:T] = wide
    dwide, sums = FUNCTIONS[what].of(name)(dout, weight, around[:T], around[:T])
    for result, expected in zip((dwide, sums, around[:T]), exact, strict=True):
        assert relative_error(result, expected) <= PRODUCT_BOUND[dtype]
    assert (around[T:] == 7).all()


# GELU's backward for itself


def gelu_backward_(name):
    return importlib.import_module(mlp.BACKWARD[name]).gelu_backward_


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "dtype"), IN_DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (70, 1000)])
def test_gelu_backward(name, dtype, shape, device):
    grad, x = draw(device, dtype, shape, shape)
    exact = x.to(torch.float64, copy=True).requires_grad_()
    out = kernels_ref.ops.gelu_tanh(exact)
    (dx,) = torch.autograd.grad(out, exact, grad.double())
    for active in (torch.empty_like(x), x):
        dx_, kept = grad.clone(), x.clone()
        sums = gelu_backward_(name)(dx_, x, active)
        assert active is x or torch.equal(x, kept)
        for result, ref in ((active, out.detach()), (sums, dx.sum(0)), (dx_, dx)):
            assert result.dtype == dtype and relative_error(result, ref) <= 2 * BOUND[dtype]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
def test_gelu_is_finite_far_from_zero(name, device):
    x = torch.tensor([[-6e4, -300.0, -20.0, 0.0, 20.0, 300.0, 6e4, 1.0]], device=device)
    dx, out = torch.ones_like(x), torch.empty_like(x)
    gelu_backward_(name)(dx, x, out)
    assert torch.allclose(out, torch.nn.functional.gelu(x, approximate="tanh"), atol=1e-6)
    assert dx[0, :3].abs().max() == 0 and (dx[0, 4:7] == 1).all()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
def test_no_rows_and_rows_wider_than_the_device_has_programs_for(name, device):
    x = torch.zeros(0, 72, device=device)
    assert (gelu_backward_(name)(x, x, x) == 0).all()
    x, grad = draw(device, torch.float32, (20, 5000), (20, 5000))
    sums = gelu_backward_(name)(grad, x, x)
    assert relative_error(sums, grad.double().sum(0)) <= BOUND[torch.float32]


# Hopper


@pytest.mark.parametrize("what", FUNCTIONS)
def test_the_check_has_tile_after_tile_for_each_warpgroup(what, forced, monkeypatch):
    """On few thread blocks, of the smallest product that the kernel is for and of the model's."""
    if reason := missing("siglip2_packed.ops.mlp.hopper"):
        pytest.skip(reason)
    from siglip2_packed.ops.mlp import hopper

    forced()
    grids = []
    monkeypatch.setattr(hopper, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(hopper, "Launcher", lambda *_, **__: lambda grid, arguments: grids.append(grid))
    monkeypatch.setattr(hopper, "_launchers", {})
    plan, device = hopper.PLANS[what], torch.device("cpu")
    for D, F in ((choice.PRODUCT_COLUMNS, choice.PRODUCT_COLUMNS), (1152, 4304)):
        verdict = FUNCTIONS[what].verdict("hopper", device, torch.float16, (D, F))
        assert not verdict.right  # nothing has been computed
        tiles = mlp.T // plan.rows * (F // plan.columns)
        ((blocks, _, _),) = grids
        assert blocks >= 2 and tiles >= (8 if F > 768 else 4) * blocks
        grids.clear()


@pytest.fixture
def launches(forced, monkeypatch):
    """The epilogues launched, but for self-checks."""
    if reason := missing_here("hopper"):
        pytest.skip(reason)
    from siglip2_packed.ops.mlp import hopper

    forced()
    names, launch, check = [], hopper._launch, choice.check

    def checked(*args):
        before = len(names)
        verdict = check(*args)
        del names[before:]
        return verdict

    monkeypatch.setattr(choice, "check", checked)
    monkeypatch.setattr(hopper, "_launch", lambda *args: (names.append(args[0]), launch(*args)))
    return names


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("what", FUNCTIONS)
@pytest.mark.parametrize(("D", "F"), [(1152, 4304), (768, 3072), (72, 200), (320, 8)])
def test_against_float64_again_and_again(launches, dtype, what, D, F):
    for T in (1, 64, 13 * 19, 8 * 32, 1000, 4096 + 37):
        given = arguments(what, T, D, F, dtype, "cuda")
        exact = exactly(what, *given)
        first = call("hopper", what, *given)
        for result, expected in zip(first, exact, strict=True):
            assert result.dtype == dtype and relative_error(result, expected) <= PRODUCT_BOUND[dtype]
        for _ in range(10):
            for result, before in zip(call("hopper", what, *given), first, strict=True):
                assert torch.equal(result, before)
    assert launches == [what] * 66


@pytest.mark.gpu
def test_in_a_cuda_graph_and_on_streams_that_overlap(launches):
    given = [arguments("keep", 1000 + i, 1152, 4304, torch.bfloat16, "cuda") for i in range(4)]
    expected = [call("hopper", "keep", *some) for some in given]
    streams = [torch.cuda.Stream() for _ in given]
    torch.cuda.synchronize()
    found = []
    for _, (some, stream) in itertools.product(range(5), zip(given, streams)):
        with torch.cuda.stream(stream):
            found.append(call("hopper", "keep", *some))
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        captured = [call("hopper", "keep", *some) for some in given]
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
    """Of a sum: the layer's gradient is a row, expanded, of which the copy engine is brought a copy."""
    block = trained[0].encoder.layers[0]
    parameters = [p for name, p in block.named_parameters() if name != "self_attn.k_proj.bias"]  # whose gradient is 0
    x = torch.randn(9 * 256, 768, device="cuda", dtype=torch.bfloat16)
    attention = VarlenAttention(Segments([256] * 9, "cuda"), "triton")
    row = torch.randn(768, device="cuda", dtype=torch.bfloat16)
    found = []
    for grad in (row.expand(len(x), 768), row.repeat(len(x), 1)):
        out = fused.layer(block.plain_weights(x), x, attention)
        found.append(torch.autograd.grad(out, parameters, grad))
    assert launches == ["keep", "backward"] * 2
    for theirs, ours in zip(*found):
        assert relative_error(ours, theirs.double()) <= 2e-2
