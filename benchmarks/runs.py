"""Short runs of several methods under one teacher, as configs on generated images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

METHODS: dict[str, dict[str, Any]] = {  # those of configs/sweeps/study_cifar10.yaml
    "NONE": {},
    "KD": {},
    "LSKD": {
        "DISTILLER": {"TYPE": "KD"},
        "LSKD": {"ENABLE": True},
        "KD": {"TEMPERATURE": 2.0, "LOSS": {"CE_WEIGHT": 0.1, "KD_WEIGHT": 9.0}},
    },
    "DKD": {"DKD": {"BETA": 2.0, "WARMUP": 2}},
    "DGKD": {"DGKD": {"BETA": 2.0, "WARMUP": 2}},
    "DIST": {},
    "AT": {},
    "CRD": {},
    "REVIEWKD": {},
}

SOURCE = '''"""Random images of 32 x 32 pixels in ten classes."""

import torch

from mdistiller.dataset import DATASETS, DataSource, ImageSet


@DATASETS.register("{name}")
class RandomImages(DataSource):
    root, zoo, augment = ".", "cifar", "crop_flip"
    mean, std = (0.5,) * 3, (0.29,) * 3

    def load(self, root, split, options):
        number = {images} if split == "train" else 100
        generator = torch.Generator().manual_seed(number)
        images = torch.randint(256, (number, 3, 32, 32), dtype=torch.uint8, generator=generator)
        return ImageSet(images, torch.arange(number) % 10, [str(i) for i in range(10)])
'''


def write_runs(
    folder: Path,
    methods: Sequence[str],
    *,
    teacher: str = "resnet56",
    student: str = "resnet8",
    images: int = 2000,
    epochs: int = 2,
    batch: int = 64,
    device: str = "cpu",
    amp: str = "none",
) -> dict[str, Path]:
    """Write a config for each method, the images' source, and untrained weights of the teacher.

    Checkouts of earlier versions read them too.

    Args:
        methods: names of METHODS or of distillers.
    """
    import torch

    from mdistiller.models import get_model_entry

    folder = folder.absolute()
    torch.manual_seed(0)
    net = get_model_entry(teacher, "cifar")(num_classes=10)
    with torch.no_grad():  # batch norms with the statistics of such images
        net.train()(torch.randn(64, 3, 32, 32))
    torch.save({"model": net.state_dict()}, folder / "teacher.pth")
    kind = f"random_{folder.name}"  # a process may import the files of several folders
    source = SOURCE.replace("{images}", str(images)).replace("{name}", kind)
    (folder / "random_images.py").write_text(source)
    paths = {}
    for name in methods:
        config: dict[str, Any] = {
            "IMPORTS": [str(folder / "random_images.py")],
            "DEVICE": device,
            "EXPERIMENT": {"PROJECT": "runs", "NAME": name},
            "DATASET": {"TYPE": kind},
            "DISTILLER": {"TYPE": name, "TEACHER": teacher, "STUDENT": student},
            "SOLVER": {"BATCH_SIZE": batch, "EPOCHS": epochs, "LR_DECAY_STAGES": [1], "AMP": amp},
            "LOG": {"PREFIX": str(folder / "out")},
        }
        config["DISTILLER"]["TEACHER_CKPT"] = str(folder / "teacher.pth")
        for key, values in METHODS.get(name, {}).items():
            config.setdefault(key, {}).update(values)
        paths[name] = folder / f"{name}.yaml"
        paths[name].write_text(json.dumps(config))  # JSON is YAML
    return paths
