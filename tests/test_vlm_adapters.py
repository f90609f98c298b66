"""A replaced tower with adapters and quantised layers, of before and after."""

import peft
import pytest
import torch
from torch import nn
from transformers import BitsAndBytesConfig
from vlm_models import BOUND, ODD, check, images, lfm2_vl, packed_tower, relative, sample, siglip2, step, vision

from siglip2_packed.quantized import keep_layout
from siglip2_packed.vlm import replace_vision_tower, restore_vision_tower

TARGETS = r".*vision_tower.*(q_proj|v_proj|fc1|patch_embedding)"


def adapted(model, seed=1, **kwargs):
    config = peft.LoraConfig(**{"target_modules": TARGETS, "r": 4, **kwargs})
    wrapped = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return wrapped


@pytest.mark.parametrize("kwargs", [{}, {"modules_to_save": ["position_embedding"]}], ids=["LoRA", "and a saved table"])
def test_adapters_of_before_and_after(tmp_path, kwargs):
    theirs = adapted(lfm2_vl(), **kwargs)
    batch = sample(theirs.base_model.model)
    expected = step(theirs, batch)
    theirs.save_pretrained(tmp_path)

    before = adapted(lfm2_vl(), **kwargs)
    replace_vision_tower(before)
    check(step(before, batch), expected)
    model = lfm2_vl()
    replace_vision_tower(model)
    after = adapted(model, **kwargs)
    check(step(after, batch), expected)
    assert (
        list(dict(after.named_parameters()))
        == list(dict(before.named_parameters()))
        == [name for name, _ in theirs.named_parameters()]
    )
    again = lfm2_vl()
    replace_vision_tower(again)
    loaded = peft.PeftModel.from_pretrained(again, tmp_path)
    assert relative(loaded(**batch).logits, expected[0]) <= BOUND
    for wrapped in (before, after):  # the adapters go back with the modules
        restore_vision_tower(wrapped)
        check(step(wrapped, batch), expected, 1e-6)
    replace_vision_tower(after)
    merged = after.merge_and_unload()
    assert relative(merged(**batch).logits, expected[0]) <= BOUND
    restore_vision_tower(merged)
    assert relative(merged(**batch).logits, expected[0]) <= BOUND


def test_an_adapter_that_transformers_passes_over_is_refused():
    model = siglip2()
    wrapped = adapted(model, target_modules=["q_proj", "out_proj"])
    if not hasattr(model.vision_model.head.attention.out_proj, "base_layer"):
        pytest.skip("PEFT adapts nn.MultiheadAttention otherwise")
    with pytest.raises(ValueError, match=r"head.attention.out_proj is Linear of an adapter"):
        replace_vision_tower(wrapped)
    later = siglip2()
    (packed,) = replace_vision_tower(later).values()
    adapted(later, target_modules=["q_proj", "out_proj"])
    for call in (lambda: vision(later, images(ODD)), lambda: packed(torch.randn(6, 48), grid_thw=[[1, 2, 3]])):
        with pytest.raises(ValueError, match=r"head.attention.out_proj is Linear of an adapter"):
            call()


def test_a_saved_module_around_the_head_is_refused():
    wrapped = adapted(siglip2(), target_modules=["q_proj"], modules_to_save=["head"])
    with pytest.raises(ValueError, match="vision_model.head is a ModulesToSaveWrapper"):
        replace_vision_tower(wrapped)


# quantised weights


def bits8():
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=SKIPPED)


def bits4():
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=SKIPPED,
    )


SKIPPED = ["text_model", "patch_embedding", "head"]
"""transformers' tower casts pixels to the projection's dtype, and its head reads weights past the modules."""


@pytest.mark.parametrize("quantise", [bits8, bits4])
def test_what_bitsandbytes_quantised(tmp_path, quantise):
    config = quantise()
    with torch.no_grad():
        plain = siglip2_of_width(tmp_path)
        model = type(plain).from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32)
        keep_layout(model)  # transformers' tower, too: with AVX512-BF16 bitsandbytes goes on in bfloat16
        batch = sample(model, ODD)
        expected = vision(model, images(ODD)).last_hidden_state
        replace_vision_tower(model)
        out = vision(model, images(ODD)).last_hidden_state
        real = batch["pixel_attention_mask"].bool()
        # 8-bit layers round rows to 8 bits as well, of which few differ
        assert relative(out[real], expected[real]) <= (1e-2 if quantise is bits8 else BOUND)
        assert relative(out[real], vision(plain, images(ODD)).last_hidden_state[real]) > 1e-3  # it is quantised
        kinds = {type(m).__name__ for m in packed_tower(model).modules()}
        assert kinds & {"Linear8bitLt", "Linear4bit"}
        model.save_pretrained(tmp_path / "quantised")
        again = type(plain).from_pretrained(tmp_path / "quantised", dtype=torch.float32)
        keep_layout(again)
        restore_vision_tower(model)
        assert torch.equal(vision(model, images(ODD)).last_hidden_state, expected)
        assert relative(vision(again, images(ODD)).last_hidden_state[real], expected[real]) <= BOUND


def siglip2_of_width(folder):
    model = siglip2(hidden_size=128, intermediate_size=256, num_hidden_layers=2, vision_use_head=True)
    model.save_pretrained(folder)
    return model


def test_adapters_on_quantised_layers_learn(tmp_path):
    plain = siglip2_of_width(tmp_path)
    found = []
    for swaps in (False, True):
        model = type(plain).from_pretrained(tmp_path, quantization_config=bits4(), dtype=torch.float32)
        keep_layout(model)
        wrapped = adapted(model, target_modules=r"vision_model.*(q_proj|v_proj|fc1)")
        if swaps:
            replace_vision_tower(wrapped)
        out = wrapped(**sample(model, ODD)).logits_per_image
        (out * torch.linspace(-1, 1, 6).view(3, 2)).sum().backward()
        found.append((out.detach(), {name: p.grad for name, p in wrapped.named_parameters() if p.grad is not None}))
    assert all("lora_" in name for name in found[0][1])
    check(found[1], found[0])


def test_what_torchao_quantised_before_and_after():
    quantization = pytest.importorskip("torchao.quantization")

    def linears(module, name):
        return type(module) is nn.Linear and "encoder.layers" in name

    config = quantization.Int8WeightOnlyConfig()
    with torch.no_grad():
        theirs, before, after = lfm2_vl(), lfm2_vl(), lfm2_vl()
        batch = sample(theirs)
        plain = theirs(**batch).logits
        quantization.quantize_(theirs, config, filter_fn=linears)
        expected = theirs(**batch).logits
        quantization.quantize_(before, config, filter_fn=linears)
        replace_vision_tower(before)
        replace_vision_tower(after)
        quantization.quantize_(after, config, filter_fn=linears)
        assert relative(expected, plain) > 1e-3
        for model in (before, after):
            assert relative(model(**batch).logits, expected) <= BOUND
            restore_vision_tower(model)
            assert relative(model(**batch).logits, expected) <= 1e-6


def test_what_quantize_dynamic_replaced():
    def quantised():
        names = [f"model.vision_tower.{m}encoder.layers.1.mlp.fc1" for m in ("", "vision_model.")]
        qconfig = torch.ao.quantization.default_dynamic_qconfig
        return torch.ao.quantization.quantize_dynamic(lfm2_vl(), dict.fromkeys(names, qconfig))

    with torch.no_grad():
        theirs, ours = quantised(), quantised()
        batch = sample(theirs)
        replace_vision_tower(ours)
        assert "quantized" in type(packed_tower(ours).encoder.layers[1].mlp.fc1).__module__
        # rows are rounded to 8 bits by the largest of all, padding included
        assert relative(ours(**batch).logits, theirs(**batch).logits) <= 2e-2
