"""What an installed mdistiller consists of."""

import shutil
import subprocess
import sys
import zipfile

from support import REPO


def test_the_wheel_holds_what_users_need_and_nothing_else(tmp_path):
    """Benchmarks, fault injection and textbook forms stay in the checkout."""
    source = tmp_path / "source"
    for name in ("mdistiller", "configs", "benchmarks", "tests", "docs", "tools"):
        shutil.copytree(REPO / name, source / name)
    for name in ("setup.py", "pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(REPO / name, source)
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(tmp_path)!r})"
    done = subprocess.run(
        [sys.executable, "-c", build], cwd=source, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    modules = {name for name in names if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in modules} == {"mdistiller"}
    for name in (
        "report/page.html",
        "configs/cifar100/kd.yaml",
        "results/published.csv",
        "pages/methods.md",
        "config/stored_defaults.json",
    ):
        assert f"mdistiller/{name}" in modules
    words = ("benchmark", "textbook", "bad_inputs", "bad_configs", "test")
    assert [name for name in modules if any(word in name for word in words)] == []
    assert not any("/faults" in name for name in modules)
