"""The reference agrees with transformers and with torch: every stage, every hidden state, every gradient.

In fp64 transformers still resizes positions in fp32, so there its resize is replaced by torch's own, one axis at a
time (`torch_resize`), which is exact and right at width 1 too. In fp32 transformers runs untouched.
"""

import ast
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from transformers import Siglip2Config, Siglip2Model, Siglip2VisionConfig, Siglip2VisionModel

import kernels_ref as ref

MAJOR = int(transformers.__version__.split(".")[0])
if MAJOR >= 5:
    from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches
else:
    from transformers.models.siglip2.image_processing_siglip2 import convert_image_to_patches

SHAPES = {
    "tiny": dict(hidden_size=64, num_attention_heads=4, intermediate_size=96),
    "head72": dict(hidden_size=144, num_attention_heads=2, intermediate_size=200),
}
GRIDS = [(13, 19), (8, 32), (1, 256), (7, 1), (5, 7), (4, 4)]
# 4.57 resizes with F.interpolate, which is wrong on CPU at width 1
HF_GRIDS = GRIDS if MAJOR >= 5 else [g for g in GRIDS if g[1] > 1]
P = 48


def close(actual, expected, tolerance):
    assert actual.shape == expected.shape
    assert torch.isfinite(expected).all()
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def transformers_patches(images):
    """[N, C, H, W] -> [N, h·w, 48]; 4.57 takes the channels last."""
    layout = (0, 1, 2, 3) if MAJOR >= 5 else (0, 2, 3, 1)
    return torch.stack([torch.from_numpy(convert_image_to_patches(x.numpy(), 4)) for x in images.permute(layout)])


def torch_resize(table, h, w):
    """[G, G, D] -> [h·w, D] by F.interpolate, each axis in turn as the height of an image of unchanged width."""

    def resize_first(x, size):
        image = x.reshape(1, 1, x.shape[0], -1)
        image = F.interpolate(image, size=(size, image.shape[-1]), mode="bilinear", antialias=True)
        return image.reshape(size, *x.shape[1:])

    return resize_first(resize_first(table, h).transpose(0, 1), w).transpose(0, 1).flatten(0, 1)


def exact_positions(table, spatial_shapes, max_length):
    """What transformers' resize should return: in the table's dtype, frames of a longer row repeating them."""
    rows = [torch_resize(table, h, w) for h, w in spatial_shapes.tolist()]
    return torch.stack([x.repeat(-(-max_length // len(x)), 1)[:max_length] for x in rows])


def make_model(shape="tiny", dtype=torch.float64, seed=0, **settings):
    """transformers' model at unit scale; in fp64 with exact positions."""
    config = Siglip2VisionConfig(
        **{**SHAPES[shape], **dict(num_hidden_layers=3, patch_size=4, num_patches=16), **settings}
    )
    config._attn_implementation = "sdpa"  # eager takes the softmax in fp32
    model = Siglip2VisionModel(config).to(torch.float64).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if "position_embedding" in name or "probe" in name:
                parameter.copy_(noise)
            elif name.endswith("bias"):
                parameter.copy_(0.5 * noise)
            elif "norm" in name:
                parameter.copy_(1 + 0.3 * noise)
            else:
                parameter.copy_(noise / parameter.shape[1] ** 0.5)
    if dtype == torch.float64:
        embeddings = next(module for name, module in model.named_modules() if name.endswith("embeddings"))
        embeddings.resize_positional_embeddings = exact_positions
    return model.to(dtype)


def state_of(model):
    return {key.removeprefix("vision_model."): tensor for key, tensor in model.named_parameters()}


def padded_batch(grids, dtype=torch.float64, frames=1):
    """Padding rows hold garbage that no valid row may see."""
    lengths = torch.tensor([frames * h * w for h, w in grids])
    mask = (torch.arange(lengths.max()) < lengths[:, None]).long()
    return dict(
        pixel_values=normal(*mask.shape, P, dtype=dtype, seed=1),
        pixel_attention_mask=mask,
        spatial_shapes=torch.tensor(grids),
    )


def packed(batch):
    """The same patches as rows [T, P] and a grid of single frames."""
    shapes = batch["spatial_shapes"]
    grid_thw = torch.cat([torch.ones_like(shapes[:, :1]), shapes], dim=1)
    return batch["pixel_values"][batch["pixel_attention_mask"].bool()], grid_thw


def test_imports_torch_and_einops_only():
    allowed = {"torch", "einops", "math", "collections", "itertools", "typing", "json", "os", "pathlib", "safetensors"}
    for file in Path(ref.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            roots = {name.split(".")[0] for name in names}
            assert roots <= allowed | ({"huggingface_hub"} if file.name == "model.py" else set()), (file.name, roots)


# patches


def test_patchify_is_transformers_convert_image_to_patches():
    images = normal(2, 3, 20, 12, dtype=torch.float32)
    patches = ref.patchify(images, 4)
    assert torch.equal(patches, transformers_patches(images))
    assert torch.equal(ref.unpatchify(patches, 4, 5, 3), images)
    with pytest.raises(ValueError, match="20x12"):
        ref.patchify(images, 8)
    with pytest.raises(ValueError, match="12 patches, got 15"):
        ref.unpatchify(patches, 4, 4, 3)


# positions


@pytest.mark.parametrize("G", [4, 16])
@pytest.mark.parametrize("grid", [*GRIDS, (3, 2), (1, 1), (2, 1), (19, 13), (16, 16), (40, 3)])
def test_positions_are_torch_bilinear_antialias(grid, G):
    table = normal(G, G, 6)
    resized = ref.resize_positions(table, *grid)
    close(resized, torch_resize(table, *grid), 1e-12)
    close(ref.resize_positions(table.flatten(0, 1), *grid), resized, 0)
    if min(grid) > 1:
        image = F.interpolate(table.permute(2, 0, 1)[None], size=grid, mode="bilinear", antialias=True)[0]
        close(resized, image.flatten(1).T, 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_positions_identity_is_bit_exact_and_rounding_happens_once(dtype):
    table = normal(16, 16, 8, dtype=torch.float32).to(dtype)
    assert torch.equal(ref.resize_positions(table, 16, 16), table.flatten(0, 1))
    shrunk = ref.resize_positions(table, 5, 7)
    assert shrunk.dtype == dtype
    assert torch.equal(shrunk, ref.resize_positions(table.double(), 5, 7).to(dtype))


def test_position_weights_by_hand():
    # 4 -> 2: scale 2, centres 1 and 3, half-width 2 over samples 0.5, 1.5, 2.5, 3.5
    expected = torch.tensor([[3.0, 3.0, 1.0, 0.0], [0.0, 1.0, 3.0, 3.0]], dtype=torch.float64) / 7
    close(ref.position_weights(4, 2), expected, 1e-15)
    assert torch.equal(ref.position_weights(5, 5), torch.eye(5, dtype=torch.float64))


# row-wise operations


def test_row_wise_operations_are_torch():
    x, weight, bias = 3 * normal(7, 72) + 1, normal(72, seed=1), normal(72, seed=2)
    close(ref.layer_norm(x, weight, bias, 1e-2), F.layer_norm(x, (72,), weight, bias, 1e-2), 1e-12)
    close(ref.gelu_tanh(x), F.gelu(x, approximate="tanh"), 1e-14)
    close(ref.gelu(x), F.gelu(x), 1e-14)
    close(ref.quick_gelu(x), transformers.activations.ACT2FN["quick_gelu"](x), 1e-14)
    fc1, fc2, fc1_bias = normal(96, 72, seed=3), normal(72, 96, seed=4), normal(96, seed=5)
    expected = F.linear(F.gelu(F.linear(x, fc1, fc1_bias)), fc2, bias)
    close(ref.mlp(x, fc1, fc1_bias, fc2, bias, hidden_act="gelu"), expected, 1e-12)
    half = x.bfloat16()
    assert torch.equal(ref.gelu_tanh(half), ref.gelu_tanh(half.float()).bfloat16())
    with pytest.raises(ValueError, match="nonsense"):
        ref.mlp(x, fc1, fc1_bias, fc2, bias, hidden_act="nonsense")


# attention


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("K", [16, 72])
def test_attention_is_sdpa_per_segment_with_gradients(K, scale):
    cu_seqlens = torch.tensor([0, 35, 36, 60], dtype=torch.int32)
    q, k, v, upstream = (normal(60, 3, K, seed=i) for i in range(4))
    ids = torch.repeat_interleave(torch.arange(3), cu_seqlens.diff())

    def dense(q, k, v):
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        mask = ids[:, None] == ids[None, :]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)[0].transpose(0, 1)

    inputs = [x.requires_grad_() for x in (q, k, v)]
    ours, theirs = ref.attention(*inputs, cu_seqlens, softmax_scale=scale), dense(*inputs)
    close(ours, theirs, 1e-12)
    for a, b in zip(torch.autograd.grad(ours, inputs, upstream), torch.autograd.grad(theirs, inputs, upstream)):
        close(a, b, 1e-11)

    half = [x.detach().bfloat16() for x in inputs]
    exact = ref.attention(*(x.float() for x in half), cu_seqlens, softmax_scale=scale)
    assert torch.equal(ref.attention(*half, cu_seqlens, softmax_scale=scale), exact.bfloat16())


def test_attention_pool_is_attention_with_one_query():
    cu_seqlens = torch.tensor([0, 15, 16, 36], dtype=torch.int32)
    k, v, probe, queries = normal(36, 2, 72), normal(36, 2, 72, seed=1), normal(2, 72, seed=2), normal(3, 2, 72, seed=3)
    for q in (probe, queries):
        expected = []
        for i, (start, end) in enumerate([(0, 15), (15, 16), (16, 36)]):
            one = (q if q.ndim == 2 else q[i])[None, :, None]  # [1, H, 1, K]
            kv = [x[start:end].transpose(0, 1)[None] for x in (k, v)]
            expected.append(F.scaled_dot_product_attention(one, *kv)[0, :, 0])
        close(ref.attention_pool(q, k, v, cu_seqlens), torch.stack(expected), 1e-12)


@pytest.mark.parametrize("offsets", [[0, 5, 8], [1, 10], [0, 12, 10], [0, 7, 3, 10]])
def test_attention_rejects_offsets_that_do_not_cover_the_rows(offsets):
    x = normal(10, 2, 8)
    with pytest.raises(ValueError, match="10 rows"):
        ref.attention(x, x, x, torch.tensor(offsets, dtype=torch.int32))


# the encoder against transformers


def assert_same_outputs(ours, theirs, mask, tolerance):
    assert len(ours.hidden_states) == len(theirs.hidden_states) == 4
    valid = mask.bool()
    rows = (lambda x: x[valid]) if ours.embeddings.ndim == 3 else (lambda x: x)
    assert torch.equal(ours.embeddings, ours.hidden_states[0])
    for a, b in zip(ours.hidden_states, theirs.hidden_states):
        close(rows(a), b[valid], tolerance)
    close(rows(ours.last_hidden_state), theirs.last_hidden_state[valid], tolerance)
    close(ours.pooler_output, theirs.pooler_output, tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_encoder_is_transformers(shape, dtype):
    model = make_model(shape, dtype)
    exact = dtype == torch.float64
    batch = padded_batch(GRIDS if exact else HF_GRIDS, dtype)
    theirs = model(**batch, output_hidden_states=True)
    tolerance = 1e-10 if exact else 1e-5
    args = state_of(model), model.config
    ours = ref.padded_encoder(*args, **batch, output_hidden_states=True)
    assert_same_outputs(ours, theirs, batch["pixel_attention_mask"], tolerance)
    ours = ref.packed_encoder(*args, *packed(batch), output_hidden_states=True)
    assert_same_outputs(ours, theirs, batch["pixel_attention_mask"], tolerance)


@pytest.mark.parametrize(
    "settings",
    [dict(hidden_act="gelu"), dict(hidden_act="quick_gelu"), dict(layer_norm_eps=1e-2), dict(vision_use_head=False)],
)
@torch.no_grad()
def test_encoder_honours_the_config(settings):
    model = make_model(**settings)
    batch = padded_batch([(5, 7), (3, 4)])
    theirs = model(**batch)
    ours = ref.padded_encoder(state_of(model), model.config.to_dict(), **batch)
    valid = batch["pixel_attention_mask"].bool()
    close(ours.last_hidden_state[valid], theirs.last_hidden_state[valid], 1e-10)
    assert ours.hidden_states is None
    if "vision_use_head" in settings:
        assert ours.pooler_output is None
        assert theirs.pooler_output is None
    else:
        close(ours.pooler_output, theirs.pooler_output, 1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_transformers(shape):
    model = make_model(shape)
    batch = padded_batch([(5, 7), (7, 1), (4, 4), (2, 9)])
    pixel_values = batch["pixel_values"].requires_grad_()
    valid = batch["pixel_attention_mask"].bool()
    state = state_of(model)

    def gradients(outputs):
        tokens, pooled = outputs.last_hidden_state[valid], outputs.pooler_output
        loss = (tokens * normal(*tokens.shape, seed=2)).sum() + 10 * (pooled * normal(*pooled.shape, seed=3)).sum()
        return torch.autograd.grad(loss, [pixel_values, *state.values()])

    theirs = gradients(model(**batch))
    ours = gradients(ref.padded_encoder(state, model.config, **batch))
    for name, a, b in zip(["pixel_values", *state], ours, theirs):
        # a constant added to every key moves no softmax: that gradient is rounding noise
        assert b.abs().max() > 1e-3 or name.endswith("k_proj.bias") or name == "head.attention.in_proj_bias", name
        close(a, b, 1e-9)


@torch.no_grad()
def test_stages_make_the_encoder():
    model = make_model()
    state, config = state_of(model), model.config
    pixel_values, grid_thw = packed(padded_batch([(5, 7)]))
    whole = ref.packed_encoder(state, config, pixel_values, grid_thw, output_hidden_states=True)
    x = ref.embed(state, config, pixel_values, grid_thw)
    for index in range(3):
        x = ref.encoder_layer(state, config, index, x[None], torch.zeros(1, 1, 1, 35))[0]
        close(x, whole.hidden_states[index + 1], 1e-12)
    close(ref.pooling_head(state, config, whole.last_hidden_state, ref.cu_seqlens_of([35])), whole.pooler_output, 1e-12)


# frames, isolation, edges


@torch.no_grad()
def test_frames_are_separate_images_and_joint_is_one_segment():
    model = make_model()
    args = state_of(model), model.config
    pixel_values = normal(3 * 24 + 35, P)
    frames = ref.packed_encoder(*args, pixel_values, torch.tensor([[3, 4, 6], [1, 5, 7]]), output_hidden_states=True)
    separate = torch.tensor([[1, 4, 6]] * 3 + [[1, 5, 7]])
    separate = ref.packed_encoder(*args, pixel_values, separate, output_hidden_states=True)
    for a, b in zip(frames.hidden_states, separate.hidden_states):
        close(a, b, 1e-12)
    assert [frames.pooler_output.shape[0], separate.pooler_output.shape[0]] == [2, 4]
    close(frames.pooler_output[1], separate.pooler_output[3], 1e-12)

    joint = ref.packed_encoder(*args, pixel_values, torch.tensor([[3, 4, 6], [1, 5, 7]]), temporal="joint")
    assert (joint.last_hidden_state - frames.last_hidden_state)[:72].abs().max() > 0.1
    close(joint.last_hidden_state[72:], frames.last_hidden_state[72:], 1e-12)
    batch = dict(pixel_values=pixel_values[None, :72], pixel_attention_mask=torch.ones(1, 72, dtype=torch.long))
    theirs = model(**batch, spatial_shapes=torch.tensor([[4, 6]]))  # 72 rows: `exact_positions` repeats the 24
    close(joint.last_hidden_state[:72], theirs.last_hidden_state[0], 1e-10)
    close(joint.pooler_output[:1], theirs.pooler_output, 1e-10)
    with pytest.raises(ValueError, match="sideways"):
        ref.packed_encoder(*args, pixel_values, torch.tensor([[3, 4, 6], [1, 5, 7]]), temporal="sideways")


@torch.no_grad()
def test_an_image_sees_no_other():
    model = make_model("head72", torch.float32)
    args = state_of(model), model.config
    grid_thw = torch.tensor([[1, 8, 8], [1, 4, 6], [1, 16, 16]])
    pixel_values = normal(344, P, dtype=torch.float32)
    before = ref.packed_encoder(*args, pixel_values, grid_thw)
    changed = pixel_values.clone()
    changed[64:88] = 100 * normal(24, P, dtype=torch.float32, seed=5)
    after = ref.packed_encoder(*args, changed, grid_thw)
    same = torch.ones(344, dtype=torch.bool)
    same[64:88] = False
    assert torch.equal(before.last_hidden_state[same], after.last_hidden_state[same])
    assert torch.equal(before.pooler_output[[0, 2]], after.pooler_output[[0, 2]])
    assert not torch.equal(before.last_hidden_state[~same], after.last_hidden_state[~same])


def test_the_last_patch_reaches_the_first():
    model = make_model()
    pixel_values = normal(35, P, seed=1).requires_grad_()
    out = ref.packed_encoder(state_of(model), model.config, pixel_values, torch.tensor([[1, 5, 7]]))
    (gradient,) = torch.autograd.grad(out.last_hidden_state[0, 0], pixel_values)
    assert (gradient.abs().amax(dim=1) > 1e-6).all()


def test_an_empty_pack_stays_on_the_graph():
    model = make_model()
    grid_thw = torch.zeros(0, 3, dtype=torch.long)
    out = ref.packed_encoder(state_of(model), model.config, normal(0, P), grid_thw)
    assert out.last_hidden_state.shape == out.pooler_output.shape == (0, 64)
    (out.last_hidden_state.sum() + out.pooler_output.sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad == 0).all(), name


@torch.no_grad()
def test_dtype_is_the_states_or_the_one_asked_for():
    model = make_model(dtype=torch.float32)
    args = state_of(model), model.config
    pixel_values, grid_thw = packed(padded_batch([(5, 7), (4, 4)], torch.float32))
    fp32 = ref.packed_encoder(*args, pixel_values.bfloat16(), grid_thw).last_hidden_state
    bf16 = ref.packed_encoder(*args, pixel_values.bfloat16(), grid_thw, dtype=torch.bfloat16).last_hidden_state
    fp64 = ref.packed_encoder(*args, pixel_values.bfloat16(), grid_thw, dtype=torch.float64).last_hidden_state
    assert (fp32.dtype, bf16.dtype, fp64.dtype) == (torch.float32, torch.bfloat16, torch.float64)
    close(fp32.double(), fp64, 1e-5)
    assert 0 < (bf16.double() - fp64).norm() / fp64.norm() < 0.03


@pytest.mark.parametrize(
    ("pixel_values", "grid", "message"),
    [
        (torch.zeros(15, P), torch.tensor([[1, 3, 4]]), "covers 12 patches, pixel_values has 15 rows"),
        (torch.zeros(12, P), torch.tensor([[1, 0, 4], [1, 3, 4]]), r"row 0 is \(1, 0, 4\)"),
        (torch.zeros(12, P), torch.tensor([[3, 4]]), r"\[1, 2\]"),
        (torch.zeros(12, P), torch.tensor([[1.0, 3.0, 4.0]]), "float32"),
        (torch.zeros(12, P, dtype=torch.uint8), torch.tensor([[1, 3, 4]]), "uint8"),
    ],
)
def test_a_wrong_pack_is_an_error(pixel_values, grid, message):
    model = make_model()
    with pytest.raises(ValueError, match=message):
        ref.packed_encoder(state_of(model), model.config, pixel_values, grid)


def test_a_mask_that_is_not_the_grid_is_an_error():
    model, batch = make_model(), padded_batch([(3, 4), (2, 2)])
    batch["spatial_shapes"] = torch.tensor([[3, 3], [7, 1]])
    with pytest.raises(ValueError, match=r"\[9, 7\] patches, pixel_attention_mask marks \[12, 4\]"):
        ref.padded_encoder(state_of(model), model.config, **batch)


# Siglip2Naflex


def write_checkpoint(folder, state, config):
    folder.mkdir()
    save_file({key: tensor.detach().contiguous() for key, tensor in state.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@torch.no_grad()
def test_naflex_loads_every_layout_and_is_transformers(tmp_path):
    model = make_model(dtype=torch.float32)
    state = {key: tensor.detach().clone() for key, tensor in state_of(model).items()}
    model.save_pretrained(tmp_path / "saved")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").is_file()
    config = {**SHAPES["tiny"], "num_hidden_layers": 3, "patch_size": 4, "model_type": "siglip2_vision_model"}
    write_checkpoint(tmp_path / "flat", state, config)
    write_checkpoint(
        tmp_path / "vlm",
        {"model.vision_tower.vision_model." + k: v for k, v in state.items()} | {"lm_head.weight": torch.ones(2)},
        {"model_type": "llava", "vision_config": config},
    )
    text = dict(hidden_size=64, num_attention_heads=4, intermediate_size=96, num_hidden_layers=1, vocab_size=16)
    full = Siglip2Model(Siglip2Config(vision_config=model.config.to_dict(), text_config=text))
    vision = {k.removeprefix("vision_model."): p for k, p in full.vision_model.named_parameters()}
    for key, tensor in state.items():
        vision[key].copy_(tensor)
    full.save_pretrained(tmp_path / "full")

    images = normal(2, 3, 20, 28, dtype=torch.float32)
    patches = transformers_patches(images)
    theirs = model(patches, torch.ones(2, 35, dtype=torch.long), torch.tensor([[5, 7]] * 2)).last_hidden_state
    for layout in ("saved", "sharded", "flat", "vlm", "full"):
        naflex = ref.Siglip2Naflex.from_pretrained(tmp_path / layout, device="cpu").eval()
        assert {key: p.shape for key, p in naflex.named_parameters()} == {key: p.shape for key, p in state.items()}
        assert all(torch.equal(naflex.state[key], tensor) for key, tensor in state.items()), layout
        close(naflex(images), theirs, 1e-5)
    assert naflex.to(torch.bfloat16)(images).dtype == torch.bfloat16
    assert ref.Siglip2Naflex(str(tmp_path / "flat"), "cpu", torch.float64)(images).dtype == torch.float64


def test_naflex_takes_the_hub_for_what_is_no_folder(tmp_path, monkeypatch):
    model = make_model(dtype=torch.float32)
    model.save_pretrained(tmp_path / "saved")
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: asked.append((a, k)) or tmp_path / "saved")
    ref.Siglip2Naflex("google/siglip2-so400m-patch16-naflex")
    ref.Siglip2Naflex(tmp_path / "saved")
    expected = ("google/siglip2-so400m-patch16-naflex",), {"allow_patterns": ["*.json", "*.safetensors"]}
    assert asked == [expected]


def test_naflex_without_a_head_has_tokens_and_no_pooled_output(tmp_path):
    model = make_model(dtype=torch.float32)
    config = {**SHAPES["tiny"], "num_hidden_layers": 3, "patch_size": 4, "model_type": "siglip2_vision_model"}
    headless = {key: tensor for key, tensor in state_of(model).items() if not key.startswith("head.")}
    naflex = ref.Siglip2Naflex(write_checkpoint(tmp_path / "headless", headless, config), device="cpu")
    assert not any(key.startswith("head.") for key in naflex.state)
    pixel_values, grid_thw = packed(padded_batch([(5, 7)], torch.float32))
    ours = ref.packed_encoder(naflex.state, naflex.config, pixel_values, grid_thw)
    theirs = ref.packed_encoder(state_of(model), model.config, pixel_values, grid_thw)
    assert ours.pooler_output is None
    assert torch.equal(ours.last_hidden_state, theirs.last_hidden_state)
    unused = {**config, "vision_use_head": False}  # a head in the state that the config does not want
    assert ref.packed_encoder(state_of(model), unused, pixel_values, grid_thw).pooler_output is None


def test_an_incomplete_checkpoint_is_an_error(tmp_path):
    model = make_model(dtype=torch.float32)
    state = state_of(model)
    config = {**SHAPES["tiny"], "num_hidden_layers": 3, "patch_size": 4, "model_type": "siglip2_vision_model"}
    lost = ["encoder.layers.1.mlp.fc2.bias", "head.probe"]
    partial = {key: tensor for key, tensor in state.items() if key not in lost}
    with pytest.raises(ValueError, match=r"lacks 2 of .*") as error:
        ref.load_checkpoint(write_checkpoint(tmp_path / "partial", partial, config))
    assert all(key in str(error.value) for key in lost)

    with pytest.raises(ValueError, match="'siglip_vision_model'"):
        ref.load_checkpoint(write_checkpoint(tmp_path / "v1", state, {**config, "model_type": "siglip_vision_model"}))
    conv = {**state, "embeddings.patch_embedding.weight": torch.zeros(64, 3, 4, 4)}
    with pytest.raises(ValueError, match=r"\[64, 3, 4, 4\]"):
        ref.load_checkpoint(write_checkpoint(tmp_path / "conv", conv, config))
    (tmp_path / "partial" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors in .*partial"):
        ref.load_checkpoint(tmp_path / "partial")
