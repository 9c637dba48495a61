"""Which class has which number: DATASET.CLASSES.

By default folders are numbered in plain sort order, as torchvision does. timm numbers them in
natural order, which ignores case and compares digits as numbers: "class 2" before "class 10".
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mdistiller.registry import UserError
from mdistiller.runtime import project_root, rank

KEY = "DATASET.CLASSES"
NATURAL = "natural"


def natural_key(name: str) -> tuple[list[Any], str]:
    """Sort key of timm's order of folders; names that differ in case alone in plain order."""
    parts: list[Any] = re.split(r"(\d+)", name.lower())
    parts[1::2] = map(int, parts[1::2])
    return parts, name


def are_numbers(classes: Sequence[str]) -> bool:
    """Whether classes have no names but their numbers from 0, in order."""
    return list(classes) == [str(number) for number in range(len(classes))]


def first_difference(ours: Sequence[str], theirs: Sequence[str]) -> str:
    """Where two lists of class names part, in words; "" if they are equal.

    Args:
        ours: of the data.
        theirs: of the file.
    """
    for number, (own, other) in enumerate(zip(ours, theirs, strict=False)):
        if own != other:
            return f"class {number} is {own!r} in the data and {other!r} in the file"
    if len(ours) != len(theirs):
        return f"the data have {len(ours)} classes and the file {len(theirs)}"
    return ""


def renumber_classes(images: Any, wanted: str | Sequence[Any]) -> Any:
    """A split with its classes numbered as DATASET.CLASSES says.

    Args:
        images: with `targets` (int64 [N]) and `classes`; it is not changed.
        wanted: "" or [] to leave the order; "natural"; a list of class names; or a text file with
            one name a line, as timm's `--class-map`. Classes without a number in `images` are kept,
            as classes of which there are no images. Data that have numbers in place of names (as
            shards do) take the names as they stand.

    Raises:
        UserError: the list is not one of different names, or the data have a class outside it.
    """
    if not wanted:
        return images
    names = sorted(images.classes, key=natural_key) if wanted == NATURAL else read_classes(wanted)
    have = list(images.classes)
    lacking = [name for name in have if name not in set(names)]
    if lacking and are_numbers(have) and len(names) == len(have):
        have, lacking = names, []
    if lacking:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise UserError(
            f"{KEY} does not name the class {lacking[0]!r}{more} of the data: add it to the list, "
            "or remove its images"
        )
    place = {name: number for number, name in enumerate(names)}
    found = copy.copy(images)
    found.targets = torch.tensor([place[name] for name in have])[images.targets]
    found.classes = names
    return found


def report_empty_classes(images: Any, where: Path | str) -> None:
    """Print which classes of DATASET.CLASSES have no images in a split."""
    seen = set(images.targets.unique().tolist())
    absent = [name for number, name in enumerate(images.classes) if number not in seen]
    if absent and rank() == 0:
        shown = ", ".join(absent[:3]) + (", ..." if len(absent) > 3 else "")
        print(
            f"{KEY}: {len(absent)} of {len(images.classes)} classes have no images in {where} "
            f"({shown})",
            flush=True,
        )


def read_classes(wanted: str | Sequence[Any]) -> list[str]:
    """The names of a list, or of a text file with one a line."""
    where = KEY
    if isinstance(wanted, str):
        path = Path(wanted).expanduser()
        path = path if path.is_file() else project_root() / path
        where = f"{KEY} {wanted}"
        try:
            wanted = path.read_text(encoding="utf-8").rstrip().split("\n")
        except OSError as error:
            raise UserError(
                f"{where}: {error.strerror}; want {NATURAL!r}, a list of class names, or a text "
                "file with one a line"
            ) from None
        except UnicodeDecodeError:
            raise UserError(f"{where} is no text file; want one class name a line") from None
    names = [str(name).strip() for name in wanted]
    if "" in names:
        raise UserError(f"{where}: line {names.index('') + 1} is empty; want one class name a line")
    double, count = max(Counter(names).items(), key=lambda item: item[1])
    if count > 1:
        raise UserError(f"{where} names the class {double!r} {count} times")
    return names
