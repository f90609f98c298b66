"""`siglip2-packed align`: passes what is right, and nothing else."""

import contextlib
import dataclasses
import importlib.metadata
import json
import math

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.activations import ACT2FN

from siglip2_packed import align
from siglip2_packed.cli import main
from siglip2_packed.inspection import photographs, references
from siglip2_packed.inspection.compare import Comparison, compare_stages
from siglip2_packed.ops.positions import eager as positions

GRIDS = [(2, 3), (1, 4)]
NAMES = ["a.png", "b.png"]
SMALL = ["--device", "cpu", "--image-size", "8x12", "--verbose"]


@pytest.fixture
def small(monkeypatch):
    """Fewer random grids, so that a run takes no time: not square, below the table, a row."""
    monkeypatch.setattr(references, "GRIDS", ((13, 19), (2, 3), (1, 9), (7, 1)))


@pytest.mark.parametrize("zeroed", ["", "embeddings."])
def test_a_checkpoint_of_zeros_fails(checkpoint, capsys, tmp_path, small, zeroed):
    for file in checkpoint("tiny").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    state = load_file(tmp_path / "model.safetensors")
    state = {name: torch.zeros_like(x) if zeroed in name else x for name, x in state.items()}
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    assert main(["align", "--ckpt", str(tmp_path), *SMALL, "--gradients"]) == 1
    out = capsys.readouterr().out
    assert "nothing to compare: in the reference every feature is 0" in out and "ALL TESTS PASSED" not in out
    assert "FAIL   nothing to compare: in the reference it is 0" in out


# the command


def test_random_images_pass(checkpoint, capsys, tmp_path, small):
    report = tmp_path / "made" / "report.json"
    assert main(["align", "--ckpt", str(checkpoint("tiny72", full=True)), *SMALL, "--json", str(report)]) == 0
    out = capsys.readouterr().out
    assert "ALL TESTS PASSED" in out
    assert "FAIL" not in out
    for line in (
        transformers.__version__,
        importlib.metadata.version("torch"),
        "attention sdpa, against",
        "matmul off, cudnn off",
        "float32",
        "cpu",
    ):
        assert line in out

    report = json.loads(report.read_text())
    assert report["passed"] is True
    assert report["environment"]["attention"] == "auto"
    assert {row["attention"] for row in report["rows"] if row["case"] != "weights"} == {"sdpa"}
    stages = ["embeddings", "layer 1", "layer 2", "final", "pooled"]
    for case in ("2 random images of 8x12", "4 random images of different shapes"):
        for against, expected in (("kernels_ref", ["patches", *stages]), ("transformers", stages)):
            rows = [row for row in report["rows"] if (row["case"], row["reference"]) == (case, against)]
            assert [row["stage"] for row in rows] == expected
            assert all(row["passed"] and row["image"] and row["max_abs_bound"] > 0 for row in rows)


def test_one_wide_grids_are_left_to_the_padded_reference_where_transformers_has_them_wrong(
    checkpoint, capsys, tmp_path, small
):
    report = tmp_path / "report.json"
    assert main(["align", "--ckpt", str(checkpoint()), *SMALL, "--json", str(report)]) == 0
    rows = json.loads(report.read_text())["rows"]
    notes = {row["note"] for row in rows if row["reference"] == "transformers" and "different" in row["case"]}
    if transformers.__version__.startswith("4.57"):
        assert notes == {f"without 7x1: {references.MISPLACED}"}
        assert "without 7x1" in capsys.readouterr().out
    else:
        assert notes == {""}
    assert not any(row["note"] for row in rows if row["reference"] == "kernels_ref")


def test_an_image_that_transformers_misplaces_is_never_compared_with_it():
    case = references.random_case("one", [torch.randn(3, 28, 4)], 4)
    stages = {"patches": case.packed["pixel_values"], "final": torch.randn(7, 8)}
    assert compare_stages(case, "transformers", stages, stages, wrong=[0]) == []
    assert [row.passed for row in compare_stages(case, "kernels_ref", stages, stages, wrong=[0])] == [True, True]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_passes(checkpoint, capsys, dtype, small):
    assert main(["align", "--ckpt", str(checkpoint("tiny72")), *SMALL, "--dtype", dtype]) == 0
    assert f"{dtype}, against float32" in capsys.readouterr().out


def test_seed_spellings(checkpoint, capsys, small):
    flags = ["--batch_size", "3", "--image_size=12", "--threshold", "0.99", "--device", "cpu", "--verbose"]
    assert main(["align", "--ckpt", str(checkpoint()), *flags]) == 0
    assert "3 random images of 12x12, 27 patches" in capsys.readouterr().out


def test_seed_of_the_images(checkpoint, capsys, small):
    outputs = []
    for seed in ("1", "1", "2"):
        main(["align", "--ckpt", str(checkpoint()), *SMALL, "--seed", seed])
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]


def test_real_images(checkpoint, capsys, tmp_path):
    pytest.importorskip("skimage")
    report = tmp_path / "report.json"
    flags = ["--verbose", "--use_real_images", "--max-num-patches", "30", "--device", "cpu", "--json", str(report)]
    assert main(["align", "--ckpt", str(checkpoint()), *flags]) == 0
    out = capsys.readouterr().out
    rows = json.loads(report.read_text())["rows"]
    assert len(photographs.PHOTOGRAPHS) > 7
    together = f"{len(photographs.PHOTOGRAPHS)} images in one pack"
    for case in (*photographs.PHOTOGRAPHS, together):
        stages = {row["stage"] for row in rows if row["case"] == case and row["reference"] == "transformers"}
        assert stages == {"patches", "embeddings", "layer 1", "layer 2", "layer 3", "final", "pooled"}, case
    assert out.count(f"{together}, ") == 2
    modes = {Image.open(path).mode for path in photographs.photographs()}
    assert {"L", "RGB", "RGBA"} <= modes


def test_what_passed_is_summed_in_a_dozen_lines(checkpoint, capsys, tmp_path):
    rng, report = np.random.default_rng(0), tmp_path / "report.json"
    for i in range(3):
        Image.fromarray(rng.integers(0, 256, (20 + i, 33, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    argv = ["align", "--ckpt", str(checkpoint()), "--device", "cpu", "--images", str(tmp_path), "--json", str(report)]
    assert main(argv) == 0
    table = capsys.readouterr().out.split("\n\n")[1].splitlines()
    rows = [row for row in json.loads(report.read_text())["rows"] if row["case"] != "weights"]
    kinds = {(row["reference"], row["stage"].split(" ")[0]) for row in rows}
    assert [tuple(line.split()[:2]) for line in table[1:]] == [
        (reference, kind + "s" * (kind == "layer"))
        for reference in ("kernels_ref", "transformers")
        for kind in ("patches", "embeddings", "layer", "final", "pooled")
        if (reference, kind) in kinds
    ]
    assert sum(int(line.split()[2]) for line in table[1:]) == len(rows)
    names = {field.name for field in dataclasses.fields(Comparison)}
    compared = [Comparison(**{name: value for name, value in row.items() if name in names}) for row in rows]
    for line in table[1:]:
        reference, kind = line.split()[0], line.split()[1]
        of_kind = [one for one in compared if one.reference == reference and kind in (one.stage, "layers")]
        of_kind = [one for one in of_kind if kind != "layers" or one.stage.startswith("layer ")]
        assert max(of_kind, key=lambda one: one.severity).numbers in line


@pytest.mark.parametrize("verbose", [[], ["--verbose"]])
def test_what_failed_is_shown_in_full_once(checkpoint, capsys, monkeypatch, tmp_path, verbose):
    Image.new("RGB", (30, 20), "red").save(tmp_path / "a.png")
    original = align.run_packed

    def wrong(model, case):
        stages = dict(original(model, case))
        return stages | {"final": stages["final"] + 0.1}

    monkeypatch.setattr(align, "run_packed", wrong)
    flags = ["--device", "cpu", "--images", str(tmp_path), *verbose]
    rows = failing_rows(capsys, ["align", "--ckpt", str(checkpoint()), *flags])
    alone = [row for row in rows if row.split()[0] == "final"]
    assert len(alone) == 4  # the image alone and the pack, against both references


def test_own_images_and_folders(checkpoint, capsys, tmp_path):
    rng = np.random.default_rng(0)
    for name, shape in (("tall.png", (41, 9, 3)), ("grey.jpg", (20, 33)), ("alpha.png", (16, 16, 4))):
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(tmp_path / name)
    sideways = Image.fromarray(rng.integers(0, 256, (20, 40, 3), dtype=np.uint8))
    exif = sideways.getexif()
    exif[0x0112] = 6
    sideways.save(tmp_path / "phone.jpg", exif=exif)
    extra = tmp_path / "tall.png"
    assert (
        main(
            [
                "align",
                "--ckpt",
                str(checkpoint()),
                "--device",
                "cpu",
                "--verbose",
                "--images",
                str(tmp_path),
                str(extra),
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "5 images in one pack" in out
    assert "phone.jpg" in out


@pytest.mark.parametrize("mode", ["I;16", "F"])
def test_images_that_have_no_reference_are_refused(checkpoint, capsys, tmp_path, mode):
    Image.new(mode, (9, 9)).save(tmp_path / "deep.tif")
    assert main(["align", "--ckpt", str(checkpoint()), "--images", str(tmp_path / "deep.tif"), "--device", "cpu"]) == 2
    assert f"deep.tif: mode {mode}" in capsys.readouterr().err


def failing_rows(capsys, argv):
    assert main(argv) == 1
    out = capsys.readouterr().out
    assert "ALL TESTS PASSED" not in out
    assert " FAILED" in out
    return [line for line in out.splitlines() if "FAIL " in line]


def plant(monkeypatch, change):
    load = align.load_packed

    def planted(*args):
        model = load(*args)
        with torch.no_grad():
            change(model)
        return model

    monkeypatch.setattr(align, "load_packed", planted)


def swap_positions(monkeypatch):
    resize = positions.resize_positions
    swapped = lambda table, grids, *more: resize(table, [(t, w, h) for t, h, w in grids], *more)  # noqa: E731
    monkeypatch.setattr(positions, "resize_positions", swapped)


def no_antialias(monkeypatch):
    def resize(table, grids, ids, mode):
        side = math.isqrt(len(table))
        image = table.reshape(1, side, side, -1).permute(0, 3, 1, 2)
        sizes = [(h, w) for _, h, w in grids]
        resized = (torch.nn.functional.interpolate(image, size=size, mode="bilinear") for size in sizes)
        return torch.cat([x.flatten(2)[0].T for x in resized])

    monkeypatch.setattr(positions, "resize_positions", resize)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bug", [swap_positions, no_antialias])
def test_wrong_positions_fail_from_the_embeddings_on(checkpoint, capsys, monkeypatch, small, bug, dtype):
    bug(monkeypatch)
    rows = failing_rows(capsys, ["align", "--ckpt", str(checkpoint()), *SMALL, "--dtype", dtype])
    assert any(row.split()[0] == "embeddings" for row in rows)
    assert not any(row.split()[0] == "patches" for row in rows)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_dropped_bias_fails(checkpoint, capsys, monkeypatch, small, dtype):
    plant(monkeypatch, lambda model: model.encoder.layers[1].self_attn.v_proj.bias.zero_())
    rows = failing_rows(capsys, ["align", "--ckpt", str(checkpoint()), *SMALL, "--dtype", dtype])
    assert not any(row.startswith(("  embeddings", "  layer 1 ")) for row in rows)
    assert any(row.startswith("  layer 2 ") for row in rows)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_another_activation_fails(checkpoint, capsys, monkeypatch, small, activation):
    plant(monkeypatch, lambda model: setattr(model.encoder.layers[0].mlp, "activation_fn", ACT2FN[activation]))
    rows = failing_rows(capsys, ["align", "--ckpt", str(checkpoint()), *SMALL])
    assert any(row.startswith("  layer 1 ") for row in rows)
    assert not any(row.startswith("  embeddings ") for row in rows)


def test_another_head_fails_at_the_end(checkpoint, capsys, monkeypatch, small):
    plant(monkeypatch, lambda model: model.head.probe.mul_(1.01))
    rows = failing_rows(capsys, ["align", "--ckpt", str(checkpoint()), *SMALL])
    assert {row.split()[0] for row in rows} == {"pooled"}


def test_a_lost_head_fails(checkpoint, capsys, monkeypatch, small):
    plant(monkeypatch, lambda model: delattr(model, "head"))
    rows = failing_rows(capsys, ["align", "--ckpt", str(checkpoint()), *SMALL])
    assert {row.split()[0] for row in rows} == {"pooled"}


def test_a_fault_in_preprocessing_fails_image_by_image(checkpoint, capsys, monkeypatch, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 20, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    load = references.Siglip2PackedImageProcessor.from_pretrained
    nearest = staticmethod(lambda ckpt: load(ckpt, resample=Image.Resampling.NEAREST))
    monkeypatch.setattr(references.Siglip2PackedImageProcessor, "from_pretrained", nearest)
    flags = ["--images", str(tmp_path / "a.png"), "--device", "cpu", "--verbose"]
    rows = failing_rows(capsys, ["align", "--ckpt", str(checkpoint()), *flags])
    assert any(row.startswith("  a.png ") for row in rows)
    assert any(row.startswith("  patches ") for row in rows)


GRADIENTS = ["--gradients", *SMALL]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_gradients_of_every_parameter_pass(checkpoint, capsys, tmp_path, small, dtype):
    """The 7x1 image is no part of the loss where transformers misplaces it."""
    report, ckpt = tmp_path / "report.json", checkpoint("tiny72")
    assert main(["align", "--ckpt", str(ckpt), *GRADIENTS, "--dtype", dtype, "--json", str(report)]) == 0
    out = capsys.readouterr().out
    rows = json.loads(report.read_text())["gradients"]
    expected = [name for name, _ in align.load_packed(str(ckpt), "cpu", torch.float32, "auto").named_parameters()]
    for case in ("2 random images of 8x12", "4 random images of different shapes"):
        of_case = [row for row in rows if row["case"] == case]
        assert sorted(row["parameter"] for row in of_case) == sorted(expected)
        assert all(row["passed"] and 0 <= row["relative_error"] <= row["bound"] for row in of_case)
        assert all((row["transformers_error"] is None) == (dtype == "float32") for row in of_case)
        largest = max(of_case, key=lambda row: row["relative_error"])
        assert f"largest: {largest['relative_error']:.1e} of {largest['parameter']}" in out
    assert out.count("gradients against transformers in float32") == 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("planted", "says"), [(lambda g: g * 1.1, "FAIL"), (lambda g: g * math.nan, "FAIL   non-finite values")]
)
def test_one_wrong_gradient_fails(checkpoint, capsys, monkeypatch, small, dtype, planted, says):
    """Which no comparison of features sees."""
    plant(monkeypatch, lambda model: model.encoder.layers[1].self_attn.q_proj.weight.register_hook(planted))
    argv = ["align", "--ckpt", str(checkpoint("tiny72")), *SMALL, "--dtype", dtype]
    assert main(argv) == 0
    capsys.readouterr()
    rows = failing_rows(capsys, [*argv, "--gradients"])
    assert len(rows) == 2 and all("layers.1.self_attn.q_proj.weight" in row and says in row for row in rows)


def test_a_parameter_without_a_gradient_fails(checkpoint, capsys, monkeypatch, small):
    run = references.run_packed

    def detached(model, case):
        stages = run(model, case)
        return stages | {"pooled": stages["pooled"].detach()}

    monkeypatch.setattr("siglip2_packed.inspection.gradients.run_packed", detached)
    rows = failing_rows(capsys, ["align", "--ckpt", str(checkpoint()), *GRADIENTS])
    of_head = [row for row in rows if row.startswith("  head.")]
    assert len(of_head) > 10 and all("this model has no such gradient" in row for row in of_head)


def poison(stages, value):
    stages["layer 2"] = stages["layer 2"].clone()
    stages["layer 2"][1, 0] = value
    return stages


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("functions", [["run_packed"], ["run_reference", "run_transformers"], None])
def test_non_finite_values_end_in_exit_code_1(checkpoint, capsys, tmp_path, monkeypatch, small, value, functions):
    for name in functions or ["run_packed", "run_reference", "run_transformers"]:
        module, run = align if name == "run_packed" else references, getattr(references, name)
        monkeypatch.setattr(module, name, lambda *args, run=run: poison(run(*args), value))
    report = tmp_path / "report.json"
    argv = ["align", "--ckpt", str(checkpoint()), *SMALL, "--json", str(report)]
    rows = failing_rows(capsys, argv)
    assert len(rows) == 4
    assert all(row.startswith("  layer 2 ") and "non-finite" in row for row in rows)
    report = json.loads(report.read_text(), parse_constant=pytest.fail)
    assert report["passed"] is False
    assert [row["max_abs"] for row in report["rows"] if row["stage"] == "layer 2"] == [None] * 4


def edit_checkpoint(source, folder, change):
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    state = load_file(folder / "model.safetensors")
    save_file(change(dict(state)), folder / "model.safetensors", {"format": "pt"})
    return folder


def test_nan_weights_fail(checkpoint, capsys, tmp_path, small):
    def poisoned(state):
        name = next(name for name in state if name.endswith("layers.1.mlp.fc1.bias"))
        return state | {name: torch.full_like(state[name], math.nan)}

    folder = edit_checkpoint(checkpoint(), tmp_path / "nan", poisoned)
    rows = failing_rows(capsys, ["align", "--ckpt", str(folder), *SMALL])
    assert all("non-finite" in row for row in rows)
    assert any(row.startswith("  final ") for row in rows)


def test_a_checkpoint_without_head_is_compared_without_it(checkpoint, capsys, tmp_path, small):
    headless = lambda state: {name: x for name, x in state.items() if "head." not in name}  # noqa: E731
    folder = edit_checkpoint(checkpoint(), tmp_path / "headless", headless)
    assert main(["align", "--ckpt", str(folder), *SMALL]) == 0
    assert "pooled" not in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_reference_with_random_weights_fails(checkpoint, capsys, tmp_path, small, dtype):
    """A layout that transformers does not know: it starts from random weights and says so in a warning only."""
    nested = lambda state: {f"model.vision_tower.{name}": x for name, x in state.items()}  # noqa: E731
    folder = edit_checkpoint(checkpoint(), tmp_path / "nested", nested)
    assert main(["align", "--ckpt", str(folder), *SMALL, "--dtype", dtype]) == 1
    out = capsys.readouterr().out
    assert "FAIL: 64 tensors are not loaded but random" in out
    assert "1 of " in out.splitlines()[-1]
    assert "against transformers" not in out


def test_one_missing_reference_tensor_fails(checkpoint, capsys, monkeypatch, small):
    load = references.load_transformers
    monkeypatch.setattr(references, "load_transformers", lambda *args: load(*args)._replace(not_loaded=["head.probe"]))
    assert main(["align", "--ckpt", str(checkpoint()), *SMALL]) == 1
    assert "FAIL: 1 tensors are not loaded but random (head.probe)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--threshold", "nan"], "--threshold is a cosine, from -1 to 1, got nan"),
        (["--device", "meta"], "device 'meta' cannot be used"),
        (["--image-size", "10"], "10x10 is not a multiple of patch_size 4"),
        (["--images", "{tmp}"], "no images in"),
        (["--device", "nonsense"], "device 'nonsense' cannot be used"),
        (["--device", "cpu", "--attn-implementation", "torch_varlen"], "needs a CUDA device"),
        (["--device", "cpu", "--attn-implementation", "flash_attention_2"], "flash_attention_2"),
        (["--ckpt", "{tmp}/nowhere"], "nowhere"),
        (["--ckpt", "{tmp}"], "config.json"),
    ],
)
def test_user_errors_are_one_line(checkpoint, capsys, tmp_path, flags, message):
    flags = [flag.replace("{tmp}", str(tmp_path)) for flag in flags]
    assert main(["align", "--ckpt", str(checkpoint()), *flags]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1, err
    assert message in err[0]


def test_without_scikit_image(checkpoint, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "skimage", None)
    assert main(["align", "--ckpt", str(checkpoint()), "--use-real-images"]) == 2
    assert "pip install 'siglip2-packed[demo]'" in capsys.readouterr().err


def test_names_the_backend_that_ran(checkpoint, capsys, small):
    assert main(["align", "--ckpt", str(checkpoint()), *SMALL, "--attn_implementation", "eager"]) == 0
    out = capsys.readouterr().out
    assert any(line.split() == ["attention", "eager"] for line in out.splitlines())
    assert out.count("attention eager, against") == 4


@pytest.mark.parametrize("matmul", ["highest", "high"])
@pytest.mark.parametrize("cudnn", [True, False])
def test_tf32_is_off_while_comparing_and_restored(matmul, cudnn):
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = cudnn
        with contextlib.suppress(KeyError), references.full_precision() as words:
            assert words == "matmul off, cudnn off"
            assert not torch.backends.cuda.matmul.allow_tf32
            assert not torch.backends.cudnn.allow_tf32
            raise KeyError("restored after errors as well")
        assert torch.backends.cuda.matmul.allow_tf32 is (matmul == "high")
        assert torch.backends.cudnn.allow_tf32 is cudnn
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
