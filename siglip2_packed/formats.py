"""Which files are images, and how one is opened: by its content, in this process, only if it is a regular file.

Pillow has Ghostscript draw PostScript, and opens whatever an IPTC file wraps. So the formats that it decodes by itself
are listed here, and everything in the package that opens an image goes through `open_image`. A name tells only what a
walk takes for an image: a `.jpg` may hold any of them, and must not start a program whatever it holds.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import IO, Any
from urllib.parse import unquote

from PIL import Image, UnidentifiedImageError

from siglip2_packed.remote import is_url, open_url

DECODED = {  # the common first: they are tried in this order; those without a signature last
    "JPEG": "jpg jpeg jpe jfif mpo",
    "PNG": "png apng",
    "WEBP": "webp",
    "GIF": "gif",
    "BMP": "bmp",
    "TIFF": "tif tiff",
    "AVIF": "avif avifs",
    "HEIF": "heic heics heif heifs hif",
    "JPEG2000": "jp2 j2k jpc jpf jpx j2c",
    "PPM": "ppm pgm pbm pnm pfm",
    "ICO": "ico",
    "CUR": "cur",
    "ICNS": "icns",
    "DIB": "dib",
    "PSD": "psd",
    "QOI": "qoi",
    "DDS": "dds",
    "BLP": "blp",
    "FTEX": "ftc ftu",
    "GBR": "gbr",
    "FITS": "fit fits",
    "FLI": "fli flc",
    "DCX": "dcx",
    "PCX": "pcx",
    "SGI": "sgi rgb rgba bw",
    "SUN": "ras",
    "MSP": "msp",
    "XBM": "xbm",
    "XPM": "xpm",
    "PIXAR": "pxr",
    "MCIDAS": "",
    "XVTHUMB": "",
    "IM": "im",
    "PCD": "pcd",
    "IMT": "",
    "TGA": "tga icb vda vst",
    "SPIDER": "",
}
"""Format of Pillow or pillow-heif -> the suffixes of its files."""
REFUSED = {
    "EPS": ("eps ps", rb"\x04?%!PS|\xc5\xd0\xd3\xc6", "PostScript is a program, which Pillow has Ghostscript run"),
    "WMF": (
        "wmf emf",
        rb"\xd7\xcd\xc6\x9a|\x01\x00\x00\x00.{36} EMF",
        "only Windows draws a metafile",
    ),
    "FPX": ("fpx mic", rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "images within OLE files are not read"),
    "IPTC": ("iim", rb"\x1c[\x01-\x09]", "it may wrap a file of any other format"),
}
"""Images that are not decoded here: format -> suffixes, how a file begins, why not."""
NO_IMAGES = {
    "HDF5": rb"\x89HDF\r\n\x1a\n",
    "MPEG": rb"\x00\x00\x01[\xb3\xba]",
    "GRIB": rb"GRIB",
    "BUFR": rb"BUFR|ZCZC",
    "PDF": rb"%PDF",
    "SVG": rb"<svg|<\?xml.*<svg",
}
"""What Pillow has no decoder for, and an error can name: format -> how a file begins."""
EXTRA = {
    "HEIF": (rb".{4}ftyp(hei[cxms]|hev[cxms]|mi[af][12]|msf1)", "pip install 'siglip2-packed[heif]'"),
    "AVIF": (rb".{4}ftypavi[fs]", "Pillow 11.3 or newer has one"),
}
"""Formats that Pillow may lack: how a file begins, and where there is a decoder."""

DECODE = ("exact", "scaled", "gpu")
"""How JPEG files become pixels: Pillow's to the bit, at a scale of their own, by nvJPEG."""
SUFFIXES = frozenset(
    f".{suffix}" for listed in (*DECODED.values(), *(row[0] for row in REFUSED.values())) for suffix in listed.split()
)
"""Of files that a walk takes for images: those decoded, and those whose refusal is an error."""
KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


def suffix_of(name: str) -> str:
    """`.jpg` of `a/b.JPG`."""
    return os.path.splitext(name)[1].lower()


def is_image_name(name: str) -> bool:
    return suffix_of(name) in SUFFIXES


@contextmanager
def open_image(source: Any) -> Iterator[Image.Image]:
    """An image, not decoded yet, of a path, a `file://` URL or a seekable binary file.

    Raises:
        ValueError: no regular file, a format that is not decoded here, one whose decoder is not installed.
        Exception: what Pillow raises.
    """
    with ExitStack() as stack:
        if isinstance(source, (str, os.PathLike)):
            source = stack.enter_context(open_regular(local_path(source)))
        yield stack.enter_context(_identified(source))


def _identified(file: IO[bytes]) -> Image.Image:
    try:
        return Image.open(file, formats=decoders())
    except UnidentifiedImageError as error:
        file.seek(0)
        head = file.read(256)
        name = next((name for name, (begins, _) in EXTRA.items() if _begins(head, begins)), None)
        if name and _register(name):
            return Image.open(file, formats=decoders())
        if name:
            raise ValueError(f"{name}: no decoder is installed ({EXTRA[name][1]})") from error
        raise ValueError(_refusal(head)) from error


def decoders() -> tuple[str, ...]:
    """The formats of `DECODED` that this Pillow, or a plugin of it, has."""
    Image.init()
    return tuple(name for name in DECODED if name in Image.OPEN)


def _register(name: str) -> bool:
    """Has pillow-heif decode what Pillow does not. Says whether there is a decoder now."""
    try:
        import pillow_heif

        getattr(pillow_heif, f"register_{name.lower()}_opener", lambda: None)()
    except ImportError:
        pass
    return name in Image.OPEN


def _refusal(head: bytes) -> str:
    for name, (_, begins, why) in REFUSED.items():
        if _begins(head, begins):
            return f"{name} is not decoded ({why}): convert it to PNG or JPEG first"
    for name, begins in NO_IMAGES.items():
        if _begins(head, begins):
            return f"not an image: {name}, for which Pillow has no decoder"
    return "not an image that Pillow can identify (empty, cut short or another kind of file)"


def _begins(head: bytes, pattern: bytes) -> bool:
    return re.match(pattern, head, re.DOTALL) is not None


def open_regular(path: str | os.PathLike) -> IO[bytes]:
    """The file, open for reading. A pipe or a device would make whoever reads it wait for ever: a ValueError."""
    if is_url(path):
        return open_url(os.fspath(path))
    with ExitStack() as stack:
        try:
            file = stack.enter_context(open(path, "rb", opener=_without_waiting))
        except OSError as error:
            if error.errno == errno.ENXIO:  # a socket, or a device that is not there
                raise ValueError(irregular(os.stat(path).st_mode)) from error
            if isinstance(error, FileNotFoundError) and os.path.islink(path):
                raise FileNotFoundError(errno.ENOENT, "a link to what is not there", os.fspath(path)) from error
            raise
        mode = os.fstat(file.fileno()).st_mode
        if not stat.S_ISREG(mode):
            raise ValueError(irregular(mode))
        stack.pop_all()
    return file


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def irregular(mode: int) -> str:
    """What a path with this `st_mode` is instead of a file."""
    return f"{KINDS.get(stat.S_IFMT(mode), 'something else')}, not a regular file"


def local_path(path: str | os.PathLike) -> str:
    """`/a b.jpg` of `file:///a%20b.jpg`; a path as it is. Raises ValueError for a file elsewhere."""
    path = str(os.fspath(path))
    if path[:7].lower() != "file://":
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", path):
            raise ValueError(f"{path} is a URL: download it and pass its bytes")
        return path
    host, slash, rest = path[7:].partition("/")
    if host not in ("", "localhost"):
        raise ValueError(f"{path} is a file of another machine, {host!r}")
    quoted = slash + rest
    return quoted if os.path.exists(quoted) else unquote(quoted, errors="surrogateescape")
