"""What a row depends on, in a form that can be compared: its input, the weights, the settings, the versions.

An input is known by the size and the modification time of the file that holds it, as they were both before and after it
was read: its stamp. The weights are known by all their bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from siglip2_packed.remote import is_url, recent_state
from siglip2_packed.version import __version__

if TYPE_CHECKING:
    from torch import Tensor

LONGEST_PATH = 1 << 15
"""Characters, on any system."""
ABSENT, UNSTEADY = UNKNOWN = "absent", "unsteady"
"""The stamps of what is not there, and of what changed while it was read, or may have: no other is like that one, not
even itself."""
TOWER = (
    "hidden_size intermediate_size num_hidden_layers num_attention_heads num_channels patch_size hidden_act "
    "layer_norm_eps"
).split()


def stamp(path: str | os.PathLike) -> str:
    """Size and modification time in nanoseconds, or that there is no such file; of a URL what its server tells."""
    if is_url(path):
        return recent_state(os.fspath(path)) or UNSTEADY
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return ABSENT
    return f"{found.st_size}:{found.st_mtime_ns}"


def joint(container: str, file: str, path: str) -> str:
    """The stamp of an input that a container names and a file holds: a row of paths in a Parquet file."""
    if not container:
        return file
    possible = len(path) <= LONGEST_PATH and "\0" not in path  # else it is an image as text, and never will be a file
    return f"{container} {file} {path}" if possible else container


def same(before: str, container: str) -> bool:
    """Whether a recorded stamp still holds, given that of the input's file or container now."""
    mine, *rest = before.split(" ", 2)
    return mine == container != UNSTEADY and (not rest or rest[0] == stamp(rest[1]))


def lost(before: str, container: str) -> bool:
    """Whether a file of a recorded stamp, known then, is not there now, or its server does not tell."""
    mine, *rest = before.split(" ", 2)
    states = [(mine, container), *([(rest[0], stamp(rest[1]))] if rest else [])]
    return any(now in UNKNOWN and then not in UNKNOWN for then, now in states)


def versions(decode: str = "exact") -> dict[str, str]:
    """Of what may change a feature."""
    import PIL
    import torch
    import transformers

    found = {
        "siglip2_packed": __version__,
        "pillow": PIL.__version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }
    return found | ({"torchvision": version("torchvision")} if decode == "gpu" else {})


def tower(config: Any) -> dict[str, Any]:
    """What the computation takes from the configuration."""
    from siglip2_packed.kinds import num_patches, position_mode

    fields = {name: getattr(config, name) for name in TOWER}
    return {**fields, "num_patches": num_patches(config), "position_mode": position_mode(config)}


def weights_digest(weights: Mapping[str, Tensor], threads: int = 1) -> str:
    """Of all bytes of a state dict, in the dtype they have: 0.7 s a GB and thread."""
    import torch

    def digest(item: tuple[str, Tensor]) -> bytes:
        name, tensor = item
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        found = hashlib.sha256(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(data)
        return found.digest()

    with ThreadPoolExecutor(threads) as pool:
        return hashlib.sha256(b"".join(pool.map(digest, weights.items()))).hexdigest()[:32]


def run_digest(settings: dict[str, Any]) -> str:
    """Of all that rows have in common: the settings, less which inputs there are, which share of
    them this is, and what the checkpoint is called."""
    common = {name: value for name, value in settings.items() if name not in ("inputs", "names", "checkpoint", "share")}
    return hashlib.sha256(json.dumps(common, sort_keys=True).encode()).hexdigest()[:32]


def flat(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`{"versions": {"torch": x}}` -> `("versions.torch", x)`."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
