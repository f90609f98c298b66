"""JPEG files decoded, resized and cut on a device: the whole way with a decoder on the CPU in nvJPEG's place."""

import io
import logging
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from jpeg_files import BROKEN, ODD, OTHER, PLAIN, inputs, jpeg, photograph
from PIL import Image
from safetensors.torch import load_file

from siglip2_packed import Siglip2PackedImageProcessor, Siglip2PackedVisionModel, card
from siglip2_packed.cli import main
from siglip2_packed.collection.cut import cut
from siglip2_packed.collection.decode import decode, decoded, decoding_pool

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _small_files_by_nvjpeg(monkeypatch):
    monkeypatch.setattr(card, "LARGE", 0)


def decode_jpegs(files):
    """As nvJPEG does, which knows neither orientation nor which of the files it was that it refused."""
    images = [Image.open(io.BytesIO(file.numpy().tobytes())) for file in files]
    if any(image.mode == "CMYK" for image in images):
        raise RuntimeError("Error while decoding JPEG images: 3\nand more")
    return [torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1) for image in images]


def by_torchvision(files):
    from torchvision.io import ImageReadMode, decode_jpeg

    return decode_jpeg(files, mode=ImageReadMode.RGB)


@pytest.fixture(params=["pillow", "torchvision"])
def decoder(request):
    """Of batches, on the CPU."""
    return decode_jpegs if request.param == "pillow" else pytest.importorskip("torchvision") and by_torchvision


def on_cpu(decoder=decode_jpegs, **settings):
    """A processor whose card is the CPU, and the card."""
    processor = Siglip2PackedImageProcessor(decode="gpu", **settings)
    found = card.Card(CPU, processor.patch_size, processor.resample, decoder)
    processor.on_card = lambda device: found
    return processor, found


@pytest.mark.parametrize(("files", "plain"), [(PLAIN, True), ({**ODD, **OTHER}, False)])
def test_plain_files_are_the_card_s_and_no_others(files, plain):
    found = {kind for kind, data in files.items() if card.plain_jpeg(data) is not None}
    assert found == (set(files) if plain else {"hole"})


def test_small_files_are_decoded_on_the_host(monkeypatch):
    """And resized on the card, with all others."""
    monkeypatch.undo()
    small, large = jpeg(photograph((1414, 1414))), jpeg(photograph((1415, 1414)))
    assert card.plain_jpeg(small) is None and card.plain_jpeg(large) is not None
    processor, on_card = on_cpu(lambda files: [255 - pixels for pixels in decode_jpegs(files)], max_num_patches=40)
    found, exact = (
        some([small, large])["pixel_values"] for some in (processor, Siglip2PackedImageProcessor(max_num_patches=40))
    )
    half = len(found) // 2
    assert torch.equal(found[:half], exact[:half]) and not torch.equal(found[half:], exact[half:])
    assert on_card.decoded == 1

    stored, grid = processor.read_for_card(small, lambda size: np.empty(size, np.uint8))
    assert stored.decoded and grid == processor.grid(1024, 1023)
    patches, grid = processor.read_for_card(small, lambda size: None)
    assert np.array_equal(patches, Siglip2PackedImageProcessor(max_num_patches=40).read(small)[0])
    assert not processor.read_for_card(large, None)[0].decoded


@pytest.mark.parametrize("how", ["exact", "scaled", "gpu"])
def test_what_is_for_a_card_can_be_read_on_the_host(how):
    """As `encode` does with what the card gives back."""
    data = jpeg(photograph((333, 250)))
    processor = Siglip2PackedImageProcessor(patch_size=4, max_num_patches=40, decode=how)
    stored, grid = processor.read_for_card(data, lambda size: np.empty(size, np.uint8))
    assert (stored.decoded, stored.scaled is not None) == (how != "gpu", how == "scaled")
    patches, found_grid = processor.read(stored)
    expected, expected_grid = processor.read(data)
    assert grid == found_grid == expected_grid and np.array_equal(patches, expected)


def test_a_pillow_of_other_pixels_resizes_on_the_host(monkeypatch):
    monkeypatch.setattr(card, "pillow_order", lambda resample: None)
    processor, on_card = on_cpu(max_num_patches=40)
    monkeypatch.setattr(card, "LARGE", 1 << 20)
    for kind in ("grey", "progressive"):
        patches, _ = processor.read_for_card(PLAIN[kind], lambda size: np.empty(size, np.uint8))
        assert np.array_equal(patches, Siglip2PackedImageProcessor(max_num_patches=40).read(PLAIN[kind])[0])
    assert processor([PLAIN["progressive"]]) is not None and on_card.decoded == 0


@pytest.mark.parametrize("kind", BROKEN)
def test_files_cut_short_are_not(kind):
    if kind in ("header", "empty"):
        with pytest.raises(ValueError, match="Truncated|cannot identify|can identify"):
            card.plain_jpeg(BROKEN[kind])
    else:
        assert card.plain_jpeg(BROKEN[kind]) is None


@pytest.mark.parametrize("resample", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC])
@pytest.mark.parametrize("kind", PLAIN)
def test_patches_are_pillow_s(kind, resample, decoder):
    """Of the same pixels, to the bit."""
    settings = {"patch_size": 4, "max_num_patches": 70, "resample": resample}
    processor, on_card = on_cpu(decoder, **settings)
    file = card.plain_jpeg(PLAIN[kind])
    (found,) = on_card.patches([file], [processor.grid(*file.size)])
    expected, grid = Siglip2PackedImageProcessor(**settings).read(PLAIN[kind])
    assert processor.grid(*file.size) == grid
    assert found.dtype == torch.uint8 and np.array_equal(found.numpy(), expected)


def test_the_processor_s_packs_are_in_order_and_exact(decoder):
    files = {**PLAIN, **ODD, **OTHER}
    sources = [*files.values(), photograph(), np.asarray(photograph()), io.BytesIO(PLAIN["progressive"])]
    processor, on_card = on_cpu(decoder, max_num_patches=40)
    packed, exact = processor(sources), Siglip2PackedImageProcessor(max_num_patches=40)(sources)
    assert packed["grid_thw"].tolist() == exact["grid_thw"].tolist()
    assert packed["pixel_values"].dtype == torch.float32
    assert torch.equal(packed["pixel_values"], exact["pixel_values"])
    assert (on_card.decoded, on_card.refused) == (len(PLAIN) + 2, 0)


def test_errors_are_those_of_the_exact_way():
    sources = [PLAIN["grey"], *BROKEN.values(), OTHER["png"]]
    with pytest.warns(UserWarning, match="left out 5 of 7"):
        packed = on_cpu(max_num_patches=6)[0](sources, on_error="skip")
    with pytest.warns(UserWarning, match="left out 5 of 7"):
        exact = Siglip2PackedImageProcessor(max_num_patches=6)(sources, on_error="skip")
    assert (packed.kept, packed.skipped) == (exact.kept, exact.skipped)
    with pytest.raises(ValueError, match=r"^image 1: OSError: image file is truncated"):
        on_cpu()[0]([PLAIN["grey"], BROKEN["cut"]])
    empty = on_cpu()[0]([])
    assert (empty["pixel_values"].shape, empty["grid_thw"].shape) == ((0, 768), (0, 3))


def test_grey_files_are_refused_where_they_are_not_to_be_converted():
    processor, on_card = on_cpu(do_convert_rgb=False, max_num_patches=6)
    with pytest.raises(ValueError, match=r"^image 1: mode L is not RGB, and do_convert_rgb=False"):
        processor([PLAIN["progressive"], PLAIN["grey"]])
    assert len(processor([PLAIN["progressive"]])["grid_thw"]) == on_card.decoded == 1
    (found,) = cut([decoded(processor, 0, "grey.jpg", PLAIN["grey"])], processor, on_card)
    assert found.error == "mode L is not RGB, and do_convert_rgb=False"


def test_what_the_card_refuses_is_read_the_exact_way(caplog):
    """What it takes comes out inverted here, so that the two ways are told apart."""
    sources = [jpeg(photograph(seed=seed)) for seed in range(12)]
    bad, counts = {3, 4, 11}, []
    lengths = {len(sources[i]) for i in bad}
    processor, on_card = on_cpu(max_num_patches=40)

    def decode_most(files):
        if any(len(file) in lengths for file in files):
            raise RuntimeError("Error while decoding JPEG images: 3\nand more")
        counts.append(len(files))
        return [255 - pixels for pixels in decode_jpegs(files)]

    on_card.decode_jpegs = decode_most
    with caplog.at_level(logging.WARNING):
        packed = processor(sources)
    exact = Siglip2PackedImageProcessor(max_num_patches=40)(sources)
    assert packed["grid_thw"].tolist() == exact["grid_thw"].tolist() == [[1, 5, 8]] * 12
    for i, (found, expected) in enumerate(zip(*(x["pixel_values"].split(40) for x in (packed, exact)))):
        if i in bad:
            assert torch.equal(found, expected)
        else:
            assert (found + expected).abs().max() <= 1.01 * 2 / 255  # a half rounds up from either side
    assert (on_card.decoded, on_card.refused) == (9, 3)
    assert sum(counts) == 9 and max(counts) > 1  # not one by one
    assert caplog.text.count("read the exact way") == 1
    assert "cpu refuses: Error while decoding JPEG images: 3\n" in caplog.text


@pytest.mark.parametrize("fault", ["size", "memory", "memory of the decoder"])
def test_pixels_that_cannot_be_used_are_not(fault, monkeypatch):
    processor, on_card = on_cpu(max_num_patches=40)
    if fault == "size":
        on_card.decode_jpegs = lambda files: [pixels[:, 1:] for pixels in decode_jpegs(files)]
    elif fault == "memory of the decoder":
        on_card.decode_jpegs = lambda _: raise_(torch.OutOfMemoryError("out of memory"))
    else:
        on_card.resized = lambda *_: raise_(torch.OutOfMemoryError("out of memory"))
    packed, exact = processor([PLAIN["grey"]]), Siglip2PackedImageProcessor(max_num_patches=40)([PLAIN["grey"]])
    assert torch.equal(packed["pixel_values"], exact["pixel_values"])
    assert (on_card.decoded, on_card.refused) == (0, 1)


def raise_(error):
    raise error


def test_batches_are_bounded(monkeypatch):
    monkeypatch.setattr(card, "PIXELS_AT_ONCE", 100)
    monkeypatch.setattr(card, "FILES_AT_ONCE", 3)
    sizes = [1, 2, 3, 4, 90, 10, 1, 500, 99, 1, 1]
    found = list(card.batches(sizes, lambda size: size))
    assert found == [[1, 2, 3], [4, 90], [10, 1], [500], [99, 1], [1]]
    assert list(card.batches([], lambda size: size)) == []


def test_a_device_without_nvjpeg_says_why(monkeypatch):
    with pytest.raises(ValueError, match="decode='gpu' is for a CUDA device, got cpu"):
        card.nvjpeg(CPU)
    monkeypatch.setattr(card, "index_of", lambda device: 0)
    monkeypatch.setitem(sys.modules, "torchvision.io", None)
    with pytest.raises(ValueError, match="decode='gpu': torchvision has no nvJPEG here: "):
        card.nvjpeg(torch.device("cuda"))
    without_cuda = ModuleType("torchvision.io")
    without_cuda.ImageReadMode = SimpleNamespace(RGB=3)
    without_cuda.decode_jpeg = lambda *_, **__: raise_(RuntimeError("decode_jpegs_cuda: not compiled with CUDA\nmore"))
    monkeypatch.setitem(sys.modules, "torchvision.io", without_cuda)
    with pytest.raises(ValueError, match="has no nvJPEG here: decode_jpegs_cuda: not compiled with CUDA$"):
        card.nvjpeg(torch.device("cuda"))


# with nvJPEG, which repeats the chroma of subsampled files where libjpeg interpolates it


def assert_near(found, exact):
    """Patches `[T, P]` that differ in such chroma only, of colours as loud as those of `photograph`.

    Brightness hardly changes: another image's, or a turned one's, is 40 steps off.
    """
    steps = (found.cpu() - exact).unflatten(1, (-1, 3)) * 127.5
    brightness = (steps @ torch.tensor([0.299, 0.587, 0.114])).abs()
    assert brightness.mean() < 0.5 and brightness.max() <= 8
    assert steps.abs().mean() < 5 and steps.abs().max() <= 64


@pytest.mark.parametrize("kind", PLAIN)
def test_repeated_chroma_is_near(kind):
    simplejpeg = pytest.importorskip("simplejpeg")

    def decode(files):
        images = [simplejpeg.decode_jpeg(file.numpy().tobytes(), "RGB", fastupsample=True) for file in files]
        return [torch.from_numpy(image).permute(2, 0, 1) for image in images]

    exact = Siglip2PackedImageProcessor(max_num_patches=40)([PLAIN[kind]])["pixel_values"]
    processor, _ = on_cpu(decode, max_num_patches=40)
    assert_near(processor([PLAIN[kind]])["pixel_values"], exact)
    with pytest.raises(AssertionError):
        assert_near(exact.flip(0), exact)


@pytest.fixture(scope="module")
def gpu():
    pytest.importorskip("torchvision")
    return torch.device("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", {**PLAIN, **ODD, **OTHER})
def test_files_of_every_kind_are_near_their_exact_pixels(gpu, kind):
    data = {**PLAIN, **ODD, **OTHER}[kind]
    packed = Siglip2PackedImageProcessor(max_num_patches=40, decode="gpu")([data])
    exact = Siglip2PackedImageProcessor(max_num_patches=40)([data])
    assert packed["pixel_values"].device.type == "cuda"
    assert packed["grid_thw"].tolist() == exact["grid_thw"].tolist()
    if kind in (*OTHER, *ODD) and kind != "hole":
        assert torch.equal(packed["pixel_values"].cpu(), exact["pixel_values"])
    elif kind != "hole":  # what is missing there, each decoder makes up
        assert_near(packed["pixel_values"], exact["pixel_values"])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files_have_the_exact_way_s_errors(gpu, kind):
    errors = []
    for how in ("gpu", "exact"):
        with pytest.raises(ValueError, match="^image 0: ") as caught:
            Siglip2PackedImageProcessor(decode=how)([BROKEN[kind]])
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["hole", "one pixel wide", "small", "progressive"])
def test_pixels_do_not_depend_on_what_was_in_memory(gpu, kind):
    """What the card cannot decode it must refuse, not leave as it was."""
    data, found = {**PLAIN, **ODD}[kind], []
    for seed in (1, 2, 3):
        torch.cuda.empty_cache()
        waste = [torch.full((3, 133, 198), 37 * seed, dtype=torch.uint8, device=gpu) for _ in range(50)]
        del waste
        found.append(Siglip2PackedImageProcessor(max_num_patches=40, decode="gpu")([data])["pixel_values"])
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.gpu
def test_many_sizes_through_one_card_are_each_its_own(gpu):
    """Memory comes back to the card's decoder while the resize before may still read it: nothing may be mixed up."""
    sizes = [(97 + 61 * (i % 23), 83 + 47 * (i % 31)) for i in range(300)]
    files = [jpeg(photograph(size, seed=i)) for i, size in enumerate(sizes)]
    processor = Siglip2PackedImageProcessor(max_num_patches=64, decode="gpu")
    exact = Siglip2PackedImageProcessor(max_num_patches=64)(files)
    lengths = exact["grid_thw"].prod(dim=1).tolist()
    for _ in range(3):
        packed = processor(files)
        assert packed["grid_thw"].tolist() == exact["grid_thw"].tolist()
        for rows in zip(packed["pixel_values"].split(lengths), exact["pixel_values"].split(lengths)):
            assert_near(*rows)


@pytest.mark.gpu
def test_features_of_photographs_are_near_those_of_their_exact_pixels(gpu, checkpoint):
    from siglip2_packed.align import photographs
    from siglip2_packed.inspection.decoding import compare_decoding, jpegs

    model = Siglip2PackedVisionModel.from_pretrained(checkpoint("base")).to(gpu).eval()
    for name, data in jpegs(photographs(), enlarge=True):
        found = compare_decoding(name, data, str(checkpoint("base")), model, "gpu", None)
        assert found.passed, found


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["exact", "scaled"])
@pytest.mark.parametrize("decode_in", ["threads", "processes"])
def test_patches_resized_by_the_card_are_the_host_s(how, decode_in):
    """Of every kind of file, and of more than a job's memory has room for; to the bit."""
    photo, device = photograph((1800, 1300)), torch.device("cuda")
    files = {**PLAIN, **OTHER, **ODD, "large": jpeg(photo), "larger": jpeg(photo.resize((4032, 3024)))}
    files |= {f"{i}": jpeg(photograph((97 + 61 * (i % 23), 83 + 47 * (i % 31)), seed=i)) for i in range(200)}
    processor = Siglip2PackedImageProcessor(max_num_patches=64, decode=how)
    with decoding_pool(device, processor, 4, decode_in) as pool:
        for _ in range(2):
            images = cut(decode(inputs(files), processor, pool, 4, by_card=True), processor, processor.on_card(device))
            for image, (name, data) in zip(images, files.items(), strict=True):
                patches, grid = processor.read(data)
                assert (image.name, image.grid) == (name, grid)
                assert np.array_equal(image.patches.cpu(), patches), name


@pytest.mark.gpu
def test_exact_features_are_the_same_whoever_resizes(checkpoint, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(100):
        (folder / f"{i:03d}.jpg").write_bytes(jpeg(photograph((97 + 61 * (i % 23), 83 + 47 * (i % 31)), seed=i)))
    found = []
    for out in ("card", "host"):
        if out == "host":
            monkeypatch.setattr(Siglip2PackedImageProcessor, "on_card", lambda *_: None)
        flags = ["--ckpt", str(checkpoint()), "--out", str(tmp_path / out), "--pooled", "--patch-budget", "512"]
        assert main(["encode", str(folder), *flags]) == 0
        assert ("resized on the card" in capsys.readouterr().out) == (out == "card")
        found.append(load_file(tmp_path / out / "shard-00000.safetensors"))
    assert all(torch.equal(found[0][name], found[1][name]) for name in ("grid_thw", "pooled", "patches"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_encode_by_the_card(gpu, checkpoint, tmp_path, capsys, dtype):
    """Every row is near the exact way's, and of its own image."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(200):
        (folder / f"{i:03d}.jpg").write_bytes(jpeg(photograph((97 + 61 * (i % 23), 83 + 47 * (i % 31)), seed=i)))
    (folder / "cut.jpg").write_bytes(BROKEN["cut"])
    found = {}
    for how in ("gpu", "exact"):
        out = tmp_path / how
        flags = ["--pooled", "--no-patches", "--dtype", dtype, "--patch-budget", "512", "--decode", how]
        assert main(["encode", str(folder), "--ckpt", str(checkpoint()), "--out", str(out), *flags]) == 0
        found[how] = load_file(out / "shard-00000.safetensors")
    assert "decode gpu (200 on the card, 0 refused by it)" in capsys.readouterr().out
    assert torch.equal(found["gpu"]["grid_thw"], found["exact"]["grid_thw"])
    ours, exact = (found[how]["pooled"].float() for how in ("gpu", "exact"))
    assert ours.isfinite().all()
    assert ((ours - exact).norm(dim=1) / exact.norm(dim=1)).max() < 0.05
