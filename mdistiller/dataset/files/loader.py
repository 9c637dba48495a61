"""Loaders whose images worker processes read in every epoch, for sets that do not fit in memory.

They give the same batches as the loaders over memory: same order, same augmentation, items on the
device. The main process draws all random numbers, so the number of workers does not matter. Workers
return whole uint8 batches, which are copied from pinned memory and normalised on the device.
"""

from __future__ import annotations

import atexit
import signal
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from mdistiller.dataset.data_source import ImageSet
from mdistiller.dataset.files.file_set import FileSet, image_name
from mdistiller.dataset.files.transforms import EvalTransform, Picture, TrainTransform
from mdistiller.dataset.memory.loader import Epoch, EvalLoader, TrainLoader
from mdistiller.registry import UserError

PREFETCH = 4  # batches that each worker prepares ahead


@dataclass(frozen=True)
class BatchRequest:
    """A batch to build: positions in the set, [B], and augmentation parameters, [B, P]."""

    index: Tensor
    parameters: Tensor | None = None


class Reader(Protocol):
    """Reads images, in a worker process."""

    def __call__(self, request: Any) -> Iterable[tuple[Picture, str]]:
        """The images of a request, uint8 [3, H, W] or files, each with its name for errors."""


@dataclass
class ImageReader:
    """Reads images from a set with random access: files, or images in memory."""

    dataset: FileSet | ImageSet

    def __call__(self, request: BatchRequest) -> Iterator[tuple[Picture, str]]:
        for i in request.index.tolist():
            data = self.dataset
            image = data.encoded(i) if isinstance(data, FileSet) else data.image(i)
            yield image, image_name(data, i)


class BatchBuilder(Protocol):
    """Builds the batch of a request in a worker process."""

    def __getitem__(self, request: Any) -> Any:
        """An object with `to(device)` and `pin_memory()`, such as a tensor; or an error text."""


@dataclass
class ImageBatchBuilder:
    """Builds the batch of a request: the `dataset` of a DataLoader whose keys are requests.

    Attributes:
        reader: reads the images.
        transform: of one image, its name and, for training, its parameters. Several views may be
            stacked, [V, 3, H, W]: a batch, normalised or not, then is [B, V, 3, H, W].
    """

    reader: Reader
    transform: Callable[..., Tensor]

    def __getitem__(self, request: BatchRequest) -> Tensor | str:
        """uint8, [B, 3, H, W]; or an error text: DataLoader adds a traceback to exceptions."""
        rows = () if request.parameters is None else (request.parameters,)
        try:
            views = [
                self.transform(image, name, *row)
                for (image, name), *row in zip(self.reader(request), *rows, strict=True)
            ]
        except UserError as error:
            return str(error)
        return torch.stack(views)


@dataclass
class _RequestSampler:
    """Sampler of a DataLoader that lives for many epochs; `requests` are set for each."""

    requests: Iterable[Any] = field(default_factory=tuple)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.requests)


class WorkerPool:
    """Persistent worker processes that turn requests into batches on the device, in order.

    Args:
        builder: builds a batch; must be picklable where processes are spawned.
        num: number of workers; 0 builds the batches in this process.
        device: of the batches.
        timeout: seconds to wait for a batch; 0: no limit.
    """

    def __init__(self, builder: BatchBuilder, num: int, device: torch.device, timeout: float = 0):
        self.device = device
        self._sampler = _RequestSampler()
        staying: dict[str, Any] = {}
        if num:
            staying = {"persistent_workers": True, "prefetch_factor": PREFETCH, "timeout": timeout}
        self._loader: DataLoader[Any] = DataLoader(
            builder,  # type: ignore[arg-type]
            batch_size=None,
            sampler=self._sampler,
            num_workers=num,
            collate_fn=_identity_collate,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # leaves the global one alone
            worker_init_fn=_set_signal_handlers,
            **staying,
        )
        _open.add(self)

    def close(self) -> None:
        """End the processes; later batches start new ones.

        torch has no public function for this. Without it, exit sends one SIGTERM and waits.
        """
        running, self._loader._iterator = self._loader._iterator, None
        if running is not None and hasattr(running, "_shutdown_workers"):
            running._shutdown_workers()

    def batches(self, requests: Iterable[Any]) -> Iterator[Any]:
        """The batch of each request on the device, such as uint8 [B, 3, H, W].

        Raises:
            UserError: an image cannot be read, or a worker process died or hangs.
        """
        self._sampler.requests = requests
        batches = iter(self._loader)
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                raise _worker_failure(error) from error
            if isinstance(batch, str):
                self.close()
                raise UserError(batch)
            yield batch.to(self.device, non_blocking=True)


_open: weakref.WeakSet[WorkerPool] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Runs before the exit hook of multiprocessing, which signals once and then waits."""
    for workers in list(_open):
        workers.close()


def _identity_collate(batch: Any) -> Any:
    return batch


def _worker_failure(error: RuntimeError) -> Exception:
    """One line for torch's error about a worker process; any other error unchanged."""
    text = str(error)
    if "exited unexpectedly" in text or "killed by signal" in text:
        cause = " ".join(text.split()[:14])
        return UserError(
            f"a data loading worker died ({cause} ...): killed, or out of memory; a smaller "
            "DATASET.NUM_WORKERS takes less memory"
        )
    if "timed out after" in text:
        return UserError(
            f"data loading timed out ({' '.join(text.split())}): the storage hangs, or a batch "
            "takes longer than DATASET.WORKER_TIMEOUT seconds"
        )
    return error


def _set_signal_handlers(worker: int) -> None:
    """Ignore signals to the process group, so that the run can end between two steps.

    A second SIGTERM ends a worker, also one that hangs.
    """

    def once(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, once)
    for name in ("SIGINT", "SIGUSR1"):  # not all of them exist everywhere
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


class _WorkerLoader:
    """Shared by both loaders: a set that stays on the CPU or disk, and its workers."""

    dataset: Any
    _workers: WorkerPool

    def _place_images(self, dataset: Any, device: torch.device) -> None:
        self.dataset, self.device = dataset, device
        self._targets = dataset.targets.to(device)

    def _reader(self) -> Reader:
        return ImageReader(self.dataset)

    def close(self) -> None:
        """End the worker processes; another iteration starts new ones."""
        self._workers.close()


class WorkerTrainLoader(_WorkerLoader, TrainLoader):
    """Shuffled, augmented batches `(image, target, index)`; see :class:`TrainLoader`.

    Args:
        dataset: the training images.
        transform: makes the view of an image.
        num_workers: worker processes for each process of the run.
        timeout: seconds to wait for a batch; 0: no limit.
    """

    makes_images = False

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        transform: TrainTransform,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        *,
        num_workers: int = 2,
        timeout: float = 0,
        **options: Any,
    ):
        super().__init__(dataset, batch_size, transform, mean, std, device, **options)  # type: ignore[arg-type]
        self._workers = WorkerPool(
            ImageBatchBuilder(self._reader(), transform), num_workers, device, timeout
        )

    def _draw(self, generator: torch.Generator) -> Epoch:
        order = self._order(generator)
        parameters = self.augment.draw(self.num_data, generator)
        return Epoch(order, parameters, self.augment.views(parameters).to(self.device))

    def _request(self, step: int, drawn: Epoch) -> Any:
        """The request for the batch of a step."""
        part = slice(*self.batch_sampler.local_batch(step))
        index = drawn.order[part]
        return BatchRequest(index, drawn.parameters[part if self.balanced else index])

    def _batches(self, drawn: Epoch, start: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        requests = (self._request(step, drawn) for step in range(start, len(self.batch_sampler)))
        for step, images in enumerate(self._workers.batches(requests), start):
            index = drawn.order[slice(*self.batch_sampler.local_batch(step))]
            index = index.to(self.device, non_blocking=True)
            yield self.normalize(images), self._targets[index], index


class WorkerEvalLoader(_WorkerLoader, EvalLoader):
    """Batches `(image, target)` without augmentation; see :class:`EvalLoader`."""

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        transform: EvalTransform,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        *,
        num_workers: int = 2,
        timeout: float = 0,
        **options: Any,
    ):
        super().__init__(dataset, batch_size, mean, std, device, **options)
        self._workers = WorkerPool(
            ImageBatchBuilder(self._reader(), transform), num_workers, device, timeout
        )

    def _batch_requests(self) -> Iterator[Any]:
        for start, stop in self._slices():
            yield BatchRequest(torch.arange(start, stop))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        requests = list(self._batch_requests())
        for request, images in zip(requests, self._workers.batches(requests), strict=True):
            index = request.index.to(self.device, non_blocking=True)
            yield self.normalize(images), self._targets[index]
