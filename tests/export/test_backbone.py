"""export --backbone: timm and torchvision load the file strictly and compute the same features."""

import timm
import torch
from torch import nn
from torchvision.models import get_model

from mdistiller.cli import export
from mdistiller.models import get_model_entry
from mdistiller.weights import load_checkpoint

IMAGE = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def exported(folder, name):
    """The features of a random network of 5 classes, and its exported backbone."""
    torch.manual_seed(0)
    net = get_model_entry(name, "cifar")(num_classes=5, image_size=(64, 64)).eval()
    torch.save(net.state_dict(), folder / "whole.pth")
    words = ["-m", name, "-c", folder / "whole.pth", "--num-classes", 5, "--image-size", 64]
    assert export.main([*map(str, words), "--backbone", "--out", str(folder)]) == 0
    with torch.no_grad():
        return net(IMAGE)[1]["pooled_feat"], folder / "backbone.pth"


def test_timm_loads_it(tmp_path, capsys):
    features, path = exported(tmp_path, "timm/test_vit")
    assert "img_size=(64, 64), num_classes=0, checkpoint_path=" in capsys.readouterr().out
    net = timm.create_model("test_vit", img_size=(64, 64), num_classes=0, checkpoint_path=str(path))
    with torch.no_grad():
        torch.testing.assert_close(net.eval()(IMAGE), features)
    assert (
        export.main(
            [
                "-m",
                "timm/test_vit",
                "-c",
                str(tmp_path / "whole.pth"),
                "--out",
                str(tmp_path),
                "--num-classes",
                "5",
                "--image-size",
                "64",
                "--backbone",
            ]
        )
        == 2
    )
    assert "is there already" in capsys.readouterr().err


def test_torchvision_loads_it(tmp_path):
    features, path = exported(tmp_path, "torchvision/shufflenet_v2_x0_5")
    net = get_model("shufflenet_v2_x0_5")
    net.fc = nn.Identity()
    net.load_state_dict(torch.load(path, weights_only=True), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(net.eval()(IMAGE), features)
    assert set(load_checkpoint(path)) == set(net.state_dict())
