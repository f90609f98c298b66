"""Images and videos -> packed patches: resize to the patch budget, rescale, normalise, patchify.

The pixels are bit for bit those of transformers' PIL-backed `Siglip2ImageProcessor`; nothing is padded.
N images (rows of grid_thw), T total patches, P = patch_size² · 3.
"""

from __future__ import annotations

import itertools
import math
import os
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image

from siglip2_packed import card
from siglip2_packed.images import (
    Allocate,
    Frame,
    Scaled,
    Size,
    Source,
    Stored,
    image_items,
    plain_pixels,
    read_rgb,
    source_name,
    video_items,
)
from siglip2_packed.packing import PackedPatches
from siglip2_packed.processor_files import (
    SETTINGS,
    UNSAVED,
    ProcessorFiles,
    decoding,
    deviation,
    factor,
    flag,
    optional_flag,
    positive_int,
    resampling,
    rgb,
)

ROWS_AT_ONCE = 256
"""That are normalised on the host: a few stay in its cache from one step to the next."""


def resized_grid(height: int, width: int, patch_size: int, max_num_patches: int) -> tuple[int, int]:
    """The (h, w) patches that an image of `height` x `width` pixels is resized to: h·w tokens.

    The largest grid of about the image's aspect ratio within the budget; small images are enlarged, up to 100 times.
    Equal to transformers' `get_image_size_for_max_num_patches(...)` divided by the patch size, and h·w <=
    `max_num_patches` for images of any size (theirs exceeds it beyond 16 million pixels a side).

    Raises:
        ValueError: an argument that is not a positive integer.
    """
    return _search_grid(
        positive_int("height", height),
        positive_int("width", width),
        positive_int("patch_size", patch_size),
        positive_int("max_num_patches", max_num_patches),
    )


@lru_cache(maxsize=4096)
def _search_grid(height: int, width: int, patch_size: int, max_num_patches: int) -> tuple[int, int]:
    def grid(scale: float) -> tuple[int, int]:
        return max(1, math.ceil(height * scale / patch_size)), max(1, math.ceil(width * scale / patch_size))

    # The bounds, the tolerance and the order of the operations decide the result for sizes on the edge between two
    # grids: they are the reference's.
    low, high, tolerance = 1e-5 / 10, 100.0, 1e-5
    if math.prod(grid(low)) > max_num_patches:  # a side of more than a million patches
        low, high, tolerance = 0.0, low, 1e-15
    while high - low >= tolerance:
        scale = (low + high) / 2
        if math.prod(grid(scale)) <= max_num_patches:
            low = scale
        else:
            high = scale
    return grid(low)


class Siglip2PackedImageProcessor(ProcessorFiles):
    """Images and videos -> `PackedPatches`.

    Args:
        patch_size: pixels a side of a patch.
        max_num_patches: patches an image, or a frame of a video, is resized to at most.
        do_resize: resize to the budget. If off, the sides must be multiples of `patch_size`, every patch is kept
            (the budget does not apply), and floating pixels are not brought to 8 bits.
        do_rescale: multiply 8-bit levels by `rescale_factor`. If off, only floating pixels in [0, 1] are accepted,
            and they are used as they are. (If on they are recognised and give what the same 8-bit pixels give.)
        do_normalize: subtract `image_mean`, divide by `image_std`: one number, or one for each of R, G, B.
        resample: a `PIL.Image.Resampling`.
        do_convert_rgb: None drops transparency, True lays it over white, False refuses images that are not RGB.
        decode: how JPEG files become pixels. "exact": Pillow's, bit for bit, by simplejpeg where that is installed and
            gives them. "scaled": at the smallest of the file's own scales (1/8, 1/4, 1/2) that is at least twice the
            size it is resized to, which takes large photos a fraction of the time. "gpu": those of two megapixels or
            more are decoded by nvJPEG, all JPEG files resized and cut on the current CUDA device, where the pack then
            is; what is no plain JPEG gets there the exact way.
        num_threads: images are read and resized by this many threads; None: up to 8, one in a DataLoader worker.

    What is accepted as an image and how its scale and orientation are told: see `siglip2_packed.images`.
    Grids and pixels are those of transformers' `Siglip2ImageProcessor` on Pillow (4.57 and 5.x), bit for bit.

    Raises:
        ValueError: a setting that means nothing, by name.

    Examples:
        >>> import numpy as np
        >>> from siglip2_packed import Siglip2PackedImageProcessor
        >>> processor = Siglip2PackedImageProcessor(patch_size=16, max_num_patches=256)
        >>> processor([np.zeros((480, 640, 3), np.uint8), np.zeros((224, 224, 3), np.uint8)])
        PackedPatches: 2 images, 508 patches, longest 256
    """

    model_input_names = ["pixel_values", "grid_thw"]

    def __init__(
        self,
        patch_size: int = 16,
        max_num_patches: int = 256,
        do_resize: bool = True,
        do_rescale: bool = True,
        rescale_factor: float = 1 / 255,
        do_normalize: bool = True,
        image_mean: float | Iterable[float] = (0.5, 0.5, 0.5),
        image_std: float | Iterable[float] = (0.5, 0.5, 0.5),
        resample: int = Image.Resampling.BILINEAR,
        do_convert_rgb: bool | None = None,
        num_threads: int | None = None,
        decode: str = "exact",
    ):
        self.patch_size = positive_int("patch_size", patch_size)
        self.max_num_patches = positive_int("max_num_patches", max_num_patches)
        self.do_resize = flag("do_resize", do_resize)
        self.do_rescale = flag("do_rescale", do_rescale)
        self.rescale_factor = factor("rescale_factor", rescale_factor)
        self.do_normalize = flag("do_normalize", do_normalize)
        self.image_mean = rgb("image_mean", image_mean)
        self.image_std = deviation("image_std", image_std)
        self.resample = resampling("resample", resample)
        self.do_convert_rgb = optional_flag("do_convert_rgb", do_convert_rgb)
        self.num_threads = None if num_threads is None else positive_int("num_threads", num_threads)
        self.decode = decoding("decode", decode)
        if decode != "exact" and not do_resize:
            raise ValueError(f"decode={decode!r} goes with do_resize")
        if decode == "gpu" and (self.resample not in card.MODES or not do_rescale):
            names = " or ".join(mode.name for mode in card.MODES)
            raise ValueError(f"decode='gpu' goes with do_rescale, and resamples by {names}, not {self.resample.name}")

    def __repr__(self) -> str:
        settings = {name: getattr(self, name) for name in (*SETTINGS, *UNSAVED)}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in settings.items())})"

    def __call__(
        self,
        images: Any = None,
        videos: Any = None,
        *,
        input_data_format: str | None = None,
        on_error: str = "raise",
        temporal: str = "frames",
        return_tensors: str | None = None,
        max_num_patches: int | None = None,
        **settings: Any,
    ) -> PackedPatches:
        """Packs images, then videos, in the order given.

        Args:
            images: one image or a list of them. A 4-D array or tensor is a batch of images. In a list, a nested list of
                frames or a 4-D array is one video.
            videos: one video (a 4-D array, or a list of frames) or a list of videos, decoded, of frames of one size.
                A video of t frames is one row (t, h, w) of `grid_thw`; each frame gets the whole budget.
            input_data_format: `"channels_first"` or `"channels_last"`, for arrays with 1, 3 or 4 at both ends.
            on_error: `"raise"`, or `"skip"`: images that cannot be used are left out, with one warning.
            temporal: `"frames"` or `"joint"`, see `PackedPatches`.
            return_tensors: None or `"pt"`; the result is the same.
            max_num_patches: patches an image may have, for this call only; None keeps the processor's own.
            settings: any other constructor argument, for this call only; None keeps the processor's own.

        Returns:
            `PackedPatches`, float32, on the host, or with `decode="gpu"` on the current CUDA device. Its attribute
            `kept` lists, for each row of `grid_thw`, the index of its image in `images` (followed by `videos`);
            `skipped` lists (index, name, reason) of those left out.

        Raises:
            ValueError: naming the image's index, and its file where there is one, and the reason.
        """
        if max_num_patches is not None:
            settings["max_num_patches"] = max_num_patches
        if settings:
            own = {name: getattr(self, name) for name in (*SETTINGS, *UNSAVED)}
            unknown = sorted(settings.keys() - own.keys())
            if unknown:
                raise TypeError(f"unknown arguments {unknown}; settings are {list(own)}")
            changed = type(self)(**{**own, **{name: value for name, value in settings.items() if value is not None}})
            return changed(images, videos, input_data_format=input_data_format, on_error=on_error, temporal=temporal)
        if input_data_format not in (None, "channels_first", "channels_last"):
            raise ValueError(
                f"input_data_format must be 'channels_first' or 'channels_last', got {input_data_format!r}"
            )
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error must be 'raise' or 'skip', got {on_error!r}")
        if return_tensors not in (None, "pt"):
            raise ValueError(f"return_tensors must be None or 'pt', got {return_tensors!r}")

        items = image_items(images) + video_items(videos)
        # A source that appears twice is read once: saves work, and no PIL image is decoded by two threads at a time.
        jobs = {frame.key: frame for item in items for frame in item}
        threads = self._threads(len(jobs))
        gpu = self.on_card(torch.device("cuda")) if self.decode == "gpu" else None

        def read(frame: Frame, whole: bool = gpu is None) -> _Patches | Stored | ValueError:
            try:
                stored = None if whole else self._stored(frame.source, partial(np.empty, dtype=np.uint8))
                return self._read(frame, input_data_format) if stored is None else stored
            except ValueError as error:
                if on_error == "skip":
                    return error
                raise ValueError(f"{frame.label}: {error}") from (error.__cause__ or error)

        with ThreadPoolExecutor(threads) as pool:
            run = map if threads == 1 else pool.map
            results: Any = dict(zip(jobs, run(read, jobs.values())))
            if gpu is not None:
                self._cut_stored(gpu, results, lambda key: read(jobs[key], whole=True))
            kept, skipped = _sort_out(items, results, on_error)
            frames = [frame for item in kept.values() for frame in item]

            if gpu is not None:
                pixel_values = self.normalize(gpu.joined([frame.patches for frame in frames]))
            else:  # the sizes are known now: every image goes straight to its rows of the pack
                ends = list(itertools.accumulate((len(frame.patches) for frame in frames), initial=0))
                rows = np.empty((ends[-1], self.patch_size**2 * 3), dtype=np.float32)
                parts = (rows[i:j] for i, j in itertools.pairwise(ends))
                list(run(lambda frame, out: self._normalize(frame.patches, frame.scale, out), frames, parts))
                pixel_values = torch.from_numpy(rows)

        grid_thw = [(len(item), *item[0].grid) for item in kept.values()]
        packed = PackedPatches(pixel_values, grid_thw, temporal)
        packed.kept, packed.skipped = list(kept), skipped
        if skipped:
            index, name, reason = skipped[0]
            warnings.warn(
                f"left out {len(skipped)} of {len(items)} images; the first is {index} ({name!r}): {reason}",
                stacklevel=2,
            )
        return packed

    preprocess = __call__

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """The (h, w) patches of an image of `height` x `width` pixels, upright.

        Raises:
            ValueError: `do_resize` is off and a side is not a multiple of the patch size.
        """
        p = self.patch_size
        if self.do_resize:
            return resized_grid(height, width, p, self.max_num_patches)
        if height % p or width % p:
            raise ValueError(
                f"{height}x{width} (height x width) is not a multiple of patch_size {p}, and do_resize=False"
            )
        return height // p, width // p

    def read(self, source: Source | Stored) -> tuple[np.ndarray, tuple[int, int]]:
        """One image -> (`[h·w, P]` uint8 patches, (h, w)), resized and cut; `normalize` does the rest, where it likes.

        On the host, with `decode="gpu"` the exact way. Also of what `read_for_card` gives for a card.

        Raises:
            ValueError: with the reason why it cannot be used.
        """
        if isinstance(source, Stored) and source.decoded:
            frame = self._cut(source.image(), 1, source.scaled)
        else:
            frame = self._read(Frame(bytes(source.data) if isinstance(source, Stored) else source, ""), None)
        assert isinstance(frame.patches, np.ndarray)
        assert frame.patches.dtype == np.uint8, "read() is for processors that resize and rescale"
        return frame.patches, frame.grid

    def read_for_card(
        self, source: Source, allocate: Allocate
    ) -> tuple[np.ndarray | torch.Tensor | Stored, tuple[int, int]]:
        """One image, a path or bytes -> (it as it is stored, for `on_card`, (h, w)), or what `read` gives.

        Args:
            allocate: gives memory for its pixels; where there is none they are resized here.

        Raises:
            ValueError: with the reason why it cannot be used.
        """
        stored = self._stored(source, allocate)
        if stored is None:
            image, factor, scaled = self._decoded(Frame(source, ""), None)
            exactly = card.pillow_order(self.resample) is not None
            room = allocate(3 * image.height * image.width) if exactly else None
            if room is None:
                frame = self._cut(image, factor, scaled)
                return frame.patches, frame.grid
            pixels = room.reshape(image.height, image.width, 3)
            np.copyto(pixels, np.asarray(image))
            stored = Stored(pixels, pixels.shape[:2], None, decoded=True, scaled=scaled)
        return stored, self.grid(*stored.size)

    def normalize(self, patches: torch.Tensor) -> torch.Tensor:
        """`[T, P]` uint8 patches of `read` -> float32 on their device, bit for bit what calling the processor gives.

        Raises:
            ValueError: patches of another dtype.
        """
        if patches.dtype != torch.uint8:
            raise ValueError(f"patches must be uint8, as read() gives them, got {patches.dtype}")
        if patches.device.type == "cpu":
            rows = np.empty(patches.shape, dtype=np.float32)
            for i in range(0, len(rows), ROWS_AT_ONCE):
                self._normalize(patches[i : i + ROWS_AT_ONCE].numpy(), self.rescale_factor, rows[i : i + ROWS_AT_ONCE])
            return torch.from_numpy(rows)
        colours = (self.image_mean, self.image_std) if self.do_normalize else None
        levels, channels = _levels(self.rescale_factor, colours, patches.device)
        places = patches.reshape(-1, 3).int().mul_(3).add_(channels)
        return F.embedding(places.reshape(-1), levels).view(patches.shape)

    def on_card(self, device: torch.device) -> card.Card | None:
        """What resizes and cuts images on this device, and with `decode="gpu"` decodes them; None if the host does.

        Raises:
            ValueError: there is no nvJPEG, and why.
        """
        if self.decode == "gpu":
            return card.Card(device, self.patch_size, self.resample, card.nvjpeg(device))
        exactly = self.do_resize and card.resizes_exactly(device, self.resample)
        return card.Card(device, self.patch_size, self.resample) if exactly else None

    def _stored(self, source: Source, allocate: Allocate) -> Stored | None:
        """A JPEG file for `on_card`, or the pixels of one; None for everything else."""
        file = card.plain_jpeg(source, self.do_convert_rgb) if self.decode == "gpu" else None
        if file is not None or card.pillow_order(self.resample) is None:
            return file
        return plain_pixels(source, self._draft, allocate)

    def _cut_stored(self, gpu: card.Card, results: dict[Any, Any], exactly: Callable[[Any], Any]) -> None:
        """Puts patches in the place of what is for the card; by `exactly` of what it does not take."""
        files = [(key, file, self.grid(*file.size)) for key, file in results.items() if isinstance(file, Stored)]
        for batch in card.batches(files, lambda job: job[1].pixels):
            cut = gpu.patches([file for _, file, _ in batch], [grid for _, _, grid in batch])
            for (key, file, grid), patches in zip(batch, cut):
                scaled = (self.rescale_factor, grid, file.size)
                results[key] = exactly(key) if patches is None else _Patches(patches, *scaled)

    def _read(self, frame: Frame, input_data_format: str | None) -> _Patches:
        return self._cut(*self._decoded(frame, input_data_format))

    def _decoded(self, frame: Frame, input_data_format: str | None) -> tuple[Any, float, Scaled | None]:
        """See `read_rgb`."""
        return read_rgb(
            frame.source,
            input_data_format=input_data_format,
            do_convert_rgb=self.do_convert_rgb,
            value_range=frame.value_range,
            keep_float=not self.do_resize,
            unit_only=not self.do_rescale,
            resized=self._draft,
        )

    def _cut(self, image: Any, factor: float, scaled: Scaled | None) -> _Patches:
        stored = (image.height, image.width) if isinstance(image, Image.Image) else image.shape[:2]
        height, width = scaled.size if scaled else stored

        p, (h, w) = self.patch_size, self.grid(height, width)
        if self.do_resize:
            image = image.resize((w * p, h * p), self.resample, scaled.box if scaled else None)

        patches = rearrange(np.asarray(image), "(h py) (w px) c -> (h w) (py px c)", py=p, px=p)
        scale = factor * (self.rescale_factor if self.do_rescale else 1 / 255)
        return _Patches(patches, scale, (h, w), (height, width))

    @property
    def _draft(self) -> Callable[[int, int], Size] | None:
        """(height, width) -> what they are resized to, where a file may be decoded at a scale of its own."""

        def resized(height: int, width: int) -> Size:
            h, w = self.grid(height, width)
            return h * self.patch_size, w * self.patch_size

        return resized if self.decode == "scaled" else None

    def _normalize(self, patches: Any, scale: float, out: np.ndarray) -> None:
        # Bit for bit transformers' arithmetic: scaled in float64, rounded to float32, normalised in float32.
        np.multiply(patches, scale, out=out, dtype=np.float64, casting="same_kind")
        if self.do_normalize:
            np.subtract(out, _patch_of(tuple(self.image_mean), self.patch_size), out=out)
            np.divide(out, _patch_of(tuple(self.image_std), self.patch_size), out=out)

    def _threads(self, jobs: int) -> int:
        threads = self.num_threads
        if threads is None:
            in_worker = torch.utils.data.get_worker_info() is not None
            threads = 1 if in_worker else min(8, os.cpu_count() or 1)
        return max(1, min(threads, jobs))


class _Patches(NamedTuple):
    """A frame, read and cut: patches `[h·w, P]`, ready to be normalised once multiplied by `scale`."""

    patches: np.ndarray | torch.Tensor
    scale: float
    grid: tuple[int, int]
    size: tuple[int, int]


def _sort_out(
    items: list[list[Frame]], results: dict[Any, _Patches | ValueError], on_error: str
) -> tuple[dict[int, list[_Patches]], list[tuple[int, str, str]]]:
    """-> (what was read, by index), (index, name, reason) of what was not."""
    kept, skipped = {}, []
    for index, frames in enumerate(items):
        read: list[_Patches] = []
        for frame in frames:
            result = results[frame.key]
            if isinstance(result, _Patches) and read and result.size != read[0].size:
                (height, width), first = result.size, read[0].size
                result = ValueError(
                    f"{height}x{width} (height x width), but frame 0 is {first[0]}x{first[1]}: "
                    "the frames of a video must be of one size"
                )
                if on_error == "raise":
                    raise ValueError(f"{frame.label}: {result}")
            if isinstance(result, ValueError):
                skipped.append((index, source_name(frame.source), str(result)))
                break
            read.append(result)
        else:
            kept[index] = read
    return kept, skipped


@lru_cache
def _patch_of(colour: tuple[float, ...], patch_size: int) -> np.ndarray:
    """`[P]` float32: a patch whose every pixel has this colour."""
    patch = np.tile(np.array(colour, dtype=np.float32), patch_size**2)
    patch.flags.writeable = False  # all images' share it
    return patch


@lru_cache
def _levels(
    factor: float, colours: tuple[tuple[float, ...], ...] | None, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """What each of 256 levels becomes in each of three channels, `[256·3, 1]` float32, and the channels 0, 1, 2.

    Once a device: such a copy waits for all that the device has been given to do.
    """
    levels = (torch.arange(256, dtype=torch.float64, device="cpu") * factor).float()[:, None]
    if colours is not None:
        mean, std = torch.tensor(colours, dtype=torch.float32, device="cpu")
        levels = (levels - mean) / std
    channels = torch.arange(3, dtype=torch.int32, device="cpu")
    return levels.expand(256, 3).reshape(-1, 1).to(device), channels.to(device)
