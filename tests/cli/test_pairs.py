"""Every method on pairs of every kind, by its default config: runs, or is refused with a reason."""

import pytest

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
    ("vgg8", "resnet8"): {"FSP": "equal widths", "KDSVD": "widths"},
    ("resnet20", "BabyStudent"): {
        "FSP": "equal widths",
        "KDSVD": "only one",
        **dict.fromkeys(("SDD", "CATKD", "SIMKD"), "the student (BabyNet)"),
    },
    ("BabyTeacher", "resnet8"): {
        "FSP": "equal widths",
        "KDSVD": "only one",
        **dict.fromkeys(("SDD", "CATKD", "SIMKD"), "the teacher (BabyNet)"),
    },
}


@pytest.mark.filterwarnings("ignore:.*left over, without part:UserWarning")
@pytest.mark.filterwarnings("ignore:FITNET. no layer:UserWarning")
@pytest.mark.parametrize("pair", REFUSED, ids="->".join)
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
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| pair | KD | KDSVD |"
    assert lines[2] == "| vgg8 -> resnet8 | ok | refused |"
    assert sum(line.startswith("KDSVD, 2 pairs (vgg8 -> resnet8, ...): ") for line in lines) == 1
    assert pairs.main(["--teachers", "vgg9"]) == 2
    assert "unknown CIFAR model 'vgg9'" in capsys.readouterr().err


def test_the_step_before_the_main_stage_counts_too(monkeypatch):
    from mdistiller.distillers.FSP import FSP

    whole = FSP.init_loss

    def infinite(self, *args, **batch):
        return whole(self, *args, **batch) * float("inf")

    monkeypatch.setattr(FSP, "init_loss", infinite)
    assert pairs.one_step("FSP", "resnet8", "resnet8") == "not finite"
