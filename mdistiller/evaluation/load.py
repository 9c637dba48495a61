"""From a run folder or an exported file to a :class:`Predictor`."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from mdistiller.config.files import require_path, require_run
from mdistiller.config.roles import checkpoint_config
from mdistiller.dataset import eval_preprocessing, load_test_loader
from mdistiller.evaluation.predict import Predictor
from mdistiller.files.onnx import open_onnx
from mdistiller.models import get_model_entry
from mdistiller.networks.make import make_network
from mdistiller.networks.network import build_network
from mdistiller.networks.released import recorded_preprocessing
from mdistiller.preprocessing import Preprocessing
from mdistiller.registry import UserError, first_line
from mdistiller.run_folder.folder import checkpoint_file, recorded_config, refuse_commands
from mdistiller.run_folder.record import data_facts, read_record, recorded_settings
from mdistiller.runtime import resolve_device
from mdistiller.user_code.imports import import_user_modules
from mdistiller.weights import load_network

Overrides = Sequence[str]
_FACTS: tuple[str, ...] = ("model", "zoo", "num_classes", "image_size", "mean", "std", "classes")
_FACTS += ("arguments", "preprocessing", "normalizes")
"""What an exported file states of itself; see `Student.metadata` of the export package."""


def load_predictor(
    source: str | Path,
    checkpoint: str = "best",
    device: str = "auto",
    overrides: Overrides = (),
    imports: Overrides = (),
) -> Predictor:
    """A trained network, ready to classify images.

    Args:
        source: a run folder, a checkpoint in one, or a file of `mdistiller export` (.onnx, .pt2,
            .safetensors).
        checkpoint: of a run folder: best, latest, epoch_N, ema_best or ema_latest.
        device: auto, cpu, cuda, cuda:N or mps. ONNX and pt2 files run on the CPU.
        overrides: `[key, value, ...]` over the config of a run.
        imports: Python files that register the network, if a user's file did.

    Raises:
        UserError: there is no such network, or it does not state its classes and preprocessing.
    """
    path = Path(source)
    require_path(path)
    if path.is_dir():
        require_run(path, advice="")
        return _from_run(path, checkpoint, device, overrides, imports)
    readers: dict[str, Callable[..., Predictor]] = {
        ".onnx": _from_onnx,
        ".pt2": _from_program,
        ".safetensors": _from_weights,
    }
    if path.suffix not in readers and (path.parent / "config.yaml").is_file():
        return _from_run(path.parent, path, device, overrides, imports)
    if path.suffix not in readers:
        raise UserError(
            f"{path} is neither in a run folder nor a .onnx, .pt2 or .safetensors file; make one "
            "that states its classes and preprocessing by: mdistiller export -m NETWORK -c "
            f"{path} -d DATASET --out FOLDER"
        )
    if overrides:
        raise UserError(f"{overrides[0]} is for run folders; {path} states its own settings")
    import_user_modules(list(imports))
    return readers[path.suffix](path, device)


def _from_run(
    folder: Path, checkpoint: str | Path, device: str, overrides: Overrides, imports: Overrides
) -> Predictor:
    """The student of a run, as `eval` builds it."""
    if "DETECTION" in recorded_settings(folder):
        raise UserError(
            f"{folder} is the run of a detector, and predict is for classifiers; draw what it "
            f"finds by: mdistiller visualize detections {folder} --out FILE.png"
        )
    cfg = recorded_config(folder, overrides, imports)
    path = checkpoint if isinstance(checkpoint, Path) else checkpoint_file(folder, checkpoint)
    data = read_record(folder).get("data")
    if not data:  # a run of an earlier version
        refuse_commands(folder, cfg, overrides)
        data = data_facts(load_test_loader(cfg, torch.device("cpu")))
    if not data["num_classes"]:
        raise UserError(
            f"{folder} was trained without labels, so its student has no classes to predict; "
            "judge its features by: mdistiller eval RUN --probe knn --labelled FOLDER"
        )
    how = recorded_preprocessing(data, folder) or eval_preprocessing(cfg)
    size = tuple(data["image_size"])
    facts: Any = SimpleNamespace(**{**data, "image_size": size, "preprocessing": how})
    net = build_network(checkpoint_config(cfg, path.name), "STUDENT", facts, path)
    place = resolve_device(cfg.DEVICE if "DEVICE" in overrides[0::2] else device)
    return Predictor(
        f"{folder} {path.name.removeprefix('student_')}",
        _logits_of(net.to(place)),
        data["classes"],
        size,
        (data["mean"], data["std"]),
        how,
        place,
        cfg.DATASET.EXIF,
        cfg.DATASET.SCALE_16_BIT,
        net,
        channels=len(data["mean"]),
    )


def _from_weights(path: Path, device: str) -> Predictor:
    """A network of the zoo with the weights of an exported safetensors file."""
    try:
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            stated = _read_facts(path, file.metadata() or {})
    except ImportError as error:
        raise _missing(path, "safetensors", error) from error
    except UserError:
        raise
    except Exception as error:
        raise _damaged(path, error) from error
    name, size = stated["model"], tuple(stated["image_size"])
    entry, arguments = get_model_entry(name, stated["zoo"]), stated.get("arguments", {})
    channels, key = len(stated["mean"]), f"{path}: arguments"
    net = make_network(entry, stated["num_classes"], size, arguments, key, channels)
    load_network(net, path, name, stated["num_classes"])
    place = resolve_device(device)
    return _of_file(path, _logits_of(net.to(place)), {**stated, "normalizes": False}, place, net)


def _from_onnx(path: Path, device: str) -> Predictor:
    """An ONNX model in onnxruntime, with torch's number of CPU threads."""
    _on_cpu(path, device)
    try:
        run, texts = open_onnx(path)
    except ImportError as error:
        raise _missing(path, "onnxruntime", error) from error
    except Exception as error:
        raise _damaged(path, error) from error
    return _of_file(path, run, _read_facts(path, texts), torch.device("cpu"))


def _from_program(path: Path, device: str) -> Predictor:
    """A program of torch.export."""
    _on_cpu(path, device)
    texts = dict.fromkeys(_FACTS, "")
    if not zipfile.is_zipfile(path):  # torch would log a traceback
        raise UserError(
            f"{path} cannot be loaded: it is not a program of torch.export, or is cut off"
        )
    try:
        program = torch.export.load(path, extra_files=texts).module()
    except Exception as error:
        raise _damaged(path, error) from error
    stated = _read_facts(path, {key: text for key, text in texts.items() if text})
    return _of_file(path, program, stated, torch.device("cpu"))


def _read_facts(path: Path, texts: Mapping[str, str]) -> dict[str, Any]:
    """What an exported file states of itself.

    Raises:
        UserError: it states too little to prepare an image.
    """
    try:
        stated = {
            key: texts[key] if key in ("model", "zoo") else json.loads(texts[key])
            for key in _FACTS
            if key in texts
        }
    except ValueError as error:
        raise _damaged(path, error) from error
    missing = [key for key in _FACTS[:6] if key not in stated]
    if missing:
        raise UserError(
            f"{path} does not state {', '.join(missing)} in its metadata, as files of mdistiller "
            "export do; export the network again, from its run folder or with DATASET.MEAN and STD"
        )
    return stated


def _of_file(
    path: Path,
    logits: Callable[[Tensor], Tensor],
    stated: Mapping[str, Any],
    device: torch.device,
    net: nn.Module | None = None,
) -> Predictor:
    how = recorded_preprocessing(stated, path)
    if how is None:
        height, width = stated["image_size"]
        print(f"{path} does not record how images were resized: to {width}x{height}, as a whole")
    classes = stated.get("classes") or [str(k) for k in range(stated["num_classes"])]
    inside = stated.get("normalizes", True)
    return Predictor(
        str(path),
        logits,
        classes,
        tuple(stated["image_size"]),
        None if inside else (stated["mean"], stated["std"]),
        how or Preprocessing(),
        device,
        network=net,
        model=stated["model"],
        channels=len(stated["mean"]),
    )


def _logits_of(net: nn.Module) -> Callable[[Tensor], Tensor]:
    """The logits of a network that returns features as well."""
    net.eval().requires_grad_(False)

    def logits(images: Tensor) -> Tensor:
        found: Tensor = net(images)[0]
        return found

    return logits


def _on_cpu(path: Path, device: str) -> None:
    if device not in ("auto", "cpu"):
        raise UserError(f"{path} runs on the CPU; for {device} give the run folder or .safetensors")


def _missing(path: Path, package: str, error: ImportError) -> UserError:
    return UserError(
        f"{path} needs the package {package} ({error}): pip install mdistiller[export]"
    )


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} cannot be loaded: {first_line(error)}")
