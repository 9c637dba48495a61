"""The formats: how a student becomes a file, and how that file is run again."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mdistiller.export.onnx_model import DYNAMO, read_onnx, write_onnx
from mdistiller.export.runtimes import (
    read_executorch,
    read_litert,
    write_executorch,
    write_litert,
)
from mdistiller.export.student import Deployed, Student
from mdistiller.registry import Registry, UserError
from mdistiller.weights import load_network

#: Images, as the file wants them, to logits.
Runner = Callable[[Tensor], Tensor]


@dataclass
class Exported:
    """A file that was written and agrees with the network.

    Attributes:
        format: its name in FORMATS.
        path: the file.
        raw: whether it takes images in [0, 1]; else they have to be normalised.
        difference: the largest of any logit from the network's.
        run: images to logits.
        single: whether it takes one image at a time.
    """

    format: str
    path: Path
    raw: bool
    difference: float
    run: Runner
    single: bool = False


class Format(NamedTuple):
    """A kind of file.

    Attributes:
        file: its name.
        packages: what making and reading it needs beside torch.
        write: (student, network as deployed) -> contents.
        read: (file, student) -> what runs it.
        standalone: whether it runs without this library, and so can hold the normalisation.
        extra: of this package, which installs `packages`.
        single: whether it takes one image at a time.
    """

    file: str
    packages: tuple[str, ...]
    write: Callable[[Student, Deployed], bytes]
    read: Callable[[Path, Student], Runner]
    standalone: bool = True
    extra: str = "export"
    single: bool = False


FORMATS: Registry = Registry("export format (--formats)")


def check_packages(name: str) -> None:
    """Refuse a format whose packages are not installed."""
    for package in FORMATS[name].packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise UserError(
                f"--formats {name} needs the package {package}, which cannot be imported "
                f"({error}): pip install mdistiller[{FORMATS[name].extra}]"
            ) from error


def write_safetensors(student: Student, deployed: Deployed) -> bytes:
    """The weights alone, under the names of the zoo."""
    from safetensors.torch import save

    state = {key: value.contiguous() for key, value in student.net.state_dict().items()}
    contents: bytes = save(state, {"format": "pt", **student.metadata()})
    return contents


def read_safetensors(path: Path, student: Student) -> Runner:
    """A fresh network with the file's weights."""
    net = student.build()
    load_network(net, path, student.name, student.num_classes)
    return Deployed(net, student.image_size)


def write_torch(student: Student, deployed: Deployed) -> bytes:
    """A program of torch.export, for any batch size."""
    buffer = io.BytesIO()
    torch.export.save(deployed.program, buffer, extra_files=student.metadata(deployed.normalizes))
    return buffer.getvalue()


def read_torch(path: Path, student: Student) -> Runner:
    """The program."""
    return torch.export.load(path).module()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the warnings of the exporters; every file is verified afterwards."""
    loggers = [logging.getLogger(name) for name in ("", "torch", "onnxscript")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


FORMATS.update(
    safetensors=Format(
        "student.safetensors", ("safetensors",), write_safetensors, read_safetensors, False
    ),
    onnx=Format(
        "student.onnx",
        ("onnx", "onnxruntime", *(["onnxscript"] if DYNAMO else [])),
        write_onnx,
        read_onnx,
    ),
    torch=Format("student.pt2", (), write_torch, read_torch),
    litert=Format(
        "student.tflite",
        ("litert_torch", "ai_edge_litert"),
        write_litert,
        read_litert,
        extra="litert",
        single=True,
    ),
    executorch=Format(
        "student.pte",
        ("executorch",),
        write_executorch,
        read_executorch,
        extra="executorch",
        single=True,
    ),
)
