"""ABKD, LDRLD, WKD and the split of KD straight from their formulas, without care for cost.

What the library's forms are tested against in float64, and the baseline of their timings.
"""

import math

import torch
import torch.nn.functional as F


def ab(p, q, alpha, beta):
    """Between probabilities of teacher and student: mean over samples."""
    if alpha == beta == 0:
        rows = (q.log() - p.log()) ** 2 / 2
    elif alpha == 0:
        rows = (q**beta * (q**beta / p**beta).log() - q**beta + p**beta) / beta**2
    elif beta == 0:
        rows = (p**alpha * (p**alpha / q**alpha).log() - p**alpha + q**alpha) / alpha**2
    elif alpha + beta == 0:
        rows = ((q**alpha / p**alpha).log() + p**alpha / q**alpha - 1) / alpha**2
    else:
        s = alpha + beta
        rows = p**alpha * q**beta - alpha / s * p**s - beta / s * q**s
        rows = -rows / (alpha * beta)
    return rows.sum(1).mean()


def ab_kd(student, teacher, temperature, alpha, beta):
    q, p = (F.softmax(z / temperature, 1) for z in (student, teacher))
    return ab(p, q, alpha, beta) * temperature**2


def ldrld(student, teacher, topk, temperature, alpha, beta):
    """Pair by pair."""

    def over(classes):
        q, p = (F.softmax(z.gather(1, classes) / temperature, 1) for z in (student, teacher))
        return (p * (p / q).log()).sum(1).mean()

    order = student.detach().argsort(dim=1, descending=True)
    total = over(order[:, :topk])
    for i in range(1, topk + 1):
        for j in range(i + 1, topk + 1):
            weight = 2 * math.exp(-0.05 * (i + j)) / (1.5 + abs(i - j))
            total = total + weight * over(order[:, [i - 1, j - 1]])
    local = total / (topk * (topk - 1) / 2 + 1)
    return temperature**2 * (alpha * local + beta * over(order[:, topk:]))


def wkd_logits(student, teacher, target, cost, temperature, smoothing, rounds, weight, tiny=0.0):
    """Every sample with a cost matrix of its own, from which its target is left out."""
    count, classes = student.shape
    p, q = F.softmax(student, 1), F.softmax(teacher, 1)
    rows = torch.arange(count, device=student.device)
    own = -(q[rows, target] * p[rows, target].log()).mean()
    keep = ~F.one_hot(target, classes).bool()
    kept = (count, classes - 1)
    both = keep[:, :, None] & keep[:, None, :]
    costs = cost.expand(count, classes, classes)[both].view(*kept, classes - 1)
    p, q = (F.softmax(z[keep].view(kept) / temperature, 1) for z in (student, teacher))
    kernel = (-costs / smoothing).exp()
    u = torch.full_like(p, 1 / (classes - 1))[:, :, None]
    for _ in range(rounds):
        v = q[:, :, None] / (kernel.mT @ u + tiny)
        u = p[:, :, None] / (kernel @ v + tiny)
    flow = u * kernel * v.mT
    return own + weight * (flow * costs).sum((1, 2)).mean()


def wkd_maps(student, teacher, grid, ratio):
    """Cell by cell; sides are multiples of `grid`."""

    def statistics(x, i, j):
        side = x.shape[2] // grid
        cell = x[:, :, i * side : (i + 1) * side, j * side : (j + 1) * side].flatten(2)
        return cell.mean(2), (cell.var(2, unbiased=True) + 1e-5).sqrt()

    total = 0
    for i in range(grid):
        for j in range(grid):
            (mean_s, std_s), (mean_t, std_t) = (statistics(x, i, j) for x in (student, teacher))
            total = total + ratio * ((mean_s - mean_t) ** 2).sum() + ((std_s - std_t) ** 2).sum()
    return total / (len(student) * grid**2)


def similarity(outputs):
    """Linear CKA of every two classes' outputs [C, M, D], one pair at a time."""
    made = torch.empty(len(outputs), len(outputs), dtype=outputs.dtype)
    centred = outputs - outputs.mean(1, keepdim=True)
    for c, x in enumerate(centred):
        for d, y in enumerate(centred):
            made[c, d] = (y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())
    return made


def split(student, teacher, target, temperature, topk=0):
    """TCKD and NCKD of each sample, with T², and the teacher's probability of the label."""
    tckd, nckd, own = [], [], []
    for z, v, y in zip(student / temperature, teacher / temperature, target.tolist(), strict=True):
        p, q = z.softmax(0), v.softmax(0)
        chosen = v.argsort(descending=True)[: topk or len(v)].tolist()
        others = [c for c in chosen if c != y]
        r, s = z[others].softmax(0), v[others].softmax(0)
        binary = q[y] * (q[y] / p[y]).log() + (1 - q[y]) * ((1 - q[y]) / (1 - p[y])).log()
        tckd.append(temperature**2 * binary)
        nckd.append(temperature**2 * (s * (s / r).log()).sum())
        own.append(q[y])
    return torch.stack(tckd), torch.stack(nckd), torch.stack(own)
