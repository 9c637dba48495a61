"""Writing of the files: each is run and compared with PyTorch before it gets its name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mdistiller.dataset.memory.loader import Normalize
from mdistiller.export.files import FORMATS, Exported, Runner, check_packages, quiet
from mdistiller.export.student import Deployed, Student
from mdistiller.files.atomic import replacing
from mdistiller.registry import UserError, first_line

TOLERANCE = 1e-4
BATCHES = (1, 3, 8)  # none of them is the batch that was traced


def export_student(
    student: Student,
    out: Path,
    formats: Sequence[str] = ("safetensors", "onnx", "torch"),
    normalization: bool = True,
    force: bool = False,
    opset: int | None = None,
    dynamic_batch: bool = True,
    also: Sequence[str] = (),
) -> list[Exported]:
    """Write a student to `out` in several formats, each verified.

    Args:
        normalization: part of the exported network, where the format can hold it.
        force: replace files that are there.
        opset: of ONNX; None: the exporter's usual one.
        dynamic_batch: make ONNX for any batch size; else for one image.
        also: names of further files that will be written there.

    Raises:
        UserError: a package is missing, a file is there, or a file does not agree with the
            network; it is then not written, and one that was there stays.
    """
    for name in formats:
        check_packages(name)
    if normalization and not student.mean:
        raise UserError(
            "the normalisation of the training images is not known: give DATASET.MEAN and "
            "DATASET.STD, or leave it out of the files by --without-normalization"
        )
    names = [*(FORMATS[name].file for name in formats), *also, "README.md"]
    there = [name for name in names if (out / name).exists()]
    if there and not force:
        raise UserError(f"{out} holds {', '.join(there)} already; replace them by --force")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {out}: {error.strerror}") from error
    mean, std = (student.mean, student.std) if normalization else ((), ())
    deployed = Deployed(student.net, student.image_size, mean, std, opset, dynamic_batch)
    return [_export_file(student, deployed, name, out) for name in formats]


def _export_file(student: Student, deployed: Deployed, name: str, out: Path) -> Exported:
    """Write a file under a temporary name, run it, and only then move it to its place."""
    kind = FORMATS[name]
    raw = deployed.normalizes and kind.standalone
    path = out / kind.file
    with replacing(path) as temporary:
        with trying(f"{student.name} cannot be exported as {name}"):
            contents = kind.write(student, deployed)
        temporary.write_bytes(contents)
        with trying(f"{path.name} cannot be run, and is not written"):
            run = kind.read(temporary, student)
            difference = verify(run, student, raw, path.name)
    single = kind.single or (name == "onnx" and not deployed.dynamic_batch)
    return Exported(name, path, raw, difference, run, single)


def verify(run: Runner, student: Student, raw: bool, name: str) -> float:
    """The largest difference of any logit from the network's, over batches of several sizes.

    Images are random bytes, which the network gets as the evaluation's loader makes them. Of a run,
    it is the one that `eval` builds: what the file takes its images to be is compared as well.

    Args:
        raw: `run` takes images in [0, 1]; else normalised ones, if it is known how.
        name: of the file, for the error.

    Raises:
        UserError: it is more than TOLERANCE, relative to the largest logit if that is above 1.
    """
    generator = torch.Generator().manual_seed(0)
    trained = (student.mean, student.std) if student.mean else ((0.0,) * 3, (1.0,) * 3)
    net, given = student.evaluated or (student.net, trained)
    ours, theirs = (
        Normalize(tuple(mean), tuple(std), torch.device("cpu")) for mean, std in (given, trained)
    )
    largest = 0.0
    for batch in BATCHES:
        shape = (batch, student.channels, *student.image_size)
        images = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        wanted: Tensor = net(ours(images))[0].float()
        if not wanted.isfinite().all():
            raise UserError(f"{student.checkpoint} gives logits that are not finite; not exported")
        logits = run(images.float() / 255 if raw else theirs(images))
        difference = float("inf")
        if logits.shape == wanted.shape:
            difference = float((logits - wanted).abs().max())
        largest = max(largest, difference)
        if not difference <= TOLERANCE * max(1.0, float(wanted.abs().max())):
            raise UserError(
                f"{name} does not agree with the network: of {batch} images, logits differ by up "
                f"to {difference:.2g}; it is not written"
            )
    return largest


@contextlib.contextmanager
def trying(failure: str) -> Iterator[None]:
    """Quietly and without gradient; what goes wrong, in any way, is said in one line."""
    try:
        with quiet(), torch.no_grad():
            yield
    except UserError:
        raise
    except Exception as error:
        first = first_line(error)
        raise UserError(f"{failure}: {first}") from error
