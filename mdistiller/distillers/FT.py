"""FT. Kim, Park, Kwak: Paraphrasing Complex Network: Network Compression via Factor Transfer,
NeurIPS 2018, arXiv 1802.04977.

A paraphraser, a convolutional autoencoder, learns factors of the teacher's last map: in a stage of
its own (FT.INIT.EPOCHS), by the mean squared error of its reconstruction. Its encoder is then
frozen, and a translator trained with the student brings the student's last map to them. With
factors F [f, H, W], f = RATE times the teacher's width, the larger average-pooled to the size of
the other:

    q(F) = v / |v|,  v_hw = mean_c F_chw^2
    loss = mean(|q(F_student) - q(F_teacher)|^P)

FORM attention, above, with batch norms in the translator alone is RepDistiller. FORM factor takes
the whole factor instead, q(F) = F / |F|, as the paper and the Knowledge-Distillation-Zoo do (the
Zoo with BATCH_NORM both on CIFAR-10, none elsewhere, and with Kaiming's initial weights, which are
not copied). INIT.EPOCHS 0 leaves the paraphraser at random weights.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from mdistiller.distillers._base import DISTILLERS, Distiller, Losses, Output
from mdistiller.distillers.helpers.features.shapes import Size, probe
from mdistiller.distillers.helpers.features.stages import match_size
from mdistiller.distillers.helpers.losses.numerics import full_precision, mean_square_error, unit
from mdistiller.distillers.helpers.training.init_stage import INIT, InitPlan
from mdistiller.distillers.helpers.training.settings import require_one_of
from mdistiller.registry import UserError


def ft_loss(student: Tensor, teacher: Tensor, p: float = 1, form: str = "attention") -> Tensor:
    """Difference of normalised factors, a scalar.

    Args:
        student, teacher: factors [N, f, H, W]; f may differ in the form "attention", H and W may.
        p: power of the difference.
        form: "attention" or "factor"; see above.
    """
    student, teacher = match_size(full_precision(student), full_precision(teacher))
    if form == "attention":
        student, teacher = (x.square().mean(dim=1) for x in (student, teacher))
    s_unit, t_unit = (unit(x.flatten(1)) for x in (student, teacher))
    difference = (s_unit - t_unit).abs()
    return (difference if p == 1 else difference.pow(p)).mean()


def layers(convolution: type[nn.Module], widths: list[int], norm: bool) -> nn.Sequential:
    """3x3 convolutions between the widths, each with batch norm (if asked for) and leaky ReLU."""
    blocks: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        normed = nn.BatchNorm2d(outputs) if norm else nn.Identity()
        blocks += [convolution(inputs, outputs, 3, padding=1), normed, nn.LeakyReLU(0.1)]
    return nn.Sequential(*blocks)


def make_encoder(width: int, factor_width: int, norm: bool) -> nn.Sequential:
    """Maps [N, width, H, W] to factors [N, factor_width, H, W]: paraphraser's half, translator."""
    return layers(nn.Conv2d, [width, width, factor_width, factor_width], norm)


class Paraphraser(nn.Module):
    """Autoencoder of maps [N, width, H, W]; `encoder` gives the factors."""

    def __init__(self, width: int, factor_width: int, norm: bool):
        super().__init__()
        self.encoder = make_encoder(width, factor_width, norm)
        widths = [factor_width, factor_width, width, width]
        self.decoder = layers(nn.ConvTranspose2d, widths, norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


@DISTILLERS.register(
    "FT",
    config={
        "FORM": "attention",  # or factor
        "RATE": 0.5,
        "P": 1,
        "BATCH_NORM": "translator",  # both or none
        "INIT": {**INIT, "LR": 0.01},
        "LOSS": {"CE_WEIGHT": 1.0, "FEAT_WEIGHT": 200.0},
    },
)
class FT(Distiller):
    """Factor transfer: the student's translated map has the teacher's paraphrased factors."""

    needs_teacher_classifier = False
    soft_labels = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any, image_size: Size = None):
        super().__init__(student, teacher)
        node = cfg.FT
        self.ce_loss_weight = node.LOSS.CE_WEIGHT
        self.feat_loss_weight = node.LOSS.FEAT_WEIGHT
        self.form = require_one_of("FT.FORM", node.FORM, ("attention", "factor"))
        self.p = node.P
        if self.p < 1:
            raise UserError(
                f"FT.P must be at least 1, got {self.p}: else equal factors have no gradient"
            )
        self.init = InitPlan.read("FT", cfg)
        norm = require_one_of("FT.BATCH_NORM", node.BATCH_NORM, ("translator", "both", "none"))
        s_width, t_width = (probe(net, image_size)["feats"][-1][1] for net in (student, teacher))
        factor_width = int(t_width * node.RATE)
        if factor_width < 1:
            raise UserError(
                f"FT.RATE {node.RATE} leaves no factor of the teacher's {t_width} channels"
            )
        self.paraphraser = Paraphraser(t_width, factor_width, norm == "both")
        self.paraphraser.requires_grad_(False)  # the first stage alone trains it
        self.translator = make_encoder(s_width, factor_width, norm != "none")

    def train(self, mode: bool = True) -> FT:
        """Set training mode; outside its stage the paraphraser stays in eval mode."""
        super().train(mode)
        if not self.init_stage:
            self.paraphraser.eval()
        return self

    def init_modules(self) -> list[nn.Module]:
        return [self.paraphraser]

    def forward_init(self, image: Tensor, target: Tensor, **batch: Any) -> tuple[Tensor, Losses]:
        """The teacher's logits and the paraphraser's loss; the student does not run."""
        teacher = self.run_teacher(image)
        with torch.autocast(image.device.type, enabled=False):
            last = teacher["feats"][-1]
            return teacher.logits, {"loss_init": mean_square_error(self.paraphraser(last), last)}

    def distill(self, student: Output, teacher: Output, target: Tensor, **batch: Any) -> Tensor:
        with torch.no_grad():
            factor = self.paraphraser.encoder(teacher["feats"][-1])
        translated = self.translator(student["feats"][-1])
        return self.feat_loss_weight * ft_loss(translated, factor, self.p, self.form)
