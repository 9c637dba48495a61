"""Detectors are torchvision's with the same weights, keep what they sample, and refuse mix-ups."""

import nets
import pytest
import torch
import torchvision
from support import same_state
from torch import nn
from torchvision.models import WeightsEnum
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.ops import FrozenBatchNorm2d

import mdistiller.detection.convert.weights as files
from mdistiller.detection.networks import models
from mdistiller.detection.networks.models import build_detector
from mdistiller.detection.networks.roi import box_loss
from mdistiller.registry import UserError


def stock(kind, net):
    """torchvision's own class with the weights of `net`, for images of exactly these sizes."""
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5
    )
    own = kind(
        backbone,
        4,
        min_size=96,
        max_size=128,
        box_batch_size_per_image=nets.SMALL["ROI_SAMPLES"],
        box_detections_per_img=net.roi_heads.detections_per_img,
    )
    own.load_state_dict(net.state_dict())
    return own


def test_the_tv_flavour_is_torchvisions():
    net = nets.detector(ARCH="resnet18", MASK=True, CHANNELS=256)
    image, target = nets.images()[:1], nets.targets(True)[:1]  # which stock resizes by 1
    other = stock(MaskRCNN, net)
    torch.manual_seed(1)
    torch.rand(1)  # stock draws a size
    losses = net(image, target)
    torch.manual_seed(1)
    expected = other(image, target)
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value)
    found, wanted = net.eval().detect(image, [(96, 128)])[0], other.eval()(image)[0]
    assert len(found["boxes"]) > 5
    for name in ("boxes", "labels", "scores"):
        torch.testing.assert_close(found[name], wanted[name])
    assert found["masks"].dtype == torch.uint8
    assert torch.equal(found["masks"], (wanted["masks"][:, 0] > 0.5).byte())


@pytest.mark.parametrize(
    ("arch", "widths"),
    [("resnet18", [64, 128, 256, 512]), ("mobilenet_v2", [24, 32, 96, 320])],
)
def test_pyramids_start_at_the_last_block_of_each_stage(arch, widths):
    net = nets.detector(ARCH=arch)
    batch, _ = net.prepare(nets.images())
    assert batch.tensors.shape == (2, 3, 96, 128)
    assert batch.image_sizes == [(96, 128), (80, 100)]
    assert [level.shape[1] for level in net.backbone.body(batch.tensors).values()] == widths
    maps = net.backbone(batch.tensors)
    assert list(maps) == ["0", "1", "2", "3", "pool"]
    assert [tuple(level.shape[1:]) for level in maps.values()] == [
        (32, 24, 32),
        (32, 12, 16),
        (32, 6, 8),
        (32, 3, 4),
        (32, 2, 2),
    ]


def test_mobilenet_gives_the_last_map_of_each_resolution():
    net = nets.detector().eval()
    x, last = net.prepare(nets.images())[0].tensors, {}
    with torch.no_grad():
        found = net.backbone.body(x)
        for block in net.backbone.body.children():
            x = block(x)
            last[x.shape[-1]] = x
    for level, expected in zip(
        found.values(), [last[side] for side in (32, 16, 8, 4)], strict=True
    ):
        assert torch.equal(level, expected)


@pytest.mark.parametrize("flavour", ["tv", "d2"])
def test_every_parameter_learns_and_samples_are_kept(flavour):
    net = nets.detector(FLAVOUR=flavour, MASK=True)
    losses = net(nets.images(), nets.targets(masks=True))
    assert all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    assert [k for k, p in net.named_parameters() if p.grad is None] == []
    samples = net.roi_heads.samples
    sizes = [len(own) for own in samples.proposals]
    assert samples.logits.shape == (sum(sizes), 4)
    first, second = samples.labels.split(sizes)
    assert {2, 3} <= set(first.tolist()) <= {0, 2, 3}  # the true boxes are among the regions
    assert set(second.tolist()) == {0}
    batch, _ = net.prepare(nets.images())
    again = net.roi_logits(net.backbone(batch.tensors), samples.proposals, batch.image_sizes)
    torch.testing.assert_close(again, samples.logits)
    assert net.eval().detect(nets.images(), [(96, 128), (80, 100)])[0]["masks"].ndim == 3
    assert net.roi_heads.samples is None


def test_detections_are_in_pixels_of_the_original():
    net = nets.detector().eval()
    same = net.detect(nets.images(), [(96, 128), (80, 100)])
    larger = net.detect(nets.images(), [(192, 384), (80, 100)])
    assert len(same[0]["boxes"])
    torch.testing.assert_close(larger[0]["boxes"], same[0]["boxes"] * torch.tensor([3.0, 2, 3, 2]))
    torch.testing.assert_close(larger[1]["boxes"], same[1]["boxes"])


@pytest.mark.parametrize("flavour", ["tv", "d2"])
def test_a_tiny_first_image_does_not_change_the_pooling(flavour):
    fresh, used = nets.detector(FLAVOUR=flavour).eval(), nets.detector(FLAVOUR=flavour).eval()
    used.detect([torch.rand(3, 40, 40)], [(40, 40)])
    one, other = (net.detect(nets.images(), [(96, 128), (80, 100)]) for net in (fresh, used))
    torch.testing.assert_close(one[0]["scores"], other[0]["scores"])


# Grey levels of red, green and blue, and what they become.
PIXEL = (200.0, 100.0, 50.0)
FORMATS = {
    "rgb": [(200 - 123.675) / 58.395, (100 - 116.28) / 57.12, (50 - 103.53) / 57.375],
    "bgr": [50 - 103.53, 100 - 116.28, 200 - 123.675],
    # the original's fault: mean and std in BGR order on RGB images ...
    "upstream_r18": [(200 - 103.53) / 57.375, (100 - 116.28) / 57.12, (50 - 123.675) / 58.395],
    # ... and the teacher's mean subtracted before the flip: blue 20.1 too low, red 20.1 too high
    "upstream_r18_teacher": [50 - 103.53 - 20.145, 100 - 116.28, 200 - 123.675 + 20.145],
}


@pytest.mark.parametrize("form", FORMATS)
def test_input_formats(form):
    net = nets.detector(INPUT=form)
    image = (torch.tensor(PIXEL) / 255).view(3, 1, 1).expand(3, 20, 40)
    batch, _ = net.prepare([image])
    assert batch.tensors.shape == (1, 3, 32, 64)
    torch.testing.assert_close(batch.tensors[0, :, 19, 39], torch.tensor(FORMATS[form]))
    assert batch.tensors[0, :, 20:].abs().sum() == 0  # padding comes after the normalisation
    assert not any("mean" in key and "running" not in key for key in net.state_dict())


def test_boxes_keep_their_pixels_under_autocast():
    net = nets.detector().eval()
    image = [torch.rand(3, 96, 1312)]  # where bfloat16 steps by 8 pixels
    with torch.autocast("cpu", torch.bfloat16):
        batch, _ = net.prepare(image)
        features = net.backbone(batch.tensors)
        proposals, _ = net.rpn(batch, features)
        found = net.detect(image, [(96, 1312)])[0]
    assert features["0"].dtype == torch.bfloat16
    for boxes in (proposals[0], found["boxes"]):
        far = boxes[boxes[:, 0] > 1024]
        assert boxes.dtype == torch.float32
        assert (far[:, 0] % 1 != 0).any()
    anchors = net.rpn.anchor_generator
    exact = anchors(batch, [level.float() for level in features.values()])[0]
    assert torch.equal(anchors(batch, list(features.values()))[0], exact)


def test_the_box_loss_is_torchvisions_and_bears_infinite_targets_of_the_background():
    torch.manual_seed(0)
    logits, deltas, wanted = torch.randn(9, 4), torch.randn(9, 16), torch.randn(9, 4)
    labels = torch.tensor([0, 1, 3, 0, 2, 2, 0, 0, 1])
    _, expected = fastrcnn_loss(logits, deltas, [labels], [wanted])
    torch.testing.assert_close(box_loss(deltas, wanted, labels, 1 / 9), expected)
    rows = [
        (deltas[i, 4 * k : 4 * k + 4] - wanted[i]).abs().sum() for i, k in enumerate(labels) if k
    ]
    torch.testing.assert_close(box_loss(deltas, wanted, labels, 0.0), sum(rows) / 9)
    wanted[labels == 0] = -torch.inf
    deltas.requires_grad_()
    loss = box_loss(deltas, wanted, labels, 1 / 9)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    assert deltas.grad.isfinite().all()
    assert not deltas.grad[labels == 0].any()


def saved(net, path):
    torch.save({"model": net.state_dict(), "detector": net.facts}, path)
    return str(path)


def test_frozen_stages_and_norms(tmp_path):
    path = saved(nets.detector(ARCH="resnet18"), tmp_path / "net.pth")
    keys = {"ARCH": "resnet18", "WEIGHTS": path}
    net = build_detector(nets.node(NORM="frozen", FREEZE_AT=2, **keys), 4)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    fixed = {name for name, p in net.backbone.body.named_parameters() if not p.requires_grad}
    assert {name.split(".")[0] for name in fixed} == {"conv1", "layer1"}
    trained = build_detector(nets.node(FREEZE_AT=1, **keys), 4)
    assert isinstance(trained.backbone.body.bn1, FrozenBatchNorm2d)
    assert isinstance(trained.backbone.body.layer1[0].bn1, nn.BatchNorm2d)
    assert trained.backbone.body.layer1[0].conv1.weight.requires_grad
    mobile = saved(nets.detector(), tmp_path / "mobile.pth")
    net = build_detector(nets.node(WEIGHTS=mobile, FREEZE_AT=2), 4)
    fixed = {name for name, p in net.backbone.body.named_parameters() if not p.requires_grad}
    assert {name.split(".")[0] for name in fixed} == {"0", "1", "2", "3"}


@pytest.mark.parametrize("norm", ["frozen", "batch"])
def test_weights_come_back_as_they_were(tmp_path, norm):
    first = nets.detector()
    path = saved(first, tmp_path / "net.pth")
    second = build_detector(nets.node(WEIGHTS=path, NORM=norm), 4)
    image = nets.images()
    torch.testing.assert_close(
        second.eval().backbone(second.prepare(image)[0].tensors)["0"],
        first.eval().backbone(first.prepare(image)[0].tensors)["0"],
        rtol=1e-3,
        atol=1e-4,
    )
    third = build_detector(nets.node(WEIGHTS=saved(second, tmp_path / "again.pth"), NORM=norm), 4)
    assert same_state(third.state_dict(), second.state_dict())


MIXED_UP = {
    "FLAVOUR": ("d2", "a detector with FLAVOUR tv, but DETECTION.TEACHER.FLAVOUR is d2"),
    "INPUT": ("bgr", "INPUT rgb, but DETECTION.TEACHER.INPUT is bgr"),
    "ARCH": ("resnet18", "ARCH mobilenet_v2, but DETECTION.TEACHER.ARCH is resnet18"),
    "MASK": (True, "MASK False, but DETECTION.TEACHER.MASK is True"),
    "CHANNELS": (64, "CHANNELS 32, but DETECTION.TEACHER.CHANNELS is 64"),
    "ANCHOR_SIZES": ([16, 32, 64, 128, 256], r"ANCHOR_SIZES \[32, 64"),
}


def test_weights_of_another_detector_are_refused(tmp_path):
    path = saved(nets.detector(), tmp_path / "net.pth")
    for key, (value, error) in MIXED_UP.items():
        with torch.device("meta"), pytest.raises(UserError, match=error):
            build_detector(nets.node(WEIGHTS=path, **{key: value}), 4, "DETECTION.TEACHER")


def test_weights_that_fit_the_original_s_fault(tmp_path):
    path = saved(nets.detector(), tmp_path / "net.pth")
    faulty = build_detector(nets.node(WEIGHTS=path, INPUT="upstream_r18"), 4)
    again = saved(faulty, tmp_path / "faulty.pth")
    build_detector(nets.node(WEIGHTS=again, INPUT="upstream_r18"), 4)
    with pytest.raises(UserError, match=r"INPUT upstream_r18, but .*INPUT is rgb"):
        build_detector(nets.node(WEIGHTS=again), 4)


def test_weights_for_other_classes(tmp_path):
    old = nets.detector(MASK=True)
    path = saved(old, tmp_path / "net.pth")
    with pytest.raises(UserError, match=r"is for 4 classes, background included, .* have 9"):
        build_detector(nets.node(WEIGHTS=path, MASK=True), 9)
    new = build_detector(nets.node(WEIGHTS=path, MASK=True, NEW_HEAD=True), 9)
    assert new.roi_heads.box_predictor.cls_score.weight.shape[0] == 9
    assert torch.equal(new.roi_heads.box_head.fc6.weight, old.roi_heads.box_head.fc6.weight)
    kept = nets.node(WEIGHTS=path, MASK=True, NEW_HEAD=True)
    assert same_state(build_detector(kept, 4).state_dict(), old.state_dict())


@pytest.mark.parametrize("arch", ["resnet18", "mobilenet_v2"])
def test_backbone_weights_are_torchvisions_classifiers(tmp_path, monkeypatch, arch):
    import torchvision.models as zoo

    torch.manual_seed(3)
    whole = zoo.get_model(arch, weights=None)
    path = tmp_path / "released.pth"
    torch.save(whole.state_dict(), path)
    asked = []

    def there(release, name):
        asked.append(release)
        return path

    monkeypatch.setattr(files, "released_file", there)
    net = build_detector(nets.node(ARCH=arch, BACKBONE_WEIGHTS="torchvision", FREEZE_AT=1), 4)
    kind = {"resnet18": "ResNet18", "mobilenet_v2": "MobileNet_V2"}[arch]
    assert asked == [f"torchvision:{kind}_Weights.IMAGENET1K_V1"]
    first = whole.conv1 if arch == "resnet18" else whole.features[0][0]
    inside = net.backbone.body["conv1"] if arch == "resnet18" else net.backbone.body["0"][0]
    assert torch.equal(inside.weight, first.weight)
    with pytest.raises(UserError, match="needs INPUT rgb"):
        build_detector(nets.node(ARCH=arch, BACKBONE_WEIGHTS="torchvision", INPUT="bgr"), 4)
    other = "resnet34" if arch == "resnet18" else "resnet18"
    with pytest.raises(UserError, match=r"do not fit together: .*missing"):
        build_detector(nets.node(ARCH=other, BACKBONE_WEIGHTS=str(path)), 4)


def test_named_detectors_are_torchvisions(tmp_path, monkeypatch):
    from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn as make

    name = "fasterrcnn_mobilenet_v3_large_320_fpn"
    torch.manual_seed(0)
    original = make(weights=None, weights_backbone=None, num_classes=5, min_size=96, max_size=128)
    path = tmp_path / "coco.pth"
    torch.save(original.state_dict(), path)
    asked = []
    monkeypatch.setattr(files, "released_file", lambda release, name: asked.append(release) or path)
    net = build_detector(nets.named(name, WEIGHTS="torchvision", NORM="frozen"), 5)
    assert asked == ["torchvision:FasterRCNN_MobileNet_V3_Large_320_FPN_Weights.COCO_V1"]
    image = nets.images()[:1]
    batch, _ = net.prepare(image)
    sizes = batch.image_sizes
    boxes = [torch.tensor([[5.0, 5, 60, 40], [0, 0, 128, 96], [30, 30, 50, 90]])]
    net.eval(), original.eval()
    with torch.no_grad():
        maps, own_maps = net.backbone(batch.tensors), original.backbone(batch.tensors)
        pooled = original.roi_heads.box_roi_pool(own_maps, boxes, sizes)
        own, _ = original.roi_heads.box_predictor(original.roi_heads.box_head(pooled))
        torch.testing.assert_close(net.roi_logits(maps, boxes, sizes), own)
        torch.testing.assert_close(net.rpn(batch, maps)[0], original.rpn(batch, own_maps)[0])
    assert net.rpn.score_thresh == 0.05  # of this detector, unlike the others


def released(arch, state, **weights):
    """torchvision's own detector as its function makes it, with a state that is not downloaded."""
    make = getattr(torchvision.models.detection, arch)
    sizes = {"min_size": 96, "max_size": 128, "box_score_thresh": 0.0}
    sizes |= {"rpn_post_nms_top_n_test": 30, "box_detections_per_img": 10}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WeightsEnum, "get_state_dict", lambda self, **options: state)
        return make(**{"weights": None, "weights_backbone": None, **weights, **sizes})


def lively(net):
    """The state of a detector whose norms' eps matter: their variances are 1e-3."""
    nets.calibrate(net)
    for norm in net.modules():
        if isinstance(norm, (nn.BatchNorm2d, FrozenBatchNorm2d)):
            norm.weight.data.mul_((1e-3 / norm.running_var).sqrt())
            norm.running_var.fill_(1e-3)
    return net.state_dict()


V1, V2 = "fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2"
MASK = "maskrcnn_resnet50_fpn"
CASES = [(MASK, 0.0), (V2, 1e-5)]


@pytest.mark.parametrize(("arch", "eps"), CASES)
def test_detectors_see_what_torchvisions_own_see(monkeypatch, arch, eps):
    torch.manual_seed(0)
    plain = nets.named(arch)
    state = lively(build_detector(plain, 91))
    monkeypatch.setattr(files, "released_file", lambda *names: "released")
    monkeypatch.setattr(files, "load_checkpoint", lambda path: state)
    net = build_detector(nets.named(arch, NORM="frozen", WEIGHTS="torchvision"), 91)
    own = released(arch, state, weights="DEFAULT")
    norms = (nn.BatchNorm2d, FrozenBatchNorm2d)
    with torch.device("meta"):
        bare = build_detector(plain, 91)
    assert {norm.eps for norm in bare.modules() if isinstance(norm, norms)} == {1e-5}
    for one in (net, own):
        assert {norm.eps for norm in one.modules() if isinstance(norm, norms)} == {eps}
    net.roi_heads.score_thresh, net.roi_heads.detections_per_img = 0.0, 10
    net.rpn._post_nms_top_n["testing"] = 30
    image = nets.images()[:1]
    with torch.no_grad():
        (found,), (wanted,) = net.eval()(image), own.eval()(image)
    assert len(found["boxes"]) == 10
    for key in ("boxes", "labels", "scores"):
        torch.testing.assert_close(found[key], wanted[key], rtol=1e-3, atol=1e-3)
    if "masks" in wanted:
        agree = found["masks"] == (wanted["masks"][:, 0] > 0.5)
        assert agree.float().mean() > 0.999
        assert 0.01 < found["masks"].float().mean() < 0.95


@pytest.mark.parametrize(("first", "eps"), [("WEIGHTS", 0.0), ("BACKBONE_WEIGHTS", 1e-5)])
def test_a_file_keeps_the_eps_that_its_norms_were_trained_with(monkeypatch, first, eps):
    def built(**keys):
        with torch.device("meta"):
            return build_detector(nets.named(V1, **{"NORM": "frozen", **keys}), 91)

    with torch.device("meta"):
        state = models.assemble(nets.named(V1), 91).state_dict()
        classifier = torchvision.models.resnet50().state_dict()
    contents = state if first == "WEIGHTS" else classifier
    monkeypatch.setattr(files, "released_file", lambda *names: "released")
    monkeypatch.setattr(files, "load_checkpoint", lambda path: contents)
    student = built(**{first: "torchvision"})
    contents = {"model": student.state_dict(), "detector": student.facts}
    teacher = built(WEIGHTS="run/student_best")
    norms = [norm for norm in teacher.modules() if isinstance(norm, FrozenBatchNorm2d)]
    assert {norm.eps for norm in norms} == {eps}
    if eps == 0:
        with pytest.raises(UserError, match="trained with constant batch norms"):
            built(WEIGHTS="run/student_best", NORM="batch")


BAD = {
    "ARCH": ("resnet19", "resnet19'; did you mean 'resnet18'"),
    "FLAVOUR": ("d3", r"FLAVOUR is 'd3'.*\(allowed: tv, d2\)"),
    "INPUT": ("bgrr", "did you mean 'bgr'"),
    "NORM": ("group", "allowed: frozen, batch, sync"),
    "FREEZE_AT": (6, "allowed: 0, 1, 2, 3, 4, 5"),
    "CHANNELS": (0, "at least 1"),
    "ANCHOR_SIZES": ([32, 64], "must have 5 sizes above 0"),
    "WEIGHTS": ("torchvision", "torchvision released no mobilenet_v2 detector"),
}


@pytest.mark.parametrize("key", BAD)
def test_values_that_cannot_work(key):
    value, error = BAD[key]
    with pytest.raises(UserError, match=f"DETECTION.STUDENT.*{error}"):
        build_detector(nets.node(**{key: value}), 4)


def test_settings_that_contradict_one_another():
    with pytest.raises(UserError, match="has FLAVOUR tv; set it so"):
        build_detector(nets.named("fasterrcnn_resnet50_fpn", FLAVOUR="d2"), 4)
    with pytest.raises(UserError, match="has MASK True; set it so"):
        build_detector(nets.node(ARCH="maskrcnn_resnet50_fpn", CHANNELS=256), 4)
    released = {"WEIGHTS": "torchvision", "NORM": "frozen"}
    with (
        torch.device("meta"),
        pytest.raises(UserError, match="WEIGHTS torchvision needs INPUT rgb"),
    ):
        build_detector(nets.named("maskrcnn_resnet50_fpn", INPUT="bgr", **released), 91)
    with pytest.raises(UserError, match="trained with constant batch norms: set it to frozen"):
        build_detector(nets.named("fasterrcnn_resnet50_fpn", WEIGHTS="torchvision"), 91)
    for key, value in (("NORM", "frozen"), ("FREEZE_AT", 2)):
        with pytest.raises(UserError, match="random ones cannot stay frozen"):
            build_detector(nets.node(**{key: value}), 4)
