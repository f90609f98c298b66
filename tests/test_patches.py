"""Images resized and cut by the kernel: those of one by one."""

import pytest
import torch

from siglip2_packed.ops.patches import CUT, Turn, cutter

CPU = torch.device("cpu")


def noise(*size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_patches_of_many_images_are_those_of_each(mode):
    """Smaller, larger, of the same size, of one pixel a side; read in place whatever their strides; turned."""
    whole = noise(13, 40)
    images = [whole, whole[:, 2:, 3:22], noise(5, 3, seed=1), noise(1, 9, seed=2), noise(1, 1, seed=3), noise(8, 12)]
    turns = [Turn(), Turn(down=True), Turn(sideways=True, across=True), Turn(True, True, True), Turn(), Turn(True)]
    grids = [(2, 3), (1, 4), (3, 1), (1, 2), (2, 2), (3, 2)]
    found = CUT.of("triton")(images, turns, grids, 4, mode)
    expected = torch.cat([cutter(CPU, 4, mode)(*([x] for x in one)) for one in zip(images, turns, grids)])
    difference = (found.int() - expected.int()).abs()
    assert found.dtype == torch.uint8 and found.shape == expected.shape == (25, 48)
    assert difference.max() <= 1 and (difference > 0).float().mean() < 0.02  # where one is a half
    assert len(found.unique(dim=0)) > 20


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_the_kernel_is_found_right(mode):
    verdict = CUT.verdict("triton", torch.device("cuda"), torch.uint8, (16, mode))
    assert verdict.right, verdict


@pytest.mark.gpu
def test_large_and_small_images_at_once():
    """Of sizes that leave no half between two levels."""
    images = [noise(3023, 4031), noise(41, 1201, seed=1), noise(3023, 4031, seed=2), noise(17, 19, seed=3)]
    turns, grids = (
        [Turn(), Turn(), Turn(sideways=True, down=True), Turn(across=True)],
        [(14, 18), (3, 80), (18, 14), (16, 16)],
    )
    found, expected = (
        CUT.of(name)([x.cuda() for x in images], turns, grids, 16, "bilinear").int() for name in ("triton", "eager")
    )
    difference = (found - expected).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < 0.005
