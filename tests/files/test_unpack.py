"""Archives: honest ones arrive whole, others leave nothing. The rest is in test_bad_inputs.py."""

import io
import os
import tarfile
import zipfile

import pytest

from mdistiller.files import Limits, move_in, unpacked
from mdistiller.registry import UserError

FILES = {"top/a.txt": b"hello", "top/sub/b.bin": bytes(range(256)) * 300, "top/empty": b""}


def write_tar(path, mode="w", members=None):
    with tarfile.open(path, mode) as tar:
        for name, data in (members or FILES).items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_zip(path, members=None):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bundle:
        for name, data in (members or FILES).items():
            bundle.writestr(name, data)
    return path


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz", "zip"])
def test_what_is_in_arrives(tmp_path, mode):
    path = tmp_path / "archive"
    write_zip(path) if mode == "zip" else write_tar(path, mode)
    with unpacked(path, tmp_path, "it") as folder:
        assert contents(folder) == FILES
        assert folder.parent == tmp_path
        (tmp_path / "target").mkdir()
        (tmp_path / "target" / "old").write_text("")
        move_in(folder / "top", tmp_path / "target")
        with pytest.raises(UserError, match="the archive has no file other"):
            move_in(folder / "other", tmp_path / "target")
    assert sorted(os.listdir(tmp_path)) == ["archive", "target"]
    assert sorted(os.listdir(tmp_path / "target")) == ["a.txt", "empty", "sub"]


def refused(path, limits=Limits()):  # noqa: B008 (frozen)
    with pytest.raises(UserError) as caught, unpacked(path, path.parent, "it", limits):
        pass
    assert "\n" not in str(caught.value)
    assert os.listdir(path.parent) == [path.name]
    return str(caught.value)


@pytest.mark.parametrize("write", [write_tar, write_zip])
def test_limits(tmp_path, write):
    path = write(tmp_path / "archive")
    total = sum(map(len, FILES.values()))
    assert "unpacks to more than it may" in refused(path, Limits(bytes=total - 1))
    assert "too many files" in refused(path, Limits(files=2))
    with unpacked(path, tmp_path, "it", Limits(bytes=total, files=3)) as folder:
        assert contents(folder) == FILES


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz", "zip"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.6])
def test_a_truncated_archive_leaves_nothing(tmp_path, mode, share):
    noise = {f"top/{k}": os.urandom(20_000) for k in range(3)}
    path = tmp_path / "archive"
    write_zip(path, noise) if mode == "zip" else write_tar(path, mode, noise)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert refused(path).startswith("it is not unpacked: ")
