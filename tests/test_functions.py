"""Which implementation of an operation on rows runs: by the rules, once it is present and was found right."""

import functools
import logging

import pytest
import torch
from implementations import INTERPRETED
from torch.utils.flop_counter import FlopCounterMode

from siglip2_packed.ops import columns, float8, layer, linear, mlp, norm, pool, positions
from siglip2_packed.ops.runtime import check, choice
from siglip2_packed.ops.runtime.choice import Card, Function, take

CPU = torch.device("cpu")
FUNCTIONS = [
    (norm.LAYER_NORM, (72, False)),
    (norm.LAYER_NORM, (72, True)),
    (norm.ADD_LAYER_NORM, (72,)),
    (norm.LAYER_NORM_BACKWARD, (72,)),
    (linear.LINEAR, (72, 200)),
    (linear.ADD_PRODUCT, (200, 72)),
    (mlp.LINEAR_GELU, (72, 200)),
    (mlp.LINEAR_GELU_KEEP, (72, 200)),
    (mlp.LINEAR_GELU_BACKWARD, (72, 200)),
    (columns.COLUMN_SUMS, (216,)),
    (columns.PRODUCT_OVER_ROWS, (200, 72)),
    (positions.ADD_POSITIONS, (4, 24, False)),
    (positions.ADD_POSITIONS, (4, 24, True)),
    (pool.ATTENTION_POOL, (2, 16, False)),
    (pool.ATTENTION_POOL, (2, 16, True)),
    (float8.QUANTIZE_ROWS, (72, 200)),
]
"""With sizes that rows of a small model have."""
KERNELS = [
    pytest.param(function, name, sizes, id=f"{function.name}-{name}-{'-'.join(map(str, sizes))}")
    for function, sizes in FUNCTIONS
    for name in function.modules
    if name != "eager"
]
INTERPRETABLE = [kernel for kernel in KERNELS if "hopper" not in kernel.values[1]]
RESULTS = {
    "norm.layer_norm": {"out", "total"},
    "norm.add_layer_norm": {"out", "total"},
    "norm.layer_norm_backward_": {"dx", "out", "sum 0", "sum 1", "sum 2", "sum 3"},
    "linear.linear": {"out"},
    "linear.add_product_": {"out"},
    "mlp.linear_gelu": {"active"},
    "mlp.linear_gelu_keep": {"wide", "active"},
    "mlp.linear_gelu_backward": {"dwide", "sums", "active"},
    "columns.column_sums": {"result"},
    "columns.product_over_rows": {"result"},
    "positions.add_positions": {"out", "dpatches", "dtable"},
    "pool.attention_pool": {"out", "dq", "dk", "dv"},
    "float8.quantize_rows": {"rows", "scale", "total"},
}


def test_every_function_there_is_is_tested():
    ours = {function for function, _ in FUNCTIONS}
    assert ours == {
        *norm.FUNCTIONS, *linear.FUNCTIONS, *mlp.FUNCTIONS, *columns.FUNCTIONS,
        positions.ADD_POSITIONS, pool.ATTENTION_POOL, float8.QUANTIZE_ROWS,
    }  # fmt: skip
    assert {function.name for function in ours} == RESULTS.keys()


# The check


def expected_results(function, sizes):
    return {x for x in RESULTS[function.name] if sizes[-1] is not False or x == "out"}


@INTERPRETED
@pytest.mark.parametrize(("function", "name", "sizes"), INTERPRETABLE)
def test_right_kernels_pass_their_check(function, name, sizes, forced):
    forced()
    verdict = function.verdict(name, CPU, torch.float32, sizes)
    assert verdict.errors.keys() == expected_results(function, sizes)
    if function is float8.QUANTIZE_ROWS:  # interpreted, float8 is truncated, not rounded
        assert verdict.errors.pop("rows") <= 0.12
    assert verdict.right, verdict


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("function", "name", "sizes"), KERNELS)
def test_right_kernels_pass_their_check_on_the_card(function, name, sizes, dtype, forced):
    device = torch.device("cuda", torch.cuda.current_device())
    if "hopper" in name and (choice.card(device).capability != 90 or dtype == torch.float32):
        pytest.skip("needs compute capability 9.0, and half precision")
    if (function is pool.ATTENTION_POOL or name == "invariant") and dtype == torch.float32:
        pytest.skip("a kernel's in half precision only")
    forced()
    verdict = function.verdict(name, device, dtype, sizes)
    assert verdict.right, verdict
    assert verdict.errors.keys() == expected_results(function, sizes)


class Skewed(torch.autograd.Function):
    """x, whose gradient is wrong."""

    @staticmethod
    def forward(ctx, x, fault):
        ctx.fault = fault
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.fault(grad.clone()), None


def scaled(x):
    """Float8, with hardly more than a digit, to the half."""
    return (x.float() / 2).to(x.dtype) if x.dtype.itemsize == 1 else x * 1.05


def unwritten(x):
    x = x.clone()
    x[0] = float("nan")
    return x


FAULTS = {"scaled": scaled, "unwritten": unwritten}
ARGUMENTS = {"grad": 0, "active": 2}
"""Results that take the place of an argument, by its number in a case."""
DIFFERENTIATED = {pool.ATTENTION_POOL: ("q", "k", "v"), positions.ADD_POSITIONS: ("patches", "table")}
"""Arguments whose gradients are results, the first ones of a case."""
NUMBERS = {(float8.QUANTIZE_ROWS, 0): "5.0e-01", (pool.ATTENTION_POOL, "v"): "6.8e-02"}
"""Of a result that is scaled, where it is not by 5%, or has elements beyond 32 of its rms."""


def places_of_results(function, sizes):
    """Where a function leaves its results: what it returns (a number), arguments it overwrites or differentiates."""
    if function in DIFFERENTIATED:
        return [0, *DIFFERENTIATED[function]] if sizes[-1] else [0]
    return {
        "norm.layer_norm": [0, 1] if sizes[-1] else [0],
        "norm.add_layer_norm": [0, 1],
        "norm.layer_norm_backward_": ["grad", 0, 1],
        "mlp.linear_gelu_keep": [0, 1],
        "mlp.linear_gelu_backward": [0, 1, "active"],
        "float8.quantize_rows": [0, 1, 2],
    }.get(function.name, [0])


def planted(function, place, fault):
    """The function by torch, but for one of its results."""
    right = function.of("eager")

    @functools.wraps(right)
    def wrong(*args, **kwargs):
        if place in DIFFERENTIATED.get(function, ()):
            i = DIFFERENTIATED[function].index(place)
            return right(*args[:i], Skewed.apply(args[i], fault), *args[i + 1 :])
        out = right(*args, **kwargs)
        if place in ("grad", "active"):
            overwritten = args[0] if place == "grad" else args[3]
            overwritten.copy_(fault(overwritten))
            return out
        if isinstance(out, torch.Tensor):
            return fault(out)
        return tuple(fault(x) if i == place and x is not None else x for i, x in enumerate(out))

    return wrong


PLANTED = [
    pytest.param(*kernel.values, place, fault, id=f"{kernel.id}-{place}-{fault}")
    for kernel in KERNELS
    for place in places_of_results(kernel.values[0], kernel.values[2])
    for fault in FAULTS
]


def plant(monkeypatch, function, name, kernel):
    if reason := function.missing(name):
        pytest.skip(reason)
    monkeypatch.setattr(f"{function.modules[name]}.{function.name.split('.')[1]}", kernel)


@pytest.fixture
def warnings(caplog):
    """What is said in warning."""
    caplog.set_level(logging.WARNING, "siglip2_packed")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "siglip2_packed"]


def taken(function, name, sizes):
    return take(function, (name,), CPU, torch.float32, *sizes)


@pytest.mark.parametrize(("function", "name", "sizes", "place", "fault"), PLANTED)
def test_a_kernel_with_one_wrong_result_never_runs(function, name, sizes, place, fault, forced, monkeypatch, warnings):
    """The reason is said once, and torch takes its place."""
    forced()
    plant(monkeypatch, function, name, planted(function, place, FAULTS[fault]))
    for _ in range(2):
        assert taken(function, name, sizes) is function.of("eager")
        choice.forget()  # as a new choice would: the verdict stays
    (line,) = warnings()
    assert line.startswith(f"{function.name} ({name}) is not used on cpu in float32: ")
    if fault == "unwritten" and place in ARGUMENTS:
        assert line.endswith(f"RuntimeError: it writes to its argument number {ARGUMENTS[place]}")
    else:
        number = "nan" if fault == "unwritten" else NUMBERS.get((function, place), "5.0e-02")
        assert number in line and "1e-05" in line


def wrong_in_call(number, function, calls):
    right, wrong = function.of("eager"), planted(function, 0, scaled)

    @functools.wraps(right)
    def kernel(*args, **kwargs):
        calls.append(1)
        return (wrong if len(calls) == number else right)(*args, **kwargs)

    return kernel


@pytest.mark.parametrize(("function", "name", "sizes"), KERNELS)
def test_nor_does_one_that_is_wrong_in_one_case(function, name, sizes, forced, monkeypatch):
    """Whichever of those it is compared on."""
    forced()
    cases = len(list(function.cases(CPU, torch.float32, *sizes)))
    for number in range(1, cases + 1):
        calls = []
        plant(monkeypatch, function, name, wrong_in_call(number, function, calls))
        monkeypatch.setattr(check, "_verdicts", {})
        assert taken(function, name, sizes) is function.of("eager")
        assert len(calls) == cases
        choice.forget()


@pytest.mark.parametrize(("function", "name", "sizes"), KERNELS)
def test_nor_does_one_that_raises(function, name, sizes, forced, monkeypatch, warnings):
    def raises(*args, **kwargs):
        raise RuntimeError("no such layout")

    forced()
    plant(monkeypatch, function, name, raises)
    for _ in range(2):
        assert taken(function, name, sizes) is function.of("eager")
        choice.forget()
    assert warnings() == [f"{function.name} ({name}) is not used on cpu in float32: RuntimeError: no such layout"]


@pytest.mark.parametrize(("function", "name", "sizes"), KERNELS)
def test_a_right_one_runs_and_is_compared_once(function, name, sizes, forced, monkeypatch, warnings):
    calls, eager = [], function.of("eager")

    @functools.wraps(eager)
    def kernel(*args, **kwargs):
        calls.append(1)
        return eager(*args, **kwargs)

    forced()
    plant(monkeypatch, function, name, kernel)
    assert taken(function, name, sizes) is kernel
    compared = len(calls)
    choice.forget()
    assert taken(function, name, sizes) is kernel
    assert len(calls) == compared > 0 and not warnings()


def test_one_that_is_missing_is_passed_over(forced, warnings):
    forced()
    modules = norm.MODULES | {"triton": "siglip2_packed.ops.norm.nowhere"}
    function = Function("norm.layer_norm", modules, norm.LAYER_NORM.compared, norm.LAYER_NORM.cases)
    for _ in range(2):
        assert taken(function, "triton", (72, True)) is function.of("eager")
        choice.forget()
    (line,) = warnings()
    assert "norm.layer_norm: siglip2_packed.ops.norm.nowhere.layer_norm cannot be imported" in line


def test_one_that_cannot_be_checked_now_is_passed_over_but_not_forgotten(forced, monkeypatch):
    """While a CUDA graph is captured; one that was checked before goes on."""
    kernels, capturing = [], True
    for function in (*norm.FUNCTIONS, *mlp.FUNCTIONS, *columns.FUNCTIONS):
        if "triton" in function.modules:
            kernels.append(functools.partial(function.of("eager")))
            plant(monkeypatch, function, "triton", kernels[-1])
    monkeypatch.setattr(check, "capturing", lambda device: capturing)
    forced(norm=["triton"], mlp=["triton"], columns=["triton"])

    def chosen():
        of_both = *layer.for_training(torch.zeros(5, 72), 200, True), *layer.for_inference(torch.zeros(5, 72), 200)
        return sum(function in kernels for function in of_both)

    assert chosen() == 0
    capturing = False
    assert chosen() == 7  # of nine: Triton has no wide product
    capturing = True
    assert chosen() == 7
    choice.forget()
    assert chosen() == 7


def test_where_the_best_cannot_be_checked_now_the_next_runs_if_it_was(forced, monkeypatch):
    """This time: as soon as the best can be checked, it runs."""
    function, kernels, capturing = mlp.LINEAR_GELU_BACKWARD, {}, True
    for name in ("hopper", "triton"):
        kernels[name] = functools.partial(function.of("eager"))
        plant(monkeypatch, function, name, kernels[name])
    monkeypatch.setattr(check, "capturing", lambda device: capturing)
    forced()

    def best():
        return take(function, ("hopper", "triton", "eager"), CPU, torch.float32, 72, 200)

    assert best() is function.of("eager")
    capturing = False
    assert taken(function, "triton", (72, 200)) is kernels["triton"]
    capturing = True
    assert best() is kernels["triton"]
    capturing = False
    assert best() is kernels["hopper"]
    capturing = True
    assert best() is kernels["hopper"]


def test_who_follows_backward_or_batches_it_gets_torchs(forced):
    forced()
    ours, grad = layer.BY_TORCH._replace(layer_norm=None), torch.zeros(3, 5)
    assert layer.for_gradient(ours, grad) is ours
    with FlopCounterMode(display=False):
        assert layer.for_gradient(ours, grad) is layer.BY_TORCH
    found = []

    class Asked(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            found.append(layer.for_gradient(ours, grad))
            return grad

    x = torch.zeros(5, requires_grad=True)
    torch.autograd.grad(Asked.apply(x), x, grad, is_grads_batched=True)
    torch.func.vmap(lambda row: found.append(layer.for_gradient(ours, row)) or row)(grad)
    assert found == [layer.BY_TORCH] * 2


# The rules


H100, A100, BLACKWELL = Card("cuda", 90, 132), Card("cuda", 80, 108), Card("cuda", 100, 148)
CARDS = H100, A100, BLACKWELL
DTYPES = torch.float32, torch.float16, torch.bfloat16


def test_rows_are_tritons_on_cuda():
    for card in CARDS:
        assert [choice.rows(card, dtype) for dtype in DTYPES] == [("triton", "eager")] * 3
        assert choice.rows(card, torch.float64) == ("eager",)  # kernels compute in float32
    for dtype in (*DTYPES, torch.float64):
        assert choice.rows(Card("cpu"), dtype) == choice.rows(Card("mps"), dtype) == ("eager",)


def test_sums_are_tritons_where_rows_are_many():
    many = choice.SUMS_ROWS
    assert [choice.sums(H100, torch.float32, T)[0] for T in (0, many - 1, many)] == ["eager", "eager", "triton"]
    assert choice.sums(H100, torch.float64, many) == choice.sums(Card("cpu"), torch.float32, many) == ("eager",)


def test_large_products_in_half_precision_are_hoppers_own():
    T, least = choice.PRODUCT_ROWS, choice.PRODUCT_COLUMNS

    def first(card=H100, dtype=torch.bfloat16, T=T, D=1152, F=4304):
        return choice.product_with_gelu(card, dtype, T, D, F)[0]

    assert first() == first(dtype=torch.float16) == first(D=least, F=least) == "hopper"
    assert first(T=T - 1) == first(D=least - 8) == first(F=least - 8) == "triton"  # cuBLAS', in fact
    assert first(D=1156) == first(F=4300) == "triton"  # rows begin between 16 bytes
    assert first(dtype=torch.float32) == first(A100) == first(BLACKWELL) == "triton"
    assert first(dtype=torch.float64) == first(Card("cpu")) == "eager"


def test_the_pool_is_tritons_in_half_precision():
    for card in CARDS:
        assert [choice.pool(card, dtype, 72)[0] for dtype in DTYPES] == ["eager", "triton", "triton"]
    for card, K in ((Card("cuda", 75, 40), 72), (H100, 68), (H100, 136), (Card("cpu"), 72)):
        assert choice.pool(card, torch.bfloat16, K) == ("eager",)


@pytest.mark.parametrize("card", [*CARDS, Card("cpu")], ids=lambda card: f"{card.kind}{card.capability}")
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("T", [5, 4096])
def test_every_card_has_all_functions(card, dtype, T, forced, monkeypatch):
    """Where a rule names what one function of an operation has no implementation of, the next is taken."""
    for function in (*norm.FUNCTIONS, *linear.FUNCTIONS, *mlp.FUNCTIONS, *columns.FUNCTIONS):
        for name in function.modules:
            if name != "eager" and function.missing(name) is None:
                kernel = functools.partial(function.of("eager"))
                kernel.__module__ = function.modules[name]
                plant(monkeypatch, function, name, kernel)
    forced(card=card)
    monkeypatch.setattr(Function, "verdict", lambda *args: check.Verdict({"out": 0.0}, {"out": 0.0}))
    x = torch.empty(T, 768, dtype=dtype, device="meta")
    inference, training = layer.for_inference(x, 3072), layer.for_training(x, 3072, gradients=True)
    names = [f.__module__.split(".")[-1] for f in (*inference, *training)]
    rows = "triton" if card.kind == "cuda" and dtype != torch.float64 else "eager"
    hopper = card == H100 and dtype in choice.HALF and T == 4096 and mlp.LINEAR_GELU.missing("hopper") is None
    wide = "hopper" if hopper else "eager"
    backward = wide if wide == "hopper" else rows
    sums = rows if T == 4096 else "eager"
    products = ["eager"] * 2
    assert names == [rows, *products, wide, rows, *products, rows, wide, rows, backward, sums, sums]
    if card.kind == "cuda" and dtype in choice.HALF:
        inference, training = layer.for_inference(x, 3072, True), layer.for_training(x, 3072, True, True)
        names = [f.__module__.split(".")[-1] for f in (*inference, *training)]
        found = card == H100 and linear.LINEAR.missing("invariant_hopper") is None
        ours = "hopper" if found else "triton"
        layers = ["triton", ours, ours, ours, "triton", ours, ours, "triton", ours]
        assert names == [*layers, rows, backward, sums, sums]


def test_what_is_forced_is_forced_on_one_operation_or_function(forced):
    forced(norm=["triton"], **{"norm.add_layer_norm": ["eager"]})
    order = choice.rows(Card("cpu"), torch.float32)
    assert [choice.allowed(function.name, order) for function in norm.FUNCTIONS] == [
        ("triton",),
        ("eager",),
        ("triton",),
    ]
    assert choice.allowed("columns.column_sums", order) == ("eager",)
