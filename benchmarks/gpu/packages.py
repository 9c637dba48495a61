"""Packages for a machine without a package index, installed from a folder of wheels."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

NEEDED = {  # module: distribution
    "torch": "torch",
    "torchvision": "torchvision",
    "numpy": "numpy",
    "PIL": "pillow",
    "filelock": "filelock",
    "google.protobuf": "protobuf",
    "packaging": "packaging",
    "tabulate": "tabulate",
    "tensorboardX": "tensorboardX",
    "tqdm": "tqdm",
    "yacs": "yacs",
    "yaml": "pyyaml",
}
FOR_TESTS = {
    "pytest": "pytest",
    "_pytest": "pytest",
    "iniconfig": "iniconfig",
    "pluggy": "pluggy",
    "pygments": "pygments",
    "narwhals": "narwhals",  # of scikit-learn from 1.9 on
    "sklearn": "scikit-learn",
    "scipy": "scipy",
    "joblib": "joblib",
    "threadpoolctl": "threadpoolctl",
}


def missing(modules: dict[str, str]) -> list[str]:
    """The distributions whose modules are not installed."""
    names = []
    for module, name in modules.items():
        try:
            there = importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:  # not even the package around it
            there = False
        if not there and name not in names:
            names.append(name)
    return names


def install(names: list[str], wheels: Path, target: Path) -> str:
    """Install wheels into a folder, without an index and without what they depend on.

    Returns:
        Why that failed, in one line; empty where it did not.
    """
    words = ["install", "-q", "--no-index", "--no-deps", "--find-links", str(wheels)]
    pip = [sys.executable, "-m", "pip", *words, "--target", str(target), *names]
    done = subprocess.run(pip, capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return "" if done.returncode == 0 else (lines or ["pip failed"])[-1]


def available(names: list[str], wheels: Path) -> list[str]:
    """Those of the distributions whose wheels are in a folder."""
    there = {_plain(wheel.name.split("-")[0]) for wheel in wheels.glob("*.whl")}
    return [name for name in names if _plain(name) in there]


def _plain(name: str) -> str:
    return name.lower().replace("-", "_").replace(".", "_")
