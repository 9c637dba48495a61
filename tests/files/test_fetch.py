"""Downloads from a local server that behaves badly."""

import hashlib
import os
import socket
import subprocess
import sys
from types import SimpleNamespace
from urllib.error import URLError

import pytest
from file_server import serving

from mdistiller.files import fetch
from mdistiller.registry import UserError

fetching = sys.modules["mdistiller.files.fetch"]
DATA = bytes(range(256)) * 2000
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch):
    monkeypatch.setattr(fetching, "PAUSE", 0.0)


@pytest.fixture
def site():
    with serving(files={"w": DATA}) as up:
        yield up


def refused(*args, **kwargs):
    with pytest.raises(UserError) as caught:
        fetch(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def visible(folder):
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))


def test_a_file_arrives_whole_and_alone_and_once(site, tmp_path):
    for _ in range(2):
        fetch(f"{site.url}/w", tmp_path / "new" / "w", "it", sha256=SHA256[:8], size=len(DATA))
    assert (tmp_path / "new" / "w").read_bytes() == DATA
    assert os.listdir(tmp_path / "new") == ["w"]
    assert site.log == [""]


def test_a_cut_connection_is_continued_where_it_ended(site, tmp_path):
    site.cut = [1000, 70_000, 5]
    fetch(f"{site.url}/w", tmp_path / "w", "it")
    assert (tmp_path / "w").read_bytes() == DATA
    assert site.log == ["", "bytes=1000-", "bytes=71000-", "bytes=71005-"]


def test_a_server_without_ranges_is_asked_from_the_start(site, tmp_path):
    site.ranges, site.cut = False, [1000, 70_000]
    fetch(f"{site.url}/w", tmp_path / "w", "it", sha256=SHA256)
    assert (tmp_path / "w").read_bytes() == DATA


def test_a_server_that_always_cuts_is_given_up(site, tmp_path):
    site.ranges, site.cut = False, [1000, 500] * 25
    assert "of 512000 bytes" in refused(f"{site.url}/w", tmp_path / "w", "it")
    assert len(site.log) == 1 + fetching.ATTEMPTS
    assert visible(tmp_path) == ["w.part", "w.part.json"]


def leave_part(site, tmp_path):
    """A partial file of 1,000 bytes, as an interrupted process leaves it."""
    site.cut, site.status = [1000], []
    site.ranges = True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fetching, "ATTEMPTS", 0)
        refused(f"{site.url}/w", tmp_path / "w", "it")
    site.log.clear()


def test_another_process_goes_on_with_a_partial_file(site, tmp_path):
    leave_part(site, tmp_path)
    fetch(f"{site.url}/w", tmp_path / "w", "it")
    assert (tmp_path / "w").read_bytes() == DATA
    assert site.log == ["bytes=1000-"]


def test_a_file_that_has_changed_meanwhile_is_not_mixed(site, tmp_path):
    leave_part(site, tmp_path)
    site.files["w"], site.etag = DATA[::-1], '"two"'
    fetch(f"{site.url}/w", tmp_path / "w", "it")
    assert (tmp_path / "w").read_bytes() == DATA[::-1]


def test_without_validator_and_hash_a_partial_file_is_not_trusted(site, tmp_path):
    site.etag = ""
    leave_part(site, tmp_path)
    fetch(f"{site.url}/w", tmp_path / "w", "it")
    assert site.log == [""]


def test_a_damaged_partial_file_costs_one_more_download(site, tmp_path):
    leave_part(site, tmp_path)
    (tmp_path / "w.part").write_bytes(b"x" * 1000)
    fetch(f"{site.url}/w", tmp_path / "w", "it", sha256=SHA256)
    assert (tmp_path / "w").read_bytes() == DATA
    assert site.log == ["bytes=1000-", ""]


def test_a_partial_file_that_is_whole_or_too_long(site, tmp_path):
    for content in (DATA, DATA + b"more"):
        leave_part(site, tmp_path)
        (tmp_path / "w.part").write_bytes(content)
        fetch(f"{site.url}/w", tmp_path / "w", "it")
        assert (tmp_path / "w").read_bytes() == DATA
        (tmp_path / "w").unlink()


def test_a_wrong_hash_or_size_leaves_nothing(site, tmp_path):
    url = f"{site.url}/w"
    assert "wrong hash: sha256 " in refused(url, tmp_path / "w", "it", sha256="00" * 32)
    assert "wrong hash: md5 " in refused(url, tmp_path / "w", "it", md5="00" * 16)
    assert "512000 bytes, expected 7" in refused(url, tmp_path / "w", "it", size=7)
    assert visible(tmp_path) == []


def test_a_busy_server_is_asked_again_and_a_missing_file_is_not(site, tmp_path):
    site.status = [503, 429]
    fetch(f"{site.url}/w", tmp_path / "w", "it")
    url = f"{site.url}/nothing"
    text = refused(url, tmp_path / "n", "the thing")
    assert text == (
        "the thing could not be downloaded (the server answers 404 Not Found); "
        f"get {url} and put it at {tmp_path / 'n'}"
    )
    site.status = [503] * 50
    assert "answers 503" in refused(f"{site.url}/w", tmp_path / "n", "it", advice="do so")
    assert len(site.status) == 49 - fetching.ATTEMPTS + 1


def test_no_network(tmp_path):
    with serving() as gone:
        pass
    assert "no connection: " in refused(f"{gone.url}/w", tmp_path / "w", "it")


@pytest.mark.parametrize("url", ["http://example.com/w", "ftp://example.com/w", "w"])
def test_only_https_is_used(tmp_path, url):
    assert f"({url} is not https)" in refused(url, tmp_path / "w", "it")


@pytest.mark.parametrize("target", ["http://example.com/w", "file:///etc/hostname"])
def test_a_redirect_to_something_else_is_not_followed(site, tmp_path, target):
    site.moved = {"old": target}
    text = refused(f"{site.url}/old", tmp_path / "w", "it")
    assert "is not https" in text or "redirect" in text
    assert visible(tmp_path) == []
    site.moved = {"old": f"{site.url}/w"}
    fetch(f"{site.url}/old", tmp_path / "w", "it")


@pytest.mark.parametrize("url", ["https://[x", "https://", "http://127.0.0.1:9/a b"])
def test_an_address_that_is_none_is_not_tried_again(tmp_path, monkeypatch, url):
    monkeypatch.setattr(fetching.time, "sleep", lambda seconds: pytest.fail("a second attempt"))
    assert "could not be downloaded (" in refused(url, tmp_path / "w", "it")


def test_without_a_name_server_it_ends_at_once(tmp_path, monkeypatch):
    def nowhere(*args, **kwargs):
        raise URLError(socket.gaierror(-2, "Name or service not known"))

    monkeypatch.setattr(fetching.time, "sleep", lambda seconds: pytest.fail("a second attempt"))
    monkeypatch.setattr(fetching, "_opener", lambda: SimpleNamespace(open=nowhere))
    text = refused("https://example.com/w", tmp_path / "w", "it")
    assert "(no connection: Name or service not known)" in text


def test_a_full_disk_is_said_at_once(site, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        free = type("Usage", (), {"free": 100})
        patch.setattr(fetching.shutil, "disk_usage", lambda folder: free)
        assert "has room for 100" in refused(f"{site.url}/w", tmp_path / "w", "it")

    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fetching.os, "fsync", full)
    assert "(No space left on device)" in refused(f"{site.url}/w", tmp_path / "w", "it")
    assert not (tmp_path / "w").exists()


def test_two_processes_at_once_download_once(site, tmp_path):
    code = (
        "import sys; from pathlib import Path; from mdistiller.files import fetch; "
        "fetch(sys.argv[1], Path(sys.argv[2]), 'it')"
    )
    words = [sys.executable, "-c", code, f"{site.url}/w", str(tmp_path / "w")]
    both = [subprocess.Popen(words) for _ in range(2)]
    assert [one.wait(60) for one in both] == [0, 0]
    assert (tmp_path / "w").read_bytes() == DATA
    assert site.log == [""]
