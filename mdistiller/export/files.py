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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mdistiller.export.student import Deployed, Student
from mdistiller.registry import Registry, UserError
from mdistiller.weights import load_network

#: Images, as the file wants them, to logits.
Runner = Callable[[Tensor], Tensor]
#: Whether this torch makes ONNX of a program of torch.export; before 2.9 it traces the network.
_DYNAMO = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 9)


@dataclass
class Exported:
    """A file that was written and agrees with the network.

    Attributes:
        format: its name in FORMATS.
        path: the file.
        raw: whether it takes images in [0, 1]; else they have to be normalised.
        difference: the largest of any logit from the network's.
        run: images to logits.
    """

    format: str
    path: Path
    raw: bool
    difference: float
    run: Runner


class Format(NamedTuple):
    """A kind of file.

    Attributes:
        file: its name.
        packages: what making and reading it needs beside torch.
        write: (student, network as deployed) -> contents.
        read: (file, student) -> what runs it.
        standalone: whether it runs without this library, and so can hold the normalisation.
    """

    file: str
    packages: tuple[str, ...]
    write: Callable[[Student, Deployed], bytes]
    read: Callable[[Path, Student], Runner]
    standalone: bool = True


FORMATS: Registry = Registry("export format (--formats)")


def check_packages(name: str) -> None:
    """Refuse a format whose packages are not installed."""
    for package in FORMATS[name].packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise UserError(
                f"--formats {name} needs the package {package}, which cannot be imported "
                f"({error}): pip install mdistiller[export]"
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
    torch.export.save(deployed.program, buffer, extra_files=student.metadata())
    return buffer.getvalue()


def read_torch(path: Path, student: Student) -> Runner:
    """The program."""
    return torch.export.load(path).module()


def write_onnx(student: Student, deployed: Deployed) -> bytes:
    """An ONNX model with input "image" and output "logits", for any batch size."""
    proto = _onnx_of_program(deployed) if _DYNAMO else _onnx_by_tracing(deployed)
    for key, value in student.metadata().items():
        proto.metadata_props.add(key=key, value=value)
    contents: bytes = proto.SerializeToString()
    return contents


def read_onnx(path: Path, student: Student) -> Runner:
    """The model in onnxruntime, with torch's number of CPU threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        path.read_bytes(), options, providers=["CPUExecutionProvider"]
    )

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {"image": images.numpy()})[0])

    return run


def _onnx_of_program(deployed: Deployed) -> Any:
    names: dict[str, Any] = {"input_names": ["image"], "output_names": ["logits"]}
    made = torch.onnx.export(deployed.program, dynamo=True, verbose=False, **names)
    assert made is not None
    proto = made.model_proto
    graph = proto.graph
    traced = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = dim.dim_param.replace(traced, "batch")
    return proto


def _onnx_by_tracing(deployed: Deployed) -> Any:
    import onnx

    buffer = io.BytesIO()
    torch.onnx.export(
        deployed,
        deployed.example,
        buffer,  # type: ignore[arg-type]
        dynamo=False,
        input_names=["image"],
        output_names=["logits"],
        dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
    )
    return onnx.load_from_string(buffer.getvalue())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the warnings of the exporters; every file is verified afterwards."""
    logger = logging.getLogger("torch")
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)


FORMATS.update(
    safetensors=Format(
        "student.safetensors", ("safetensors",), write_safetensors, read_safetensors, False
    ),
    onnx=Format(
        "student.onnx",
        ("onnx", "onnxruntime", *(["onnxscript"] if _DYNAMO else [])),
        write_onnx,
        read_onnx,
    ),
    torch=Format("student.pt2", (), write_torch, read_torch),
)
