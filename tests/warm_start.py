"""Commands that start in milliseconds: forked from a process that has imported torch already.

Importing takes longer than most runs of the tests. As a script it reads a request from each line of
its standard input, runs a script in one or several processes, and prints their exit code.

Hashes of strings and what is imported already are the same in all of them, and destructors do not
run at the end. A test of such things, or of Python's start, wants a process of its own.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

import numpy
import torch

IMPORTED = (
    "torch._dynamo",  # by the first optimizer
    "mdistiller.cli.train",
    "mdistiller.detection.run",
    "mdistiller.run.train",
)
TIMEOUT = 300.0  # seconds


class Server:
    """The process that is forked from; it ends with this one, or when a request is broken off.

    Args:
        environment: what it starts with; commands get their own, but modules are imported by now.
    """

    def __init__(self, environment):
        self.environment = environment
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        atexit.register(self.process.kill)

    def run(self, script, environment, cwd=None, processes=0, timeout=TIMEOUT):
        """Run a script as `subprocess.run` would, or as several processes of one training.

        Of several, the output is that of all, and the code that of the first to fail.

        Raises:
            subprocess.TimeoutExpired: it takes more than `timeout` seconds.
        """
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder) / "out", Path(folder) / "err"
            request = {
                "argv": script,
                "environments": [environment | more for more in _worlds(processes) or [{}]],
                "cwd": str(cwd or os.getcwd()),
                "out": str(out),
                "err": str(err),
                "timeout": timeout,
            }
            try:
                self.process.stdin.write(json.dumps(request).encode() + b"\n")
                self.process.stdin.flush()
                answered, _, _ = select.select([self.process.stdout], [], [], 2 * timeout + 10)
                assert answered, "no answer"
                code = json.loads(self.process.stdout.readline())
            except BaseException:
                self.process.kill()  # or the next request would get the answer to this one
                raise
            if code is None:
                raise subprocess.TimeoutExpired(script, timeout, out.read_text(), err.read_text())
            return subprocess.CompletedProcess(script, code, out.read_text(), err.read_text())


def _worlds(processes):
    """What torchrun sets for each process of a machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    worlds = [shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(processes)]
    return [{key: str(value) for key, value in world.items()} for world in worlds]


def _serve():
    os.fsync = lambda handle: None  # nothing here has to outlive a crash of the machine
    for name in IMPORTED:
        importlib.import_module(name)
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        running = []
        for environment in request["environments"]:
            sys.stdout.flush()
            pid = os.fork()
            if pid == 0:
                _become(request, environment)
            running.append(pid)
        print(json.dumps(_code(running, request["timeout"])), flush=True)


def _code(running, timeout):
    """Exit code of the first process to fail, or 0; once one has, the others get ten seconds.

    None where time is up.
    """
    code, end = 0, time.monotonic() + timeout
    late = False
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            running.remove(pid)
            if not code and status:
                code = os.waitstatus_to_exitcode(status)
                end = min(end, time.monotonic() + 10)
        elif time.monotonic() > end:
            late = late or not code
            for pid in running:
                os.killpg(pid, signal.SIGKILL)
            time.sleep(0.1)
        else:
            time.sleep(0.01)
    return None if late else code


def _become(request, environment):
    """In the child: be the script."""
    code = 1
    try:
        os.setsid()
        numpy.random.seed()  # as in a new process, nothing is repeated without a seed
        torch.seed()
        # A forked process makes torch's pool of threads anew when it is first asked for; autograd's
        # threads, which all ask at once, may find none and crash.
        torch.set_num_threads(1)
        for number, name in ((0, os.devnull), (1, request["out"]), (2, request["err"])):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(request["cwd"])
        sys.argv = request["argv"]
        sys.path[0] = str(Path(sys.argv[0]).parent)
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if code and not isinstance(ended.code, int):
            print(ended.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()  # waits for threads, as Python does at its end
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    _serve()
