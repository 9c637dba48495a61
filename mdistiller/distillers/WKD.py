"""WKD. Lv, Yang, Li: Wasserstein Distance Rivals Kullback-Leibler Divergence for Knowledge
Distillation, NeurIPS 2024, arXiv 2412.08139.

WKD-L compares logits. With y the label, p and q softmaxes of student and teacher at temperature 1,
P and Q those of the classes other than y at temperature T:

    target = mean over n of -q_y log p_y
    W      = mean over n of the cost of moving Q_n to P_n at cost D_cd from class c to class d
    D      = 1 - exp(-SHARPEN dist)

W is the cost of the plan after ITERATIONS Sinkhorn rounds with smoothing LAMBDA
(`helpers/losses/sinkhorn.py`). COST chooses dist:

    cka        1 - linear CKA of the teacher's logits for the classes' training images
    cka_feats  the same of its pooled features
    fc         1 - cosine of the rows of its classifier: needs no images

WKD-F compares the maps `feats[HINT_LAYER]`, the student's through a PROJECTOR: conv1x1
(convolution, norm, ReLU) or bottleneck (three of them: 1x1, 3x3 and 1x1, WIDTH channels between).
HINT_LAYERS names several maps, such as a detector's pyramid, with a projector each; their F add up.
With mu and sigma = sqrt(var + 1e-5), mean and deviation of a channel in each cell of a GRID x GRID
division,

    F = (RATIO sum (mu_s - mu_t)^2 + sum (sigma_s - sigma_t)^2) / (N GRID^2)

    loss = CE_WEIGHT CE + (target + WKD_LOGIT_WEIGHT g W) + WKD_FEAT_WEIGHT g F

A term of weight 0 is left out, `target` with W. g = 1 up to epoch COSINE_DECAY_EPOCH, then half a
cosine down to 0 in the last one. Without that key the authors' code decays from the first epoch, as
the defaults here do. They are those of ResNet34 -> ResNet18 on ImageNet, except COST (there cka):
the default needs no pass over images.

Paper and code: the paper has full covariances in F and transports all classes together; the code,
followed here, has diagonal ones and keeps the target apart. The authors ship their cost matrices;
here each is computed from the run's teacher and images.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.distillers._base import DISTILLERS, Distiller, Output
from mdistiller.distillers.helpers.features.heads import linear_head
from mdistiller.distillers.helpers.features.shapes import Size, probe
from mdistiller.distillers.helpers.losses.decoupled import labelled_mean, target_column
from mdistiller.distillers.helpers.losses.moments import make_projector, wkd_feature_loss
from mdistiller.distillers.helpers.losses.numerics import scale_logits, unit
from mdistiller.distillers.helpers.losses.sinkhorn import transport_cost
from mdistiller.distillers.helpers.training.settings import require_one_of, require_positive
from mdistiller.distillers.helpers.training.teacher_facts import (
    TeacherFact,
    class_similarity,
    missing_fact,
)
from mdistiller.registry import UserError

PROJECTORS = ("conv1x1", "bottleneck")
OUTPUTS = {"cka": "logits", "cka_feats": "pooled_feat"}


def class_costs(similarity: Tensor, sharpen: float) -> Tensor:
    """D of similarities [C, C] with 1 on the diagonal: there 0, and below 1 elsewhere."""
    return -torch.expm1(-sharpen * (1 - similarity).clamp(min=0))


def classifier_similarity(head: nn.Module) -> Tensor:
    """Cosines of the rows of a linear classifier, [C, C]."""
    rows = unit(head.weight.detach().flatten(1).float())  # type: ignore[operator, union-attr]
    return (rows @ rows.T).fill_diagonal_(1)


def wkd_logit_terms(
    logits_student: Tensor,
    logits_teacher: Tensor,
    target: Tensor,
    cost: Tensor,
    temperature: float,
    smoothing: float = 0.05,
    rounds: int = 10,
    largest: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The target's term and W, two scalars: means over the labelled samples.

    Args:
        logits_student, logits_teacher: [N, C].
        target: [N] class indices, IGNORE_INDEX where unlabelled; or [N, C] class probabilities, of
            which the largest counts.
        cost: D, [C, C].
        temperature: T > 0, of the classes that are not the target.
        smoothing, rounds: LAMBDA and ITERATIONS.
        largest: a bound of D.
    """
    column, labelled = target_column(target)
    log_p, log_q = (
        F.log_softmax(scale_logits(z, 1.0), dim=1).gather(1, column)[:, 0]
        for z in (logits_student, logits_teacher)
    )
    student, teacher = (
        scale_logits(z, temperature).scatter(1, column, float("-inf")).log_softmax(dim=1)
        for z in (logits_student, logits_teacher)
    )
    moved = transport_cost(student, teacher, cost.to(student.dtype), smoothing, rounds, largest)
    return labelled_mean(-log_q.exp() * log_p, labelled), labelled_mean(moved, labelled)


def cosine_decay(epoch: int, start: int, epochs: int) -> float:
    """g of an epoch (from 1): 1 up to `start`, then half a cosine to 0 at `epochs`."""
    if epoch <= start or epochs <= start:
        return 1.0
    return (1 + math.cos(math.pi * (epoch - start) / (epochs - start))) / 2


@DISTILLERS.register(
    "WKD",
    config={
        "LOSS": {
            "CE_WEIGHT": 1.0,
            "WKD_LOGIT_WEIGHT": -1.0,  # of WKD-L; -1: 30 where there is no WKD-F, else 0
            "WKD_FEAT_WEIGHT": 0.0,  # of WKD-F
            "COSINE_DECAY_EPOCH": 0,  # the last epoch of full weights
        },
        "TEMPERATURE": 2.0,
        "COST": "fc",  # dist of classes: cka, cka_feats (one pass over training images) or fc
        "COST_IMAGES": 500,  # of each class in that pass, at most
        "SHARPEN": 1.0,
        "LAMBDA": 0.05,
        "ITERATIONS": 10,
        "HINT_LAYER": -1,
        "HINT_LAYERS": [],  # several, in place of HINT_LAYER
        "PROJECTOR": "bottleneck",  # or conv1x1
        "WIDTH": 256,  # of the bottleneck
        "GRID": 4,
        "RATIO": 2.0,  # weight of the means beside that of the deviations
    },
)
class WKD(Distiller):
    """WKD-L, WKD-F or both, as the weights of the two are above 0.

    The unweighted terms are kept as metrics `wkd_target`, `wkd_logit` and `wkd_feat`.
    """

    teacher_logits_only = True  # WKD-F, which is refused beside a cache, reads maps
    own_state = ("class_cost",)
    missing = False

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any, image_size: Size = None):
        super().__init__(student, teacher)
        node, weights = cfg.WKD, cfg.WKD.LOSS
        self.ce_loss_weight = weights.CE_WEIGHT
        self.logit_weight, self.feat_weight = weights.WKD_LOGIT_WEIGHT, weights.WKD_FEAT_WEIGHT
        if self.logit_weight == -1:
            self.logit_weight = 0.0 if self.feat_weight else 30.0
        if min(self.logit_weight, self.feat_weight) < 0 or not self.logit_weight + self.feat_weight:
            raise UserError(
                f"WKD.LOSS.WKD_LOGIT_WEIGHT {weights.WKD_LOGIT_WEIGHT} and WKD_FEAT_WEIGHT "
                f"{weights.WKD_FEAT_WEIGHT}: neither may be negative, and one must be above 0"
            )
        self.decay_from, self.epochs = weights.COSINE_DECAY_EPOCH, cfg.SOLVER.EPOCHS
        _check(node)  # also of the term that is left out
        if self.logit_weight:
            self._init_logits(node)
        if self.feat_weight and cfg.DISTILLER.TEACHER_CACHE != "none":
            raise UserError(
                f"DISTILLER.TEACHER_CACHE {cfg.DISTILLER.TEACHER_CACHE}: it remembers logits, "
                f"but WKD.LOSS.WKD_FEAT_WEIGHT {self.feat_weight:g} needs the teacher's maps; "
                "set one of them to none or 0"
            )
        if self.feat_weight or node.HINT_LAYERS or node.HINT_LAYER != -1:
            self._init_features(node, image_size)

    def _init_logits(self, node: Any) -> None:
        assert self.teacher is not None
        self.temperature, self.sharpen = node.TEMPERATURE, node.SHARPEN
        self.smoothing, self.rounds = node.LAMBDA, node.ITERATIONS
        largest_distance = 2.0 if node.COST == "fc" else 1.0
        self.largest = -math.expm1(-self.sharpen * largest_distance)
        if node.COST == "fc":
            similarity = classifier_similarity(linear_head(self.teacher, "teacher"))
            self.register_buffer("class_cost", class_costs(similarity, self.sharpen))
            return
        classes = probe(self.teacher)["logits"][1]
        self.register_buffer("class_cost", torch.full((classes, classes), torch.nan))
        self.teacher_facts = {
            "class_cost": TeacherFact(
                output=OUTPUTS[node.COST],
                per_class=node.COST_IMAGES,
                reduce=functools.partial(_costs_of_outputs, sharpen=self.sharpen),
                recipe=f"1 - exp(-{self.sharpen} (1 - linear CKA of classes))",
            )
        }
        self.missing = True

    def _init_features(self, node: Any, image_size: Size) -> None:
        """Check the layers, also of a WKD-F that is left out, and build the projectors."""
        assert self.teacher is not None
        shapes = [probe(net, image_size) for net in (self.student, self.teacher)]
        if not self.feat_weight and not all("feats" in names for names in shapes):
            return
        maps = [names["feats"] for names in shapes]
        counts = [len(names) for names in maps]
        key = "HINT_LAYERS" if node.HINT_LAYERS else "HINT_LAYER"
        self.layers = list(node.HINT_LAYERS) or [node.HINT_LAYER]
        if not all(layer in range(-min(counts), min(counts)) for layer in self.layers):
            raise UserError(
                f"WKD.{key} {node[key]}: the networks return {counts[0]} (student) and "
                f"{counts[1]} (teacher) maps; -1 is the last"
            )
        if not self.feat_weight:
            return
        self.grid, self.ratio = node.GRID, node.RATIO
        projectors = [
            make_projector(node.PROJECTOR, maps[0][layer][1], maps[1][layer][1], node.WIDTH)
            for layer in self.layers
        ]
        self.projector, self.more_projectors = projectors[0], nn.ModuleList(projectors[1:])

    def take_fact(self, name: str, value: Tensor) -> None:
        super().take_fact(name, value)
        self.missing = False

    def distill(self, student: Output, teacher: Output, target: Tensor, **batch: Any) -> Tensor:
        decay = cosine_decay(batch["epoch"], self.decay_from, self.epochs)
        self.metrics, terms = {}, []
        if self.logit_weight:
            target_term, transport_term = self._logit_terms(student.logits, teacher.logits, target)
            self.metrics |= {
                "wkd_target": target_term.detach(),
                "wkd_logit": transport_term.detach(),
            }
            terms.append(target_term + decay * self.logit_weight * transport_term)
        if self.feat_weight:
            distance = self._feature_term(student["feats"], teacher["feats"])
            self.metrics["wkd_feat"] = distance.detach()
            terms.append(decay * self.feat_weight * distance)
        return torch.stack(terms).sum()

    def _feature_term(self, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        projectors = [self.projector, *self.more_projectors]
        terms = [
            wkd_feature_loss(project(student[layer]), teacher[layer], self.grid, self.ratio)
            for project, layer in zip(projectors, self.layers, strict=True)
        ]
        return torch.stack(terms).sum()

    def _logit_terms(self, student: Tensor, teacher: Tensor, target: Tensor) -> Any:
        if self.missing:
            raise missing_fact("WKD", "class_cost")
        cost: Any = self.class_cost
        return wkd_logit_terms(
            student,
            teacher,
            target,
            cost,
            self.temperature,
            self.smoothing,
            self.rounds,
            self.largest,
        )


def _check(node: Any) -> None:
    """Refuse values of WKD's node that no weights make sense of."""
    positive = "TEMPERATURE LAMBDA ITERATIONS SHARPEN COST_IMAGES GRID WIDTH"
    for key in positive.split():
        require_positive(f"WKD.{key}", node[key])
    require_one_of("WKD.COST", node.COST, ("cka", "cka_feats", "fc"))
    require_one_of("WKD.PROJECTOR", node.PROJECTOR, PROJECTORS)


def _costs_of_outputs(outputs: Tensor, sharpen: float) -> Tensor:
    return class_costs(class_similarity(outputs), sharpen)
