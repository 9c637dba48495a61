"""Files for LiteRT and ExecuTorch, the runtimes of phones and boards; one image at a time."""

from __future__ import annotations

import contextlib
import io
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mdistiller.export.student import Deployed, Student


def write_litert(student: Student, deployed: Deployed) -> bytes:
    """A LiteRT (TensorFlow Lite) model of one image."""
    import litert_torch

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        path = Path(folder) / "model.tflite"
        litert_torch.convert(deployed, _one(deployed)).export(str(path))
        return path.read_bytes()


def read_litert(path: Path, student: Student) -> Any:
    """The model in LiteRT's interpreter."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_content=path.read_bytes(), num_threads=torch.get_num_threads())
    interpreter.allocate_tensors()
    (given,), (made,) = interpreter.get_input_details(), interpreter.get_output_details()

    def one(image: Tensor) -> Tensor:
        interpreter.set_tensor(given["index"], image.numpy())
        interpreter.invoke()
        return torch.from_numpy(np.array(interpreter.get_tensor(made["index"])))

    return lambda images: torch.cat([one(image) for image in images.split(1)])


def write_executorch(student: Student, deployed: Deployed) -> bytes:
    """An ExecuTorch program of one image, with XNNPACK's kernels for the CPU."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    program = torch.export.export(deployed, _one(deployed), strict=False)
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    return bytes(lowered.to_executorch().buffer)


def read_executorch(path: Path, student: Student) -> Any:
    """The program in ExecuTorch's runtime."""
    from executorch.runtime import Runtime

    contents = path.read_bytes()
    program = Runtime.get().load_program(contents)
    method = program.load_method("forward")

    def run(images: Tensor) -> Tensor:
        _ = contents, program  # the method reads both, and keeps neither alive
        return torch.cat([method.execute([one])[0].clone() for one in images.split(1)])

    return run


def _one(deployed: Deployed) -> tuple[Tensor, ...]:
    return (deployed.example[0][:1],)
