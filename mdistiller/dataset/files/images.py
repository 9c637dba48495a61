"""Image files to pixels, and pixels to one size. Brings torchvision: imported where it is needed.

torchvision decodes JPEG to Pillow's pixels in two thirds of the time, and resizes bytes to within
one level of Pillow in half of it. Whatever it cannot read, or no longer, Pillow reads.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from mdistiller.preprocessing import Preprocessing
from mdistiller.registry import UserError, first_line

try:  # deprecated since torchvision 0.29, so some later one will not have it
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:
    decode_jpeg = None


MAX_PIXELS = 80_000_000
"""Of one image, 240 MB in memory: a few bytes of file can announce far more."""
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
"""What Pillow may take a file for; others start programs (EPS), or are no photographs."""


_ORIENTATION = 0x0112  # the EXIF tag


class UnreadableError(UserError):
    """A file that is no image, or a broken one."""


def read_image(path: Path, upright: bool = False, scale_16_bit: bool = False) -> Tensor:
    """The image in a file; see :func:`decode`."""
    try:
        data = torch.from_numpy(np.fromfile(path, dtype=np.uint8))
    except OSError as error:
        raise _unreadable(path, error) from error
    return decode(data, path, upright, scale_16_bit)


def decode(
    data: Tensor, name: Path | str, upright: bool = False, scale_16_bit: bool = False
) -> Tensor:
    """The image in the bytes of a file, as RGB.

    Args:
        data: uint8, [bytes].
        name: of the file, for errors.
        upright: turn the image as its EXIF orientation says.
        scale_16_bit: bring grey images of 16 bits to 8; else they are refused.

    Returns:
        uint8, [3, H, W], with the channels last in memory.

    Raises:
        UnreadableError: it is not an image, or broken, or has more than 8 bits a channel.
    """
    size = _jpeg_size(data)
    if size is not None:
        _check_pixels(*size, name)
    if decode_jpeg is not None and size is not None:
        with contextlib.suppress(RuntimeError):  # what is wrong Pillow says in plainer words
            pixels: Tensor = decode_jpeg(
                data, mode=ImageReadMode.RGB, apply_exif_orientation=upright
            )
            return pixels
    try:
        with Image.open(io.BytesIO(data.numpy().tobytes()), formats=FORMATS) as file:
            width, height = file.size
            _check_pixels(width, height, name)
            image = _upright(file) if upright else file
            if file.mode == "F" or file.mode.startswith("I"):  # Pillow cuts such values off at 255
                image = _eight_bits(image, file.mode, name, scale_16_bit)
            image = image.convert("RGB")
    except UnreadableError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds
        raise _unreadable(name, error) from error
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF orientation says; as it is where EXIF is damaged."""
    try:
        return ImageOps.exif_transpose(image)
    except UnreadableError:
        raise
    except Exception:  # Pillow's reader of EXIF raises many kinds
        image.load()
        return image


def _eight_bits(image: Image.Image, mode: str, name: Path | str, scale: bool) -> Image.Image:
    """A grey image of 16 bits with its values from 0 to 65535 brought to 0 to 255."""
    values = np.asarray(image)
    inside = mode != "F" and values.min() >= 0 and values.max() <= 65535
    if scale and inside:
        return Image.fromarray(((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))
    advice = "set DATASET.SCALE_16_BIT True to scale it, or" if inside else "its range is unknown:"
    raise UnreadableError(
        f"{name} has more than 8 bits a channel (mode {mode}); {advice} convert it to 8"
    )


def header_size(path: Path, upright: bool) -> tuple[int, int] | None:
    """(height, width) that the header of a file announces; None where it cannot be read."""
    try:
        with Image.open(path, formats=FORMATS) as file:
            width, height = file.size
            turned = upright and file.getexif().get(_ORIENTATION, 1) >= 5
    except Exception:  # what is wrong is reported when the image is read
        return None
    return (width, height) if turned else (height, width)


def _jpeg_size(data: Tensor) -> tuple[int, int] | None:
    """Width and height that the header of a JPEG announces; None for anything else."""
    file = io.BytesIO(data.numpy().data)
    if file.read(2) != b"\xff\xd8":
        return None
    while len(head := file.read(4)) == 4 and head[0] == 0xFF:
        kind, length = head[1], int.from_bytes(head[2:], "big")
        if kind == 0xFF:  # padding before a marker
            file.seek(-3, 1)
        elif 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):  # the start of a frame
            frame = file.read(5)
            return int.from_bytes(frame[3:5], "big"), int.from_bytes(frame[1:3], "big")
        else:
            file.seek(length - 2, 1)
    return None


def _check_pixels(width: int, height: int, name: Path | str) -> None:
    if width * height > MAX_PIXELS:
        raise UnreadableError(
            f"{name} announces {width}x{height} pixels, more than {MAX_PIXELS} (a bomb?); replace "
            "or remove it"
        )


def _unreadable(name: Path | str, error: Exception) -> UserError:
    reason = first_line(error)
    reason = "no image of a known format" if "cannot identify image file" in reason else reason
    return UnreadableError(f"{name} cannot be read as an image ({reason}); replace or remove it")


def resize(image: Tensor, height: int, width: int, interpolation: str = "") -> Tensor:
    """A uint8 image [3, H, W] at another size, antialiased; itself if it has it.

    Args:
        interpolation: nearest, bilinear or bicubic, by Pillow, whose pixels other libraries'
            networks are evaluated on; empty: bilinear by torchvision, faster and within one level.
    """
    if image.shape[1:] == (height, width):
        return image
    if interpolation:
        whole = Image.fromarray(image.permute(1, 2, 0).numpy())
        scaled = whole.resize((width, height), Image.Resampling[interpolation.upper()])
        return torch.from_numpy(np.array(scaled)).permute(2, 0, 1)
    resized: Tensor = transforms.resize(image, [height, width], antialias=True)
    return resized


def fit_square(image: Tensor, side: int, how: Preprocessing) -> Tensor:
    """A uint8 image [3, H, W] at `side` x `side`: resized, then its middle, as `how` says.

    What is padded is black. For `crop` this is torchvision's ``Resize`` and ``CenterCrop``.
    """
    height, width = image.shape[1:]
    scaled = how.resized_side(side)
    if how.resize == "stretch":
        height, width = scaled, scaled
    elif (height <= width) == (how.resize == "crop"):  # the height is the side that decides
        height, width = scaled, max(1, int(scaled * width / height))
    else:
        height, width = max(1, int(scaled * height / width)), scaled
    image = resize(image, height, width, how.interpolation)
    if (height, width) == (side, side):
        return image
    cropped: Tensor = transforms.center_crop(image, [side, side])
    return cropped
