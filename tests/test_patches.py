"""Images resized and cut on a device: to the pixels of Pillow, bit for bit."""

import random

import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image

from siglip2_packed import Siglip2PackedImageProcessor, card
from siglip2_packed.ops.patches import CUT, ORDERS, Turn
from siglip2_packed.ops.patches.pillow import height_first

CPU = torch.device("cpu")
MODES = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
PATCH = 4


def noise(*size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator)


def by_pillow(image, grid, mode, patch=PATCH, box=None):
    h, w = grid
    resized = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((w * patch, h * patch), MODES[mode], box)
    return rearrange(np.asarray(resized), "(h py) (w px) c -> (h w) (py px c)", py=patch, px=patch)


def box_of(image, rng):
    """Some of it, in eighths of a pixel, to its ends or nearly."""
    height, width = image.shape[1:]
    left, top = (rng.choice((0, 0.125, side / 3 // 0.125 / 8)) for side in (width, height))
    right, bottom = (side - rng.choice((0, 0.5)) for side in (width, height))
    return left, top, right, bottom


SIZES = [(13, 19), (8, 32), (1, 256), (256, 1), (1, 1), (37, 20), (20, 37), (211, 2), (2, 211), (199, 101), (101, 199)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("levels", ["noise", "black and white"])
def test_pixels_are_pillow_s(mode, levels):
    """Smaller, larger, of the same size, of one side alone; whole images and what is in a box."""
    rng = random.Random(0)
    cases = [(size, (h, w)) for size in SIZES for h, w in ((2, 3), (5, 1), (1, 9), (13, 8))]
    cases += [((rng.randint(1, 90), rng.randint(1, 90)), (rng.randint(1, 9), rng.randint(1, 9))) for _ in range(100)]
    images, grids = [noise(*size, seed=i) for i, (size, _) in enumerate(cases)], [grid for _, grid in cases]
    if levels == "black and white":  # bicubic goes beyond both
        images = [(image > 127).to(torch.uint8) * 255 for image in images]
    how, turns = (PATCH, mode, card.pillow_order(MODES[mode])), [Turn()] * len(images)
    for boxes in ([None] * len(images), [box_of(image, rng) for image in images]):
        found = CUT.of("eager")(images, turns, boxes, grids, *how)
        expected = [by_pillow(image, grid, mode, box=box) for image, box, grid in zip(images, boxes, grids)]
        assert found.dtype == torch.uint8 and np.array_equal(found.numpy(), np.concatenate(expected))


def test_the_order_is_the_installed_pillow_s(monkeypatch):
    """Another Pillow is known by its pixels; one of pixels that no order gives resizes on the host."""
    installed = tuple(map(int, Image.__version__.split(".")[:2]))
    expected = ORDERS[(installed >= (12, 2)) + (installed >= (13, 0))]
    assert {card.pillow_order(resample) for resample in MODES.values()} == {expected}
    resize = Image.Image.resize

    def by_width(self, size, resample, box):
        left, top, right, bottom = box or (0, 0, *self.size)
        one = resize(self, (size[0], self.height), resample, (left, 0, right, self.height))
        return resize(one, size, resample, (0, top, size[0], bottom))

    def tall_by_height(self, size, resample, box):
        if self.height <= 100 * self.width:
            return by_width(self, size, resample, box)
        return resize(resize(self, (self.width, size[1]), resample), size, resample)

    def another(self, size, resample, box):
        return resize(self, size, resample, box).point(lambda level: level ^ 1)

    def without_box(self, size, resample, box):
        return by_width(self, size, resample, None)

    others = {by_width: ORDERS[0], tall_by_height: ORDERS[1], another: None, without_box: None}
    for pillow, order in others.items():
        monkeypatch.setattr(Image.Image, "resize", pillow)
        card.pillow_order.cache_clear()
        assert card.pillow_order(MODES["bilinear"]) == order
        assert card.resizes_exactly(torch.device("cuda"), MODES["bilinear"]) == (order is not None)
    card.pillow_order.cache_clear()
    assert Siglip2PackedImageProcessor(do_resize=False).on_card(torch.device("cuda")) is None
    assert not card.resizes_exactly(CPU, MODES["bilinear"])
    assert not card.resizes_exactly(torch.device("cuda"), Image.Resampling.LANCZOS)


def test_orders():
    _, tall, shrinks = ORDERS
    cases = {((500, 20), (5, 2)): (shrinks,), ((501, 20), (5, 2)): (tall, shrinks), ((501, 600), (5, 2)): ()}
    cases |= {((40, 20), (20, 10)): (), ((41, 20), (20, 10)): (shrinks,), ((40, 41), (5, 9)): ()}
    for (height, width), expected in cases.items():
        assert tuple(order for order in ORDERS if height_first(order, height, width)) == expected, (height, width)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("mode", MODES)
def test_the_kernel_s_patches_are_those_of_each_image(mode, order):
    """Read in place whatever their strides; turned; planes or pixels apart."""
    whole = noise(13, 40)
    images = [whole, whole[:, 2:, 3:22], noise(5, 3, seed=1), noise(1, 9, seed=2), noise(1, 1, seed=3), noise(8, 12)]
    images += [noise(31, 23, seed=4).permute(1, 2, 0).contiguous().permute(2, 0, 1), noise(203, 2, seed=5)]
    turns = [Turn(i & 1 == 1, i & 2 == 2, i & 4 == 4) for i in range(len(images))]
    grids = [(2, 3), (1, 4), (3, 1), (1, 2), (2, 2), (3, 2), (2, 4), (1, 2)]
    boxes = [None, (0.125, 1, 11.5, 18.875), None, None, None, (0, 0, 11.25, 8), (0, 1.5, 23, 31), None]
    arguments = PATCH, mode, order
    found = CUT.of("triton")(images, turns, boxes, grids, *arguments)
    each = [CUT.of("eager")([x], [t], [b], [g], *arguments) for x, t, b, g in zip(images, turns, boxes, grids)]
    assert found.dtype == torch.uint8 and torch.equal(found, torch.cat(each))
    assert len(found.unique(dim=0)) > 30


def test_a_kernel_one_level_off_is_found_wrong(monkeypatch):
    from siglip2_packed.ops.patches import eager, triton

    def nearly(*arguments):
        patches = eager.cut(*arguments)
        patches[-1, -1] ^= 1
        return patches

    for patch_size, function in enumerate((eager.cut, nearly), start=PATCH):
        monkeypatch.setattr(triton, "cut", function)
        verdict = CUT.verdict("triton", CPU, torch.uint8, (patch_size, "bilinear"))
        assert verdict.right == (function is eager.cut), verdict


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_the_kernel_is_found_right(mode):
    verdict = CUT.verdict("triton", torch.device("cuda"), torch.uint8, (16, mode))
    assert verdict.right, verdict


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_large_and_small_images_at_once(mode):
    sizes = [(3024, 4032), (41, 1201), (4032, 3024), (17, 19), (13, 19), (8, 32), (1, 256), (1000, 7), (768, 1024)]
    grids = [(14, 18), (3, 80), (18, 14), (16, 16), (13, 19), (8, 32), (1, 256), (64, 1), (14, 18)]
    images = [noise(*size, seed=i) for i, size in enumerate(sizes)]
    order = card.pillow_order(MODES[mode])
    given = [x.cuda().permute(1, 2, 0).contiguous().permute(2, 0, 1) for x in images]
    rng = random.Random(0)
    for boxes in ([None] * len(images), [box_of(image, rng) for image in images]):
        found = CUT.of("triton")(given, [Turn()] * len(sizes), boxes, grids, 16, mode, order)
        expected = [by_pillow(image, grid, mode, 16, box) for image, box, grid in zip(images, boxes, grids)]
        assert np.array_equal(found.cpu().numpy(), np.concatenate(expected))


def test_a_box_is_in_eighths():
    with pytest.raises(AssertionError, match="eighths of a pixel, got 0 to 4.3"):
        CUT.of("triton")([noise(5, 5)], [Turn()], [(0, 0, 4.3, 5)], [(1, 1)], PATCH, "bilinear", ORDERS[0])
