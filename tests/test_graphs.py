"""CUDA graphs give the model's features for packs of every kind, and outputs that stay what they were."""

import copy
import gc
import io
import pickle
import threading
from types import SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload
from graphed import BUDGETS, GRIDS, LARGE, OTHERS, AtBucketRows, graphs_of, near, on_tokens, relative, same, step

from siglip2_packed import PackedPatches, SigLip2NaflexVisionTower, Siglip2PackedVisionModel
from siglip2_packed import graphs as module
from siglip2_packed.buckets import BUDGETS as DEFAULT
from siglip2_packed.buckets import Metadata, bucket_of
from siglip2_packed.graphs import CUDAGraphs, Graphs, replayed
from siglip2_packed.ops.attention import Refused
from siglip2_packed.packing import make_layout


@torch.no_grad()
def features(run, packed):
    """Tokens and, if there is a head, pooled features."""
    out = run(**packed)
    return [out.last_hidden_state, *([out.pooler_output] if "pooler_output" in vars(out) else [])]


def equal(found, expected):
    assert len(found) == len(expected)
    for x, y in zip(found, expected):
        assert x.isfinite().all() and torch.equal(x, y)


# Features


@pytest.mark.parametrize("head", [True, False])
def test_features_are_those_of_the_model(world, head):
    """To the bit at the rows of the bucket."""
    model = world.model(vision_use_head=head)
    graphs = CUDAGraphs(model, BUDGETS)
    for seed, grids in enumerate([*OTHERS, *OTHERS[::-1]]):
        packed = world.pack(grids, seed)
        found, own = features(graphs, packed), features(model, packed)
        equal(found, features(AtBucketRows(model), packed))
        assert len(found) == len(own) == 1 + head
        assert max(map(relative, found, own)) < world.noise
    assert graphs.held()[0] == len(graphs_of(graphs)) == 6


def test_packs_beyond_every_budget_and_without_rows_run_without_a_graph(world, said):
    model = world.model()
    graphs = CUDAGraphs(model, [64])
    for grids in (GRIDS, []):
        packed = world.pack(grids)
        equal(features(graphs, packed), features(model, packed))
    assert graphs.held() == (0, 0) and not said()


def test_segments_are_those_that_the_caller_gives(world):
    model = world.model(vision_use_head=False)
    packed, graphs = world.pack([(3, 4, 5), (1, 7, 1)]), CUDAGraphs(model, BUDGETS)
    rows, grids = packed["pixel_values"], packed["grid_thw"]
    for settings in ({}, {"temporal": "joint"}, {"cu_seqlens": torch.tensor([0, 30, 67], dtype=torch.int32)}):
        with torch.no_grad():
            found = graphs(rows, grids, **settings).last_hidden_state
            assert relative(found, model(rows, grids, **settings).last_hidden_state) < world.noise
    assert len(graphs_of(graphs)) == 1


def test_outputs_are_the_callers_own_and_rows_beyond_a_pack_do_not_reach_it(world):
    model = world.model()
    graphs, first, poison = CUDAGraphs(model, [300]), world.pack([(1, 7, 1)]), world.pack([(1, 8, 32)])
    out = features(graphs, first)
    kept = [x.clone() for x in out]
    poison["pixel_values"].fill_(float("nan"))
    assert all(x.isnan().all() for x in features(graphs, poison))
    equal(out, kept)
    equal(features(graphs, first), kept)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_none_are_recorded(world, mode):
    graphs, packed = CUDAGraphs(world.model(), BUDGETS), world.pack()
    with mode():
        out = graphs(**packed)
    assert not out.last_hidden_state.requires_grad and not out.pooler_output.requires_grad
    assert out.last_hidden_state.is_inference() is (mode is torch.inference_mode)
    on_tokens(graphs(**packed)).backward()
    assert len(graphs_of(graphs)) == 2


def test_a_bucket_is_captured_once(world):
    graphs = CUDAGraphs(world.model(), BUDGETS)
    for grids in ([(1, 5, 7), (1, 3, 4)], [(1, 4, 7), (1, 4, 4)], [(1, 7, 8), (1, 2, 4)]):
        features(graphs, world.pack(grids))
    assert graphs.held()[0] == 1


def test_four_threads_get_the_features_of_one(world):
    model = world.model()
    graphs = CUDAGraphs(model, BUDGETS)
    packs = [world.pack(grids, seed) for seed, grids in enumerate(OTHERS)]
    expected, wrong = [features(AtBucketRows(model), packed) for packed in packs], []

    def infer(number):
        with torch.cuda.stream(torch.cuda.Stream() if world.device == "cuda" else None):
            if world.device == "cuda":
                torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
            for count in range(3 * len(packs)):
                at = (number + count) % len(packs)
                found = features(graphs, packs[at])
                if not all(map(torch.equal, found, expected[at])):
                    wrong.append((number, at))

    threads = [threading.Thread(target=infer, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and graphs.held()[0] == len(OTHERS)


@pytest.mark.gpu
def test_a_pack_on_another_device(world):
    graphs = CUDAGraphs(world.model(), BUDGETS)
    with pytest.raises(ValueError, match="pixel_values is on cpu, the model on cuda:0"):
        graphs(**world.pack().to("cpu"))


def test_a_model_that_comes_to_the_device_in_each_call_runs_without_a_graph(world, said):
    model, packed = world.model(vision_use_head=False), world.pack()
    expected, device = features(model, packed), torch.device(world.device)
    model.graphs = Graphs(BUDGETS)
    cpu_offload(model, execution_device=device, preload_module_classes=model._no_split_modules)
    assert relative(*features(model, packed), *expected) < world.noise
    assert said() == ["hooks or a replaced forward on embeddings have to run in each call"]


def test_copies_by_data_parallel_run_without_a_graph(world, said):
    model, packed = world.model(vision_use_head=False), world.pack()
    model.cuda_graphs_enable(BUDGETS)
    features(model, packed)
    layout = model._layout(packed["pixel_values"], packed["grid_thw"], None, None, None)
    assert model.graphs.features(model._replicate_for_data_parallel(), packed["pixel_values"], layout) is None
    assert said() == ["DataParallel copies the model in each call"]


@pytest.mark.gpu
def test_another_allocator_than_torchs_own(world, said, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "cudaMallocAsync")
    model, packed = world.model(), world.pack()
    equal(features(CUDAGraphs(model, BUDGETS), packed), features(model, packed))
    assert said() == ["memory that cudaMallocAsync allocates does not outlive what a graph frees in it"]


def test_a_fallback_gives_what_a_graph_gives(world):
    model, packed = world.model(vision_use_head=False), world.pack()
    model.config.return_dict = False
    for budgets in (BUDGETS, [4]):
        assert features(CUDAGraphs(model, budgets), packed)[0].isfinite().all()


# Memory


def test_the_least_recently_used_graph_goes(world):
    model = world.model()
    model.graphs = Graphs(BUDGETS, most=2)
    one, two, three = (world.pack(grids) for grids in (OTHERS[0], OTHERS[2], OTHERS[4]))
    for packed in (one, two, one, three):  # two is the one that goes
        features(model, packed)
    before = graphs_of(model)
    features(model, one), features(model, three)
    assert {*map(id, graphs_of(model))} == {*map(id, before)} and model.graphs.held()[0] == 2
    equal(features(model, two), features(AtBucketRows(model), two))
    assert model.graphs.held()[0] == 2 and graphs_of(model)[0] is before[1]


@pytest.mark.gpu
@pytest.mark.parametrize("training", [False, True])
def test_buckets_share_the_memory_of_the_largest(world, training):
    model = world.model()
    graphs = CUDAGraphs(model, range(64, 2881, 256))
    packs = [world.pack([(1, side, 56)]) for side in (50, 2, *range(42, 2, -8))]
    for number, packed in enumerate(packs, 1):
        if training:
            step(graphs, model, packed)
        else:
            features(graphs, packed)
        count, size = graphs.held()
        assert count == number
        if number == 2:  # of few rows a second stream takes part, which has a cuBLAS workspace of its own
            largest = size
            assert largest >= 2**20
    assert size <= 1.25 * largest + number * 2**21  # what each graph hands out lies for itself, in blocks
    model.zero_grad()
    before = torch.cuda.memory_reserved()
    del graphs
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before - largest


# Models


def test_changed_and_replaced_weights_are_seen(world):
    model, packed = world.model(), world.pack()
    graphs = CUDAGraphs(model, BUDGETS)
    before = features(graphs, packed)[0]
    (graph,) = graphs_of(graphs)
    weight = model.encoder.layers[0].mlp.fc1.weight
    with torch.no_grad():
        weight.mul_(1.5)
    changed = features(graphs, packed)
    equal(changed, features(AtBucketRows(model), packed))
    assert not torch.equal(changed[0], before) and graphs_of(graphs) == [graph]
    weight.data = 2 * weight.detach()
    replaced = features(graphs, packed)
    equal(replaced, features(AtBucketRows(model), packed))
    assert not torch.equal(changed[0], replaced[0]) and graphs_of(graphs) != [graph]


def test_a_graph_computes_by_the_models_own_path(world, monkeypatch):
    """What is changed in how a model embeds, encodes or pools is changed in its graphs."""
    model, packed, own, rows = world.model(), world.pack(), Siglip2PackedVisionModel._features, []
    monkeypatch.setattr(Siglip2PackedVisionModel, "_features", lambda *args: rows.append(len(args[1])) or own(*args))
    features(model, packed)
    graphs = CUDAGraphs(model, BUDGETS)
    for _ in range(2):
        features(graphs, packed)
    assert rows == [284, 300, 300]  # without a graph; to get ready, to be captured


def test_what_graphs_cannot_give_the_model_does(world):
    model, packed = world.model(vision_use_head=False), world.pack()
    model.cuda_graphs_enable(BUDGETS)
    out = model(**packed, output_hidden_states=True)
    assert len(out.hidden_states) == 1 + len(model.encoder.layers)
    place = torch.arange(284, device=world.device)
    model(**packed, position_ids=place)
    assert model.graphs.held()[0] == 0
    in_graphs = features(model, packed)
    assert model.graphs.held()[0] == 1
    assert isinstance(model(**packed, return_dict=False), tuple)
    model.cuda_graphs_disable()
    assert model.graphs is None
    assert relative(*features(model, packed), *in_graphs) < world.noise


def test_hooks_of_all_modules_run_in_each_call(world, said):
    graphs, packed, seen = CUDAGraphs(world.model(), BUDGETS), world.pack(), []
    features(graphs, packed)
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: seen.append(1))
    try:
        features(graphs, packed)
    finally:
        handle.remove()
    assert seen and said() == ["hooks of all modules have to run in each call"]


def test_buckets_without_a_right_kernel_run_without_a_graph(world, said, monkeypatch):
    """It is said once; other buckets have their graphs."""
    model, in_buckets, asked = world.model(), module.attention_in_buckets, []

    def attention(model, segments, rows, gradients):
        asked.append(rows)
        if rows == 300:
            raise Refused("attention in buckets cannot be had: wrong")
        return in_buckets(model, segments, rows, gradients)

    monkeypatch.setattr(module, "attention_in_buckets", attention)
    graphs = CUDAGraphs(model, BUDGETS)
    for _ in range(2):
        for grids in (GRIDS, LARGE, [(1, 7, 1)]):
            packed = world.pack(grids)
            near((features(graphs, packed)[0], {"": features(graphs, packed)[1]}),
                 (features(model, packed)[0], {"": features(model, packed)[1]}), world.noise)  # fmt: skip
    assert asked == [300, 600, 64] and [len(graph.inputs.pixel_values) for graph in graphs_of(graphs)] == [600, 64]
    assert said() == ["attention in buckets cannot be had: wrong"]


def test_an_error_while_capturing_is_the_callers_and_leaves_the_other_graphs(world, monkeypatch):
    model = world.model()
    graphs, small, large = CUDAGraphs(model, BUDGETS), world.pack([(1, 7, 1)]), world.pack()
    features(graphs, small)
    right, run = features(graphs, small), Siglip2PackedVisionModel._features
    calls = []

    def fails(*args):
        calls.append(1)
        if len(calls) == 2:  # the one that is captured
            raise MemoryError("no more")
        return run(*args)

    monkeypatch.setattr(Siglip2PackedVisionModel, "_features", fails)
    with pytest.raises(MemoryError):
        features(graphs, large)
    equal(features(graphs, small), right)
    equal(features(graphs, large), features(AtBucketRows(model), large))


def test_a_backend_that_has_to_know_every_length(world, said):
    model, packed = world.model(), world.pack()
    model.cuda_graphs_enable(BUDGETS)
    model.set_attn_implementation("eager")
    features(model, packed)
    assert model.graphs.held()[0] == 0
    assert said() == ["attn_implementation='eager' has to know every segment's length"]
    model.set_attn_implementation("auto")
    features(model, packed)
    assert model.graphs.held()[0] == 1


# Ways to have them


def test_copies_capture_their_own(world):
    model, packed = world.model(), world.pack()
    model.cuda_graphs_enable(BUDGETS)
    expected = features(model, packed)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)
    with torch.no_grad():
        model.encoder.layers[0].mlp.fc1.weight.mul_(2)
    for other in copies:
        assert other.graphs.budgets == BUDGETS and other.graphs.held() == (0, 0)
        equal(features(other, packed), expected)
        assert other.graphs.held()[0] == 1
    assert not torch.equal(features(model, packed)[0], expected[0])


def test_a_model_with_graphs_is_saved_as_one_without(world, tmp_path):
    model, packed = world.model(), world.pack()
    model.cuda_graphs_enable(BUDGETS)
    expected = step(model, model, packed)
    model.save_pretrained(tmp_path)
    again = Siglip2PackedVisionModel.from_pretrained(tmp_path, dtype=world.dtype).to(world.device)
    assert again.graphs is None
    again.cuda_graphs_enable(BUDGETS)
    same(step(again, again, packed), expected)


@pytest.mark.parametrize("asked", [True, [300, 64]])
def test_from_pretrained(world, asked):
    model, packed = world.model(cuda_graphs=asked), world.pack()
    assert model.graphs.budgets == (list(DEFAULT) if asked is True else [64, 300])
    found = step(model, model, packed)
    same(found, step(AtBucketRows(model, model.graphs.budgets), model, packed))
    assert model.graphs.held()[0] == 1
    assert Siglip2PackedVisionModel.from_pretrained(world.checkpoint(world.shape)).graphs is None


@pytest.mark.parametrize("by", ["argument", "config", "neither"])
def test_the_llava_tower(world, by):
    config = SimpleNamespace(mm_vision_select_layer=-2, mm_vision_cuda_graphs=by == "config", mm_tunable_parts="")
    tower = SigLip2NaflexVisionTower(world.checkpoint(world.shape), config, cuda_graphs=by == "argument")
    tower.to(world.device, world.dtype)
    model, packed = tower.vision_tower, world.pack()
    if by == "neither":
        assert model.graphs is None
        return

    def run(pixel_values, grid_thw, **_):
        return SimpleNamespace(last_hidden_state=tower(pixel_values, grid_thw=grid_thw))

    found = step(run, tower, packed)
    same(found, step(AtBucketRows(model, DEFAULT), tower, packed))
    assert model.graphs.held()[0] == 1


def test_a_delayed_llava_tower(world):
    tower = SigLip2NaflexVisionTower(world.checkpoint(world.shape), None, delay_load=True, cuda_graphs=True)
    tower.load_model()
    tower.to(world.device, world.dtype)
    packed = world.pack()
    with torch.no_grad():
        tower(packed["pixel_values"], grid_thw=packed["grid_thw"])
    assert tower.vision_tower.graphs.held()[0] == 1


def test_encode_replays_packs_that_are_half_full_in_half_precision(checkpoint, monkeypatch):
    asked = []
    monkeypatch.setattr(module, "CUDAGraphs", lambda *args, **kwargs: asked.append((args, kwargs)) or "graphs")
    model = Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny"))
    monkeypatch.setattr(Siglip2PackedVisionModel, "device", torch.device("cuda"))
    assert replayed(model, 640) is model
    assert replayed(model.to(torch.bfloat16), 640) == "graphs"
    assert asked == [((model, [640]), {"least": 320})]
    model.config._attn_implementation = "sdpa"
    assert replayed(model, 640) is model


def test_packs_of_few_rows_may_be_left_out(world):
    graphs = CUDAGraphs(world.model(), [300], least=150)
    features(graphs, world.pack([(1, 149, 1)]))
    assert graphs.held()[0] == 0
    features(graphs, world.pack([(1, 150, 1)]))
    assert graphs.held()[0] == 1


def test_what_cannot_be_graphed_says_why(checkpoint):
    model = Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny"))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no graphs of this model: attention in buckets needs a CUDA device"):
            CUDAGraphs(model)
    for budgets in ([], [0], [True], [1.5]):
        with pytest.raises(ValueError, match="budgets must be positive integers"):
            CUDAGraphs(model, budgets=budgets)


def test_a_model_on_the_cpu_runs_without(checkpoint, patches, said):
    model = Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny"), cuda_graphs=True)
    packed = PackedPatches(patches(GRIDS), GRIDS)
    equal(features(model, packed), features(Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny")), packed))
    (line,) = said()
    assert "needs a CUDA device, the tensors are on cpu" in line


# Buckets


@pytest.mark.parametrize(
    ("grids", "expected"),
    [
        ([(1, 4, 4)], (64, 1, 64)),
        ([(1, 8, 8), (2, 2, 2), (1, 5, 4)], (100, 4, 64)),
        ([(1, 8, 8), (1, 5, 5), (1, 1, 1)], (100, 4, 64)),
        ([(1, 99, 1)], (100, 1, 100)),
        ([(1, 10, 12)], (300, 1, 128)),
        ([(1, 16, 16)], (300, 1, 256)),
        ([(1, 16, 17)], (300, 1, 300)),
        ([(1, 2, 2)] * 5, (64, 16, 64)),
        ([(1, 20, 20)], None),
        ([], None),
    ],
)
def test_buckets(grids, expected):
    assert bucket_of(make_layout(grids), [64, 100, 300]) == expected


def test_a_pack_costs_at_most_an_eighth_more_rows():
    """From 1,024 rows on, as far as buckets go."""
    for total in range(1024, DEFAULT[-1] + 1):
        assert bucket_of(make_layout([(1, total, 1)]), DEFAULT).patches <= 1.125 * total
    assert bucket_of(make_layout([(1, DEFAULT[-1] + 1, 1)]), DEFAULT) is None


def test_metadata_of_a_pack_in_a_bucket():
    """Whatever was there before: rows beyond are nobody's, images and segments beyond have no rows."""
    layouts = [make_layout(grids) for grids in ([(1, 4, 4), (1, 2, 3), (1, 1, 2)], [(2, 2, 3), (1, 1, 1)])]
    metadata = Metadata(bucket_of(layouts[0], [32]), torch.device("cpu"))
    for layout in layouts:
        metadata.fill(layout)
    images, image_of_row = metadata.places.on(torch.device("cpu"))
    assert metadata.segments.cu_seqlens.tolist() == [0, 6, 12, 13, 13]
    assert metadata.images.cu_seqlens.tolist() == [0, 12, 13, 13, 13]
    assert images.tolist() == [[0, 2, 2, 3], [12, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert image_of_row.tolist() == [0] * 12 + [1] + [-1] * 19
