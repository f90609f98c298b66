"""Sums and products over rows, every implementation against float64; Triton's interpreted on CPU."""

import pytest
import torch
from implementations import BOUND, DEVICES, DTYPES, IN_DTYPES, NAMES, SHAPES, draw

from siglip2_packed.measure import relative_error
from siglip2_packed.ops import columns
from siglip2_packed.ops.columns import triton as kernels
from siglip2_packed.ops.runtime.fold import fold

pytestmark = pytest.mark.usefixtures("poisoned")


def functions(name):
    return [function.of(name) for function in columns.FUNCTIONS]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "dtype"), IN_DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (70, 1000), (300, 130)])
def test_sums(name, dtype, shape, device):
    column_sums, _ = functions(name)
    (x,) = draw(device, dtype, shape)
    sums = column_sums(x)
    assert sums.dtype == dtype and relative_error(sums, x.double().sum(0)) <= BOUND[dtype]
    wide = torch.cat((x, x), 1)
    of_a_part = column_sums(wide[:, : shape[1]])
    assert torch.equal(of_a_part, sums) if name == "triton" else relative_error(of_a_part, sums) <= BOUND[dtype]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "dtype"), IN_DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 37, 300])
def test_gradients_of_weights_and_biases(name, dtype, rows, device):
    column_sums, product_over_rows = functions(name)
    a, b = draw(device, dtype, (rows, 200), (rows, 72))
    product, sums = product_over_rows(a, b), column_sums(a)
    assert product.shape == (200, 72) and product.is_contiguous() and product.dtype == sums.dtype == dtype
    for result, exact in ((product, a.double().t() @ b.double()), (sums, a.double().sum(0))):
        assert (result - exact).norm() <= BOUND[dtype] * exact.norm()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
def test_rows_wider_than_the_device_has_programs_for(name, device):
    column_sums, _ = functions(name)
    (x,) = draw(device, torch.float32, (20, 5000))
    assert relative_error(column_sums(x), x.double().sum(0)) <= BOUND[torch.float32]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (70, 1000), (300, 130), (0, 72)])
def test_a_transposed_copy(shape, dtype, device):
    (x,) = draw(device, dtype, shape)
    out = kernels.transposed(x)
    assert out.is_contiguous() and torch.equal(out, x.t())
    wide = torch.cat((x, x), 1)
    assert torch.equal(kernels.transposed(wide[:, : shape[1]]), out)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("groups", [1, 128, 129, 300])
def test_fold_adds_any_number_of_partial_sums(groups, device):
    (sums,) = draw(device, torch.float32, (groups, 33))
    assert relative_error(fold(sums, torch.float32), sums.double().sum(0)) <= BOUND[torch.float32]
