"""Every method on pairs of every kind, by its default config: runs, or is refused with a reason."""

import pytest
from support import unpadded

from mdistiller.cli import pairs
from mdistiller.distillers import distiller_dict

METHODS = [name for name in sorted(distiller_dict) if name != "NONE"]
# teacher, student: the only methods that may refuse, and a word of the reason
REFUSED = {
    ("resnet20", "resnet8"): {},
    ("wrn_16_2", "wrn_16_1"): {"FSP": "equal widths"},
    ("vgg8", "vgg8"): {},
    ("resnet8x4", "ShuffleV1"): {"FSP": "equal widths", "KDSVD": "widths"},
    ("wrn_16_1", "ShuffleV2"): {"FSP": "equal widths", "KDSVD": "widths"},
    ("vgg8", "MobileNetV2"): {"FSP": "equal widths", "KDSVD": "widths"},
    ("resnet20", "MobileNetV2"): {
        "FSP": "equal widths",
        "KDSVD": "widths",
    },
    ("resnet20", "BabyStudent"): {
        "FSP": "equal widths",
        "KDSVD": "only one",
        **dict.fromkeys(("SDD", "CATKD", "SIMKD"), "the student (BabyNet)"),
    },
    ("BabyTeacher", "resnet8"): {
        "FSP": "equal widths",
        "KDSVD": "only one",
        **dict.fromkeys(("SDD", "CATKD", "SIMKD", "WKD"), "the teacher (BabyNet)"),
    },
}

MARKS = dict.fromkeys(
    [
        ("resnet20", "resnet8"),  # all methods train on such a pair in tests/distillers
        ("resnet20", "MobileNetV2"),
        ("wrn_16_2", "wrn_16_1"),
        ("vgg8", "vgg8"),
        ("wrn_16_1", "ShuffleV2"),
        ("vgg8", "MobileNetV2"),
        ("resnet8x4", "ShuffleV1"),
    ],
    pytest.mark.slow,
)


@pytest.mark.filterwarnings("ignore:.*left over, without part:UserWarning")
@pytest.mark.filterwarnings("ignore:FITNET. no layer:UserWarning")
@pytest.mark.parametrize(
    "pair", [pytest.param(pair, marks=MARKS.get(pair, ()), id="->".join(pair)) for pair in REFUSED]
)
def test_all_methods_run_where_the_mathematics_allows(pair):
    verdicts = {method: pairs.one_step(method, *pair) for method in METHODS}
    refusals = {method: text for method, text in verdicts.items() if text != "ok"}
    assert set(refusals) == set(REFUSED[pair]), refusals
    for method, word in REFUSED[pair].items():
        assert word in refusals[method]
        assert "\n" not in refusals[method]


def test_the_table_is_printed_with_each_reason_once(capsys):
    words = ["--teachers", "vgg8", "--students", "resnet8", "resnet14", "--methods", "KD", "KDSVD"]
    assert pairs.main(words) == 0
    lines = unpadded(capsys.readouterr().out).splitlines()
    assert lines[0].startswith("one step of 4 random 32x32 images of 100 classes; torch ")
    assert lines[2] == "| pair | KD | KDSVD |"
    assert lines[4] == "| vgg8 -> resnet8 | ok | refused |"
    assert sum(line.startswith("KDSVD, 2 pairs (vgg8 -> resnet8, ...): ") for line in lines) == 1
    assert pairs.main(["--teachers", "vgg9"]) == 2
    assert "unknown CIFAR model 'vgg9'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("teacher", "student"),
    [
        pytest.param("torchvision/swin_t", "timm/convnext_atto", marks=pytest.mark.slow),
        ("timm/vit_tiny_patch16_224", "torchvision/shufflenet_v2_x0_5"),
        pytest.param("timm/mixer_s32_224", "timm/vit_tiny_patch16_224", marks=pytest.mark.slow),
        pytest.param("torchvision/mnasnet0_5", "timm/mobilevit_xxs", marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore:.*left over, without part:UserWarning")
def test_networks_of_other_libraries_teach_and_learn(teacher, student):
    """A slice of docs/results/external_pairs.md: CNNs, transformers, a mixer, a hybrid."""
    data = ("cifar", (64, 64), 10)
    methods = ["KD", "AT", "CRD", "REVIEWKD", "OFA"]
    verdicts = {method: pairs.one_step(method, teacher, student, data) for method in methods}
    assert verdicts == dict.fromkeys(methods, "ok")


def test_a_network_that_does_not_fit_is_refused_once_for_all_methods(capsys):
    words = ["--teachers", "timm/levit_128s", "resnet8", "--students", "torchvision/squeezenet1_1"]
    settings = ["--image-size", "64", "--classes", "5", "--zoo", "cifar"]
    assert pairs.main([*words, "--methods", "KD", "AT", *settings]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "4 random 64x64 images of 5 classes" in lines[0]
    assert lines[-1] == (
        "KD, AT, 2 pairs (timm/levit_128s -> torchvision/squeezenet1_1, ...): "
        "torchvision/squeezenet1_1 cannot be used here: its head is not a linear layer; "
        "choose another one"
    )
    assert pairs.main(["--teachers", "timm/resnet19"]) == 2
    assert pairs.main(["--teachers", "resnet8", "--classes", "3"]) == 2
    assert pairs.main(["--teachers", "resnet8", "--methods", "KDD"]) == 2


def test_the_step_before_the_main_stage_counts_too(monkeypatch):
    from mdistiller.distillers.FSP import FSP

    whole = FSP.init_loss

    def infinite(self, *args, **batch):
        return whole(self, *args, **batch) * float("inf")

    monkeypatch.setattr(FSP, "init_loss", infinite)
    assert pairs.one_step("FSP", "resnet8", "resnet8") == "not finite"
