"""ONNX files in onnxruntime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def open_onnx(
    path: Path, threads: int | None = None
) -> tuple[Callable[[Tensor], Tensor], dict[str, str]]:
    """A model with input "image" and output "logits", on the CPU, and its metadata.

    Args:
        threads: of the CPU; by default torch's number.

    Raises:
        ImportError: onnxruntime is missing.
        Exception: of onnxruntime, if the file is damaged.
    """
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    providers = ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=providers)
    batch = session.get_inputs()[0].shape[0]

    def run(images: Tensor) -> Tensor:
        parts = images.split(batch) if isinstance(batch, int) else [images]
        logits = [session.run(["logits"], {"image": part.numpy()})[0] for part in parts]
        return torch.cat([torch.from_numpy(part) for part in logits])

    return run, session.get_modelmeta().custom_metadata_map
