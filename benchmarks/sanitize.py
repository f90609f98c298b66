"""Runs own kernels on small shapes, for compute-sanitizer; see sanitize.sh.

python benchmarks/sanitize.py GROUP [--dry]       a line a case: "DONE name error ..."; exit 1 where a result is wrong
python benchmarks/sanitize.py --summary FOLDER    of the logs TOOL.GROUP.log there
--dry: on the CPU in Triton's interpreter (float16), the groups that have no Hopper kernel
"""

import collections
import importlib
import os
import re
import sys
import time
from pathlib import Path

DRY = "--dry" in sys.argv
if DRY:
    os.environ["TRITON_INTERPRET"] = "1"

KERNELS = (
    "forward_kernel", "backward_", "product_kernel", "mlp_kernel", "pool_kernel", "positions_kernel",
    "table_gradient_kernel", "weights_kernel", "first_kernel", "second_kernel", "fold_kernel", "quantize_kernel",
    "partial_sums_kernel", "transpose_kernel", "begin_kernel", "store_kernel", "planted_kernel",
)  # fmt: skip
LENGTHS = [1, 5, 64, 65, 200, 300]
GROUPS = ("hopper64f", "hopper64b", "hopper72f", "hopper72b", "triton64", "triton72", "products", "rest")
if "--kernels" in sys.argv:
    print(*KERNELS)
    sys.exit()
if "--groups" in sys.argv:
    print(*GROUPS)
    sys.exit()


HEAD = re.compile(
    r"^=========\s+(Invalid .*|Error: .*|Warning: .*|Barrier error.*|.*[Rr]ace reported.*|Program hit .*|"
    r".*[Mm]isaligned.*|.*wgmma.*|Unused.*)"
)
PLACE = re.compile(r"(?:at|access at) (?:.*::)?(\w+)(?:\(.*?\))?\+0x")


def summary(folder):
    """A line a log; then the first two reports of every tool, whole."""
    whole = collections.defaultdict(list)
    logs = sorted(Path(folder).glob("*.log"))
    table = collections.defaultdict(lambda: [0, 0, 0, 0, collections.Counter()])
    for log in logs:
        tool, group = log.name.split(".")[:2]
        lines = log.read_text(errors="replace").splitlines()
        done = sum(line.startswith("DONE") for line in lines)
        wrong = [line for line in lines if line.startswith("WRONG") or "Traceback" in line]
        ended = next((line for line in lines if line.startswith("END")), "")
        said = [line.strip("= ") for line in lines if "SUMMARY" in line]
        reports, kernels = [], collections.Counter()
        for i, line in enumerate(lines):
            if HEAD.match(line) and "SUMMARY" not in line and "Target application" not in line:
                end = i + 1
                while end < len(lines) and lines[end].startswith("=========  ") and end < i + 14:
                    end += 1
                text = lines[i:end]
                reports.append("\n".join(text))
                kernels.update(set(PLACE.findall("\n".join(text))) or {"(host)"})
        if tool != "plain" and group != "planted":
            whole[tool] += [f"{group}: {x}" for x in reports[:1]]
            row = table[tool]
            row[0] += done
            row[1] += len(reports)
            row[2] += not ended
            row[3] += len(wrong)
            row[4] += kernels
        state = "to the end" if ended else "NOT TO THE END"
        print(
            f"{tool:10} {group:10} {done:3} cases, {state}, {len(wrong)} wrong; "
            f"{len(reports)} reports {dict(kernels)}; {' | '.join(said)} {ended}"
        )
        for line in wrong[:3]:
            print("   ", line[:300])
        if not ended:
            print("   last:", *[line[:200] for line in lines[-3:]], sep="\n      ")
    for tool, reports in whole.items():
        for text in reports[:2]:
            print(f"--- {tool} {text}")
    for tool, (done, reports, cut, wrong, kernels) in table.items():
        print(
            f"TOOL {tool}: {done} cases, {reports} reports, in {dict(kernels) or 'no kernel'}; "
            f"{cut} groups cut off, {wrong} wrong"
        )


if "--summary" in sys.argv:
    summary(sys.argv[sys.argv.index("--summary") + 1])
    sys.exit()

import torch

from siglip2_packed.ops import survey
from siglip2_packed.ops.attention import eager, kernels, low_order
from siglip2_packed.ops.patches import CUT
from siglip2_packed.ops.runtime import check, choice
from siglip2_packed.ops.segments import cumulative

DEVICE, DTYPE = (torch.device("cpu"), torch.float16) if DRY else (torch.device("cuda"), torch.bfloat16)
H, BEYOND, MULTIPROCESSORS = 2, 3, 2
START = time.monotonic()
failed = []


def say(name, verdict):
    right = verdict.right if isinstance(verdict, check.Verdict) else verdict[0] <= verdict[1]
    print("DONE" if right else "WRONG", name, str(verdict), f"{time.monotonic() - START:.1f} s", flush=True)
    if not right:
        failed.append(name)


def few_blocks():
    """Few thread blocks stay resident, so that each takes many items: pipelines go round."""
    for name in ("attention.hopper_forward", "attention.hopper_backward", "attention.hopper_one_pass", "linear.hopper",
                 "mlp.hopper", "norm.triton", "mlp.triton", "columns.triton"):  # fmt: skip
        try:
            module = importlib.import_module(f"siglip2_packed.ops.{name}")
        except Exception as error:
            print("NOT HERE", name, str(error)[:100])
            continue
        module.multiprocessors = lambda device: MULTIPROCESSORS


def results(direction, launches, K, low, packed, lengths, beyond, dtype):
    """Own results, each tensor an allocation of its own: what lies beside is nobody's."""
    T, scale = sum(lengths) + beyond, K**-0.5
    cu, longest = cumulative(lengths).to(DEVICE), max(lengths)
    qkv = check.random(DEVICE, dtype, T, 3, H, K)
    grad = check.random(DEVICE, dtype, T, H, K, seed=1)
    if beyond:
        qkv[-beyond:] = grad[-beyond:] = float("nan")
    separate = [x.contiguous() for x in qkv.unbind(1)]
    q, k, v = qkv.unbind(1) if packed else separate
    exact = [x.double() for x in separate]
    out64, lse64 = (
        torch.empty(T, H, K, dtype=torch.float64, device=DEVICE),
        torch.empty(H, T, dtype=torch.float64, device=DEVICE),
    )
    eager.forward(*exact, out64, None, lse64, cu, longest, scale)
    rows = T - beyond
    if direction == "forward":
        out = torch.full((T, H, K), float("nan"), dtype=dtype, device=DEVICE)
        kept = low_order.empty_like(out) if low else None
        lse = torch.full((H, T), float("nan"), device=DEVICE)
        kernels.implementation("forward", launches)(launches[1], q, k, v, out, kept, lse, cu, longest, scale)
        restored = out.float() if kept is None else low_order.restored(out, kept)
        return [(out, out64), (lse[:, :rows], lse64[:, :rows]), (restored[:rows], out64[:rows])]
    out = out64.to(dtype)
    kept = low_order.of(out64.float(), out) if low else None
    dqkv = torch.full((T, 3, H, K) if packed else (3, T, H, K), float("nan"), dtype=dtype, device=DEVICE)
    grads = dqkv.unbind(1 if packed else 0)
    kernels.implementation("backward", launches)(
        launches[1], grad, q, k, v, out, kept, lse64.float(), *grads, cu, longest, scale
    )
    exact_grads = [torch.full((T, H, K), float("nan"), dtype=torch.float64, device=DEVICE) for _ in range(3)]
    eager.backward(grad.double(), *exact, out64, None, lse64, *exact_grads, cu, longest, scale)
    return list(zip(grads, exact_grads))


def attention(direction, launches, K, lows):
    for low in lows:
        for packed in (True, False):
            packs = [(LENGTHS, BEYOND), ([300, 0, 1, 65] * 2, 0), *[([n], 0) for n in LENGTHS]]
            longest = (
                launches[1].N if launches[0] == "triton_short" or getattr(launches[1], "single", False) else 1 << 30
            )
            packs = [([n for n in lengths if n <= longest], beyond) for lengths, beyond in packs]
            if DRY:
                packs = packs[:1]
            worst = 0.0
            for lengths, beyond in packs:
                if not lengths or (len(lengths) > 1 and not packed and beyond == 0):
                    continue
                for mine, exact in results(direction, launches, K, low, packed, lengths, beyond, DTYPE):
                    size = exact.norm().item() if max(lengths) > 1 else max(exact.norm().item(), 1.0)
                    worst = max(worst, (mine.double() - exact).norm().item() / size) if size else worst
            say(f"{direction} {launches} K={K} low={low} packed={packed}", (worst, 2e-2))
    if not DRY:  # the self-check's own cases
        for low in lows if direction == "forward" else [False]:
            say(f"self-check {direction} {launches} K={K} low={low}",
                kernels.verdict_on(direction, launches, DEVICE, DTYPE, H, K, True, low))  # fmt: skip


def of_functions(names, D, F):
    shape = survey.Shape(D, F, H, 4)
    for function, sizes in survey._functions(shape):
        if function.name.split(".")[0] not in names:
            continue
        for implementation in function.modules:
            if implementation == "eager" or (DRY and implementation not in ("triton",)):
                continue
            if reason := function.missing(implementation):
                print("NOT HERE", function.name, implementation, reason[:100])
                continue
            say(f"{function.name} {implementation} {sizes}", function.verdict(implementation, DEVICE, DTYPE, sizes))


def planted():
    """One fault for each tool, which must be found."""
    import triton
    import triton.language as tl

    global planted_kernel

    @triton.jit
    def planted_kernel(x, N: tl.constexpr):
        tl.store(x + tl.arange(0, N), 1.0)

    planted_kernel[(1,)](torch.empty(1000, device=DEVICE), 1024)
    torch.cuda.synchronize()


PLANTED = r"""
extern "C" __global__ void planted_kernel(int* out) {
    __shared__ int s[64];
    s[threadIdx.x] = threadIdx.x;
    out[threadIdx.x] = s[63 - threadIdx.x];
    if (threadIdx.x < 16) __syncthreads();
}
"""


def planted_in_cuda():
    import cupy

    cupy.RawKernel(PLANTED, "planted_kernel")((1,), (64,), (cupy.zeros(64, dtype=cupy.int32),))
    cupy.cuda.Device().synchronize()


def main():
    group = next(x for x in sys.argv[1:] if not x.startswith("-"))
    torch.manual_seed(0)
    if group == "planted":
        for run in (planted_in_cuda, planted):
            try:
                run()
            except Exception as error:
                print(run.__name__, type(error).__name__, str(error)[:200])
        return
    few_blocks()
    card = choice.Card("cuda", 90, MULTIPROCESSORS) if not DRY else choice.Card("cpu", 0, MULTIPROCESSORS)
    with choice.forced(card=card):
        if group.startswith("hopper"):
            K, direction = int(group[6:8]), {"f": "forward", "b": "backward"}[group[8]]
            launches = [("hopper", 2), ("hopper", 3), *[("hopper_one_pass", 2)] * (direction == "backward")]
            for launch in launches:
                attention(direction, launch, K, (True, False))
        elif group.startswith("triton"):
            K, hopper = int(group[6:]), choice.Card("cuda", 90, 132)
            seen = {}
            for T, longest in ((64, 64), (128, 128), (512, 256), (40, 30), (16384, 300)):
                for direction in ("forward", "backward"):
                    rule = (T, 16, K, longest) if direction == "forward" else (T, 8, 16, K, longest)
                    for launches in getattr(choice, f"attention_{direction}")(hopper, DTYPE, *rule):
                        if not launches[0].startswith("hopper"):
                            seen[direction, launches] = None
            for direction, launches in list(seen)[: 2 if DRY else None]:
                attention(direction, launches, K, (True, False) if launches[0] == "triton" else (False,))
        elif group == "products":
            for D, F in ((144, 272), (128, 512)):
                of_functions(("linear", "mlp"), D, F)
        else:
            for D, F in ((144, 272), (128, 512)):
                of_functions(("norm", "columns", "pool", "positions", *(() if DRY else ("float8",))), D, F)
            from siglip2_packed.ops.columns import triton as columns

            x = check.random(DEVICE, DTYPE, 37, 72)
            say("columns.transposed", ((columns.transposed(x) - x.mT).abs().max().item(), 0.0))
            for mode in ("bilinear", "bicubic"):
                say(f"patches.cut {mode}", CUT.verdict("triton", DEVICE, torch.uint8, (16, mode)))
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    print(f"END {group} {len(failed)} wrong, {time.monotonic() - START:.1f} s", flush=True)
    sys.exit(bool(failed))


main()
