"""The files of a checkpoint: in a folder, or in a hub repository. What they name is never trusted.

Shards are those that the index names, and a tensor is where the index says.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import transformers.utils.hub
from huggingface_hub import constants
from huggingface_hub.utils import HFValidationError, get_session, validate_repo_id
from safetensors import SafetensorError, safe_open
from transformers.utils import cached_file

SAFETENSORS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "model.pth")


def find_file(ckpt: str | os.PathLike, name: str, **hub: Any) -> Path | None:
    """A file of a local folder, or of a hub repository through transformers' cache; None if it has no such file.

    Raises:
        FileNotFoundError: no such folder, and no repository that is in the cache or could be reached.
    """
    folder = Path(ckpt).expanduser()
    if folder.is_dir():
        path = folder / (hub.get("subfolder") or "") / name
        return path if path.is_file() else None
    if folder.is_file():
        raise FileNotFoundError(f"{str(ckpt)!r} is a file: give the folder that it is in")
    if folder.is_absolute() or str(ckpt).startswith((".", "~")) or str(ckpt).count("/") > 1:
        raise FileNotFoundError(f"checkpoint folder {str(ckpt)!r} does not exist")
    if not _asks_hub(str(ckpt), hub):
        hub["local_files_only"] = True
    found = cached_file(ckpt, name, _raise_exceptions_for_missing_entries=False, **hub)
    return None if found is None else Path(found)


def _asks_hub(ckpt: str, hub: dict) -> bool:
    """Whether the hub is asked for its files of this name; not where each would take a minute of retries.

    Raises:
        FileNotFoundError: it is not, and none is in the cache.
    """
    try:
        validate_repo_id(ckpt)
    except HFValidationError as error:
        raise FileNotFoundError(f"no folder {ckpt!r} here, and a hub id cannot look so") from error
    offline = constants.HF_HUB_OFFLINE or hub.get("local_files_only")
    # what goes through a proxy of this call's own is for the hub's client to find out
    if not offline and (hub.get("proxies") or _answers(constants.ENDPOINT, int(time.monotonic()) // 60)):
        return True
    cache = str(hub.get("cache_dir") or getattr(transformers.utils.hub, "TRANSFORMERS_CACHE", constants.HF_HUB_CACHE))
    if not Path(cache, f"models--{ckpt.replace('/', '--')}", "snapshots").is_dir():
        why = "is not asked (HF_HUB_OFFLINE or local_files_only)" if offline else "cannot be reached"
        raise FileNotFoundError(
            f"no folder {ckpt!r} here; as a hub id it is not in the cache {cache}, and the hub {why}"
        )
    return False


@lru_cache(maxsize=8)
def _answers(endpoint: str, minute: int) -> bool:
    """Whether the hub can be reached; asked once in a minute."""
    try:
        get_session().head(endpoint, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception:  # of requests or of httpx, as the hub's version has it
        return False
    return True


def read_json(path: Path) -> dict:
    """A JSON object; ValueError, with the path, for anything else, and for a key that is given twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict:
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            raise ValueError(f"key {max(names, key=names.count)!r} is given twice")
        return dict(pairs)

    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type(value).__name__}, expected an object")
    return value


@contextlib.contextmanager
def open_weights(path: Path) -> Iterator[Any]:
    """`safe_open`, whose errors do not say which file is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}") from error


def weight_files(ckpt: str | os.PathLike, **hub: Any) -> dict[Path, list[str]]:
    """Weight files and the keys to read from each.

    Raises:
        FileNotFoundError: no weights, or a shard that the index names is missing.
        ValueError: pickle weights only; a single file and shards side by side; an index that its shards contradict.
    """
    single, index = find_file(ckpt, SAFETENSORS, **hub), find_file(ckpt, INDEX, **hub)
    if index is None:
        if single is None:
            raise _no_weights(ckpt, hub)
        with open_weights(single) as file:
            return {single: list(file.keys())}
    places = _read_index(index)
    shards = {name: find_file(ckpt, name, **hub) for name in sorted(set(places.values()))}
    if single is not None:
        if not any(path and name != SAFETENSORS for name, path in shards.items()):
            with open_weights(single) as file:
                return {single: list(file.keys())}  # saved over shards, whose index is left
        raise ValueError(
            f"{str(ckpt)!r} holds two checkpoints, {SAFETENSORS} and the shards of {INDEX}: one is older and cannot be "
            "told from the other. Move away the one that is not meant"
        )
    missing = [name for name, path in shards.items() if path is None]
    if missing:
        raise FileNotFoundError(f"{INDEX} in {str(ckpt)!r} names shards that are not there: {', '.join(missing)}")
    return _check_shards(index, places, {name: path for name, path in shards.items() if path is not None})


def read_shapes(ckpt: str | os.PathLike, **hub: Any) -> dict[str, list[int]]:
    """The shapes of a checkpoint's tensors, from the files' headers."""
    shapes = {}
    for path, keys in weight_files(ckpt, **hub).items():
        with open_weights(path) as file:
            shapes.update({key: file.get_slice(key).get_shape() for key in keys})
    return shapes


def _read_index(index: Path) -> dict[str, str]:
    """key -> name of the shard it is in."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{index} has no weight_map")
    for key, name in places.items():
        if not isinstance(name, str) or not name.endswith(".safetensors") or set(name) & {"/", "\\", "\0", ":"}:
            raise ValueError(
                f"{index}: weight_map has {key!r} in {name!r}; expected the name of a .safetensors file beside it"
            )
    return places


def _check_shards(index: Path, places: dict[str, str], shards: dict[str, Path]) -> dict[Path, list[str]]:
    """What to read from which shard, where each tensor is in one shard, the one the index says."""
    files: dict[Path, list[str]] = {}
    first: dict[str, str] = {}
    for name, path in shards.items():
        with open_weights(path) as file:
            keys = list(file.keys())
        for key in keys:
            if key in first:
                raise ValueError(f"{index}: {key!r} is in two shards, {first[key]} and {name}")
            first[key] = name
        files[path] = [key for key in keys if places.get(key) == name]
    for key, name in places.items():
        if first.get(key) != name:
            where = f"it is in {first[key]}" if key in first else "it is in none"
            raise ValueError(f"{index} has {key!r} in {name}, but {where}")
    return files


@contextlib.contextmanager
def replacing_weights(folder: str | os.PathLike) -> Iterator[None]:
    """Weights that are saved within replace those that the folder held in the other form, single or in shards."""

    def written(name: str) -> int | None:
        path = Path(folder, name)
        return path.stat().st_mtime_ns if path.is_file() else None

    before = {name: written(name) for name in (SAFETENSORS, INDEX)}
    yield
    for name, other in ((INDEX, SAFETENSORS), (SAFETENSORS, INDEX)):
        if before[other] is not None and written(name) not in (None, before[name]):
            Path(folder, other).unlink(missing_ok=True)
            return


def share(folder: str | os.PathLike) -> None:
    """Gives a folder's weights the permissions of its config.json: safetensors makes files for their owner alone."""
    config = Path(folder) / "config.json"
    for file in Path(folder).glob("*.safetensors"):
        with contextlib.suppress(OSError):  # another user's, or a file system without permissions
            shutil.copymode(config, file)


def _no_weights(ckpt: str | os.PathLike, hub: dict) -> Exception:
    pickles = [name for name in PICKLES if find_file(ckpt, name, **hub) is not None]
    if pickles:
        return ValueError(
            f"{str(ckpt)!r} has pickle weights only ({', '.join(pickles)}), which can run code when opened and are not "
            "loaded. If you trust the file, convert it: safetensors.torch.save_file(torch.load('pytorch_model.bin', "
            "weights_only=True), 'model.safetensors')"
        )
    return FileNotFoundError(f"no {SAFETENSORS} and no {INDEX} in {str(ckpt)!r}")
