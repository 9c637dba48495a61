"""Several teachers of one student: `DISTILLER.TEACHERS`, combined as `DISTILLER.COMBINE` says.

With weights w_k of sum 1 (WEIGHT of the entries), K teachers, and p_k = softmax of the k-th's
logits:

    ensemble    the method learns from one teacher with logits log sum_k w_k p_k. Hinton, Vinyals,
                Dean: Distilling the Knowledge in a Neural Network, arXiv 1503.02531.
    losses      sum_k w_k times the method's loss under the k-th teacher
    confidence  1/N sum_n sum_k c_nk times the method's loss of sample n under the k-th teacher,
                c_nk = (1 - exp(H_nk) / sum_j exp(H_nj)) / (K - 1), H_nk the cross-entropy of the
                k-th teacher on the sample's label; 1 / K without a label. Zhang, Chen, Wang:
                Confidence-Aware Multi-Teacher Knowledge Distillation, ICASSP 2022, arXiv
                2201.00007, without its term on feature maps.

Under losses and confidence a method has its layers, banks and stages once for each teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.distillers._base import Distiller, Output
from mdistiller.distillers._compose import Composed, get_distiller, part_names, why_alone
from mdistiller.distillers.helpers.losses.decoupled import target_column
from mdistiller.distillers.helpers.losses.numerics import full_precision, scale_logits
from mdistiller.distillers.helpers.training.checks import logits_and_features, loss_of
from mdistiller.registry import UserError

COMBINE = ("losses", "ensemble", "confidence")


class TeacherTeam(nn.Module):
    """Several teachers as one network, their outputs side by side.

    Args:
        nets: their networks.
        weights: of each, positive; they need not sum to 1.
    """

    weights: Tensor

    def __init__(self, nets: Sequence[nn.Module], weights: Sequence[float]):
        super().__init__()
        self.nets = nn.ModuleList(nets)
        self.register_buffer("weights", torch.tensor(weights) / sum(weights))

    def outputs(self, image: Tensor) -> tuple[list[Tensor], list[Any]]:
        """Logits [N, C] in full precision, and features, of each network."""
        pairs = [logits_and_features(net(image), net) for net in self.nets]
        return [full_precision(logits) for logits, _ in pairs], [features for _, features in pairs]

    def forward(self, image: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Logits [N, K * C], and the features of the k-th under the name k."""
        logits, features = self.outputs(image)
        return torch.cat(logits, dim=1), {str(k): value for k, value in enumerate(features)}

    def split(self, output: Output) -> list[Output]:
        """The outputs of each network, of what :meth:`forward` gives."""
        parts = output.logits.chunk(len(self.nets), dim=1)
        return [Output(z, output.features.get(str(k), {})) for k, z in enumerate(parts)]


class TeacherEnsemble(TeacherTeam):
    """Several teachers as one network that gives the mean of their probabilities."""

    def forward(self, image: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Logits [N, C], the log of the weighted mean of probabilities, and no features."""
        log_p = torch.stack(
            [F.log_softmax(scale_logits(z, 1.0), dim=1) for z in self.outputs(image)[0]]
        )
        return (log_p + self.weights.log()[:, None, None]).logsumexp(dim=0), {}


def confidences(logits: Sequence[Tensor], target: Tensor) -> Tensor:
    """c [K, N] of the teachers' logits [N, C] each; every column sums to 1.

    Args:
        target: [N] class indices, IGNORE_INDEX where unlabelled; or [N, C] probabilities.
    """
    if target.is_floating_point():
        loss = [-(target * F.log_softmax(scale_logits(z, 1.0), dim=1)).sum(dim=1) for z in logits]
    else:
        column, labelled = target_column(target)
        loss = [
            -F.log_softmax(scale_logits(z, 1.0), dim=1).gather(1, column)[:, 0] * labelled
            for z in logits
        ]
    return (1 - torch.stack(loss).softmax(dim=0)) / (len(logits) - 1)


def check_several(name: str, combine: str, weighted: bool = False) -> None:
    """Refuse a DISTILLER.TYPE that cannot learn from several teachers combined in a way.

    Args:
        weighted: whether some teacher has a WEIGHT.
    """
    reason = _why_not(name, combine)
    if reason:
        others = [other for other in COMBINE if not _why_not(name, other)]
        raise UserError(
            f"DISTILLER.TEACHERS: DISTILLER.TYPE {name} cannot learn from several teachers under "
            f"COMBINE {combine}, {reason}{'; choose ' if others else ''}{' or '.join(others)}"
        )
    if combine == "confidence" and weighted:
        raise UserError(
            "DISTILLER.TEACHERS: COMBINE confidence finds the weights of the teachers itself; "
            "leave out WEIGHT"
        )


def _why_not(name: str, combine: str) -> str:
    """Why a DISTILLER.TYPE cannot learn from teachers combined in a way; "" if it can."""
    method = get_distiller(name)
    if combine == "ensemble":
        if method.teacher_logits_only or method.two_views:  # which read the logits of both
            return ""
        return "which has logits alone: it reads more of its teacher"
    for part in part_names(name) if issubclass(method, Composed) else [name]:
        reason = why_alone(get_distiller(part))
        if reason:
            return f"since {part}: {reason}"
    if combine == "confidence" and not method.has_rows():
        return "which weights each sample: it has no loss for each sample (distill_rows)"
    return ""


def several(method: type[Distiller], combine: str) -> type[Distiller]:
    """The method under several teachers, whose losses are combined ("losses", "confidence")."""
    facts = {
        "method": method,
        "by_confidence": combine == "confidence",
        "takes_standardized_logits": method.takes_standardized_logits,
        "soft_labels": method.soft_labels,
        "needs_teacher_classifier": method.needs_teacher_classifier,
        "needs_labels": method.needs_labels,
    }
    return type("SeveralTeachers", (SeveralTeachers,), facts)


class SeveralTeachers(Composed):
    """A method under several teachers; one forward of each network, one cross-entropy.

    Its part under the k-th teacher (from 1) is `parts.teacherK`; its unweighted loss is a metric.
    """

    method: ClassVar[type[Distiller]]
    by_confidence: ClassVar[bool] = False

    def __init__(
        self, student: nn.Module, teacher: nn.Module | None, cfg: Any, parts: dict[str, Distiller]
    ):
        Distiller.__init__(self, student, teacher)
        first = next(iter(parts.values()))
        self.ce_loss_weight, self.label_smoothing = first.ce_loss_weight, first.label_smoothing
        self.adopt(parts)
        if not self.distills:
            raise UserError(
                f"DISTILLER.TEACHERS: {self.method.__name__} teaches in a stage before the main "
                "one, where a second teacher would undo what the first has taught"
            )

    @classmethod
    def cacheable_outputs(cls) -> tuple[str, ...]:
        return cls.method.cacheable_outputs()

    @classmethod
    def build(
        cls, student: nn.Module, teacher: nn.Module | None, cfg: Any, *args: Any, **facts: Any
    ) -> Distiller:
        assert isinstance(teacher, TeacherTeam)
        parts = {
            f"teacher{k}": cls.method.build(student, net, cfg, *args, **facts)
            for k, net in enumerate(teacher.nets, start=1)
        }
        return cls(student, teacher, cfg, parts)

    def distill(self, student: Output, teacher: Output, target: Tensor, **batch: Any) -> Tensor:
        assert isinstance(self.teacher, TeacherTeam)
        teachers = self.teacher.split(teacher)
        rows = self.by_confidence
        losses, self.metrics = [], {}
        for (name, part), output in zip(self.parts.items(), teachers, strict=True):
            assert isinstance(part, Distiller)
            outputs = part.standardized(student), part.standardized(output)
            step = part.distill_rows if rows else part.distill
            loss = loss_of(part, step(*outputs, target, **batch))
            losses.append(loss if rows else loss.mean())
            self.metrics |= {f"{key}_{name}": value for key, value in part.metrics.items()}
            self.metrics[f"loss_{name}"] = loss.detach().mean()
        values = torch.stack(losses)
        if not rows:
            return torch.dot(self.teacher.weights, values)
        weights = confidences([output.logits for output in teachers], target)
        return (weights * values).sum() / values.shape[1]
