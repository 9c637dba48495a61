"""Forked commands end as real ones do."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import support
from support import run_script


@pytest.fixture
def script(tmp_path):
    def write(text):
        path = tmp_path / "script.py"
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        ("", 0, ""),
        ("sys.exit(3)", 3, ""),
        ("sys.exit('no')", 1, "no\n"),
        ("os.kill(os.getpid(), 9)", -9, ""),
        ("1 / 0", 1, "ZeroDivisionError: division by zero\n"),
    ],
)
def test_exit_codes_and_output(script, tmp_path, end, code, said):
    path = script(f"import os, sys\nprint(os.getcwd(), *sys.argv[1:], flush=True)\n{end}\n")
    done = run_script(path, 1, "a b", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (code, f"{tmp_path} 1 a b\n")
    assert done.stderr.endswith(said)
    assert bool(done.stderr) == bool(said)


def test_of_several_the_first_to_fail_gives_the_code(script):
    path = script(
        "import os, sys, time\n"
        "if os.environ['RANK'] == '1': sys.exit(5)\n"
        "time.sleep(0.5)\n"
        "sys.exit(6)\n"
    )
    assert run_script(path, processes=2).returncode == 5


def test_nothing_random_is_repeated(script):
    path = script("import numpy, random, torch\nprint(numpy.random.rand(), torch.rand(1).item())\n")
    words = [word for _ in range(2) for word in run_script(path).stdout.split()]
    assert len(set(words)) == 4


def test_a_thread_is_waited_for(script):
    path = script(
        "import threading, time\n"
        "threading.Thread(target=lambda: (time.sleep(0.3), print(7))).start()\n"
    )
    assert run_script(path).stdout == "7\n"


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_what_takes_too_long_is_an_error_and_leaves_nothing(script, tmp_path):
    server = support._server()
    path = script(
        "import os, sys, time\n"
        "for _ in range(2):\n"
        "    os.fork()\n"
        "open(f'{sys.argv[1]}/{os.getpid()}', 'w')\n"
        "time.sleep(60)\n"
    )
    with pytest.raises(subprocess.TimeoutExpired):
        server.run([str(path), str(tmp_path)], server.environment, tmp_path, timeout=1)
    left = [int(name.name) for name in tmp_path.iterdir() if name.name.isdigit()]
    assert len(left) == 4
    deadline = time.monotonic() + 10
    while any(map(alive, left)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, left))


def alive(pid):
    """Whether a process runs; one that is dead and only waits to be collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
