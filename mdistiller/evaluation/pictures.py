"""Pictures, from networks to a figure; what `visualize`, `predict` and the notebooks call."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from mdistiller.dataset import TestData
from mdistiller.evaluation import draw, maps, samples
from mdistiller.evaluation.predict import Prediction, Predictor
from mdistiller.evaluation.subjects import Subject
from mdistiller.registry import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def tsne_picture(
    students: Sequence[Subject],
    test: TestData,
    device: torch.device,
    teacher: Subject | None = None,
    classes: Sequence[str] = (),
    count: int = 1000,
    seed: int = 0,
) -> Figure:
    """t-SNE of the embeddings of `count` test images, a panel a network.

    Args:
        classes: names or numbers; by default the first ten.
        seed: of the choice of images and of t-SNE.
    """
    chosen = samples.choose_classes(test.classes, classes, 10)
    if len(chosen) > draw.MOST_CLASSES:
        raise UserError(f"--classes: at most {draw.MOST_CLASSES} can be told apart")
    positions = samples.choose_images(test.loader.dataset.targets, chosen, count, seed)
    titles, subjects = _titled(students, teacher)
    embeddings, targets = samples.collect(subjects, test, positions, device, samples.embedding)
    panels = [(title, maps.tsne(f, seed)) for title, f in zip(titles, embeddings, strict=True)]
    return draw.scatter(panels, targets, chosen, test.classes)


def correlation_picture(
    students: Sequence[Subject],
    test: TestData,
    device: torch.device,
    teacher: Subject | None = None,
    classes: Sequence[str] = (),
    count: int = 0,
    seed: int = 0,
) -> Figure:
    """How the correlations of the classes' logits differ between the students and their teacher.

    Args:
        classes: names or numbers of those to show; by default all.
        count: images, of all classes, that correlations are over; 0: the whole test set.
    """
    if teacher is None:
        raise UserError("a difference of correlations needs --teacher, to compare with")
    everything = range(len(test.classes))
    chosen = samples.choose_classes(test.classes, classes, len(test.classes))
    if len(chosen) < 2:
        raise UserError("--classes: a correlation is between at least two classes")
    positions = samples.choose_images(test.loader.dataset.targets, everything, count, seed)
    titles, subjects = _titled(students, teacher)
    read = samples.logits_of(chosen)
    logits, _ = samples.collect(subjects, test, positions, device, read)
    matrices = map(maps.logit_correlation, logits)
    titled = list(zip(titles, matrices, strict=True))
    return draw.correlations(titled[0], titled[1:], [test.classes[k] for k in chosen])


@torch.inference_mode()
def attention_picture(
    students: Sequence[Subject],
    test: TestData,
    device: torch.device,
    teacher: Subject | None = None,
    classes: Sequence[str] = (),
    count: int = 5,
    seed: int = 0,
) -> Figure:
    """Attention maps of every stage of every network, for `count` test images.

    Args:
        classes: names or numbers; by default the first `count`.
    """
    chosen = samples.choose_classes(test.classes, classes, count)
    positions = samples.choose_images(test.loader.dataset.targets, chosen, count, seed)
    titles, subjects = _titled(students, teacher)
    shown, classes_of, views = zip(*samples.batches(test, positions, subjects), strict=True)
    images, targets = torch.cat(shown), torch.cat(classes_of).tolist()
    networks = []
    for title, subject, parts in zip(titles, subjects, zip(*views, strict=True), strict=True):
        logits, features = subject.net(torch.cat(parts).to(device))
        predicted = [test.classes[k] for k in logits.argmax(dim=1).tolist()]
        networks.append((title, [m.cpu() for m in maps.attention_maps(features)], predicted))
    pixels = draw.denormalize(images, test.mean, test.std).cpu()
    return draw.attention(pixels, [test.classes[k] for k in targets], networks)


def mistakes_picture(
    predictor: Predictor, predictions: Sequence[Prediction], most: int = 24
) -> Figure:
    """Wrongly classified images as the network sees them, the largest loss first.

    Args:
        predictions: of image files; at least one must be wrong.
        most: how many images are drawn.
    """
    wrong = [one for one in predictions if one.wrong]
    worst = sorted(wrong, key=lambda one: one.truth_probability or 0.0)[:most]
    captions = [
        f"{textwrap.shorten(one.truth, 24)} ({100 * (one.truth_probability or 0):.1f} %)\n"
        f"said {textwrap.shorten(one.label, 24)} ({100 * one.probability:.1f} %)"
        for one in worst
    ]
    labelled = sum(bool(one.truth) for one in predictions)
    title = f"{len(wrong)} of {labelled} images wrong"
    title += f"; the {len(worst)} worst" if len(worst) < len(wrong) else ""
    return draw.grid([predictor.prepare(one.image) for one in worst], captions, title)


def _titled(
    students: Sequence[Subject], teacher: Subject | None
) -> tuple[list[str], list[Subject]]:
    """Titles and networks, the teacher first."""
    subjects = [*([teacher] if teacher else []), *students]
    titles = []
    for subject in subjects:
        source = subject.source
        name = f"teacher {source.name}" if subject is teacher else source.name
        titles.append(f"{name}\n{textwrap.fill(source.label, 46)}")
    return titles, subjects
