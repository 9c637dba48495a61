"""Loaders whose images are read in every epoch, by worker processes, for sets that fill no memory.

They give what the loaders over memory give: the same order, the same views of the augmentations
that both know, items on the device. Everything that is random is drawn in the main process, so no
number of workers changes it. Workers return whole batches in bytes, which travel from pinned memory
and are normalised on the device.
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
from mdistiller.dataset.files.file_set import FileSet
from mdistiller.dataset.files.transforms import EvalTransform, TrainTransform
from mdistiller.dataset.memory.loader import Epoch, EvalLoader, TrainLoader
from mdistiller.registry import UserError

PREFETCH = 4  # batches that each worker makes ahead


@dataclass(frozen=True)
class BatchRequest:
    """A batch to make: positions in the set, [B], and the parameters of their views, [B, P]."""

    index: Tensor
    parameters: Tensor | None = None


class Reader(Protocol):
    """Reads images, in a worker process."""

    def __call__(self, request: Any) -> Iterable[tuple[Tensor, str]]:
        """The images of a request, uint8 [3, H, W] of any size, each with its name for errors."""


@dataclass
class ImageReader:
    """Reads from a set with random access: files, or images in memory."""

    dataset: FileSet | ImageSet

    def __call__(self, request: BatchRequest) -> Iterator[tuple[Tensor, str]]:
        for i in request.index.tolist():
            name = str(self.dataset.path(i)) if isinstance(self.dataset, FileSet) else f"image {i}"
            yield self.dataset.image(i), name


class BatchBuilder(Protocol):
    """Makes the batch of a request, in a worker process."""

    def __getitem__(self, request: Any) -> Any:
        """Something with `to(device)` and `pin_memory()`, such as a tensor; or what is wrong."""


@dataclass
class ImageBatchBuilder:
    """Makes the batch of a request; the `dataset` of a DataLoader, whose keys are requests.

    Attributes:
        reader: gives the images.
        transform: of one image, its name and, for training, its parameters. Several views may be
            stacked, [V, 3, H, W]: a batch, normalised or not, then is [B, V, 3, H, W].
    """

    reader: Reader
    transform: Callable[..., Tensor]

    def __getitem__(self, request: BatchRequest) -> Tensor | str:
        """uint8, [B, 3, H, W]; or what is wrong, since an exception would lose its one line."""
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
    """The sampler of a DataLoader that lives for many epochs: whatever was put in last."""

    requests: Iterable[Any] = field(default_factory=tuple)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.requests)


class WorkerPool:
    """Worker processes that stay, and turn requests into batches on the device, in order.

    Args:
        builder: what a worker does; it must pickle where processes are spawned.
        num: of workers; 0 makes the batches in this process.
        device: where batches go.
        timeout: seconds to wait for a batch; 0: for ever.
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
            generator=torch.Generator(),  # else it would draw from the global one
            worker_init_fn=_set_signal_handlers,
            **staying,
        )
        _open.add(self)

    def close(self) -> None:
        """End the processes; batches that are asked for later start new ones.

        Nothing public of torch does. The garbage collector, where it frees the queues before the
        loader, and the interpreter's exit send one SIGTERM and wait.
        """
        running, self._loader._iterator = self._loader._iterator, None
        if running is not None and hasattr(running, "_shutdown_workers"):
            running._shutdown_workers()

    def batches(self, requests: Iterable[Any]) -> Iterator[Any]:
        """What the builder makes of each request (uint8, [B, 3, H, W], say), on the device.

        Raises:
            UserError: an image cannot be read, or a worker process died or hangs.
        """
        self._sampler.requests = requests
        batches = iter(self._loader)
        while True:
            try:
                made = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                raise _worker_failure(error) from error
            if isinstance(made, str):
                self.close()
                raise UserError(made)
            yield made.to(self.device, non_blocking=True)


_open: weakref.WeakSet[WorkerPool] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Before multiprocessing's hook, which signals once and then waits: it was registered first."""
    for workers in list(_open):
        workers.close()


def _identity_collate(made: Any) -> Any:
    return made


def _worker_failure(error: RuntimeError) -> Exception:
    """What torch says about a worker process, in a line; any other error as it is."""
    text = str(error)
    if "exited unexpectedly" in text or "killed by signal" in text:
        cause = " ".join(text.split()[:14])
        return UserError(
            f"a process that reads images has died ({cause} ...): killed, or out of memory; "
            "fewer DATASET.NUM_WORKERS take less"
        )
    if "timed out after" in text:
        return UserError(
            f"no batch of images came for long ({' '.join(text.split())}): the storage hangs, or a "
            "batch takes longer than DATASET.WORKER_TIMEOUT seconds"
        )
    return error


def _set_signal_handlers(worker: int) -> None:
    """Let a signal to the whole process group end the run between two steps, not its workers.

    A second SIGTERM ends a worker: that is how one which hangs is got rid of.
    """

    def once(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, once)
    for name in ("SIGINT", "SIGUSR1"):  # not all of them exist everywhere
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


class _WorkerLoader:
    """What both loaders share: a set that stays where it is, and who reads it."""

    dataset: Any
    _workers: WorkerPool

    def _place_images(self, dataset: Any, device: torch.device) -> None:
        self.dataset, self.device = dataset, device
        self._targets = dataset.targets.to(device)

    def _reader(self) -> Reader:
        return ImageReader(self.dataset)

    def close(self) -> None:
        """End the processes that read; another iteration starts new ones."""
        self._workers.close()


class WorkerTrainLoader(_WorkerLoader, TrainLoader):
    """Shuffled, augmented batches `(image, target, index)`; see :class:`TrainLoader`.

    Args:
        dataset: the training images.
        transform: makes the view of an image.
        num_workers: processes that do; of each process of the run.
        timeout: seconds to wait for a batch; 0: for ever.
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

    def _order(self, generator: torch.Generator) -> Tensor:
        """The positions of an epoch, [N]; of other processes' shares they are not used."""
        return torch.randperm(self.num_data, generator=generator)

    def _draw(self, generator: torch.Generator) -> Epoch:
        order = self._order(generator)
        parameters = self.augment.draw(self.num_data, generator)
        return Epoch(order, parameters, self.augment.views(parameters).to(self.device))

    def _request(self, step: int, drawn: Epoch) -> Any:
        """What a worker needs for the batch of a step."""
        index = drawn.order[slice(*self.batch_sampler.local_batch(step))]
        return BatchRequest(index, drawn.parameters[index])

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
