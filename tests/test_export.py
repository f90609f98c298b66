"""Graphs that run without this package compute what the model does: torch.export, AOTInductor, ONNX."""

import inspect
import re
import shutil
import textwrap

import pytest
import relative_models
import torch
import vlm_models
from torch import nn

import kernels_ref
from siglip2_packed import PackedPatches, Siglip2PackedVisionModel, fp8
from siglip2_packed.export import export, export_inputs, export_onnx, position_weights
from siglip2_packed.measure import relative_error
from siglip2_packed.random_checkpoint import SHAPES, save_random_checkpoint
from siglip2_packed.vlm import replace_vision_tower

PACKS = {
    "three shapes": [(1, 13, 19), (1, 8, 32), (1, 1, 40)],
    "13x19": [(1, 13, 19)],
    "8x32": [(1, 8, 32)],
    "1x40": [(1, 1, 40)],
    "7x1": [(1, 7, 1), (1, 4, 4)],
    "one patch": [(1, 1, 1)],
    "a video": [(3, 3, 4), (1, 2, 3)],
    "joint": [(3, 3, 4), (1, 2, 3)],
}
FEATURES = ("last_hidden_state", "pooler_output")
BOUND = 1e-6
load = Siglip2PackedVisionModel.from_pretrained


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    """Two layers, head_dim 72, and a table of 16x16, so that images of 13x19 and 8x32 shrink it."""
    SHAPES["table16"] = SHAPES["tiny72"] | dict(num_patches=256)
    try:
        return save_random_checkpoint(tmp_path_factory.mktemp("table16"), "table16")
    finally:
        del SHAPES["table16"]


@pytest.fixture(scope="module")
def model(ckpt):
    return load(ckpt)


@pytest.fixture(scope="module", params=["non-strict", "strict"])
def program(model, request):
    return export(model, strict=request.param == "strict")


@pytest.fixture
def pack(patches):
    return lambda name: PackedPatches(patches(PACKS[name]), PACKS[name], "joint" if name == "joint" else "frames")


def expected(model, packed, name="frames"):
    """From the reference in float64."""
    temporal = "joint" if name == "joint" else "frames"
    state = {key: x.detach() for key, x in model.state_dict().items()}
    pixel_values = packed["pixel_values"].double()
    return kernels_ref.packed_encoder(
        state, model.config, pixel_values, packed["grid_thw"], temporal, dtype=torch.float64
    )


def check(features, reference, bound=BOUND):
    assert len(features) == 2
    for name, x in zip(FEATURES, features):
        x = torch.as_tensor(x)
        assert x.shape == getattr(reference, name).shape
        assert relative_error(x.double(), getattr(reference, name)) <= bound, name


@pytest.mark.parametrize("name", PACKS)
def test_one_graph_serves_any_pack(model, program, pack, name):
    packed = pack(name)
    check(program.module()(**export_inputs(packed)), expected(model, packed, name))


@pytest.mark.parametrize(("name", "strict"), [("three shapes", False), ("a video", True), ("joint", False)])
def test_a_graph_for_packs_laid_out_as_one(model, pack, patches, name, strict):
    program = export(model, pack(name), strict=strict)
    packed = PackedPatches(patches(PACKS[name], seed=1), PACKS[name])
    check(program.module()(pixel_values=packed["pixel_values"]), expected(model, packed, name))
    operations = {node.target for node in program.graph.nodes}
    assert not operations & {torch.ops.aten.index.Tensor, torch.ops.aten.item.default}
    with pytest.raises(AssertionError, match="size"):
        program.module()(pixel_values=packed["pixel_values"][1:])


def test_a_graph_is_saved_and_loaded(model, program, pack, tmp_path):
    torch.export.save(program, tmp_path / "siglip2.pt2")
    packed = pack("three shapes")
    check(torch.export.load(tmp_path / "siglip2.pt2").module()(**export_inputs(packed)), expected(model, packed))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_as_the_model(ckpt, pack, dtype):
    packed, half = pack("three shapes"), load(ckpt, num_hidden_layers=1, dtype=dtype)
    reference, out = expected(half, packed), half(**packed)
    for features in (
        export(half).module()(**export_inputs(packed)),
        export(half, packed).module()(pixel_values=packed["pixel_values"]),
    ):
        check_half(features, out, reference, dtype)


def check_half(features, out, reference, dtype):
    for name, x in zip(FEATURES, features):
        assert x.dtype == dtype
        ours, its = (relative_error(y, getattr(reference, name)) for y in (x, out[name]))
        assert ours <= 1.2 * its, name


def test_what_is_not_finite_in_one_image_stays_there(model, program, pack):
    inputs = export_inputs(pack("three shapes"))
    before = program.module()(**inputs)
    rows = slice(0, 13 * 19)
    inputs["pixel_values"][rows] = float("nan")
    tokens, pooled = program.module()(**inputs)
    assert tokens[rows].isnan().all() and pooled[0].isnan().all()
    torch.testing.assert_close(tokens[rows.stop :], before[0][rows.stop :], rtol=0, atol=0)
    torch.testing.assert_close(pooled[1:], before[1][1:], rtol=0, atol=0)


def misfits():
    grids, lengths = PACKS["three shapes"], [247, 256, 40]
    yield grids[:2], lengths
    yield [*grids, (1, 2, 3)], lengths
    yield [*grids[:2], (1, 1, 41)], lengths
    yield grids, lengths[:2]
    yield grids, [*lengths, 6]
    yield grids, [247, 256, 41]


class Clamping(torch.fx.Interpreter):
    """A runtime in which an index that is too large is the last one, as on some devices."""

    def call_function(self, target, args, kwargs):
        if target is torch.ops.aten.index.Tensor:
            x, indices = args
            args = x, [index.clamp(max=size - 1) for index, size in zip(indices, x.shape)]
        return super().call_function(target, args, kwargs)


@pytest.mark.parametrize(("grids", "lengths"), misfits())
def test_no_graph_gives_features_of_sizes_that_do_not_fit(program, patches, grids, lengths):
    inputs = patches(PACKS["three shapes"]), torch.tensor(grids), torch.tensor(lengths)
    with pytest.raises(IndexError):
        program.module()(**dict(zip(("pixel_values", "grid_thw", "seqlens"), inputs)))
    assert all(x.isnan().all() for x in Clamping(program.module()).run(*inputs))


def test_inputs_are_checked_on_the_host(patches):
    x = patches([(1, 2, 3)])
    with pytest.raises(ValueError, match="covers 8 patches, pixel_values has 6 rows"):
        export_inputs(dict(pixel_values=x, grid_thw=[[1, 2, 4]]))
    with pytest.raises(ValueError, match="cu_seqlens ends at 5"):
        export_inputs(dict(pixel_values=x, grid_thw=[[1, 2, 3]], cu_seqlens=[0, 5]))
    with pytest.raises(ValueError, match="at least one image"):
        export_inputs(PackedPatches(x[:0], []))
    with pytest.raises(ValueError, match="floating"):
        export_inputs(dict(pixel_values=x.long(), grid_thw=[[1, 2, 3]]))


def test_weights_of_positions_are_those_of_the_reference():
    for target in (*range(1, 41), 97, 1024):
        weights = position_weights(torch.arange(target), torch.full((target,), target), side=16)
        exact = kernels_ref.position_weights(16, target)
        assert (weights - exact).abs().max() <= 2**-24, target
    assert torch.equal(position_weights(torch.arange(16), torch.full((16,), 16), side=16), torch.eye(16))


@pytest.mark.parametrize("settings", [dict(vision_use_head=False), dict(select_layer=-2)])
def test_models_without_a_head_give_tokens_alone(ckpt, pack, settings):
    model, packed = load(ckpt, **settings), pack("three shapes")
    with torch.no_grad():
        reference = model(**packed).last_hidden_state
    (tokens,) = export(model).module()(**export_inputs(packed))
    assert relative_error(tokens, reference) <= BOUND


LORA = ["q_proj", "fc1", "patch_embedding", "position_embedding", "out_proj"]


def test_adapters_are_exported_as_they_compute(ckpt, pack):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, init_lora_weights=False, target_modules=LORA)
    wrapped = peft.get_peft_model(load(ckpt, num_hidden_layers=1), config).eval()
    packed = pack("three shapes")
    features = export(wrapped.get_base_model()).module()(**export_inputs(packed))
    check(features, expected(wrapped.merge_and_unload(), packed))


def test_the_callers_modes_are_not_exported(ckpt, pack):
    model, packed = load(ckpt, num_hidden_layers=1), pack("1x40")
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode(), torch.device("meta"):
        program = export(model)
    check(program.module()(**export_inputs(packed)), expected(model, packed))


def hook(model):
    model.embeddings.register_forward_hook(lambda *_: None)


def replaced_forward(model):
    model.encoder.layers[1].forward = model.encoder.layers[1].forward


def float8(model):
    model.encoder = nn.Module.__new__(fp8.Float8Encoder)


def another_layer(model):
    model.encoder.layers[0] = type("Wrapper", (nn.Module,), {})()


def half_quantised(model):
    torch.ao.quantization.quantize_dynamic(model.encoder, {nn.Linear}, inplace=True)


def integers(model):
    weight = nn.Parameter(torch.zeros(64, 64, dtype=torch.int8), requires_grad=False)
    model.encoder.layers[1].mlp.fc1.weight = weight


def training(model):
    model.encoder.layers[1].train()


REFUSED = {
    hook: r"embeddings \(Siglip2PackedEmbeddings\) has hooks",
    replaced_forward: r"encoder.layers.1 \(Siglip2PackedEncoderLayer\) has hooks or a forward of its own",
    float8: "encoder is Float8Encoder",
    another_layer: "encoder.layers.0 is Wrapper",
    half_quantised: r"encoder.layers.0.self_attn.k_proj \(Linear\) is quantised",
    integers: "encoder.layers.1.mlp.fc1.weight is Parameter of torch.int8",
    training: r"encoder.layers.1 \(Siglip2PackedEncoderLayer\) is in training mode",
}


@pytest.mark.parametrize("name", relative_models.TOWERS)
def test_towers_of_other_positions_say_so(tmp_path, pack, name):
    relative_models.tower(name).save_pretrained(tmp_path)
    for kwargs in ({}, {"position_mode": "bicubic"}, {"position_mode": "bilinear_antialias"}):
        for packed in (None, pack("13x19")):
            with pytest.raises(ValueError, match=r"vision.* with \w+ positions cannot be exported"):
                export(load(tmp_path, **kwargs), packed)


@pytest.mark.parametrize("spoil", REFUSED)
def test_what_cannot_be_exported_says_so(ckpt, spoil):
    model = load(ckpt)
    spoil(model)
    with pytest.raises(ValueError, match=REFUSED[spoil]):
        export(model)


def test_a_replaced_tower_is_exported_as_the_model_that_it_is(pack):
    holder = nn.ModuleDict({"tower": vlm_models.tower("tiny72")})
    (replaced,) = replace_vision_tower(holder).values()
    check(export(replaced).module()(**export_inputs(pack("13x19"))), expected(replaced, pack("13x19")))


def test_a_table_of_another_size_is_exported_as_the_model_resizes_it(ckpt, pack):
    model, packed = load(ckpt, num_hidden_layers=1), pack("13x19")
    model.embeddings.position_embedding = nn.Embedding(81, model.config.hidden_size).eval()
    with torch.no_grad():
        reference = model(**packed).last_hidden_state
    for features in (
        export(model).module()(**export_inputs(packed)),
        export(model, packed).module()(pixel_values=packed["pixel_values"]),
    ):
        assert relative_error(features[0], reference) <= BOUND


def test_wrappers_are_named(model, tower):
    for other in (tower, nn.Sequential(model)):
        with pytest.raises(ValueError, match=f"got {type(other).__name__}"):
            export(other)


def run_onnx(file, inputs):
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
    shapes = {x.name: x.shape for x in (*session.get_inputs(), *session.get_outputs())}
    return shapes, [torch.from_numpy(x) for x in session.run(None, {name: x.numpy() for name, x in inputs.items()})]


@pytest.fixture(scope="module")
def onnx_file(model, tmp_path_factory):
    pytest.importorskip("onnxscript")
    file = tmp_path_factory.mktemp("onnx") / "siglip2.onnx"
    export_onnx(model, file)
    return file


@pytest.mark.parametrize("name", PACKS)
def test_onnx_serves_any_pack(model, onnx_file, pack, name):
    packed = pack(name)
    shapes, features = run_onnx(onnx_file, export_inputs(packed))
    check(features, expected(model, packed, name))
    assert shapes == {
        "pixel_values": ["patches", 48],
        "grid_thw": ["images", 3],
        "seqlens": ["segments"],
        "last_hidden_state": ["patches", 144],
        "pooler_output": ["images", 144],
    }


def test_onnx_resizes_positions_by_products(onnx_file):
    """Resize's antialias is torch's in onnxruntime only with exclude_outside, and is ignored elsewhere."""
    onnx = pytest.importorskip("onnx")
    graph = onnx.load(onnx_file).graph
    assert "Resize" not in {node.op_type for node in graph.node}
    assert {node.domain for node in graph.node} == {""}


def test_onnx_for_packs_laid_out_as_one(model, pack, patches, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    export_onnx(model, tmp_path / "one.onnx", pack("a video"))
    packed = PackedPatches(patches(PACKS["a video"], seed=1), PACKS["a video"])
    shapes, features = run_onnx(tmp_path / "one.onnx", {"pixel_values": packed["pixel_values"]})
    check(features, expected(model, packed))
    assert all(isinstance(size, int) for shape in shapes.values() for size in shape)
    assert not {"GatherND", "Range", "Mod"} & {node.op_type for node in onnx.load(tmp_path / "one.onnx").graph.node}


def test_onnx_in_half_precision(ckpt, pack, tmp_path):
    pytest.importorskip("onnxscript")
    packed, half = pack("three shapes"), load(ckpt, num_hidden_layers=1, dtype=torch.float16)
    export_onnx(half, tmp_path / "half.onnx")
    _, features = run_onnx(tmp_path / "half.onnx", export_inputs(packed))
    check_half(features, half(**packed), expected(half, packed), torch.float16)


def test_onnx_that_is_not_installed_is_named(model, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"siglip2-packed\[onnx\]"):
        export_onnx(model, tmp_path / "siglip2.onnx")


needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="AOTInductor needs a C++ compiler")


@pytest.mark.slow
@pytest.mark.timeout(900)
@needs_compiler
def test_the_example_in_the_documentation(ckpt, pack, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"\n\n((?:    .*\n)+)", inspect.getdoc(inspect.getmodule(export)))
    scope = vars(inspect.getmodule(export)) | {"model": load(ckpt, num_hidden_layers=1)}
    exec(textwrap.dedent(example), scope | {"packed": pack("13x19")})
    run = torch._inductor.aoti_load_package("siglip2.pt2")
    for name in PACKS:
        packed = pack(name)
        inputs, reference = export_inputs(packed), expected(scope["model"], packed, name)
        check(run(**inputs), reference)
        check(run_onnx("siglip2.onnx", inputs)[1], reference)


@pytest.mark.slow
@pytest.mark.timeout(900)
@needs_compiler
def test_aot_inductor_for_packs_laid_out_as_one(ckpt, pack, tmp_path):
    model, packed = load(ckpt, num_hidden_layers=1), pack("three shapes")
    file = str(tmp_path / "siglip2.pt2")
    torch._inductor.aoti_compile_and_package(export(model, packed), package_path=file)
    check(torch._inductor.aoti_load_package(file)(pixel_values=packed["pixel_values"]), expected(model, packed))
