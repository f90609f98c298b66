"""Checkpoints made by transformers from a shape and a seed, where no hub is reachable: demos, tests, benchmarks.

The weights bite: position table, biases and norms at a scale that makes a wrong position, a dropped bias or another
GELU visible in the features, which transformers' own initialisation (zero biases, small table) would hide.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Siglip2Config,
    Siglip2Model,
    Siglip2VisionConfig,
    Siglip2VisionModel,
)

from siglip2_packed.files import share
from siglip2_packed.preprocess import Siglip2PackedImageProcessor
from siglip2_packed.workloads import SHAPES

TEXT_LENGTH = 64
"""Positions of the text tower, as SigLIP2's."""
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
SENTENCES = (
    "this is a photo of a cat.",
    "this is a photo of a dog.",
    "this is a photo of a cup of coffee.",
    "this is a photo of an astronaut.",
    "this is a photo of a receipt.",
    "a picture of two people on the moon, in a city, by the sea",
)


def run(args: argparse.Namespace) -> int:
    there = Path(args.folder)
    if (there / "config.json").exists() or any(there.glob("*.safetensors")):
        raise ValueError(f"'{there}' holds a checkpoint, which would be lost: remove it or write elsewhere")
    folder = save_random_checkpoint(args.folder, args.shape, seed=args.seed, full=args.full)
    print(f"wrote {folder}: {args.shape}, seed {args.seed}, random weights")
    return 0


def save_random_checkpoint(
    folder: str | os.PathLike, shape: str = "base", *, seed: int = 0, full: bool = False
) -> Path:
    """Writes config.json, preprocessor_config.json and model.safetensors, readable by whom the umask lets read.

    Args:
        folder: made if it does not exist.
        shape: a key of `SHAPES`.
        full: a `Siglip2Model` with a small text tower and a toy tokenizer, as the hub checkpoints are; else the vision
            model alone.
    """
    folder = Path(folder)
    config = Siglip2VisionConfig(**SHAPES[shape])
    generator = torch.Generator().manual_seed(seed)
    tokenizer = toy_tokenizer() if full else None
    with torch.device("meta"):  # transformers' own initialisation would take longer than all the rest
        if tokenizer is not None:
            text = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
            text |= dict(projection_size=config.hidden_size, max_position_embeddings=TEXT_LENGTH)
            text |= dict(vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1, bos_token_id=2)
            model: PreTrainedModel = Siglip2Model(Siglip2Config(text_config=text, vision_config=config.to_dict()))
        else:
            model = Siglip2VisionModel(config)
    model.to_empty(device="cpu")
    randomize(model, generator)
    if isinstance(model, Siglip2Model):
        with torch.no_grad():  # labels are told apart: the last position, which is pooled, sees words more than places
            model.text_model.embeddings.position_embedding.weight.mul_(0.1)
            model.logit_scale.fill_(math.log(10))
            model.logit_bias.zero_()
    model.save_pretrained(folder)
    share(folder)
    shape_kwargs = {"patch_size": SHAPES[shape]["patch_size"], "max_num_patches": SHAPES[shape]["num_patches"]}
    Siglip2PackedImageProcessor(**shape_kwargs).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
        file = folder / "tokenizer_config.json"  # in which 5.x names a class that 4.57 has not
        file.write_text(
            json.dumps(json.loads(file.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2)
        )
    return folder


def toy_tokenizer() -> PreTrainedTokenizerFast:
    """SigLIP2's (Gemma's) in small: words of a few sentences, bytes for all else, <eos> behind, padded to the right."""
    learned = _tokenizer(models.BPE())
    learned.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=128, show_progress=False))
    words = json.loads(learned.to_str())["model"]
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(words["vocab"], key=words["vocab"].get)]
    vocab, merges = {token: i for i, token in enumerate(tokens)}, [tuple(pair) for pair in words["merges"]]
    tokenizer = _tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{f"{name.strip('<>')}_token": name for name in SPECIAL},
        padding_side="right",
        model_max_length=TEXT_LENGTH,
        model_input_names=["input_ids"],
    )


def _tokenizer(model: models.Model) -> Tokenizer:
    """Spaces as ▁, before the word they lead to."""
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


@torch.no_grad()
def randomize(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Normal weights: matrices and convolutions over patches at 1/sqrt(fan_in), position table, probe and biases at
    unit scale, norms around 1.
    """
    for name, parameter in model.named_parameters():
        if parameter.numel() == 0:
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("bias") or "logit" in name:
            noise *= 0.5
        elif "norm" in name:
            noise = 1 + 0.3 * noise
        elif parameter.ndim in (2, 4) and "embedding.weight" not in name.replace("patch_embedding", ""):
            noise *= parameter[0].numel() ** -0.5
        parameter.copy_(noise)


__all__ = ["SHAPES", "randomize", "run", "save_random_checkpoint", "toy_tokenizer"]
