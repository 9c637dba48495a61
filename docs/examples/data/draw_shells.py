"""Draw a small data set, as arrays and as files: python draw_shells.py data/shells"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ["cockle", "limpet", "whelk"]

root, rng = Path(sys.argv[1]), np.random.default_rng(0)
for split, count in (("train", 40), ("test", 12)):
    y = np.arange(len(CLASSES) * count) % len(CLASSES)
    x = rng.integers(0, 120, (len(y), 32, 32, 3), dtype=np.uint8)
    x[np.arange(len(y)), :, :, y] += 100  # a class is a colour
    for i, (pixels, k) in enumerate(zip(x, y, strict=True)):
        folder = root / "images" / split / CLASSES[k]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    np.savez(root / f"{split}.npz", x=x, y=y)
