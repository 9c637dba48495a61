"""The order of classes: DATASET.CLASSES.

By default class folders are sorted as text, as in torchvision. timm sorts them in natural order,
which ignores case and compares digits as numbers: "class 2" before "class 10".
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
    """Sort key of timm's order of class folders; ties (case alone) are sorted as text."""
    parts: list[Any] = re.split(r"(\d+)", name.lower())
    parts[1::2] = map(int, parts[1::2])
    return parts, name


def are_numbers(classes: Sequence[str]) -> bool:
    """Whether the class names are just the numbers from 0, in order."""
    return list(classes) == [str(number) for number in range(len(classes))]


def first_difference(ours: Sequence[str], theirs: Sequence[str]) -> str:
    """The first difference of two lists of class names as text; "" if they are equal.

    Args:
        ours: class names of the data.
        theirs: class names of the file.
    """
    for number, (our_name, their_name) in enumerate(zip(ours, theirs, strict=False)):
        if our_name != their_name:
            return f"class {number} is {our_name!r} in the data and {their_name!r} in the file"
    if len(ours) != len(theirs):
        return f"the data have {len(ours)} classes and the file {len(theirs)}"
    return ""


def renumber_classes(images: Any, wanted: str | Sequence[Any]) -> Any:
    """A split whose classes are in the order of DATASET.CLASSES.

    Args:
        images: split with `targets` (int64 [N]) and `classes`; it is not changed.
        wanted: "" or [] to keep the order; "natural"; a list of class names; or a text file with
            one name a line, as timm's `--class-map`. Names missing in `images` become classes
            without images. Data with numbers for names (shards) take the names in order.

    Raises:
        UserError: a name occurs twice, or the data have a class that is not in the list.
    """
    if not wanted:
        return images
    names = sorted(images.classes, key=natural_key) if wanted == NATURAL else read_classes(wanted)
    names_in_data = list(images.classes)
    missing = [name for name in names_in_data if name not in set(names)]
    if missing and are_numbers(names_in_data) and len(names) == len(names_in_data):
        names_in_data, missing = names, []
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"{KEY} lacks the class {missing[0]!r}{more} of the data: add it to the list or "
            "remove its images"
        )
    number_of = {name: number for number, name in enumerate(names)}
    renumbered = copy.copy(images)
    renumbered.targets = torch.tensor([number_of[name] for name in names_in_data])[images.targets]
    renumbered.classes = names
    return renumbered


def report_empty_classes(images: Any, where: Path | str) -> None:
    """Print the classes of DATASET.CLASSES without images in a split."""
    seen = set(images.targets.unique().tolist())
    empty = [name for number, name in enumerate(images.classes) if number not in seen]
    if empty and rank() == 0:
        shown = ", ".join(empty[:3]) + (", ..." if len(empty) > 3 else "")
        print(
            f"{KEY}: {len(empty)} of {len(images.classes)} classes have no images in {where} "
            f"({shown})",
            flush=True,
        )


def read_classes(wanted: str | Sequence[Any]) -> list[str]:
    """The names in a list, or in a text file with one a line."""
    where = KEY
    if isinstance(wanted, str):
        path = Path(wanted).expanduser()
        path = path if path.is_file() else project_root() / path
        where = f"{KEY} {wanted}"
        try:
            wanted = path.read_text(encoding="utf-8").rstrip().split("\n")
        except OSError as error:
            raise UserError(
                f"{where}: {error.strerror}; expected {NATURAL!r}, a list of class names, or a "
                "text file with one a line"
            ) from None
        except UnicodeDecodeError:
            raise UserError(f"{where} is not a text file; expected one class name a line") from None
    names = [str(name).strip() for name in wanted]
    if "" in names:
        raise UserError(
            f"{where}: line {names.index('') + 1} is empty; expected one class name a line"
        )
    repeated, count = max(Counter(names).items(), key=lambda item: item[1])
    if count > 1:
        raise UserError(f"{where} names the class {repeated!r} {count} times")
    return names
