"""The image processor's files: read, judged, written, as those of transformers' image processors.

What is judged is whether the settings are SigLIP2's: those of another processor would give other pixels.
"""

from __future__ import annotations

import json
import math
import operator
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from transformers.utils.hub import PushToHubMixin

from siglip2_packed.files import find_file, read_json
from siglip2_packed.formats import DECODE

if TYPE_CHECKING:
    from typing_extensions import Self

CONFIG_FILES = ("processor_config.json", "preprocessor_config.json")
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


def positive_int(name: str, value: Any) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if number < 1 or isinstance(value, bool):
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return number


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def optional_flag(name: str, value: Any) -> bool | None:
    return None if value is None else flag(name, value)


def factor(name: str, value: Any) -> float:
    if not _is_number(value) or not value > 0:
        raise ValueError(f"{name} must be a number above 0, got {value!r}")
    return float(value)


def rgb(name: str, value: float | Iterable[float]) -> tuple[float, float, float]:
    values = list(value) if isinstance(value, Iterable) and not isinstance(value, (str, bytes)) else [value]
    if len(values) not in (1, 3) or not all(map(_is_number, values)):
        raise ValueError(f"{name} must be 1 or 3 finite numbers, got {value!r}")
    r, g, b = map(float, values * 3 if len(values) == 1 else values)
    return r, g, b


def deviation(name: str, value: float | Iterable[float]) -> tuple[float, float, float]:
    values = rgb(name, value)
    if 0 in values:
        raise ValueError(f"{name} must not hold 0, got {values}")
    if min(values) < 0:
        raise ValueError(f"{name} must be positive, got {values}")
    return values


def resampling(name: str, value: Any) -> Image.Resampling:
    try:
        if isinstance(value, bool):
            raise TypeError
        return Image.Resampling(operator.index(value))
    except (TypeError, ValueError):
        known = ", ".join(f"{x.value} ({x.name})" for x in Image.Resampling)
        raise ValueError(f"{name} must be one of {known}, got {value!r}") from None


def decoding(name: str, value: Any) -> str:
    if value not in DECODE:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, DECODE))}, got {value!r}")
    return value


def _is_number(value: Any) -> bool:
    if isinstance(value, (bool, str, bytes)) or not hasattr(value, "__float__"):
        return False
    return math.isfinite(float(value))


SETTINGS: dict[str, Callable[[str, Any], Any]] = {  # and what each has to be
    "patch_size": positive_int,
    "max_num_patches": positive_int,
    "do_resize": flag,
    "do_rescale": flag,
    "rescale_factor": factor,
    "do_normalize": flag,
    "image_mean": rgb,
    "image_std": deviation,
    "resample": resampling,
    "do_convert_rgb": optional_flag,
}
UNSAVED = ("num_threads", "decode")
"""Settings that no file holds: they belong to the machine, and to what was asked for there."""
OTHER_PIXELS = set(  # other processors' fields that, where they are on, change pixels or what they are cut into
    """
    crop_margin crop_pct crop_size crop_to_patches do_affine_transform do_align_long_axis do_center_crop
    do_color_jitter do_crop_margin do_flip_channel_order do_grayscale do_image_splitting do_pan_and_scan
    do_reduce_labels do_sample_frames do_split_image do_thumbnail downsample_factor image_grid_pinpoints
    include_top keep_aspect_ratio max_image_size max_image_tokens max_pixels max_tiles merge_size min_image_tokens
    min_pixels min_tiles rescale_offset shortest_edge size size_divisor temporal_patch_size tile_size use_thumbnail
    """.split()
)
IDLE = set(  # fields that change nothing of a packed image
    """
    auto_map background_color data_format default_to_square device disable_grouping do_pad feature_extractor_type
    image_processor_type input_data_format model_input_names num_threads pad_size processor_class return_tensors
    """.split()
)
SWITCHED = {  # fields that mean nothing where their switch is there, and off
    "do_center_crop": {"crop_size", "crop_pct"},
    "do_image_splitting": {"max_tiles", "min_tiles", "tile_size", "use_thumbnail"},
}
ONE = {"downsample_factor", "merge_size", "temporal_patch_size"}  # off at 1


class ProcessorFiles(PushToHubMixin):
    """The files' half of `Siglip2PackedImageProcessor`; the constructor takes the settings."""

    @classmethod
    def from_pretrained(cls, checkpoint: str | os.PathLike, **arguments: Any) -> Self:
        """Reads `preprocessor_config.json`, or the `image_processor` part of `processor_config.json`, which comes first
        as in transformers. Keys it does not know are named in a warning, if they are on.

        Args:
            checkpoint: a folder (no network is used) or a Hugging Face hub id.
            arguments: constructor arguments that replace the file's, and the hub's `revision`, `token`, `cache_dir`,
                `subfolder`, `local_files_only`, `force_download`.

        Raises:
            OSError: no such file, or one that is not JSON.
            ValueError: the file is that of another processor, such as CLIP's or a fixed-resolution SigLIP's, or has
                settings that change pixels in ways this one does not know, or wrong values.
        """
        hub = {name: arguments.pop(name) for name in HUB_ARGUMENTS if name in arguments}
        config, source = _read_config(checkpoint, hub)
        return cls(**{**_settings(config, source, arguments), **arguments})

    @classmethod
    def from_dict(cls, image_processor_dict: Mapping[str, Any], **arguments: Any) -> Any:
        """From what `to_dict` gives; `arguments` as in `from_pretrained`. With `return_unused_kwargs=True`, also what
        of them is no setting."""
        unused = {}
        wants_unused = arguments.pop("return_unused_kwargs", False)
        if wants_unused:
            unused = {name: value for name, value in arguments.items() if name not in (*SETTINGS, *UNSAVED)}
            arguments = {name: value for name, value in arguments.items() if name not in unused}
        processor = cls(**{**_settings(image_processor_dict, "image_processor_dict", arguments), **arguments})
        return (processor, unused) if wants_unused else processor

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike) -> Self:
        """From a file that `to_json_file` wrote."""
        return cls(**_settings(read_json(Path(json_file)), str(json_file), {}))

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """Writes `preprocessor_config.json`, which transformers' `Siglip2ImageProcessor` loads too; returns its path.

        Args:
            save_directory: made if it does not exist.
            push_to_hub: and push it, to `repo_id` (by default the folder's name); `kwargs` are `push_to_hub`'s.
        """
        path = Path(save_directory) / "preprocessor_config.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        self.to_json_file(path)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)
        return [str(path)]

    def to_dict(self) -> dict[str, Any]:
        """The settings as the file holds them, which are all but those in `UNSAVED`."""
        settings = {name: getattr(self, name) for name in SETTINGS}
        settings.update({name: list(settings[name]) for name in ("image_mean", "image_std")})
        settings["resample"] = int(settings["resample"])
        return {"image_processor_type": "Siglip2ImageProcessor", **settings}

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def to_json_file(self, json_file_path: str | os.PathLike) -> None:
        Path(json_file_path).write_text(self.to_json_string(), encoding="utf-8")


def _settings(config: Mapping[str, Any], source: str, replaced: Mapping[str, Any]) -> dict[str, Any]:
    """The settings among a file's fields, checked; not those that `replaced` replaces, of which null says nothing."""
    kind = str(config.get("image_processor_type") or config.get("feature_extractor_type") or "")
    if kind.lower().startswith("siglip") and not kind.lower().startswith("siglip2"):
        raise ValueError(
            f"{source} is of {kind}: a fixed-resolution SigLIP. A NaFlex checkpoint is needed "
            "(Siglip2ImageProcessor, such as google/siglip2-base-patch16-naflex)"
        )
    if kind and not kind.lower().startswith("siglip2"):
        raise ValueError(
            f"{source}: image_processor_type is {kind}, whose pixels are others; expected Siglip2ImageProcessor. Of "
            "another model's tower, give patch_size, image_mean and image_std to the constructor"
        )
    on = [name for name, value in config.items() if name not in SETTINGS and name not in IDLE and _on(name, value)]
    idle = {name for switch, names in SWITCHED.items() if switch in config and switch not in on for name in names}
    for name in on:
        if name in OTHER_PIXELS and name not in idle:
            raise ValueError(f"{source}: {name} is {config[name]!r}, which SigLIP2's pixels know nothing of")
    if unknown := [name for name in on if name not in OTHER_PIXELS and not name.startswith("_")]:
        warnings.warn(f"{source}: not known, and passed over: {', '.join(unknown)}", stacklevel=3)
    settings = {name: config[name] for name in SETTINGS if config.get(name) is not None and replaced.get(name) is None}
    for name, value in settings.items():
        try:
            SETTINGS[name](name, value)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None
    return settings


def _on(name: str, value: Any) -> bool:
    return bool(value) and not (name in ONE and value == 1)


def _read_config(checkpoint: str | os.PathLike, hub: dict[str, Any]) -> tuple[dict[str, Any], str]:
    name = os.fspath(checkpoint)
    looks_local = os.path.isabs(name) or name.startswith((".", "~")) or name.count("/") > 1
    if looks_local and not Path(name).expanduser().is_dir():
        raise FileNotFoundError(f"{name} is not a folder")
    for file in CONFIG_FILES:
        path = find_file(name, file, **hub)
        if path is None:
            continue
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise OSError(f"{path} is not a JSON file: {error}") from error
        config = read_json(path)
        if file == "processor_config.json":
            if "image_processor" not in config:
                continue
            config = config["image_processor"]
            if not isinstance(config, dict):
                raise ValueError(f"{path}: image_processor is {config!r}, expected an object")
        return config, str(path)
    raise OSError(
        f"{name} holds no preprocessor_config.json (nor an image_processor in processor_config.json). Where it never "
        f"had one, as timm's: Siglip2PackedImageProcessor(patch_size=16).save_pretrained({name!r})"
    )
