"""The self-check says the same wherever the first call is made, and what it says is kept."""

import contextlib
import errno
import functools
import subprocess
import sys
import threading

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint as checkpointed

from siglip2_packed import PackedPatches, Siglip2PackedVisionModel
from siglip2_packed.ops.attention.backends import verdict_on
from siglip2_packed.ops.runtime import check
from siglip2_packed.ops.runtime.check import Verdict, in_clean_context, relative_error

CPU = torch.device("cpu")
GRIDS = [(1, 13, 19), (1, 8, 32), (2, 3, 4)]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def compared(kernel, reference=torch.sin, cases=None, what="kernel", key=0, dtype=torch.float32, **rounded):
    """`check` of functions of one tensor whose result is `out`."""
    x = torch.linspace(-1, 1, 50).to(dtype)
    return check.check(
        what,
        key,
        lambda x: {"out": kernel(x)},
        lambda x: {"out": reference(x)},
        cases or (lambda: [(x,)]),
        CPU,
        dtype,
        rounded,
    )


@pytest.fixture
def fresh(forced):
    forced()


@pytest.mark.parametrize(
    ("kernel", "right"),
    [
        (torch.sin, True),
        (lambda x: 1.000005 * x.sin(), True),
        (lambda x: 1.0001 * x.sin(), False),
        (lambda x: x.sin() * float("nan"), False),
        (lambda x: torch.where(x < 0.9, x.sin(), float("inf")), False),
    ],
)
def test_what_is_right(fresh, kernel, right):
    assert compared(kernel).right is right


def test_the_worst_case_counts_and_nan_is_the_worst(fresh):
    cases = [(torch.full((3,), x),) for x in (0.1, 1.0, 0.2)]
    verdict = compared(lambda x: x.sin() * (1 + (x == 1.0)), cases=lambda: cases)
    assert verdict.errors == {"out": pytest.approx(1.0)}
    for place in range(3):
        verdict = compared(lambda x: x.sin() + (x == cases[place][0]) * torch.nan, cases=lambda: cases, key=place + 1)
        assert not verdict.right and verdict.errors["out"] != verdict.errors["out"]


def test_results_that_are_rounded_further_have_their_own_bound(fresh):
    verdict = compared(lambda x: 1.02 * x.sin(), out=torch.float8_e4m3fn)
    assert verdict.right and verdict.bounds == {"out": check.BOUNDS[torch.float8_e4m3fn]}
    assert not compared(lambda x: 1.1 * x.sin(), key=1, out=torch.float8_e4m3fn).right


def test_nothing_compared_is_not_right(fresh):
    assert not compared(torch.sin, cases=lambda: []).right
    assert not Verdict({}, {}).right


def test_a_verdict_is_kept_and_a_refusal_said_once_with_its_numbers(fresh, caplog):
    calls = []

    def wrong(x):
        calls.append(x)
        return 1.5 * x.sin()

    first, second = (compared(wrong, what="norm.layer_norm (triton)") for _ in range(2))
    assert first is second and len(calls) == 1
    (record,) = caplog.records
    assert record.getMessage() == ("norm.layer_norm (triton) is not used on cpu in float32: out 5.0e-01 (bound 1e-05)")
    compared(wrong, what="norm.layer_norm (triton)", key="another specialisation")
    assert len(calls) == 2


def test_what_a_kernel_raises_is_its_reason_and_is_not_tried_again(fresh, caplog):
    calls = []

    def broken(x):
        calls.append(x)
        raise RuntimeError("no such layout")

    for _ in range(3):
        verdict = compared(broken)
        assert not verdict.right and str(verdict) == "RuntimeError: no such layout"
    assert len(calls) == 1 and len(caplog.records) == 1


LACK = [
    torch.OutOfMemoryError("CUDA out of memory"),
    MemoryError(),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("can't start new thread"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
]


@pytest.mark.parametrize("error", LACK, ids=repr)
def test_lack_of_memory_threads_or_disk_is_no_verdict(fresh, caplog, error):
    """It is passed on, and the next call tries again."""

    def hungry(x):
        raise error

    for _ in range(2):
        with pytest.raises(type(error)) as raised:
            compared(hungry)
        assert raised.value is error
    assert compared(torch.sin).right and not caplog.records


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No such file or directory", "gcc"),
        PermissionError(errno.EACCES, "Permission denied", "/home/user/.triton"),
        ImportError("libgomp.so.1: cannot allocate memory in static TLS block"),
        RuntimeError("out of resource: shared memory, Required: 262144, Hardware limit: 232448"),
    ],
    ids=repr,
)
def test_what_else_is_missing_is_a_reason(fresh, error):
    """A compiler, say: it will be missing at the next call, too."""

    def broken(x):
        raise error

    verdict = compared(broken)
    assert not verdict.right and verdict.reason == f"{type(error).__name__}: {error}"
    assert compared(torch.sin) is verdict


def test_kernels_and_reference_get_copies_and_exact_ones(fresh):
    """In-place functions: each has its own, and the reference computes in float64."""
    dtypes = []

    def double_(x):
        dtypes.append(x.dtype)
        return x.mul_(2)

    for dtype in (torch.float16, torch.float64):
        cases = [(torch.ones(3, dtype=dtype),)]
        assert compared(double_, double_, cases=lambda: cases, key=dtype, dtype=dtype).right
        assert torch.equal(cases[0][0], torch.ones(3, dtype=dtype))
    assert sorted(dtypes, key=str) == [torch.float16, *[torch.float64] * 3]


@pytest.mark.parametrize("number", [0, 1])
def test_a_kernel_that_writes_to_an_argument_is_refused(fresh, number):
    """Unless the reference writes the same there."""
    cases = [tuple(torch.linspace(1, 2, 40).view(2, 20))]

    def run(write):
        def results(*arguments):
            out = arguments[0].sin()
            write(arguments[number])
            return {"out": out}

        return results

    def verdict(key, kernel, reference):
        return check.check("kernel", key, run(kernel), run(reference), lambda: cases, CPU, torch.float32)

    def zero(x):
        x.zero_()

    def halve(x):
        x.mul_(0.5)

    def row_of_nan(x):
        x[0] = torch.nan

    def leave(x):
        pass

    for key, (kernel, reference) in enumerate([(zero, leave), (row_of_nan, leave), (leave, halve), (zero, halve)]):
        found = verdict(key, kernel, reference)
        assert not found.right and str(found) == f"RuntimeError: it writes to its argument number {number}"
    for kernel in (leave, halve, row_of_nan):
        assert verdict(kernel, kernel, kernel).right
    assert torch.equal(torch.stack(cases[0]), torch.linspace(1, 2, 40).view(2, 20))


def test_one_element_that_stands_out_is_wrong_among_many(fresh):
    """Its relative error alone would be lost in that of all."""
    x = torch.ones(10**6)

    def verdict(by):
        def kernel(x):
            x = x.clone()
            x[5] += by
            return x

        return compared(kernel, torch.clone, lambda: [(x,)], key=by)

    assert verdict(by=0.0).errors == {"out": 0.0}
    assert verdict(by=2e-4).right and relative_error(x + 2e-4 * (torch.arange(10**6) == 5), x) < 1e-6
    found = verdict(by=2**-8)
    assert not found.right and found.errors == {"out": pytest.approx(2**-13)}


def test_a_result_of_another_shape_is_wrong(fresh):
    verdict = compared(lambda x: x.sin()[:1], cases=lambda: [(torch.ones(3),)])
    assert not verdict.right and str(verdict) == "RuntimeError: it gives [1], not [3]"


@pytest.mark.parametrize("where", ["capture", "trace"])
def test_nothing_is_checked_in_a_capture_or_a_trace(fresh, monkeypatch, where):
    with monkeypatch.context() as patch:
        if where == "capture":
            patch.setattr(check, "capturing", lambda device: True)
        else:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert compared(lambda x: pytest.fail("checked")) is None
    assert compared(torch.sin).right
    with monkeypatch.context() as patch:
        patch.setattr(check, "capturing", lambda device: True)
        assert compared(torch.sin).right  # what was checked before


class Refusing(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} reached the caller's mode")


class RefusingFunctions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} reached the caller's mode")


def refuse(x):
    raise AssertionError("a tensor of the check reached the caller's hooks")


@contextlib.contextmanager
def default_device():
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


CONTEXTS = {
    "inference mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "saved-tensor hooks": lambda: torch.autograd.graph.saved_tensors_hooks(refuse, refuse),
    "hooks disabled": lambda: torch.autograd.graph.disable_saved_tensors_hooks("not here"),
    "dispatch mode": Refusing,
    "function mode": RefusingFunctions,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "another device": lambda: torch.device("meta"),
    "another default device": default_device,
    "sdpa of one kind": lambda: sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION),
    "anomaly mode": lambda: torch.autograd.detect_anomaly(check_nan=True),
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", CONTEXTS)
def test_a_check_says_the_same_in_any_context(forced, name, gradients):
    forced()
    expected = verdict_on("sdpa", CPU, torch.float32, 72, gradients)
    assert expected.right
    assert set(expected.errors) == ({"inference", "forward", "dq", "dk", "dv"} if gradients else {"forward"})
    check._verdicts.clear()
    with CONTEXTS[name]():
        verdict = verdict_on("sdpa", CPU, torch.float32, 72, gradients)
    assert verdict == expected


def test_a_restriction_of_sdpa_is_the_callers_again_after_a_check(forced):
    forced()
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        assert verdict_on("sdpa", CPU, torch.float32, 72, True).right
        assert not torch.backends.cuda.flash_sdp_enabled() and not torch.backends.cuda.math_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.math_sdp_enabled()


def test_two_checks_at_once_leave_the_restriction_as_it_was():
    """The second takes over before the first is done, as with the threads of `nn.DataParallel`."""
    second_begins, first_ends = threading.Event(), threading.Event()

    def first():
        second_begins.set()
        first_ends.wait(0.2)  # the second, if it may run at once

    def second():
        first_ends.set()
        one.join(5)

    def flags():
        return [getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in ("flash", "mem_efficient", "math")]

    one = threading.Thread(target=in_clean_context, args=(first, CPU))
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        one.start()
        assert second_begins.wait(5)
        in_clean_context(second, CPU)
        assert not one.is_alive()
        assert flags() == [False, True, False]


def test_a_check_within_a_check_does_not_wait_for_it():
    done = threading.Event()
    inner = functools.partial(in_clean_context, done.set, CPU)
    outer = threading.Thread(target=in_clean_context, args=(inner, CPU), daemon=True)
    outer.start()
    assert done.wait(5)


def test_a_check_may_be_made_after_the_main_thread_has_ended():
    code = (
        "import threading, torch\n"
        "from siglip2_packed.ops.attention.backends import verdict_on\n"
        "def late():\n"
        "    threading.main_thread().join()\n"
        "    print(verdict_on('sdpa', torch.device('cpu'), torch.float32, 72, True).right)\n"
        "threading.Thread(target=late).start()\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.stdout.split() == ["True"], result.stderr


def test_a_check_says_the_same_within_function_transforms(forced):
    forced()

    def loss(x):
        assert verdict_on("sdpa", CPU, torch.float32, 72, True).right
        return x.square().sum()

    assert torch.equal(torch.func.grad(loss)(torch.ones(2)), torch.full((2,), 2.0))
    check._verdicts.clear()
    torch.vmap(loss)(torch.ones(3, 2))


def test_a_check_says_the_same_under_another_default_dtype(forced):
    forced()
    expected = verdict_on("sdpa", CPU, torch.bfloat16, 72, True)
    check._verdicts.clear()
    torch.set_default_dtype(torch.float64)
    try:
        assert verdict_on("sdpa", CPU, torch.bfloat16, 72, True) == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_clean_context_is_a_thread_of_its_own_in_which_backward_runs_too():
    threads = []

    class Seen(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            threads.append(threading.get_ident())
            return grad

    def run():
        threads.append(threading.get_ident())
        Seen.apply(torch.ones(2, requires_grad=True)).sum().backward()

    in_clean_context(run, CPU)
    assert len(set(threads)) == 1 and threads[0] != threading.get_ident()


@pytest.mark.gpu
def test_backward_of_a_check_runs_in_its_thread_on_cuda():
    """autograd's own thread may be the one that waits for the check: in the recomputation of a checkpoint."""
    done = []

    class Waiting(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            y = torch.ones(2, device="cuda", requires_grad=True)
            done.append(in_clean_context(lambda: torch.autograd.grad(y.square().sum(), y)[0].sum().item(), grad.device))
            return grad

    Waiting.apply(torch.ones(2, device="cuda", requires_grad=True)).sum().backward()
    assert done == [4.0]


def gradients(model, packed, run):
    model.zero_grad()
    out = run(lambda pixels: model(**{**packed, "pixel_values": pixels}).last_hidden_state)
    out.float().square().mean().backward()
    return out.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_the_first_forward_may_be_within_a_checkpoint(checkpoint, patches, forced, device, reentrant):
    """Features and gradients are those of a model that was called before, and the same backend runs.

    To the bit; a reentrant checkpoint's forward is one without gradients, which rounds otherwise.
    """
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny72"), dtype=dtype, vision_use_head=False)
    model.to(device).train()
    packed = PackedPatches(patches(GRIDS), GRIDS).to(device)
    pixels = packed["pixel_values"].to(dtype).requires_grad_()

    def within(forward):
        return checkpointed(forward, pixels, use_reentrant=reentrant)

    forced()
    found = gradients(model, packed, within)
    assert all(verdict.right for verdict in check._verdicts.values()) and check._verdicts
    backends = {what for what, _ in check._verdicts}
    check._verdicts.clear()
    forced()
    expected = gradients(model, packed, lambda forward: forward(pixels))
    assert {what for what, _ in check._verdicts} <= backends
    bound = 0 if not reentrant else 1e-5 if device == "cpu" else 2e-2
    assert relative_error(found[0], expected[0]) <= bound
    largest = max(grad.norm() for grad in expected[1])
    assert all((x - grad).norm() <= bound * largest for x, grad in zip(found[1], expected[1], strict=True))


@pytest.mark.parametrize("name", ["another device", "another default device", "inference mode", "dispatch mode"])
def test_the_first_forward_in_any_context_gives_the_same_features(checkpoint, patches, forced, name):
    class Passing(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    model = Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny"))
    packed = PackedPatches(patches(GRIDS), GRIDS)
    with torch.no_grad():
        expected = model(**packed).last_hidden_state
        forced()
        with {**CONTEXTS, "dispatch mode": Passing}[name]():
            first = model(**packed).last_hidden_state
        again = model(**packed).last_hidden_state
    assert first.device == CPU and torch.equal(again, expected)
    torch.testing.assert_close(first, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
def test_a_check_may_wait_where_waiting_is_an_error(forced):
    forced()
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert verdict_on("sdpa", torch.device("cuda"), torch.bfloat16, 72, True).right
        assert torch.cuda.get_sync_debug_mode() == 2
    finally:
        torch.cuda.set_sync_debug_mode("default")
