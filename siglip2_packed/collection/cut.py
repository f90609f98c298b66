"""Files and pixels -> patches on the card, a batch at a time and in order; what the card refuses is left to the host.

A batch is decoded, or copied, by a thread of its own while the one before is cut, in the thread that makes packs and on
a stream of that thread's own: neither the model's nor the default one waits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from siglip2_packed.card import Card, Decoded, batches
from siglip2_packed.collection.decode import DecodedImage, decoded, prefetch
from siglip2_packed.images import Stored
from siglip2_packed.preprocess import Siglip2PackedImageProcessor


def cut(images: Iterable[DecodedImage], processor: Siglip2PackedImageProcessor, card: Card) -> Iterator[DecodedImage]:
    """All images, with patches on the card or an error."""
    for batch, pixels in prefetch(on_card(images, card), 1):
        found = iter(card.cut(pixels))
        del pixels
        batch.reverse()
        while batch:  # gives back the memory of each
            image = batch.pop()
            if image.stored is not None:
                patches = next(found)
                if patches is not None:
                    yield image._replace(stored=None, patches=patches)
                    continue
                image = read_on_host(processor, image, image.stored)
            yield image if image.patches is None else image._replace(patches=card.here(image.patches))


def on_card(images: Iterable[DecodedImage], card: Card) -> Iterator[tuple[list[DecodedImage], Decoded]]:
    """Batches, and the pixels of those of them that are files for the card."""
    for batch in batches(images, weight):
        grids = [image.grid for image in batch if image.stored]
        yield batch, card.decode([image.stored for image in batch if image.stored], grids)


def weight(image: DecodedImage) -> int:
    """In a batch: its pixels; of what is decoded already three times as many, which all wait in the workers' memory."""
    return 0 if image.stored is None else image.stored.pixels * (3 if image.stored.decoded else 1)


def read_on_host(processor: Siglip2PackedImageProcessor, image: DecodedImage, stored: Stored) -> DecodedImage:
    """What the card gave back."""
    return decoded(processor, image.ordinal, image.name, stored)._replace(stamp=image.stamp)
