"""What a method of a user's returns is looked at."""

import pytest
import torch

from mdistiller.distillers import Distiller
from mdistiller.distillers._returned import loss_of, step_of
from mdistiller.registry import UserError

LOGITS, LOSS = torch.zeros(2, 3), torch.zeros(())


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
    ],
)
def test_forward_train_returns_logits_and_losses(value, words):
    with pytest.raises(UserError, match=rf"Mine\.forward_train returned .*{words}.*must return"):
        step_of(Mine(), value)


def test_the_right_pair_passes():
    assert step_of(Mine(), (LOGITS, {"loss": LOSS})) == (LOGITS, {"loss": LOSS})
