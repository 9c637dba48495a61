"""A student as an ONNX model with input "image" and output "logits"."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from mdistiller.export.student import Deployed, Student
from mdistiller.files.onnx import open_onnx
from mdistiller.registry import UserError

#: Whether this torch makes ONNX of a program of torch.export; before 2.9 it traces the network.
DYNAMO = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 9)
_NAMES: dict[str, Any] = {"input_names": ["image"], "output_names": ["logits"]}


def write_onnx(student: Student, deployed: Deployed) -> bytes:
    """An ONNX model, for any batch size or, without `deployed.dynamic_batch`, for one image."""
    proto = _of_program(deployed) if DYNAMO else _by_tracing(deployed)
    opset = max(one.version for one in proto.opset_import if one.domain in ("", "ai.onnx"))
    if deployed.opset not in (None, opset):
        raise UserError(
            f"torch {torch.__version__} cannot export {student.name} for ONNX opset "
            f"{deployed.opset} (--opset); it made a model of opset {opset}"
        )
    for key, value in student.metadata(deployed.normalizes).items():
        proto.metadata_props.add(key=key, value=value)
    contents: bytes = proto.SerializeToString()
    return contents


def read_onnx(path: Path, student: Student) -> Any:
    """The model in onnxruntime, with torch's number of CPU threads."""
    return open_onnx(path)[0]


def _of_program(deployed: Deployed) -> Any:
    program = deployed.program
    if not deployed.dynamic_batch:
        program = torch.export.export(deployed, (deployed.example[0][:1],), strict=False)
    made = torch.onnx.export(
        program, dynamo=True, verbose=False, opset_version=deployed.opset, **_NAMES
    )
    assert made is not None
    proto = made.model_proto
    graph = proto.graph
    traced = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = dim.dim_param.replace(traced, "batch")
    return proto


def _by_tracing(deployed: Deployed) -> Any:
    import onnx

    buffer: Any = io.BytesIO()
    axes = {"image": {0: "batch"}, "logits": {0: "batch"}} if deployed.dynamic_batch else {}
    example = deployed.example if axes else (deployed.example[0][:1],)
    torch.onnx.export(
        deployed,
        example,
        buffer,
        dynamo=False,
        opset_version=deployed.opset,
        dynamic_axes=axes,
        **_NAMES,
    )
    return onnx.load_from_string(buffer.getvalue())
