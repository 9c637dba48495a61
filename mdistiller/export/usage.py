"""How to use the files: what they take and give, and code that runs each."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import PurePath

from mdistiller.dataset import data_spec
from mdistiller.engine.networks.make import constructor_facts
from mdistiller.export.files import Exported
from mdistiller.export.student import Student
from mdistiller.models import ModelEntry, get_model_entry
from mdistiller.preprocessing import RESIZE

_MOST_NAMES = 20  # classes that the card names

_ONNX = """\
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("{file}")
image = np.random.rand(4, 3, {height}, {width}).astype(np.float32){hint}
(logits,) = session.run(["logits"], {{"image": image}})
"""

_TORCH = """\
import torch

student = torch.export.load("{file}").module()
image = torch.rand(4, 3, {height}, {width}){hint}
logits = student(image)
"""

_SAFETENSORS = """\
import torch
{imports}from mdistiller.models import get_model_entry
from mdistiller.weights import load_network
{user}
student = get_model_entry("{name}", "{zoo}")({arguments})
load_network(student, "{file}", "{name}")
image = torch.rand(4, 3, {height}, {width}){hint}
with torch.no_grad():
    logits, features = student.eval()(image)
"""


def interface(student: Student, files: Sequence[Exported]) -> str:
    """What goes in, and what comes out."""
    height, width = student.image_size
    lines = [
        f"- Input `image`: float32 `[N, 3, {height}, {width}]`, any N; channels red, green, blue."
    ]
    constants = f"mean {list(student.mean)}, std {list(student.std)}"
    for raw in (True, False):
        names = " and ".join(f"`{file.path.name}`" for file in files if file.raw is raw)
        if names and raw:
            lines.append(
                f"- {names}: values from 0 to 1 (bytes / 255); normalised inside ({constants})."
            )
        elif names and student.mean:
            lines.append(
                f"- {names}: values **normalised before**, (x - mean) / std of x from 0 to 1, by "
                f"channel: {constants}."
            )
        elif names:
            lines.append(f"- {names}: values normalised as in training; how is not recorded.")
    lines.append(f"- {_fitting(student)}")
    lines.append(f"- Output `logits`: float32 `[N, {student.num_classes}]`, before the softmax.")
    if student.classes:
        shown = ", ".join(student.classes[:_MOST_NAMES])
        more = ", ... (all: in the files' metadata)" * (len(student.classes) > _MOST_NAMES)
        lines.append(f"- Classes, in order: {shown}{more}.")
    return "\n".join(lines)


def _fitting(student: Student) -> str:
    """How images of other sizes are brought to the input's."""
    height, width = student.image_size
    how = student.preprocessing
    if how is not None and how.resize in RESIZE:
        side, kind = how.resized_side(height), how.interpolation or "bilinear"
        first = {
            "crop": f"the shorter side is resized to {side} pixels",
            "stretch": f"both sides are resized to {side} pixels",
            "pad": f"the longer side is resized to {side} pixels",
        }[how.resize]
        last = "padded" if how.resize == "pad" else "cut out"
        middle = f"the middle {width}x{height} {last}"
        return f"Images of other sizes: {first} ({kind}, antialiased), and {middle}."
    if not student.dataset:
        return "Images of other sizes: as in training; how is not recorded."
    if data_spec(student.cfg).keeps_shape:
        return (
            f"Images of other sizes: the shorter side is resized to {round(height * 8 / 7)} pixels "
            f"(bilinear, antialiased), and the middle {width}x{height} cut out."
        )
    return f"Images of other sizes are resized to {width}x{height} (bilinear, antialiased)."


def snippet(student: Student, file: Exported) -> str:
    """Python that loads a file, beside it, and runs it on four images."""
    height, width = student.image_size
    hint = "  # values from 0 to 1" if file.raw else "  # normalised, see above"
    facts = {"file": file.path.name, "height": height, "width": width, "hint": hint}
    if file.format != "safetensors":
        return {"onnx": _ONNX, "torch": _TORCH}[file.format].format(**facts)
    entry = get_model_entry(student.name, student.zoo)
    arguments = constructor_facts(entry, student.num_classes, student.image_size)
    arguments |= student.settings
    user = _user_module(entry)
    if user:
        user = f"\nimport_user_modules(['{user}'])  # where {student.name} is registered"
    return _SAFETENSORS.format(
        imports="from mdistiller.engine.user_code.imports import import_user_modules\n"
        if user
        else "",
        user=user,
        name=student.name,
        zoo=student.zoo,
        arguments=", ".join(f"{key}={value!r}" for key, value in arguments.items()),
        **facts,
    )


def _user_module(entry: ModelEntry) -> str:
    """The file or module of the user's that registers a network; empty for the package's own."""
    module = entry.constructor.__module__
    if module.startswith("mdistiller.models."):
        return ""
    file = getattr(sys.modules.get(module), "__file__", None)
    return PurePath(file).name if file and module.startswith("mdistiller.") else module
