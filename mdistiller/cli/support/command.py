"""What all commands share: user errors become one line and an exit code."""

from __future__ import annotations

import argparse
import errno
import os
import sys
import traceback
from collections.abc import Callable

from mdistiller.registry import UserError
from mdistiller.runtime import keep_freed_memory

FAILED = 1
BAD_INPUT = 2
INTERRUPTED = 130
PIPE_CLOSED = 141  # as a shell counts SIGPIPE
_NO_PLACE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
# how gloo and NCCL say that the other end of a connection is gone
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "process exited")
_LATE = ("Timed out", "timed out", "Application timeout", "operation timeout")  # gloo, NCCL


def guarded(command: Callable[[], object]) -> int:
    """Run `command`; 0, or the exit code of what ended it.

    They are that of a user's error (2), of a run that a signal ended with its state saved (75), of
    Ctrl-C elsewhere (130), and of a reader such as `| head` that has enough (141).

    Of several processes one tells why they end: the first, if the cause is the same in all.
    """
    rank = os.environ.get("RANK", "0")
    who = "error" if rank == "0" else f"error (rank {rank})"
    keep_freed_memory()
    try:
        import mdistiller.detection  # noqa: F401  # registers what configs and reports have of it

        command()
        sys.stdout.flush()
    except UserError as error:
        return _end(f"{who}: {' '.join(str(error).split())}", BAD_INPUT)
    except KeyboardInterrupt as stop:
        advice = "continue a training run with --resume, a sweep by the same command"
        if rank == "0":
            print(str(stop) or f"interrupted; {advice}", file=sys.stderr, flush=True)
        return getattr(stop, "code", INTERRUPTED)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return PIPE_CLOSED
        if error.errno not in _NO_PLACE:
            raise
        what = f"{error.filename}: " if error.filename else ""
        return _end(f"{who}: cannot write {what}{error.strerror}", BAD_INPUT)
    except Exception as error:
        if os.environ.get("WORLD_SIZE", "1") == "1":
            raise
        if any(sign in str(error) for sign in _LOST):
            text = "another process ended without a word (killed, out of memory?); the launcher's"
            return _end(f"{who}: {text} report names it", FAILED)
        if any(sign in str(error) for sign in _LATE):
            text = "another process has not come to where this one is within SOLVER.RANK_TIMEOUT"
            return _end(f"{who}: {text}: it hangs or is stopped", FAILED)
        return _end(f"{who}:\n{traceback.format_exc()}", FAILED)
    return 0


def command_line(
    parser: Callable[[], argparse.ArgumentParser], command: Callable[[argparse.Namespace], object]
) -> Callable[..., int]:
    """A command's `main(argv=None)`: parses the arguments, and returns the exit code."""

    def main(argv: list[str] | None = None) -> int:
        args = parser().parse_intermixed_args(argv)
        return guarded(lambda: command(args))

    return main


def _nobody_reads() -> bool:
    """Whether standard output is a closed pipe; what is left for it is then discarded."""
    try:
        print(flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return True
    return False


def _end(text: str, code: int) -> int:
    if os.environ.get("WORLD_SIZE", "1") == "1":
        print(text, file=sys.stderr, flush=True)
        return code
    from mdistiller.distributed.failure import first_to_fail, leave

    first = first_to_fail()
    if first:
        print(text, file=sys.stderr, flush=True)
    leave(first)
    return code


def add_overrides(parser: argparse.ArgumentParser, before: str = "") -> None:
    """The trailing KEY VALUE pairs and --import.

    Args:
        before: what other words stand before the pairs.
    """
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="FILE",
        help="Python file or module that registers methods, models or data sets; may be repeated",
    )
    parser.add_argument(
        "--fork",
        dest="imports",
        action="append",
        type=lambda folder: f"{folder.rstrip('/')}/",
        metavar="DIR",
        help="a fork of the original mdistiller, whose methods, trainers and defaults are taken",
    )
    parser.add_argument(
        "opts",
        nargs="*",
        metavar=f"{before} KEY VALUE".strip(),
        help=f"{before and 'then '}config overrides, e.g. SOLVER.LR 0.1",
    )
