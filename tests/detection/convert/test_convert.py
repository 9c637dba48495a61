"""Converted files give what detectron2's network gives; files that could run code give nothing."""

import os
import pickle
import re
from pathlib import Path

import nets
import numpy as np
import pytest
import torch
import zoo
from torchvision.models.resnet import Bottleneck, resnet50
from torchvision.ops import FrozenBatchNorm2d

from mdistiller.cli.convert import detectron2 as convert_detectron2
from mdistiller.detection.convert.caffe2 import convert_backbone
from mdistiller.detection.convert.detectron2 import convert, read, rename
from mdistiller.detection.networks.models import assemble, build_detector
from mdistiller.registry import UserError


def command(*words):
    return convert_detectron2.main([str(word) for word in words])


def node(path, **keys):
    """A config node for a converted file."""
    settings = {
        "ARCH": "resnet18",
        "FLAVOUR": "d2",
        "INPUT": "bgr",
        "CHANNELS": 16,
        "NORM": "frozen",
        **keys,
    }
    return nets.node(WEIGHTS=str(path), **settings)


@pytest.fixture(scope="module")
def mask18():
    return zoo.weights("resnet18", mask=True)


def converted(model, **settings):
    """What comes of the zoo's arrays; None among them stands for none."""
    tensors = {k: torch.from_numpy(v) for k, v in model.items() if v is not None}
    return convert(tensors, Path("zoo.pkl"), **settings)


def compare(net, reference):
    """Every output of a converted network with the reference's, on one image."""
    image = torch.rand(3, 64, 96, generator=torch.Generator().manual_seed(0))
    boxes = [torch.tensor([[4.0, 6, 60, 40], [10, 0, 95, 64], [50, 30, 70, 45]])]
    with torch.no_grad():
        batch, _ = net.prepare([image])
        maps = net.backbone(batch.tensors)
        expected = reference.features(image[None])
        close = {"rtol": 1e-4, "atol": 1e-4}
        for level, wanted in zip(maps.values(), expected, strict=True):
            assert float(wanted.std()) > 0.05  # else all would agree
            torch.testing.assert_close(level, wanted, **close)
            for mine, theirs in zip(
                net.rpn.head([wanted]), reference.proposals(wanted), strict=True
            ):
                torch.testing.assert_close(mine[0], theirs, **close)
        heads = net.roi_heads
        logits, deltas = heads.predict(maps, boxes, batch.image_sizes)
        scores, moves = reference.boxes(heads.box_roi_pool(maps, boxes, batch.image_sizes))
        torch.testing.assert_close(logits[:, 1:], scores[:, :-1], **close)
        torch.testing.assert_close(logits[:, 0], scores[:, -1], **close)
        torch.testing.assert_close(deltas[:, 4:], moves, **close)
        assert not deltas[:, :4].any()
        if heads.has_mask():
            pooled = heads.mask_roi_pool(maps, boxes, batch.image_sizes)
            drawn = heads.mask_predictor(heads.mask_head(pooled))
            torch.testing.assert_close(drawn[:, 1:], reference.masks(pooled), **close)
            assert not drawn[:, 0].any()


def test_a_converted_mask_rcnn_gives_what_the_zoos_does(tmp_path, mask18, capsys):
    path = zoo.write(tmp_path / "zoo.pkl", mask18)
    assert command(path, tmp_path / "new.pth") == 0
    said = capsys.readouterr().out
    assert "4 classes, background included" in said
    assert "for WEIGHTS, with ARCH resnet18 FLAVOUR d2 INPUT bgr STRIDE_IN_1X1 False" in said
    assert "MASK True CHANNELS 16" in said
    net = build_detector(node(tmp_path / "new.pth", MASK=True), 4).eval()
    assert sum(isinstance(m, FrozenBatchNorm2d) for m in net.modules()) == 20
    compare(net, zoo.Reference(mask18))
    assert command(path, tmp_path / "new.pth") == 2  # it is there
    assert "is there already" in capsys.readouterr().err


def test_bottlenecks_stride_in_their_1x1_layer():
    arrays = zoo.weights("resnet50")
    contents = converted(arrays, stride_in_1x1=True)
    net = assemble(node("", ARCH="resnet50", STRIDE_IN_1X1=True), 4)
    net.load_state_dict(contents["model"], strict=False)
    compare(net.eval(), zoo.Reference(arrays))
    assert contents["detector"]["stride_in_1x1"]


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("arch", ["resnet50", "resnet101"])
def test_every_name_of_the_zoo_has_its_place(arch, mask):
    names = {rename(name): shape for name, shape in zoo.shapes(arch, mask=mask).items()}
    with torch.device("meta"):
        own = assemble(nets.node(ARCH=arch, CHANNELS=16, MASK=mask), 4).state_dict()
    assert None not in names
    assert names.keys() == {key for key in own if not key.endswith("num_batches_tracked")}


def test_pickles_of_all_kinds_and_checkpoints_of_trainings(tmp_path):
    rng = np.random.default_rng(0)
    model = {"a": rng.random((2, 3)).astype("f"), "b": np.asfortranarray(rng.random((3, 4)))}
    model |= {"c": np.float32([1, 2]).astype(">f4"), "d": np.arange(4), "e": np.zeros((0, 2), "f2")}
    paths = [zoo.write(tmp_path / f"{n}.pkl", model, protocol=n) for n in (0, 2, 4, 5)]
    plain = {k: torch.from_numpy(v.astype(v.dtype.newbyteorder("="))) for k, v in model.items()}
    torch.save({"model": plain, "iteration": 9}, tmp_path / "model_final.pth")
    for path in (*paths, tmp_path / "model_final.pth"):
        found = read(path)
        assert found.keys() == model.keys()
        for key, value in model.items():
            assert np.array_equal(found[key].numpy(), value.astype(found[key].numpy().dtype)), key
            assert found[key].dtype == (torch.int64 if key == "d" else torch.float32)


MIXED_UP = {
    "FLAVOUR": ("tv", "FLAVOUR d2, but DETECTION.STUDENT.FLAVOUR is tv"),
    "INPUT": ("rgb", "INPUT bgr, but DETECTION.STUDENT.INPUT is rgb"),
    "MASK": (False, "MASK True, but DETECTION.STUDENT.MASK is False"),
}


def test_converted_weights_do_not_go_into_other_networks(tmp_path, mask18):
    torch.save(converted(mask18), tmp_path / "new.pth")
    for key, (value, error) in MIXED_UP.items():
        with pytest.raises(UserError, match=error):
            build_detector(node(tmp_path / "new.pth", **{"MASK": True, key: value}), 4)
    with pytest.raises(UserError, match="is for 4 classes, background included"):
        build_detector(node(tmp_path / "new.pth", MASK=True), 91)
    # the original's fault is in the input; the weights are the same
    build_detector(node(tmp_path / "new.pth", MASK=True, INPUT="upstream_r18_teacher"), 4)


def test_everything_must_be_known_and_there(mask18):
    extra = {f"teacher.{name}": np.zeros(1) for name in "abcd"}
    with pytest.raises(UserError, match=r"4 weights that .* not have \(teacher\.a, .*, \.\.\.\)"):
        converted(mask18 | extra)
    gone = {"backbone.fpn_output3.bias": None, "roi_heads.box_head.fc1.weight": None}
    with pytest.raises(UserError, match=r"2 missing tensors \(backbone\.fpn\.layer_blocks\.1\.0"):
        converted(mask18 | gone)
    scores, boxes = (
        f"roi_heads.box_predictor.{name}.weight" for name in ("cls_score", "bbox_pred")
    )
    with pytest.raises(UserError, match=f"lacks {re.escape(scores)}"):
        converted(mask18 | {scores: None})
    with pytest.raises(UserError, match=r"4 rows for 3 classes; .* same for all classes"):
        converted(mask18 | {boxes: np.zeros((4, 1024), "f")})
    block = {"backbone.bottom_up.res5.2.conv1.weight": np.zeros((512, 512, 3, 3), "f")}
    with pytest.raises(
        UserError, match=r"not of a supported ResNet with FPN .* stages have 2, 2, 2, 3 blocks"
    ):
        converted(mask18 | block)
    with pytest.raises(UserError, match=r"another shape \(rpn\.head\.conv\.0\.0\.bias is \[5\]"):
        converted(mask18 | {"proposal_generator.rpn_head.conv.bias": np.zeros(5, "f")})


def test_constants_must_be_the_flavours(mask18):
    anchors = "proposal_generator.anchor_generator.cell_anchors.0"
    with pytest.raises(UserError, match=r"cell_anchors\.0 is \[-22\.0, "):
        converted(mask18 | {anchors: np.float32([[-22, -11, 22, 11]] * 3)})
    rgb = np.float32([123.675, 116.28, 103.53]).reshape(3, 1, 1)
    with pytest.raises(UserError, match=r"pixel_mean is \[123\.6., .* INPUT bgr"):
        converted(mask18 | {"pixel_mean": rgb})
    with pytest.raises(UserError, match=r"pixel_std is \[1\.0, .* INPUT rgb"):
        converted(mask18 | {"pixel_mean": rgb}, form="rgb")


def folded(seed=0):
    """A ResNet-50 as MSRA's files have it, and the same by torchvision's names."""
    torch.manual_seed(seed)
    net = resnet50(norm_layer=FrozenBatchNorm2d)
    arrays = {"fc1000_w": np.zeros((1000, 2048), "f"), "conv1_b": np.zeros(64, "f")}
    layers = {"conv1": "2a", "conv2": "2b", "conv3": "2c", "downsample.0": "1"}
    for layer in net.modules():
        if isinstance(layer, FrozenBatchNorm2d):
            layer.weight.uniform_(0.2, 0.4)
            layer.bias.normal_(0, 0.1)
    pairs = [("conv1_w", "res_conv1", net.conv1, net.bn1)]
    for n in range(2, 6):
        for i, block in enumerate(getattr(net, f"layer{n - 1}")):
            for own, theirs in layers.items():
                if own != "downsample.0" or block.downsample is not None:
                    norm = own.replace("conv", "bn").replace("downsample.0", "downsample.1")
                    name = f"res{n}_{i}_branch{theirs}"
                    parts = block.get_submodule(own), block.get_submodule(norm)
                    pairs.append((f"{name}_w", name, *parts))
    for weight, name, conv, norm in pairs:
        arrays[weight] = conv.weight.detach().numpy()
        arrays[f"{name}_bn_s"], arrays[f"{name}_bn_b"] = norm.weight.numpy(), norm.bias.numpy()
    return arrays, net


def test_msras_backbones(tmp_path, capsys):
    arrays, net = folded()
    for module in net.modules():  # the factor is all there is: no eps
        if isinstance(module, FrozenBatchNorm2d):
            module.eps = 0.0
        if isinstance(module, Bottleneck):
            module.conv1.stride, module.conv2.stride = module.conv2.stride, module.conv1.stride
    path = tmp_path / "R-50.pkl"
    path.write_bytes(pickle.dumps({"blobs": arrays}, protocol=2))
    assert command(path, tmp_path / "msra.pth") == 0
    assert "for BACKBONE_WEIGHTS, with INPUT bgr STRIDE_IN_1X1 True" in capsys.readouterr().out
    keys = {"ARCH": "resnet50", "NORM": "frozen", "BACKBONE_WEIGHTS": str(tmp_path / "msra.pth")}
    own = build_detector(nets.node(INPUT="bgr", STRIDE_IN_1X1=True, **keys), 4)
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        y = net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(x)))))
        for k in "234":
            y = net.get_submodule(f"layer{k}")(y)
        torch.testing.assert_close(own.eval().backbone.body(x)["3"], y, rtol=1e-4, atol=1e-5)
    norm = own.backbone.body["layer2"][0].bn3
    assert torch.allclose(norm.running_var + norm.eps, torch.ones(512), rtol=0, atol=1e-7)
    for wrong, error in (
        ({"STRIDE_IN_1X1": True}, "INPUT bgr, but DETECTION.STUDENT.INPUT is rgb"),
        ({"INPUT": "bgr"}, "STRIDE_IN_1X1 True, but DETECTION.STUDENT.STRIDE_IN_1X1 is False"),
    ):
        with torch.device("meta"), pytest.raises(UserError, match=error):
            build_detector(nets.node(**wrong, **keys), 4)
    tensors = {k: torch.from_numpy(v) for k, v in arrays.items()}
    for bad in ({"conv1_b": torch.ones(64)}, {"res2_0_branch2a_gn_s": torch.ones(64)}):
        with pytest.raises(UserError, match=rf"1 weights that .* \({next(iter(bad))}\)"):
            convert_backbone(tensors | bad, path)


class Call:
    """Has its pickle call something."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda marker: Call(os.system, f"touch {marker}"), "posix.system"),
        (lambda marker: Call(eval, f"open({str(marker)!r}, 'w')"), "eval"),
        (lambda marker: Call(open, str(marker), "w"), "io.open"),
        (lambda marker: Call(np.load, str(marker)), "numpy"),
        (lambda marker: Call(np.ndarray, (10**13,)), "numpy.ndarray made by itself"),
        (lambda marker: Call(np.dtype, [("a", "O")]), "the data type"),
        (lambda marker: np.array([Call(os.system, f"touch {marker}")], object), "the data type"),
    ],
    ids=["system", "eval", "open", "np.load", "memory", "dtype", "objects"],
)
def test_pickles_that_would_run_code_are_refused(tmp_path, capsys, call, name):
    marker = tmp_path / "touched"
    path = zoo.write(tmp_path / "bad.pkl", {"a": np.zeros(3), "b": call(marker)})
    assert command(path, tmp_path / "new.pth") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert re.search(f"refused: it holds .*{re.escape(name)}", lines[0])
    assert not marker.exists()
    assert not (tmp_path / "new.pth").exists()


def test_damaged_files_get_one_line(tmp_path):
    whole = zoo.write(tmp_path / "zoo.pkl", {"a": np.zeros(99)}).read_bytes()
    cases = {
        "cut.pkl": (whole[: len(whole) // 2], "is damaged or not a pickle"),
        "text.pkl": (b"<html>", "is damaged or not a pickle"),
        "list.pkl": (pickle.dumps([1, 2]), "holds no weights under 'model'"),
        "words.pkl": (pickle.dumps({"model": {"a": "b"}}), "'a' is not an array of numbers"),
        "text.pth": (b"<html>", "is a web page .*, not a PyTorch file"),
    }
    for name, (data, error) in cases.items():
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(UserError, match=error):
            read(path)
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read(tmp_path / "none.pkl")
    with pytest.raises(UserError, match="does not exist"):
        read(tmp_path / "none.pth")
