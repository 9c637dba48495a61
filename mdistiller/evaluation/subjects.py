"""The networks to look at: of run folders, of files, or released ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from mdistiller.dataset import TestData
from mdistiller.engine.build import build_network
from mdistiller.engine.cfg import Config
from mdistiller.engine.released import PRETRAINED
from mdistiller.engine.run_folder import (
    checkpoint_file,
    read_json,
    recorded_config,
    refuse_commands,
)
from mdistiller.registry import UserError

Overrides = Sequence[str]


@dataclass(frozen=True)
class Source:
    """Where a network comes from.

    Attributes:
        label: what to call it in tables and pictures.
        cfg: its architecture, in a role of DISTILLER.
        weights: a file, or PRETRAINED.
        note: of a run's best checkpoint, its epoch and what it was selected on.
        run: the run folder it is from.
    """

    label: str
    cfg: Config
    weights: Path | Literal["pretrained"]
    note: str = ""
    role: str = "STUDENT"
    run: Path | None = None

    @property
    def name(self) -> str:
        """The network's name in its zoo."""
        name: str = self.cfg.DISTILLER[self.role]
        return name


@dataclass(frozen=True)
class Subject:
    """A network in eval mode, and where it comes from."""

    source: Source
    net: nn.Module


def run_sources(folder: Path, checkpoints: Sequence[str], imports: Overrides = ()) -> list[Source]:
    """The students of these checkpoints of a run folder."""
    cfg = recorded_config(folder, imports=imports)
    summary = read_json(folder / "summary.json")
    sources = []
    for choice in checkpoints:
        note = ""
        if choice == "best" and summary:
            note = f"epoch {summary['best_epoch']}, selected on the {summary['selected_on']}"
        label = f"{'/'.join(folder.resolve().parts[-2:])} {choice}"
        path = checkpoint_file(folder, choice)
        sources.append(Source(label, cfg, path, note, run=folder))
    return sources


def file_source(
    path: str, name: str, cfg: Config, imports: Overrides = (), role: str = "STUDENT"
) -> Source:
    """The network in a file, or the released one.

    Args:
        path: the file, or "pretrain" for released weights.
        name: its name in the zoo; empty for a file of a run folder, which says it itself.
        cfg: the config with the network's ARGS and NORM, for one with a name.
    """
    if name:
        own = cfg.clone()
        own.defrost()
        own.DISTILLER[role] = name
        own.freeze()
        if path == "pretrain":
            return Source(f"{name} released", own, PRETRAINED, role=role)
        return Source(path, own, Path(path), role=role)
    folder = Path(path).parent
    if path == "pretrain" or not (folder / "config.yaml").is_file():
        raise UserError(f"-m must name the network of {path}, which is of no run folder")
    return Source(path, recorded_config(folder, imports=imports), Path(path), run=folder)


def data_config(sources: Sequence[Source], overrides: Overrides, imports: Overrides) -> Config:
    """The config that says what data runs are looked at on: their own, if they share them.

    Raises:
        UserError: they do not.
    """
    runs = [source for source in sources if source.run is not None]
    first, facts = runs[0], _data_facts(runs[0].cfg)
    for other in runs[1:]:
        differ = [key for key, value in _data_facts(other.cfg).items() if value != facts[key]]
        if differ:
            key = f"DATASET.{differ[0]}"
            raise UserError(
                f"{first.run} and {other.run} were trained on different data ({key} "
                f"{first.cfg.DATASET[differ[0]]!r} and {other.cfg.DATASET[differ[0]]!r}); name the "
                "data for both by -d or --cfg"
            )
    assert first.run is not None
    cfg = recorded_config(first.run, overrides, imports)
    refuse_commands(first.run, cfg, overrides)
    return cfg


def _data_facts(cfg: Config) -> dict[str, Any]:
    keys = ("TYPE", "ROOT", "IMAGE_SIZE", "SHARDS")
    facts = {key: cfg.DATASET[key] for key in keys}
    return facts | {"ROOT": str(Path(facts["ROOT"]).resolve()) if facts["ROOT"] else ""}


def load(source: Source, test: TestData, device: torch.device) -> Subject:
    """Build a network for the data and load its weights."""
    net = build_network(source.cfg, source.role, test, source.weights)
    return Subject(source, net.to(device).eval().requires_grad_(False))
