#!/usr/bin/env bash
# pillow 13.0.0, numpy 2.2.6, Python 3.11.
#
# `Image.draft` has JPEGs decoded at 1/2, 1/4 or 1/8, to save time before a resize. The size is rounded up:
# of 4001 x 3001 pixels 1/8 are 501 x 376, and the last row and column stand for 1 of 8 source pixels. A plain
# resize of that takes it for the whole image, stretched by 501 / 500.125: content moves by up to
# 0.9 pixels of the reduced image, most at the lower right. `draft` returns the part that is image, as
# (mode, box); `resize(box=box)` puts everything where the resize of the whole image has it. Where the sides are
# multiples of 8, as those of most cameras, nothing is seen. `Image.thumbnail` passes the box by itself.
# Fine stripes, resized to 224 x 168; difference from the resize of the whole image in grey levels; output seen:
#   4000 x 3000 -> 500 x 375  plain: largest 2, mean 0.49   with box: largest 2, mean 0.49
#   4001 x 3001 -> 501 x 376  plain: largest 25, mean 5.94  with box: largest 4, mean 0.41
#
# Runs outside CI; needs a package index. Fails if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q numpy==2.2.6 pillow==13.0.0
cd "$work"
cat > draft.py <<'PY'
import io

import numpy as np
from PIL import Image

TARGET = (224, 168)


def stripes(width, height):
    """A JPEG of smooth stripes in both directions."""
    x = np.sin(np.linspace(0, 40 * np.pi, width))[None]
    y = np.sin(np.linspace(0, 30 * np.pi, height))[:, None]
    grey = (127 + 60 * x + 60 * y).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(np.stack([grey] * 3, axis=-1)).save(file, "JPEG", quality=95)
    return file


def resized(image, box=None):
    return np.asarray(image.resize(TARGET, Image.Resampling.BILINEAR, box=box)).astype(int)


means = {}
for width, height in ((4000, 3000), (4001, 3001)):
    file = stripes(width, height)
    whole = resized(Image.open(file))
    reduced = Image.open(file)
    _, box = reduced.draft("RGB", TARGET)
    texts = []
    for name, part in (("plain", None), ("with box", box)):
        apart = np.abs(resized(reduced, part) - whole)
        means[width, name] = apart.mean()
        texts.append(f"{name}: largest {apart.max()}, mean {apart.mean():.2f}")
    size = f"{width} x {height} -> {reduced.size[0]} x {reduced.size[1]}"
    print(f"{size}  {texts[0]:31}{texts[1]}")
assert means[4000, "plain"] == means[4000, "with box"] < 1
assert means[4001, "with box"] < 1, "the box does not repair the shift any more"
assert means[4001, "plain"] > 5 * means[4001, "with box"], "the reduced image is not shifted now"
PY
"$work/venv/bin/python" draft.py
