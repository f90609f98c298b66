"""Files for the card -> patches there, a batch at a time and in order; what the card refuses is read the exact way.

It runs in the thread that makes packs, on a stream of that thread's own: neither the model's nor the default one waits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from siglip2_packed.card import Card, batches
from siglip2_packed.collection.decode import DecodedImage, decoded
from siglip2_packed.preprocess import Siglip2PackedImageProcessor


def cut(images: Iterable[DecodedImage], processor: Siglip2PackedImageProcessor, card: Card) -> Iterator[DecodedImage]:
    """All images, with patches on the card or an error."""
    for batch in batches(images, lambda image: image.jpeg.pixels if image.jpeg else 0):
        files = [image.jpeg for image in batch if image.jpeg]
        found = iter(card.patches(files, [image.grid for image in batch if image.jpeg]))
        for image in batch:
            if image.jpeg is not None:
                patches = next(found)
                if patches is not None:
                    yield image._replace(jpeg=None, patches=patches)
                    continue
                exact = decoded(processor, image.ordinal, image.name, image.jpeg.data, exactly=True)
                image = exact._replace(stamp=image.stamp)
            yield image if image.patches is None else image._replace(patches=card.here(image.patches))
