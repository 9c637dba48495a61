"""The logit losses of 2024 and 2025 straight from their formulas, see `textbook.py`.

Classes are masked by large numbers, as the authors do it.
"""

import torch
import torch.nn.functional as F

TINY = 1e-30


def kl(q, p):
    """KL(q || p) of each sample, from probabilities."""
    return (q * ((q + TINY) / (p + TINY)).log()).sum(1)


def kd_rows(student, teacher, temperature):
    return kl(*(F.softmax(z / temperature, 1) for z in (teacher, student))) * temperature**2


def groups(logits, masks):
    """Probabilities of the groups of classes, [N, groups], and the softmax within each."""
    p = F.softmax(logits, 1)
    sums = torch.stack([(p * mask).sum(1) for mask in masks], 1)
    return sums, [F.softmax(logits - 1000.0 * ~mask, 1) for mask in masks]


def gdkd(student, teacher, weights, sizes, temperature):
    """GDKD for sizes (k,), GDKD3 for (1, k - 1); one weight for the sums and one for each group."""
    ranked = teacher.argsort(1, descending=True)
    masks, start = [], 0
    for size in (*sizes, teacher.shape[1] - sum(sizes)):
        mask = torch.zeros_like(teacher).bool()
        masks.append(mask.scatter(1, ranked[:, start : start + size], True))
        start += size
    (s_sums, s_in), (t_sums, t_in) = (groups(z / temperature, masks) for z in (student, teacher))
    terms = [kl(t_sums, s_sums), *(kl(t, s) for t, s in zip(t_in, s_in, strict=True))]
    rows = sum(weight * term for weight, term in zip(weights, terms, strict=True))
    return rows.mean() * temperature**2


def rld(student, teacher, target, alpha, beta, alpha_temperature, temperature):
    def pair(logits, column):
        own = F.softmax(logits / alpha_temperature, 1).gather(1, column)
        return torch.cat([own, 1 - own], 1)

    column = target[:, None]
    scd = kl(pair(teacher, teacher.argmax(1, keepdim=True)), pair(student, column)).mean()
    hidden = 1e9 * (teacher >= teacher.gather(1, column))
    t, s = (F.softmax(z / temperature - hidden, 1) for z in (teacher, student))
    mcd = kl(t, s).mean()
    return alpha * alpha_temperature**2 * scd + beta * temperature**2 * mcd


def crld(z_w, z_s, v_w, v_s, weights, temperature, tau_w, tau_s):
    in_weak = (F.softmax(v_w, 1).max(1)[0] >= tau_w).to(z_w)
    in_strong = (F.softmax(v_s, 1).max(1)[0] >= tau_s).to(z_w)
    within = kd_rows(z_w, v_w, temperature) + kd_rows(z_s, v_s, temperature)
    cross = kd_rows(z_s, v_w, temperature) + kd_rows(z_w, v_s, temperature)
    return weights[0] * (in_weak * within).mean() + weights[1] * (in_strong * cross).mean()


def normkd(student, teacher, temperature):
    t_s, t_t = (temperature * z.std(1, keepdim=True) for z in (student, teacher))
    rows = kl(F.softmax(teacher / t_t, 1), F.softmax(student / t_s, 1))
    return (rows * t_t[:, 0] ** 2).mean()


def swapped(teacher, target):
    """The teacher's logits, that of the label and the largest exchanged."""
    rows = torch.arange(len(teacher))
    best = teacher.argmax(1)
    changed = teacher.clone()
    changed[rows, best], changed[rows, target] = teacher[rows, target], teacher[rows, best]
    return changed


def softly_swapped(teacher, target, margin=0.05):
    rows, changed = torch.arange(len(teacher)), teacher.clone()
    wrong = teacher - 1e9 * F.one_hot(target, teacher.shape[1])
    rival = wrong.argmax(1)
    half = (teacher[rows, rival] - teacher[rows, target] + margin).clamp(min=0) / 2
    changed[rows, target] += half
    changed[rows, rival] -= half
    return changed


def rc(student, teacher, target, temperature, weight=0.1):
    own = F.one_hot(target, student.shape[1])
    lifted = (student + own * student.max(1, keepdim=True)[0]).detach()
    rows = kd_rows(student, teacher, temperature) + weight * kd_rows(student, lifted, temperature)
    return rows.mean()


def revision(student, teacher, target):
    right = teacher.argmax(1) == target
    p, q = F.softmax(student, 1), F.softmax(teacher, 1)
    own = F.one_hot(target, student.shape[1])
    b = (0.8 / (q.max(1)[0] - (q * own).sum(1) + 1))[:, None]
    easy = F.cross_entropy(student, target, reduction="none") + 4 * (student - teacher).pow(2).mean(
        1
    )
    hard = (p - (b * q + (1 - b) * own)).pow(2).mean(1)
    return (easy * right + hard * ~right).mean()


def split_kd(student, teacher, target, temperature):
    """KD's two terms, as DeepKD's code weights them, added up."""
    own = F.one_hot(target, student.shape[1]).bool()
    (s_binary, (_, s_rest)), (t_binary, (_, t_rest)) = (
        groups(logits / temperature, [own, ~own]) for logits in (student, teacher)
    )
    weight = t_binary[:, 1].mean()
    total = kl(t_binary, s_binary).mean() + weight * kl(t_rest, s_rest).mean()
    return total * temperature**2
