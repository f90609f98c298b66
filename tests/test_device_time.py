"""Where a step's time goes: what overlaps, who waits, and that ranks are compared step by step."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import device_time

MARK = "void at::cuda::spin_kernel(long)"
GATHER, REDUCE = "ncclDevKernel_AllGather_RING_LL(args)", "ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(args)"


def rank(*kernels, steps=((0, 0), (100, 100))):
    return sorted([*((MARK, begin, end) for begin, end in steps), *kernels], key=lambda kernel: kernel[1])


def test_each_moment_is_one_thing():
    early = rank(("gemm", 0, 20), (GATHER, 10, 60), ("gemm", 40, 50), ("copy", 45, 70))
    late = rank(("gemm", 0, 40), (GATHER, 40, 60), ("gemm", 50, 80))
    found = device_time.of_ranks([early, late])
    # the gather takes 20 ms; the early rank is there 30 before, 10 of which compute
    expected = {
        "step": [100, 100],
        "compute": [20 + 30, 40 + 30],
        "transfer": [0, 10],
        "wait": [20, 0],
        "idle": [30, 20],
        "nccl": [50, 20],
    }
    assert {name: values[:, 0].tolist() for name, values in found.items()} == expected
    assert device_time.balance(found).tolist() == [70 / 60]
    assert "rank " in device_time.table(found) and "1.1667" in device_time.table(found)


def test_what_reaches_over_a_step_counts_in_both():
    steps = (0, 0), (10, 10), (30, 30)
    found = device_time.of_ranks([rank((REDUCE, 5, 15), (GATHER, 20, 22), ("gemm", 21, 30), steps=steps)])
    assert found["transfer"].tolist() == [[5, 6]] and found["idle"].tolist() == [[5, 5]]
    assert found["compute"].tolist() == [[0, 9]] and found["wait"].tolist() == [[0, 0]]


def test_parts_of_a_step_add_up_to_it():
    rng = np.random.default_rng(0)

    def kernels(names):
        begins = rng.uniform(0, 95, len(names))
        return [(name, begin, begin + rng.uniform(0, 9)) for name, begin in zip(names, begins)]

    found = device_time.of_ranks([rank(*kernels([GATHER, REDUCE] * 9 + ["gemm"] * 12)) for _ in range(3)])
    parts = sum(found[name] for name in ("compute", "transfer", "wait", "idle"))
    np.testing.assert_allclose(parts, found["step"])
    assert found["step"].shape == (3, 1) and all((values >= 0).all() for values in found.values())
    assert (found["transfer"] + found["wait"] <= found["nccl"] + 1e-9).all()


def test_ranks_that_do_not_go_together():
    with pytest.raises(ValueError, match=r"transfers of ranks: \[1, 0\]"):
        device_time.of_ranks([rank((GATHER, 1, 2)), rank()])
    with pytest.raises(ValueError, match="different kinds"):
        device_time.of_ranks([rank((GATHER, 1, 2)), rank((REDUCE, 1, 2))])
    with pytest.raises(ValueError, match=r"marks of ranks: \[1, 1\]"):
        device_time.of_ranks([rank(steps=((0, 0),))] * 2)


def test_disjoint_intervals():
    found = device_time.union([(5, 6), (0, 2), (1, 3), (3, 4), (0.5, 0.6)])
    assert found.tolist() == [[0, 4], [5, 6]]
    assert device_time.union([]).shape == (0, 2) and device_time.within(device_time.union([]), 0, 1) == 0
    assert device_time.within(found, 3.5, 5.25) == 0.75
