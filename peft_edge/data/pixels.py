"""Convert images of any mode to 8-bit RGB, and check image files before they are used."""

from __future__ import annotations

import io
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

with suppress(ImportError):  # without pillow-heif, HEIC images are rejected, see HEIC_REMEDY
    from pillow_heif import register_heif_opener

    register_heif_opener()

HEIC_REMEDY = "pip install pillow-heif, or convert it to JPEG"
"""The advice in messages about HEIC images. Pillow reads such images only if the package pillow-heif is installed."""

# Pillow's modes with more than 8 bits in a channel.
_DEEP_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")
# The largest values of 8, 10, 12, 14 and 16 bits. Cameras store values of 10 to 14 bits in 16 bits.
_DEEP_RANGES = (255, 1023, 4095, 16383, 65535)
_JPEG_END = b"\xff\xd9"


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to 8-bit RGB.

    If the mode has more than 8 bits in a channel, values are multiplied by 255 / m. Here, m is the first of the numbers
    255, 1023, 4095, 16383 and 65535 that is not less than the largest value in the image. These numbers are the largest
    values of 8, 10, 12, 14 and 16 bits. In mode F (floating-point numbers), m can also be 1. Transparent pixels are
    blended with white. An RGB image without transparency is returned without a copy.

    Raises:
        ValueError: If a value in a mode with more than 8 bits is negative, not finite or above 65535, or if Pillow
            cannot convert the mode to RGB.

    >>> to_rgb(Image.new("RGBA", (1, 1), (255, 0, 0, 0))).getpixel((0, 0))
    (255, 255, 255)
    >>> to_rgb(Image.new("I;16", (1, 1), 4095)).getpixel((0, 0))
    (255, 255, 255)
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in _DEEP_MODES:
        image = _with_8_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image)
        image = white
    return image.convert("RGB")


def _with_8_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    smallest, largest = (float(value) for value in (values.min(), values.max()))
    ranges = (1, *_DEEP_RANGES) if image.mode == "F" else _DEEP_RANGES
    # This form of the condition also rejects NaN, for which every comparison is false.
    if not (smallest >= 0 and largest <= ranges[-1]):
        raise ValueError(
            f"its values are from {smallest:g} to {largest:g}, expected 0 to 65535, or 0 to 1 for floating-point "
            "numbers: save it with 8 or 16 bits in a channel"
        )
    scale = 255 / next(top for top in ranges if largest <= top)
    pixels = np.rint(values.astype(np.float64) * scale).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        pixels[values == transparent] = 255
    return Image.fromarray(pixels)


def open_image(value: dict[str, Any]) -> Image.Image:
    """Open the image in `value`, a dict with the keys `bytes` (the content of the file, or None) and `path`.

    A column of type `datasets.Image(decode=False)` has such a dict in each row. If `bytes` is None, the file at `path`
    is read. A JPEG is opened, but not decoded, because `read_rgb` decodes the pixels later. All other formats are
    decoded at once.
    """
    content = Path(value["path"]).read_bytes() if value["bytes"] is None else value["bytes"]
    image = Image.open(io.BytesIO(content))
    if not isinstance(image, JpegImageFile):
        image.load()  # in some formats, the orientation is stored after the pixels, and is known only after decoding
    return image


def _orientation(image: Image.Image) -> int:
    return image.getexif().get(ExifTags.Base.Orientation, 1)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return the width and height of an image after it is rotated according to its EXIF orientation."""
    width, height = image.size
    return (height, width) if _orientation(image) in (5, 6, 7, 8) else (width, height)


def read_rgb(image: Image.Image, *, shrink: float = 1.0) -> Image.Image:
    """Decode an opened image, rotate it according to its EXIF orientation, and convert it with `to_rgb`.

    `shrink` is the factor by which the caller will reduce height and width afterwards. If `shrink` is at least 4, a
    JPEG is decoded at a half, a quarter or an eighth of its height and width. The decoded image is still at least twice
    as high and wide as the caller needs, so decoding at the reduced size removes no detail that the caller's resizing
    would keep. For a photograph from a phone, decoding at the reduced size takes about a fifth of the time of decoding
    at full size.
    """
    if shrink >= 4:
        image.draft(None, (int(image.width * 2 / shrink), int(image.height * 2 / shrink)))
    if _orientation(image) != 1:
        image = ImageOps.exif_transpose(image)
    return to_rgb(image)


def is_heic(start: bytes) -> bool:
    """Return whether a file that begins with the 12 bytes `start` is an HEIC or HEIF image, as iPhones write them."""
    return start[4:8] == b"ftyp" and start[8:12] in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")


def check_image(content: bytes) -> None:
    """Check that the content of an image file is a complete image that can be converted to RGB.

    Pillow verifies the checksums of a PNG and the length of a WebP. A JPEG is decoded only if its last bytes are not
    the end marker. Files of other formats, and files with more than 8 bits in a channel, are decoded.

    Raises:
        ValueError: If the content is not an image, is cut short or otherwise damaged, or has too many pixels. If a
            channel has more than 8 bits and the image cannot be converted to RGB correctly.
    """
    try:
        image = Image.open(io.BytesIO(content))
        deep = is_deep(image)
        if deep or not _is_whole(image, content):
            image.load()
            if deep:
                _check_deep(image)
            image = Image.open(io.BytesIO(content))
        image.verify()
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{error}: a decoded image of this size takes too much memory; save it with fewer pixels"
        ) from error
    except Exception as error:  # Pillow raises many types of exceptions for damaged files
        if is_heic(content[:12]):
            raise ValueError(f"it is an HEIC image: {HEIC_REMEDY}") from error
        if isinstance(error, UnidentifiedImageError):
            raise ValueError("its content is no image that Pillow can read" if content else "it is empty") from error
        raise ValueError(str(error) or type(error).__name__) from error


def _is_whole(image: Image.Image, content: bytes) -> bool:
    """Return False if an opened file must be decoded to check that it is complete.

    A JPEG with an end marker counts as complete. For PNG and WebP, Pillow notices a missing end without decoding.
    """
    if isinstance(image, JpegImageFile):
        return content.endswith(_JPEG_END)
    # `Image.verify` reads a PNG to the end of the file. Pillow raises an error when it opens an incomplete WebP.
    return image.format in ("PNG", "WEBP")


def is_deep(image: Image.Image) -> bool:
    """Return whether an image file has more than 8 bits in a channel. `image` must be opened, but not yet loaded."""
    # Pillow gives files with 16-bit colours the mode RGB. Only the attribute `tile` contains the mode of the file, such
    # as RGB;16B.
    return image.mode in _DEEP_MODES or ";16" in str(getattr(image, "tile", ""))


def _check_deep(image: Image.Image) -> None:
    if image.mode in _DEEP_MODES:
        to_rgb(image)
        return
    if "transparency" in image.info:
        raise ValueError("it has 16-bit colours and a transparent colour: save it with 8 bits in a channel")
    colours = image.getextrema()[:3]
    largest = max(top for _, top in colours if isinstance(top, int))  # type: ignore[misc]
    # Pillow keeps only the upper 8 bits of each 16-bit value. If only the lower bits are used, the result is dark.
    if 0 < largest < 64:
        raise ValueError(
            f"it has 16-bit colours of which at most {8 + largest.bit_length()} bits are used, and would be almost "
            "black: save it with 8 bits in a channel"
        )


def identify(file: IO[bytes]) -> str | None:
    """Return Pillow's name of the format of a file, or None if Pillow cannot decode the file as an image."""
    with suppress(Exception), Image.open(file) as image:  # Pillow raises many types of exceptions
        if image.format in _decoded_formats():
            return image.format
    return None


def _decoded_formats() -> set[str]:
    """Return Pillow's names of the formats that Pillow decodes without other programs."""
    # Pillow identifies files of MPEG and of its stub formats, such as HDF5, but cannot decode these files. To decode
    # EPS, Pillow runs Ghostscript.
    stubs = {
        name
        for name, (factory, _) in Image.OPEN.items()
        if isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile)
    }
    return set(Image.OPEN) - stubs - {"MPEG", "EPS"}


def is_image_suffix(suffix: str) -> bool:
    """Return whether Pillow decodes files with this ending, such as `.jpg`."""
    return Image.registered_extensions().get(suffix.lower()) in _decoded_formats()
