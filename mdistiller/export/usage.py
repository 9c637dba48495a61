"""How to use the files: what they take and give, and code that runs each."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import PurePath

from mdistiller.dataset import data_spec
from mdistiller.export.files import Exported
from mdistiller.export.student import Student
from mdistiller.models import ModelEntry, get_model_entry
from mdistiller.networks.make import constructor_facts
from mdistiller.preprocessing import RESIZE, Preprocessing

_MOST_NAMES = 20  # classes that the card names

_ONNX = """\
import numpy as np
import onnxruntime
from PIL import Image, ImageOps

{prepare}
session = onnxruntime.InferenceSession("{file}")
image = np.stack([prepare("image.jpg")])  # {number}
(logits,) = session.run(["logits"], {{"image": image}})
{answer}
"""

_TORCH = """\
import numpy as np
import torch
from PIL import Image, ImageOps

{prepare}
student = torch.export.load("{file}").module()
image = torch.from_numpy(np.stack([prepare("image.jpg")]))  # {number}
logits = student(image)
{answer}
"""

_LITERT = """\
import numpy as np
from ai_edge_litert.interpreter import Interpreter
from PIL import Image, ImageOps

{prepare}
student = Interpreter("{file}")
student.allocate_tensors()
image = np.stack([prepare("image.jpg")])  # {number}
student.set_tensor(student.get_input_details()[0]["index"], image)
student.invoke()
logits = student.get_tensor(student.get_output_details()[0]["index"])
{answer}
"""

_EXECUTORCH = """\
import numpy as np
import torch
from executorch.runtime import Runtime
from PIL import Image, ImageOps

{prepare}
program = Runtime.get().load_program("{file}")  # has to live as long as its method
student = program.load_method("forward")
image = torch.from_numpy(np.stack([prepare("image.jpg")]))  # {number}
(logits,) = student.execute([image])
{answer}
"""

_CODE = {"onnx": _ONNX, "torch": _TORCH, "litert": _LITERT, "executorch": _EXECUTORCH}

_SAFETENSORS = """\
import numpy as np
import torch
from PIL import Image, ImageOps
{imports}from mdistiller.models import get_model_entry
from mdistiller.weights import load_network
{user}
{prepare}
student = get_model_entry("{name}", "{zoo}")({arguments}){adapted}
load_network(student, "{file}", "{name}")
image = torch.from_numpy(np.stack([prepare("image.jpg")]))  # {number}
with torch.no_grad():
    logits, features = student.eval()(image)
{answer}
"""

_PREPARE = """
def prepare(path):
    \"\"\"The pixels of an image: float32 [{channels}, {height}, {width}], {values}.\"\"\"
    image = ImageOps.exif_transpose(Image.open(path)).convert("{mode}")
{fitting}
    pixels = {pixels}
    return pixels.astype(np.float32).transpose(2, 0, 1)

"""
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_CHANNELS = {1: "grey", 3: "red, green, blue", 4: "red, green, blue, alpha"}
_RESIZE = "    image = image.resize({size}, Image.Resampling.{kind})"
_CUT = """
    left, top = ({start} for n, m in zip(image.size, ({width}, {height})))
    image = image.crop((left, top, left + {width}, top + {height}))"""
_SIZES = {
    "stretch": "({wide}, {tall})",
    "crop": "(max({wide}, {tall} * w // h), max({tall}, {wide} * h // w))",
    "pad": "(max(1, min({wide}, {tall} * w // h)), max(1, min({tall}, {wide} * h // w)))",
}
"""Width and height before the middle is cut out, as `resized_shape` of the data's images."""


def interface(student: Student, files: Sequence[Exported]) -> str:
    """What goes in, and what comes out."""
    height, width = student.image_size
    lines = [
        f"- Input `image`: float32 `[N, {student.channels}, {height}, {width}]`, any N; channels "
        f"{_CHANNELS[student.channels]}."
    ]
    single = " and ".join(f"`{file.path.name}`" for file in files if file.single)
    if single:
        lines.append(f"- {single}: one image at a time (N = 1).")
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


def _known_fitting(student: Student) -> Preprocessing | None:
    """How images of other sizes are brought to the input's; None if it is not known."""
    how = student.preprocessing
    if how is not None and how.resize in RESIZE:
        return how
    if not student.dataset:
        return None
    return Preprocessing(resize="crop" if data_spec(student.cfg).keeps_shape else "stretch")


def _fitting(student: Student) -> str:
    """The same in words."""
    height, width = student.image_size
    how = _known_fitting(student)
    if how is None:
        return "Images of other sizes: as in training; how is not recorded."
    (tall, wide), kind = how.resized_sides((height, width)), how.interpolation or "bilinear"
    if how.resize == "stretch" and (tall, wide) == (height, width):
        return f"Images of other sizes are resized to {width}x{height} ({kind}, antialiased)."
    sides = {
        "crop": "the shorter side is",
        "stretch": "both sides are",
        "pad": "the longer side is",
    }
    first = f"{sides[how.resize]} resized to {tall} pixels"
    if tall != wide:
        shapes = {"crop": "until they cover", "stretch": "to", "pad": "until they fit into"}
        first = f"they are resized {shapes[how.resize]} {wide}x{tall} pixels"
    last = "padded" if how.resize == "pad" else "cut out"
    middle = f"the middle {width}x{height} {last}"
    return f"Images of other sizes: {first} ({kind}, antialiased), and {middle}."


def preparation(student: Student, raw: bool) -> str:
    """Python that reads an image file as the network's images were prepared, by Pillow.

    Args:
        raw: the network takes values from 0 to 1; else normalised ones.
    """
    height, width = student.image_size
    values, pixels = "values from 0 to 1", "np.asarray(image, np.float32) / 255"
    if student.channels == 1:
        pixels = "np.atleast_3d(np.asarray(image, np.float32)) / 255"
    if not raw and student.mean:
        values, mean, std = "normalised", list(student.mean), list(student.std)
        pixels = f"({pixels} - np.float32({mean})) / np.float32({std})"
    elif not raw:
        values += ": normalise them as in training"
    fitting = _fitting_code(_known_fitting(student), height, width)
    return _PREPARE.format(
        values=values,
        fitting=fitting,
        pixels=pixels,
        channels=student.channels,
        mode=_MODES[student.channels],
        height=height,
        width=width,
    )


def _fitting_code(how: Preprocessing | None, height: int, width: int) -> str:
    """The lines that bring an image of Pillow to its size."""
    if how is None:
        note = "    # how images were resized in training is not recorded\n"
        return note + _RESIZE.format(size=(width, height), kind="BILINEAR")
    tall, wide = how.resized_sides((height, width))
    kind = (how.interpolation or "bilinear").upper()
    if how.resize == "stretch" and (tall, wide) == (height, width):
        return _RESIZE.format(size=(width, height), kind=kind)
    start = "round((n - m) / 2)"
    if how.resize == "pad" or wide < width:  # Pillow makes black what is outside
        start += " if n > m else -((m - n) // 2)"
    resize = _RESIZE.format(size=_SIZES[how.resize].format(tall=tall, wide=wide), kind=kind)
    if how.resize != "stretch":
        resize = f"    w, h = image.size\n{resize}"
    return resize + _CUT.format(start=start, width=width, height=height)


def snippet(student: Student, file: Exported) -> str:
    """Python that loads a file, beside it, and names the class of `image.jpg`."""
    answer = "print(int(logits[0].argmax()))  # the number of the class"
    if 0 < len(student.classes) <= _MOST_NAMES:
        answer = f"classes = {student.classes}\nprint(classes[int(logits[0].argmax())])"
    prepare = preparation(student, file.raw)
    facts = {"file": file.path.name, "prepare": prepare, "answer": answer}
    facts["number"] = "one image" if file.single else "any number of images"
    if file.format != "safetensors":
        return _CODE[file.format].format(**facts)
    entry = get_model_entry(student.name, student.zoo)
    arguments = constructor_facts(entry, student.num_classes, student.image_size)
    arguments |= student.settings
    user = _user_module(entry)
    if user:
        user = f"\nimport_user_modules(['{user}'])  # where {student.name} is registered"
    return _SAFETENSORS.format(
        imports="from mdistiller.user_code.imports import import_user_modules\n" if user else "",
        user=user,
        adapted=_adapted(student),
        name=student.name,
        zoo=student.zoo,
        arguments=", ".join(f"{key}={value!r}" for key, value in arguments.items()),
        **facts,
    )


def _adapted(student: Student) -> str:
    """The line that fits a network to images of other than 3 channels."""
    if student.channels == 3 or "in_chans" in student.settings:
        return ""
    import_it = "from mdistiller.models import with_channels"
    return f"\n{import_it}\nwith_channels(student, {student.channels})"


def _user_module(entry: ModelEntry) -> str:
    """The file or module of the user's that registers a network; empty for the package's own."""
    module = entry.constructor.__module__
    if module.startswith("mdistiller.models."):
        return ""
    file = getattr(sys.modules.get(module), "__file__", None)
    return PurePath(file).name if file and module.startswith("mdistiller.") else module
