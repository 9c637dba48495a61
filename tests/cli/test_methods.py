"""The table of methods, found out by running them."""

import re

import pytest
from support import unpadded

from benchmarks import methods_page as methods
from mdistiller.distillers import distiller_dict
from mdistiller.runtime import project_root

NAMES = sorted(name for name in distiller_dict if name != "NONE")
PAGE = project_root() / "docs" / "methods.md"
ADVICE = "run: python tools/methods.py --write docs/methods.md"


@pytest.mark.slow
def test_the_page_is_what_the_command_makes():
    made = f"\n{methods.feature_only()}\n{methods.table(NAMES)}"
    assert PAGE.read_text().partition(methods.MARK)[2] == made, ADVICE


def test_the_pages_rows_are_what_the_command_makes():
    """All methods have theirs; those of some are made."""
    page = unpadded(PAGE.read_text().partition(methods.MARK)[2])
    assert re.findall(r"^\| `?(\w+)`? \|", page.partition("|---")[2], re.MULTILINE) == NAMES
    head, _, *made = unpadded(methods.table(["CRD", "DKD", "USKD"])).splitlines()
    assert not {head, *made} - set(page.splitlines()), ADVICE
    assert page.startswith(f"\n{methods.feature_only()}\n| "), ADVICE


@pytest.mark.parametrize("name", NAMES)
def test_every_method_cites_a_paper_with_its_year_or_says_there_is_none(name):
    cited = methods.paper(distiller_dict[name])
    assert re.search(r"\b(19|20)\d\d\b", cited) or name == "DGKD"
    assert len(cited) > 20


def test_what_is_used_is_found_out():
    assert methods.tensors_used("DKD") == (["logits"], ["logits"], 1)
    assert methods.tensors_used("REVIEWKD")[:2] == (
        ["feats", "pooled_feat"],
        ["preact_feats", "pooled_feat"],
    )
    assert methods.tensors_used("USKD")[1] == []
    assert methods.tensors_used("MLKD")[2] == 2


def test_needs_and_extras():
    assert methods.needs(distiller_dict["CRD"]) == "sample numbers, training labels"
    assert methods.needs(distiller_dict["OFD"]) == "teacher in train mode"
    assert methods.extras("CC", 1) == "65,792 parameters"  # two Linear(256, 128)
    assert methods.extras("MLKD", 2) == "2 forwards"
    assert methods.extras("CTKD", 1) == "1 parameter"


def test_bad_input_is_one_line(capsys, tmp_path):
    for words, message in [
        (["--only", "DKDD"], "unknown method 'DKDD'; did you mean 'DKD'?"),
        (["--only", "KD", "--write", str(tmp_path / "x.md")], "leave out --only"),
    ]:
        assert methods.main(words) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
