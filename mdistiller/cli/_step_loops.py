"""The training loops that the step benchmark compares, on generated images."""

from __future__ import annotations

import importlib
import itertools
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mdistiller.dataset import DATASETS, Data, DataSource, ImageSet, load_data
from mdistiller.dataset._build import Options
from mdistiller.distillers import Distiller, Output, get_distiller
from mdistiller.engine.build import build_distiller, build_network
from mdistiller.engine.cfg import Config
from mdistiller.engine.optim import autocast, build_optimizer
from mdistiller.engine.trainer import BaseTrainer, trainer_dict
from mdistiller.engine.utils import accuracy
from mdistiller.registry import UserError
from mdistiller.runtime import project_root

GENERATED = "generated_images"
SIZES = {"cifar": 32, "tiny_imagenet": 64, "imagenet": 224}
CLASSES = {"cifar10": 10, "digits": 10, "cifar": 100, "tiny_imagenet": 200, "imagenet": 1000}


def generated_data(cfg: Config, count: int, classes: int, device: torch.device) -> Data:
    """Random images in the place of the config's, read and augmented as those are.

    `cfg` is changed to name them. Without `classes`, their number is the data set's usual one.
    """
    kind = cfg.DATASET.TYPE
    source = DATASETS[kind]
    zoo = cfg.DATASET.ZOO or source.zoo
    classes = classes or CLASSES.get(kind, CLASSES[zoo])
    side = cfg.DATASET.IMAGE_SIZE or SIZES[zoo]

    class Generated(DataSource):
        root = "."
        mean, std = source.mean or (0.5,) * 3, source.std or (0.25,) * 3
        augment = source.augment

        def load(self, root: Path, split: str, options: Options) -> ImageSet:
            number = count if split == "train" else classes
            generator = torch.Generator().manual_seed(number)
            shape = (number, 3, side, side)
            images = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
            return ImageSet(
                images, torch.arange(number) % classes, [str(i) for i in range(classes)]
            )

    Generated.zoo = zoo
    DATASETS.pop(GENERATED, None)
    DATASETS.add(GENERATED, Generated)
    cfg.DATASET.TYPE, cfg.DATASET.ROOT = GENERATED, ""
    return load_data(cfg, device, get_distiller(cfg.DISTILLER.TYPE).two_views)


def untrained_distiller(cfg: Config, data: Data, device: torch.device) -> Distiller:
    """The config's distiller as a run builds it. Its teacher knows the images' statistics only."""
    if not get_distiller(cfg.DISTILLER.TYPE).uses_teacher:
        return build_distiller(cfg, data, device)
    torch.manual_seed(0)
    teacher = build_network(cfg, "TEACHER", data, weights="")
    images = next(iter(data.val))[0].cpu()
    with torch.no_grad():
        for _ in range(3):
            teacher.train()(images[:64])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "teacher.pth"
        torch.save({"model": teacher.state_dict()}, path)
        return build_distiller(cfg, data, device, path)


class Short:
    """A loader cut to `steps` batches an epoch; going on through the data from one to the next."""

    def __init__(self, loader: Any, steps: int):
        self.loader, self.steps = loader, steps
        self.batches = _endless(loader)

    def __len__(self) -> int:
        return self.steps

    def __getattr__(self, name: str) -> Any:
        if name == "set_epoch":  # the epochs are those of the whole loader
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(self.batches, self.steps)


def _endless(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


class Ours:
    """The config's trainer itself: whole epochs of `steps` steps, without hooks."""

    def __init__(self, cfg: Config, distiller: Distiller, data: Data, steps: int):
        self.loader = Short(data.train, steps)
        self.trainer: BaseTrainer = trainer_dict[cfg.SOLVER.TRAINER](
            "benchmark", distiller, self.loader, data.val, cfg
        )
        self.trainer.hooks = []

    def run(self) -> None:
        self.trainer.train_epoch(self.trainer.epoch + 1)


class Bare:
    """The same networks, loss and optimizer in a plain loop over one ready batch.

    The teacher is run as ours is, folded or not; nothing is measured, checked or shown.
    """

    def __init__(self, cfg: Config, distiller: Distiller, data: Data, steps: int):
        self.cfg, self.distiller, self.steps = cfg, distiller.train(), steps
        self.device = next(distiller.parameters()).device
        self.optimizer = build_optimizer(distiller.param_groups(), cfg.SOLVER)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=cfg.SOLVER.AMP == "fp16")
        self.batch = next(iter(data.train))

    def run(self) -> None:
        for _ in range(self.steps):
            self.step(self.batch)

    def step(self, batch: Any, epoch: int = 1) -> Tensor:
        """One step on (image, target, index); the loss."""
        with autocast(self.device, self.cfg.SOLVER.AMP):
            _, loss = plain_forward(self.distiller, batch, epoch, self.distiller.distill)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach()


def plain_forward(
    distiller: Distiller, batch: Any, epoch: int, distill: Callable[..., Tensor]
) -> tuple[Tensor, Tensor]:
    """Student logits, and the sum of cross-entropy and `distill`.

    A method with a training step of its own takes that instead.
    """
    image, target, index = batch
    if type(distiller).forward_train is not Distiller.forward_train:
        images = {"image": image}
        if isinstance(image, (list, tuple)):
            images = dict(zip(("image_weak", "image_strong"), image, strict=True))
        logits, terms = distiller.forward_train(**images, target=target, index=index, epoch=epoch)
        return logits, torch.stack(list(terms.values())).sum()
    logits, features = distiller.student(image)
    with torch.no_grad():
        teacher_net: Any = distiller.frozen or distiller.teacher
        other, other_features = teacher_net(image)
    with torch.autocast(logits.device.type, enabled=False):
        student = Output(logits.float(), features)
        teacher = Output(other.float(), other_features)
        loss = distiller.ce_loss_weight * F.cross_entropy(
            student.logits, target, label_smoothing=distiller.label_smoothing
        )
        student, teacher = distiller.standardized(student), distiller.standardized(teacher)
        return student.logits, loss + distill(student, teacher, target, epoch=epoch, index=index)


class Classic:
    """The usual script: images through PIL one by one, textbook losses, numbers read every step.

    Always in full precision; the teacher is run as it is.

    Attributes:
        textbook: whether the method's loss is the textbook form, else it is ours.
    """

    def __init__(self, cfg: Config, distiller: Distiller, data: Data, steps: int, workers: int):
        distiller.frozen = None
        self.distiller, self.steps = distiller.train(), steps
        self.device = next(distiller.parameters()).device
        self.optimizer = build_optimizer(distiller.param_groups(), cfg.SOLVER)
        distill = textbook_loss(cfg)
        self.textbook = distill is not None
        self.distill = distill or distiller.distill
        self.batches = _endless(classic_loader(cfg, data, workers))
        self.seen: list[tuple[float, ...]] = []

    def run(self) -> None:
        for batch in itertools.islice(self.batches, self.steps):
            self.step(batch)

    def step(self, batch: Any, epoch: int = 1) -> float:
        """One step on (image, target, index); the loss."""
        batch = [item.to(self.device, non_blocking=True) for item in batch]
        logits, loss = plain_forward(self.distiller, batch, epoch, self.distill)
        top1, top5 = accuracy(logits.detach(), batch[1], (1, 5))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.seen = [*self.seen[-99:], (loss.item(), top1.item(), top5.item())]
        return self.seen[-1][0]


def classic_loader(cfg: Config, data: Data, workers: int) -> Any:
    """A DataLoader over PIL images with version 1 of torchvision's transforms."""
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset
    from torchvision import transforms

    height, width = data.image_size
    named: dict[str, list[Any]] = {
        "none": [],
        "crop": [transforms.RandomCrop((height, width), padding=height // 16)],
        "crop_flip": [
            transforms.RandomCrop((height, width), padding=height // 8),
            transforms.RandomHorizontalFlip(),
        ],
        "resized_crop_flip": [
            transforms.RandomResizedCrop((height, width)),
            transforms.RandomHorizontalFlip(),
        ],
    }
    kind = cfg.DATASET.AUGMENT
    kind = DATASETS[cfg.DATASET.TYPE].augment if kind == "default" else kind
    if kind not in named:
        raise UserError(f"the classic loop knows no DATASET.AUGMENT {kind}: set --loops ours bare")
    normalize = transforms.Normalize(data.mean, data.std)
    pipeline = transforms.Compose([*named[kind], transforms.ToTensor(), normalize])
    arrays = data.train.dataset.images.permute(0, 2, 3, 1).cpu().numpy()
    targets = data.train.dataset.targets.tolist()

    class Images(Dataset[Any]):
        def __len__(self) -> int:
            return len(targets)

        def __getitem__(self, index: int) -> Any:
            return pipeline(Image.fromarray(arrays[index])), targets[index], index

    return DataLoader(
        Images(),
        cfg.SOLVER.BATCH_SIZE,
        shuffle=True,
        num_workers=workers,
        pin_memory=data.train.dataset.images.is_cuda,
        persistent_workers=workers > 0,
    )


def textbook_loss(cfg: Config) -> Callable[..., Tensor] | None:
    """The method's weighted loss in the form that the tests keep; None where there is none."""
    name = cfg.DISTILLER.TYPE
    if name not in ("KD", "DKD") or cfg.LSKD.ENABLE or cfg.EXPERIMENT.LOGIT_STAND:
        return None
    if name == "DKD" and cfg.DKD.MODE != "dkd":
        return None
    forms, node = kept_with_tests("textbook"), cfg[name]

    def kd(student: Output, teacher: Output, target: Tensor, **batch: Any) -> Tensor:
        loss: Tensor = forms.kd(student.logits, teacher.logits, node.TEMPERATURE)
        return node.LOSS.KD_WEIGHT * loss

    def dkd(student: Output, teacher: Output, target: Tensor, **batch: Any) -> Tensor:
        weights = node.ALPHA, node.BETA
        loss: Tensor = forms.dkd(student.logits, teacher.logits, target, *weights, node.T)
        return min(batch["epoch"] / node.WARMUP, 1.0) * loss

    return kd if name == "KD" else dkd


def kept_with_tests(name: str) -> Any:
    """A module of textbook forms; they are in a checkout, not in the package."""
    folder = project_root() / "tests" / "distillers"
    if not (folder / f"{name}.py").is_file():
        raise UserError(
            f"the textbook forms are with the tests, and {folder} is not there: run "
            "tools/benchmark.py from a checkout of the repository"
        )
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    return importlib.import_module(name)
