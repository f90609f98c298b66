"""`batch_invariant`: an image's features are the same to the bit alone, in any pack, in a bucket; or there is an error.

On the CPU kernels are interpreted, in float16, as a card without Hopper's chooses them.
"""

import math
import random
from functools import partial
from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from graphed import BUDGETS
from implementations import INTERPRETED
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import Siglip2VisionConfig, SiglipVisionConfig

from siglip2_packed import PackedPatches, SigLip2NaflexVisionTower, Siglip2PackedVisionModel, graphs
from siglip2_packed.buckets import Bucket, Metadata
from siglip2_packed.cli import main
from siglip2_packed.export import export
from siglip2_packed.graphs import CUDAGraphs, attention_in_buckets
from siglip2_packed.layout import make_layout
from siglip2_packed.measure import relative_error
from siglip2_packed.ops import norm, positions
from siglip2_packed.ops.attention import kernels, operators
from siglip2_packed.ops.linear import triton as products
from siglip2_packed.ops.runtime import check
from siglip2_packed.ops.runtime.choice import Card, Function
from siglip2_packed.workloads import SHAPES

AMPERE = Card("cuda", 80, 108)
SHAPE = dict(
    hidden_size=144, intermediate_size=200, num_hidden_layers=1, num_attention_heads=2, patch_size=4, num_patches=16
)
GRIDS = [(1, 1, 131), (2, 2, 3), (1, 7, 1), (1, 5, 13)]
"""Of three key tiles, two segments, a side of one, and a key tile and a row."""
PACKS = {False: [(0, 1, 2, 3), (3, 2, 1)], True: [(2, 3, 1)]}
"""Without gradients and with them."""


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(math.prod(grid), 48, generator=generator) for grid in GRIDS]


@pytest.fixture
def interpreted(trusted, monkeypatch):
    """Own kernels on the CPU, without their checks."""
    right = check.Verdict({"out": 0.0}, {"out": 0.0})
    monkeypatch.setattr(kernels, "verdict_on", lambda *args: right)
    trusted(card=AMPERE)


@pytest.fixture
def model(interpreted):
    torch.manual_seed(0)
    config = Siglip2VisionConfig(**SHAPE)
    config.batch_invariant = True
    made = Siglip2PackedVisionModel(config)
    for name, parameter in made.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.2)
    return made.half().eval()


@pytest.fixture
def norms_by_torch(monkeypatch):
    """A row for itself in torch, too: interpreted, they take most of the time."""
    monkeypatch.setitem(norm.MODULES, "triton", norm.MODULES["eager"])


@pytest.fixture
def by_torch(norms_by_torch, monkeypatch):
    """Positions as well."""
    monkeypatch.setitem(positions.MODULES, "triton", positions.MODULES["eager"])


def packed(images, order):
    return PackedPatches(torch.cat([images[i] for i in order]), [GRIDS[i] for i in order])


def features(model, images, order, gradients=False):
    """By image, its tokens and its vector."""
    with torch.set_grad_enabled(gradients):
        out = model(**packed(images, order))
    tokens = out.last_hidden_state.detach().split([len(images[i]) for i in order])
    return {i: (x, y) for i, x, y in zip(order, tokens, out.pooler_output.detach(), strict=True)}


def unlike(found, expected):
    """Images whose features are not those expected, to the bit."""
    assert all(x.isfinite().all() and x.abs().max() > 0 for pair in found.values() for x in pair)
    return [i for i, pair in found.items() if not all(map(torch.equal, pair, expected[i]))]


@INTERPRETED
@pytest.mark.usefixtures("by_torch")
@pytest.mark.parametrize("gradients", [False, True])
def test_alone_and_in_any_pack(model, images, gradients):
    alone = {i: features(model, images, [i], gradients)[i] for i in sorted({*chain(*PACKS[gradients])})}
    for order in PACKS[gradients]:
        assert not unlike(features(model, images, order, gradients), alone), order


@INTERPRETED
@pytest.mark.usefixtures("norms_by_torch", "poisoned")
def test_in_a_bucket(model, images):
    """At rows of no image and segments without rows; where a graph reads them, of another longest segment."""
    order = (1, 2)
    alone = {i: pair for i in order for i, pair in features(model, images, [i]).items()}
    pack = packed(images, order)
    layout = make_layout(pack["grid_thw"])
    for bucket in (Bucket(24, 4, 24), Bucket(40, 16, 150)):
        metadata = Metadata(bucket, torch.device("cpu"))
        metadata.fill(layout)
        rows = torch.zeros(bucket.patches, 48)
        rows[: len(pack["pixel_values"])] = pack["pixel_values"]
        attention = attention_in_buckets(model, metadata.segments, bucket.patches, gradients=False)
        assert attention.invariant
        with torch.no_grad():
            out = model._features(rows, metadata.places, attention, metadata.images)
        tokens = out.last_hidden_state[: len(pack["pixel_values"])].split([len(images[i]) for i in order])
        assert not unlike(dict(zip(order, zip(tokens, out.pooler_output))), alone)


@INTERPRETED
def test_rows_that_name_their_places(model, images):
    """As patches of a sparse video do: those of an image all in order have its features."""
    del model.head
    with torch.no_grad():
        alone = model(**packed(images, [1])).last_hidden_state
        grids, rows = [(2, 2, 3), (3, 5, 1)], torch.cat((images[1], images[2]))
        ids = torch.cat((torch.arange(12), 12 + torch.tensor([0, 1, 6, 7, 8, 13, 14])))
        cu_seqlens = torch.tensor([0, 6, 12, 14, 17, 19])
        found = model(rows, grids, cu_seqlens=cu_seqlens, position_ids=ids).last_hidden_state
    assert torch.equal(found[:12], alone)
    model.config.batch_invariant = False
    with torch.no_grad():
        assert relative_error(found, model(rows, grids, cu_seqlens=cu_seqlens, position_ids=ids)[0]) <= 2e-3


@INTERPRETED
@pytest.mark.usefixtures("norms_by_torch", "interpreted")
def test_a_fixed_size_tower(images):
    """SigLIP's, whose patch projection is a convolution, among images of other sizes than its table's."""
    torch.manual_seed(0)
    fields = {name: value for name, value in SHAPE.items() if name != "num_patches"}
    config = SiglipVisionConfig(**fields, image_size=8)
    config.position_mode, config.batch_invariant = "bicubic", True
    model = Siglip2PackedVisionModel(config).half().eval()
    rows, grids = torch.cat((images[2], images[1][:4])), [(1, 7, 1), (1, 2, 2)]
    with torch.no_grad():
        found = model(rows, grids)
        parts = [model(rows[:7], grids[:1]), model(rows[7:], grids[1:])]
        for name in ("last_hidden_state", "pooler_output"):
            assert torch.equal(found[name], torch.cat([part[name] for part in parts])), name
        model.config.batch_invariant = False
        assert relative_error(found.last_hidden_state, model(rows, grids).last_hidden_state) <= 2e-3


@INTERPRETED
@pytest.mark.usefixtures("by_torch")
def test_a_model_without_layers(model, images, monkeypatch):
    """`select_layer=0`: nothing is asked for, or checked, of which there is nothing."""
    asked = []

    def verdict(function, name, device, dtype, sizes):
        asked.append(sizes)
        return check.Verdict({"out": 0.0}, {"out": 0.0})

    monkeypatch.setattr(Function, "verdict", verdict)
    model.config.select_layer = 0
    model = Siglip2PackedVisionModel(model.config).half()
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            assert model(**packed(images, [2])).last_hidden_state.isfinite().all()
    assert asked and all(size is False or size > 0 for sizes in asked for size in sizes)


@INTERPRETED
@pytest.mark.usefixtures("by_torch")
def test_features_and_gradients_are_as_right(model, images):
    """As those of the same model without it, in float64; gradients of a pack are the same in every run."""
    pack = packed(images, (1, 2))

    def run(model):
        model.zero_grad()
        out = model(**pack)
        (out.last_hidden_state.square().sum() + out.pooler_output.square().sum()).backward()
        grads = torch.cat([p.grad.flatten() for p in model.parameters()])
        return out.last_hidden_state.detach(), out.pooler_output.detach(), grads

    found = run(model)
    assert all(map(torch.equal, found, run(model)))
    model.config.batch_invariant = False
    usual = run(model)
    exact = run(model.double())
    for x, y, z in zip(found, usual, exact, strict=True):
        assert relative_error(x, z) <= 1.2 * relative_error(y, z)


def many_rows_in_two_halves(monkeypatch):
    """A product that cuts the contraction where there are many rows."""
    right = products.linear

    def cut(x, weight, bias, place=None, tile=None):
        if len(x) < 100:
            return right(x, weight, bias, place, tile)
        half = x.shape[1] // 2
        out = right(x[:, half:], weight[:, half:], bias, place, tile)
        return products.add_product_(out, x[:, :half], weight[:, :half], tile)

    monkeypatch.setattr(products, "linear", cut)


def tile_by_the_longest(monkeypatch):
    """Attention as `auto` chooses it."""
    right = operators.for_tensors
    monkeypatch.setattr(operators, "for_tensors", lambda *args: right(*args[:-1]))


@INTERPRETED
@pytest.mark.usefixtures("by_torch")
@pytest.mark.parametrize("plant", [many_rows_in_two_halves, tile_by_the_longest])
def test_what_depends_on_the_pack_is_seen(model, images, monkeypatch, plant):
    """Such faults change bits: the comparison above is sharp."""
    plant(monkeypatch)
    assert 3 in unlike(features(model, images, [3, 0]), features(model, images, [3]) | features(model, images, [0]))


@INTERPRETED
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("card", [AMPERE, Card("cuda", 90, 132), Card("cuda", 120, 170)], ids=str)
def test_attention_is_one_launch(interpreted, trusted, card, gradients):
    """For few rows and many, short segments and long ones; of own choice others run."""
    trusted(card=card)
    packs = [[16], [64] * 3, [97], [130, 5], [192], [256] * 64, [4096, 1], [1] * 3000]

    def launches(**how):
        for lengths in packs:
            shape = sum(lengths), 16, 72
            found = kernels.kernels(torch.device("cpu"), torch.float16, shape, len(lengths), max(lengths), **how)
            yield found.launches[0], found.reads_low

    ours, others = ({*launches(gradients=gradients, invariant=invariant)} for invariant in (True, False))
    assert {low for _, low in ours} == {gradients} and len(ours) == 1 < len(others)


# What cannot be


def test_the_cpu_has_none(images):
    config = Siglip2VisionConfig(**SHAPE)
    config.batch_invariant = True
    model = Siglip2PackedVisionModel(config)
    pack = packed(images, [1])
    with pytest.raises(ValueError, match="batch_invariant attention cannot be had: needs a CUDA device, the tensors"):
        model(**pack)
    model.config.batch_invariant = False
    assert model(**pack).last_hidden_state.isfinite().all()


def adapter(model):
    inject_adapter_in_model(LoraConfig(target_modules=["fc1"]), model.encoder)
    model.half()


def of_embeddings(model):
    model.embeddings.patch_embedding = inject_adapter_in_model(
        LoraConfig(target_modules=["0"]), nn.Sequential(model.embeddings.patch_embedding)
    )[0].half()


def of_the_head(model):
    inject_adapter_in_model(LoraConfig(target_modules=["fc2"]), model.head)
    model.half()


def hook(model):
    model.encoder.layers[0].mlp.fc2.register_forward_hook(lambda *args: None)


def hook_on_a_layer(model):
    model.encoder.layers[0].register_forward_pre_hook(lambda *args: None)


def hook_on_the_head(model):
    model.head.attention.register_forward_hook(lambda *args: None)


def other_attention(model):
    model.set_attn_implementation("sdpa")


def another_encoder(model):
    class Float8Encoder(nn.Module):
        layers: list = []

    model.encoder = Float8Encoder()


def mixed(model):
    model.encoder.layers[0].self_attn.q_proj.float()


def mixed_positions(model):
    model.embeddings.position_embedding.float()


def other_activation(model):
    model.encoder.layers[0].mlp.activation_fn = nn.GELU()


def mixed_probe(model):
    model.head.probe.data = model.head.probe.data.float()


def mixed_projection_of_the_head(model):
    model.head.attention.in_proj_weight.data = model.head.attention.in_proj_weight.data.float()


def another_activation_of_the_head(model):
    model.head.mlp.activation_fn = nn.Softmax(dim=0)  # across images


def no_layers(model):
    model.encoder = nn.Identity()


def float32(model):
    model.float()


def compiled(model):
    model.encoder.layers[0].compile()


REFUSED = {
    adapter: r"Siglip2PackedEncoderLayer.mlp.fc1 is Linear",
    of_embeddings: r"Siglip2PackedEmbeddings.patch_embedding is Linear",
    of_the_head: r"Siglip2PackedPoolingHead.mlp.fc2 is Linear",
    hook: r"hooks or a replaced forward on Siglip2PackedEncoderLayer.mlp.fc2",
    hook_on_a_layer: r"hooks or a replaced forward on Siglip2PackedVisionModel.encoder.layers.0 ",
    hook_on_the_head: r"hooks or a replaced forward on Siglip2PackedPoolingHead.attention ",
    other_attention: r"attn_implementation asks for 'sdpa'",
    another_encoder: r"Float8Encoder computes in its own way",
    mixed: r"Siglip2PackedEncoderLayer.self_attn.q_proj.weight is float32, and what it is applied to float16",
    mixed_positions: r"Siglip2PackedEmbeddings.position_embedding.weight is float32",
    other_activation: r"Siglip2PackedEncoderLayer.mlp.activation_fn is GELU",
    mixed_probe: r"Siglip2PackedPoolingHead.probe is float32, and what it is applied to float16",
    mixed_projection_of_the_head: r"Siglip2PackedPoolingHead.attention.in_proj_weight is float32",
    another_activation_of_the_head: r"Siglip2PackedPoolingHead.mlp.activation_fn is Softmax",
    no_layers: r"Identity computes in its own way",
    float32: r"needs bfloat16 or float16, the tensors are torch.float32",
    compiled: r"hooks or a replaced forward on Siglip2PackedVisionModel.encoder.layers.0",
}


@INTERPRETED
@pytest.mark.parametrize(("change", "hidden_states"), [(adapter, True), (hook, True), *[(x, False) for x in REFUSED]])
def test_what_computes_in_another_way_is_an_error(model, images, change, hidden_states):
    change(model)
    with pytest.raises(ValueError, match=f"batch_invariant .*{REFUSED[change]}"), torch.no_grad():
        model(**packed(images, [2]), output_hidden_states=hidden_states)


@INTERPRETED
def test_autocast_is_an_error(model, images):
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="batch_invariant .*autocast"):
        model(**packed(images, [2]))


@INTERPRETED
def test_compiling_the_model_is_an_error(model, images):
    with pytest.raises(ValueError, match="batch_invariant .*torch.compile"):
        torch.compile(model, backend="eager")(**packed(images, [2]))


def test_an_exported_model_is_an_error(checkpoint):
    model = Siglip2PackedVisionModel.from_pretrained(checkpoint(), batch_invariant=True).eval()
    with pytest.raises(ValueError, match="batch_invariant cannot be exported"):
        export(model)


@INTERPRETED
def test_a_wrong_kernel_is_an_error(model, images, monkeypatch):
    verdicts = {True: check.Verdict({"out": 1.0}, {"out": 1e-3}), False: check.Verdict({"out": 0.0}, {"out": 1e-3})}
    monkeypatch.setattr(Function, "verdict", lambda self, *args: verdicts["gelu" in self.name])
    with pytest.raises(
        ValueError, match=r"batch_invariant .* mlp.linear_gelu_keep \(invariant\) failed its self-check"
    ):
        model(**packed(images, [2]))


# Who asks for it


def test_it_is_a_setting_of_the_configuration(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="batch_invariant must be true or false, got 'yes'"):
        Siglip2PackedVisionModel.from_pretrained(checkpoint(), batch_invariant="yes")
    assert not hasattr(Siglip2PackedVisionModel.from_pretrained(checkpoint()).config, "batch_invariant")
    Siglip2PackedVisionModel.from_pretrained(checkpoint(), batch_invariant=True).save_pretrained(tmp_path)
    assert Siglip2PackedVisionModel.from_pretrained(tmp_path).config.batch_invariant
    assert not Siglip2PackedVisionModel.from_pretrained(tmp_path, batch_invariant=False).config.batch_invariant


@pytest.mark.parametrize("delay_load", [False, True])
def test_llava_asks_for_it(checkpoint, delay_load):
    by_config = SigLip2NaflexVisionTower(
        str(checkpoint()), SimpleNamespace(mm_vision_batch_invariant=True), delay_load=delay_load
    )
    by_argument = SigLip2NaflexVisionTower(str(checkpoint()), SimpleNamespace(), delay_load, batch_invariant=True)
    for tower in (by_config, by_argument):
        tower.load_model()
        assert tower.vision_tower.config.batch_invariant
        with pytest.raises(ValueError, match="batch_invariant attention cannot be had"):
            tower(torch.zeros(1, 6, 48), [[1, 2, 3]])


def test_graphs_know_the_setting(world):
    """What was captured without it is not replayed with it."""
    model = world.model().eval()
    graphed = CUDAGraphs(model, BUDGETS)
    with torch.no_grad():
        for invariant, count in ((False, 1), (True, 2), (False, 2)):
            model.config.batch_invariant = invariant
            graphed(**world.pack())
            assert graphed.held()[0] == count


@INTERPRETED
def test_training_graphs_see_what_computes_in_another_way(world, monkeypatch):
    class OfTheBatch(nn.LayerNorm):
        pass

    attention_in_any = graphs.attention_in_buckets

    def attention_in_buckets(*args, **kwargs):
        attention = attention_in_any(*args, **kwargs)
        attention.invariant = True
        return attention

    monkeypatch.setattr(graphs, "attention_in_buckets", attention_in_buckets)
    model = world.model(batch_invariant=True)
    model.post_layernorm.__class__ = OfTheBatch
    with pytest.raises(ValueError, match="batch_invariant cannot be had: OfTheBatch computes in its own way"):
        CUDAGraphs(model, BUDGETS)(**world.pack())


# On a card


CUDA_GRIDS = [(1, 13, 19), (1, 8, 32), (2, 7, 5), (1, 1, 256), (1, 7, 1), (1, 1, 1), (1, 40, 40), (1, 16, 16)]


def random_grids(rng):
    """Of 1 to 60 images, of 1 to 1,024 patches."""
    sides = [(1, rng.randint(1, 32), rng.randint(1, 32)) for _ in range(rng.choice((1, 2, 3, 8, 60)))]
    return [rng.choice(CUDA_GRIDS) if rng.random() < 0.3 else grid for grid in sides]


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def on_card(request):
    """so400m's widths, four layers, and a function that makes the patches of an image, always the same."""
    torch.manual_seed(0)
    config = Siglip2VisionConfig(**SHAPES["so400m"] | {"num_hidden_layers": 4})
    config.batch_invariant = True
    model = Siglip2PackedVisionModel(config).to("cuda", request.param).eval()
    table = torch.randn(4096, 768, device="cuda", generator=torch.Generator("cuda").manual_seed(0)).to(request.param)
    return model, lambda i, grid: table.roll(i)[: math.prod(grid)]


def on_cuda(run, make, numbered):
    """By (number, grid), tokens and vector of each image of a pack."""
    out = run(**PackedPatches(torch.cat([make(*x) for x in numbered]), [grid for _, grid in numbered]))
    tokens = out.last_hidden_state.split([math.prod(grid) for _, grid in numbered])
    return dict(zip(numbered, zip(tokens, out.pooler_output)))


@pytest.mark.gpu
@pytest.mark.parametrize("gradients", [False, True])
def test_200_packs(on_card, gradients):
    """Each image of each pack against itself alone; without gradients in graphs as well."""
    model, make = on_card
    rng, graphs, alone = random.Random(0), CUDAGraphs(model), {}
    with torch.set_grad_enabled(gradients):
        for _ in range(200 if not gradients else 20):
            numbered = list(dict.fromkeys((rng.randint(0, 3), grid) for grid in random_grids(rng)))
            runs = [model] if gradients else [model, graphs]
            for run in runs:
                found = on_cuda(run, make, numbered)
                for x in numbered:
                    if x not in alone:
                        alone |= {y: tuple(map(Tensor.detach, z)) for y, z in on_cuda(model, make, [x]).items()}
                assert not unlike({x: tuple(map(Tensor.detach, y)) for x, y in found.items()}, alone)
    assert gradients or graphs.held()[0] > 10


@pytest.mark.gpu
def test_an_image_in_every_bucket(on_card):
    model, make = on_card
    image, others = (0, (1, 13, 19)), [(1, (1, 8, 32)), (2, (1, 40, 40)), (3, (1, 32, 64))]
    alone = on_cuda(model, make, [image])
    for count in range(len(others) + 1):
        for budgets in ([256, 512, 4096], [8192], [640, 2304]):
            found = on_cuda(CUDAGraphs(model, budgets), make, [*others[:count], image])
            assert not unlike({image: found[image]}, alone)


@pytest.mark.gpu
def test_training_in_graphs_has_the_same_features(on_card):
    model, make = on_card
    model.train()
    images = [(0, (1, 13, 19)), (1, (1, 8, 32)), (2, (1, 1, 7))]
    graphs = CUDAGraphs(model)
    for some in (images, images[:1], images[1:]):
        found, expected = on_cuda(graphs, make, some), on_cuda(model, make, some)
        assert graphs.held()[0] and not unlike(found, expected)
        sum(tokens.float().square().mean() for tokens, _ in found.values()).backward()
    alone = on_cuda(model, make, images[:1])
    assert not unlike(alone, on_cuda(model, make, images))
    with torch.no_grad():
        states = partial(model, output_hidden_states=True)
        assert not unlike(on_cuda(states, make, images[:1]), on_cuda(states, make, images))


@pytest.mark.gpu
def test_accuracy_is_no_worse(on_card):
    model, make = on_card
    pack = [(0, (1, 13, 19)), (1, (1, 8, 32)), (2, (1, 5, 7))]
    with torch.no_grad():
        ours = on_cuda(model, make, pack)
        model.config.batch_invariant = False
        usual = on_cuda(model, make, pack)
        exact = on_cuda(model.float(), lambda *x: make(*x).float(), pack)
    for x in pack:
        for found, other, ref in zip(ours[x], usual[x], exact[x], strict=True):
            assert relative_error(found, ref) <= 1.1 * relative_error(other, ref)


@pytest.mark.gpu
@pytest.mark.parametrize("budget", ["1024", "4096", "16384"])
def test_encode_at_any_budget(checkpoint, photos, tmp_path, budget):
    """tiny72's features of photographs, by packs of different sizes, are those of a budget of 40."""
    for name, patches in (("ours", budget), ("least", "40")):
        args = ["encode", str(photos), "--ckpt", str(checkpoint("tiny72")), "--out", str(tmp_path / name), "--pooled"]
        assert main([*args, "--batch-invariant", "--patch-budget", patches]) == 0
    found, expected = ({p.name: p.read_bytes() for p in (tmp_path / x).glob("shard-*")} for x in ("ours", "least"))
    assert found == expected and found
