"""Measures of predictions and features against torchmetrics, scipy, and their textbook formulas."""

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.special
import scipy.stats
import torch
from torchmetrics import functional as tm

from mdistiller.evaluation import draw, maps, samples
from mdistiller.evaluation.features import Cka, CollapseSums, Hsic, pool
from mdistiller.evaluation.predictions import ComparisonSums, QualitySums
from mdistiller.registry import UserError

CPU = torch.device("cpu")


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def labels(count, classes, seed=0):
    return torch.randint(classes, (count,), generator=torch.Generator().manual_seed(seed))


def fill(sums, *tensors, batch=37):
    """Add in batches, the last of them smaller."""
    for parts in zip(*(t.split(batch) for t in tensors), strict=True):
        sums.add(*parts)
    return sums


def quality(logits, target):
    return fill(QualitySums(logits.shape[1], CPU), logits, target).result()


@pytest.mark.parametrize(("scale", "classes"), [(0.3, 10), (3.0, 10), (40.0, 7), (1.0, 3)])
def test_quality_agrees_with_torchmetrics(scale, classes):
    logits, target = scale * drawn(500, classes).float(), labels(500, classes)
    found, probs = quality(logits, target), logits.softmax(dim=1)
    many = {"num_classes": classes}
    five = tm.accuracy(logits, target, "multiclass", top_k=min(5, classes), average="micro", **many)
    ece = tm.calibration_error(probs, target, "multiclass", n_bins=15, norm="l1", **many)
    per_class = tm.accuracy(logits, target, "multiclass", average="none", **many)
    confusion = tm.confusion_matrix(logits, target, "multiclass", **many)
    assert found.confusion == confusion.tolist()
    assert found.images == 500
    assert found.top5 == pytest.approx(100 * five.item(), abs=1e-4)
    assert found.ece == pytest.approx(100 * ece.item(), abs=1e-4)
    assert found.class_accuracy == pytest.approx((100 * per_class).tolist(), abs=1e-4)
    assert found.top1 == pytest.approx(100 * np.trace(found.confusion) / 500)
    log_probs = scipy.special.log_softmax(logits.double().numpy(), axis=1)
    assert found.nll == pytest.approx(-log_probs[range(500), target].mean(), rel=1e-12)


def test_certainty_is_in_the_last_bin():
    """torchmetrics has a bin of its own for a confidence of exactly 1, and says 12.35 here."""
    logits = torch.tensor([[200.0, 0.0]] * 200 + [[3.0, 0.0]] * 200)
    target = torch.tensor([0] * 160 + [1] * 40 + [0] * 200)
    gap = (200 + 200 / (1 + math.exp(-3)) - 360) / 400
    assert quality(logits, target).ece == pytest.approx(100 * gap, abs=1e-4)


def test_quality_by_hand():
    # confidences 0.75 and 0.5 of two classes: bins of their own; right, wrong and right, right
    sure, even = [math.log(3.0), 0.0], [1e-3, 0.0]
    logits, target = torch.tensor([sure, sure, even, even]), torch.tensor([0, 1, 0, 0])
    found = quality(logits, target)
    half = 1 / (1 + math.exp(-1e-3))
    assert found.ece == pytest.approx(100 * (2 * abs(0.5 - 0.75) + 2 * (1 - half)) / 4, abs=1e-5)
    assert found.confusion == [[3, 0], [1, 0]]
    assert found.class_accuracy == [100.0, 0.0]
    certain = quality(torch.tensor([[200.0, 0.0]]), torch.tensor([0]))  # confidence 1 is in a bin
    assert (certain.top1, certain.ece, certain.nll) == (100.0, 0.0, 0.0)
    assert math.isnan(certain.class_accuracy[1])


def compare(student, teacher, target):
    return fill(ComparisonSums(CPU), student, teacher, target).result()


def test_what_says_nan_has_no_accuracy():
    logits = torch.zeros(4, 5)
    logits[1] = float("nan")
    found = quality(logits, torch.tensor([0, 0, 1, 2]))
    assert all(map(math.isnan, (found.top1, found.top5, found.nll, found.ece)))


def test_comparison_agrees_with_scipy():
    student, teacher, target = drawn(300, 6), 2 * drawn(300, 6, seed=1), labels(300, 6)
    found = compare(student, teacher, target)
    p, q = (logits.softmax(dim=1).numpy() for logits in (teacher, student))
    assert found.kl == pytest.approx(scipy.stats.entropy(p, q, axis=1).mean(), rel=1e-12)
    same = student.argmax(dim=1) == teacher.argmax(dim=1)
    assert found.agreement == pytest.approx(100 * same.double().mean().item())
    right = [
        (logits.argmax(dim=1) == target).double().mean().item() for logits in (teacher, student)
    ]
    assert found.gap == pytest.approx(100 * (right[0] - right[1]))


def test_who_is_right_by_hand():
    says = torch.tensor([0, 1, 0, 1, 2, 1, 1, 1])
    said = torch.tensor([0, 0, 1, 1, 1, 1, 1, 0])
    target = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1])
    student, teacher = (torch.nn.functional.one_hot(k, 3).double() for k in (says, said))
    found = compare(student, teacher, target)
    eighths = [2, 1, 2, 2, 1]
    names = ("both_right", "only_teacher", "only_student", "both_wrong_same", "both_wrong_other")
    assert [getattr(found, name) for name in names] == [12.5 * n for n in eighths]
    assert (found.agreement, found.gap) == (50.0, -12.5)


def test_a_copy_agrees_in_all_and_kl_is_of_the_teacher():
    logits, target = drawn(50, 4), labels(50, 4)
    same = compare(logits, logits, target)
    assert (same.kl, same.agreement, same.gap) == (0.0, 100.0, 0.0)
    sharp, flat = torch.tensor([[10.0, 0.0]]), torch.zeros(1, 2)
    zero = torch.tensor([0])
    assert compare(flat, sharp, zero).kl == pytest.approx(math.log(2), abs=1e-2)
    assert compare(sharp, flat, zero).kl == pytest.approx(5 - math.log(2), abs=1e-2)


def textbook_hsic(x, y):
    """HSIC_1 of Song et al. from Gram matrices."""
    k, el = ((v @ v.T).fill_diagonal_(0) for v in (x, y))
    n, one = len(x), torch.ones(len(x), dtype=x.dtype)
    last = 2 / (n - 2) * (one @ k @ el @ one)
    ends = (one @ k @ one) * (one @ el @ one) / ((n - 1) * (n - 2))
    return ((k @ el).trace() + ends - last) / (n * (n - 3))


def cka(x, y, batch=37):
    return fill(Cka(), x, y, batch=batch).value()


def test_cka_equals_its_form_in_gram_matrices():
    x = drawn(120, 16) + 5
    y = x[:, :7] @ drawn(7, 9, seed=1) + 3 * drawn(120, 9, seed=2)
    assert fill(Hsic(), x, y).value() == pytest.approx(textbook_hsic(x, y).item(), rel=1e-9)
    want = textbook_hsic(x, y) / (textbook_hsic(x, x) * textbook_hsic(y, y)).sqrt()
    assert cka(x, y) == pytest.approx(want.item(), rel=1e-9)
    order = torch.randperm(120, generator=torch.Generator().manual_seed(3))
    assert cka(x[order], y[order], batch=50) == pytest.approx(want.item(), rel=1e-9)


def test_cka_of_rotated_scaled_and_unrelated_features():
    x = drawn(200, 32)
    rotation = torch.linalg.qr(drawn(32, 32, seed=1))[0]
    assert cka(x, 3 * x @ rotation + 100) == pytest.approx(1, rel=1e-9)
    # few samples of wide features: the biased ratio would be near 1
    unrelated = [cka(drawn(20, 64, seed=s), drawn(20, 64, seed=s + 50)) for s in range(30)]
    assert abs(np.mean(unrelated)) < 0.05
    assert math.isnan(cka(x, torch.ones(200, 3, dtype=torch.float64)))
    assert math.isnan(cka(x[:3], x[:3]))


def test_cka_of_large_features_far_from_zero():
    x, y = drawn(100, 8), drawn(100, 8, seed=1) + drawn(100, 8)
    far = [(1e4 * v + 1e7).float() for v in (x, y)]
    near = [v.double() - 1e7 for v in far]
    assert cka(*far) == pytest.approx(cka(*near), rel=1e-6)


def collapse(x, target, classes):
    return fill(CollapseSums(classes), x, target).result()


def test_collapse_equals_its_definition():
    target = labels(200, 5, seed=4)
    x = 2 * drawn(5, 8, seed=5)[target] + drawn(200, 8) + 30
    within, means = np.zeros((8, 8)), []
    for k in range(5):
        of_class = x[target == k].numpy()
        within += np.cov(of_class.T, bias=True) * len(of_class) / 200
        means.append(of_class.mean(axis=0))
    centred = np.array(means) - np.mean(means, axis=0)
    between = centred.T @ centred / 5
    found = collapse(x, target, 7)  # two classes have no images
    assert found.within == pytest.approx(np.trace(within), rel=1e-9)
    assert found.between == pytest.approx(np.trace(between), rel=1e-9)
    want = np.trace(within @ scipy.linalg.pinvh(between, rtol=1e-10)) / 5
    assert found.nc1 == pytest.approx(want, rel=1e-9)
    lengths = np.linalg.norm(centred, axis=1)
    assert found.norm_spread == pytest.approx(lengths.std() / lengths.mean(), rel=1e-9)


def test_collapse_at_its_ends():
    target = torch.arange(60) % 4
    collapsed = collapse(torch.eye(4)[target], target, 4)
    assert collapsed.within == pytest.approx(0, abs=1e-12)
    assert collapsed.nc1 == pytest.approx(0, abs=1e-12)
    assert collapsed.norm_spread == pytest.approx(0, abs=1e-12)
    assert collapsed.between == pytest.approx(0.75)
    assert math.isnan(collapse(torch.eye(4)[target], torch.zeros(60).long(), 4).nc1)
    broken = collapse(torch.full((60, 2), torch.nan), target, 4)
    assert math.isnan(broken.nc1)


def test_maps_are_averaged_over_positions():
    feature = drawn(5, 3, 2, 4).float()
    assert torch.allclose(pool(feature), feature.double().mean(dim=(2, 3)))
    assert torch.equal(pool(feature[:, :, 0, 0]), feature[:, :, 0, 0].double())


def test_logit_correlation_is_numpys():
    logits = drawn(90, 6).float()
    found = maps.logit_correlation(logits)
    assert torch.allclose(found, torch.from_numpy(np.corrcoef(logits.double().numpy().T)))
    constant = maps.logit_correlation(torch.cat([logits, torch.full((90, 1), 0.1)], dim=1))
    assert constant[6].tolist() == [0.0] * 6 + [1.0]


def test_attention_is_the_mean_square_over_channels_without_the_stem():
    feats = [drawn(2, 4, 8, 8), drawn(2, 3, 4, 4, seed=1)]
    (found,) = maps.attention_maps({"feats": feats})
    want = sum(feats[1][:, c] ** 2 for c in range(3)) / 3
    assert torch.allclose(found, want.float())
    with pytest.raises(UserError, match="no 'feats'"):
        maps.attention_maps({})


def test_tsne_keeps_clusters_and_is_the_same_twice():
    target = torch.arange(60) % 3
    x = 20 * torch.eye(8)[target] + drawn(60, 8).float()
    points = maps.tsne(x, seed=1)
    assert np.array_equal(points, maps.tsne(x, seed=1))
    centres = np.array([points[target == k].mean(axis=0) for k in range(3)])
    nearest = np.linalg.norm(points[:, None] - centres, axis=2).argmin(axis=1)
    assert nearest.tolist() == target.tolist()
    with pytest.raises(UserError, match="at least 4 images, got 3"):
        maps.tsne(x[:3])
    with pytest.raises(UserError, match="finite"):
        maps.tsne(torch.full((9, 2), torch.nan))


def test_classes_are_named_or_numbered():
    names = ["cat", "dog", "0"]
    assert samples.choose_classes(names, ["dog", "0", "1"], 9) == [1, 2]  # names come first
    assert samples.choose_classes(names, [], 2) == [0, 1]
    with pytest.raises(UserError, match="unknown class 'dgo'; did you mean 'dog'"):
        samples.choose_classes(names, ["dgo"], 9)


def test_images_are_drawn_evenly_and_by_seed():
    targets = torch.tensor([0] * 50 + [1] * 3 + [2] * 50)
    found = samples.choose_images(targets, [0, 1, 2], 13, seed=1)
    assert found == sorted(set(found))
    assert targets[found].bincount().tolist() == [5, 3, 5]
    assert found == samples.choose_images(targets, [0, 1, 2], 13, seed=1)
    assert found != samples.choose_images(targets, [0, 1, 2], 13, seed=2)
    assert samples.choose_images(targets, [1]) == [50, 51, 52]
    with pytest.raises(UserError, match="no images of these"):
        samples.choose_images(targets, [3], 5)


def test_an_svg_does_not_show_the_last_bits_of_its_layout(tmp_path):
    def written(name, shift):
        figure = draw.new_figure(2, 2, layout=None)
        figure.add_axes((0.1 + shift, 0.1, 0.8, 0.8)).imshow(np.eye(4))
        draw.save(figure, tmp_path / name)
        return (tmp_path / name).read_text()

    one = written("a.svg", 0.0)
    assert 'url(#clip0)"' in one
    assert 'id="clip0"' in one
    assert written("b.svg", 1e-13) == one
    assert written("c.svg", 0.05) != one
