"""Feature losses written as their papers state them: slow, in float64, from scalars where it helps.

Independent of the package: what the tests compare its forms with.
"""

import math

import torch
import torch.nn.functional as F


def fitnet(hint, teacher):
    return (hint - teacher).pow(2).sum() / hint.numel()


def vid(mean, teacher, log_scale, eps):
    """Gaussian negative log-likelihood without constants, element by element."""
    total = 0.0
    for c in range(mean.shape[1]):
        variance = torch.log(1 + torch.exp(log_scale[c])) + eps
        error = (mean[:, c] - teacher[:, c]) ** 2
        total = total + (error / (2 * variance) + torch.log(variance) / 2).sum()
    return total / mean.numel()


def margin(weight, bias):
    """Mean of the negative part of a normal variable, by numeric integration."""
    std = abs(weight)
    x = torch.linspace(bias - 12 * std, min(0.0, bias + 12 * std), 2_000_001, dtype=torch.float64)
    if 0.5 * math.erfc(bias / std / math.sqrt(2)) <= 0.001:
        return -3 * std
    density = torch.exp(-0.5 * ((x - bias) / std) ** 2)
    return (torch.trapezoid(x * density, x) / torch.trapezoid(density, x)).item()


def ofd(student, teacher, margins):
    """The three cases of the partial distance, element by element."""
    total = 0.0
    for n in range(student.shape[0]):
        for c in range(student.shape[1]):
            for s, t in zip(student[n, c].flatten(), teacher[n, c].flatten(), strict=True):
                m = margins[c]
                if t > 0 or (m < t and s > t):
                    total = total + (s - t) ** 2
                elif t <= m and s > m:
                    total = total + (s - m) ** 2
    return total / student.shape[0]


def hcl(student, teacher):
    def at(side):
        mse = F.adaptive_avg_pool2d(student, side) - F.adaptive_avg_pool2d(teacher, side)
        return (mse**2).mean()

    height = student.shape[2]
    parts = [(1.0, height)] + [
        (weight, side)
        for weight, side in zip(
            (0.5, 0.25, 0.125), [s for s in (4, 2, 1) if s < height], strict=False
        )
    ]
    return sum(w * at(side) for w, side in parts) / sum(w for w, _ in parts)


def review(weights, features, sizes):
    """Outputs shallow to deep; weights, features, sizes deep to shallow, batch norms fresh."""

    def conv_norm(x, weight, padding=0):
        x = F.conv2d(x, weight, padding=padding)
        mean = x.mean((0, 2, 3), keepdim=True)
        return (x - mean) / (x.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()

    outputs, residual = [], None
    for block, feature, size in zip(weights, features, sizes, strict=True):
        x = conv_norm(feature, block["conv1"])
        if residual is not None:
            residual = F.interpolate(residual, x.shape[2:])
            both = torch.cat([x, residual], 1)
            gates = torch.sigmoid(F.conv2d(both, block["gate"], block["gate_bias"]))
            x = x * gates[:, :1] + residual * gates[:, 1:]
        x = residual = F.interpolate(x, size)
        outputs.insert(0, conv_norm(x, block["conv2"], padding=1))
    return outputs


def crd_side(v, memory, contrast, temperature, z, num_data, eps=1e-7):
    """One side from probabilities, pair by pair; z None: from this batch. Returns (loss, z)."""
    pairs = torch.stack(
        [
            torch.stack([torch.exp(row @ memory[j] / temperature) for j in picks])
            for row, picks in zip(v, contrast, strict=True)
        ]
    )
    z = pairs.detach().mean() * num_data if z is None else z
    p, noise = pairs / z, (contrast.shape[1] - 1) / num_data
    positive = torch.log(p[:, 0] / (p[:, 0] + noise + eps))
    negative = torch.log(noise / (p[:, 1:] + noise + eps)).sum(1)
    return -(positive + negative).mean(), z
