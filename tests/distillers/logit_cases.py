"""Cases of `loss_cases.py` for the logit losses of 2024 and 2025, at 100 and at 1,000 classes."""

from collections.abc import Callable
from functools import partial

import textbook_logits
import torch
from torch import Tensor

from mdistiller.distillers.CorrectedKD import mode_loss
from mdistiller.distillers.CRLD import crld_terms
from mdistiller.distillers.GDKD import gdkd_loss
from mdistiller.distillers.GDKD3 import gdkd3_loss
from mdistiller.distillers.helpers.losses.split import Split, split_terms
from mdistiller.distillers.NormKD import normkd_loss
from mdistiller.distillers.RLD import rld_loss
from mdistiller.engine.cfg import default_config

AS_CODED = Split(batch_weight=True)
Form = Callable[..., Tensor]


def crld(z_w: Tensor, z_s: Tensor, v_w: Tensor, v_s: Tensor) -> Tensor:
    terms = crld_terms((z_w, v_w), (z_s, v_s), 4.0, (0.9, 0.2))
    return 2.0 * terms["within"] + 0.5 * terms["cross"]


def plain_crld(z_w: Tensor, z_s: Tensor, v_w: Tensor, v_s: Tensor) -> Tensor:
    return textbook_logits.crld(z_w, z_s, v_w, v_s, (2.0, 0.5), 4.0, 0.9, 0.2)


def corrected(mode: str, target: Tensor) -> Form:
    """Mean loss of a mode of CORRECTEDKD."""
    node = default_config().CORRECTEDKD
    node.MODE = mode
    loss = mode_loss(node)
    return lambda z, v: loss(z, v, target[:, None]).mean()


def forms(target: Tensor) -> dict[str, tuple[int, Form, Form]]:
    """Number of views, our form and the plain one: of the student's logits, then the teacher's."""
    kd_mean = lambda z, v: textbook_logits.kd_rows(z, v, 4.0).mean()  # noqa: E731
    swapped, softly = textbook_logits.swapped, textbook_logits.softly_swapped
    return {
        "RLD": (
            1,
            lambda z, v: rld_loss(z, v, target, 1.0, 8.0, 1.0, 4.0),
            lambda z, v: textbook_logits.rld(z, v, target, 1.0, 8.0, 1.0, 4.0),
        ),
        "GDKD": (
            1,
            lambda z, v: gdkd_loss(z, v, (1.0, 2.0, 8.0), 5, 4.0),
            lambda z, v: textbook_logits.gdkd(z, v, (1.0, 2.0, 8.0), (5,), 4.0),
        ),
        "GDKD3": (
            1,
            lambda z, v: gdkd3_loss(z, v, (1.0, 2.0, 8.0), 4, 4.0),
            lambda z, v: textbook_logits.gdkd(z, v, (1.0, 0.0, 2.0, 8.0), (1, 3), 4.0),
        ),
        "CRLD": (2, crld, plain_crld),
        "NORMKD": (
            1,
            lambda z, v: normkd_loss(z, v, 2.0),
            lambda z, v: textbook_logits.normkd(z, v, 2.0),
        ),
        "swap": (1, corrected("swap", target), lambda z, v: kd_mean(z, swapped(v, target))),
        "soft swap": (
            1,
            corrected("soft_swap", target),
            lambda z, v: kd_mean(z, softly(v, target)),
        ),
        "RC": (
            1,
            corrected("rc", target),
            lambda z, v: textbook_logits.rc(z, v, target, 4.0),
        ),
        "REVISION": (
            1,
            corrected("revision", target),
            lambda z, v: textbook_logits.revision(z, v, target),
        ),
        "KD split": (
            1,
            lambda z, v: sum(split_terms(z, v, target, 4.0, AS_CODED, 1, as_kd=True)),
            lambda z, v: textbook_logits.split_kd(z, v, target, 4.0),
        ),
    }


def logit_cases(
    batch: int, device: str | torch.device, dtype: torch.dtype
) -> dict[str, tuple[list[Tensor], Form, Form]]:
    """The student's logits, our form and the plain one as functions of them, by name.

    The teacher is right about half of the samples.
    """
    generator = torch.Generator().manual_seed(3)
    target = torch.arange(batch) % 100
    cases = {}
    for classes, suffix in ((100, ""), (1000, " 1000")):
        logits = [3 * torch.randn(batch, classes, generator=generator) for _ in range(4)]
        for teacher in logits[2:]:
            teacher[torch.arange(0, batch, 2), target[::2]] += 12
        logits = [z.to(device, dtype) for z in logits]
        for name, (views, ours, plain) in forms(target.to(device)).items():
            students, teachers = logits[:views], logits[2 : 2 + views]
            bound = (partial(_after, form, teachers) for form in (ours, plain))
            cases[name + suffix] = (students, *bound)
    return cases


def _after(form: Form, teachers: list[Tensor], *students: Tensor) -> Tensor:
    return form(*students, *teachers)
