"""Training in CUDA graphs is training without: to the bit where rows are as many, within rounding of the pack's own."""

import copy
import gc
import threading
from functools import partial
from types import SimpleNamespace

import graphed
import pytest
import recorded_graphs
import torch
import torch.utils.checkpoint
from graphed import (
    BUDGETS,
    GRIDS,
    OTHERS,
    AtBucketRows,
    flat,
    gradients,
    graphs_of,
    near,
    on_both,
    on_pooled,
    on_tokens,
    relative,
    same,
    same_gradients,
    step,
    weighted,
)
from implementations import INTERPRETED
from peft import LoraConfig, get_peft_model
from ranks import NO_IMAGES, TOKENS, UNEVEN, Task, pack, parameters_of, train, train_alone
from ranks import check as ranks_check
from test_engines import ZERO3
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.utils.checkpoint import checkpoint

from siglip2_packed import Siglip2PackedVisionModel, training_graph
from siglip2_packed.encoder import Siglip2PackedEncoderLayer
from siglip2_packed.graphs import CUDAGraphs, Graphs
from siglip2_packed.lending import Lot
from siglip2_packed.ops.runtime import choice
from siglip2_packed.ops.runtime.check import Verdict
from siglip2_packed.parallel import apply_fsdp, mean_over_ranks

BUSY = "a forward whose backward is still to come has the graphs' memory"
HOOKED = "hooks on saved tensors, as checkpoint's and save_on_cpu's, have to see what each operation keeps"
LENT = "another thread, or more than .grad, holds an earlier step's gradients in the graphs' memory"


def freeze(model, learning):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(learning(name))


def check(world, model, loss=on_tokens, packs=(GRIDS,), count=1, compare=same):
    """Each pack's step, twice in graphs, against the model's at the bucket's rows and at the pack's own."""
    graphs = CUDAGraphs(model, BUDGETS)
    for seed, grids in enumerate(packs):
        packed = world.pack(grids, seed)
        expected = step(AtBucketRows(model), model, packed, loss)
        for _ in range(2):
            compare(step(graphs, model, packed, loss), expected)
        near(step(model, model, packed, loss), expected, world.noise)
    assert len(graphs_of(graphs)) == count
    return graphs


@pytest.mark.parametrize("loss", [on_tokens, on_pooled, on_both])
def test_gradients_of_a_loss(world, loss):
    """Also of a pack of fewer images than the one before, in the same bucket."""
    check(world, world.model(), loss, packs=[GRIDS, [(1, 8, 32), (5, 2, 2)]])


def test_gradients_of_packs_of_many_buckets(world):
    check(world, world.model(vision_use_head=False), packs=[*OTHERS, *OTHERS[::-1]], count=6)


@pytest.mark.gpu
def test_gradients_at_the_width_of_so400m(world):
    from transformers import Siglip2VisionConfig

    from siglip2_packed.workloads import SHAPES

    torch.manual_seed(0)
    with torch.device("cuda"):
        model = Siglip2PackedVisionModel(Siglip2VisionConfig(**{**SHAPES["so400m"], "num_hidden_layers": 2}))
    model.to(torch.bfloat16)
    graphs = CUDAGraphs(model)
    for grids in (GRIDS, [(1, 16, 16)] * 4, [(1, 32, 32), (1, 24, 32), (1, 36, 36), (1, 28, 36)]):
        packed = world.pack(grids, patches=768)
        expected = step(AtBucketRows(model, graphs.graphs.budgets), model, packed, on_both)
        same(step(graphs, model, packed, on_both), expected)
        near(step(model, model, packed, on_both), expected, world.noise)


LEARNING = {
    "the last layer": lambda name: "layers.1." in name,
    "the first layer": lambda name: "layers.0." in name,
    "the norm at the end": lambda name: "post_layernorm" in name,
    "the head": lambda name: name.startswith("head"),
    "the embeddings": lambda name: name.startswith("embeddings"),
    "biases": lambda name: name.endswith("bias"),
    "one weight": lambda name: name == "encoder.layers.0.self_attn.k_proj.weight",
}


@pytest.mark.parametrize("learning", LEARNING)
def test_frozen_parameters_get_no_gradient(world, learning):
    model = world.model()
    freeze(model, LEARNING[learning])
    loss = on_pooled if learning == "the head" else on_both
    as_for_inference = learning in ("the norm at the end", "the head")  # the encoder, without graphs
    graphs = check(world, model, loss, compare=partial(near, bound=world.noise) if as_for_inference else same)
    step(graphs, model, world.pack(), loss)
    assert gradients(model).keys() == {name for name, p in model.named_parameters() if p.requires_grad}


def test_a_model_that_is_frozen_or_unfrozen_later_is_captured_anew(world):
    model = world.model(vision_use_head=False)
    graphs, packed = CUDAGraphs(model, BUDGETS), world.pack()
    for learning in (lambda name: True, lambda name: "layers.1" in name, lambda name: True):
        freeze(model, learning)
        same(step(graphs, model, packed), step(AtBucketRows(model), model, packed))
    freeze(model, lambda name: False)
    assert not graphs(**packed).last_hidden_state.requires_grad
    assert len(graphs_of(graphs)) == 3


@pytest.mark.parametrize("select_layer", [0, 1, -2])
def test_models_that_end_at_a_layer(world, select_layer):
    check(world, world.model(select_layer=select_layer))


@pytest.mark.parametrize("again", [False, True])
def test_gradient_checkpointing_changes_no_bit(world, monkeypatch, again):
    """Layers run once more in backward."""
    model, runs, forward = world.model(), [], Siglip2PackedEncoderLayer.forward
    monkeypatch.setattr(
        Siglip2PackedEncoderLayer, "forward", lambda *args, **kwargs: runs.append(1) or forward(*args, **kwargs)
    )
    packed = world.pack()
    expected = step(AtBucketRows(model), model, packed, on_both)
    graphs = CUDAGraphs(model, BUDGETS)
    if again:  # it is seen, whenever it comes
        same(step(graphs, model, packed, on_both), expected)
    model.gradient_checkpointing_enable()
    runs.clear()
    for _ in range(2):
        same(step(graphs, model, packed, on_both), expected)
    assert len(graphs_of(graphs)) == 1 + again
    assert len(runs) == 4 * len(model.encoder.layers)  # to get ready and to be captured, forward and again


def test_tied_layers_add_up_their_gradients(world):
    model = world.model(vision_use_head=False)
    model.encoder.layers[1].mlp = model.encoder.layers[0].mlp
    graphs, packed = CUDAGraphs(model, BUDGETS), world.pack()
    expected = step(AtBucketRows(model), model, packed)
    for _ in range(2):
        near(step(graphs, model, packed), expected, world.noise)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_a_model_within_a_checkpoint(world, said, reentrant, first):
    """Whether or not its graphs are there already."""
    model = world.model(vision_use_head=False)
    graphs, packed = CUDAGraphs(model, BUDGETS), world.pack()
    expected = step(AtBucketRows(model), model, packed)
    if not first:
        step(graphs, model, packed)
    scale = torch.ones((), device=world.device, requires_grad=True)

    def run(**packed):
        def features(scale):
            return graphs(**packed).last_hidden_state * scale

        hidden_states = torch.utils.checkpoint.checkpoint(features, scale, use_reentrant=reentrant)
        return SimpleNamespace(last_hidden_state=hidden_states)

    for _ in range(2):
        near(step(run, model, packed), expected, world.noise)
    assert said() == [HOOKED] * (not reentrant)
    same(step(graphs, model, packed), expected)


@pytest.mark.parametrize("first", [False, True])
def test_activations_that_are_kept_on_the_host(world, said, first):
    model = world.model(vision_use_head=False)
    graphs, packed = CUDAGraphs(model, BUDGETS), world.pack()
    expected = step(AtBucketRows(model), model, packed)
    if not first:
        step(graphs, model, packed)
    for _ in range(2):
        with torch.autograd.graph.save_on_cpu():
            found = step(graphs, model, packed)
        near(found, expected, world.noise)
    assert said() == [HOOKED]
    same(step(graphs, model, packed), expected)


# Adapters


def adapted(model, **kwargs):
    config = LoraConfig(target_modules=["q_proj", "v_proj", "fc1"], r=4, init_lora_weights="gaussian", **kwargs)
    wrapped = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:  # else zeros, and nothing of A learns
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return wrapped


def test_lora(world):
    model = world.model(vision_use_head=False)
    adapted(model)
    graphs, packed = check(world, model), world.pack()
    _, grads = step(graphs, model, packed)
    assert len(grads) == 2 * 3 * len(model.encoder.layers) and all("lora" in name for name in grads)


def test_lora_over_inputs_that_are_made_to_require_a_gradient(world):
    """As training with reentrant checkpointing has it, of a tower within a VLM."""
    model = world.model(vision_use_head=False)
    adapted(model)
    model.enable_input_require_grads()
    check(world, model)


def test_lora_by_the_model_that_peft_wraps(world):
    model = world.model(vision_use_head=False)
    wrapped, packed = adapted(model), world.pack()
    expected = step(AtBucketRows(model), model, packed)
    model.cuda_graphs_enable(BUDGETS)
    same(step(wrapped, model, packed), expected)
    assert len(graphs_of(model)) == 1


def test_parametrised_weights(world):
    model = world.model(vision_use_head=False)
    nn.utils.parametrizations.weight_norm(model.encoder.layers[0].mlp.fc1)
    check(world, model, compare=partial(near, bound=world.noise))


def test_an_adapter_that_is_switched_off_and_merged_is_seen(world):
    model = world.model(vision_use_head=False)
    packed = world.pack()
    base = AtBucketRows(model)(**packed).last_hidden_state.detach()
    graphs = CUDAGraphs(model, BUDGETS)
    assert torch.equal(graphs(**packed).last_hidden_state, base)
    wrapped = adapted(model)
    changed = graphs(**packed).last_hidden_state.detach()
    assert torch.equal(changed, AtBucketRows(model)(**packed).last_hidden_state)
    assert relative(changed, base) > 3 * world.noise
    with torch.no_grad():
        assert torch.equal(graphs(**packed).last_hidden_state, AtBucketRows(model)(**packed).last_hidden_state)
        assert relative(graphs(**packed).last_hidden_state, changed) < world.noise
    with wrapped.disable_adapter(), torch.no_grad():
        assert torch.equal(graphs(**packed).last_hidden_state, AtBucketRows(model)(**packed).last_hidden_state)
        assert relative(graphs(**packed).last_hidden_state, base) < world.noise
    same(step(graphs, model, packed), step(AtBucketRows(model), model, packed))
    merged = wrapped.merge_and_unload()
    with torch.no_grad():
        assert relative(CUDAGraphs(merged, BUDGETS)(**packed).last_hidden_state, changed) < world.noise
        assert relative(graphs(**packed).last_hidden_state, changed) < world.noise


def test_a_second_adapter_trains(world, said):
    model = world.model(vision_use_head=False)
    wrapped, packed = adapted(model), world.pack()
    model.cuda_graphs_enable(BUDGETS)
    step(wrapped, model, packed)
    wrapped.add_adapter("second", LoraConfig(target_modules=["q_proj", "v_proj", "fc1"], r=2, init_lora_weights=False))
    wrapped.set_adapter("second")
    found = step(wrapped, model, packed)
    same(found, step(AtBucketRows(model), model, packed))
    assert all("second" in name for name in found[1]) and len(graphs_of(model)) == 1 and not said()


def test_dropout_differs_from_step_to_step_and_trains(world):
    model = world.model(vision_use_head=False)
    adapted(model, lora_dropout=0.5)
    model.train()
    graphs, packed = CUDAGraphs(model, BUDGETS), world.pack()
    (first, first_grads), (second, second_grads) = (step(graphs, model, packed) for _ in range(2))
    assert len(graphs_of(graphs)) == 1
    assert not torch.equal(first, second)
    assert not all(torch.equal(first_grads[name], second_grads[name]) for name in first_grads)
    optimizer, losses = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2), []
    for _ in range(10):
        loss = graphs(**packed).last_hidden_state.float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with torch.no_grad():
        assert not torch.equal(graphs(**packed).last_hidden_state, graphs(**packed).last_hidden_state)
        model.eval()
        assert torch.equal(graphs(**packed).last_hidden_state, graphs(**packed).last_hidden_state)


def test_checkpointing_with_dropout_runs_without_graphs(world, said):
    model = world.model(vision_use_head=False)
    adapted(model, lora_dropout=0.5)
    model.train().gradient_checkpointing_enable()
    graphs = CUDAGraphs(model, BUDGETS)
    for _ in range(2):
        _, grads = step(graphs, model, world.pack())
        assert grads
    assert said() == ["gradient checkpointing has to draw the same dropout twice"]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_checkpoint_around_the_model(world, said, reentrant, frozen):
    """It calls the model once more in backward, in autograd's thread."""
    model, packed = world.model(vision_use_head=False), world.pack()
    model.requires_grad_(not frozen)
    torch.manual_seed(0)
    width = model.config.hidden_size
    project = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 8)).to(model.device, model.dtype)
    start = torch.zeros(1, device=model.device, dtype=model.dtype, requires_grad=True)

    def run(start):
        return project(model(**packed).last_hidden_state + start)

    def checkpointed():
        model.zero_grad(), project.zero_grad()
        out = checkpoint(run, start, use_reentrant=reentrant)
        weighted(out).backward()
        return out.detach(), {**gradients(model), **gradients(project)}

    expected = checkpointed()
    model.cuda_graphs_enable(BUDGETS)
    for _ in range(2):
        near(checkpointed(), expected, world.noise)
    followed = not (reentrant or frozen)
    assert len(said()) == followed and all(reason.startswith("hooks on saved tensors") for reason in said())
    assert bool(graphs_of(model)) is not followed


def test_anomaly_detection_runs_without_graphs(world, said):
    model, packed = world.model(vision_use_head=False), world.pack()
    graphs = CUDAGraphs(model, BUDGETS)
    with torch.autograd.detect_anomaly(check_nan=True):
        near(step(graphs, model, packed), step(model, model, packed), world.noise)
    assert said() == ["anomaly detection looks at the gradients of each operation"]
    same(step(graphs, model, packed), step(AtBucketRows(model), model, packed))


class Waiting(nn.Linear):
    """Looks at its input on the host, which a capture does not permit, as long as it does."""

    waits = True

    def forward(self, x):
        return super().forward(x * (x.detach().abs().max().item() > 0 if self.waits else 1))


@pytest.mark.parametrize("learns", [False, True])
def test_what_cannot_be_captured_runs_without_graphs(world, said, learns):
    model, packed = world.model(vision_use_head=False), world.pack()
    mlp, graphs = model.encoder.layers[0].mlp, CUDAGraphs(model, BUDGETS)
    waiting = Waiting(mlp.fc1.in_features, mlp.fc1.out_features, device=model.device, dtype=model.dtype)
    waiting.load_state_dict(mlp.fc1.state_dict())
    mlp.fc1 = waiting
    for _ in range(2):
        with torch.set_grad_enabled(learns):
            found, expected = graphs(**packed).last_hidden_state, model(**packed).last_hidden_state
        assert relative(found.detach(), expected.detach()) < world.noise
    assert len(said()) == 1 and said()[0].startswith("a CUDA graph cannot have what it does: ")
    torch.rand(1, device=model.device)  # torch's generator knows that no capture goes on
    del found, expected
    waiting.waits = False
    same(step(graphs, model, packed), step(AtBucketRows(model), model, packed))
    assert len(graphs_of(graphs)) == 1


def test_a_capture_that_broke_off_is_followed_by_one_that_ends(world, monkeypatch):
    """Only that takes torch's random generator out of the capture."""
    if world.device == "cuda":
        pytest.skip("torch's own raises as well")
    model, packed, ended = world.model(vision_use_head=False), world.pack(), []
    Recorded, given_back = recorded_graphs.Recorded, []
    end = Recorded.capture_end

    def capture_end(graph):
        end(graph)
        if not ended:
            ended.append(False)
            raise RuntimeError("operation failed due to a previous error during capture")
        ended.append(True)

    monkeypatch.setattr(Recorded, "capture_end", capture_end)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *args: given_back.append(args), raising=False)
    linear = model.encoder.layers[0].mlp.fc1
    waiting = Waiting(linear.in_features, linear.out_features, device=model.device, dtype=model.dtype)
    model.encoder.layers[0].mlp.fc1 = waiting
    with torch.no_grad():
        CUDAGraphs(model, BUDGETS)(**packed)
    assert ended == [False, True] and len(given_back) == 1


def test_an_error_in_a_capture_is_the_one_that_is_raised(world, monkeypatch):
    model, packed = world.model(vision_use_head=False), world.pack()
    graphs = CUDAGraphs(model, BUDGETS)

    def no_memory(self, *args):
        raise torch.OutOfMemoryError("as much as there is not")

    with monkeypatch.context() as patch:
        patch.setattr(Lot, "of_copies", no_memory)
        with pytest.raises(torch.OutOfMemoryError, match="as much as there is not"):
            step(graphs, model, packed)
    same(step(graphs, model, packed), step(AtBucketRows(model), model, packed))


# Several forwards, one memory


def test_a_tower_called_twice_before_a_backward(world, said):
    model = world.model(vision_use_head=False)
    graphs, first, second = CUDAGraphs(model, BUDGETS), world.pack(seed=1), world.pack([(1, 8, 32)], seed=2)

    def twice(run):
        model.zero_grad()
        one, two = run(**first).last_hidden_state, run(**second).last_hidden_state
        (weighted(one) + weighted(two)).backward()
        return torch.cat([one, two]).detach(), gradients(model)

    expected = twice(model)
    for _ in range(3):
        near(twice(graphs), expected, world.noise)
    assert said() == [BUSY]


def test_a_forward_that_is_given_up_leaves_the_graphs_to_others(world, said):
    model = world.model(vision_use_head=False)
    graphs, packed = CUDAGraphs(model, BUDGETS), world.pack()
    expected = step(AtBucketRows(model), model, packed)
    graphs(**packed)
    gc.collect()
    same(step(graphs, model, packed), expected)
    with torch.no_grad():
        graphs(**packed)
    same(step(graphs, model, packed), expected)
    assert not said()


def test_inference_between_forward_and_backward_and_between_steps(world, said):
    """The pack in between runs without a graph: its activations would lie where those of the step lie."""
    model = world.model()
    graphs, packed, other = CUDAGraphs(model, BUDGETS), world.pack(), world.pack(OTHERS[0], seed=1)
    expected = step(AtBucketRows(model), model, packed, on_both)
    with torch.no_grad():
        features = AtBucketRows(model)(**other)
        own = model(**other)
        for seed in range(2):
            out = graphs(**other)
            assert torch.equal(out.last_hidden_state, features.last_hidden_state), seed
            assert torch.equal(out.pooler_output, features.pooler_output)
    same(step(graphs, model, packed, on_both), expected)
    for _ in range(2):
        model.zero_grad()
        out = graphs(**packed)
        with torch.no_grad():
            between = graphs(**other)
        assert torch.equal(between.last_hidden_state, own.last_hidden_state)
        on_both(out).backward()
        same((out.last_hidden_state.detach(), gradients(model)), expected)
        with torch.no_grad():
            assert torch.equal(graphs(**other).last_hidden_state, features.last_hidden_state)
    assert said() == [BUSY]


def test_models_in_turn(world, said):
    """Each has its own memory: forwards of both, then both backwards."""
    models = [world.model(), world.model()]
    with torch.no_grad():
        for p in models[1].parameters():
            p.mul_(1.1)
    packed = world.pack()
    expected = [step(AtBucketRows(model), model, packed, on_both) for model in models]
    runs = [CUDAGraphs(model, BUDGETS) for model in models]
    for _ in range(2):
        outs = [run(**packed) for run in runs]
        for model, out in zip(models, outs):
            model.zero_grad()
            on_both(out).backward()
        for model, out, right in zip(models, outs, expected):
            same((out.last_hidden_state.detach(), gradients(model)), right)
    assert not said()


def test_nothing_of_an_earlier_pack_reaches_a_later_one(world):
    """Not even NaN, from the rows where the earlier pack was, forward or backward."""
    model = world.model()
    graphs, small, large = CUDAGraphs(model, [300]), world.pack([(1, 7, 1), (1, 2, 3)]), world.pack([(1, 13, 19)])
    expected = step(AtBucketRows(model, [300]), model, small, on_both)
    same(step(graphs, model, small, on_both), expected)
    large["pixel_values"].fill_(float("nan"))
    features, grads = step(graphs, model, large, lambda out: on_both(out) * float("nan"))
    assert features.isnan().all() and all(grad.isnan().any() for grad in grads.values())
    same(step(graphs, model, small, on_both), expected)


def test_a_gradient_of_some_rows_only(world):
    model = world.model(vision_use_head=False)
    graphs, packed = CUDAGraphs(model, BUDGETS), world.pack()

    def loss(out):
        return weighted(out.last_hidden_state[250:270])

    same(step(graphs, model, packed, loss), step(AtBucketRows(model), model, packed, loss))


# Weights that change


def test_ten_steps_of_adamw(world):
    losses = {}
    for run in (AtBucketRows, CUDAGraphs):
        model, losses[run] = world.model(), []
        optimizer, features = torch.optim.AdamW(model.parameters(), lr=1e-3), run(model, BUDGETS)
        for number in range(10):
            loss = on_both(features(**world.pack(OTHERS[number % 3], seed=number)))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[run].append(loss.item())
    assert losses[CUDAGraphs] == losses[AtBucketRows]
    assert len(set(losses[CUDAGraphs])) == 10


def test_three_micro_steps_accumulate(world, said):
    model = world.model()
    graphs, packs = CUDAGraphs(model, BUDGETS), [world.pack(grids, seed) for seed, grids in enumerate(OTHERS[:3])]

    def accumulated(run):
        model.zero_grad()
        for packed in packs:
            (on_both(run(**packed)) / 3).backward()
        return gradients(model)

    expected = accumulated(AtBucketRows(model))
    for _ in range(2):
        same_gradients(accumulated(graphs), expected)
    assert not said()


@pytest.mark.gpu
def test_gradients_of_a_scaled_loss_in_float16(checkpoint):
    world = graphed.World(checkpoint, "cuda", torch.float16, "tiny72")
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**8)
    check(world, world.model(), lambda out: scaler.scale(on_both(out)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_parameters_under_autocast(checkpoint, said, dtype):
    """With a GradScaler, which skips a step whose loss is not finite."""
    world, found = graphed.World(checkpoint, "cuda", torch.float32, "tiny72"), {}
    for run in (AtBucketRows, CUDAGraphs):
        model = world.model(vision_use_head=False)
        optimizer, scaler = torch.optim.SGD(model.parameters(), lr=1e-2), torch.amp.GradScaler("cuda", init_scale=256.0)
        with torch.autocast("cuda", dtype):
            features = run(model, BUDGETS)
        losses = []
        for number in range(4):
            with torch.autocast("cuda", dtype):
                loss = on_tokens(features(**world.pack(seed=number)))
            scaler.scale(loss * (float("inf") if number == 2 else 1)).backward()
            assert all(p.grad.dtype is torch.float32 for p in model.parameters())
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            losses.append(loss.item())
        found[run] = losses, scaler.get_scale(), flat({n: p.detach() for n, p in model.named_parameters()})
    (losses, scale, parameters), (e_losses, e_scale, e_parameters) = found[CUDAGraphs], found[AtBucketRows]
    assert len(graphs_of(features)) == 1 and not said()
    assert scale == e_scale == 128
    assert losses == pytest.approx(e_losses, rel=0.01)
    assert parameters.isfinite().all() and relative(parameters, e_parameters) < 1e-3


def test_clip_grad_norm(world):
    model, packed, found = world.model(), world.pack(), []
    graphs = CUDAGraphs(model, BUDGETS)
    for run in (AtBucketRows(model), graphs, graphs):
        step(run, model, packed, on_both)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        assert norm > 0.1
        found.append({"norm": norm, **gradients(model)})
    expected, *others = found
    for grads in others:
        same_gradients(grads, expected)


# Gradients belong to who has them


def test_gradients_in_grad_stay_what_they_were(world, said):
    model, packed = world.model(), world.pack()
    graphs = CUDAGraphs(model, BUDGETS)
    _, first = step(graphs, model, packed, on_both)
    grads = {name: p.grad for name, p in model.named_parameters()}
    with torch.no_grad():
        graphs(**world.pack(OTHERS[0], seed=3))
    same_gradients(grads, first)
    second = world.pack(seed=3)
    on_both(graphs(**second)).backward()  # adds to them
    total = gradients(model)
    _, alone = step(graphs, model, second, on_both)
    near((total["head.probe"], total), (first["head.probe"] + alone["head.probe"], added(first, alone)), world.noise)
    assert not said()


def added(first, second):
    return {name: first[name] + second[name] for name in first}


@pytest.mark.parametrize("form", ["list", "views", "data", "autograd.grad", "numpy"])
def test_gradients_that_somebody_keeps_stay_what_they_were(world, said, form):
    """As long as that takes, packs run without graphs."""
    model, packed = world.model(vision_use_head=False), world.pack()
    if form == "numpy" and world.device == "cuda":
        pytest.skip("memory of the CPU only")
    graphs = CUDAGraphs(model, BUDGETS)
    parameters = list(model.parameters())
    loss = on_tokens(graphs(**packed))
    if form == "autograd.grad":
        kept = list(torch.autograd.grad(loss, parameters))
    else:
        loss.backward()
        take = {
            "list": lambda grad: grad,
            "views": lambda grad: grad.view(-1)[: len(grad)],
            "data": lambda grad: grad.data,
            "numpy": lambda grad: torch.from_numpy(grad.numpy()),
        }
        kept = [take[form](p.grad) for p in parameters]
    copies = [x.clone() for x in kept]
    for seed in range(3):
        expected = step(model, model, world.pack(seed=seed))
        near(step(graphs, model, world.pack(seed=seed)), expected, world.noise)
        with torch.no_grad():
            graphs(**world.pack(OTHERS[0], seed))
        assert all(torch.equal(x, copy) for x, copy in zip(kept, copies))
    assert said() == [LENT]
    del kept
    same(step(graphs, model, packed), step(AtBucketRows(model), model, packed))


def test_gradients_outlive_model_and_graphs(world):
    model, packed = world.model(vision_use_head=False), world.pack()
    graphs = CUDAGraphs(model, BUDGETS)
    _, copies = step(graphs, model, packed)
    kept = {name: p.grad for name, p in model.named_parameters()}
    del model, graphs
    gc.collect()
    if world.device == "cuda":
        torch.cuda.empty_cache()
    other = world.model()
    step(CUDAGraphs(other, BUDGETS), other, world.pack(seed=5))
    same_gradients(kept, copies)


# Errors instead of wrong gradients


def test_a_second_backward_says_what_to_do(world):
    model, packed = world.model(), world.pack()
    graphs = CUDAGraphs(model, BUDGETS)
    out = graphs(**packed)
    on_tokens(out).backward(retain_graph=True)
    _, grads = out.last_hidden_state, gradients(model)
    with pytest.raises(RuntimeError, match="keeps the activations of a forward for one backward, of all losses tog"):
        on_tokens(out).backward()
    same_gradients(gradients(model), grads)
    with pytest.raises(RuntimeError, match="one backward, of all losses together"):  # of the head, after the encoder's
        on_pooled(out).backward()
    same_gradients(gradients(model), grads)
    same(step(graphs, model, packed), step(AtBucketRows(model), model, packed))


def test_a_second_backward_of_the_head_over_a_frozen_encoder(world, said):
    model, packed = world.model(), world.pack()
    freeze(model, LEARNING["the head"])
    graphs = CUDAGraphs(model, BUDGETS)
    loss = on_pooled(graphs(**packed))
    with torch.no_grad():
        graphs(**packed)
    assert said() == [BUSY]
    loss.backward(retain_graph=True)
    grads = gradients(model)
    with pytest.raises(RuntimeError, match="one backward, of all losses together"):
        loss.backward()
    same_gradients(gradients(model), grads)


def test_the_memory_is_lent_to_nobody_while_a_backward_runs(world):
    """Other threads ask for it at any time."""
    model, busy = world.model(), []
    freeze(model, LEARNING["the head"])
    graphs, packed = CUDAGraphs(model, BUDGETS), world.pack()
    step(graphs, model, packed, on_pooled)
    (graph,) = graphs_of(graphs)
    run = graph.head.gradients
    graph.head.gradients = lambda: busy.append(graph.ground.busy) or run()
    step(graphs, model, packed, on_pooled)
    assert busy == [True] and not graph.ground.busy


def test_two_backwards_of_losses_on_pooled_features_and_on_tokens(world):
    """The first takes the head and the encoder with it."""
    model = world.model()
    out = CUDAGraphs(model, BUDGETS)(**world.pack())
    on_pooled(out).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward, of all losses together"):
        on_tokens(out).backward()


@pytest.mark.parametrize("name", ["encoder.layers.1.mlp.fc1.weight", "head.probe", "embeddings.patch_embedding.bias"])
def test_a_parameter_changed_between_forward_and_backward(world, name):
    model, packed = world.model(), world.pack()
    graphs = CUDAGraphs(model, BUDGETS)
    loss = on_both(graphs(**packed))
    with torch.no_grad():
        model.get_parameter(name).mul_(1.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation between a forward and its backward"):
        loss.backward()
    del loss
    same(step(graphs, model, packed, on_both), step(AtBucketRows(model), model, packed, on_both))


def no_memory(*args):
    raise MemoryError


def test_an_error_while_capturing_a_backward_is_the_callers(world, monkeypatch):
    """Graphs begin anew."""
    model, packed, other = world.model(vision_use_head=False), world.pack(), world.pack(OTHERS[0])
    graphs = CUDAGraphs(model, BUDGETS)
    step(graphs, model, other)
    with monkeypatch.context() as patch:
        patch.setattr(training_graph, "_lots", no_memory)
        with pytest.raises(MemoryError):
            graphs(**packed)
    assert graphs.held() == (0, 0)
    for again in (packed, other):
        same(step(graphs, model, again), step(AtBucketRows(model), model, again))
    assert graphs.held()[0] == 2


def test_second_derivatives_are_refused(world):
    model = world.model(vision_use_head=False)
    bias = model.encoder.layers[0].mlp.fc1.bias
    loss = on_tokens(CUDAGraphs(model, BUDGETS)(**world.pack()))
    (grad,) = torch.autograd.grad(loss, bias, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.square().sum().backward()


def test_a_batch_of_gradients_is_refused(world):
    model = world.model(vision_use_head=False)
    features = CUDAGraphs(model, BUDGETS)(**world.pack()).last_hidden_state
    with pytest.raises(RuntimeError, match="is_grads_batched: CUDA graphs take one gradient at a time"):
        torch.autograd.grad(
            features, list(model.parameters()), torch.ones(2, *features.shape).to(features), is_grads_batched=True
        )


def test_pixels_that_want_a_gradient_run_without_graphs(world):
    model, packed = world.model(vision_use_head=False), world.pack()
    graphs = CUDAGraphs(model, BUDGETS)
    packed["pixel_values"].requires_grad_()
    on_tokens(graphs(**packed)).backward()
    assert packed["pixel_values"].grad.abs().sum() > 0
    assert not graphs_of(graphs)


def test_the_last_gradient_of_a_graph_may_be_asked_for_alone(world):
    """Of the last layer only: those below get none, and the next step is as ever."""
    model, packed = world.model(vision_use_head=False), world.pack()
    graphs = CUDAGraphs(model, BUDGETS)
    weight = model.encoder.layers[-1].mlp.fc2.weight
    _, expected = step(AtBucketRows(model), model, packed)
    (grad,) = torch.autograd.grad(on_tokens(graphs(**packed)), weight)
    assert torch.equal(grad, expected[f"encoder.layers.{len(model.encoder.layers) - 1}.mlp.fc2.weight"])
    del grad
    gc.collect()
    same(step(graphs, model, packed), step(AtBucketRows(model), model, packed))


# What a model was when its graphs were captured, and is


CHANGES = {
    "a replaced parameter": lambda model: setattr(
        model.encoder.layers[0].mlp.fc1, "weight", nn.Parameter(2 * model.encoder.layers[0].mlp.fc1.weight.detach())
    ),
    "replaced data": lambda model: setattr(
        model.encoder.layers[0].mlp.fc1.weight, "data", 2 * model.encoder.layers[0].mlp.fc1.weight.detach()
    ),
    "data seen another way": lambda model: setattr(
        model.encoder.layers[0].self_attn.q_proj.weight,
        "data",
        model.encoder.layers[0].self_attn.q_proj.weight.data.t(),
    ),
    "another dtype": lambda model: model.to(torch.float16),
    "an adapter": lambda model: adapted(model),
    "a replaced module": lambda model: setattr(model.encoder.layers[0].mlp, "fc1", copy.deepcopy(
        model.encoder.layers[1].mlp.fc1
    )),
    "another layer": lambda model: model.encoder.layers.append(copy.deepcopy(model.encoder.layers[0])),
    "another epsilon": lambda model: [setattr(m, "eps", 0.1) for m in model.modules() if type(m) is nn.LayerNorm],
    "weights loaded in place": lambda model: model.load_state_dict(
        {name: 1.1 * x for name, x in model.state_dict().items()}
    ),
    "weights loaded by assignment": lambda model: model.load_state_dict(
        {name: 1.1 * x for name, x in model.state_dict().items()}, assign=True
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_changed_is_seen(world, change):
    if change == "another dtype" and world.device == "cpu":
        pytest.skip("operations in float16 that the CPU has not got")
    model, packed = world.model(vision_use_head=False), world.pack()
    graphs = CUDAGraphs(model, BUDGETS)
    before, _ = step(graphs, model, packed)
    CHANGES[change](model)
    after = step(graphs, model, packed)
    same(after, step(AtBucketRows(model), model, packed))
    assert not torch.equal(before.float(), after[0].float())


def test_hooks_in_the_place_of_others_run(world, said):
    model, packed, seen = world.model(vision_use_head=False), world.pack(), []
    graphs = CUDAGraphs(model, BUDGETS)
    model.enable_input_require_grads()
    expected = step(graphs, model, packed)
    assert len(graphs_of(graphs)) == 1
    model.disable_input_require_grads()
    model.embeddings.patch_embedding.register_forward_hook(lambda *_: seen.append(1))
    near(step(graphs, model, packed), expected, world.noise)
    assert seen == [1]
    assert said() == ["hooks or a replaced forward on embeddings.patch_embedding have to run in each call"]


@pytest.mark.parametrize("kind", ["a hook", "a replaced forward"])
def test_hooks_on_the_model_run_in_each_call(world, said, kind):
    model, packed, seen = world.model(vision_use_head=False), world.pack(), []
    graphs, forward = CUDAGraphs(model, BUDGETS), model.forward
    expected = step(graphs, model, packed)
    if kind == "a hook":
        model.register_forward_hook(lambda *_: seen.append(1))
    else:
        model.forward = lambda *args, **kwargs: seen.append(1) or forward(*args, **kwargs)
    near(step(graphs, model, packed), expected, world.noise)
    assert seen == [1] and said() == ["hooks or a replaced forward on the model have to run in each call"]


@pytest.mark.parametrize("kind", ["forward", "backward", "forward pre", "a replaced forward"])
def test_hooks_run_in_each_call_and_graphs_when_they_are_gone(world, said, kind):
    model, packed, seen = world.model(vision_use_head=False), world.pack(), []
    graphs, layer = CUDAGraphs(model, BUDGETS), model.encoder.layers[0]
    expected = step(graphs, model, packed)
    if kind == "a replaced forward":
        forward = layer.forward
        layer.forward = lambda *args, **kwargs: seen.append(1) or forward(*args, **kwargs)
    else:
        hang = {
            "forward": layer.mlp.register_forward_hook,
            "forward pre": layer.self_attn.register_forward_pre_hook,
            "backward": layer.register_full_backward_hook,
        }
        handle = hang[kind](lambda *_: seen.append(1))
    for count in (1, 2):
        near(step(graphs, model, packed), expected, world.noise)
        assert len(seen) == count
    if kind == "a replaced forward":
        del layer.forward
    else:
        handle.remove()
    same(step(graphs, model, packed), expected)
    in_a_graph(graphs, packed)
    assert len(seen) == 2
    assert len(said()) == 1 and said()[0].startswith("hooks or a replaced forward on encoder.layers.0")


@pytest.mark.parametrize("captured", [False, True])
def test_hooks_on_gradients_of_parameters_run(world, said, captured):
    """Once each, whether they were there before the capture or not."""
    model, packed = world.model(vision_use_head=False), world.pack()
    graphs, name = CUDAGraphs(model, BUDGETS), "encoder.layers.0.mlp.fc1.weight"
    _, expected = step(AtBucketRows(model), model, packed)
    if captured:
        step(graphs, model, packed)
    handle = model.get_parameter(name).register_hook(lambda grad: 3 * grad)
    for _ in range(2):
        _, grads = step(graphs, model, packed)
        assert relative(grads[name], 3 * expected[name]) < world.noise
    handle.remove()
    same_gradients(step(CUDAGraphs(model, BUDGETS), model, packed)[1], expected)
    assert said() == []


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("whose", ["another layer's", "nobody's"])
def test_parameters_that_are_used_otherwise_than_by_their_modules(world, said, whose, again):
    """Their gradients would be missed by a capture, which differentiates by parameters of its own."""
    model, packed = world.model(vision_use_head=False), world.pack()
    layer, elsewhere = model.encoder.layers[0], [model.encoder.layers[1].mlp.fc1.bias]
    if whose == "nobody's":
        elsewhere = [nn.Parameter(elsewhere[0].detach().clone())]
    if again:
        model.gradient_checkpointing_enable()

    class Scaled(type(layer.mlp.activation_fn)):
        def forward(self, x):
            return super().forward(x) * (1 + elsewhere[0].mean())

    layer.mlp.activation_fn = Scaled()
    _, expected = step(model, model, packed)
    expected, elsewhere[0].grad = {**expected, "elsewhere": elsewhere[0].grad}, None
    _, grads = step(CUDAGraphs(model, BUDGETS), model, packed)
    same_gradients({**grads, "elsewhere": elsewhere[0].grad}, expected)
    assert said() == ["a parameter is used otherwise than as a module's own, so its gradient cannot be captured"]


def in_a_graph(graphs, packed):
    """To the bit as at the bucket's rows, not as at the pack's own."""
    model = graphs.model
    with torch.no_grad():
        found, own = graphs(**packed).last_hidden_state, model(**packed).last_hidden_state
        assert torch.equal(found, AtBucketRows(model)(**packed).last_hidden_state)
        assert not torch.equal(found, own) or model.device.type == "cuda"


# Who waits for gradients


def test_hooks_on_accumulated_gradients_run_while_lower_parts_are_still_to_come(world):
    """From the last layer to the first, as DDP's averaging and optimisers in backward expect."""
    model, packed, order = world.model(vision_use_head=False), world.pack(), []
    graphs = CUDAGraphs(model, BUDGETS)
    names = {p: name for name, p in model.named_parameters()}
    _, expected = step(graphs, model, packed)
    (graph,) = graphs_of(graphs)
    done = []
    for number, part in enumerate(graph.parts):
        part.gradients = partial(lambda run, number: done.append(number) or run(), part.gradients, number)
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: order.append((names[p], p.grad.clone(), len(done))))
    for _ in range(2):
        order.clear(), done.clear()
        step(graphs, model, packed)
        same_gradients({name: grad for name, grad, _ in order}, expected)
        assert done == [*range(len(graph.parts))][::-1] and len(done) > 1
        assert all(any(p is model.get_parameter(name) for p in graph.parts[-n].parameters) for name, _, n in order)


def test_an_optimiser_that_steps_in_backward(world):
    """Each parameter as soon as its gradient is there, which is given up at once."""
    parameters = []
    for run in (AtBucketRows, CUDAGraphs):
        model = world.model()
        optimizers = {p: torch.optim.AdamW([p], lr=1e-3, foreach=False) for p in model.parameters()}

        def update(p, optimizers=optimizers):
            optimizers[p].step()
            optimizers[p].zero_grad()

        for p in model.parameters():
            p.register_post_accumulate_grad_hook(update)
        features = run(model, BUDGETS)
        for seed in range(4):
            on_both(features(**world.pack(seed=seed))).backward()
        assert all(p.grad is None for p in model.parameters())
        parameters.append({name: p.detach() for name, p in model.named_parameters()})
    same_gradients(*parameters)


def test_gradients_that_another_thread_works_on_stay_where_they_are(world, said):
    """It may have looked up where they lie: an optimiser does, long before it reads them."""
    model, packed, other = world.model(vision_use_head=False), world.pack(), world.pack(OTHERS[0], seed=1)
    graphs = CUDAGraphs(model, BUDGETS)
    _, expected = step(graphs, model, packed)

    def infer():
        with torch.no_grad():
            graphs(**other)

    places = [p.grad.data_ptr() for p in model.parameters()]
    thread = threading.Thread(target=infer)
    thread.start()
    thread.join()
    assert [p.grad.data_ptr() for p in model.parameters()] == places and said() == [LENT]
    infer()
    assert not {p.grad.data_ptr() for p in model.parameters()} & {*places}
    same_gradients(gradients(model), expected)


def test_one_thread_trains_while_another_infers(world):
    """Packs in between run with a graph or without one, never on memory of each other."""
    model, failed = world.model(), []
    graphs, packed, other = CUDAGraphs(model, BUDGETS), world.pack(), world.pack(OTHERS[0], seed=1)
    expected = step(AtBucketRows(model), model, packed, on_both)
    with torch.no_grad():
        right = model(**other).last_hidden_state
        graphs(**other)
    if world.device == "cuda":
        torch.cuda.synchronize()
    stop = threading.Event()

    def infer():
        stream = torch.cuda.Stream() if world.device == "cuda" else None
        with torch.cuda.stream(stream), torch.no_grad():
            while not stop.is_set():
                features = graphs(**other).last_hidden_state
                if not relative(features, right) < world.noise:
                    failed.append(features)

    thread = threading.Thread(target=infer)
    thread.start()
    try:
        for _ in range(8):
            same(step(graphs, model, packed, on_both), expected)
    finally:
        stop.set()
        thread.join()
    assert not failed


@pytest.mark.gpu
def test_gradients_are_read_on_their_stream_before_another_one_has_the_memory(world):
    model = world.model(vision_use_head=False)
    graphs, packed, other, aside = CUDAGraphs(model, BUDGETS), world.pack(), world.pack(OTHERS[0]), torch.cuda.Stream()

    def infer():
        with torch.cuda.stream(aside), torch.no_grad():
            graphs(**other)

    _, expected = step(graphs, model, packed)
    infer()
    torch.cuda.synchronize()
    for kept in (True, False):
        model.zero_grad()
        loss = on_tokens(graphs(**packed))
        torch.cuda._sleep(10**8)
        loss.backward()
        if kept:  # in .grad, from where they are moved
            infer()
            copies = gradients(model)
        else:
            copies = gradients(model)
            model.zero_grad()
            infer()
        same_gradients(copies, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("static", [False, True])
def test_ddp_on_one_gpu(world, static):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = world.model(vision_use_head=False)
        expected = [step(AtBucketRows(model), model, world.pack(seed=seed)) for seed in range(3)]
        model.cuda_graphs_enable(BUDGETS)
        wrapped = nn.parallel.DistributedDataParallel(
            model, bucket_cap_mb=0.1, static_graph=static, gradient_as_bucket_view=True
        )
        for seed in range(3):
            same(step(wrapped, model, world.pack(seed=seed)), expected[seed])
        assert len(graphs_of(model)) == 1
    finally:
        dist.destroy_process_group()


TRAINING = {
    "tokens": TOKENS,
    "pooled": dict(pooled=True),
    "second to last layer": dict(select_layer=-2),
    "checkpointing": dict(TOKENS, checkpointing=True),
    "called twice": dict(TOKENS, calls=2),
    "last layer": dict(TOKENS, trains="last layer"),
    "frozen": dict(TOKENS, trains="nothing"),
}


def in_recorded_graphs(train, *args, **kwargs):
    """On a rank: what it returns, whether graphs were replayed, and the reasons why packs ran without."""
    with pytest.MonkeyPatch.context() as patch, choice.forced(positions=["triton"], pool=["triton"]):
        reasons, replays, replay = set(), [], recorded_graphs.Recorded.replay
        patch.setattr(choice.Function, "verdict", lambda *args: Verdict({"out": 0.0}, {"out": 0.0}))
        patch.setattr(Graphs, "_say", lambda self, reason: reasons.add(reason))
        patch.setattr(recorded_graphs.Recorded, "replay", lambda self: replays.append(self) or replay(self))
        recorded_graphs.install(patch)
        return train(*args, cuda_graphs=[300, 600], **kwargs), bool(replays), reasons


def ddp(task):
    return nn.parallel.DistributedDataParallel(task)


def fsdp2(task):
    apply_fsdp(task.model, param_dtype=None, reduce_dtype=None)
    return fully_shard(task)


@INTERPRETED
@pytest.mark.parametrize("images", [UNEVEN, NO_IMAGES], ids=["uneven", "no images on a rank"])
@pytest.mark.parametrize("training", TRAINING)
def test_two_ranks_of_ddp_train_as_one(ranks, checkpoint, training, images):
    folder, kwargs = checkpoint("tiny"), TRAINING[training]
    results, replayed, reasons = zip(*ranks(in_recorded_graphs, train, ddp, folder, images, **kwargs))
    ranks_check(results, train_alone(folder, **kwargs))
    assert replayed == (True, images is UNEVEN)
    assert reasons[0] == ({BUSY} if training == "called twice" else set())


@INTERPRETED
def test_sharded_models_run_without_graphs(ranks, checkpoint):
    results, replayed, reasons = zip(*ranks(in_recorded_graphs, train, fsdp2, checkpoint("tiny"), UNEVEN, **TOKENS))
    ranks_check(results, train_alone(checkpoint("tiny"), **TOKENS))
    assert not any(replayed)
    for (reason,) in reasons:
        assert reason.startswith("encoder.layers.0.") and reason.endswith(" is DTensor, sharded or quantised")


def settled(train, *args):
    """On a rank: as on a device, where a forward joins projections."""
    run = Siglip2PackedVisionModel._features
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Siglip2PackedVisionModel, "_features", lambda self, *args: self._settle() or run(self, *args))
        return train(*args, **TOKENS)


@INTERPRETED
@pytest.mark.parametrize("engine", [fsdp2, fully_shard, ddp])
def test_engines_train_as_one_where_a_forward_joins_projections(ranks, checkpoint, engine):
    """A model within FSDP2's root alone has whole parameters in its forward, in memory that FSDP2 gathers into."""
    ranks_check(ranks(settled, train, engine, checkpoint("tiny"), UNEVEN), train_alone(checkpoint("tiny"), **TOKENS))


@INTERPRETED
def test_models_that_are_sharded_from_around_run_without_graphs(ranks, checkpoint):
    """Their weights are freed and gathered anew between forward and backward."""
    folder = checkpoint("tiny")
    results, replayed, reasons = zip(*ranks(in_recorded_graphs, train, fully_shard, folder, UNEVEN, **TOKENS))
    ranks_check(results, train_alone(folder, **TOKENS))
    assert not any(replayed)
    assert reasons == ({"FSDPTask, of which this model is a part, gathers its weights in each call"},) * 2


def fsdp1(folder, original, whole, **kwargs):
    """What a step gives without gradients, in graphs if that can be, and as ever."""
    found = []
    for settings in (kwargs, {}):
        policy = partial(transformer_auto_wrap_policy, transformer_layer_cls={Siglip2PackedEncoderLayer})
        task = FullyShardedDataParallel(
            Task(folder, **TOKENS, **settings),
            auto_wrap_policy=None if whole else policy,
            use_orig_params=original,
            device_id=torch.device("cpu"),
        )
        with torch.no_grad():
            found += [task(pack(UNEVEN[dist.get_rank()]))[0].item() for _ in range(2)]
    return found


@INTERPRETED
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("original", [False, True])
def test_fsdp1_infers_without_graphs(ranks, checkpoint, original, whole):
    results, replayed, reasons = zip(*ranks(in_recorded_graphs, fsdp1, checkpoint("tiny"), original, whole))
    assert not any(replayed)
    assert all(len(set(result)) == 1 for result in results)
    assert all("FSDP" in reason or "Fully" in reason for said in reasons for reason in said) and all(reasons)


def zero(stage, folder, **kwargs):
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled first
    task = Task(folder, **kwargs)
    optimizer = torch.optim.SGD([p for p in task.parameters() if p.requires_grad], lr=0.3)
    config = {**ZERO3, "zero_optimization": {"stage": stage}}
    engine, *_ = deepspeed.initialize(model=task, optimizer=optimizer, config=config)
    losses = []
    for _ in range(2):
        loss = mean_over_ranks(*engine(pack(UNEVEN[dist.get_rank()])))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses, parameters_of(task)


@INTERPRETED
@pytest.mark.parametrize("stage", [1, 2])
def test_two_ranks_of_deepspeed_zero_train_as_one(ranks, checkpoint, stage):
    pytest.importorskip("deepspeed")
    results, replayed, reasons = zip(*ranks(in_recorded_graphs, zero, stage, checkpoint("tiny"), **TOKENS))
    ranks_check(results, train_alone(checkpoint("tiny"), **TOKENS))
    assert all(replayed) and not any(reasons)
