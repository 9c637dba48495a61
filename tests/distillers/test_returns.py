"""What a method of a user's returns is looked at."""

import types

import pytest
import torch

from mdistiller.distillers import Distiller, Output, Vanilla
from mdistiller.distillers._compose import Composed
from mdistiller.distillers.helpers.training.checks import logits_of, loss_of, metrics_of, step_of
from mdistiller.registry import UserError

LOGITS, LOSS = torch.zeros(2, 3), torch.zeros((), requires_grad=True)


class Mine(Distiller):
    def __init__(self):
        torch.nn.Module.__init__(self)


@pytest.mark.parametrize(
    ("value", "words"), [(None, "None"), (0.5, "float"), ({"loss": LOSS}, "a dict of 1 item")]
)
def test_distill_returns_a_loss(value, words):
    with pytest.raises(UserError, match=rf"Mine\.distill returned .*{words}.*scalar tensor"):
        loss_of(Mine(), value)
    assert loss_of(Mine(), LOSS) is LOSS


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "None"),
        (1.0, "float"),
        (LOSS, "a tensor"),
        ({"loss": LOSS}, "a dict of 1 item"),
        ({"logits": LOGITS, "loss": LOSS}, "a dict of 2 items"),
        ((LOGITS, LOSS), "a tensor"),
        (({"loss": LOSS}, LOGITS), "a dict of 1 item"),
        ((LOGITS, {}), "a dict of 0 items"),
        ((LOGITS, {"loss_kd": 0.5}), "float as 'loss_kd'"),
        ((LOGITS, {"loss_kd": None}), "None as 'loss_kd'"),
        ((LOGITS, {"loss_kd": LOSS.detach()}), "losses without gradient"),
    ],
)
def test_forward_train_returns_logits_and_losses(value, words):
    with pytest.raises(UserError, match=rf"Mine\.forward_train returned .*{words}"):
        step_of(Mine(), value)


class Odd(Distiller):
    def __init__(self, student, teacher, settings, depth):
        raise NotImplementedError


class Short(Distiller):
    def __init__(self, student, teacher):
        raise NotImplementedError


class Bare(Vanilla):
    def __init__(self, student, cfg):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("method", "words"),
    [(Odd, "missing.* 'depth'"), (Short, "too many"), (Bare, "missing.* 'cfg'")],
)
def test_a_constructor_of_other_arguments_is_named_with_what_it_must_take(method, words):
    with pytest.raises(UserError, match=rf"{method.__name__}\.__init__ .*{words}.*must take") as e:
        method.build(None, None, {}, 9)
    assert "\n" not in str(e.value)


def test_a_part_of_a_sum_returns_a_loss_too():
    net = torch.nn.Linear(1, 1)
    part = Distiller(net, net)
    part.distill = lambda *outputs, **batch: None
    whole = Composed(
        net,
        net,
        types.SimpleNamespace(DISTILLER=types.SimpleNamespace(CE_WEIGHT=1)),
        {"MINE": part},
    )
    output = Output(LOGITS, {})
    with pytest.raises(UserError, match=r"Distiller\.distill returned None"):
        whole.distill(output, output, torch.zeros(2, dtype=torch.long))


def test_the_right_pair_passes():
    assert step_of(Mine(), (LOGITS, {"loss": LOSS})) == (LOGITS, {"loss": LOSS})


@pytest.mark.parametrize(
    ("value", "words"),
    [(None, "None"), (LOGITS[0], r"a tensor \[3\]"), (LOGITS.repeat(2, 1), "4, 3")],
)
def test_logits_are_a_row_for_each_image(value, words):
    with pytest.raises(UserError, match=rf"Mine\.forward_train returned .*{words}.*the 2 images"):
        logits_of(Mine(), value, 2)
    assert logits_of(Mine(), LOGITS, 2) is LOGITS


def test_metrics_are_numbers():
    method, device = Mine(), torch.device("cpu")
    method.metrics = {"half": 0.5, "rows": LOGITS}
    assert torch.stack([v.mean() for v in metrics_of(method, device).values()]).tolist() == [0.5, 0]
    method.metrics = {"note": "fine"}
    with pytest.raises(UserError, match=r"Mine\.metrics\['note'\] is a value of type str"):
        metrics_of(method, device)


def test_a_method_without_a_loss_is_told_what_to_override():
    with pytest.raises(UserError, match=r"Mine must override distill"):
        Mine().distill(None, None, None)
