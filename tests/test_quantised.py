"""A tower that somebody has quantised computes what its quantised weights say, is saved, read again, and trained."""

import pytest
import torch
import transformers
from checkpoint_copies import copy_with, read_json
from torch import nn
from transformers import BitsAndBytesConfig, Siglip2Model, Siglip2VisionModel, TorchAoConfig

from siglip2_packed import SigLip2NaflexVisionTower, Siglip2PackedVisionModel, fp8, pad
from siglip2_packed.encoder import join_projections
from siglip2_packed.measure import relative_error
from siglip2_packed.packing import PackedPatches
from siglip2_packed.random_checkpoint import SHAPES, save_random_checkpoint

GRIDS = [(1, 13, 19), (1, 2, 3), (1, 8, 1)]
P = 192
load = Siglip2PackedVisionModel.from_pretrained


def bits8(**settings):
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_8bit=True, **settings)


def bits4(**settings):
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32, **settings
    )


def nested4():
    return bits4(bnb_4bit_use_double_quant=True)


def torchao8():
    quantization = pytest.importorskip("torchao.quantization")
    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("torchao wants transformers 5")
    return TorchAoConfig(quantization.Int8WeightOnlyConfig())


QUANTISED = [bits8, bits4, nested4, torchao8]


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    """Widths are multiples of 64."""
    return make(tmp_path_factory, "wide", full=False)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return make(tmp_path_factory, "full", full=True)


def make(tmp_path_factory, name, full, hidden_size=128, intermediate_size=256):
    SHAPES[name] = SHAPES["tiny"] | dict(
        hidden_size=hidden_size, intermediate_size=intermediate_size, num_hidden_layers=2, patch_size=8
    )
    try:
        return save_random_checkpoint(tmp_path_factory.mktemp(name), name, full=full)
    finally:
        del SHAPES[name]


def dequantised(model, ckpt):
    """A plain model of the weights that a quantised one stands for."""
    plain = load(ckpt)
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if type(module).__name__ == "Linear4bit":
            functional = pytest.importorskip("bitsandbytes.functional")
            weight = functional.dequantize_4bit(weight.data, weight.quant_state)
        elif type(module).__name__ == "Linear8bitLt":
            scale = weight.SCB if weight.SCB is not None else module.state.SCB
            weight = weight.data.float() * scale[:, None] / 127
        elif isinstance(module, nn.Linear):
            weight = weight.dequantize() if "torchao" in type(weight).__module__ else weight.detach()
        else:
            continue
        plain.get_submodule(name).weight.data.copy_(weight)
    return plain


@pytest.mark.parametrize("quantise", QUANTISED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantised_tower_computes_with_its_weights(ckpt, patches, quantise, dtype):
    model = load(ckpt, quantization_config=quantise(), dtype=dtype)
    x = patches(GRIDS, P)
    expected = dequantised(model, ckpt)(x, GRIDS)
    out = model(x, GRIDS)
    assert out.last_hidden_state.dtype == out.pooler_output.dtype == dtype
    # bitsandbytes' 8-bit layers round rows to 8 bits as well
    bound = 0.03 if dtype == torch.bfloat16 or quantise is bits8 else 1e-5
    for name in ("last_hidden_state", "pooler_output"):
        assert relative_error(out[name].float(), expected[name]) < bound, name
    assert relative_error(expected.last_hidden_state, load(ckpt)(x, GRIDS).last_hidden_state) > 1e-3  # it is quantised
    assert len(model(x, GRIDS, output_hidden_states=True).hidden_states) == 3


@pytest.mark.parametrize("quantise", QUANTISED)
def test_it_is_saved_and_read_again_here_and_by_transformers(ckpt, patches, tmp_path, quantise):
    model = load(ckpt, quantization_config=quantise(), dtype=torch.float32)
    packed = PackedPatches(patches(GRIDS, P), GRIDS)
    expected = model(**packed).pooler_output
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    for name in ("whole", "shards"):
        again, info = load(tmp_path / name, output_loading_info=True)
        assert not info["missing_keys"]
        assert relative_error(again(**packed).pooler_output, expected) < 1e-5
        assert again.config.quantization_config
    short = load(tmp_path / "whole", select_layer=-2)
    hidden_states = model(**packed, output_hidden_states=True).hidden_states
    assert relative_error(short(**packed).last_hidden_state, hidden_states[-2]) < 1e-5


@pytest.mark.parametrize("quantise", QUANTISED)
def test_what_was_read_is_saved_again(ckpt, patches, tmp_path, quantise):
    packed = PackedPatches(patches(GRIDS, P), GRIDS)
    load(ckpt, quantization_config=quantise(), dtype=torch.float32).save_pretrained(tmp_path / "0")
    first = load(tmp_path / "0")
    first.save_pretrained(tmp_path / "1")
    assert torch.equal(load(tmp_path / "1")(**packed).pooler_output, first(**packed).pooler_output)


@pytest.mark.parametrize("storage", ["uint8", "bfloat16"])
def test_4_bit_layers_of_other_dtypes_are_read_again(ckpt, patches, tmp_path, storage):
    """They turn their biases into the dtype they compute in, and keep weights in that of FSDP's shards."""
    pytest.importorskip("bitsandbytes")
    quantization_config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, bnb_4bit_quant_storage=storage
    )
    packed = PackedPatches(patches(GRIDS, P), GRIDS)
    model = load(ckpt, quantization_config=quantization_config, dtype=torch.float32)
    expected = model(**packed).pooler_output
    model.save_pretrained(tmp_path)
    assert model.dtype == torch.float32
    if storage != "uint8" and transformers.__version__ < "5":
        with pytest.raises(ValueError, match="bnb_4bit_quant_storage bfloat16.*take transformers 5"):
            load(tmp_path)
        return
    again = load(tmp_path)(**packed).pooler_output
    assert relative_error(again, expected) < 1e-6  # where rows begin in memory decides how a CPU adds
    other = load(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for name, p in other.named_parameters() if "norm" in name} == {torch.bfloat16}
    assert relative_error(other(**packed).pooler_output.float(), expected) < 0.02


@pytest.mark.parametrize("quantise", [bits8, bits4])
def test_transformers_reads_it(ckpt, patches, tmp_path, quantise):
    """Without the patch projection, to the dtype of whose weight transformers casts pixels, whatever that is, and
    without the head, whose attention it calls with the bytes of a weight."""
    quantization_config = quantise(llm_int8_skip_modules=["patch_embedding", "head"])
    model = load(ckpt, quantization_config=quantization_config, dtype=torch.float32)
    grids = GRIDS[:2]  # at width 1, positions of transformers 4 are others
    packed = PackedPatches(patches(grids, P), grids)
    model.save_pretrained(tmp_path)
    theirs, info = Siglip2VisionModel.from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert relative_error(theirs(**pad(packed)).pooler_output, model(**packed).pooler_output) < 0.03


@pytest.mark.parametrize("quantise", [bits8, bits4, torchao8])
def test_what_transformers_quantised_is_read(full, patches, tmp_path, quantise):
    x = patches(GRIDS, P)
    expected = load(full, quantization_config=quantise(), dtype=torch.float32)(x, GRIDS).last_hidden_state
    Siglip2Model.from_pretrained(full, quantization_config=quantise(), dtype=torch.float32).save_pretrained(tmp_path)
    if quantise is torchao8:
        with pytest.raises(ValueError, match="torchao quantised inside another model"):
            load(tmp_path)
        return
    assert relative_error(load(tmp_path)(x, GRIDS).last_hidden_state, expected) < 1e-5


def test_a_plain_tower_in_a_quantised_models_checkpoint_is_plain(ckpt, tmp_path):
    config = {"model_type": "some_vlm", "vision_config": read_json(ckpt)}
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    model = load(copy_with(ckpt, tmp_path / "x", config=config))
    assert not hasattr(model.config, "quantization_config")
    assert type(model.embeddings.patch_embedding) is nn.Linear


def test_quantised_weights_without_a_word_of_how_are_refused(ckpt, tmp_path):
    load(ckpt, quantization_config=bits8()).save_pretrained(tmp_path / "x")
    config = {name: value for name, value in read_json(tmp_path / "x").items() if name != "quantization_config"}
    with pytest.raises(ValueError, match="quantised weights, and its config.json no quantization_config"):
        load(copy_with(tmp_path / "x", tmp_path / "y", config=config))


def test_quantize_dynamic(ckpt, patches, tmp_path):
    model = load(ckpt)
    x = patches(GRIDS, P)
    expected = model(x, GRIDS).pooler_output
    model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    assert type(model.embeddings.patch_embedding) is not nn.Linear
    assert relative_error(model(x, GRIDS).pooler_output, expected) < 0.05
    with pytest.raises(ValueError, match=r"_packed_params.*quantize_dynamic cannot be saved.*quantise what is loaded"):
        model.save_pretrained(tmp_path / "saved")


def test_torchao_after_loading_goes_the_way_of_its_modules(ckpt, patches):
    """Its weights are of another class in modules that stay `nn.Linear`: no layer is fused, joined or made float8."""
    quantization = pytest.importorskip("torchao.quantization")
    model = load(ckpt)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    x = patches(GRIDS, P)
    expected = dequantised(model, ckpt)(x, GRIDS).last_hidden_state
    with torch.no_grad():
        assert model.encoder.plain_weights(x.new_zeros(1, 128)) is None
        join_projections(model.encoder)
        assert relative_error(model(x, GRIDS).last_hidden_state, expected) < 1e-5
    with pytest.raises(ValueError, match="float8 replaces plain linear layers, not Linear of Int8Tensor"):
        fp8.Float8Layer(model.encoder.layers[0])


def test_a_position_table_that_torchao_quantised(ckpt, patches):
    quantization = pytest.importorskip("torchao.quantization")
    model, x = load(ckpt), patches(GRIDS, P)
    expected = model(x, GRIDS).pooler_output
    config = quantization.IntxWeightOnlyConfig(weight_dtype=torch.int8)
    quantization.quantize_(model, config, lambda module, name: isinstance(module, nn.Embedding))
    assert relative_error(model(x, GRIDS).pooler_output, expected) < 0.02


def test_a_llava_tower_has_the_dtype_it_computes_in(ckpt):
    tower = SigLip2NaflexVisionTower(str(ckpt))
    tower.vision_tower = load(ckpt, select_layer=-2, quantization_config=bits4(), dtype=torch.bfloat16)
    assert tower.dtype == tower.dummy_feature.dtype == torch.bfloat16
    assert tower(torch.randn(6, P), grid_thw=[(1, 2, 3)]).dtype == torch.bfloat16


def test_4_bit_layers_take_any_width_and_train_after_inference(tmp_path_factory, patches, tmp_path):
    """bitsandbytes' layout for inference on CPUs with bfloat16 does neither: it has to stay away."""
    ckpt = make(tmp_path_factory, "odd", full=False, hidden_size=144, intermediate_size=208)
    model = load(ckpt, quantization_config=bits4(), dtype=torch.float32)
    x = patches(GRIDS, P)
    plain = dequantised(model, ckpt)
    with torch.no_grad():
        assert relative_error(model(x, GRIDS).pooler_output, plain(x, GRIDS).pooler_output) < 1e-5
    gradients = [torch.autograd.grad(m(x, GRIDS).pooler_output.sin().mean(), m.head.probe)[0] for m in (model, plain)]
    biases = [torch.autograd.grad(m(x, GRIDS).pooler_output.sin().mean(), first_bias(m))[0] for m in (model, plain)]
    assert relative_error(*gradients) < 1e-5
    assert relative_error(*biases) < 1e-5
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert relative_error(load(tmp_path)(x, GRIDS).pooler_output, plain(x, GRIDS).pooler_output) < 1e-5


def first_bias(model):
    return model.encoder.layers[0].layer_norm1.bias


class CaptionModel(nn.Module):
    """A tower, a projector, and what a language model would be."""

    def __init__(self, tower):
        super().__init__()
        torch.manual_seed(0)
        self.vision_tower, self.projector = tower, nn.Linear(128, 5)

    def forward(self, pixel_values, grid_thw):
        return self.projector(self.vision_tower(pixel_values, grid_thw).last_hidden_state).sin().mean()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("quantise", [bits4, bits8])
def test_qlora_trains_as_lora_on_the_dequantised_tower(ckpt, patches, quantise, checkpointing):
    peft = pytest.importorskip("peft")
    tower = load(ckpt, quantization_config=quantise(), dtype=torch.float32, vision_use_head=False)
    reference = dequantised(tower, ckpt)
    del reference.head
    x, gradients = patches(GRIDS, P), {}
    for name, model in (("quantised", tower), ("plain", reference)):
        if name == "quantised":
            model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
        torch.manual_seed(1)
        lora = peft.LoraConfig(target_modules=["q_proj", "v_proj", "fc1", "fc2"], r=4, init_lora_weights=False)
        vlm = CaptionModel(peft.get_peft_model(model, lora)).train()
        loss = vlm(x, GRIDS)
        loss.backward()
        gradients[name] = {key: p.grad for key, p in vlm.named_parameters() if p.requires_grad}
        assert all("lora_" in key or "projector" in key for key in gradients[name])
        before = loss.item()
        torch.optim.SGD([p for p in vlm.parameters() if p.requires_grad], 0.05).step()
        assert vlm(x, GRIDS).item() < before
    assert gradients["quantised"].keys() == gradients["plain"].keys()
    bound = 0.05 if quantise is bits8 else 1e-4
    for key, expected in gradients["plain"].items():
        assert relative_error(gradients["quantised"][key], expected) < bound, key


@pytest.mark.gpu
@pytest.mark.parametrize("quantise", [bits8, bits4, nested4, torchao8])
def test_on_a_gpu(tmp_path_factory, patches, tmp_path, quantise):
    """Also at widths as so400m has them, which are no multiples of 64."""
    ckpt = make(tmp_path_factory, "odd", full=False, hidden_size=144, intermediate_size=272)
    model = load(ckpt, quantization_config=quantise(), dtype=torch.bfloat16, device_map="cuda")
    x, plain = patches(GRIDS, P).cuda(), dequantised(model, ckpt).cuda()
    with torch.no_grad():
        out = model(x, GRIDS).pooler_output
        expected = plain(x, GRIDS).pooler_output
    assert relative_error(out.float(), expected) < 0.03
    model.save_pretrained(tmp_path)
    assert relative_error(load(tmp_path, device_map="cuda")(x, GRIDS).pooler_output.float(), out.float()) < 0.01
