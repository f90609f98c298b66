"""Graphs of a model share memory, and lend gradients from it: nobody finds another's numbers in what is his."""

import gc
import threading
from functools import partial

import pytest
import torch
import torch.utils.checkpoint
from graphed import (
    BUDGETS,
    BUSY,
    LENT,
    OTHERS,
    AtBucketRows,
    gradients,
    graphs_of,
    near,
    on_both,
    on_tokens,
    relative,
    same,
    same_gradients,
    step,
    weighted,
)
from torch import distributed as dist
from torch import nn

from siglip2_packed.graphs import CUDAGraphs


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
