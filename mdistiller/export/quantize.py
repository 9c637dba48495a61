"""An exported ONNX model in 8 bits: calibrated, measured beside the original, refused if worse."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mdistiller.dataset import Data, load_data
from mdistiller.export.files import Exported
from mdistiller.export.student import Student
from mdistiller.export.write import trying
from mdistiller.files.atomic import replacing
from mdistiller.files.onnx import open_onnx
from mdistiller.files.tables import markdown_table
from mdistiller.registry import UserError

INT8_FILE = "student_int8.onnx"
CALIBRATION = 512
MAX_DROP = 1.0
# In transformers the sums of residual branches have a few values far above all others: only the
# layers with weights are quantised there.
_PRODUCTS = ["Conv", "Gemm", "MatMul"]
_WARM_UP, _ROUNDS = 10, 100  # runs of one image


@dataclass
class Int8:
    """A model in 8 bits beside the one it was made from.

    Attributes:
        files: fp32, int8.
        top1: their accuracies in percent.
        images: what these were measured on.
        calibration: number of training images that gave the ranges.
        milliseconds: median time of one image on one thread of each; empty if not measured.
    """

    files: tuple[Exported, Exported]
    top1: tuple[float, float]
    images: str
    calibration: int
    milliseconds: tuple[float, ...] = ()

    def table(self) -> str:
        """The two side by side, as Markdown."""
        head = ["file", "weights", "MB", "top-1 %"]
        rows = []
        for file, bits, top1 in zip(self.files, ("float32", "int8"), self.top1, strict=True):
            size = file.path.stat().st_size / 1e6
            rows.append([f"`{file.path.name}`", bits, f"{size:.2f}", f"{top1:.2f}"])
        if self.milliseconds:
            head.append("ms an image")
            for row, median in zip(rows, self.milliseconds, strict=True):
                row.append(f"{median:.2f}")
        return markdown_table(head, rows)

    def text(self) -> str:
        """The table and what it was measured on."""
        timed = "; median time of batches of one image on one thread" if self.milliseconds else ""
        return (
            f"{self.table()}\n\nTop-1 on the {self.images}{timed}. int8: weights per channel, "
            f"activations per tensor, ranges of {self.calibration} training images."
        )


def quantize_student(
    student: Student,
    original: Exported,
    calibration: int = CALIBRATION,
    max_drop: float = MAX_DROP,
    timed: bool = True,
) -> Int8:
    """Write `student_int8.onnx` beside an exported ONNX file of a run's student.

    onnxruntime's static quantisation: weights to int8 per channel, activations to uint8 per tensor,
    as QuantizeLinear and DequantizeLinear nodes; the logits stay float32.

    Args:
        calibration: training images, drawn at random, that give the ranges of activations.
        max_drop: points of top-1 that may be lost, on the images that select the best epoch.
        timed: measure the time of one image.

    Raises:
        UserError: the run's data are missing, or too much accuracy is lost: no int8 file is left.
    """
    data = _images_of(student)
    path = original.path.with_name(INT8_FILE)
    count = min(calibration, data.num_data)
    path.unlink(missing_ok=True)  # of other weights
    with replacing(path) as temporary:
        with trying(f"{original.path.name} cannot be quantised"):
            assert data.plain is not None
            chosen = torch.randperm(data.num_data, generator=torch.Generator().manual_seed(0))
            batches = _inputs(data.plain(chosen[:count]), student, original.raw)
            _quantize(original.path, temporary, (images for images, _ in batches))
            run = open_onnx(temporary)[0]
            top1, difference = _compare((original.run, run), data, student, original.raw)
        drop = top1[0] - top1[1]
        split = student.cfg.DATASET.VAL_SPLIT
        what = f"{split} held-out training images" if split else "test set"
        if not drop <= max_drop + 1e-9:
            raise UserError(
                f"{INT8_FILE} is not written: its top-1 on the {what} is {top1[1]:.2f} %, "
                f"{drop:.2f} points below float32's {top1[0]:.2f} %, and --max-drop is "
                f"{max_drop:g}; the other files are written, and --force replaces them"
            )
        measured = (original.path, temporary) if timed else ()
        times = tuple(_one_image(file, student) for file in measured)
    made = Exported("onnx", path, original.raw, difference, run, original.single)
    return Int8((original, made), top1, what, count, times)


def check_epoch(student: Student) -> None:
    """Refuse weights from before the quantisation-aware epochs of a run that has these."""
    if student.run is None or not student.cfg.SOLVER.get("QAT_EPOCHS"):
        return
    first = student.cfg.SOLVER.EPOCHS - student.cfg.SOLVER.QAT_EPOCHS + 1
    choice = student.run.choice
    number = choice.removeprefix("epoch_")
    epoch = int(number) if number.isdigit() else student.run.summary.get(f"{choice}_epoch", first)
    if epoch < first:
        raise UserError(
            f"{choice} is epoch {epoch}, before SOLVER.QAT_EPOCHS began in epoch {first}; export "
            "the quantisation-aware weights by --checkpoint latest"
        )


def _images_of(student: Student) -> Data:
    """The data of the student's run; images come in [0, 1], not normalised."""
    cfg = student.cfg.clone()
    cfg.defrost()
    channels = student.channels
    cfg.DATASET.MEAN, cfg.DATASET.STD = [0.0] * channels, [1.0] * channels
    cfg.freeze()
    data = load_data(cfg, torch.device("cpu"))
    if data.num_classes != student.num_classes or data.image_size != student.image_size:
        raise UserError(
            f"the data of the run have {data.num_classes} classes and images of "
            f"{data.image_size}; its student was trained on {student.num_classes} classes and "
            f"{student.image_size}"
        )
    return data


def _inputs(loader: Any, student: Student, raw: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """(images, target) as the file takes them."""
    mean, std = (
        torch.tensor(values or default).view(-1, 1, 1)
        for values, default in ((student.mean, (0.0,)), (student.std, (1.0,)))
    )
    for pixels, target in loader:
        images = (pixels * 255).round() / 255  # free of rounding, as from bytes
        yield images if raw else (images - mean) / std, target


def _compare(
    runs: tuple[Any, Any], data: Data, student: Student, raw: bool
) -> tuple[tuple[float, float], float]:
    """Top-1 in percent of both, and the largest difference of any logit."""
    right, images_seen, largest = [0, 0], 0, 0.0
    for images, target in _inputs(data.val, student, raw):
        logits = [run(images) for run in runs]
        for i, one in enumerate(logits):
            right[i] += int((one.argmax(1) == target).sum())
        images_seen += len(target)
        largest = max(largest, float((logits[0] - logits[1]).abs().max()))
    return (100 * right[0] / images_seen, 100 * right[1] / images_seen), largest


def _one_image(path: Path, student: Student) -> float:
    """Median time of one image on one thread, in milliseconds."""
    run = open_onnx(path, threads=1)[0]
    image, taken = torch.rand(1, student.channels, *student.image_size), []
    for _ in range(_WARM_UP + _ROUNDS):
        start = time.perf_counter()
        run(image)
        taken.append(1e3 * (time.perf_counter() - start))
    return statistics.median(taken[_WARM_UP:])


def _quantize(source: Path, out: Path, images: Iterator[Tensor]) -> None:
    """onnxruntime's static quantisation of one file into another."""
    import onnx
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    model = onnx.load(source)
    normalises_layers = any(node.op_type == "LayerNormalization" for node in model.graph.node)
    fixed = bool(model.graph.input[0].type.tensor_type.shape.dim[0].dim_value)

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        """Batches as the model takes them."""

        def __init__(self) -> None:
            self.parts = (part for batch in images for part in batch.split(1 if fixed else 64))

        def get_next(self) -> dict[str, Any] | None:
            part = next(self.parts, None)
            return None if part is None else {"image": part.numpy()}

    quantize_static(
        model,
        out,
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=_PRODUCTS if normalises_layers else None,
    )
    quantized = onnx.load(out)
    _keep_logits(quantized.graph)
    onnx.save(quantized, out)


def _keep_logits(graph: Any) -> None:
    """Take the rounding of the logits to 256 values, which would tie classes, out of a graph."""
    makers = {name: node for node in graph.node for name in node.output}
    last = makers["logits"]
    first = makers.get(last.input[0]) if last.op_type == "DequantizeLinear" else None
    if first is None or first.op_type != "QuantizeLinear":
        return
    name = first.input[0]
    graph.node.remove(last)
    graph.node.remove(first)
    used = {one for node in graph.node for one in node.input}
    for constant in [one for one in graph.initializer if one.name not in used]:
        graph.initializer.remove(constant)
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = ["logits" if one == name else one for one in names]
