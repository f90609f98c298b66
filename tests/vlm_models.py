"""Small models of transformers with a SigLIP2 tower inside, random weights, batches for them, and what they give."""

import functools
import inspect

import torch
from transformers import (
    Lfm2VlConfig,
    Lfm2VlForConditionalGeneration,
    Siglip2Config,
    Siglip2ForImageClassification,
    Siglip2Model,
    Siglip2VisionConfig,
    Siglip2VisionModel,
)

from siglip2_packed import pad
from siglip2_packed.random_checkpoint import randomize
from siglip2_packed.workloads import SHAPES

IMAGE_TOKEN = 60
GRIDS = [(1, 14, 20), (1, 8, 32), (1, 2, 40), (1, 4, 4), (1, 6, 2)]
"""Even sides, of which LFM2-VL makes tokens; below the table on one side or both, above it, and the table's own."""
ODD = [(1, 13, 19), (1, 8, 32), (1, 7, 5)]


def _made(make, seed=0):
    model = make()
    randomize(model, torch.Generator().manual_seed(seed))
    return model.eval()


def lfm2_vl(shape="tiny", **vision):
    text = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
    text |= dict(num_key_value_heads=2, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False)
    text |= dict(max_position_embeddings=512, model_type="lfm2", pad_token_id=0, bos_token_id=1, eos_token_id=2)
    vision = dict(SHAPES[shape], model_type="siglip2_vision_model", vision_use_head=False) | vision
    config = Lfm2VlConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE_TOKEN,
        projector_hidden_size=48,
        downsample_factor=2,
    )
    return _made(lambda: Lfm2VlForConditionalGeneration(config))


def siglip2(make=Siglip2Model, shape="tiny", **vision):
    vision = SHAPES[shape] | vision
    text = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
    text |= dict(projection_size=vision["hidden_size"], max_position_embeddings=16, bos_token_id=1, eos_token_id=2)
    config = Siglip2Config(vision_config=vision, text_config=text, num_labels=3)
    return _made(lambda: make(config))


classifier = functools.partial(siglip2, Siglip2ForImageClassification)


def tower(shape="tiny", **vision):
    return _made(lambda: Siglip2VisionModel(Siglip2VisionConfig(**SHAPES[shape] | vision)))


def images(grids, seed=0, rows=None):
    """A padded batch of random patches."""
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randn(sum(h * w for _, h, w in grids), 48, generator=generator)
    return dict(pad(patches, grids, max_num_patches=rows))


def sample(model, grids=GRIDS, seed=0, rows=None):
    """A batch for any of the models."""
    batch = images(grids, seed, rows)
    generator = torch.Generator().manual_seed(seed)
    if isinstance(model, Siglip2Model):
        return {**batch, "input_ids": torch.randint(3, 50, (2, 16), generator=generator)}
    if not isinstance(model, Lfm2VlForConditionalGeneration):
        return batch
    tokens = sum(h // 2 * (w // 2) for _, h, w in grids)
    words = torch.randint(3, IMAGE_TOKEN, (7,), generator=generator)
    ids = torch.cat([words[:3], torch.full((tokens,), IMAGE_TOKEN), words[3:]])[None]
    return {**batch, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def vision(model, batch, **kwargs):
    """What the model's tower gives, by the names that it takes."""
    tower = model.model.vision_tower if hasattr(model, "model") else model.vision_model
    if "pixel_attention_mask" not in inspect.signature(tower.forward).parameters:  # inside, in transformers 4
        batch = {name.removeprefix("pixel_") if "mask" in name else name: x for name, x in batch.items()}
    return tower(**batch, **kwargs)


BOUND = 2e-5


def relative(found, expected):
    """NaN is not below any bound."""
    return ((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)).item()


def step(model, batch):
    """Logits, and the gradients of what learns."""
    model.zero_grad()
    logits = model(**batch).logits
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits).sin()).sum().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check(found, expected, bound=BOUND):
    (logits, gradients), (e_logits, e_gradients) = found, expected
    assert relative(logits, e_logits) <= bound
    assert gradients.keys() == e_gradients.keys() and gradients
    largest = max(g.norm() for g in e_gradients.values())
    for name, gradient in e_gradients.items():
        assert (gradients[name] - gradient).norm() <= bound * max(gradient.norm(), 1e-3 * largest), name


def packed_tower(model):
    """The one that `replace_vision_tower` has put into the model."""
    from siglip2_packed.towers import PackedTower

    (found,) = (module for module in model.modules() if isinstance(module, PackedTower))
    return found


MODELS = {"LFM2-VL": lfm2_vl, "Siglip2Model": siglip2, "classifier": classifier}
