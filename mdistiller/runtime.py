"""Where the process runs: device, rank among processes, project folder.

torch is imported where it is needed: a command's --help and errors about files come without it.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdistiller.registry import UserError

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

LONGEST = datetime.timedelta(days=7)
"""What processes wait for one another where one has long work to do."""

_PACKAGE = Path(__file__).resolve().parent


def project_root() -> Path:
    """The checkout this package is imported from, or the working directory if it is installed.

    `data/`, `download_ckpts/` and relative config paths are looked for here.
    """
    checkout = _PACKAGE.parent
    return checkout if (checkout / "pyproject.toml").is_file() else Path.cwd()


def config_root() -> Path:
    """Folder of the YAML files: `configs/` of the checkout, or the copy inside the package."""
    checkout = _PACKAGE.parent / "configs"
    return checkout if (_PACKAGE.parent / "pyproject.toml").is_file() else _PACKAGE / "configs"


def results_root() -> Path:
    """Folder of the published numbers: `docs/results/` of the checkout, or the package's copy."""
    checkout = _PACKAGE.parent
    inside = (checkout / "pyproject.toml").is_file()
    return checkout / "docs" / "results" if inside else _PACKAGE / "results"


def page_file() -> Path:
    """The table of methods: `docs/methods.md` of the checkout, or the package's copy."""
    checkout = _PACKAGE.parent
    inside = (checkout / "pyproject.toml").is_file()
    return (checkout / "docs" if inside else _PACKAGE / "pages") / "methods.md"


def resolve_device(name: str = "auto") -> torch.device:
    """The torch device for a config value.

    Args:
        name: "auto" (CUDA, else MPS, else CPU), "cpu", "mps", "cuda" or "cuda:N". Under several
            processes "cuda" means the GPU with this process's local rank.

    Raises:
        UserError: the name is not a device, or the machine lacks it.
    """
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            name = "cuda"
        else:
            name = "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"DEVICE {name!r} is not a device; use auto, cpu, cuda, cuda:N or mps")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if device.index is None and count:
            return torch.device("cuda", local_rank() % count)
        if count <= (device.index or 0):
            raise UserError(
                f"DEVICE {name!r} was asked for, but this machine has {count} usable CUDA devices; "
                "use DEVICE auto or cpu"
            )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(
            "DEVICE 'mps' was asked for, but it is not available; use DEVICE auto or cpu"
        )
    return device


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """The mixed-precision context of `SOLVER.AMP`; without effect for "none"."""
    import torch

    dtype = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def distributed() -> bool:
    """Whether a process group of torch.distributed is up."""
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Rank of this process, 0 without a process group."""
    import torch.distributed as dist

    return dist.get_rank() if distributed() else 0


def world_size() -> int:
    """Number of processes, 1 without a process group."""
    import torch.distributed as dist

    return dist.get_world_size() if distributed() else 1


def side_group() -> dist.ProcessGroup:
    """A second group of all processes, over gloo, for barriers and objects between training steps.

    Its timeout is days, since the first process may work for hours (counting shards, waiting for a
    teacher that another run trains). It never waits for a GPU. Its first call creates it, so all
    processes must make that call at the same point.
    """
    import torch.distributed as dist

    world = dist.group.WORLD
    if _side.get("of") is not world:
        _side.update(of=world, group=dist.new_group(backend="gloo", timeout=LONGEST))
    return _side["group"]


_side: dict[str, Any] = {}


def barrier(seconds: float | None = None) -> None:
    """Wait until all processes have reached this call; return at once without a process group.

    Args:
        seconds: how long to wait; None allows days, for what only the first process does (a
            download, a teacher that another run trains).

    Raises:
        RuntimeError: a process failed, or has not arrived after `seconds`.
    """
    if distributed():
        import torch.distributed as dist

        timeout = LONGEST if seconds is None else datetime.timedelta(seconds=seconds)
        dist.barrier(group=side_group(), async_op=True).wait(timeout)


def fail_together(error: Exception | None) -> None:
    """Raise in all processes what one of them has met; all must call it at the same point.

    Args:
        error: what ended this process's work, None if it succeeded.

    Raises:
        Exception: `error` itself; in the others a UserError or RuntimeError of the same text.
    """
    failures: list[Any] = [None] * world_size()
    if distributed():
        import torch.distributed as dist

        mine = error and (isinstance(error, UserError), str(error) or repr(error))
        dist.all_gather_object(failures, mine, group=side_group())
    if error is not None:
        raise error
    for users, text in filter(None, failures):
        raise UserError(text) if users else RuntimeError(text)


@contextlib.contextmanager
def local_rank_zero_first() -> Iterator[None]:
    """Run the block in one process of each machine first, which leaves files for the others.

    Where it fails there, it fails in all processes.
    """
    if local_rank() != 0:
        fail_together(None)
        yield
        return
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    fail_together(error)


def local_rank() -> int:
    """Rank on this machine, as torchrun gives it."""
    return int(os.environ.get("LOCAL_RANK", 0))


def keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next tensors; call it once, at the start of a command.

    By default glibc hands every freed block of more than 128 KB (at most 32 MB) back to the system,
    and the next tensor of that size takes it again, page by page: in the evaluation of a timm
    EfficientNet the kernel then works longer than the convolutions. The process keeps its largest
    use of memory until it ends. Other systems, other allocators, and processes whose environment
    sets glibc's own variables are left alone.
    """
    chosen = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in chosen):
        return
    allocator = ctypes.CDLL(None)
    for option, value in _MALLOPT.items():
        allocator.mallopt(option, value)


_MALLOPT = {
    -1: 2**31 - 1,  # M_TRIM_THRESHOLD: bytes free at the heap's end before they are handed back
    -3: 2**30,  # M_MMAP_THRESHOLD: from this size on a block is the system's, and freed to it
    -8: 1,  # M_ARENA_MAX: threads share the one heap, whose blocks may be of any size
}
