"""Commands that start in milliseconds: forked from a process that has imported torch already.

Importing takes longer than most runs of the tests. As a script it reads a request from each line of
its standard input, runs a script in one or several processes, and prints their exit codes.
"""

import atexit
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

TIMEOUT = 300


class Server:
    """The process that is forked from; it ends with this one."""

    def __init__(self, environment):
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        atexit.register(self.process.stdin.close)

    def run(self, script, environment, cwd=None, processes=0):
        """Run a script as `subprocess.run` would, or as so many processes of one training.

        Of several, the output is that of all, and the code the first that is not 0.
        """
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder) / "out", Path(folder) / "err"
            request = {
                "argv": script,
                "environments": [environment | more for more in _worlds(processes) or [{}]],
                "cwd": str(cwd or os.getcwd()),
                "out": str(out),
                "err": str(err),
            }
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
            assert answer, "the process that commands are forked from has ended"
            codes = json.loads(answer)
            code = next((code for code in codes if code), 0)
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

    import mdistiller.cli.train
    import mdistiller.detection.run
    import mdistiller.engine.run  # noqa: F401

    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        running = {}
        for environment in request["environments"]:
            sys.stdout.flush()
            pid = os.fork()
            if pid == 0:
                _become(request, environment)
            running[pid] = len(running)
        print(json.dumps(_codes(running)), flush=True)


def _codes(running):
    """Exit codes in order; once one has failed, the others get ten seconds."""
    codes, end = [0] * len(running), time.monotonic() + TIMEOUT
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            codes[running.pop(pid)] = os.waitstatus_to_exitcode(status)
            if any(codes):
                end = min(end, time.monotonic() + 10)
        elif time.monotonic() > end:
            for pid in running:
                os.kill(pid, signal.SIGKILL)
        else:
            time.sleep(0.01)
    return codes


def _become(request, environment):
    """In the child: be the script."""
    code = 1
    try:
        os.setsid()
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
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    _serve()
