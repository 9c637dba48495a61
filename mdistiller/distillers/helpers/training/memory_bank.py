"""Memories of the training images: the bank of embeddings that CRD contrasts with."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mdistiller.distillers.helpers.losses.numerics import unit
from mdistiller.distillers.helpers.training.gather import gather_batch

DENSE_BANK = 2**18
"""Banks up to this number of rows are multiplied whole, and the scores gathered from the product;
from larger ones the contrasted rows are copied first (2 N (K + 1) d numbers instead of N n)."""


def last_occurrence(index: Tensor, size: int) -> Tensor:
    """For each entry of `index` [N], values below `size`: where its value occurs last, [N]."""
    order = torch.arange(len(index), device=index.device)
    return order.new_zeros(size).scatter_reduce_(0, index, order, "amax")[index]


class Bank(nn.Module):
    """An embedding of every training image by student (`memory_v1`) and teacher (`memory_v2`).

    The same in every process. `params` holds [K, temperature, Z_student, Z_teacher, momentum] as
    in the original library; Z is -1 until the first batch sets it, for good.
    """

    params: Tensor
    memory_v1: Tensor
    memory_v2: Tensor

    def __init__(self, num_data: int, dim: int, k: int, temperature: float, momentum: float):
        super().__init__()
        self.register_buffer("params", torch.tensor([k, temperature, -1.0, -1.0, momentum]))
        for name in ("memory_v1", "memory_v2"):
            bound = math.sqrt(3 / dim)
            self.register_buffer(name, torch.empty(num_data, dim).uniform_(-bound, bound))
        self._z_is_set: bool | None = False

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[arg-type]
        self._z_is_set = None  # read once from `params`

    def forward(self, student: Tensor, teacher: Tensor, contrast: Tensor) -> tuple[Tensor, Tensor]:
        """Scores log(exp(v . m / temperature) / Z) of both embeddings, [N, K + 1] each.

        Each is compared with the memory of the other network.

        Args:
            student, teacher: unit embeddings, [N, d].
            contrast: rows of the bank, [N, K + 1].
        """
        temperature = self.params[1].clone()  # `params` is written to below
        scores = (
            self.products(student / temperature, self.memory_v2, contrast),
            self.products(teacher / temperature, self.memory_v1, contrast),
        )
        if self._z_is_set is None:
            self._z_is_set = bool((self.params[2:4] > 0).all())
        if not self._z_is_set:
            self.set_z(*scores)
        log_z = self.params[2:4].log()
        return scores[0] - log_z[0], scores[1] - log_z[1]

    @staticmethod
    def products(v: Tensor, memory: Tensor, contrast: Tensor) -> Tensor:
        """v_i . memory[contrast_ik], [N, K + 1]. The memory may be written to afterwards."""
        if len(memory) <= DENSE_BANK:
            return (v @ memory.clone().t()).gather(1, contrast)
        return torch.einsum("nd,nkd->nk", v, memory[contrast])

    @torch.no_grad()
    def set_z(self, student: Tensor, teacher: Tensor) -> None:
        """Z = number of rows * mean of exp(score) over the batches of all processes."""
        sums = [scores.flatten().logsumexp(0) for scores in (student, teacher)]
        count = torch.full_like(sums[0], student.numel()).log()
        (parts,) = gather_batch(torch.stack([*sums, count])[None])
        parts = parts.logsumexp(0)
        log_z = math.log(len(self.memory_v1)) + parts[:2] - parts[2]
        self.params[2:4] = log_z.clamp(-80, 80).exp()
        self._z_is_set = True

    @torch.no_grad()
    def update(self, index: Tensor, student: Tensor, teacher: Tensor) -> None:
        """Move the rows of a batch towards its embeddings, over all processes.

        If an image occurs twice, its last embedding counts.
        """
        index, student, teacher = gather_batch(index, student.detach(), teacher.detach())
        last = last_occurrence(index, len(self.memory_v1))
        momentum = self.params[4]
        for memory, rows in ((self.memory_v1, student), (self.memory_v2, teacher)):
            rows = rows.to(memory.dtype)[last]
            memory[index] = unit(torch.lerp(rows, memory[index], momentum))
