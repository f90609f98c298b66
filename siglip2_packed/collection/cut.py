"""Files for the card -> patches there, a batch at a time and in order; what the card refuses is read the exact way.

A batch is decoded by a thread of its own while the one before is cut, in the thread that makes packs and on a stream of
that thread's own: neither the model's nor the default one waits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from siglip2_packed.card import Card, Decoded, batches
from siglip2_packed.collection.decode import DecodedImage, decoded, prefetch
from siglip2_packed.preprocess import Siglip2PackedImageProcessor


def cut(images: Iterable[DecodedImage], processor: Siglip2PackedImageProcessor, card: Card) -> Iterator[DecodedImage]:
    """All images, with patches on the card or an error."""
    for batch, pixels in prefetch(on_card(images, card), 1):
        found = iter(card.cut(pixels))
        del pixels
        for image in batch:
            if image.jpeg is not None:
                patches = next(found)
                if patches is not None:
                    yield image._replace(jpeg=None, patches=patches)
                    continue
                exact = decoded(processor, image.ordinal, image.name, bytes(image.jpeg.data), exactly=True)
                image = exact._replace(stamp=image.stamp)
            yield image if image.patches is None else image._replace(patches=card.here(image.patches))


def on_card(images: Iterable[DecodedImage], card: Card) -> Iterator[tuple[list[DecodedImage], Decoded]]:
    """Batches, and the pixels of those of them that are files for the card."""
    for batch in batches(images, lambda image: image.jpeg.pixels if image.jpeg else 0):
        files = [image for image in batch if image.jpeg]
        yield batch, card.decode([image.jpeg for image in files if image.jpeg], [image.grid for image in files])
