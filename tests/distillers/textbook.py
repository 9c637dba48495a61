"""Losses straight from their formulas, in plain tensor operations without any care for cost.

What the library's forms are tested against, and the baseline of their timings. Features have no
degenerate rows here.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

TINY = 1e-12


def kd(student, teacher, temperature):
    p, q = (F.softmax(z / temperature, 1) for z in (student, teacher))
    return (q * (q / p).log()).sum(1).mean() * temperature**2


def dkd(student, teacher, target, alpha, beta, temperature):
    own = F.one_hot(target, student.shape[1]).bool()

    def split(logits):
        p = F.softmax(logits / temperature, 1)
        binary = torch.stack([(p * own).sum(1), (p * ~own).sum(1)], 1)
        return binary, F.softmax(logits / temperature - 1000.0 * own, 1)

    (s_binary, s_rest), (t_binary, t_rest) = split(student), split(teacher)
    tckd = F.kl_div(s_binary.log(), t_binary, reduction="batchmean")
    nckd = F.kl_div((s_rest + 1e-30).log(), t_rest, reduction="batchmean")
    return (alpha * tckd + beta * nckd) * temperature**2


def same_size(student, teacher):
    low = min(student.shape[2], teacher.shape[2])
    return F.adaptive_avg_pool2d(student, low), F.adaptive_avg_pool2d(teacher, low)


def at(students, teachers, p=2):
    def attention(feature):
        flat = feature.pow(p).mean(1).flatten(1)
        return flat / flat.norm(dim=1, keepdim=True)

    total = 0
    for student, teacher in zip(students, teachers, strict=True):
        student, teacher = same_size(student, teacher)
        total = total + (attention(student) - attention(teacher)).pow(2).mean()
    return total


def nst(students, teachers):
    def kernel(a, b):  # [N, C, 1, HW] against [N, 1, D, HW]
        return ((a[:, :, None] * b[:, None]).sum(-1) ** 2).mean()

    total = 0
    for student, teacher in zip(students, teachers, strict=True):
        student, teacher = same_size(student, teacher)
        s, t = F.normalize(student.flatten(2), dim=2), F.normalize(teacher.flatten(2), dim=2)
        total = total + kernel(t, t) + kernel(s, s) - 2 * kernel(s, t)
    return total


def pkt(student, teacher, eps=1e-7):
    def probabilities(x):
        x = x / (x.norm(dim=1, keepdim=True) + eps)
        similarity = (x @ x.T + 1) / 2
        return similarity / similarity.sum(1, keepdim=True)

    p, q = probabilities(student), probabilities(teacher)
    return (q * ((q + eps) / (p + eps)).log()).mean()


def sp(student, teacher):
    def similarity(x):
        x = x.flatten(1)
        return F.normalize(x @ x.T, dim=1)

    count = len(student)
    return (similarity(teacher) - similarity(student)).pow(2).sum() / count**2


def rkd(student, teacher, distance_weight=25, angle_weight=50, squared=False):
    def distances(x):
        count = len(x)
        squares = (x[:, None] - x[None]).pow(2).sum(-1) + torch.eye(count, dtype=x.dtype)
        d = squares if squared else squares.sqrt()
        d = d * (1 - torch.eye(count, dtype=x.dtype))
        return d / (d.sum() / (count * count - count))

    def angles(x):
        directions = F.normalize(x[None] - x[:, None], dim=2, eps=TINY)
        return directions @ directions.mT

    distance = F.smooth_l1_loss(distances(student), distances(teacher))
    angle = F.smooth_l1_loss(angles(student), angles(teacher))
    return distance_weight * distance + angle_weight * angle


def kdsvd(students, teachers, k=1, canonical=False):
    vectors = []
    for student, teacher in zip(students, teachers, strict=True):
        s = torch.linalg.svd(student.flatten(1, 2), full_matrices=False)[2].mT
        _, values, t = torch.linalg.svd(teacher.flatten(1, 2), full_matrices=False)
        t, scale = t.mT[:, :, :k], F.normalize(values[:, None, :k], dim=2)
        if canonical:
            t = t * torch.where(t.sum(1, keepdim=True) < 0, -1, 1)
        s = s[:, :, : k + 3]
        cosine = s.mT @ t
        largest = cosine.abs() == cosine.abs().max(1, keepdim=True).values
        vectors.append((s @ (cosine.sign() * largest) * scale, t * scale))
    total = 0
    for i in range(1, len(vectors)):
        s, t = (
            (-(vectors[i][n][:, :, None] - vectors[i - 1][n][:, None]).pow(2) / 8).exp()
            for n in (0, 1)
        )
        total = total + (s - t).pow(2).sum()
    return total / len(students[0])


def logits(student, teacher):
    return (student - teacher).pow(2).sum() / student.numel()


def cc_neighbour(student, teacher):
    total = 0
    for i in range(len(student) - 1):
        here, following = (student[j] - teacher[j] for j in (i, i + 1))
        total = total + (here.abs() * following.abs()).sum()
    return total / (len(student) - 1)


def cc_kernel(student, teacher, gamma=0.4, order=2):
    def matrix(x):
        x = F.normalize(x, dim=1)
        return sum(
            math.exp(-2 * gamma) * (2 * gamma) ** q / math.factorial(q) * (x @ x.T) ** q
            for q in range(order + 1)
        )

    return (matrix(student) - matrix(teacher)).pow(2).mean()


def vid(regressor, student, teacher, log_scale, eps):
    student, teacher = same_size(student, teacher)
    mean = regressor(student)
    variance = (torch.log(1 + torch.exp(log_scale)) + eps)[None, :, None, None].expand_as(mean)
    return (0.5 * ((mean - teacher) ** 2 / variance + torch.log(variance))).mean()


def ofd(student, teacher, margin):
    """The three cases of the partial distance as masks."""
    low = margin[None, :, None, None]
    target = torch.max(teacher, low)
    square = (student - target) ** 2
    mask = ((student > target) | (target > 0)).to(square.dtype)
    return (square * mask).sum() / len(student)


def hcl(student, teacher):
    total, weights, weight = ((student - teacher) ** 2).mean(), 1.0, 1.0
    for side in (4, 2, 1):
        if side < student.shape[2]:
            weight /= 2
            small = F.adaptive_avg_pool2d(student, side) - F.adaptive_avg_pool2d(teacher, side)
            total = total + weight * (small**2).mean()
            weights += weight
    return total / weights


def rivals_by_class(classes):
    """For each class the numbers of all images of other classes."""
    return [np.flatnonzero(classes != c) for c in range(classes.max() + 1)]


class CRDStep(torch.nn.Module):
    """A training step as published: numpy draws negatives sample by sample, rows are gathered."""

    def __init__(self, num_data, dim, k, temperature, momentum, rivals):
        super().__init__()
        self.k, self.temperature, self.momentum, self.rivals = k, temperature, momentum, rivals
        bound = math.sqrt(3 / dim)
        self.z = [None, None]
        for name in ("memory_s", "memory_t"):
            self.register_buffer(name, torch.empty(num_data, dim).uniform_(-bound, bound))

    def forward(self, student, teacher, index, classes):
        picks = [
            np.hstack([[i], np.random.choice(self.rivals[c], self.k, replace=False)])
            for i, c in zip(index.tolist(), classes[index].tolist(), strict=True)
        ]
        contrast = torch.from_numpy(np.stack(picks)).to(student.device)
        loss = self.side(0, student, self.memory_t, contrast)
        loss = loss + self.side(1, teacher, self.memory_s, contrast)
        with torch.no_grad():
            for memory, rows in ((self.memory_s, student), (self.memory_t, teacher)):
                moved = self.momentum * memory[index] + (1 - self.momentum) * rows
                memory[index] = F.normalize(moved)
        return loss

    def side(self, which, v, memory, contrast):
        count, num_data = contrast.shape[0], len(memory)
        rows = memory.index_select(0, contrast.flatten()).view(count, self.k + 1, -1)
        scores = torch.exp(torch.bmm(rows, v[:, :, None])[:, :, 0] / self.temperature)
        if self.z[which] is None:
            self.z[which] = scores.detach().mean() * num_data
        p, noise = scores / self.z[which], self.k / num_data
        positive = torch.log(p[:, 0] / (p[:, 0] + noise + 1e-7)).sum()
        negative = torch.log(noise / (p[:, 1:] + noise + 1e-7)).sum()
        return -(positive + negative) / count
