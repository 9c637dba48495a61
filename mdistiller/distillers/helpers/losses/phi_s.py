"""PHI-S: rotate vectors so that all dimensions have the same variance, and scale that to 1.

Ranzinger et al.: PHI-S: Distribution Balancing for Label-Free Multi-Teacher Distillation, arXiv
2410.01680. With mean m and covariance U diag(l) U^T of vectors of width D:

    y = H U^T (x - m) / sqrt(mean of l),  H orthogonal with all H_ij^2 = 1 / D

H (Hadamard) gives each dimension the variance sum_j l_j / D. Unlike division by standard deviations
this keeps angles and the ratios of lengths. Widths for which no H is constructed here (it takes
D = 2^k, 2^k (q + 1) or 2^k 2 (q + 1) with a prime q) get another rotation to equal variances; that
is ours.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def phi_s(rows: Tensor) -> Tensor:
    """The standardisation of vectors like `rows` [N, D], as [D + 1, D]: m, then the matrix A.

    y = (x - m) A; see :func:`standardized`. Constant rows give A = 0.
    """
    x = rows.double()
    mean = x.mean(dim=0)
    x = x - mean
    variances, basis = torch.linalg.eigh(x.T @ x / len(x))
    variances = variances.clamp(min=0)
    rotation = hadamard(len(variances))
    if rotation is None:
        rotation = equalizing_rotation(variances)
    scale = variances.mean().sqrt()
    factor = 0.0 if scale <= 1e-12 * mean.abs().max() else 1 / scale
    matrix = basis @ rotation.to(basis).T * factor
    return torch.cat([mean[None], matrix]).to(rows.dtype)


def standardized(vectors: Tensor, standard: Tensor) -> Tensor:
    """Vectors [..., D] by a standardisation of :func:`phi_s`."""
    return (vectors - standard[0]) @ standard[1:]


def hadamard(size: int) -> Tensor | None:
    """An orthogonal matrix of entries +-1 / sqrt(size), float64; None where none is constructed.

    By Sylvester's doubling and both of Paley's constructions over primes.
    """
    signs = _signs(size)
    return None if signs is None else signs / math.sqrt(size)


def _signs(size: int) -> Tensor | None:
    if size == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    half = _signs(size // 2) if size % 2 == 0 else None
    if half is not None:
        return torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), half)
    if size % 4 == 0 and _is_prime(size - 1) and (size - 1) % 4 == 3:
        core = _paley_core(size - 1)
        core[1:, 0] = -1
        return core + torch.eye(size, dtype=torch.float64)
    if size % 4 == 0 and _is_prime(size // 2 - 1) and (size // 2 - 1) % 4 == 1:
        core = _paley_core(size // 2 - 1)
        both = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(core, both) + torch.kron(torch.eye(size // 2).double(), diagonal)
    return None


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % k for k in range(2, math.isqrt(number) + 1))


def _paley_core(prime: int) -> Tensor:
    """[[0, 1], [1, Q]] with Q_ij = 1 if i - j is a square modulo the prime, 0 on the diagonal, -1
    otherwise."""
    character = torch.full((prime,), -1.0, dtype=torch.float64)
    character[[k * k % prime for k in range(1, prime)]] = 1
    character[0] = 0
    places = torch.arange(prime)
    core = torch.ones(prime + 1, prime + 1, dtype=torch.float64)
    core[0, 0] = 0
    core[1:, 1:] = character[(places[:, None] - places) % prime]
    return core


def equalizing_rotation(variances: Tensor) -> Tensor:
    """A rotation R such that R diag(variances) R^T has a constant diagonal; float64 [D, D].

    Each step turns the plane of the smallest and the largest variance left until one of them is the
    mean.
    """
    rotation = torch.eye(len(variances), dtype=torch.float64)
    left = dict(enumerate(variances.double().tolist()))
    mean = sum(left.values()) / len(left)
    while len(left) > 1:
        low = min(left, key=left.__getitem__)
        small = left.pop(low)
        high = max(left, key=left.__getitem__)
        large = left[high]
        part = (mean - small) / (large - small) if large > small else 0.0
        sine, cosine = math.sqrt(max(part, 0.0)), math.sqrt(max(1 - part, 0.0))
        first, second = rotation[low].clone(), rotation[high].clone()
        rotation[low], rotation[high] = (
            cosine * first + sine * second,
            cosine * second - sine * first,
        )
        left[high] = small + large - mean
    return rotation
