#!/usr/bin/env bash
# Pillow 13.0.0: Image.resize (bilinear, bicubic, Lanczos) gives other pixels than 12.1.1 where the height loses more than twice as
# many pixels as the width: it resizes the height first, where it was the width, and rounds to 8 bits in between. 12.3.0 does so
# with images more than a hundred times as tall as wide. A portrait of 1080x1920 made 384x384, as processors of SigLIP and CLIP
# do it, differs in 25% of its levels by 1 (bilinear), in 28% by up to 9 (bicubic); the same in landscape, and one of 3:4, in none.
# Features made before and after an upgrade are of different pixels, a search's query and its collection, too.
#
# Exit code: 0 as described, 1 otherwise. Installs Pillow 12.1.1, 12.3.0, 13.0.0 and NumPy in a folder that is removed at the end.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --target "$folder/numpy" numpy
for version in 12.1.1 12.3.0 13.0.0; do
    python3 -m pip install --quiet --no-deps --target "$folder/$version" "pillow==$version"
done
cd "$folder"
cat > resize.py <<'PYTHON'
import sys

import numpy as np
import PIL
from PIL import Image

RESAMPLE = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS}
SIZES = {"portrait": (1080, 1920), "landscape": (1920, 1080), "3:4": (1512, 2016), "strip": (12, 2000)}
levels = {}
for name, (width, height) in SIZES.items():
    coarse = np.random.default_rng(0).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    image = Image.fromarray(coarse.repeat(4, axis=0).repeat(4, axis=1)[:height, :width])  # no resize yet
    size = (384, 384) if name != "strip" else (6, 1000)
    for filter_, resample in RESAMPLE.items():
        levels[f"{name} {filter_}"] = np.asarray(image.resize(size, resample))
        by_width = image.resize((size[0], height), resample).resize(size, resample)
        by_height = image.resize((width, size[1]), resample).resize(size, resample)
        levels[f"{name} {filter_} by width"], levels[f"{name} {filter_} by height"] = map(np.asarray, (by_width, by_height))
np.savez(sys.argv[1], **levels)
print("Pillow", PIL.__version__)
PYTHON
for version in 12.1.1 12.3.0 13.0.0; do
    PYTHONPATH="$folder/numpy:$folder/$version" python3 resize.py "$version.npz"
done
PYTHONPATH="$folder/numpy" python3 - <<'PYTHON'
import sys

import numpy as np

old, tall, new = (np.load(f"{version}.npz") for version in ("12.1.1", "12.3.0", "13.0.0"))
described = True
for name in ("portrait", "landscape", "3:4", "strip"):
    for filter_ in ("bilinear", "bicubic", "lanczos"):
        key = f"{name} {filter_}"
        order = ["width" if np.array_equal(x[key], x[f"{key} by width"]) else "height" for x in (old, tall, new)]
        right = all(np.array_equal(x[key], x[f"{key} by {by}"]) for x, by in zip((old, tall, new), order))
        apart = np.abs(old[key].astype(int) - new[key])
        print(f"{key:<20} first: {order}, levels that 13.0.0 changes: {(apart > 0).mean():.1%}, by up to {apart.max()}")
        expected = {"portrait": ["width", "width", "height"], "strip": ["width", "height", "height"]}.get(name, ["width"] * 3)
        described &= right and order == expected and ((apart > 0).mean() > 0.1) == (name in ("portrait", "strip"))
sys.exit(not described)
PYTHON
