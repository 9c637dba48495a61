"""Decode image files and resize images. Imports torchvision, which is slow: import it where needed.

torchvision decodes JPEG to Pillow's pixels in two thirds of the time, and resizes uint8 images to
within one level of Pillow in half of it. Pillow reads all other files.
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

try:  # deprecated since torchvision 0.29, so a later version will remove it
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:
    decode_jpeg = None


Size = tuple[int, int]  # height, width

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Pillow's name of images with so many channels."""
MAX_PIXELS = 80_000_000
"""Limit for one image, 240 MB in memory: the header of a small file can claim far more."""
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
"""Formats that Pillow may read; others start programs (EPS) or are not photographs."""


ORIENTATION = 0x0112  # the EXIF tag


class UnreadableError(UserError):
    """A file is not an image, or is broken."""


def read_image(
    path: Path, upright: bool = False, scale_16_bit: bool = False, channels: int = 3
) -> Tensor:
    """The image in a file; see :func:`decode`."""
    return decode(read_bytes(path), path, upright, scale_16_bit, channels)


def read_bytes(path: Path) -> Tensor:
    """The bytes of a file: uint8, [bytes]."""
    try:
        return torch.from_numpy(np.fromfile(path, dtype=np.uint8))
    except OSError as error:
        raise _unreadable(path, error) from error


def decode(
    data: Tensor,
    name: Path | str,
    upright: bool = False,
    scale_16_bit: bool = False,
    channels: int = 3,
) -> Tensor:
    """The image in the bytes of a file.

    Args:
        data: uint8, [bytes].
        name: of the file, for errors.
        upright: rotate the image by its EXIF orientation.
        scale_16_bit: scale grey images of 16 bits to 8; otherwise they are refused.
        channels: 1 grey, 3 RGB, 4 RGBA.

    Returns:
        uint8, [channels, H, W], with the channels last in memory.

    Raises:
        UnreadableError: it is not an image, or broken, or has more than 8 bits a channel.
    """
    size = jpeg_size(data)
    if size is not None:
        check_pixels(*size, name)
    if decode_jpeg is not None and size is not None and channels == 3:
        with contextlib.suppress(RuntimeError):  # Pillow reports the error more clearly
            pixels: Tensor = decode_jpeg(
                data, mode=ImageReadMode.RGB, apply_exif_orientation=upright
            )
            return pixels
    try:
        with Image.open(io.BytesIO(data.numpy().tobytes()), formats=FORMATS) as file:
            width, height = file.size
            check_pixels(width, height, name)
            image = _upright(file) if upright else file
            if file.mode == "F" or file.mode.startswith("I"):  # Pillow clips such values at 255
                image = _eight_bits(image, file.mode, name, scale_16_bit)
            image = image.convert(MODES[channels])
    except UnreadableError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds
        raise _unreadable(name, error) from error
    return pixels_of(image)


def pixels_of(image: Image.Image) -> Tensor:
    """The pixels of an image of Pillow: uint8, [C, H, W]."""
    pixels = torch.from_numpy(np.array(image))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def _upright(image: Image.Image) -> Image.Image:
    """The image rotated by its EXIF orientation; unchanged where EXIF is damaged."""
    try:
        return ImageOps.exif_transpose(image)
    except UnreadableError:
        raise
    except Exception:  # Pillow's reader of EXIF raises many kinds
        image.load()
        return image


def _eight_bits(image: Image.Image, mode: str, name: Path | str, scale: bool) -> Image.Image:
    """A grey image of 16 bits with its values scaled from 0..65535 to 0..255."""
    values = np.asarray(image)
    inside = mode != "F" and values.min() >= 0 and values.max() <= 65535
    if scale and inside:
        return Image.fromarray(((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))
    advice = "set DATASET.SCALE_16_BIT True to scale it, or" if inside else "its range is unknown:"
    raise UnreadableError(
        f"{name} has more than 8 bits a channel (mode {mode}); {advice} convert it to 8"
    )


def header_size(path: Path, upright: bool) -> tuple[int, int] | None:
    """(height, width) from the header of a file; None where it cannot be read."""
    try:
        with Image.open(path, formats=FORMATS) as file:
            width, height = file.size
            turned = upright and file.getexif().get(ORIENTATION, 1) >= 5
    except Exception:  # the error is reported when the image is read
        return None
    return (width, height) if turned else (height, width)


def jpeg_size(data: Tensor) -> tuple[int, int] | None:
    """Width and height from the header of a JPEG; None for other data."""
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


def check_pixels(width: int, height: int, name: Path | str) -> None:
    """Raise UnreadableError for an image with more than MAX_PIXELS."""
    if width * height > MAX_PIXELS:
        raise UnreadableError(
            f"{name} announces {width}x{height} pixels, more than the limit of {MAX_PIXELS} (a "
            "decompression bomb?); replace or remove it"
        )


def _unreadable(name: Path | str, error: Exception) -> UserError:
    reason = first_line(error)
    if "cannot identify image file" in reason:
        reason = "no image of a known format"
    return UnreadableError(
        f"{name} cannot be read as an image ({reason}); replace or remove it, or leave such images "
        "out of the data by DATASET.SKIP_CORRUPT True"
    )


def resize(image: Tensor, height: int, width: int, interpolation: str = "") -> Tensor:
    """A uint8 image [C, H, W] resized with antialiasing; unchanged if it has that size.

    Args:
        interpolation: nearest, bilinear or bicubic by Pillow, as other libraries evaluate their
            networks; empty: bilinear by torchvision, which is faster and within one level.
    """
    if image.shape[1:] == (height, width):
        return image
    if interpolation:
        whole = Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy())
        return pixels_of(whole.resize((width, height), Image.Resampling[interpolation.upper()]))
    resized: Tensor = transforms.resize(image, [height, width], antialias=True)
    return resized


def resized_shape(height: int, width: int, size: Size, how: Preprocessing) -> Size:
    """Height and width of an image before the centre crop or the padding to `size`."""
    tall, wide = how.resized_sides(size)
    if how.resize == "stretch":
        return tall, wide
    by_width, by_height = wide * height // width, tall * width // height  # of the other side
    if how.resize == "crop":
        return max(tall, by_width), max(wide, by_height)
    return max(1, min(tall, by_width)), max(1, min(wide, by_height))


def resize_to_size(image: Tensor, size: Size, how: Preprocessing) -> Tensor:
    """A uint8 image [C, H, W] resized to `size`: its centre crop, or padded with black.

    For `crop` to a square this is torchvision's ``Resize`` and ``CenterCrop``.
    """
    height, width = resized_shape(image.shape[1], image.shape[2], size, how)
    return crop_or_pad(resize(image, height, width, how.interpolation), size)


def crop_or_pad(image: Tensor, size: Size) -> Tensor:
    """The centre of an image [C, H, W], with black where it is smaller: [C, *size]."""
    if image.shape[1:] == size:
        return image
    cropped: Tensor = transforms.center_crop(image, list(size))
    return cropped
