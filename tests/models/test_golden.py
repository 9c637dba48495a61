"""Networks against numbers of the original library: methods.md sections 6 and 10.

Every tensor of the state dict is filled by a rule on its key, so a wrong key, shape or operation
shows in the logits.
"""

import zlib

import pytest
import torch
from support import golden_values

from mdistiller.models import get_model_entry

CLASSES = {"cifar": 100, "tiny_imagenet": 200, "imagenet": 1000}
INPUT = {"cifar": (2, 3, 32, 32), "tiny_imagenet": (2, 3, 64, 64), "imagenet": (1, 3, 224, 224)}

# zoo and name: first logits; norms of logits and pooled_feat; of feats; of preact_feats
GOLDEN = """
cifar resnet56 | 0.02330366 -0.045965707 0.16498861 | 3.1235801 1.8365328 | 32.10965 40.06352 21.50704 14.79711 | 32.10965 40.10143 21.51864 14.98513
cifar resnet110 | -0.53425114 0.18938117 0.24855212 | 4.1791501 2.5949002 | 32.10965 48.58241 35.16513 20.99908 | 32.10965 48.58443 35.37518 21.01511
cifar resnet32x4 | -1.0229413 -0.056886381 -0.2608602 | 3.1984424 2.9657002 | 45.29402 47.64973 35.97253 23.87778 | 45.29402 49.1432 35.97997 24.41664
cifar ResNet50 | 0.50117846 0.078186542 0.052411967 | 2.2833334 5.907629 | 67.79659 61.40623 50.11491 52.88326 23.64574 | 67.79659 65.69556 50.83509 53.8943 24.09977
cifar wrn_40_2 | 0.45566745 -0.049822173 -0.0018315047 | 1.4837613 0.89327907 | 147.3846 72.22104 32.33653 20.82845 | 147.3846 29.47827 12.61009 11.28289
cifar vgg13 | 0.36504759 0.042587929 0.05855549 | 1.2024473 1.0933998 | 28.02942 11.55477 10.77119 3.72269 4.426529 | 28.02942 16.36289 14.49198 6.91485 6.550265
cifar resnet8 | -0.29174661 0.018356925 -0.004159089 | 1.3089255 0.58853957 | 32.10965 33.09058 14.92095 4.855806 | 32.10965 33.88233 16.81382 7.66671
cifar resnet14 | -0.22796108 0.11850565 0.021568129 | 2.1521401 1.1400321 | 32.10965 37.42257 20.66693 9.207917 | 32.10965 37.54428 21.22558 9.843287
cifar resnet20 | -0.41155747 0.071275511 0.12649229 | 2.3043101 1.1713793 | 32.10965 33.15997 21.9214 9.482489 | 32.10965 33.20495 22.45026 9.654491
cifar resnet32 | -0.67983623 -0.023195132 0.20795898 | 2.8166039 1.519628 | 32.10965 41.3909 20.92517 12.27827 | 32.10965 41.85393 21.07912 12.56743
cifar resnet44 | -0.16468597 -0.012154593 0.14861369 | 2.8115663 1.6218684 | 32.10965 43.79658 23.92393 13.07836 | 32.10965 44.07324 24.12952 13.26013
cifar resnet8x4 | -0.37538638 -0.10142811 -0.12294988 | 1.4379704 1.2145706 | 45.29402 31.1895 22.37381 9.807331 | 45.29402 41.11269 27.28184 14.00495
cifar ResNet18 | 0.02804807 0.023914362 0.16098326 | 1.7454254 2.2272868 | 67.79659 66.0199 32.4909 23.50183 8.973664 | 67.79659 66.91235 34.20902 24.97075 9.392691
cifar wrn_16_1 | 0.30657818 0.058660467 -0.011969417 | 1.3244196 0.62835914 | 147.3846 148.2079 34.07541 10.45226 | 147.3846 47.37352 13.53686 6.952824
cifar wrn_16_2 | 0.42862757 -0.070553321 -0.031185154 | 1.4550026 0.82047705 | 147.3846 65.77729 22.31793 12.00404 | 147.3846 26.77791 11.79904 9.507659
cifar wrn_40_1 | 0.30710966 0.02320841 -0.029855526 | 1.4560061 0.72561038 | 147.3846 148.9699 40.65031 17.33019 | 147.3846 47.37346 15.46378 7.905677
cifar vgg8 | -0.82790516 -0.058349016 0.029261014 | 1.7541525 1.5771384 | 67.94564 25.98003 9.221098 5.605487 6.355009 | 67.94564 36.67341 14.51411 7.811338 7.816661
cifar vgg11 | 0.36503018 0.04264895 0.058606701 | 1.2024696 1.0934242 | 67.94564 25.98003 11.11905 3.730556 4.426666 | 67.94564 36.67341 14.76389 6.922792 6.550351
cifar vgg16 | 0.29395512 -0.038407447 0.028615622 | 1.3295729 1.7142684 | 28.02942 11.55477 8.013114 6.995559 6.882294 | 28.02942 16.36289 10.4387 9.000679 10.28089
cifar vgg19 | -0.12309198 0.046701917 0.11872534 | 1.0553432 1.0528569 | 28.02942 11.55477 8.330009 5.403096 4.30492 | 28.02942 16.36289 11.04835 9.429533 6.180105
cifar MobileNetV2 | -0.7655881 -0.01733757 0.213499 | 1.5734217 2.3280774 | 15.3616 6.778687 5.6044 6.160489 2.601078 |
cifar ShuffleV1 | 2.0393049 0.016211821 0.12101911 | 4.0093178 6.0980675 | 44.58484 36.04197 43.05534 24.77668 | 44.58484 37.07704 43.26964 24.96098
cifar ShuffleV2 | 0.79178603 -0.058703919 0.068117038 | 1.5734455 1.5665345 | 44.58484 13.88043 9.456418 5.874922 | 44.58484 15.83906 10.87205 7.156369
tiny_imagenet ResNet18 | 0.026243857 0.0240874 0.15578627 | 2.3826818 2.248183 | 135.9463 132.2043 65.07762 47.01649 18.08079 | 135.9463 134.0387 68.52593 49.9744 18.93413
tiny_imagenet MobileNetV2 | 0.57943745 0.080584366 -0.042422455 | 2.1249835 2.8482935 | 90.74664 17.09139 15.47652 12.99293 25.63826 |
imagenet ResNet18 | -0.87658953 -0.023409235 0.10090499 | 4.4535682 2.050055 | 167.7277 172.5997 56.82177 22.3893 14.40909 | 167.7277 172.8506 57.96912 23.95838 15.07754
imagenet ResNet34 | -0.90942851 0.0040499482 0.079448008 | 5.0063267 2.2008311 | 167.7277 173.3376 58.32978 30.20394 15.51986 | 167.7277 173.4151 58.47094 30.69001 15.83411
imagenet ResNet50 | -1.0524643 0.057734376 -0.093512207 | 4.4545949 3.987128 | 167.7277 165.4477 72.84031 63.63752 27.92344 | 167.7277 167.8743 73.49418 65.10547 29.16398
imagenet ResNet101 | -0.74895759 0.32859651 -0.2409343 | 5.448398 5.1712609 | 167.7277 165.4477 72.84031 124.1228 36.22688 | 167.7277 167.8743 73.49418 124.3171 37.04385
imagenet MobileNetV1 | 0.29325334 -0.072131005 0.058643747 | 2.431819 1.2589309 | 21.83242 21.60061 15.63822 8.816495 | 38.08582 27.22426 20.05398 15.18809
"""  # noqa: E501

PARAMETERS = {
    "resnet8": 83892,
    "resnet14": 181108,
    "resnet20": 278324,
    "resnet32": 472756,
    "resnet44": 667188,
    "resnet56": 861620,
    "resnet110": 1736564,
    "resnet8x4": 1233540,
    "resnet32x4": 7433860,
    "ResNet18": 11220132,
    "ResNet34": 21328292,
    "ResNet50": 23705252,
    "wrn_50_2": 67031460,
    "resnext50_32x4d": 23177124,
    "wrn_16_1": 180916,
    "wrn_16_2": 703284,
    "wrn_16_4": 2772020,
    "wrn_28_2": 1479220,
    "wrn_28_4": 5872180,
    "wrn_40_1": 569780,
    "wrn_40_2": 2255156,
    "vgg8": 3965028,
    "vgg11": 9277284,
    "vgg13": 9462180,
    "vgg16": 14774436,
    "vgg19": 20086692,
    "MobileNetV2": 812836,
    "ShuffleV1": 949258,
    "ShuffleV2": 1355528,
}


def parse(line):
    """(zoo, name) and the four groups of numbers of a line of GOLDEN."""
    model, *groups = line.split("|")
    return tuple(model.split()), [[float(number) for number in group.split()] for group in groups]


def fill(net):
    state = net.state_dict()
    for key, tensor in state.items():
        if key.endswith("num_batches_tracked"):
            continue
        value = golden_values(tensor.shape, zlib.crc32(key.encode()) % 100003)
        if key.endswith("running_var"):
            value = 1 + 0.1 * value
        elif key.endswith(("running_mean", ".bias")):
            value = 0.1 * value
        elif tensor.ndim == 1:
            value = 0.3 + 0.1 * value
        else:
            value = value * (6 / (tensor.numel() / tensor.shape[0])) ** 0.5
        tensor.copy_(value)


def norms(tensors):
    return [float(torch.linalg.vector_norm(tensor)) for tensor in tensors]


DEEPER = {  # as others here, of more layers; slow
    *("cifar resnet44", "cifar resnet110", "cifar vgg16", "cifar vgg19", "cifar vgg11"),
    *("imagenet ResNet18", "imagenet ResNet34", "imagenet ResNet50", "imagenet ResNet101"),
}


def cases():
    for line in GOLDEN.split("\n")[1:-1]:
        name = line.split("|")[0].strip()
        marks = [pytest.mark.slow] if name in DEEPER else []
        yield pytest.param(*parse(line), id=name, marks=marks)


@pytest.mark.parametrize(("model", "want"), list(cases()))
def test_numbers_of_the_original(model, want):
    zoo, name = model
    net = get_model_entry(name, zoo)(num_classes=CLASSES[zoo]).double().eval()
    with torch.no_grad():
        fill(net)
        logits, features = net(golden_values(INPUT[zoo], 7))
    got = [
        logits[0, :3].tolist(),
        norms([logits, features["pooled_feat"]]),
        norms(features["feats"]),
        norms(features.get("preact_feats", [])),
    ]
    for have, numbers in zip(got, want, strict=True):
        assert have == pytest.approx(numbers, rel=1e-6)


PARAMETERS_OF_OTHERS = {
    ("tiny_imagenet", "MobileNetV2", 200): 2497480,
    ("tiny_imagenet", "ResNet18", 200): 11271432,
    ("tiny_imagenet", "ShuffleV2", 200): 1458028,
    ("imagenet", "ResNet18", 1000): 11689512,
    ("imagenet", "ResNet34", 1000): 21797672,
    ("imagenet", "ResNet50", 1000): 25557032,
    ("imagenet", "ResNet101", 1000): 44549160,
    ("imagenet", "MobileNetV1", 1000): 4231976,
    ("cifar", "BabyTeacher", 10): 2184202,
    ("cifar", "BabyTeacherReLU", 10): 2184202,
    ("cifar", "BabyStudent", 10): 136874,
    ("cifar", "BabyStudentReLU", 10): 136874,
}


def test_parameter_counts():
    want = {("cifar", name, 100): count for name, count in PARAMETERS.items()}
    want |= PARAMETERS_OF_OTHERS
    counts = {}
    with torch.device("meta"):
        for zoo, name, classes in want:
            net = get_model_entry(name, zoo)(num_classes=classes)
            counts[zoo, name, classes] = sum(p.numel() for p in net.parameters())
    assert counts == want
