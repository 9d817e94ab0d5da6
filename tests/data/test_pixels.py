"""Odd image files: each is read with the right pixels, or refused by the name of its file."""

from __future__ import annotations

import gc
import io
import runpy
import sys
import types
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin, features
from PIL.JpegImagePlugin import JpegImageFile
from torchvision.transforms.v2 import functional as F

from peft_edge.data import build_loader, pixels
from peft_edge.data.pixels import check_image, identify, is_image_suffix, to_rgb
from peft_edge.data.sources import read_splits

SIZE = (6, 5)
RED, BLACK, WHITE = (255, 0, 0), (0, 0, 0), (255, 255, 255)
RAMP = np.arange(30, dtype=np.float64).reshape(5, 6) / 29  # from 0 to 1


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(np.rint(values)[:, :, None], 3, axis=2)


def ramp(top: int) -> np.ndarray:
    """Return the pixels that are expected when the image `deep(top)` is read: values from 0 to 255."""
    return grey(np.rint(RAMP * top) * 255 / top)


def flat(colour: tuple[int, ...]) -> np.ndarray:
    return np.full((5, 6, 3), colour)


def deep(top: int, dtype: type = np.uint16) -> Image.Image:
    return Image.fromarray(np.rint(RAMP * top).astype(dtype))


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8))


def rgb() -> np.ndarray:
    return np.asarray(picture())


def with_alpha(alpha: int) -> Image.Image:
    image = Image.new("RGBA", SIZE, (*RED, 255))
    image.paste((*RED, alpha), (0, 0, 3, 5))
    return image


def half_white(colour: tuple[int, int, int], alpha: int = 0) -> np.ndarray:
    image = flat(colour)
    image[:, :3] = np.rint((np.array(colour) * alpha + 255 * (255 - alpha)) / 255)
    return image


def palette(transparency: object) -> bytes:
    image = Image.new("P", SIZE, 1)
    image.putpalette([0, 0, 255, *RED])
    image.paste(0, (0, 0, 3, 5))
    return encode(image, "PNG", transparency=transparency)


def oriented(value: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = value
    return encode(picture(), "PNG", exif=exif)


def chunk(kind: bytes, content: bytes) -> bytes:
    return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")


def png_16_bit_colours(values: np.ndarray) -> bytes:
    """Return a PNG file with 16-bit RGB colours. Pillow can read such files, but cannot write them."""
    height, width, _ = values.shape
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([16, 2, 0, 0, 0])
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def with_text(size: int) -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * size, zip=True)
    return encode(picture(), "PNG", pnginfo=info)


def with_text_at_the_end(size: int) -> bytes:
    file = encode(picture(), "PNG")
    return file[:-12] + chunk(b"zTXt", b"comment\0\0" + zlib.compress(b"x" * size)) + file[-12:]


RIGHT: dict[str, tuple[str, Callable[[], bytes], Callable[[], np.ndarray]]] = {
    # Formats
    "png": ("a.png", lambda: encode(picture(), "PNG"), rgb),
    "bmp": ("a.bmp", lambda: encode(picture(), "BMP"), rgb),
    "tiff": ("a.tif", lambda: encode(picture(), "TIFF"), rgb),
    "tiff, compressed": ("a.tiff", lambda: encode(picture(), "TIFF", compression="tiff_lzw"), rgb),
    "tga": ("a.tga", lambda: encode(picture(), "TGA"), rgb),
    "ppm": ("a.ppm", lambda: encode(picture(), "PPM"), rgb),
    "lossless webp": ("a.webp", lambda: encode(picture(), "WEBP", lossless=True), rgb),
    "pcx": ("a.pcx", lambda: encode(picture(), "PCX"), rgb),
    "sgi": ("a.sgi", lambda: encode(picture(), "SGI"), rgb),
    "jpeg": ("a.jpg", lambda: encode(Image.new("RGB", SIZE, WHITE), "JPEG"), lambda: flat(WHITE)),
    "jpeg, grey": ("a.jpeg", lambda: encode(Image.new("L", SIZE, 0), "JPEG"), lambda: flat(BLACK)),
    "first frame of a gif": (
        "a.gif",
        lambda: encode(
            Image.new("RGB", SIZE, RED), "GIF", save_all=True, append_images=[Image.new("RGB", SIZE, WHITE)]
        ),
        lambda: flat(RED),
    ),
    "first page of a tiff": (
        "a.tif",
        lambda: encode(picture(), "TIFF", save_all=True, append_images=[Image.new("RGB", SIZE)]),
        rgb,
    ),
    # Names
    "capital ending": ("A.PNG", lambda: encode(picture(), "PNG"), rgb),
    "no ending": ("photo", lambda: encode(picture(), "PNG"), rgb),
    "another format's ending": ("a.jpg", lambda: encode(picture(), "PNG"), rgb),
    "unknown ending": ("a.png~", lambda: encode(picture(), "PNG"), rgb),
    "spaces, accents and dots": ("Übung 1.2 (копия).v2.png", lambda: encode(picture(), "PNG"), rgb),
    "wildcards": ("a[1]*?.png", lambda: encode(picture(), "PNG"), rgb),
    "called test": ("test_train.png", lambda: encode(picture(), "PNG"), rgb),
    # Modes
    "1 bit": ("a.png", lambda: encode(Image.new("1", SIZE, 1), "PNG"), lambda: flat(WHITE)),
    "8-bit grey": ("a.png", lambda: encode(deep(255, np.uint8), "PNG"), lambda: grey(RAMP * 255)),
    "palette": (
        "a.png",
        lambda: encode(Image.new("RGB", SIZE, RED).convert("P", palette=Image.Palette.ADAPTIVE), "PNG"),
        lambda: flat(RED),
    ),
    "CMYK jpeg": ("a.jpg", lambda: encode(Image.new("CMYK", SIZE, (0, 0, 0, 255)), "JPEG"), lambda: flat(BLACK)),
    "CMYK tiff": ("a.tif", lambda: encode(Image.new("CMYK", SIZE, (0, 255, 255, 0)), "TIFF"), lambda: flat(RED)),
    # More than 8 bits
    "16-bit png": ("a.png", lambda: encode(deep(65535), "PNG"), lambda: grey(RAMP * 255)),
    "16-bit tiff": ("a.tif", lambda: encode(deep(65535), "TIFF"), lambda: grey(RAMP * 255)),
    "16-bit pgm": (
        "a.pgm",
        lambda: b"P5 6 5 65535\n" + np.rint(RAMP * 65535).astype(">u2").tobytes(),
        lambda: grey(RAMP * 255),
    ),
    "12-bit pgm": (
        "a.pgm",
        lambda: b"P5 6 5 4095\n" + np.rint(RAMP * 4095).astype(">u2").tobytes(),
        lambda: ramp(4095),
    ),
    "14 bits in 16": ("a.png", lambda: encode(deep(16383), "PNG"), lambda: ramp(16383)),
    "12 bits in 16, png": ("a.png", lambda: encode(deep(4095), "PNG"), lambda: ramp(4095)),
    "12 bits in 16, tiff": ("a.tif", lambda: encode(deep(4095), "TIFF"), lambda: ramp(4095)),
    "10 bits in 16": ("a.png", lambda: encode(deep(1023), "PNG"), lambda: ramp(1023)),
    "8 bits in 16": ("a.png", lambda: encode(deep(255), "PNG"), lambda: grey(RAMP * 255)),
    "32-bit tiff": ("a.tif", lambda: encode(deep(65535, np.int32), "TIFF"), lambda: grey(RAMP * 255)),
    "float tiff from 0 to 1": ("a.tif", lambda: encode(deep_float(1), "TIFF"), lambda: grey(RAMP * 255)),
    "float tiff from 0 to 255": ("a.tif", lambda: encode(deep_float(255), "TIFF"), lambda: grey(RAMP * 255)),
    "float tiff from 0 to 65535": ("a.tif", lambda: encode(deep_float(65535), "TIFF"), lambda: grey(RAMP * 255)),
    "16-bit colours": (
        "a.png",
        lambda: png_16_bit_colours(rgb().astype(np.int64) * 257),
        rgb,
    ),
    "black 16-bit grey": ("a.png", lambda: encode(deep(0), "PNG"), lambda: flat(BLACK)),
    # Transparency
    "RGBA": ("a.png", lambda: encode(with_alpha(0), "PNG"), lambda: half_white(RED)),
    "RGBA, half": ("a.png", lambda: encode(with_alpha(51), "PNG"), lambda: half_white(RED, 51)),
    "RGBA, opaque": ("a.png", lambda: encode(with_alpha(255), "PNG"), lambda: flat(RED)),
    "RGBA webp": ("a.webp", lambda: encode(with_alpha(0), "WEBP", lossless=True), lambda: half_white(RED)),
    "RGBA tiff": ("a.tif", lambda: encode(with_alpha(0), "TIFF"), lambda: half_white(RED)),
    "LA": ("a.png", lambda: encode(Image.new("LA", SIZE, (0, 0)), "PNG"), lambda: flat(WHITE)),
    "palette with a transparent colour": ("a.png", lambda: palette(0), lambda: half_white(RED)),
    "palette with alphas": ("a.png", lambda: palette(b"\x00\xff"), lambda: half_white(RED)),
    "transparent colour": (
        "a.png",
        lambda: encode(Image.new("RGB", SIZE, RED), "PNG", transparency=RED),
        lambda: flat(WHITE),
    ),
    "transparent grey": ("a.png", lambda: encode(Image.new("L", SIZE, 7), "PNG", transparency=7), lambda: flat(WHITE)),
    "transparent 16-bit grey": (
        "a.png",
        lambda: encode(Image.new("I;16", SIZE, 700), "PNG", transparency=700),
        lambda: flat(WHITE),
    ),
    "transparent gif": ("a.gif", lambda: encode(with_alpha(0), "GIF"), lambda: half_white(RED)),
    # Orientation, by the definition of EXIF 2.3: where row 0 and column 0 of the stored image are seen
    "orientation 1": ("a.png", lambda: oriented(1), rgb),
    "orientation 2": ("a.png", lambda: oriented(2), lambda: rgb()[:, ::-1]),
    "orientation 3": ("a.png", lambda: oriented(3), lambda: rgb()[::-1, ::-1]),
    "orientation 4": ("a.png", lambda: oriented(4), lambda: rgb()[::-1]),
    "orientation 5": ("a.png", lambda: oriented(5), lambda: rgb().swapaxes(0, 1)),
    "orientation 6": ("a.png", lambda: oriented(6), lambda: np.rot90(rgb(), -1)),
    "orientation 7": ("a.png", lambda: oriented(7), lambda: np.rot90(rgb(), 2).swapaxes(0, 1)),
    "orientation 8": ("a.png", lambda: oriented(8), lambda: np.rot90(rgb())),
    "short text": ("a.png", lambda: with_text(1000), rgb),
}

REFUSED: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "empty": ("a.jpg", lambda: b"", "it is empty"),
    "text": ("a.png", lambda: b"not an image", "no image that Pillow can read"),
    "truncated png": ("a.png", lambda: encode(Image.effect_noise((64, 64), 90), "PNG")[:1500], "a.png"),
    "truncated jpeg": ("a.jpg", lambda: encode(Image.effect_noise((64, 64), 90), "JPEG")[:1500], "truncated"),
    "truncated gif": ("a.gif", lambda: encode(Image.effect_noise((64, 64), 90), "GIF")[:1500], "a.gif"),
    "header of a jpeg": ("a.jpg", lambda: encode(picture(), "JPEG")[:10], "a.jpg"),
    "flipped bit in a png": (
        "a.png",
        lambda: (lambda file: file[:45] + bytes([file[45] ^ 1]) + file[46:])(encode(picture(), "PNG")),
        "a.png",
    ),
    "long text": ("a.png", lambda: with_text(3_000_000), "TEXT_CHUNK"),
    "long text at the end": ("a.png", lambda: with_text_at_the_end(3_000_000), "TEXT_CHUNK"),
    "200 megapixels": ("a.png", lambda: encode(Image.new("1", (20_000, 10_000)), "PNG"), "200000000 pixels"),
    "negative floats": ("a.tif", lambda: encode(Image.fromarray(-RAMP.astype(np.float32)), "TIFF"), "from -1 to"),
    "NaN": ("a.tif", lambda: encode(Image.fromarray(np.full((5, 6), np.nan, np.float32)), "TIFF"), "nan"),
    "large floats": ("a.tif", lambda: encode(Image.fromarray(RAMP.astype(np.float32) * 1e6), "TIFF"), "1e.06"),
    "large integers": ("a.tif", lambda: encode(deep(2**30, np.int32), "TIFF"), "1.07374e.09"),
    "12 bits in 16-bit colours": ("a.png", lambda: png_16_bit_colours(rgb().astype(np.int64) * 16), "12 bits are used"),
    "zip": ("a.jpg", lambda: b"PK\x03\x04" + bytes(50), "no image that Pillow can read"),
}


def deep_float(top: float) -> Image.Image:
    return Image.fromarray((RAMP * top).astype(np.float32))


def put(folder: Path, name: str, content: bytes) -> Path:
    """Write an image of the class `cat`, and `content` to the file `name` of the class `dog`. Return this file."""
    for label in ("cat", "dog"):
        (folder / label).mkdir(parents=True)
    Image.new("RGB", (8, 8), "green").save(folder / "cat" / "green.png")
    (folder / "dog" / name).write_bytes(content)
    return folder / "dog" / name


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # `datasets` leaves GIF and TIFF open
@pytest.mark.parametrize("case", RIGHT)
def test_odd_file_has_the_right_pixels(case: str, tmp_path: Path) -> None:
    name, content, expected = RIGHT[case]
    put(tmp_path / "pets", name, content())
    split = read_splits(str(tmp_path / "pets"))["train"]
    assert split["label"][:] == [0, 1]
    image = to_rgb(split[1]["image"])
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), expected())
    gc.collect()


def read_all(folder: Path) -> None:
    split = read_splits(str(folder))["train"]
    list(build_loader(split, F.pil_to_tensor, batch_size=1, shuffle=False, seed=0))


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # from Pillow, about the damaged file
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("case", REFUSED)
def test_unreadable_file_is_refused_by_its_name(case: str, tmp_path: Path) -> None:
    name, content, reason = REFUSED[case]
    path = put(tmp_path / "pets", name, content())
    with pytest.raises(ValueError, match=reason) as refused:
        read_all(tmp_path / "pets")
    message = str(refused.value)
    assert str(path) in message
    assert len(message.splitlines()) == 1
    del refused
    gc.collect()


FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA", "PCX", "SGI")
NOISE = Image.effect_noise((64, 64), 90).convert("RGB")


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data", "ignore:Truncated File Read")  # from Pillow, about TIFF
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_truncated_file_is_refused_when_it_is_checked(kind: str, share: float) -> None:
    content = encode(NOISE, kind)
    check_image(content)
    with pytest.raises(ValueError, match=r"\w"):  # each format has its own message
        check_image(content[: int(share * len(content))])


@pytest.mark.parametrize(("options", "is_decoded"), [({}, False), ({"progressive": True}, False), ({}, True)])
def test_jpeg_is_decoded_only_if_its_end_is_in_doubt(
    options: dict, is_decoded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []
    load = JpegImageFile.load
    monkeypatch.setattr(JpegImageFile, "load", lambda image: decoded.append(True) or load(image))
    # Cameras append, for example, a film to a photograph.
    check_image(encode(NOISE, "JPEG", **options) + is_decoded * b"film")
    assert bool(decoded) == is_decoded


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow cannot write AVIF")
def test_avif_is_read_where_pillow_can() -> None:
    content = encode(Image.new("RGB", (32, 32), WHITE), "AVIF")
    check_image(content)
    assert identify(io.BytesIO(content)) == "AVIF"
    assert np.asarray(to_rgb(Image.open(io.BytesIO(content)))).min() >= 254


def test_rgb_is_returned_as_it_is() -> None:
    image = picture()
    assert to_rgb(image) is image


def test_only_formats_with_pixels_are_images() -> None:
    assert all(is_image_suffix(suffix) for suffix in (".jpg", ".JPG", ".png", ".tif", ".webp", ".bmp"))
    assert not any(is_image_suffix(suffix) for suffix in ("", ".heic", ".pdf", ".zip", ".csv", ".mpg", ".eps"))
    assert not any(is_image_suffix(suffix) for suffix in (".h5", ".hdf", ".grib", ".bufr", ".wmf", ".emf"))
    assert identify(io.BytesIO(b"PK\x03\x04")) is None


HEIC = b"\0\0\0\x18ftypheic" + bytes(40)


def test_heic_without_its_package_names_the_package(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An iPhone writes such files; some programs only rename them to .jpg."""
    if "heif" in {name.lower() for name in Image.registered_extensions().values()}:
        pytest.skip("pillow-heif is installed")
    put(tmp_path / "pets", "a.HEIC", HEIC)
    put_second = tmp_path / "pets" / "dog" / "green.png"
    Image.new("RGB", (8, 8), "blue").save(put_second)
    assert len(read_splits(str(tmp_path / "pets"))["train"]) == 2
    assert "left out 1 HEIC image (pip install pillow-heif, or convert it to JPEG) (dog/a.HEIC)" in caplog.text
    (tmp_path / "pets" / "dog" / "a.HEIC").rename(tmp_path / "pets" / "dog" / "a.jpg")
    with pytest.raises(ValueError, match=r"dog/a\.jpg.*it is an HEIC image: pip install pillow-heif"):
        read_splits(str(tmp_path / "pets"))


def test_heic_is_read_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    registered = []
    package = types.SimpleNamespace(register_heif_opener=lambda: registered.append(True))
    monkeypatch.setitem(sys.modules, "pillow_heif", package)
    runpy.run_path(pixels.__file__)
    assert registered == [True]
