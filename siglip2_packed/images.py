"""Any image a caller may hold -> RGB: paths, bytes, files, PIL images of every mode, arrays, tensors.

Policies, the same whichever form an image comes in:

- A file is what its bytes say, decoded in this process or not at all (formats.py). A PIL image is its caller's affair.
- EXIF orientation is applied. A file with several frames (GIF, TIFF) gives its first; a PIL image the one it shows.
- Alpha is dropped, as Pillow's `convert("RGB")` does, unless `do_convert_rgb=True`: then it is laid over white.
- 16-bit pixels are scaled to 8 (divided by 257, rounded), never clipped. Wider integers: their range tells.
- Floating pixels within [0, 1] are of unit scale, otherwise within [0, 255] of 8-bit scale; anything else is an error.
- Pillow's limits stand as the user set them; an image file above `Image.MAX_IMAGE_PIXELS` is an error, not a warning.

Every fault is a ValueError that states the reason; the caller adds which image it was.
"""

from __future__ import annotations

import io
import itertools
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError

from siglip2_packed import jpeg
from siglip2_packed.formats import open_image

Source = Any
"""A PIL image, path, bytes, file object, array or tensor."""

CHANNELS = (1, 3, 4)

ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS, DOWN, ACROSS = ({ORIENTATIONS[tag] for tag in tags} for tags in ((5, 6, 7, 8), (3, 4, 7, 8), (2, 3, 6, 7)))
"""Of Pillow's `transpose`: those that exchange the sides, and then mirror top to bottom, left to right."""
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".wmv", ".mpg", ".mpeg")
OVERSIZE = 2
"""A JPEG file that is decoded at a scale of its own is at least so many times the size that it is resized to."""
Side = TypeVar("Side", int, float)
Size = tuple[int, int]
"""(height, width) in pixels."""


class Frame(NamedTuple):
    """An image, or a frame of a video, as the caller gave it."""

    source: Source
    label: str
    value_range: tuple[float, float] | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        return id(self.source), self.value_range


class Scaled(NamedTuple):
    """What a JPEG file that was decoded at a scale of its own is otherwise, upright."""

    size: Size
    """Of the whole file."""
    box: tuple[float, float, float, float]
    """(left, top, right, bottom) of the picture among the pixels: their sides are rounded up."""


class Stored(NamedTuple):
    """An image as its file stores it, for a card."""

    data: bytearray | bytes | np.ndarray
    """A JPEG file; or pixels, `[height, width, 3]` uint8."""
    stored: Size
    turn: Image.Transpose | None
    decoded: bool = False
    scaled: Scaled | None = None

    @property
    def size(self) -> Size:
        """Of the whole file, upright."""
        return self.scaled.size if self.scaled else turned(self.stored, self.turn)

    @property
    def pixels(self) -> int:
        return self.stored[0] * self.stored[1]

    def image(self) -> Image.Image:
        """What is decoded already, upright."""
        return upright(Image.fromarray(self.data), self.turn)  # type: ignore[arg-type]


Allocate = Callable[[int], "np.ndarray | None"]
"""So many bytes of memory, uint8, or None if there is no room."""


def image_items(images: Any) -> list[list[Frame]]:
    """What a caller passes as `images` -> the frames of each: one, or several for a video."""
    if images is None:
        return []
    entries = list(images) if _is_list(images) or _ndim(images) == 4 else [images]
    return [_item(f"image {i}", entry) for i, entry in enumerate(entries)]


def video_items(videos: Any) -> list[list[Frame]]:
    """What a caller passes as `videos` -> the frames of each."""
    if videos is None:
        return []
    _refuse_video_file(videos)
    if not _is_list(videos) and _ndim(videos) not in (4, 5):
        raise ValueError(
            "videos must be a 4-D array [t, h, w, c] or [t, c, h, w], a list of frames, or a list of these, got "
            + (f"shape {list(videos.shape)}" if is_array(videos) else type(videos).__name__)
        )
    entries = list(videos)
    nested = [_is_list(entry) or _ndim(entry) == 4 for entry in entries]
    if entries and not any(nested):
        entries = [entries]
    elif not all(nested):
        raise ValueError("videos mixes whole videos and single frames")
    items = [_item(f"video {i}", entry) for i, entry in enumerate(entries)]
    for frame in itertools.chain.from_iterable(items):
        _refuse_video_file(frame.source)
    return items


def _refuse_video_file(source: Any) -> None:
    if (name := source_name(source)).lower().endswith(VIDEO_SUFFIXES):
        raise ValueError(
            f"{name!r} is a video file, which is not decoded here: read its frames (with torchcodec, PyAV or OpenCV) "
            "and pass videos=[frames], frames being a list of images or an array [t, h, w, c]"
        )


def _item(label: str, entry: Any) -> list[Frame]:
    """One image -> a list of one frame; a list of frames or a 4-D array -> the frames of a video."""
    if not _is_list(entry) and _ndim(entry) != 4:
        return [Frame(entry, _label(label, entry))]
    sources = list(entry)
    if not sources:
        raise ValueError(f"{label}: a video needs at least one frame, got none")
    value_range = _joint_range(sources)
    return [Frame(source, _label(f"{label}, frame {k}", source), value_range) for k, source in enumerate(sources)]


def _label(label: str, source: Source) -> str:
    name = source_name(source)
    return f"{label} ({name!r})" if name else label


def _joint_range(sources: list[Source]) -> tuple[float, float] | None:
    """A video of arrays has one scale: a dark frame within [0, 1] says nothing about the others' being 8-bit."""
    if not all(is_array(source) for source in sources) or len({str(source.dtype) for source in sources}) > 1:
        return None
    try:
        lows, highs = zip(*(array_range(to_numpy(source)[0]) for source in sources))
    except ValueError:  # not pixels; reading the frame will say so, and which
        return None
    return np.min(lows).item(), np.max(highs).item()


def _is_list(entry: Any) -> bool:
    single = (str, bytes, bytearray, memoryview, os.PathLike, Mapping)
    return isinstance(entry, Iterable) and not (isinstance(entry, single) or is_array(entry) or hasattr(entry, "read"))


def _ndim(entry: Any) -> int | None:
    return entry.ndim if is_array(entry) else None


def source_name(source: Source) -> str:
    """What a message calls the image: its path or file name, or ""."""
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    name = getattr(source, "filename", None) or getattr(source, "name", None)
    return name if isinstance(name, str) else ""


def is_array(source: Source) -> bool:
    return hasattr(source, "__array__") and not isinstance(source, Image.Image)


def read_rgb(
    source: Source,
    *,
    input_data_format: str | None = None,
    do_convert_rgb: bool | None = None,
    value_range: tuple[float, float] | None = None,
    keep_float: bool = False,
    unit_only: bool = False,
    resized: Callable[[int, int], Size] | None = None,
) -> tuple[Image.Image | np.ndarray, float, Scaled | None]:
    """Reads one image.

    Args:
        input_data_format: `"channels_first"` or `"channels_last"`, for arrays whose channel axis is ambiguous.
        do_convert_rgb: None drops alpha, True lays it over white, False refuses whatever is not RGB already.
        value_range: (lowest, highest) value that tells an array's scale; its own, when left out.
        keep_float: return floating pixels as they are; otherwise they are brought to 8 bits, as resizing needs.
        unit_only: refuse everything but floating pixels in [0, 1] (what `do_rescale=False` takes).
        resized: (height, width) -> what they are going to be. Given that, a JPEG file is decoded at the smallest of its
            own scales (whole, 1/2, 1/4, 1/8) that is at least twice that on both sides.

    Returns:
        `(image, factor, scaled)`. An RGB PIL image; or, for floating pixels with `keep_float`, an array
        `[height, width, 3]`. `factor` multiplies them to 0..255: 255 for an array of unit scale, otherwise 1.
        `scaled` is None unless a file was decoded at less than its size.

    Raises:
        ValueError: with the reason; what Pillow raised is its cause.
    """
    scaled = None
    if is_array(source):
        array, dtype = to_numpy(source)
        array = channels_last(array, input_data_format)
    else:
        image, scaled = decode(source, resized)
        if unit_only and image.mode != "F":
            pixels = np.asarray(image)
            raise _not_unit(f"mode {image.mode} ({pixels.dtype.name})", pixels.min(), pixels.max())
        if not image.mode.startswith(("I", "F")):
            return to_rgb(image, do_convert_rgb), 1, scaled
        if do_convert_rgb is False:
            raise ValueError(f"mode {image.mode} is not RGB, and do_convert_rgb=False")
        array = np.asarray(image)[:, :, None]
        dtype = array.dtype.name

    low, high = value_range or array_range(array)
    factor = levels_factor(low, high, dtype)
    if unit_only and (array.dtype.kind != "f" or factor != 255):
        raise _not_unit(dtype, array.min(), array.max())
    if array.dtype.kind != "f":
        return to_rgb(from_uint8(integers_to_uint8(array, factor)), do_convert_rgb), 1, None
    if not keep_float:
        return to_rgb(from_uint8(floats_to_uint8(array, factor, dtype)), do_convert_rgb), 1, None
    return floats_to_rgb(array, 255 / factor, do_convert_rgb), factor, None


def _not_unit(dtype: str, low: float, high: float) -> ValueError:
    return ValueError(
        f"do_rescale=False takes floating pixels in [0, 1], got {dtype} pixels in [{low:g}, {high:g}]: "
        "leave do_rescale on, or bring them to [0, 1] first"
    )


def decode(source: Source, resized: Callable[[int, int], Size] | None = None) -> tuple[Image.Image, Scaled | None]:
    """Opens and decodes one image, upright; see `read_rgb`. Mode as stored."""
    with opened(source) as image:
        scaled, pixels = None, None
        if image is not source:
            scaled = _draft(image, resized) if resized else None
            pixels = jpeg.decode(image)
        if pixels is None:
            image.load()
            pixels = image
        return upright(pixels, transposition(image)), scaled


def plain_pixels(source: Source, resized: Callable[[int, int], Size] | None, allocate: Allocate) -> Stored | None:
    """An RGB image in a JPEG file, decoded straight into the memory; or None: `read_rgb` can do it."""
    if not readable_again(source):
        return None
    with opened(source) as image:
        if image.mode != "RGB" or not jpeg.takes(image):
            return None
        scaled = _draft(image, resized) if resized else None
        size = image.height, image.width
        room = allocate(3 * size[0] * size[1])
        if room is None or not jpeg.decode_rgb(image, room.reshape(*size, 3)):
            return None
        return Stored(room.reshape(*size, 3), size, transposition(image), decoded=True, scaled=scaled)


def _draft(image: Image.Image, resized: Callable[[int, int], Size]) -> Scaled | None:
    """Has Pillow decode a JPEG file at a scale, if there is a smaller one that will do."""
    if image.format not in jpeg.FORMATS:
        return None
    whole, turn = (image.height, image.width), transposition(image)
    height, width = turned(resized(*turned(whole, turn)), turn)
    draft = image.draft(None, (OVERSIZE * width, OVERSIZE * height))  # type: ignore[arg-type]
    if draft is None or (image.height, image.width) == whole:
        return None
    across, down = turned(draft[1][2:], turn)  # of the picture among the pixels
    columns, rows = turned(image.size, turn)
    left, top = columns - across if turn in ACROSS else 0, rows - down if turn in DOWN else 0
    return Scaled(turned(whole, turn), (left, top, left + across, top + down))


def turned(size: tuple[Side, Side], turn: Image.Transpose | None) -> tuple[Side, Side]:
    return size[::-1] if turn in SIDEWAYS else size


def upright_size(source: Source) -> tuple[int, int]:
    """(height, width) of one image as `decode` returns it, or of an array; from the header alone where that tells it.

    A file whose pixels are damaged still has a size: only reading it finds that.
    """
    if is_array(source):
        height, width, _ = channels_last(to_numpy(source)[0], None).shape
        return height, width
    with opened(source) as image:
        if not _header_tells(image):
            image.load()
        return turned((image.height, image.width), transposition(image))


@contextmanager
def opened(source: Source) -> Iterator[Image.Image]:
    """The image, not decoded yet. What Pillow raises within becomes a ValueError that states the reason."""
    try:
        if isinstance(source, Image.Image):
            yield source
            return
        with open_image(_openable(source)) as image:
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and image.width * image.height > limit:
                raise ValueError(
                    f"{image.width}x{image.height} is {image.width * image.height} pixels, more than "
                    f"PIL.Image.MAX_IMAGE_PIXELS = {limit}"
                )
            yield image
    except UnidentifiedImageError as error:  # by pillow-heif, which knew its beginning
        raise ValueError("an image whose header cannot be read (cut short or damaged)") from error
    except Image.DecompressionBombError as error:  # Pillow's own, above twice the limit
        raise ValueError(f"{error} (PIL.Image.MAX_IMAGE_PIXELS = {Image.MAX_IMAGE_PIXELS})") from error
    except ValueError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on broken files: OSError, SyntaxError, ...
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _header_tells(image: Image.Image) -> bool:
    """Whether size and orientation are known before decoding. Other formats may change either as they load."""
    if image.format != "PNG":
        return image.format in ("BMP", "GIF", "JPEG", "MPO", "WEBP")
    file = getattr(image, "fp", None)
    return file is not None and not _chunks_after_pixels(file)


def _chunks_after_pixels(file: IO[bytes]) -> bool:
    """Whether a PNG file has chunks between its pixels and its end: the EXIF block may be one of them."""
    position = file.tell()
    file.seek(8)  # the signature
    pixels = False
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind == b"IEND" or (pixels and kind != b"IDAT"):
            break
        pixels = kind == b"IDAT"
        file.seek(length + 4, os.SEEK_CUR)  # and its checksum
    file.seek(position)
    return head[4:] != b"IEND"


def _openable(source: Source) -> Any:
    if isinstance(source, (bytes, bytearray, memoryview)):
        return io.BytesIO(source)
    if isinstance(source, (str, os.PathLike)):
        return source
    if hasattr(source, "read"):
        if seekable(source):
            source.seek(0)  # from its beginning, like every other form of the same image
        return io.BytesIO(source.read())
    raise ValueError(f"expected a PIL image, path, bytes, file object, array or tensor, got {type(source).__name__}")


def readable_again(source: Source) -> bool:
    """Not an image that is decoded already, pixels, a stream that can be read once."""
    return isinstance(source, (str, os.PathLike, bytes, bytearray, memoryview)) or seekable(source)


def seekable(source: Source) -> bool:
    return bool(getattr(source, "seekable", lambda: False)())


def upright(image: Image.Image, turn: Image.Transpose | None) -> Image.Image:
    return image if turn is None else image.transpose(turn)


def transposition(image: Image.Image) -> Image.Transpose | None:
    """What the EXIF orientation asks for. An EXIF block that cannot be read counts as none."""
    try:
        # PNG's own getexif decodes the image to look for a block behind the pixels
        exif = Image.Image.getexif(image) if image.format == "PNG" else image.getexif()
        return ORIENTATIONS.get(exif.get(ExifTags.Base.Orientation, 1))
    except Exception:  # a parser of untrusted bytes; the pixels are good
        return None


def to_rgb(image: Image.Image, do_convert_rgb: bool | None) -> Image.Image:
    if image.mode == "RGB" and not (do_convert_rgb and "transparency" in image.info):
        return image
    if do_convert_rgb is False:
        raise ValueError(f"mode {image.mode} is not RGB, and do_convert_rgb=False")
    try:
        if image.mode in ("La", "RGBa"):  # premultiplied
            image = image.convert(image.mode.upper())
        if do_convert_rgb and ("A" in image.getbands() or image.info.get("transparency") is not None):
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
        return image.convert("RGB")
    except Exception as error:
        raise ValueError(f"mode {image.mode} cannot be converted to RGB: {error}") from error


def to_numpy(source: Any) -> tuple[np.ndarray, str]:
    """An array or tensor -> (numpy array on the host, the dtype as the caller knows it)."""
    if isinstance(source, torch.Tensor):
        dtype = str(source.dtype).removeprefix("torch.")
        exotic = source.is_floating_point() and source.dtype not in (torch.float16, torch.float32, torch.float64)
        array = (source.float() if exotic else source).detach().cpu().numpy()
    else:
        array = np.asarray(source)
        dtype = array.dtype.name
    if array.dtype.kind not in "buif":
        raise ValueError(f"pixels must be integers or floats, got dtype {dtype}")
    return array, dtype


def channels_last(array: np.ndarray, input_data_format: str | None) -> np.ndarray:
    """`[h, w]`, `[c, h, w]` or `[h, w, c]` -> `[h, w, c]`, c of 1, 3 or 4."""
    shape = list(array.shape)
    if array.ndim not in (2, 3) or 0 in shape:
        raise ValueError(f"an image is [h, w], [c, h, w] or [h, w, c], got shape {shape}")
    if array.ndim == 2:
        return array[:, :, None]
    first, last = shape[0] in CHANNELS, shape[2] in CHANNELS
    if input_data_format is None:
        if first and last:
            raise ValueError(
                f"shape {shape} has 1, 3 or 4 channels at either end: pass input_data_format='channels_first' or "
                "'channels_last'"
            )
        input_data_format = "channels_first" if first else "channels_last"
    if not (first if input_data_format == "channels_first" else last):
        raise ValueError(f"shape {shape} has no channel axis of 1, 3 or 4 (input_data_format is {input_data_format!r})")
    return np.moveaxis(array, 0, 2) if input_data_format == "channels_first" else array


def array_range(array: np.ndarray) -> tuple[float, float]:
    """(lowest, highest) value; of 8-bit pixels and bools, whose scale is known, the range of the type."""
    if array.dtype in (np.uint8, np.bool_):
        return 0, 255
    return array.min().item(), array.max().item()


def levels_factor(low: float, high: float, dtype: str) -> float:
    """What multiplies pixels of this range and dtype to 0..255."""
    if dtype == "bool":
        return 255
    if dtype == "uint16":
        return 1 / 257
    if dtype.startswith(("float", "bfloat")):
        if low >= 0 and high <= 1:
            return 255
        if low >= 0 and high <= 255:
            return 1
        raise ValueError(
            f"{dtype} pixels in [{low:g}, {high:g}]; expected [0, 1] or [0, 255]. Bring them to one of these first, "
            "for instance x / 2 + 0.5 for pixels in [-1, 1]"
        )
    if low >= 0 and high <= 255:
        return 1
    if low >= 0 and high <= 65535:
        return 1 / 257
    raise ValueError(f"{dtype} pixels in [{low}, {high}]; expected 8 bits [0, 255] or 16 bits [0, 65535]")


def integers_to_uint8(array: np.ndarray, factor: float) -> np.ndarray:
    if factor == 1:
        return array.astype(np.uint8, copy=False)
    if factor == 255:
        return array.astype(np.uint8) * np.uint8(255)
    return ((array.astype(np.int64) + 128) // 257).astype(np.uint8)  # the nearest: 257 is odd, so there are no ties


def floats_to_uint8(array: np.ndarray, factor: float, dtype: str) -> np.ndarray:
    """Floating pixels -> the 8-bit levels that are resized.

    Unit-scale float32 and float64 are multiplied by 255 and truncated, bit for bit as transformers does before it
    resizes; every u / 255 comes back as u. In half precision it would not, so those are rounded; 8-bit scale as well.
    """
    levels = array.astype(np.float64) * factor
    if factor == 255 and dtype in ("float32", "float64"):
        return levels.astype(np.float32).astype(np.uint8)
    return np.rint(levels).astype(np.uint8)


def floats_to_rgb(array: np.ndarray, white: float, do_convert_rgb: bool | None) -> np.ndarray:
    channels = array.shape[2]
    if do_convert_rgb is False and channels != 3:
        raise ValueError(f"{channels} channels are not RGB, and do_convert_rgb=False")
    if channels == 1:
        return np.repeat(array, 3, axis=2)
    if channels == 4 and do_convert_rgb:
        alpha = array[:, :, 3:] / white
        return alpha * array[:, :, :3] + (1 - alpha) * white
    return array[:, :, :3]


def from_uint8(array: np.ndarray) -> Image.Image:
    """`[h, w, c]` uint8 -> a PIL image of mode L, RGB or RGBA."""
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
