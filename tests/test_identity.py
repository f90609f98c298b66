"""What a row depends on: a change of any of it shows."""

import os
import tarfile

import pytest
import torch
from encode_runs import image_bytes

from siglip2_packed import Siglip2PackedImageProcessor, Siglip2PackedVisionModel
from siglip2_packed.collection.decode import read_image
from siglip2_packed.collection.identity import UNSTEADY, run_digest, same, stamp, tower, versions, weights_digest
from siglip2_packed.collection.sources import find_inputs


@pytest.fixture
def processor(checkpoint):
    return Siglip2PackedImageProcessor.from_pretrained(checkpoint())


def read(processor, paths):
    inputs = find_inputs(paths)
    images = [read_image(processor, *item) for item in inputs.read(0, len(inputs))]
    return images, [inputs.stamp(i) for i in range(len(inputs))]


def test_weights_are_known_by_all_their_bytes(checkpoint):
    model = Siglip2PackedVisionModel.from_pretrained(checkpoint())
    seen = {weights_digest(model.state_dict())}
    assert seen == {weights_digest(model.state_dict(), threads=3)}
    for parameter in model.parameters():
        with torch.no_grad():
            last = parameter.view(-1)[-1:]
            before = last.clone()
            last.view(torch.int32).bitwise_xor_(1)  # its least bit
            seen.add(weights_digest(model.state_dict()))
            last.copy_(before)
    assert len(seen) == 1 + len(list(model.parameters()))
    assert weights_digest(model.state_dict()) in seen
    before = model.state_dict()
    model.to("meta")
    assert weights_digest(before) in seen  # of what it left behind
    model = Siglip2PackedVisionModel.from_pretrained(checkpoint())
    assert weights_digest(model.to(torch.bfloat16).state_dict()) not in seen


def test_the_run_is_known_by_its_settings(checkpoint):
    model = Siglip2PackedVisionModel.from_pretrained(checkpoint())
    settings = {"dtype": "float32", "versions": versions(), "tower": tower(model.config), "weights": "1", "names": "x"}
    assert set(versions()) == {"siglip2_packed", "pillow", "torch", "transformers"}
    assert run_digest(settings) == run_digest({**settings, "names": "y", "inputs": 3, "checkpoint": "elsewhere"})
    model.config.layer_norm_eps = 1e-5
    others = [{"dtype": "float16"}, {"tower": tower(model.config)}, {"versions": {**versions(), "pillow": "1"}}]
    assert len({run_digest({**settings, **other}) for other in ({}, *others)}) == 4


def test_files(processor, tmp_path):
    file = tmp_path / "a.png"
    file.write_bytes(image_bytes(0, (9, 20)))
    (tmp_path / "list.txt").write_text(f"{file}\n{tmp_path / 'absent.png'}\n")
    images, stamps = read(processor, [tmp_path / "list.txt"])
    assert [image.stamp for image in images] == stamps
    assert all(map(same, stamps, stamps))
    assert stamps[1] == "absent"
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    assert not same(stamps[0], stamp(file))


@pytest.mark.parametrize("times", [1, 1000])
def test_a_file_that_changes_while_it_is_read(processor, tmp_path, monkeypatch, times):
    file, touched = tmp_path / "a.png", []
    file.write_bytes(image_bytes(0, (9, 20)))
    original = Siglip2PackedImageProcessor.read

    def read_and_touch(self, source):
        if len(touched) < times:
            touched.append(os.utime(file, ns=(0, len(touched))))
        return original(self, source)

    monkeypatch.setattr(Siglip2PackedImageProcessor, "read", read_and_touch)
    image = read_image(processor, 0, str(file), str(file))
    if times == 1:
        assert not image.error and image.stamp == stamp(file)
    else:
        assert image.error == "it changed while it was read" and image.stamp == UNSTEADY
        assert not same(image.stamp, image.stamp) and image.patches is None


def test_a_tar_that_changes_after_it_was_listed(processor, tmp_path):
    path = tmp_path / "a.tar"

    def write(seeds):
        with tarfile.open(path, "w") as tar:
            for seed in seeds:
                (tmp_path / "x.png").write_bytes(image_bytes(seed, (9, 20)))
                tar.add(tmp_path / "x.png", f"{seed}.png")

    write(range(3))
    inputs = find_inputs([path])
    entries = inputs.read(0, 3)
    first = next(entries)
    assert read_image(processor, *first).error == ""
    assert first.stamp == inputs.stamp(0) != inputs.stamp(2)
    assert all(inputs.stamp(i).startswith(f"{stamp(path)}@") for i in range(3))
    write((2, 1, 0))
    os.utime(path, ns=(0, 5))
    assert [str(item.entry) for item in entries] == [f"{path} has changed since it was listed"] * 2
    assert inputs.stamp(0) == first.stamp != find_inputs([path]).stamp(0)
    assert not same(first.stamp, find_inputs([path]).stamp(0))


def test_rows_of_paths_are_known_by_the_parquet_file_and_the_image(processor, tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "a b.png").write_bytes(image_bytes(0, (9, 20)))
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"path": ["a b.png", "absent.png"]}), path)
    images, stamps = read(processor, [path])
    assert stamps == [stamp(path)] * 2
    assert all(same(image.stamp, stamp(path)) for image in images)
    (tmp_path / "a b.png").write_bytes(image_bytes(1, (9, 21)))
    assert [same(image.stamp, stamp(path)) for image in images] == [False, True]
    os.utime(path, ns=(0, 5))
    assert not any(same(image.stamp, stamp(path)) for image in images)
