"""DeepKD. Huang et al.: DeepKD: A Deeply Decoupled and Denoised Knowledge Distillation Trainer,
2025, arXiv 2505.15133.

Three gradients have separate momentum buffers: of the task (TOG), of the distillation of the target
class (TCG) and of the other classes (NCG). With m_x = MOMENTUM + DELTA_x, a step is

    V_x = m_x V_x + g_x  for x in TOG, TCG, NCG,    w = w - lr (V_TOG + V_TCG + V_NCG)

The method, KD or DKD, gives its loss as two terms; TOPK leaves the classes that the teacher ranks
low out of the second (`distillers/helpers/losses/split.py`). Paper and code differ;
SOLVER.DEEPKD.FORM is one of

    coded      V_TOG decays by m_TCG wherever a parameter has all three gradients, so that DELTA_TOG
               has no effect; weight decay enters V_TCG alone; KD's NCKD has the batch's mean of
               1 - q_y as its weight; TOPK is a constant
    written    each buffer by its own momentum; weight decay has a buffer of its own at MOMENTUM,
               so that it acts as under SGD; each sample has its own weight; TOPK is where k
               starts, from there it rises evenly to all classes in the last epoch

How k rises is a choice made here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from mdistiller.distillers import distiller_dict
from mdistiller.distillers.helpers.losses.split import Split
from mdistiller.distillers.helpers.training.settings import require_one_of
from mdistiller.engine.dot import DOTTrainer, KeptGradients
from mdistiller.engine.trainer import trainer_dict
from mdistiller.registry import UserError

TERMS = ("loss_tckd", "loss_nckd")
FORMS = ("coded", "written")


class ThreeMomenta(KeptGradients):
    """SGD with separate momentum for the task in `.grad` and two kept gradients.

    A parameter without one of the gradients uses the others, with their own momenta.

    Args:
        momenta: of the task, of `loss_tckd` and of `loss_nckd`.
        decay_momentum: of the weight decay, in the form "written".
        form: "coded" or "written".
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momenta: tuple[float, float, float],
        decay_momentum: float,
        weight_decay: float = 0.0,
        form: str = "coded",
    ):
        settings = {"lr": lr, "weight_decay": weight_decay}
        super().__init__(params, settings, TERMS)
        self.momenta, self.decay_momentum = momenta, decay_momentum
        self.coded = form == "coded"

    def move(self, param: Tensor, gradients: list[Tensor | None], group: Any) -> None:
        if all(gradient is None for gradient in gradients):
            return
        task, target, others = self.momenta
        decay = group["weight_decay"]
        if self.coded:
            if all(gradient is not None for gradient in gradients):
                task = target
            if decay:
                place = 1 if gradients[1] is not None else 0 if gradients[0] is not None else 2
                gradient = gradients[place]
                assert gradient is not None
                gradients[place] = gradient.add(param, alpha=decay)
        elif decay:
            self._buffer(param, "decay_buffer", param * decay, self.decay_momentum)
        names = ("task_buffer", "target_buffer", "others_buffer")
        for name, gradient, momentum in zip(names, gradients, (task, target, others), strict=True):
            if gradient is not None:
                self._buffer(param, name, gradient, momentum)
        for buffer in self.state[param].values():
            param.sub_(buffer, alpha=group["lr"])

    def _buffer(self, param: Tensor, name: str, gradient: Tensor, momentum: float) -> None:
        """Update a momentum buffer; it starts as the first gradient."""
        state = self.state[param]
        if name in state:
            state[name].mul_(momentum).add_(gradient)
        else:
            state[name] = gradient.clone()


def _can_split(method: Any) -> bool:
    return bool(getattr(method, "can_split", bool)())


@trainer_dict.register("deepkd")
class DeepKDTrainer(DOTTrainer):
    """Trains a method that splits its loss by the target class; SOLVER.TYPE SGD only."""

    def init_optimizer(self, cfg: Any) -> Optimizer:
        solver, node, model = cfg.SOLVER, cfg.SOLVER.DEEPKD, self.model
        if not _can_split(model):
            able = sorted(name for name, cls in distiller_dict.items() if _can_split(cls))
            raise UserError(
                f"SOLVER.TRAINER {solver.TRAINER} needs a method that splits its loss by the "
                f"target class ({', '.join(able)}), not {cfg.DISTILLER.TYPE}"
            )
        coded = require_one_of("SOLVER.DEEPKD.FORM", node.FORM, FORMS) == "coded"
        model.split = Split(node.TOPK, not coded, coded, solver.EPOCHS)
        momenta = []
        for name in ("DELTA_TOG", "DELTA_TCG", "DELTA_NCG"):
            momentum = solver.MOMENTUM + node[name]
            if not 0 <= momentum < 1:
                raise UserError(
                    f"SOLVER.MOMENTUM {solver.MOMENTUM} + SOLVER.DEEPKD.{name} {node[name]} must "
                    "be at least 0 and below 1"
                )
            momenta.append(momentum)
        return ThreeMomenta(
            self.checked_groups(solver),
            lr=solver.LR,
            momenta=(momenta[0], momenta[1], momenta[2]),
            decay_momentum=solver.MOMENTUM,
            weight_decay=solver.WEIGHT_DECAY,
            form=node.FORM,
        )
