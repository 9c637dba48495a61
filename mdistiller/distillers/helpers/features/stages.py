"""Which stage of the student learns from which of the teacher, and at what map size."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from mdistiller.distillers.helpers.features.output import Output
from mdistiller.distillers.helpers.features.shapes import require_maps
from mdistiller.distillers.helpers.training.settings import require_one_of
from mdistiller.registry import UserError

FORMS = ("sum", "mean")
"""How a loss over stages is reduced, where a method offers both."""


def pair_by_height(student: Sequence[int], teacher: Sequence[int]) -> list[tuple[int, int]]:
    """Indices (student stage, teacher stage) that belong together, from shallow to deep.

    Networks with equally many stages are paired in order, as in the original library. Otherwise
    every stage of the shorter list gets a partner of its own in the longer one, in the same order,
    such that heights agree best: the sum over pairs of |log(student height / teacher height)| is
    smallest, and of equally good choices the shallowest is taken. The other stages of the longer
    list have no partner and no part in the loss: those of heights 32, 16, 8, 4 against 28, 14, 7
    are joined 32-28, 16-14, 8-7, and 4 is left over. :func:`paired_stages` says which.

    Args:
        student, teacher: heights of the stages' maps from shallow to deep, stem excluded.
    """
    if not student or not teacher:
        raise UserError("this method needs the features of at least one stage after the stem")
    short, long = sorted((student, teacher), key=len)

    def mismatch(chosen: tuple[int, ...]) -> float:
        ratios = (short[i] / long[j] for i, j in enumerate(chosen))
        return round(sum(abs(math.log(ratio)) for ratio in ratios), 9)

    partners = min(itertools.combinations(range(len(long)), len(short)), key=mismatch)
    pairs = enumerate(partners)
    return list(pairs) if len(student) <= len(teacher) else [(j, i) for i, j in pairs]


def pair_stages(student: Sequence[int], teacher: Sequence[int]) -> list[tuple[int, int]]:
    """:func:`pair_by_height`, with a warning that names the stages left over."""
    pairs = pair_by_height(student, teacher)
    warn_left_over(len(student), len(teacher), pairs)
    return pairs


def warn_left_over(student: int, teacher: int, pairs: Sequence[tuple[int, int]]) -> None:
    """Warn of stages in no pair; the arguments are numbers of stages, and pairs of indices."""
    for name, count, side in (("student", student, 0), ("teacher", teacher, 1)):
        unused = {i + 1 for i in range(count)} - {pair[side] + 1 for pair in pairs}
        if unused:
            warnings.warn(
                f"student and teacher have {student} and {teacher} stages; left over, "
                f"without part in the loss: {name} stage {', '.join(map(str, sorted(unused)))}",
                stacklevel=4,
            )


def paired_stages(student: Output, teacher: Output) -> tuple[list[Tensor], list[Tensor]]:
    """The stage outputs of both networks that belong together; warns of stages left over.

    Returns:
        Two equally long lists of maps [N, C, H, W] in full precision, stem excluded.
    """
    s_maps, t_maps = student["feats"][1:], teacher["feats"][1:]
    require_maps("feats", [stage.shape for stage in (*s_maps, *t_maps)])
    pairs = pair_stages([f.shape[2] for f in s_maps], [f.shape[2] for f in t_maps])
    return [s_maps[i] for i, _ in pairs], [t_maps[j] for _, j in pairs]


def match_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Two maps [N, C, H, W] average-pooled to the smaller of their heights and widths."""
    height, width = (min(sides) for sides in zip(student.shape[2:], teacher.shape[2:], strict=True))
    first, second = (
        stage
        if tuple(stage.shape[2:]) == (height, width)
        else F.adaptive_avg_pool2d(stage, (height, width))
        for stage in (student, teacher)
    )
    return first, second


def reduce_stages(losses: Sequence[Tensor], form: str) -> Tensor:
    """Sum or mean of the losses of the stages, a scalar; `form` is one of FORMS."""
    require_one_of("form", form, FORMS)
    total = sum(losses[1:], losses[0])
    return total / len(losses) if form == "mean" else total
