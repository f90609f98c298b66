"""The training benchmark learns from images, counts what it does, and trains on two ranks as on one."""

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from siglip2_packed.measure import COLUMNS, Rows
from siglip2_packed.preprocess import Siglip2PackedImageProcessor

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import captioned_crops
import train_tower

TINY = (
    "--shape tiny --budget 256 --max-num-patches 48 --images 200 --unseen 24 --workers 0 --every 5 --warmup 5".split()
)


def captioner(folder):
    torch.manual_seed(0)
    return train_tower.Captioner(folder, "tiny").train()


@pytest.fixture(scope="module")
def items():
    dataset = captioned_crops.CaptionedCrops(7, seed=3, processor=Siglip2PackedImageProcessor(4, 48))
    return [dataset[i] for i in range(len(dataset))]


def read(file):
    """Rows, and their medians by metric: one each, finite."""
    rows = list(csv.DictReader(file.open()))
    medians = {row["metric"]: float(row["p50"]) for row in rows}
    assert list(rows[0]) == COLUMNS and len(medians) == len(rows) and np.isfinite(list(medians.values())).all()
    return rows, medians


def test_loss_falls(tmp_path):
    out = tmp_path / "rows.csv"
    options = "--steps 120 --engine ddp --dtype float32 --lr 1e-2 --out".split()
    train_tower.main([*TINY, *options, str(out)])
    assert not dist.is_initialized()
    rows, found = read(out)
    assert rows[0]["provider"] == "siglip2_packed:ddp" and rows[0]["workload"] == "tiny_max48_budget256_ranks1"
    assert found["loss_last"] < found["loss_first"] / 5
    assert found["loss_new_crops"] < found["loss_mixed_up"]
    assert found["loss_without_images"] == pytest.approx(0.240, abs=0.01)
    assert found["name_accuracy"] > 2 * found["chance"] == pytest.approx(2 / 12)
    assert found["images_per_s"] * 30 < found["patches_per_s"] < found["images_per_s"] * 48
    assert found["patches_per_s"] * found["time"] / 1e3 == pytest.approx(220, rel=0.35)


def test_two_ranks_in_bfloat16(ranks, tmp_path):
    out = tmp_path / "rows.csv"
    few = "--steps 4 --every 2 --warmup 2 --unseen 12 --checkpointing --cuda-graphs --out".split()
    ranks(train_tower.main, [*TINY, *few, str(out)])
    rows, found = read(out)
    assert rows[0]["provider"] == "siglip2_packed:fsdp" and rows[0]["dtype"] == "bfloat16"
    assert rows[0]["workload"] == "tiny_max48_budget256_checkpointing_graphs_ranks2"
    assert 5 < found["loss_first"] < 6  # of 258 tokens: log 258 = 5.55
    assert found["patches_per_s"] * found["time"] / 1e3 == pytest.approx(2 * 220, rel=0.35)


def test_rows_replace_those_of_the_same_run_and_are_compared_with_one_rank(tmp_path, monkeypatch):
    monkeypatch.setattr(train_tower, "say", lambda text: None)
    file = tmp_path / "rows.csv"
    runs = [("ddp", 2, 150), ("ddp", 1, 100), ("fsdp", 1, 120), ("ddp", 2, 160), ("fsdp", 2, 180), ("fsdp", 1, 200)]
    for engine, ranks, rate in runs:
        rows = Rows("train_tower", "card")
        rows.add(f"siglip2_packed:{engine}", f"tiny_ranks{ranks}", "train", "float32", "patches_per_s", rate, "1/s")
        train_tower.save(rows, file, ranks)
    found = [(row["provider"][15:], row["workload"], row["metric"], row["p50"]) for row in csv.DictReader(file.open())]
    assert found == [
        ("ddp", "tiny_ranks1", "patches_per_s", "100"),
        ("ddp", "tiny_ranks2", "patches_per_s", "160"),
        ("ddp", "tiny_ranks2", "scaling_efficiency", "0.8"),
        ("fsdp", "tiny_ranks2", "patches_per_s", "180"),
        ("fsdp", "tiny_ranks2", "scaling_efficiency", "0.75"),
        ("fsdp", "tiny_ranks1", "patches_per_s", "200"),
    ]


def gradients(engine, checkpointing, folder, items):
    """On a rank: five of the images are on one, two on the other, so that caption tokens are not evenly spread."""
    model = captioner(folder)
    packed = captioned_crops.batch((items[:5], items[5:])[dist.get_rank()])
    run = train_tower.parallelize(model, engine, torch.float32, checkpointing)
    loss = train_tower.mean_loss(run, packed)
    loss.backward()
    whole = {name: getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for name, p in model.named_parameters()}
    return loss.item(), {name: grad.double().numpy() for name, grad in whole.items()}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_gradients_of_two_ranks_are_those_of_one(ranks, checkpoint, items, engine, checkpointing):
    folder = checkpoint("tiny")
    results = ranks(gradients, engine, checkpointing, folder, items)
    model, packed = captioner(folder), captioned_crops.batch(items)
    loss = train_tower.loss_sum(model(packed), packed) / len(packed["targets"])
    loss.backward()
    assert np.mean([loss for loss, _ in results]) == pytest.approx(loss.item(), rel=1e-5)
    expected = {name: p.grad.double().numpy() for name, p in model.named_parameters()}
    largest = max(np.linalg.norm(grad) for grad in expected.values())
    for _, found in results:
        assert found.keys() == expected.keys()
        for name, grad in expected.items():
            error, size = np.linalg.norm(found[name] - grad), np.linalg.norm(grad)
            assert error <= 1e-5 * max(size, 1e-2 * largest), f"{name}: {size:.1e}, off by {error:.1e}"


@torch.no_grad()
def test_predictions_in_a_batch_are_those_of_every_image_alone(checkpoint, items):
    """With the loss that transformers computes from labels."""
    model = captioner(checkpoint("tiny"))
    packed = captioned_crops.batch(items)
    logits = model(packed).split(packed["lengths"])
    targets = packed["targets"].split(packed["lengths"])
    assert len({tuple(item["grid_thw"][0].tolist()) for item in items}) > 3
    for item, ours, target in zip(items, logits, targets):
        features = model.projector(model.tower(item["pixel_values"], item["grid_thw"]))
        text = torch.tensor([captioned_crops.BOS, *item["caption"].encode(), captioned_crops.EOS])
        tokens = torch.cat([features, model.lm.get_input_embeddings()(text)])
        labels = torch.cat([torch.full((len(features) + 1,), -100), text[1:]])
        expected = model.lm(inputs_embeds=tokens[None], labels=labels[None])
        torch.testing.assert_close(ours, expected.logits[0, len(features) : -1], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(torch.nn.functional.cross_entropy(ours, target), expected.loss)


@torch.no_grad()
def test_flops_are_those_of_the_products_that_run(checkpoint, items):
    model, packed = captioner(checkpoint("tiny")), captioned_crops.batch(items[:1])
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(packed)
    rows = len(packed["pixel_values"]) + len(packed["inputs"])
    counted_twice = 2 * 2 * 64 * rows**2  # the half that causal attention does not need
    assert model.training_flops(packed) / 3 == pytest.approx(counter.get_total_flops() - counted_twice, rel=1e-3)


def test_entropy_is_that_of_the_captions():
    dataset = object.__new__(captioned_crops.CaptionedCrops)
    dataset.captions = ["ab", "ab", "cd", "cd"]
    assert dataset.entropy() == pytest.approx(np.log(2) / 3)


def test_images_mixed_up_have_captions_of_others():
    dataset = captioned_crops.CaptionedCrops(30, seed=0, processor=Siglip2PackedImageProcessor(4, 48))
    for caption, other in zip(dataset.captions, dataset.mixed_up().captions):
        assert caption != other


def test_captions_say_nothing_that_the_grid_tells(items):
    names = set(captioned_crops.PHOTOGRAPHS.values())
    assert {item["caption"] for item in items} <= names and len(names) == 12


def test_chance_is_one_name_for_all():
    dataset = object.__new__(captioned_crops.CaptionedCrops)
    dataset.captions = ["ab", "ab", "ab", "cd"]
    assert dataset.chance() == 0.75
    assert train_tower.learnt(0.0833, 1 / 12) == train_tower.learnt(0.16, 1 / 12) == "nothing learnt beyond chance (8%)"
    assert train_tower.learnt(0.79, 1 / 12) == "79% right"
