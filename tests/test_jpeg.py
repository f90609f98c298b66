"""JPEG files by a faster decoder, and at scales of their own: Pillow's pixels, or a bounded distance from them."""

import io
import logging
import sys

import jpeg_files
import numpy as np
import pytest
from jpeg_files import BROKEN, ODD, OTHER, PLAIN, photograph
from PIL import Image, ImageFile, ImageOps

from siglip2_packed import Siglip2PackedImageProcessor, jpeg
from siglip2_packed.images import read_rgb

FILES = {**PLAIN, **ODD, **BROKEN, **OTHER}


@pytest.fixture
def simplejpeg():
    found = pytest.importorskip("simplejpeg")
    assert jpeg.decoder() == "simplejpeg"
    return found


@pytest.fixture
def pillow_alone(monkeypatch):
    def only(function, *args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(jpeg, "decoder", lambda: "Pillow")
            return function(*args, **kwargs)

    return only


def outcome(function, *args):
    try:
        return function(*args)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("decode", ["exact", "scaled"])
@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("truncated_too", [False, True])
def test_pixels_and_errors_are_those_of_pillow(
    simplejpeg, pillow_alone, kind, decode, truncated_too, tmp_path, monkeypatch
):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", truncated_too)
    processor = Siglip2PackedImageProcessor(max_num_patches=6, decode=decode)
    path = tmp_path / "photo"
    path.write_bytes(FILES[kind])
    expected = pillow_alone(outcome, processor.read, FILES[kind])
    assert isinstance(expected, str) == (kind in ("header", "empty") or (kind in BROKEN and not truncated_too))
    for source in (FILES[kind], path, io.BytesIO(FILES[kind])):
        found = outcome(processor.read, source)
        if isinstance(expected, str):
            assert found == expected
        else:
            assert found[1] == expected[1]
            assert np.array_equal(found[0], expected[0])


@pytest.mark.parametrize("kind", [*PLAIN, "several"])
def test_plain_files_are_the_faster_decoder_s(simplejpeg, kind):
    with Image.open(io.BytesIO(FILES[kind])) as image:
        found = jpeg.decode(image)
        assert (found.mode, found.size) == (image.mode, image.size)
        assert np.array_equal(np.asarray(found), np.asarray(image))


def test_pixels_that_are_not_resized(simplejpeg, pillow_alone):
    processor, data = Siglip2PackedImageProcessor(do_resize=False), jpeg_files.jpeg(photograph((64, 48)))
    expected = pillow_alone(processor, data)
    assert expected["grid_thw"].tolist() == [[1, 3, 4]]
    assert processor(data)["pixel_values"].equal(expected["pixel_values"])


def test_pixels_outlive_what_they_were_decoded_into(simplejpeg):
    images = []
    for seed in range(20):
        with Image.open(io.BytesIO(jpeg_files.jpeg(photograph(seed=seed)))) as image:
            images.append((jpeg.decode(image), np.asarray(image).copy()))
    assert all(np.array_equal(np.asarray(ours), theirs) for ours, theirs in images)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_limits_are_kept(simplejpeg, monkeypatch):
    with pytest.raises(ValueError, match="mode L is not RGB"):
        Siglip2PackedImageProcessor(do_convert_rgb=False, max_num_patches=6).read(PLAIN["grey"])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20000)
    for decode in ("exact", "scaled"):
        with pytest.raises(ValueError, match="198x133 is 26334 pixels, more than PIL.Image.MAX_IMAGE_PIXELS = 20000"):
            Siglip2PackedImageProcessor(decode=decode).read(PLAIN["progressive"])


def test_a_decoder_of_other_pixels_is_refused_with_the_number(simplejpeg, monkeypatch, caplog):
    right = simplejpeg.decode_jpeg

    def wrong(*args, **kwargs):
        pixels = right(*args, **kwargs)
        pixels[-1, -1, 0] ^= 3
        return pixels

    monkeypatch.setattr(simplejpeg, "decode_jpeg", wrong)
    with caplog.at_level(logging.WARNING):
        assert jpeg.decoder.__wrapped__() == "Pillow"
    assert "simplejpeg's pixels differ from Pillow's by up to 3 of 255: Pillow decodes" in caplog.text


def test_without_simplejpeg_it_is_pillow(monkeypatch):
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    assert jpeg.decoder.__wrapped__() == "Pillow"


def test_a_simplejpeg_that_cannot_be_imported_is_said_once(monkeypatch, caplog, tmp_path):
    (tmp_path / "simplejpeg.py").write_text("raise ValueError('numpy.dtype size changed')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "simplejpeg", raising=False)
    with caplog.at_level(logging.WARNING):
        assert jpeg.decoder.__wrapped__() == "Pillow"
    assert caplog.messages == ["simplejpeg cannot be used (numpy.dtype size changed): Pillow decodes"]


def test_the_comparison_is_no_matter_of_the_user_s_limit(simplejpeg, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert jpeg.decoder.__wrapped__() == "simplejpeg"


def test_a_setting_that_means_nothing_is_refused():
    with pytest.raises(ValueError, match="decode must be one of 'exact', 'scaled', 'gpu', got 'fast'"):
        Siglip2PackedImageProcessor(decode="fast")
    for decode in ("scaled", "gpu"):
        with pytest.raises(ValueError, match=f"decode='{decode}' goes with do_resize"):
            Siglip2PackedImageProcessor(decode=decode, do_resize=False)
    with pytest.raises(ValueError, match="resamples by BILINEAR or BICUBIC, not LANCZOS"):
        Siglip2PackedImageProcessor(decode="gpu", resample=Image.Resampling.LANCZOS)
    processor = Siglip2PackedImageProcessor(decode="scaled")
    assert "decode='scaled'" in repr(processor)
    assert "decode" not in processor.to_dict()
    assert processor(photograph(), decode="exact")["grid_thw"].tolist() == [[1, 13, 19]]


def scale_of(width, height, target):
    """By definition, from the finest: the smallest that is twice the target on both sides."""
    fit = [s for s in (1, 2, 4, 8) if width / s >= 2 * target[0] and height / s >= 2 * target[1]]
    return max(fit, default=1)


@pytest.mark.parametrize("size", [(64, 64), (63, 64), (64, 63), (129, 300), (256, 256), (255, 999), (20, 20)])
def test_scaled_is_at_the_smallest_scale_of_twice_the_target(size):
    data, target = jpeg_files.jpeg(photograph((max(size[0], 12), max(size[1], 12)))), (16, 16)
    image, _, scaled = read_rgb(data, resized=lambda height, width: target)
    factor = scale_of(*size, target)
    assert image.size == tuple(-(-side // factor) for side in size)
    assert (scaled is None) == (factor == 1)
    if scaled:
        assert scaled.size == size[::-1]
        assert scaled.box == (0, 0, size[0] / factor, size[1] / factor)


def test_the_scale_is_chosen_for_the_file_as_it_is_stored():
    """Twice 16x50 fits into 40x140 upright, and not into 140x40."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = jpeg_files.jpeg(photograph((140, 40)), exif=exif)
    asked = []
    image, _, scaled = read_rgb(data, resized=lambda *size: asked.append(size) or (50, 16))
    assert (asked, image.size, scaled) == ([(140, 40)], (40, 140), None)
    image, _, scaled = read_rgb(data, resized=lambda *size: (35, 10))
    assert (image.size, scaled.size, scaled.box) == ((20, 70), (140, 40), (0, 0, 20, 70))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_scaled_is_upright_and_has_the_whole_picture(orientation):
    """A gradient, whose every pixel tells where it was: a mirrored or stretched one is far from Pillow's."""
    width, height = 203, 131  # at 1/4 the last pixels hold a third of what the others do
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    pixels = np.stack([x, y, (x + y) / 2], axis=2).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = jpeg_files.jpeg(Image.fromarray(pixels), quality=98, subsampling="4:4:4", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    for settings in ({"patch_size": 4, "max_num_patches": 12}, {"patch_size": 2, "max_num_patches": 70}):
        expected, grid = Siglip2PackedImageProcessor(**settings).read(upright)
        found, found_grid = Siglip2PackedImageProcessor(**settings, decode="scaled").read(data)
        assert found_grid == grid
        assert np.abs(found.astype(int) - expected).max() <= 3


def test_scaled_is_exact_where_no_smaller_scale_will_do():
    for kind in PLAIN:
        exact, scaled = (Siglip2PackedImageProcessor(decode=decode).read(FILES[kind]) for decode in ("exact", "scaled"))
        assert exact[1] == scaled[1]
        assert np.array_equal(exact[0], scaled[0])


def test_scaled_pixels_are_near():
    image = photograph((1030, 771))
    settings = {"max_num_patches": 36}
    exact, _ = Siglip2PackedImageProcessor(**settings).read(jpeg_files.jpeg(image))
    scaled, _ = Siglip2PackedImageProcessor(**settings, decode="scaled").read(jpeg_files.jpeg(image))
    difference = np.abs(exact.astype(int) - scaled)
    assert 0 < difference.mean() < 1
    assert difference.max() <= 12
