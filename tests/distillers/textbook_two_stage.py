"""AB, FT, FSP and the Zoo's AT as their formulas stand, without care for cost, in float64."""

import torch
from textbook import same_size


def ab(students, teachers, margin, form):
    stages = []
    for student, teacher in zip(students, teachers, strict=True):
        wrong = (student + margin) ** 2 * ((student > -margin) & (teacher <= 0))
        wrong = wrong + (student - margin) ** 2 * ((student <= margin) & (teacher > 0))
        stages.append(wrong)
    if form == "mean":
        return sum(stage.mean() for stage in stages) / len(stages)
    last = len(stages) - 1
    return sum(
        stage.sum() * 2.0 ** (i - last) * 3 / (1000 * len(stage)) for i, stage in enumerate(stages)
    )


def fsp(students, teachers, form):
    def matrix(first, second):
        first, second = same_size(first, second)
        height, width = first.shape[2:]
        total = 0
        for i in range(height):
            for j in range(width):
                total = total + first[:, :, None, i, j] * second[:, None, :, i, j]
        return total / (height * width)

    terms = []
    for i in range(len(students) - 1):
        difference = matrix(*students[i : i + 2]) - matrix(*teachers[i : i + 2])
        terms.append((difference**2).mean())
    return sum(terms) / (len(terms) if form == "mean" else 1)


def ft(student, teacher, p, form):
    student, teacher = same_size(student, teacher)

    def normalised(factor):
        rows = (factor**2).mean(1).flatten(1) if form == "attention" else factor.flatten(1)
        return rows / rows.norm(dim=1, keepdim=True)

    return ((normalised(student) - normalised(teacher)).abs() ** p).mean()


def at_mean(students, teachers, p=2):
    def attention(feature):
        rows = (feature.abs() ** p).sum(1).flatten(1)
        return rows / ((rows**2).sum(1, keepdim=True).sqrt() + 1e-6)

    losses = []
    for student, teacher in zip(students, teachers, strict=True):
        student, teacher = same_size(student, teacher)
        losses.append(((attention(student) - attention(teacher)) ** 2).mean())
    return torch.stack(losses).mean()
