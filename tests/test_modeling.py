"""Contracts of the model: hidden states, isolation, videos, dtypes, empty packs, errors, no hidden sync, memory."""

import weakref

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import Siglip2VisionModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from siglip2_packed import (
    NoPoolingHead,
    PackedPatches,
    Siglip2NaflexPacking,
    Siglip2PackedVisionModel,
    modeling,
    pad,
)
from siglip2_packed.measure import relative_error
from siglip2_packed.modeling import layer_index
from siglip2_packed.ops.attention import VarlenAttention
from siglip2_packed.ops.positions import Places

GRIDS = [(1, 8, 8), (1, 4, 6), (1, 16, 16)]


@pytest.fixture
def model(checkpoint):
    return Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny"))


def test_output_is_what_transformers_gives(model, patches):
    packed = PackedPatches(patches(GRIDS), GRIDS)
    out = model(**packed.to(torch.float32))
    assert isinstance(out, BaseModelOutputWithPooling)
    assert out.last_hidden_state.shape == (344, 64)
    assert out.pooler_output.shape == (3, 64)
    assert out.hidden_states is None
    as_tuple = model(**packed, return_dict=False)
    assert torch.equal(as_tuple[0], out.last_hidden_state)
    assert torch.equal(as_tuple[1], out.pooler_output)
    model.config.output_hidden_states = True
    assert len(model(**packed).hidden_states) == 4
    model.config.return_dict = False
    assert isinstance(model(**packed), tuple)
    with pytest.raises(ValueError, match="output_attentions"):
        model(**packed, output_attentions=True)


def test_evaluating_first_leaves_training_possible(model, patches):
    grids = [(1, 9, 4), (1, 2, 11)]
    with torch.inference_mode():
        model(patches(grids), grids)
    model(patches(grids), grids).pooler_output.sum().backward()


def test_autocast_keeps_the_residual_stream_in_float32(checkpoint, patches, monkeypatch):
    """As close to float32 as the padded model; the backend is chosen for the dtype that attention sees."""
    packed = PackedPatches(patches(GRIDS), GRIDS)
    batch = pad(packed)
    real = batch["pixel_attention_mask"].bool()
    model = Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny"))
    reference = Siglip2VisionModel.from_pretrained(checkpoint("tiny"))
    asked, resolve = [], modeling.for_pack
    monkeypatch.setattr(modeling, "for_pack", lambda *args: asked.append(args[2]) or resolve(*args))
    with torch.no_grad():
        exact = reference(**batch)
        with torch.autocast("cpu", torch.bfloat16):
            ours, theirs = model(**packed, output_hidden_states=True), reference(**batch)
    assert asked == [torch.bfloat16]
    assert ours.hidden_states[0].dtype == torch.float32
    tokens = [relative_error(x, exact.last_hidden_state[real]) for x in (ours[0], theirs.last_hidden_state[real])]
    assert tokens[0] <= 1.1 * tokens[1]


def test_a_model_from_a_configuration_alone_is_initialised(model):
    torch.manual_seed(0)
    fresh = Siglip2PackedVisionModel(model.config)
    for name, parameter in fresh.named_parameters():
        assert parameter.isfinite().all(), name
        assert name.endswith("bias") or parameter.abs().sum() > 0, name
    patches = fresh.embeddings.patch_embedding.weight
    assert abs(patches.std() * patches.shape[1] ** 0.5 - 1) < 0.05  # LeCun's, as in transformers


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_changing_one_image_leaves_the_others_bit_identical(model, patches, backend):
    model.set_attn_implementation(backend)
    pixel_values = patches(GRIDS)
    changed = pixel_values.clone()
    changed[64:88] = 100 * torch.randn(24, 48)
    with torch.no_grad():
        a, b = model(pixel_values, GRIDS), model(changed, GRIDS)
    assert torch.equal(a.last_hidden_state[:64], b.last_hidden_state[:64])
    assert torch.equal(a.last_hidden_state[88:], b.last_hidden_state[88:])
    assert not torch.equal(a.last_hidden_state[64:88], b.last_hidden_state[64:88])
    assert torch.equal(a.pooler_output[[0, 2]], b.pooler_output[[0, 2]])


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_packed_equals_one_by_one(model, patches, backend):
    model.set_attn_implementation(backend)
    pixel_values = patches(GRIDS)
    with torch.no_grad():
        packed = model(pixel_values, GRIDS)
        alone = [model(x, [grid]) for x, grid in zip(pixel_values.split([64, 24, 256]), GRIDS)]
    for name in ("last_hidden_state", "pooler_output"):
        expected = torch.cat([out[name] for out in alone])
        torch.testing.assert_close(packed[name], expected, atol=5e-6, rtol=0)


def test_attention_is_not_causal_and_permutes_with_its_images(model, patches):
    pixel_values = patches([(1, 4, 6)])
    changed = pixel_values.clone()
    changed[-1] += 1
    with torch.no_grad():
        a, b = (model(x, [(1, 4, 6)]).last_hidden_state for x in (pixel_values, changed))
        assert (a[0] - b[0]).abs().max() > 1e-4
        two = torch.cat([pixel_values, patches([(1, 3, 3)], seed=5)])
        swapped = model(torch.cat([two[24:], two[:24]]), [(1, 3, 3), (1, 4, 6)]).last_hidden_state
    torch.testing.assert_close(swapped[9:], a, atol=5e-6, rtol=0)


def test_frames_attend_to_themselves_unless_joint(model, patches):
    pixel_values = patches([(3, 4, 6)])
    with torch.no_grad():
        video = model(pixel_values, [(3, 4, 6)])
        images = model(pixel_values, [(1, 4, 6)] * 3)
        joint = model(pixel_values, [(3, 4, 6)], temporal="joint")
        packed = model(**PackedPatches(pixel_values, [(3, 4, 6)], temporal="joint"))
    assert torch.equal(video.last_hidden_state, images.last_hidden_state)
    assert video.pooler_output.shape == (1, 64)
    assert (joint.last_hidden_state - video.last_hidden_state).abs().max() > 1e-2
    assert torch.equal(joint.last_hidden_state, packed.last_hidden_state)
    with pytest.raises(ValueError, match="not both"):
        model(**PackedPatches(pixel_values, [(3, 4, 6)]), temporal="joint")


@pytest.mark.parametrize(("index", "layers"), [(0, 0), (1, 1), (3, 3), (-1, 3), (-2, 2), (-3, 1), (-4, 0)])
def test_select_layer_builds_and_runs_no_more_than_it_needs(checkpoint, model, patches, index, layers):
    packed = PackedPatches(patches(GRIDS), GRIDS)
    states = model(**packed, output_hidden_states=True).hidden_states
    assert len(states) == 4
    short = Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny"), select_layer=index).train()
    out = short(**packed)
    assert len(short.encoder.layers) == layers
    assert torch.equal(out.last_hidden_state, states[index])
    with pytest.raises(NoPoolingHead, match="no pooling head"):
        _ = out.pooler_output
    out.last_hidden_state.sum().backward()
    assert [name for name, parameter in short.named_parameters() if parameter.grad is None] == []


def test_select_layer_counts_from_the_end_of_what_there_is(checkpoint, patches):
    packed = PackedPatches(patches(GRIDS), GRIDS)
    full = Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny"), select_layer=-2)
    shorter = Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny"), num_hidden_layers=2, select_layer=-1)
    assert torch.equal(full(**packed).last_hidden_state, shorter(**packed).last_hidden_state)
    with pytest.raises(ValueError, match=r"select_layer 99 is out of range: 3 layers give hidden_states\[0..3\]"):
        Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny"), select_layer=99)
    assert [layer_index(k, 3) for k in (None, 0, 3, -1, -4)] == [3, 0, 3, 3, 0]


@pytest.mark.parametrize("index", [True, 1.0, "-2", None])
def test_select_layer_is_an_integer(checkpoint, index):
    if index is None:
        model = Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny"), select_layer=np.int64(-2))
        assert type(model.config.select_layer) is int
        return
    with pytest.raises(ValueError, match="select_layer must be an integer"):
        Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny"), select_layer=index)


def test_a_selected_tower_survives_saving(checkpoint, tmp_path, patches):
    packed = PackedPatches(patches(GRIDS), GRIDS)
    short = Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny"), select_layer=-2)
    short.save_pretrained(tmp_path)
    again = Siglip2PackedVisionModel.from_pretrained(tmp_path)
    assert len(again.encoder.layers) == 2
    assert torch.equal(short(**packed).last_hidden_state, again(**packed).last_hidden_state)


def test_token_features_leave_no_parameter_without_a_gradient(checkpoint, patches):
    for tower in (
        Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny"), vision_use_head=False),
        Siglip2NaflexPacking(checkpoint("tiny"), device="cpu"),
    ):
        tower.train()
        out = tower(patches(GRIDS), GRIDS)
        (out if isinstance(out, torch.Tensor) else out.last_hidden_state).sum().backward()
        assert [name for name, parameter in tower.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("training", [False, True])
def test_partial_training_with_checkpointing(model, patches, training):
    """Frozen embeddings, last layer trained: reentrant checkpointing would lose its gradients."""
    model.train(training)
    model.gradient_checkpointing_enable()
    model.requires_grad_(False)
    model.encoder.layers[-1].requires_grad_(True)
    model(patches(GRIDS), GRIDS).last_hidden_state.sum().backward()
    for name, parameter in model.named_parameters():
        trained = name.startswith("encoder.layers.2.")
        assert (parameter.grad is not None) == trained, name
        # the gradient of k's bias is zero in exact arithmetic
        assert not trained or parameter.grad.abs().sum() > 0 or name.endswith("k_proj.bias")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_floating_patches_are_cast_to_the_weights(checkpoint, patches, dtype, weights):
    model = Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny"), dtype=weights)
    out = model(patches(GRIDS).to(dtype), GRIDS)
    assert out.last_hidden_state.dtype == weights
    assert out.pooler_output.dtype == weights
    assert out.last_hidden_state.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_integer_patches_are_an_error(model, dtype):
    with pytest.raises(ValueError, match="floating"):
        model(torch.zeros(12, 48, dtype=dtype), [(1, 3, 4)])


def test_operations_are_counted_without_gradients(model, patches):
    """A module tracker wants to know where each tensor that a module is given comes from."""
    grids, counts = [(1, 13, 19), (1, 7, 1)], []
    for context in (torch.no_grad, torch.enable_grad):
        with context(), FlopCounterMode(display=False) as counter:
            model(patches(grids), grids)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_errors_name_both_numbers(model, patches):
    with pytest.raises(ValueError, match="covers 12 patches, pixel_values has 15 rows"):
        model(torch.randn(15, 48), torch.tensor([[1, 3, 4]]))
    with pytest.raises(ValueError, match=r"must be \[T, 48\], got \[12, 40\]"):
        model(torch.randn(12, 40), [(1, 3, 4)])
    with pytest.raises(ValueError, match=r"must be \[T, 48\], got \[1, 12, 48\]"):
        model(torch.randn(1, 12, 48), [(1, 3, 4)])


def test_an_empty_pack_stays_attached_to_every_parameter(model):
    out = model(torch.zeros(0, 48), torch.zeros(0, 3, dtype=torch.long), output_hidden_states=True)
    assert out.last_hidden_state.shape == (0, 64)
    assert out.pooler_output.shape == (0, 64)
    assert len(out.hidden_states) == 4
    (out.last_hidden_state.sum() + out.pooler_output.sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() == 0, name


def test_a_single_patch_works_both_ways(model):
    out = model(torch.randn(1, 48), [(1, 1, 1)])
    (out.last_hidden_state.sum() + out.pooler_output.sum()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_given_offsets_replace_the_frames(model, patches):
    pixel_values = patches([(2, 4, 6)])
    offsets = torch.tensor([0, 48], dtype=torch.int32)
    with torch.no_grad():
        joint = model(pixel_values, [(2, 4, 6)], temporal="joint").last_hidden_state
        assert torch.equal(model(pixel_values, [(2, 4, 6)], cu_seqlens=offsets).last_hidden_state, joint)
    with pytest.raises(ValueError, match="max_seqlen is 24, the longest segment has 48"):
        model(pixel_values, [(2, 4, 6)], cu_seqlens=offsets, max_seqlen=24)


@pytest.mark.parametrize(
    ("grid", "same"), [([[1, 4, 6]], True), (((1, 4, 6),), True), (torch.tensor([[1, 4, 6]]), True)]
)
def test_grids_come_as_lists_tuples_or_tensors(model, patches, grid, same):
    pixel_values = patches([(1, 4, 6)])
    expected = model(pixel_values, [(1, 4, 6)]).last_hidden_state
    assert torch.equal(model(pixel_values, grid).last_hidden_state, expected) is same


def test_a_forward_reads_nothing_back_from_the_device(model, patches, monkeypatch):
    """On the meta device every `.item()`, `.tolist()` or `.cpu()` raises; host metadata does not."""
    monkeypatch.setattr(
        Siglip2PackedVisionModel, "_attention", lambda self, segments: VarlenAttention(segments, "sdpa")
    )
    packed = PackedPatches(patches(GRIDS), GRIDS)
    out = model.to("meta")(**packed.to("meta"), output_hidden_states=True)
    assert out.last_hidden_state.shape == (344, 64)
    assert out.pooler_output.shape == (3, 64)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_layers_ask_no_tensor_for_a_number(model, patches, monkeypatch, backend):
    model.set_attn_implementation(backend)

    def forbidden(*args, **kwargs):
        raise AssertionError("device-to-host copy inside the layers")

    def guard(forward):
        def guarded(*args, **kwargs):
            with monkeypatch.context() as patch:
                for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__"):
                    patch.setattr(torch.Tensor, name, forbidden)
                return forward(*args, **kwargs)

        return guarded

    model(patches(GRIDS), GRIDS)
    for module in (*model.encoder.layers, model.post_layernorm, model.head):
        monkeypatch.setattr(module, "forward", guard(module.forward))
    # segments as prepared before the layers: their host-side index is part of the metadata
    model(patches(GRIDS), GRIDS)
    with pytest.raises(AssertionError, match="device-to-host"):
        guard(lambda: torch.ones(1).item())()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "nonsense"}, "unknown hidden_act 'nonsense'"),
        ({"num_attention_heads": 7}, "hidden_size 64 is not a multiple of num_attention_heads 7"),
        ({"num_patches": 15}, "num_patches 15 is not a square"),
        ({"attention_dropout": 0.1}, "attention_dropout 0.1 is not supported"),
    ],
)
def test_configurations_that_cannot_be_honoured_are_errors(checkpoint, fields, message):
    with pytest.raises(ValueError, match=message):
        Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny"), **fields)


def test_attn_implementation_is_checked_where_it_is_set(checkpoint, model):
    with pytest.raises(ValueError, match="unknown attn_implementation 'flash'"):
        model.set_attn_implementation("flash")
    with pytest.raises(ImportError, match="flash_attention_3.*cannot be imported"):
        Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny"), attn_implementation="flash_attention_3")
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"


def test_lora_trains_the_projections_and_merges(checkpoint, patches):
    peft = pytest.importorskip("peft")
    model = Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny"))
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj", "fc1"], r=2, init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config)
    expected = wrapped(patches(GRIDS), GRIDS).last_hidden_state
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(merged(patches(GRIDS), GRIDS).last_hidden_state, expected, atol=1e-5, rtol=0)


class LiveBytes(TorchDispatchMode):
    """Bytes of tensors alive that operations made, and their peak."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage):
        key = storage._cdata
        if key in self.seen:
            return
        self.seen.add(key)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key, size):
        self.seen.discard(key)
        self.now -= size


def peak_bytes(model, pixel_values, grids):
    with torch.no_grad(), LiveBytes() as live:
        model(pixel_values, grids)
    return live.peak


def test_peak_memory_is_that_of_the_images_alone(model, patches):
    grids = [(1, 16, 16), (1, 8, 8), (1, 16, 16), (1, 4, 30), (1, 8, 8)]
    pixel_values = patches(grids)
    model(pixel_values, grids)
    rows = [h * w for _, h, w in grids]
    alone = sum(peak_bytes(model, x, [grid]) for x, grid in zip(pixel_values.split(rows), grids))
    assert 0 < peak_bytes(model, pixel_values, grids) <= 1.1 * alone


def test_position_ids_place_rows_anywhere(checkpoint, patches, trusted):
    """Also where a kernel adds the positions of rows in raster order (CUDA, or here its interpreter)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny"), vision_use_head=False).to(device)
    grids, lengths = [(1, 3, 7), (2, 2, 5)], [21, 10, 10]
    x, ends = patches(grids).to(device), torch.tensor([0, *lengths]).cumsum(0)
    order = torch.cat([torch.randperm(n) + end for n, end in zip(lengths, ends)])
    expected = model(x, grids).last_hidden_state[order]
    ids = {"cu_seqlens": ends, "position_ids": order}
    torch.testing.assert_close(model(x[order], grids, **ids).last_hidden_state, expected, atol=1e-5, rtol=1e-5)
    trusted(positions=["triton"])
    with torch.no_grad():
        embedded = model.embeddings(x, Places(grids))
        torch.testing.assert_close(embedded, model(x, grids, output_hidden_states=True)[1][0])
        torch.testing.assert_close(model.embeddings(x[order], Places(grids, order)), embedded[order])
        few = model(x[:9], grids, cu_seqlens=torch.tensor([0, 9]), position_ids=order[:9])
    assert few.last_hidden_state.shape == (9, 64)


def test_position_ids_that_do_not_fit_are_refused(checkpoint, model, patches):
    x, grids = patches([(1, 3, 4)]), [(1, 3, 4)]
    headless = Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny"), vision_use_head=False)
    ends, ids = torch.tensor([0, 12]), torch.arange(12)
    for given, message in (
        ({"position_ids": ids}, "need cu_seqlens"),
        ({"position_ids": ids[:9], "cu_seqlens": ends}, r"\[9\], pixel_values has 12 rows"),
        ({"position_ids": ids + 1, "cu_seqlens": ends}, "lie in 1..12, grid_thw covers 12"),
        ({"position_ids": ids - 1, "cu_seqlens": ends}, "lie in -1..10"),
        ({"position_ids": ids.float(), "cu_seqlens": ends}, "float32"),
        ({"position_ids": ids, "cu_seqlens": ends - torch.tensor([0, 1])}, "ends at 11, pixel_values has 12 rows"),
    ):
        with pytest.raises(ValueError, match=message):
            headless(x, grids, **given)
    with pytest.raises(ValueError, match="vision_use_head=False"):
        model(x, grids, position_ids=ids, cu_seqlens=ends)
