#!/usr/bin/env bash
# torch 2.14.1, torchvision 0.29.1, numpy 2.2.6, pillow 12.3.0, Python 3.11, CPU with AVX2.
#
# The transforms v2 are documented as a drop-in replacement for v1, yet `resize` of one uint8 tensor with the
# same arguments gives other pixels: v1 computes in float and rounds at the end, v2 calls the kernel for uint8,
# which, as Pillow, rounds and clamps to 0..255 between the two directions. Bilinear differs by one level. Bicubic
# overshoots at edges, and what is clamped in between is lost: v1 and v2 are up to 11 levels apart in black and white
# squares, v2 and Pillow 1. Without AVX2 (here: ATEN_CPU_CAPABILITY=default) v2 computes bilinear in float as
# well: its pixels depend on the CPU. Output seen (largest difference, share of pixels that differ):
#   AVX2     bilinear  v1 and v2 (1, 0.02)  v2 and Pillow (0, 0.0)
#   AVX2     bicubic   v1 and v2 (11, 0.1)  v2 and Pillow (1, 0.0)
#   default  bilinear  v1 and v2 (0, 0.0)  v2 and Pillow (1, 0.02)
#   default  bicubic   v1 and v2 (11, 0.1)  v2 and Pillow (1, 0.0)
# So evaluate with the version of the transforms that the weights were trained with.
#
# Runs outside CI; needs a package index and a CPU with AVX2. Fails if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q numpy==2.2.6 pillow==12.3.0 torch==2.14.1 torchvision==0.29.1
cd "$work"
cat > resize.py <<'PY'
import sys

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as v1
from torchvision.transforms.v2 import functional as v2

SIZE = (224, 224)
generator = torch.Generator().manual_seed(0)
squares = 255 * torch.randint(2, (1, 60, 80), dtype=torch.uint8, generator=generator)
image = squares.repeat_interleave(5, 1).repeat_interleave(5, 2).expand(3, -1, -1).contiguous()


def apart(first, second):
    """Largest difference in grey levels, and the share of pixels that differ."""
    difference = (first.int() - second.int()).abs()
    return int(difference.max()), round(float((difference > 0).float().mean()), 2)


for mode in (InterpolationMode.BILINEAR, InterpolationMode.BICUBIC):
    one, two = (f.resize(image, SIZE, mode, antialias=True) for f in (v1, v2))
    filter = Image.Resampling[mode.name]
    pillow = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(SIZE[::-1], filter)
    pillow = torch.from_numpy(np.array(pillow)).permute(2, 0, 1)
    results = apart(one, two), apart(two, pillow)
    print(f"{sys.argv[1]:8} {mode.value:8}  v1 and v2 {results[0]}  v2 and Pillow {results[1]}")
    if mode is InterpolationMode.BICUBIC:
        assert results[0][0] > 5, "v1 and v2 agree in bicubic now"
        assert results[1][0] <= 2, "v2 is not Pillow's bicubic any more"
    elif sys.argv[1] == "default":
        assert results[0] == (0, 0.0), "without AVX2 v2 has other numbers than v1 now"
    else:
        assert results[0][0] == 1, "v1 and v2 agree in bilinear now"
PY
"$work/venv/bin/python" resize.py AVX2
ATEN_CPU_CAPABILITY=default "$work/venv/bin/python" resize.py default
