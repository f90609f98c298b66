"""`siglip2-packed plan`: what it says follows from what it measured, and that from what it was given."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from siglip2_packed import plan
from siglip2_packed.cli import main
from siglip2_packed.plan import Measured, planned

QUICK = ["--device", "cpu", "--seconds", "0.01"]


def test_time_is_that_of_the_slower_or_of_both_on_a_cpu():
    found = Measured(patches_an_image=200, decoded_per_s=50, encoded_per_s=100, memory=1)
    beside, shared = (planned(1000, found, 1152, 2, shared) for shared in (False, True))
    assert (beside.seconds, shared.seconds) == (20, 30)
    assert beside.limit == shared.limit == "reading and decoding"
    assert (beside.pooled, beside.patches) == (1000 * 1152 * 2, 1000 * 1152 * 2 * 200)
    slow = Measured(patches_an_image=200, decoded_per_s=100, encoded_per_s=10, memory=1)
    assert planned(1000, slow, 1152, 2, shared=False) == plan.Plan(100, "the model", 2304000, 460800000)


def test_a_plan_is_printed_and_written(capsys, tmp_path):
    file = tmp_path / "plan.json"
    argv = ["plan", "--images", "1000000", "--max-num-patches", "60", "--shape", "tiny", *QUICK, "--json", str(file)]
    assert main(argv) == 0
    out, found = capsys.readouterr().out, json.loads(file.read_text())
    assert "1,000,000 images of up to 60 patches, 48 on average" in out  # 4:3 is 6x8
    for word in ("time ", "disk ", "memory ", "256.0 MB with --pooled", "12.3 GB with all patches (float32)"):
        assert word in out
    assert found["patches_an_image"] == 48
    assert found["pooled"] == 1e6 * 64 * 4
    assert found["seconds"] == pytest.approx(1e6 / found["decoded_per_s"] + 1e6 / found["encoded_per_s"])
    assert found["memory"] > 2**26


@pytest.mark.parametrize("images", ["1000000", "1_000_000", "1e6"])
def test_a_million_may_be_written_so(images, capsys):
    assert main(["plan", "--images", images, "--max-num-patches", "16", "--shape", "tiny", *QUICK]) == 0
    assert "1,000,000 images of up to 16 patches" in capsys.readouterr().out


@pytest.mark.parametrize("images", ["1.5", "many", "inf", "nan", ""])
def test_a_number_of_images_is_whole(images, capsys):
    with pytest.raises(SystemExit):
        main(["plan", "--images", images, *QUICK])
    assert f"argument --images: {images!r} is not a whole number" in capsys.readouterr().err


def test_own_images_stand_for_all(checkpoint, capsys, tmp_path):
    for name, shape in (("wide.png", (4, 64)), ("square.png", (16, 16))):
        Image.fromarray(np.full((*shape, 3), 7, np.uint8)).save(tmp_path / name)
    argv = ["plan", "--images", "10", "--ckpt", str(checkpoint()), "--sample", str(tmp_path), *QUICK]
    assert main(argv) == 0
    assert "16 on average of 2 given" in capsys.readouterr().out  # 1x16 and 4x4
    (tmp_path / "cut.jpg").write_bytes(b"\xff\xd8\xff")
    assert main(argv) == 2
    assert f"--sample: {tmp_path / 'cut.jpg'}: " in capsys.readouterr().err


def test_packs_are_full(checkpoint, monkeypatch):
    seen = []
    original = plan.replayed

    def watched(model, budget):
        forward = original(model, budget)
        return lambda **packed: seen.append(packed) or forward(**packed)

    monkeypatch.setattr(plan, "replayed", watched)
    assert main(["plan", "--images", "10", "--ckpt", str(checkpoint()), *QUICK]) == 0
    assert 512 - 16 <= len(seen[0]["pixel_values"]) <= 512
    assert len(seen) >= 2 and not torch.isnan(seen[0]["pixel_values"]).any()


@pytest.mark.parametrize(
    "wrong", [["--images", "0"], ["--images", "5", "--seconds", "0"], ["--images", "5", "--seconds", "nan"]]
)
def test_nothing_to_plan_is_an_error(wrong, capsys):
    assert main(["plan", "--shape", "tiny", *QUICK, *wrong]) == 2
    assert "must be more than 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "text"), [(5.04, "5.0 seconds"), (5400, "90.0 minutes"), (9000, "2.5 hours"), (864000, "10.0 days")]
)
def test_durations(seconds, text):
    assert plan.duration(seconds) == text


@pytest.mark.gpu
def test_memory_is_the_devices(capsys, tmp_path):
    file = tmp_path / "plan.json"
    assert main(["plan", "--images", "10", "--shape", "base", "--seconds", "1", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert found["dtype"] == "bfloat16" and found["memory"] >= 2 * 86e6
    assert found["seconds"] == pytest.approx(max(10 / found["decoded_per_s"], 10 / found["encoded_per_s"]))
    assert "on the device" in capsys.readouterr().out
