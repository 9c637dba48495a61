"""ImageNet networks beside torchvision's, and the download of the weights that it publishes."""

import hashlib
import shutil
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch
import torchvision

from mdistiller.models import ModelEntry, imagenet_model_dict
from mdistiller.models.cifar.resnet import resnet8
from mdistiller.models.released import url_of
from mdistiller.registry import UserError


@pytest.mark.parametrize("name", ["ResNet18", "ResNet34", "ResNet50", "ResNet101"])
def test_resnets_have_torchvisions_tensors(name):
    """Its weights load strictly, key by key in its order."""
    with torch.device("meta"):
        theirs = getattr(torchvision.models, name.lower())().state_dict()
        ours = imagenet_model_dict[name](pretrained=False).state_dict()
    assert list(ours) == list(theirs)
    assert all(ours[key].shape == theirs[key].shape for key in ours)
    assert url_of(imagenet_model_dict[name].checkpoint).startswith(
        f"https://download.pytorch.org/models/{name.lower()}-"
    )


@pytest.mark.parametrize("name", ["ResNet18", "ResNet50"])
def test_resnets_give_torchvisions_logits(name):
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, name.lower())().train()
    with torch.device("meta"):
        ours = imagenet_model_dict[name](pretrained=False).train()
    ours.load_state_dict(theirs.state_dict(), assign=True)
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(image)[0], theirs(image))


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A local server, the folder it serves, and torch.hub's folder, both of their own.

    `publish(digest)` puts a network's file there, as torchvision's "Fake_Weights.V1".
    """

    class Handler(SimpleHTTPRequestHandler):
        requests = 0

        def do_GET(self):
            Handler.requests += 1
            super().do_GET()

        def log_message(self, *args):
            pass

    (tmp_path / "www").mkdir()
    handler = partial(Handler, directory=str(tmp_path / "www"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    def publish(digest=None):
        net = resnet8()
        torch.save(net.state_dict(), tmp_path / "www" / "file")
        digest = digest or hashlib.sha256((tmp_path / "www" / "file").read_bytes()).hexdigest()[:8]
        name = f"fake-{digest}.pth"
        (tmp_path / "www" / "file").rename(tmp_path / "www" / name)
        url = f"http://127.0.0.1:{server.server_port}/{name}"
        monkeypatch.setattr(
            "torchvision.models.get_weight", {"Fake_Weights.V1": SimpleNamespace(url=url)}.get
        )
        return net, url, tmp_path / "hub" / "checkpoints" / name

    yield SimpleNamespace(publish=publish, handler=Handler, server=server)
    server.shutdown()
    server.server_close()


ENTRY = ModelEntry(resnet8, "torchvision:Fake_Weights.V1")


def test_pretrained_weights_are_downloaded_once(served):
    net, _, path = served.publish()
    assert ENTRY.released(100, fetch=False) is None
    for _ in range(2):
        loaded = ENTRY(num_classes=100, pretrained=True)
        assert all(map(torch.equal, loaded.state_dict().values(), net.state_dict().values()))
    assert served.handler.requests == 1
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def refused(path, url=None):
    """The one line of a refusal; nothing is left of a download."""
    with pytest.raises(UserError) as caught:
        ENTRY(num_classes=100, pretrained=True)
    assert "\n" not in str(caught.value)
    assert not path.exists()
    assert [file for file in path.parent.iterdir() if file.suffix != ".lock"] == []
    if url:
        assert f"get {url} and put it at {path}" in str(caught.value)
    return str(caught.value)


def test_a_download_with_another_hash_is_refused(served):
    _, url, path = served.publish(digest="0badc0de")
    assert "wrong hash: sha256 " in refused(path, url)


def test_a_failed_download_says_what_to_put_where(served, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["mdistiller.files.fetch"], "PAUSE", 0)
    _, url, path = served.publish()
    (tmp_path / "www" / path.name).unlink()
    assert "could not be downloaded (the server answers 404" in refused(path, url)
    served.server.shutdown()
    served.server.server_close()
    assert "resnet8 could not be downloaded (no connection: " in refused(path, url)
    shutil.rmtree(path.parent)
    path.parent.write_text("")  # in the way
    with pytest.raises(UserError, match="could not be downloaded"):
        ENTRY(pretrained=True)


def test_a_file_put_there_by_hand_is_taken(served):
    _, _, path = served.publish()
    net = resnet8()
    path.parent.mkdir(parents=True)
    torch.save(net.state_dict(), path)
    loaded = ENTRY(pretrained=True)
    assert all(map(torch.equal, loaded.state_dict().values(), net.state_dict().values()))
    assert served.handler.requests == 0


def test_nothing_is_downloaded_for_another_number_of_classes(served):
    served.publish()
    with pytest.raises(UserError, match="resnet8 are for 100 classes, but 7 are wanted"):
        ENTRY(num_classes=7, pretrained=True)
    assert served.handler.requests == 0
