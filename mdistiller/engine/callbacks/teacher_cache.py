"""Cache of a frozen teacher's outputs by (image, view): DISTILLER.TEACHER_CACHE.

Logits, summary vectors or both, whichever the method reads (`frozen_teacher/rows.py`).

The loader draws order and views of an epoch before it starts, so the cache knows all misses in
advance. It copies the hits to the device at once, runs the teacher on the misses in full batches
just before a step needs them, and stores the new rows at the end of the epoch or when the run is
saved. Within the epoch nothing waits for the device.

Cached rows must not depend on which images were misses together: the teacher always runs on
batches of one size, padded if necessary, where each row's bits are independent of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mdistiller.config.roles import teacher_identity
from mdistiller.console import print_log
from mdistiller.dataset.memory.loader import TrainLoader
from mdistiller.distillers import Distiller
from mdistiller.distillers.helpers.features.shapes import preserve_state
from mdistiller.distributed import sum_over_ranks
from mdistiller.engine.hooks import Hook, Record, Trainer
from mdistiller.frozen_teacher.cacheable import KEY, check_method, check_views, refusal
from mdistiller.frozen_teacher.fingerprint import (
    computation,
    data_digest,
    digest,
    teacher_digest,
    view_digest,
)
from mdistiller.frozen_teacher.frozen import is_frozen
from mdistiller.frozen_teacher.logit_store import FileStore, MemoryStore
from mdistiller.frozen_teacher.rows import OutputRows
from mdistiller.registry import UserError
from mdistiller.runtime import autocast

_PROBES = 8  # images whose rows a file holds to be compared
_CLOSE, _CLOSE_HALF = 1e-3, 5e-2  # what they may be off, as part of the largest


class TeacherCache(Hook):
    """Adds the teacher's outputs to every batch, so that the teacher need not run.

    Each epoch: :meth:`begin`, :meth:`rows` of every step in order, :meth:`finish`.

    Args:
        cfg: the whole config.
        distiller: the method, unwrapped, its teacher frozen.
        loader: of the training images.

    Attributes:
        teacher_runs: whether the teacher runs on every batch anyway, for other runs in lock-step
            with this one (`run/sharing.py`).

    Raises:
        UserError: the method, the teacher or the augmentation does not allow a cache.
    """

    def __init__(self, cfg: Any, distiller: Distiller, loader: TrainLoader):
        check_method(cfg)
        check_views(cfg, loader)
        self.cfg, self.distiller, self.loader = cfg, distiller, loader
        self.views = loader.num_views or 0
        self.device = next(distiller.parameters()).device
        teacher = distiller.teacher
        if teacher is None or not is_frozen(distiller):
            raise refusal(cfg, "the teacher is trained")
        if distiller.watches_teacher:
            raise refusal(cfg, f"{cfg.DISTILLER.TYPE} watches its teacher while that runs")
        self.teacher, self.outputs = teacher, OutputRows(distiller)
        self._store: MemoryStore | FileStore | None = None
        self._writes = True
        self._epoch = 0  # the one begun
        self.teacher_runs: Callable[[], bool] = lambda: False

    def before_epoch(self, trainer: Trainer, saved: Mapping[str, Any]) -> None:
        self.loader = trainer.train_loader
        if self._epoch != self.loader.epoch:  # else another run of the group has begun it
            self.begin(trainer.step, saved.get("known", 0))
            self._epoch = self.loader.epoch

    def before_forward(self, trainer: Trainer, inputs: dict[str, Any]) -> None:
        if self.teacher_runs():
            self._take_batch(trainer.step - 1, inputs["image"])
        inputs |= self.outputs.unpack(self.rows(trainer.step - 1))

    def epoch_numbers(self, trainer: Trainer) -> dict[str, float]:
        return self.finish()

    def columns(self, trainer: Trainer, record: Record) -> dict[str, str]:
        return {"cached %": f"{record['teacher_hits']:.0f}"}

    def epoch_state(self, trainer: Trainer) -> dict[str, Any]:
        self.keep(trainer.step)
        return {"known": self.known(trainer.step)}

    def begin(self, step: int = 0, hits: int = 0) -> None:
        """Read the stored rows of the epoch that the loader has drawn, and continue after `step`.

        Args:
            hits: how many images before `step` were stored, as :meth:`known` gave it.
        """
        if self._store is None:
            self._store = self._open()
        loader = self.loader
        batches = loader.batches()
        self._ends = np.cumsum([len(batch) for batch in batches])
        index = torch.cat(batches)
        self._slots = (index * self.views + loader.views.cpu()[index]).numpy()
        self._storable = (index < self.kept).numpy()
        stored = np.zeros(len(index), dtype=bool)
        rows = np.zeros((len(index), self.width), dtype=np.float32)
        chosen = self._slots[self._storable]
        stored[self._storable], rows[self._storable] = self._store.read(chosen)
        if self._store.replaced:
            print_log(
                f"teacher cache: the file was not this cache ({self._store.replaced}); it was "
                "replaced"
            )
            self._store.replaced = ""
        left_out = self._before(step)
        stored[:left_out] = np.arange(left_out) < hits  # as they were when the epoch began
        self._missing, self._found = np.flatnonzero(~stored), stored
        self._first = self._done = int(np.searchsorted(self._missing, left_out))  # of the missing
        self._rows = torch.from_numpy(rows).to(self.device)
        self._index = index.to(self.device)
        self._todo = torch.from_numpy(self._missing).to(self.device)

    def rows(self, step: int) -> Tensor:
        """The rows of the batch of a step (from 0): float32 [B, D], on the device."""
        start, stop = self._before(step), self._before(step + 1)
        needed = np.searchsorted(self._missing, stop)
        while self._done < needed:
            part = self._todo[self._done : self._done + self.loader.batch_size]
            rows = self._run(self.loader.images(self._index[self._filled(part)]))
            self._rows.index_copy_(0, part, rows[: len(part)])
            self._done += len(part)
        return self._rows[start:stop].clone()  # the method may write into it

    def _take_batch(self, step: int, images: Tensor) -> None:
        """Run the teacher on the whole batch of a step and take the missing rows from that."""
        start, stop = self._before(step), self._before(step + 1)
        needed = int(np.searchsorted(self._missing, stop))
        if self._done < needed and stop - start == self.loader.batch_size:
            part = self._todo[self._done : needed]
            self._rows.index_copy_(0, part, self._run(images)[part - start])
            self._done = needed

    def _before(self, step: int) -> int:
        """Number of images in the batches before a step."""
        return int(self._ends[step - 1]) if step else 0

    def known(self, step: int) -> int:
        """How many images of the steps before this one were cache hits when the epoch began."""
        return int(self._found[: self._before(step)].sum())

    def keep(self, step: int) -> None:
        """Store the new rows of the steps before this one.

        Raises:
            UserError: the teacher has changed since it was first run.
        """
        if teacher_digest(self.teacher) != self._weights:
            raise refusal(self.cfg, "the teacher has changed while the student was trained")
        stop = int(np.searchsorted(self._missing, self._before(step)))
        new, self._first = self._missing[self._first : stop], max(stop, self._first)
        new = new[self._storable[new]]
        if len(new) and self._writes:
            rows = self._rows[torch.from_numpy(new).to(self.device)].cpu().numpy()
            self._write(self._slots[new], rows)

    def finish(self) -> dict[str, float]:
        """Store the new rows; return the share of hits in percent, over all processes."""
        self.keep(len(self._ends))
        counts = torch.tensor([int(self._found.sum()), len(self._slots)], device=self.device)
        hits, total = sum_over_ranks(counts).tolist()
        return {"teacher_hits": 100.0 * hits / total}

    def _write(self, slots: Any, rows: Any) -> None:
        assert self._store is not None
        try:
            self._store.write(slots, rows)
        except OSError as error:
            self._writes = False
            print_log(f"teacher cache: no more outputs are stored: {error}")

    @torch.no_grad()
    def _run(self, images: Tensor) -> Tensor:
        with autocast(self.device, self.cfg.SOLVER.AMP):
            return self.outputs.pack(self.distiller.run_teacher(images))

    def _filled(self, part: Tensor) -> Tensor:
        """`part`, padded to a whole batch by its last index."""
        lacking = self.loader.batch_size - len(part)
        if not lacking:
            return part
        return torch.cat([part, part[-1:].expand(lacking)])

    def _open(self) -> MemoryStore | FileStore:
        """The store of this teacher, these images and views."""
        probes = self._probe()
        self.width, self._weights = probes.shape[1], teacher_digest(self.teacher)
        loader, settings = self.loader, self.cfg.DISTILLER
        on_disk = settings.TEACHER_CACHE == "disk"
        image_bytes = self.views * (4 * self.width + 8 * on_disk)
        self.kept = min(loader.num_data, int(settings.TEACHER_CACHE_GB * 1e9 / image_bytes))
        if not self.kept:
            raise UserError(
                f"DISTILLER.TEACHER_CACHE_GB {settings.TEACHER_CACHE_GB} does not hold the "
                f"{self.views} views of one image, {image_bytes / 1e9:.2g} GB; raise it"
            )
        place, store = "memory", None
        if on_disk:
            store = self._open_file(probes)
            place = str(store.path)
        text = f"{place}, {self.kept * image_bytes / 1e9:.3g} GB when full"
        if self.kept < loader.num_data:
            text += (
                f", for the first {self.kept} of {loader.num_data} images "
                "(DISTILLER.TEACHER_CACHE_GB)"
            )
        print_log(f"teacher cache: {text}")
        return store or MemoryStore(self.kept * self.views, self.width)

    def _open_file(self, probes: Any) -> FileStore:
        settings, loader = self.cfg.DISTILLER, self.loader
        key = {
            "network": digest(teacher_identity(self.cfg)),
            "weights": self._weights,
            "images": data_digest(loader),
            "views": view_digest(loader),
            "outputs": self.outputs.names,
            "kept": self.kept,
            "computation": computation(self.distiller, self.cfg, self.device),
        }
        default = Path(self.cfg.LOG.PREFIX) / "teacher_cache"
        path = Path(settings.TEACHER_CACHE_DIR or default) / f"{digest([repr(key)])}.logits"
        first = self.kept * self.views
        slots = np.arange(first, first + len(probes))
        try:
            store = FileStore(path, first + _PROBES, self.width, key)
            stored, rows = store.read(slots)
            if not self._close(rows[stored], probes[stored]):
                store.open(anew=True)
                store.replaced = "the teacher gives other outputs now"
            store.write(slots, probes)
        except OSError as error:
            raise UserError(f"{KEY}_DIR: {path} cannot be used: {error}") from None
        return store

    def _probe(self) -> Any:
        """Rows of a few images, [P, D], which must not depend on what else is in a batch."""
        size, images = self.loader.batch_size, self.loader.dataset.images
        some = torch.arange(size, device=self.device) % len(images)
        few = some[: max(1, min(_PROBES, size // 2))]
        alike = few.repeat(-(-size // len(few)))[:size]
        with preserve_state(self.teacher):
            first, second = (
                self._run(self.loader.normalize(images[index]))[: len(few)].cpu().numpy().copy()
                for index in (some, alike)
            )
        if not self._close(first, second):
            raise refusal(self.cfg, "the teacher's outputs depend on more than the image")
        return first

    def _close(self, first: Any, second: Any) -> bool:
        half = self.cfg.SOLVER.AMP != "none" or self.cfg.DISTILLER.TEACHER_DTYPE in ("bf16", "fp16")
        largest = np.abs(second[np.isfinite(second)]).max(initial=0.0)
        limit = (_CLOSE_HALF if half else _CLOSE) * largest
        return bool(np.allclose(first, second, rtol=0, atol=limit, equal_nan=True))
