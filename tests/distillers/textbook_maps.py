"""SDD, CATKD, SIMKD and SEMCKD straight from their formulas, sample by sample, cell by cell."""

import torch


def softmax(z):
    e = (z - z.max()).exp()
    return e / e.sum()


def kd(z, v, temperature):
    p, q = softmax(z / temperature), softmax(v / temperature)
    return temperature**2 * (q * (q.log() - p.log())).sum()


def cell_mean(fmap, row, column, parts):
    """Mean over one of parts x parts cells of a map [D, H, W], H and W divisible by parts."""
    h, w = fmap.shape[1] // parts, fmap.shape[2] // parts
    return fmap[:, row * h : (row + 1) * h, column * w : (column + 1) * w].mean((1, 2))


def region_logits(fmap, weight, bias, scales):
    """Logits [N, C, R] of all cells of maps [N, D, H, W]."""
    return torch.stack(
        [
            torch.stack(
                [
                    weight @ cell_mean(one, row, column, parts) + bias
                    for parts in scales
                    for row in range(parts)
                    for column in range(parts)
                ],
                dim=1,
            )
            for one in fmap
        ]
    )


def sdd_kd(student, teacher, target, temperature, comp_weight=2.0, by_class=False):
    """SD-KD as coded: mean over samples and regions; student, teacher: [N, C, R]."""
    total, count = 0, 0
    for z, v, y in zip(student, teacher, target, strict=True):
        for r in range(z.shape[1]):
            here, whole = v[:, r].argmax(), v[:, 0].argmax()
            same = here == whole if by_class else (here == y) == (whole == y)
            total = total + (1 if same else comp_weight) * kd(z[:, r], v[:, r], temperature)
            count += 1
    return total / count


def batch_norm(x, weight, bias):
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    x = (x - mean[:, None, None]) / (var + 1e-5).sqrt()[:, None, None]
    return x * weight[:, None, None] + bias[:, None, None]


def transfer(x, weights):
    """SimKD's g in training mode: weights of three convolutions, each with those of its norm."""
    for conv, scale, shift in weights:
        x = torch.nn.functional.conv2d(x, conv, padding=conv.shape[2] // 2)
        x = batch_norm(x, scale, shift).clamp(min=0)
    return x


def semckd_attention(student, teacher, queries, keys, soft):
    """a [N, S, K]; queries and keys: for each stage weight, bias, weight, bias of its MLP."""

    def embed(fmap, net):
        rows = fmap.flatten(1) @ fmap.flatten(1).T
        hidden = (rows @ net[0].T + net[1]).clamp(min=0)
        out = hidden @ net[2].T + net[3]
        return out / out.norm(dim=1, keepdim=True)

    q = [embed(fmap, net) for fmap, net in zip(student, queries, strict=True)]
    k = [embed(fmap, net) for fmap, net in zip(teacher, keys, strict=True)]
    return torch.stack(
        [
            torch.stack([softmax(torch.stack([a[n] @ b[n] for b in k]) / soft) for a in q])
            for n in range(len(student[0]))
        ]
    )
