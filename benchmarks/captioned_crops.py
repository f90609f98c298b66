"""Images with captions for train_tower.py: crops of scikit-image's photographs, and what each shows.

Nothing of a caption follows from the grid, which a model knows without looking.

Shapes: C caption tokens of a pack.
"""

import collections
import copy
import itertools

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from siglip2_packed.align import photographs
from siglip2_packed.data import PatchBudgetBatchSampler, collate

PHOTOGRAPHS = {
    "astronaut.png": "an astronaut", "brick.png": "a brick wall", "camera.png": "a photographer",
    "chelsea.png": "a cat", "coffee.png": "a cup of coffee", "coins.png": "coins", "grass.png": "grass",
    "hubble_deep_field.jpg": "galaxies", "moon.png": "the moon", "motorcycle_left.png": "a motorcycle",
    "retina.jpg": "a retina", "rocket.jpg": "a rocket",
}  # fmt: skip
BOS, EOS, VOCABULARY = 256, 257, 258  # after the bytes


class CaptionedCrops(Dataset):
    """`[i]` is an item for `collate`: patches and grid of a crop of photograph i mod 12, and its caption."""

    def __init__(self, count: int, seed: int, processor):
        self.processor, folder = processor, photographs()[0].parent
        self.photos = [Image.open(folder / file).convert("RGB") for file in PHOTOGRAPHS]
        self.boxes, self.grids, self.captions = [], [], []
        rng = np.random.default_rng(seed)
        for _, photo, name in zip(range(count), itertools.cycle(self.photos), itertools.cycle(PHOTOGRAPHS.values())):
            width, height = (rng.uniform(0.4, 1, 2) * photo.size).astype(int).tolist()
            left, top = rng.integers((photo.width - width, photo.height - height), endpoint=True).tolist()
            h, w = processor.grid(height, width)
            self.boxes.append((left, top, left + width, top + height))
            self.grids.append((1, h, w))
            self.captions.append(name)

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, i: int) -> dict:
        crop = self.photos[i % len(self.photos)].crop(self.boxes[i])
        return {**self.processor(crop), "caption": self.captions[i]}

    def mixed_up(self) -> "CaptionedCrops":
        """The same crops, each with the caption of another photograph's."""
        other = copy.copy(self)
        other.captions = self.captions[1:] + self.captions[:1]
        return other

    def chance(self) -> float:
        """The share of captions that are right when the commonest is given for every image."""
        return max(collections.Counter(self.captions).values()) / len(self)

    def entropy(self) -> float:
        """Of the captions, for each of their tokens: a model without images has no lower loss on them."""
        shares = np.array(list(collections.Counter(self.captions).values())) / len(self)
        return -(shares * np.log(shares)).sum() * len(self) / sum(len(caption) + 1 for caption in self.captions)


def batch(items):
    """A pack that carries its captions: `inputs` and `targets` `[C]`, their `lengths`, and `places`: which rows of the
    LM's padded batch they are, where a caption follows the patches of its image."""
    packed = collate(items)
    texts = [caption.encode() for caption in packed["caption"]]
    patches, lengths = packed["grid_thw"].prod(1).tolist(), [len(text) + 1 for text in texts]
    longest = max(map(sum, zip(patches, lengths)))
    packed["lengths"] = lengths
    packed["inputs"] = torch.tensor([token for text in texts for token in (BOS, *text)])
    packed["targets"] = torch.tensor([token for text in texts for token in (*text, EOS)])
    starts = [i * longest + n for i, n in enumerate(patches)]
    packed["places"] = torch.cat([torch.arange(i, i + length) for i, length in zip(starts, lengths)])
    return packed


def packs_of(dataset: CaptionedCrops, budget: int, workers: int = 0, epochs=(0,)):
    """This rank's packs, of as many images as fill the budget, epoch after epoch."""
    sampler = PatchBudgetBatchSampler(dataset.grids, budget)
    pinned, stay = torch.cuda.is_available(), workers > 0
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=batch,
        num_workers=workers,
        pin_memory=pinned,
        persistent_workers=stay,
    )
    for epoch in epochs:
        sampler.set_epoch(epoch)
        yield from loader
