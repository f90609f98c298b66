"""Every attention backend present, forward and backward, at SigLIP2's shapes on one card.

    python benchmarks/attention.py              # about five minutes on an H100
    python benchmarks/attention.py --lengths 64 256 1024 4096 --workloads mixed    # half of it

bfloat16, 16 heads, T = 16384 rows cut into equal segments, or a workload's images. A backend is timed only where its
output, without gradients and with them, and its gradients have been compared with a float32 reference; what fails is
written as its error and not timed. Times are of CUDA-graph replays, backends in turn within each shape.

FlashAttention 2 and 4 share the package `flash_attn` (4 is its folder `cute`): both are found where both are installed
into one folder, and only the first of two folders on PYTHONPATH.
"""

import argparse
import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from siglip2_packed.measure import Rows, card_name, relative_error
from siglip2_packed.ops.attention import VarlenAttention, eager, for_pack
from siglip2_packed.ops.attention.backends import BACKENDS, why_not
from siglip2_packed.ops.segments import Segments
from siglip2_packed.packing import make_layout
from siglip2_packed.workloads import grids

HEADS, ROWS = 16, 16384
CUDA = torch.device("cuda")
LENGTHS = (64, 144, 256, 576, 1024, 4096)
WORKLOADS = ("naflex256", "mixed", "long", "video")
BOUND = 1e-2


def cudnn_dense(segments, q, k, v):
    """cuDNN's attention on a dense batch: no varlen, so equal segments only."""
    qkv = (x.unflatten(0, (len(segments), -1)).transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(0, 1)


def providers(head_dim, segments):
    names = [name for name in BACKENDS if name not in ("eager", "sdpa")]
    present = [name for name in names if why_not(name, CUDA, torch.bfloat16, head_dim) is None]
    found = {name: VarlenAttention(segments, name) for name in present}
    if len(set(segments.lengths)) == 1:
        found["cudnn_dense"] = functools.partial(cudnn_dense, segments)
    return found


def microseconds(functions, rounds=3, samples=3, replays=20):
    """Samples for each function: of replays of its CUDA graph, captured anew each round, one function after another.

    Capture runs on the current stream, which must not be the default one: a backward runs where its forward did.
    """
    times = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            function()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                function()
            graph.replay()
            for _ in range(samples):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                for _ in range(replays):
                    graph.replay()
                end.record()
                end.synchronize()
                times[name].append(start.elapsed_time(end) * 1e3 / replays)
            del graph
    return times


def ceilings():
    """Matmul rate in TFLOP/s and copy bandwidth in TB/s of this card, measured."""
    a, b = torch.randn(2, 8192, 8192, device=CUDA, dtype=torch.bfloat16)
    source = torch.randn(2**30, device=CUDA, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    samples = microseconds({"matmul": lambda: a @ b, "copy": lambda: target.copy_(source)}, replays=5)
    times = {name: sorted(x)[len(x) // 2] for name, x in samples.items()}
    return 2 * 8192**3 / times["matmul"] / 1e6, 2 * source.nbytes / times["copy"] / 1e6


def run(rows, workload, head_dim, lengths, tflops_peak, bandwidth):
    torch.manual_seed(0)
    segments = Segments(lengths, CUDA)
    total = sum(lengths)
    fused = torch.randn(total, 3, HEADS, head_dim, device=CUDA, dtype=torch.bfloat16)
    q, k, v = (x.requires_grad_() for x in fused.unbind(1))
    grad = torch.randn(total, HEADS, head_dim, device=CUDA, dtype=torch.bfloat16)

    exact = [x.detach().float().requires_grad_() for x in (q, k, v)]
    expected = eager.attention(*exact, segments)
    expected = [expected.detach(), *torch.autograd.grad(expected, exact, grad.float())]
    forward, backward = {}, {}
    for name, function in providers(head_dim, segments).items():
        try:
            inference = functools.partial(function, q.detach(), k.detach(), v.detach())
            out = function(q, k, v)
            gradients = torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)
            results = (inference(), out.detach(), *gradients)  # a backend may compute them on different paths
            errors = [relative_error(x, ref) for x, ref in zip(results, (expected[0], *expected), strict=True)]
            rows.add(name, workload, "forward", "bfloat16", "relative_error", errors[0], "")
            rows.add(name, workload, "backward", "bfloat16", "relative_error", max(errors[2:]), "")
            if not all(error <= BOUND for error in errors):
                print(f"{workload:14} {name:18} refused: relative errors {', '.join(f'{x:.1e}' for x in errors)}")
                continue
            forward[name] = inference
            # holds what the captured backward reads: a graph holds nothing
            backward[name] = lambda out=out: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)
        except Exception as error:  # a backend that cannot run a shape is a line of the report, not the end of it
            print(f"{workload:14} {name:18} {type(error).__name__}: {str(error)[:100]}")
    chosen = {
        mode: for_pack(segments, "auto", torch.bfloat16, HEADS, head_dim, mode == "backward").backend
        for mode in ("forward", "backward")
    }
    flops = 4 * sum(length * length for length in lengths) * HEADS * head_dim
    for mode, functions, work, tensors in (("forward", forward, flops, 4), ("backward", backward, 2.5 * flops, 8)):
        bound = max(work / tflops_peak / 1e6, tensors * grad.nbytes / bandwidth / 1e6)
        samples = microseconds(functions)
        if chosen[mode] in samples:
            samples["auto"] = samples[chosen[mode]]
        for name, times in samples.items():
            rows.add(name, workload, mode, "bfloat16", "time", [x / 1e3 for x in times], "ms")
            rows.add(name, workload, mode, "bfloat16", "tflops", [work / x / 1e6 for x in times], "TFLOP/s")
            rows.add(name, workload, mode, "bfloat16", "fraction_of_bound", [bound / x for x in times], "")
        medians = {name: sorted(times)[len(times) // 2] for name, times in samples.items()}
        line = "  ".join(f"{name} {time:.0f}" for name, time in medians.items() if name != "auto")
        print(f"{workload:14} {mode:8} bound {bound:4.0f} us | {line} | auto: {chosen[mode]}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="CSV file (default: results/attention_<card>.csv beside this script)")
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 72], help="head dims (64 72)")
    parser.add_argument("--lengths", type=int, nargs="*", default=LENGTHS, help=f"equal segments, divisors of {ROWS}")
    parser.add_argument("--workloads", nargs="*", default=WORKLOADS, help=f"({' '.join(WORKLOADS)})")
    args = parser.parse_args()
    torch.cuda.set_stream(torch.cuda.Stream())
    rows = Rows("attention", torch.cuda.get_device_name())
    peak, bandwidth = ceilings()
    rows.add("cublas", "matmul8192", "forward", "bfloat16", "tflops", peak, "TFLOP/s")
    rows.add("copy", "copy2GiB", "forward", "bfloat16", "bandwidth", bandwidth, "TB/s")
    print(f"{torch.cuda.get_device_name()}: matmul {peak:.0f} TFLOP/s, copy {bandwidth:.2f} TB/s")
    path = args.out or Path(__file__).parent / "results" / f"attention_{card_name()}.csv"
    for head_dim in args.head_dims:
        packs = {f"len{length}": [length] * (ROWS // length) for length in args.lengths}
        packs |= {workload: make_layout(grids(workload)).lengths for workload in args.workloads}
        for name, lengths in packs.items():
            run(rows, f"{name}_k{head_dim}", head_dim, lengths, peak, bandwidth)
            rows.write(path)  # a run may be stopped
    print(f"{len(rows.rows)} rows -> {path}")


if __name__ == "__main__":
    main()
