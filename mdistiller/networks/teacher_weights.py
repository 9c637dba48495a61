"""Where the weights of a config's teacher are."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from mdistiller.dataset import Data, DataSource, TestData
from mdistiller.distillers import get_distiller
from mdistiller.networks.network import model_entry
from mdistiller.networks.released import PRETRAINED, arguments, require_classes
from mdistiller.networks.start import find_file
from mdistiller.runtime import local_rank_zero_first


def find_teacher(cfg: Any, data: Data | TestData) -> Path | Literal["pretrained"] | None:
    """The teacher's weights: the file DISTILLER.TEACHER_CKPT, else released ones.

    Released weights are a file of the zoo, or PRETRAINED where TEACHER_ARGS ask for those of timm
    or torchvision. Returns None if there are none. With a TEACHER_CFG, PRETRAINED does not count
    (that config reads TEACHER_ARGS), and the zoo's file counts only for data with as many classes
    as it was released for; it is then not downloaded.

    Raises:
        UserError: TEACHER_CKPT is given and does not exist, a download fails, or the library's
            weights are for other classes.
    """
    if cfg.DISTILLER.TEACHER_CKPT:
        return find_file(cfg, "TEACHER_CKPT")
    entry = model_entry(cfg, "TEACHER", data)
    trained_here = bool(cfg.DISTILLER.TEACHER_CFG)
    classes = getattr(data, "num_classes", None)  # a source that is not read yet knows none
    wanted = classes if get_distiller(cfg.DISTILLER.TYPE).needs_teacher_classifier else None
    settings = arguments(cfg, "TEACHER")
    if entry.loads_itself and settings.get("pretrained") and not trained_here:
        if wanted is not None:
            require_classes(entry, settings, wanted)
        return PRETRAINED
    with local_rank_zero_first():
        released = entry.released(wanted, fetch=not trained_here)
    misfits = released and trained_here and entry.default_classes() != classes
    return None if misfits else released


def no_teacher(cfg: Any, data: Data | DataSource) -> str:
    """The error for a teacher without weights."""
    entry = model_entry(cfg, "TEACHER", data)
    looked = f" (looked for {entry.checkpoint})" if entry.checkpoint else ""
    library = ", or TEACHER_ARGS {pretrained: True} for released ones" if entry.loads_itself else ""
    return (
        f"no weights for the teacher {cfg.DISTILLER.TEACHER}{looked}: set DISTILLER.TEACHER_CKPT "
        f"to a checkpoint, or DISTILLER.TEACHER_CFG to the config that trains it first{library}"
    )
