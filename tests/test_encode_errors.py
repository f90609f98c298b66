"""`siglip2-packed encode` over what cannot be encoded: named, at no cost to the rest; or the run says why it ends."""

import os
import signal

from encode_runs import BAD, GOOD, check, run, table
from safetensors.torch import load_file

from siglip2_packed import Siglip2PackedImageProcessor, Siglip2PackedVisionModel


def test_features_too_large_for_the_dtype_to_save_are_an_error(checkpoint, photos, tmp_path, monkeypatch, capsys):
    forward = Siglip2PackedVisionModel.forward

    def large(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.last_hidden_state = output.last_hidden_state * 1e6
        return output

    monkeypatch.setattr(Siglip2PackedVisionModel, "forward", large)
    assert run(checkpoint, photos, tmp_path / "out", "--save-dtype", "float16") == 2
    assert "do not fit torch.float16" in capsys.readouterr().err


def test_features_that_are_not_finite_are_named(checkpoint, photos, expected, tmp_path, monkeypatch):
    forward = Siglip2PackedVisionModel.forward

    def broken(self, pixel_values, grid_thw, **kwargs):
        output = forward(self, pixel_values, grid_thw, **kwargs)
        for image, grid in zip(output.last_hidden_state.split(grid_thw.prod(dim=1).tolist()), grid_thw.tolist()):
            if grid == expected["07.png"][2]:
                image[-1, 3] = float("nan")
        return output

    monkeypatch.setattr(Siglip2PackedVisionModel, "forward", broken)
    same = [name for name in GOOD if expected[name][2] == expected["07.png"][2]]
    assert run(checkpoint, photos, tmp_path / "out") == 0
    check(tmp_path / "out", expected, sorted({*GOOD} - {*same}), kept=["patches"], bad=sorted([*BAD, *same]))


def test_strict_stops(checkpoint, photos, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(checkpoint, photos, out, "--strict", "--shard-size", "1", "--patch-budget", "16") == 1
    assert f"--strict: image 1 ({photos / '01-cut.jpg'}): " in capsys.readouterr().err
    assert not (out / "index.csv").exists()
    assert not list((out / ".parts").glob("*.csv"))[1:]
    good = [photos / name for name in GOOD]
    assert run(checkpoint, good, tmp_path / "good", "--strict") == 0
    assert "--strict" not in capsys.readouterr().err


def test_no_good_image_and_one_per_shard(checkpoint, photos, tmp_path):
    out = tmp_path / "out"
    assert run(checkpoint, [photos / name for name in BAD], out, "--pooled", "--shard-size", "3") == 1
    assert table(out / "index.csv") == []
    assert len(table(out / "errors.csv")) == 4
    assert load_file(out / "shard-00000.safetensors")["pooled"].shape == (0, 64)
    assert run(checkpoint, photos / "00.png", tmp_path / "one", "--pooled", "--shard-size", "1") == 0


def test_errors_beyond_a_few_are_only_written(checkpoint, tmp_path, capsys):
    for count in (20, 25):
        out = tmp_path / str(count)
        (tmp_path / "list.txt").write_text("".join(f"{tmp_path / str(i)}.png\n" for i in range(count)))
        assert run(checkpoint, tmp_path / "list.txt", out) == 1
        said = capsys.readouterr().err
        assert said.count("FileNotFoundError") == 20
        assert said.count("further errors are not shown here") == (count > 20)
        assert len(table(out / "errors.csv")) == count


def test_a_decoding_process_that_dies(checkpoint, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Siglip2PackedImageProcessor, "read", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    assert run(checkpoint, photos, tmp_path / "out", "--decode-in", "processes", "--workers", "1") == 2
    assert "a decoding process was killed" in capsys.readouterr().err
