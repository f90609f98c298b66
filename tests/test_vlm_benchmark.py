"""The benchmark of other people's models: what it runs, and that it times right answers and right gradients only."""

import copy
import csv
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from siglip2_packed import bench
from siglip2_packed.measure import COLUMNS

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import vlm

needs_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU it computes in bfloat16")
TOWERS = ("lfm2_vl_tower", "smolvlm_tower", "gemma3_tower")
CASES = {(workload, mode) for workload in (*TOWERS, "lfm2_vl_model") for mode in ("forward", "train")}


def run(tmp_path, *flags):
    out = tmp_path / "rows.csv"
    code = vlm.main(["--shape", "tiny", "--rounds", "1", *flags, "--out", str(out)])
    return code, list(csv.DictReader(out.open()))


def timed(rows):
    return {(row["provider"], row["workload"], row["mode"]) for row in rows if row["metric"] == "time"}


def test_the_micro_batch():
    grids = [grid for conversation in vlm.micro_batch(vlm.TILE) for grid in conversation]
    assert sum(map(math.prod, grids)) == 14056 and grids.count((1, 32, 32)) == 12 and len(grids) == 20
    for side in (2, 4, 8, 32):
        conversations = vlm.micro_batch(side)
        assert [len(grids) for grids in conversations] == [10, 10]
        assert all(h % 2 == w % 2 == 0 < h * w <= side * side for grids in conversations for _, h, w in grids)
        ids = vlm.input_ids(conversations, 396)
        assert [(row == 396).sum() * 4 for row in ids] == [sum(map(math.prod, grids)) for grids in conversations]
        assert (ids != 396).sum(dim=1).min() == vlm.WORDS


@pytest.mark.parametrize("name", list(vlm.MODELS))
def test_a_step_trains_on_what_counts_and_adds_nothing_up(name):
    model, workloads = vlm.MODELS[name]("tiny")
    for workload in workloads:
        train, found = vlm.step(model, workload, "train"), []
        for _ in range(2):
            rows = vlm.rows_of(train(), workload)
            found.append({key: x.clone() for key, x in vlm.gradients_of(workload.part(model)).items()})
        assert all(torch.equal(x, found[1][key]) for key, x in found[0].items())
        assert torch.equal(rows, vlm.rows_of(vlm.step(model, workload, "forward")(), workload))
        if workload.real is not None:
            assert len(rows) == sum(h * w for grids in vlm.micro_batch(8) for _, h, w in grids)
            assert not workload.gradient[~workload.real].any() and workload.gradient[workload.real].all()
        if workload.labels is not None:
            pictures = workload.inputs["input_ids"] == 396
            assert (workload.labels == -100).equal(pictures) and not pictures.all()


def test_models_of_their_real_sizes(monkeypatch):
    """Made without numbers; their sizes are those that the model cards give."""
    monkeypatch.setattr(torch, "randn", lambda *size, **_: torch.empty(size, device="meta"))
    monkeypatch.setattr(vlm, "pad", lambda patches, grids: {"pixel_attention_mask": torch.ones(20, 1024)})
    with torch.device("meta"):
        model, _ = vlm.lfm2_vl("real")
        smolvlm, (sixteen,) = vlm.smolvlm("real")
        gemma, (four,) = vlm.gemma3("real")
    language = sum(x.numel() for x in model.model.language_model.parameters())
    vision = sum(x.numel() for x in model.model.vision_tower.parameters())
    assert 1.15e9 < language < 1.2e9 and 3.9e8 < vision < 4.2e8
    assert sixteen.gradient.shape == (16, 27 * 27, 1152) and four.gradient.shape == (4, 4096, 1152)
    assert {len(x["tower"].state_dict()) for x in (smolvlm, gemma)} == {27 * 16 + 5}


@needs_cpu
def test_what_cannot_be_replaced_is_a_row_with_the_reason(tmp_path, monkeypatch, capsys):
    def refuse(model):
        raise ValueError(f"{type(model).__name__} has no tower that is known")

    monkeypatch.setattr(vlm, "replaced", refuse)
    code, rows = run(tmp_path)
    told = capsys.readouterr().out
    assert code == 0 and list(rows[0]) == COLUMNS and {row["bench"] for row in rows} == {"vlm"}
    assert timed(rows) == {(vlm.PEER, *case) for case in CASES}
    reasons = {row["workload"]: row["unit"] for row in rows if row["metric"] == "not_run"}
    assert reasons.keys() == {workload for workload, _ in CASES}
    assert reasons["lfm2_vl_model"] == "cannot run: Lfm2VlForConditionalGeneration has no tower that is known"
    assert "ModuleDict has no tower that is known" in told


@needs_cpu
def test_before_and_after(tmp_path, capsys):
    pytest.importorskip("siglip2_packed.vlm")
    code, rows = run(tmp_path, "--models", "lfm2_vl")
    told = capsys.readouterr().out
    cases = {case for case in CASES if "lfm2" in case[0]}
    assert code == 0 and timed(rows) == {(x, *case) for x in (vlm.PEER, vlm.OURS) for case in cases}
    errors = {row["provider"]: [] for row in rows}
    for row in rows:
        if row["metric"] in ("relative_error", "gradient_error"):
            errors[row["provider"]].append(float(row["p50"]))
    assert [len(x) for x in errors.values()] == [6, 6] and max(map(max, errors.values())) < 1e-5
    time = {row["provider"]: float(row["p50"]) for row in rows if row["metric"] == "time" and row["mode"] == "train"
            and row["workload"] == "lfm2_vl_tower"}  # fmt: skip
    (line,) = [x for x in told.splitlines() if x.startswith("lfm2_vl_tower  train    ") and x.endswith("x")]
    assert float(line.split()[-1][:-1]) == pytest.approx(time[vlm.PEER] / time[vlm.OURS], rel=0.01, abs=0.01)


def changed(function):
    """A replacement whose features are `function` of what they were."""

    def change(module, args, out):
        out["last_hidden_state"] = function(out["last_hidden_state"])
        return out

    def replaced(model):
        model["tower"].register_forward_hook(change)
        return model

    return replaced


def without_a_gradient(model):
    model["tower"].embeddings.patch_embedding.bias.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("replaced", "reason", "modes"),
    [
        (changed(lambda x: x + (x - x.detach())), "refused: relative error of gradients 1.0e+00", {"forward"}),
        (changed(lambda x: 1.001 * x), "refused: relative error 1.0e-03", set()),
        (changed(lambda x: math.nan * x), "refused: relative error nan", set()),
        (
            without_a_gradient,
            "refused: 1 gradients missing or not finite: embeddings.patch_embedding.bias",
            {"forward"},
        ),
    ],
    ids=["doubled gradient", "features a little off", "no numbers", "missing gradient"],
)
@needs_cpu
def test_a_tower_that_is_wrong_is_refused_and_not_timed(tmp_path, monkeypatch, capsys, replaced, reason, modes):
    monkeypatch.setattr(vlm, "replaced", replaced)
    code, rows = run(tmp_path, "--models", "smolvlm")
    assert code == 1 and reason in capsys.readouterr().out
    assert any(row["unit"].startswith(reason) for row in rows if row["metric"] == "not_run")
    theirs = {(vlm.PEER, "smolvlm_tower", mode) for mode in ("forward", "train")}
    assert timed(rows) == theirs | {(vlm.OURS, "smolvlm_tower", mode) for mode in modes}


@pytest.mark.parametrize(
    ("before", "after", "right"),
    [
        (1.1, 1.11, {vlm.PEER, vlm.OURS}),
        (1.1, 1.13, {vlm.PEER}),
        (1, 1.001, {vlm.PEER}),
        (1.3, 1.19, {vlm.OURS}),
        (1.3, 1.21, set()),
    ],
)
def test_the_error_of_transformers_is_the_measure_up_to_a_fifth(before, after, right):
    exact, (workload,) = vlm.gemma3("tiny")
    providers = {
        key: changed(lambda x, factor=factor: factor * x)(copy.deepcopy(exact))
        for key, factor in ((vlm.PEER, before), (vlm.OURS, after))
    }
    rows = bench.Rows("vlm", "NVIDIA H200")
    ready, good = vlm.check(rows, exact, workload, providers, "forward", torch.float32)
    assert ready.keys() == right and good == (len(right) == 2)


def test_gradients_of_a_convolution_are_those_of_the_linear_layer_it_is():
    convolution, linear = nn.Conv2d(3, 8, 4, stride=4), nn.Linear(48, 8)
    linear.weight.data = convolution.weight.data.permute(0, 2, 3, 1).flatten(1)
    linear.bias.data = convolution.bias.data
    image, gradient = torch.randn(1, 3, 8, 12), torch.randn(6, 8)
    patches = image[0].unflatten(2, (3, 4)).unflatten(1, (2, 4)).permute(1, 3, 2, 4, 0).flatten(2).flatten(0, 1)
    convolution(image)[0].flatten(1).T.backward(gradient)
    linear(patches).backward(gradient)
    ours, theirs = (vlm.gradients_of(x) for x in (linear, convolution))
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name])


def test_nothing_to_time_is_an_error(capsys):
    with pytest.raises(SystemExit, match="2"):
        vlm.main(["--rounds", "0"])
    assert "--rounds must be at least 1, got 0" in capsys.readouterr().err


def test_the_table_is_of_the_rows(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(vlm.__file__).parent))
    tables = pytest.importorskip("readme_tables")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.vlm() == ""
    rows = bench.Rows("vlm", "NVIDIA H200")
    for workload in ("lfm2_vl_tower", "gemma3_tower"):
        for i, provider in enumerate((vlm.PEER, vlm.OURS)):
            if (workload, provider) == ("gemma3_tower", vlm.OURS):
                rows.leave_out(provider, workload, "forward", "bfloat16", "no replacement")
                continue
            rows.add(provider, workload, "forward", "bfloat16", "time", 53 - 29 * i, "ms")
            rows.add(provider, workload, "forward", "bfloat16", "peak_memory", 8 - 2 * i, "GiB")
    rows.write(tmp_path / "vlm_h200.csv")
    table = tables.vlm().splitlines()
    assert table[4:] == [
        "| lfm2 vl tower, forward | 53.0 | 24.0 | 2.21x | 8.00 | 6.00 | 0.75x |",
        "| gemma3 tower, forward | 53.0 |  |  | 8.00 |  |  |",
    ]
    sys.modules.pop("readme_tables")
