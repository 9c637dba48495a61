"""SOLVER.CLIP_GRAD_NORM is of gradients without the scale that fp16 gives them."""

from types import SimpleNamespace

import pytest
import torch

from mdistiller.engine import trainer_dict


@pytest.mark.parametrize("scaled", [True, False])
def test_the_norm_that_is_clipped_is_that_of_the_loss_itself(scaled):
    weight = torch.nn.Parameter(torch.zeros(4))
    trainer = trainer_dict["base"].__new__(trainer_dict["base"])
    trainer.cfg = SimpleNamespace(SOLVER=SimpleNamespace(CLIP_GRAD_NORM=0.5))
    trainer.optimizer = torch.optim.SGD([weight], lr=1.0)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
    for slope, moved in ((3.0, 0.5), (0.1, 0.2)):  # of norms 6 and 0.2
        with torch.no_grad():
            weight.zero_()
        trainer.optimizer.zero_grad()
        trainer.scaler.scale((slope * weight).sum()).backward()
        trainer.update()
        assert weight.norm().item() == pytest.approx(moved, rel=1e-3)
