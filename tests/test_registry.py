import pytest

from mdistiller.distillers import DISTILLERS
from mdistiller.distillers._base import OPTIONS_HERE
from mdistiller.registry import Registry, UserError


def test_decorator_enters_and_returns_the_object_with_its_config():
    table = Registry("thing")

    @table.register("A", config={"K": 1})
    def thing():
        return 7

    assert table["A"] is thing
    assert thing() == 7
    assert table.config == {"A": {"K": 1}}


def test_a_name_is_given_once():
    table = Registry("thing")
    table.register("A")(object())
    with pytest.raises(ValueError, match="thing 'A' is taken"):
        table.register("A")(object())


def test_unknown_name_gets_the_nearest_and_the_known_ones():
    table = Registry("thing")
    table.update(resnet8=1, vgg8=2)
    with pytest.raises(UserError) as caught:
        table["ResNet8"]
    assert str(caught.value) == (
        "unknown thing 'ResNet8'; did you mean 'resnet8'? (known: resnet8, vgg8)"
    )
    with pytest.raises(KeyError):  # mappings promise this type
        table["zzz"]
    assert table.get("zzz") is None


def test_a_method_that_is_a_setting_here_is_named_with_it():
    """SWAP, by spelling, would be SP."""
    for name, advice in (("SWAP", "CORRECTEDKD, and CORRECTEDKD.MODE swap"), ("DeepKD", "deepkd")):
        with pytest.raises(UserError, match=rf"'{name}'; set [^(]*{advice} \(known: AB, "):
            DISTILLERS[name]
    assert not DISTILLERS.keys() & OPTIONS_HERE.keys()


def test_a_taken_name_prints_no_address():
    table = Registry("thing")
    table.add("one", lambda: 1)
    with pytest.raises(UserError, match=r"taken by .*lambda") as raised:
        table.add("one", lambda: 2)
    assert "0x" not in str(raised.value)
