"""Positions: antialiased bilinear resize of the table, exact, differentiable, without a loop over images."""

import functools

import pytest
import torch
import torch.nn.functional as F
from implementations import DEVICES, IN_DTYPES, INTERPRETED, NAMES, draw
from torch.utils.flop_counter import FlopCounterMode

import kernels_ref
from siglip2_packed import Siglip2PackedVisionModel
from siglip2_packed.measure import relative_error
from siglip2_packed.ops import positions
from siglip2_packed.ops.positions import ADD_POSITIONS, Places, add_positions, eager
from siglip2_packed.ops.positions import triton as kernels
from siglip2_packed.ops.positions.eager import resize_positions
from siglip2_packed.ops.runtime.check import Refused

MODES = list(eager.WEIGHTS)
GRIDS = [(13, 19), (19, 13), (8, 32), (1, 256), (256, 1), (7, 1), (1, 1), (24, 42), (16, 16), (3, 5), (15, 17)]


def table(side=16, dim=24, seed=0, dtype=torch.float32):
    return torch.randn(side * side, dim, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("grid", GRIDS)
def test_one_grid_matches_the_reference(grid):
    expected = kernels_ref.resize_positions(table(dtype=torch.float64), *grid)
    torch.testing.assert_close(resize_positions(table(), [(1, *grid)]).double(), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("grid", [grid for grid in GRIDS if min(grid) > 1])
def test_one_grid_matches_interpolate(grid):
    square = table(dtype=torch.float64).view(1, 16, 16, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(square, size=grid, mode="bilinear", align_corners=False, antialias=True)
    expected = resized[0].permute(1, 2, 0).flatten(0, 1)
    torch.testing.assert_close(resize_positions(table(), [(1, *grid)]).double(), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("side", [1, 2, 7, 16, 27])
@pytest.mark.parametrize("grid", [*GRIDS, (1, 40), (40, 61)])
def test_bicubic_is_interpolates(grid, side):
    square = table(side, dtype=torch.float64).view(1, side, side, -1).permute(0, 3, 1, 2)
    expected = F.interpolate(square, size=grid, mode="bicubic", align_corners=False)[0].permute(1, 2, 0).flatten(0, 1)
    found = resize_positions(table(side), [(1, *grid)], mode="bicubic")
    torch.testing.assert_close(found.double(), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("side", [1, 4, 7, 16, 26, 32])
@pytest.mark.parametrize("grid", [*GRIDS, (1, 40), (40, 64), (26, 13)])
def test_buckets_are_those_of_fractions(grid, side):
    """Each row and column one by one, as fractions without rounding."""
    rows, columns = ([next(b for b in range(side) if (b + 1) * n > i * side) for i in range(n)] for n in grid)
    expected = torch.stack([table(side)[r * side + c] for r in rows for c in columns])
    assert torch.equal(resize_positions(table(side), [(1, *grid)], mode="bucketed"), expected)


def test_swapped_sides_differ():
    a, b = resize_positions(table(), [(1, 13, 19)]), resize_positions(table(), [(1, 19, 13)])
    assert (a - b).abs().max() > 0.1


@pytest.mark.parametrize("mode", MODES)
def test_identity_is_bit_exact_at_the_tables_own_size(mode):
    for side in (1, 2, 16, 27):
        assert torch.equal(resize_positions(table(side), [(1, side, side)], mode=mode), table(side))


@pytest.mark.parametrize("mode", MODES)
def test_a_pack_is_its_images_in_order_and_frames_share_positions(mode):
    grids = [(1, 13, 19), (2, 3, 5), (1, 16, 16), (1, 3, 5), (1, 13, 19), (3, 1, 9)]
    alone = [resize_positions(table(), [(1, h, w)], mode=mode) for t, h, w in grids for _ in range(t)]
    assert torch.equal(resize_positions(table(), grids, mode=mode), torch.cat(alone))


@pytest.mark.parametrize("mode", MODES)
def test_the_resize_is_linear_and_its_gradient_the_transpose(mode):
    grids = [(1, 13, 19), (1, 8, 32), (2, 3, 5), (1, 1, 40), (1, 7, 1), (1, 24, 31)]
    weight = table().requires_grad_()
    out = resize_positions(weight, grids, mode=mode)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (found,) = torch.autograd.grad(out, weight, grad)
    matrix = resize_positions(torch.eye(256), grids, mode=mode).double()  # [T, G·G]
    assert relative_error(out, matrix @ table(dtype=torch.float64)) <= 1e-6
    assert relative_error(found, matrix.T @ grad.double()) <= 1e-6


def test_gradient_of_the_table_matches_the_reference():
    grids = [(1, 13, 19), (1, 8, 32), (2, 3, 5), (1, 1, 256), (1, 7, 1)]
    ours, ref = table().requires_grad_(), table(dtype=torch.float64).requires_grad_()
    out = resize_positions(ours, grids)
    expected = torch.cat([kernels_ref.resize_positions(ref, h, w) for t, h, w in grids for _ in range(t)])
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    out.backward(grad)
    expected.backward(grad.double())
    assert (ours.grad.double() - ref.grad).norm() / ref.grad.norm() < 1e-6


def test_computed_in_float32_whatever_the_tables_dtype():
    low = table(dtype=torch.bfloat16)
    out = resize_positions(low, [(1, 13, 19)])
    assert out.dtype == torch.float32
    assert torch.equal(out, resize_positions(low.float(), [(1, 13, 19)]))


def test_empty_pack_stays_attached():
    weight = table().requires_grad_()
    out = resize_positions(weight, [])
    assert out.shape == (0, 24)
    out.sum().backward()
    assert weight.grad.abs().sum() == 0


def test_work_follows_distinct_grids(monkeypatch):
    """1000 images of two sizes: the sums are computed for two."""
    rows = []
    weighted_sums = eager._weighted_sums
    monkeypatch.setattr(eager, "_weighted_sums", lambda t, p: rows.append(len(p.offsets)) or weighted_sums(t, p))
    resize_positions(table(), [(1, 3, 5), (1, 5, 4)] * 500)
    assert rows == [3 + 5, 15 + 20]


# Added to the patches, by every implementation

PACK = [(1, 13, 19), (1, 8, 32), (2, 2, 3), (1, 16, 16), (1, 7, 1), (1, 1, 20), (1, 40, 2)]
IDENTITY = slice(13 * 19 + 256 + 12, 13 * 19 + 512 + 12)
FEW = [(1, 5, 3), (2, 2, 7), (1, 4, 4), (1, 1, 6), (1, 9, 1)]  # of a table of 4x4
FEW_ROWS = sum(t * h * w for t, h, w in FEW)
ADD_BOUND = {torch.float64: 1e-6, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # resized in float32


def exactly(x, table, grids):
    exact = table.double().cpu()
    resized = torch.cat([kernels_ref.resize_positions(exact, h, w) for t, h, w in grids for _ in range(t)])
    return x.double() + resized.to(x.device)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "dtype"), IN_DTYPES)
def test_added_to_patches(name, dtype, device):
    x, table = draw(device, dtype, (FEW_ROWS, 72), (16, 72))
    out = ADD_POSITIONS.of(name)(x, table, Places(FEW), dtype)
    assert out.dtype == dtype and relative_error(out, exactly(x, table, FEW)) <= ADD_BOUND[dtype]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("D", [72, pytest.param(1152, marks=pytest.mark.gpu)])
def test_added_to_the_patches_of_a_pack(name, D, device):
    x, table = draw(device, torch.float32, (sum(t * h * w for t, h, w in PACK), D), (256, D))
    out = ADD_POSITIONS.of(name)(x, table, Places(PACK), torch.float32)
    assert (out - exactly(x, table, PACK)).abs().max() <= 1e-5
    assert torch.equal(out[IDENTITY], x[IDENTITY] + table)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
def test_no_patches_and_strided_ones(name, device):
    add = functools.partial(ADD_POSITIONS.of(name), dtype=torch.float32)
    x, table = draw(device, torch.float32, (FEW_ROWS, 72), (16, 72))
    assert add(x[:0], table, Places([])).shape == (0, 72)
    expected = add(x, table, Places(FEW))
    assert torch.equal(add(torch.cat((x, x), 1)[:, 72:], table, Places(FEW)), expected)
    assert torch.equal(add(x, torch.cat((table, table), 1)[:, 72:], Places(FEW)), expected)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("device", DEVICES)
def test_rows_of_no_image_become_zeros_where_only_the_device_knows(device):
    """As a CUDA graph's buffers have them: nothing of them reaches the rows of images, whatever they hold."""
    x, table = draw(device, torch.float32, (FEW_ROWS + 3, 72), (16, 72))
    x[FEW_ROWS:] = float("nan")
    images, image_of_row = Places(FEW).on(torch.device(device))
    places = Places.on_device(images, F.pad(image_of_row, (0, 3), value=-1))
    out = ADD_POSITIONS.of("triton")(x, table, places, torch.float32)
    assert (out[:FEW_ROWS] - exactly(x[:FEW_ROWS], table, FEW)).abs().max() <= 1e-5
    assert (out[FEW_ROWS:] == 0).all()
    with pytest.raises(Refused, match="only the device knows"):
        ADD_POSITIONS.of("eager")(x, table, places, torch.float32)


def test_places_of_rows():
    images, image_of_row = Places([(2, 1, 2), (1, 3, 1)]).on(torch.device("cpu"))
    assert images.tolist() == [[0, 2, 1, 2], [4, 1, 3, 1]] and image_of_row.tolist() == [0] * 4 + [1] * 3
    assert images.dtype == image_of_row.dtype == torch.int32
    assert [x.shape for x in Places([]).on(torch.device("cpu"))] == [(0, 4), (0,)]


@INTERPRETED
def test_a_kernel_adds_what_nobody_follows(trusted, monkeypatch):
    """Modes, transforms, rows out of order and a stream of another dtype are the torch path's, whatever is forced."""
    trusted(positions=["triton"])
    kernel = positions.ADD_POSITIONS.of("triton")
    ran, grids = [], [(1, 3, 4)]
    monkeypatch.setattr(
        "siglip2_packed.ops.positions.triton.add_positions", lambda *x: ran.append(len(x[0])) or kernel(*x)
    )
    x, weight = draw("cpu", torch.float32, (12, 8), (16, 8))
    expected = eager.add_positions(x, weight, Places(grids), torch.float32)

    def calls(*given, dtype=torch.float32):
        ran.clear()
        assert relative_error(add_positions(*given, dtype).float(), expected) <= 1e-2  # the `expected` of then
        return ran.count(12)

    with torch.no_grad():
        assert calls(x, weight, Places(grids)) == 1
        assert calls(x, weight, Places(grids, torch.arange(12))) == 0
        for mode in ("bicubic", "bucketed"):
            expected = eager.add_positions(x, weight, Places(grids, mode=mode), torch.float32)
            assert calls(x, weight, Places(grids, mode=mode)) == 0
            with pytest.raises(Refused, match=f"does not compute {mode} positions"):
                kernel(x, weight, Places(grids, mode=mode), torch.float32)
        expected = eager.add_positions(x, weight, Places(grids), torch.float32)
        assert calls(x, weight.bfloat16(), Places(grids)) == 0
        assert calls(x, weight, Places(grids), dtype=torch.bfloat16) == 0
        assert calls(x.bfloat16(), weight, Places(grids)) == 0
        with FlopCounterMode(display=False):
            assert calls(x, weight, Places(grids)) == 0
    assert calls(x, weight, Places(grids)) == 1
    ran.clear()
    torch.func.grad(lambda x: add_positions(x, weight, Places(grids), torch.float32).sum())(x)
    assert not ran


# Their gradients, by every implementation

GRADIENT_BOUND = ADD_BOUND | {torch.float16: 5e-4, torch.bfloat16: 4e-3}  # summed in float32, rounded once


def exact_gradient(grad, entries, grids):
    """Of the table, in float64."""
    table = torch.zeros(entries, grad.shape[1], dtype=torch.float64, requires_grad=True)
    resized = [kernels_ref.resize_positions(table, h, w) for t, h, w in grids for _ in range(t)]
    return torch.autograd.grad(torch.cat(resized), table, grad.double().cpu())[0].to(grad.device)


def differentiable(device, dtype, rows, entries, columns):
    """Patches and table, both learning, and the gradient of their sum."""
    x, table, grad = draw(device, dtype, (rows, columns), (entries, columns), (rows, columns))
    return x.requires_grad_(), table.requires_grad_(), grad


def padded(grids, images, rows, device):
    """Places of a pack within buffers of more images and rows, as a CUDA graph's: those that are unused lie last."""
    known, image_of_row = Places(grids).on(torch.device(device))
    image_of_row = F.pad(image_of_row, (0, rows - len(image_of_row)), value=-1)
    return Places.on_device(F.pad(known, (0, 0, 0, images - len(known))), image_of_row)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "dtype"), IN_DTYPES)
def test_gradients(name, dtype, device):
    x, table, grad = differentiable(device, dtype, FEW_ROWS, 16, 72)
    out = ADD_POSITIONS.of(name)(x, table, Places(FEW), dtype)
    dx, dtable = torch.autograd.grad(out, (x, table), grad)
    assert torch.equal(dx, grad) and dtable.dtype == dtype
    assert relative_error(dtable, exact_gradient(grad, 16, FEW)) <= GRADIENT_BOUND[dtype]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("side", "D"), [(3, 200), *[pytest.param(16, D, marks=pytest.mark.gpu) for D in (72, 768, 1152)]]
)
def test_gradient_of_the_table_of_a_pack(side, D, device):
    """Every entry, also at the table's edges: of larger images, smaller ones, sides of 1, and frames."""
    grids = [*PACK, (1, 1, 256), (1, 256, 1), (3, 2, 5)]
    (grad,) = draw(device, torch.float32, (sum(t * h * w for t, h, w in grids), D))
    images, _ = Places(grids).on(torch.device(device))
    dtable = kernels.table_gradient(grad, images, side * side)
    exact = exact_gradient(grad, side * side, grids)
    assert ((dtable - exact).norm(dim=1) <= 1e-6 * exact.norm(dim=1)).all()  # NaN fails


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("device", DEVICES)
def test_nothing_of_rows_of_no_image_reaches_a_gradient(device):
    """Nor do images without rows change one bit."""
    rows = FEW_ROWS + 5
    x, table, grad = differentiable(device, torch.float32, rows, 16, 72)
    expected = kernels.table_gradient(grad[:FEW_ROWS], Places(FEW).on(torch.device(device))[0], 16)
    grad[FEW_ROWS:] = float("nan")
    for images in (5, 8, 13):
        out = ADD_POSITIONS.of("triton")(x, table, padded(FEW, images, rows, device), torch.float32)
        dx, dtable = torch.autograd.grad(out, (x, table), grad)
        assert torch.equal(dtable, expected)
        assert torch.equal(dx[:FEW_ROWS], grad[:FEW_ROWS]) and (dx[FEW_ROWS:] == 0).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("of_patches", "of_table", "dtype"),
    [
        (torch.float16, torch.float32, torch.float32),  # autocast
        (torch.float32, torch.float16, torch.float32),
        (torch.float16, torch.float32, torch.float16),
    ],
)
def test_dtypes_that_differ_where_only_the_device_knows_the_grids(trusted, device, of_patches, of_table, dtype):
    trusted(positions=["triton"])
    rows = FEW_ROWS + 5
    x, table, grad = differentiable(device, torch.float32, rows, 16, 72)
    x, table = x.detach().to(of_patches).requires_grad_(), table.detach().to(of_table).requires_grad_()
    expected = ADD_POSITIONS.of("eager")(x[:FEW_ROWS], table, Places(FEW), dtype)
    grad = grad.to(expected.dtype)
    expected_grads = torch.autograd.grad(expected, (x, table), grad[:FEW_ROWS])
    out = add_positions(x, table, padded(FEW, 8, rows, device), dtype)
    grad[FEW_ROWS:] = 0
    grads = torch.autograd.grad(out, (x, table), grad)
    assert out.dtype == expected.dtype and relative_error(out[:FEW_ROWS], expected) <= 1e-3
    for found, wanted in zip(grads, expected_grads):
        assert found.dtype == wanted.dtype and relative_error(found, wanted) <= 1e-3


@pytest.mark.parametrize("device", DEVICES)
def test_only_gradients_that_are_asked_for(device, monkeypatch):
    made, gradient = [], kernels.table_gradient
    monkeypatch.setattr(kernels, "table_gradient", lambda *args: made.append(1) or gradient(*args))
    x, table, grad = differentiable(device, torch.float32, FEW_ROWS, 16, 72)
    add = functools.partial(ADD_POSITIONS.of("triton"), places=Places(FEW), dtype=torch.float32)
    add(x, table.detach()).backward(grad)
    assert torch.equal(x.grad, grad) and not made
    add(x.detach(), table).backward(grad)
    assert torch.equal(x.grad, grad) and made and relative_error(table.grad, exact_gradient(grad, 16, FEW)) <= 1e-6
    assert not add(x.detach(), table.detach()).requires_grad


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_in_any_form(device):
    """Expanded or strided; for an empty pack, which stays attached."""
    x, table, grad = differentiable(device, torch.float32, FEW_ROWS, 16, 72)
    add = ADD_POSITIONS.of("triton")
    out = add(x, table, Places(FEW), torch.float32)
    for given in (grad[:, :1].expand(-1, 72), torch.cat((grad, grad), 1)[:, 72:]):
        _, dtable = torch.autograd.grad(out, (x, table), given, retain_graph=True)
        assert relative_error(dtable, exact_gradient(given, 16, FEW)) <= 1e-6
    add(x[:0], table, Places([]), torch.float32).sum().backward()
    assert (table.grad == 0).all() and (x.grad == 0).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [FEW_ROWS, FEW_ROWS + 5])
def test_a_batch_of_gradients_and_one_that_is_followed(rows, device):
    x, table, grad = differentiable(device, torch.float32, rows, 16, 72)
    places = Places(FEW) if rows == FEW_ROWS else padded(FEW, 8, rows, device)
    out = ADD_POSITIONS.of("triton")(x, table, places, torch.float32)
    gradients = functools.partial(torch.autograd.grad, out, (x, table), retain_graph=True)
    grads = torch.stack((grad, 2 * grad - 1))
    one_by_one = [torch.stack(both) for both in zip(*map(gradients, grads))]
    for batched, single in zip(gradients(grads, is_grads_batched=True), one_by_one):
        assert torch.equal(batched, single)
    with FlopCounterMode(display=False):
        for followed, single in zip(gradients(grad), one_by_one):
            assert torch.equal(followed, single[0])


@pytest.mark.parametrize("device", DEVICES)
def test_second_derivatives_are_refused(device):
    x, table, _ = differentiable(device, torch.float32, FEW_ROWS, 16, 72)
    out = ADD_POSITIONS.of("triton")(x, table, Places(FEW), torch.float32)
    (dtable,) = torch.autograd.grad(out.square().sum(), table, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        dtable.square().sum().backward()


@pytest.mark.gpu
def test_a_captured_step_serves_other_packs():
    """Neither forward nor backward copies anything from the host."""
    rows, images, device = 200, 8, torch.device("cuda")
    x, table, grad = differentiable(device, torch.bfloat16, rows, 16, 72)
    known, image_of_row = padded(FEW, images, rows, device).on(device)

    def step():
        out = ADD_POSITIONS.of("triton")(x, table, Places.on_device(known, image_of_row), torch.bfloat16)
        return out.detach(), *torch.autograd.grad(out, (x, table), grad)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, dx, dtable = step()
    for grids in ([(1, 13, 14)], FEW, [(2, 3, 5)] * 6):
        of_pack = padded(grids, images, rows, device).on(device)
        known.copy_(of_pack[0])
        image_of_row.copy_(of_pack[1])
        graph.replay()
        total = sum(t * h * w for t, h, w in grids)
        exact = exactly(x[:total].detach(), table.detach(), grids)
        assert relative_error(out[:total], exact) <= ADD_BOUND[torch.bfloat16]
        assert torch.equal(dx[:total], grad[:total]) and (dx[total:] == 0).all() and (out[total:] == 0).all()
        assert relative_error(dtable, exact_gradient(grad[:total], 16, grids)) <= GRADIENT_BOUND[torch.bfloat16]


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize(
    ("dtype", "of_table", "autocast", "of_result"),
    [
        (torch.bfloat16, torch.float32, False, torch.bfloat16),
        (torch.float32, torch.bfloat16, False, torch.float32),
        (torch.bfloat16, torch.bfloat16, False, torch.bfloat16),
        (torch.float32, torch.float32, True, torch.float32),
        (torch.bfloat16, torch.float32, True, torch.bfloat16),
    ],
)
def test_positions_are_cast_to_the_patch_weights_dtype(
    checkpoint, patches, dtype, of_table, autocast, of_result, gradients
):
    """Resized in float32 whatever the table's dtype, rounded once, then added: the result is the weights'."""
    embeddings = Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny"), dtype=dtype).embeddings
    embeddings.position_embedding.to(of_table)
    grids = [(1, 5, 3), (2, 2, 7)]
    pixels = patches(grids)
    with torch.set_grad_enabled(gradients), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = embeddings(pixels, Places(grids))
        embedded = embeddings.patch_embedding(pixels.to(dtype))
    table = embeddings.position_embedding.weight
    expected = embedded + resize_positions(table, grids).to(embeddings.patch_embedding.weight.dtype)
    assert table.dtype == of_table and out.dtype == expected.dtype == of_result
    assert torch.equal(out, expected) and out.requires_grad == gradients
    if gradients:
        out.float().sum().backward()
        assert table.grad.dtype == of_table and table.grad.abs().sum() > 0
