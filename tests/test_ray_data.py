"""The Ray Data actor on a local Ray: rows keep their columns, features are those of the model alone."""

import io
import os

import numpy as np
import pytest
import torch
from PIL import Image

from siglip2_packed import Siglip2PackedImageProcessor, Siglip2PackedVisionModel
from siglip2_packed.ray_data import Siglip2PackedEncoder

SIZES = [(9, 20), (31, 8), (16, 16), (5, 40), (12, 13), (1, 60)]


@pytest.fixture
def photos(tmp_path):
    for seed, size in enumerate(SIZES):
        pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{seed}.png")
    (tmp_path / "bad.png").write_text("not an image")
    return tmp_path


def check(rows, checkpoint, photos, patches):
    model = Siglip2PackedVisionModel.from_pretrained(checkpoint)
    processor = Siglip2PackedImageProcessor.from_pretrained(checkpoint)
    assert sorted(os.path.basename(row["path"]) for row in rows) == [*(f"{i}.png" for i in range(6)), "bad.png"]
    for row in rows:
        assert "bytes" not in row
        if row["path"].endswith("bad.png"):
            assert "not an image" in row["error"]
            assert list(row["grid_thw"]) == [0, 0, 0]
            assert np.isnan(row["pooled"]).all()
            assert not patches or row["patches"].shape == (0, 64)
            continue
        assert row["error"] == ""
        packed = processor([str(row["path"])])
        with torch.no_grad():
            output = model(**packed)
        assert list(row["grid_thw"]) == packed["grid_thw"][0].tolist()
        torch.testing.assert_close(torch.tensor(row["pooled"]), output.pooler_output[0], rtol=1e-5, atol=1e-5)
        if patches:
            found = torch.tensor(np.asarray(row["patches"]))
            torch.testing.assert_close(found, output.last_hidden_state, rtol=1e-5, atol=1e-5)


def test_the_actor_alone(checkpoint, photos):
    files = sorted(photos.iterdir())
    encoder = Siglip2PackedEncoder(checkpoint(), patches=True, patch_budget=20, device="cpu", workers=2)
    batch = {"bytes": np.array([f.read_bytes() for f in files], object), "path": np.array([str(f) for f in files])}
    found = encoder(batch)
    check([{name: values[i] for name, values in found.items()} for i in range(7)], checkpoint(), photos, True)
    empty = encoder({name: values[:0] for name, values in batch.items()})
    assert (empty["pooled"].shape, empty["grid_thw"].shape) == ((0, 64), (0, 3))
    with pytest.raises(ValueError, match="no column 'bytes' in the batch; it has path"):
        encoder({"path": batch["path"]})
    with pytest.raises(ValueError, match="columns that are called as those added: pooled, error"):
        encoder({**batch, "error": batch["path"], "pooled": batch["path"]})


def test_structs_and_paths(checkpoint, photos):
    encoder = Siglip2PackedEncoder(checkpoint(), column="image", device="cpu", patch_budget=64)
    path = str(photos / "0.png")
    values = [path, {"bytes": (photos / "0.png").read_bytes(), "path": None}, {"bytes": None, "path": path}, None]
    found = encoder({"image": np.array(values, object)})
    assert found["error"].tolist() == ["", "", "", "null: the row has no image"]
    assert np.isnan(found["pooled"][3]).all()
    for i in (1, 2):
        np.testing.assert_allclose(found["pooled"][0], found["pooled"][i], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(20, 9, 3), (3, 40, 3), (16, 16, 1), (18, 30), (9, 20, 4)], ids=str)
@pytest.mark.parametrize("count", [1, 3])
def test_pixels_of_one_size_come_stacked(checkpoint, size, count):
    encoder = Siglip2PackedEncoder(checkpoint(), column="image", device="cpu", patch_budget=64, workers=1)
    pixels = np.random.default_rng(0).integers(0, 256, (count, *size), dtype=np.uint8)
    ragged = np.empty(count, object)
    for i in range(count):
        ragged[i] = pixels[i]
    stacked, single = encoder({"image": pixels, "n": np.arange(count)}), encoder({"image": ragged})
    if size[0] == 3:  # channels at either end: refused by both alike
        assert stacked["error"].tolist() == single["error"].tolist() and "input_data_format" in stacked["error"][0]
        return
    assert stacked["error"].tolist() == [""] * count
    assert stacked["n"].tolist() == list(range(count))
    np.testing.assert_array_equal(stacked["grid_thw"], single["grid_thw"])
    np.testing.assert_allclose(stacked["pooled"], single["pooled"], rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        output = Siglip2PackedVisionModel.from_pretrained(checkpoint())(**encoder.processor([pixels[-1]]))
    torch.testing.assert_close(torch.tensor(stacked["pooled"][-1]), output.pooler_output[0], rtol=1e-5, atol=1e-5)


def test_lists_of_images_are_named(checkpoint):
    encoder = Siglip2PackedEncoder(checkpoint(), column="images", device="cpu", patch_budget=64, workers=1)
    column = np.empty(2, object)
    column[:] = [[b"x", b"y"], np.array([{"bytes": b"x", "path": None}, None], object)]
    errors = encoder({"images": column})["error"].tolist()
    assert errors == ["a list of 2 where one image is expected: give each a row of its own"] * 2


def test_batches_of_another_format_are_named(checkpoint):
    pa = pytest.importorskip("pyarrow")
    encoder = Siglip2PackedEncoder(checkpoint(), device="cpu", patch_budget=64, workers=1)
    with pytest.raises(ValueError, match="pyarrow.lib.Table.*batch_format='numpy'"):
        encoder(pa.table({"bytes": [b"x"]}))


def test_bytes_that_end_in_zeros(checkpoint):
    encoder = Siglip2PackedEncoder(checkpoint(), device="cpu", patch_budget=64, workers=1)
    files = []
    for size in ((16, 16), (8, 32)):
        file = io.BytesIO()
        Image.new("RGB", size).save(file, "BMP")  # black: ends in zeros
        files.append(file.getvalue())
    assert encoder({"bytes": np.array(files)})["error"].tolist() == ["", ""]


def test_files_cut_short_are_errors_whatever_else_is_in_the_batch(checkpoint):
    encoder = Siglip2PackedEncoder(checkpoint(), device="cpu", patch_budget=64, workers=1)
    noise = Image.effect_noise((40, 40), 90)
    for kind in ("JPEG", "PNG", "GIF"):
        file = io.BytesIO()
        noise.save(file, kind)
        whole = file.getvalue()
        for batch in (np.array([whole[:-200], whole]), np.array([whole[:-200], whole], object)):
            cut, error = encoder({"bytes": batch})["error"]
            assert "truncated" in cut and error == "", kind


def test_local_ray(checkpoint, photos, monkeypatch):
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.data")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        dataset = ray.data.read_binary_files(str(photos), include_paths=True)
        dataset = dataset.map_batches(
            Siglip2PackedEncoder,
            fn_constructor_kwargs={
                "ckpt": str(checkpoint()),
                "patches": True,
                "device": "cpu",
                "workers": 1,
                "decode_in": "processes",
            },
            batch_size=4,
            compute=ray.data.ActorPoolStrategy(size=1),
        )
        check(dataset.take_all(), checkpoint(), photos, True)

        folder = photos / "of one size"
        folder.mkdir()
        for seed in range(5):
            pixels = np.random.default_rng(seed).integers(0, 256, (20, 9, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{seed}.png")
        encoder = Siglip2PackedEncoder(checkpoint(), column="image", device="cpu", workers=1)
        images = ray.data.read_images(str(folder))
        [batch] = images.iter_batches(batch_size=5)
        assert batch["image"].shape == (5, 20, 9, 3)
        found = encoder(batch)
        assert found["error"].tolist() == [""] * 5 and np.isfinite(found["pooled"]).all()
    finally:
        ray.shutdown()
