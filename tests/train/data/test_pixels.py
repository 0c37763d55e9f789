"""Image files as people have them: every kind of pixels, what changes how they look, damage."""

import collections
import io
import random
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageCms

from models.errors import UserError
from tests.fuzz import FEW_OR_MANY, fuzz
from train.data import pixels
from train.data.pixels import decoded, fitted

pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow warns of odd data that it reads all the same.

RAMP = np.arange(256, dtype=np.uint16).reshape(16, 16)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def changed(content: bytes, size: int) -> tuple[np.ndarray, dict[str, int]]:
    """The pixels, and what was done to them."""
    changes: collections.Counter[str] = collections.Counter()
    return decoded(content, size, "x", changes), dict(+changes)


def test_whatever_is_stored_becomes_rgb() -> None:
    red = Image.new("RGBA", (4, 4), (255, 0, 0, 255))
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    cases = {
        "rgba": (red, (255, 0, 0)),
        "transparent": (half, (255, 255, 255)),
        "grey": (Image.new("L", (4, 4), 7), (7, 7, 7)),
        "grey with alpha": (Image.new("LA", (4, 4), (7, 0)), (255, 255, 255)),
        "black and white": (Image.new("1", (4, 4), 1), (255, 255, 255)),
        "palette": (red.convert("RGB").convert("P"), (255, 0, 0)),
    }
    for name, (image, colour) in cases.items():
        pixels_SSC, changes = changed(encoded(image), 4)
        assert (pixels_SSC == colour).all(), name
        assert changes == ({pixels.ON_WHITE: 1} if name in ("transparent", "grey with alpha") else {}), name
    cmyk = decoded(encoded(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG"), 4, "cmyk")
    assert cmyk.shape == (4, 4, 3) and (cmyk > 250).all()


@pytest.mark.parametrize(
    ("kind", "values", "options"),
    [
        ("PNG", RAMP * 257, {}),
        ("TIFF", RAMP * 257, {}),
        ("TIFF", RAMP * 257, {"compression": "tiff_lzw"}),
        ("PPM", RAMP * 257, {}),
        ("PNG", RAMP * 256 + 255, {}),
    ],
)
def test_grey_of_16_bits_is_scaled(kind: str, values: np.ndarray, options: dict) -> None:
    pixels_SSC, changes = changed(encoded(Image.fromarray(values.astype(np.uint16)), kind, **options), 16)
    np.testing.assert_array_equal(pixels_SSC, np.repeat(RAMP[..., None], 3, axis=2))
    assert changes == {pixels.SCALED: 1}


def test_the_transparent_value_of_16_bit_grey_is_white() -> None:
    pixels_SSC, _ = changed(encoded(Image.fromarray(RAMP * 257), transparency=257), 16)
    assert pixels_SSC[0, 1].tolist() == [255] * 3 and pixels_SSC[0, 2].tolist() == [2] * 3


@pytest.mark.parametrize(
    ("image", "kind", "message"),
    [
        (Image.fromarray(RAMP.astype(np.float32)), "TIFF", "its pixels are floating-point numbers, whose range"),
        (Image.fromarray(RAMP.astype(np.int32)), "TIFF", "its pixels are 32-bit numbers, whose range is not known"),
        (Image.new("LAB", (4, 4)), "TIFF", "its pixels are of the kind LAB, expected"),
        (Image.new("RGB", (4, 4)), "ICO", "it is in none of the formats BMP, GIF"),
    ],
)
def test_pixels_of_unknown_range_are_refused(image: Image.Image, kind: str, message: str) -> None:
    with pytest.raises(UserError, match=f"x cannot be read as an image \\({message}"):
        decoded(encoded(image, kind), 4, "x")


# The corners' colours, clockwise from the upper left, as they are seen when EXIF says that the picture lies so.
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize(
    ("orientation", "corners"),
    [
        (1, "abcd"),
        (2, "badc"),
        (3, "cdab"),
        (4, "dcba"),
        (5, "adcb"),
        (6, "dabc"),
        (7, "cbad"),
        (8, "bcda"),
        (9, "abcd"),
    ],
)
def test_pictures_stand_as_viewers_show_them(kind: str, orientation: int, corners: str) -> None:
    values = {"a": 0, "b": 80, "c": 160, "d": 240}
    stored = np.array([[values["a"], values["b"]], [values["d"], values["c"]]], np.uint8).repeat(16, 0).repeat(16, 1)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    pixels_SSC, changes = changed(encoded(Image.fromarray(stored), kind, exif=exif, **options), 32)
    seen = "".join(min(values, key=lambda c: abs(values[c] - int(pixels_SSC[y, x, 0]))) for y, x in SPOTS)
    assert seen == corners
    assert kind == "TIFF" or changes == ({pixels.TURNED: 1} if 1 < orientation < 9 else {})


SPOTS = ((8, 8), (8, 24), (24, 24), (24, 8))


def test_damaged_exif_data_leaves_a_picture_as_it_lies() -> None:
    content = encoded(Image.fromarray(RAMP.astype(np.uint8)), exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    np.testing.assert_array_equal(decoded(content, 16, "x")[..., 0], RAMP)


def test_colours_are_brought_from_their_profile_to_srgb() -> None:
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = Image.new("RGB", (4, 4), (200, 100, 50))
    for profile, done in ((None, {}), (srgb, {}), (b"no profile", {pixels.UNREADABLE_PROFILE: 1})):
        pixels_SSC, changes = changed(encoded(image, icc_profile=profile), 4)
        assert pixels_SSC[0, 0].tolist() == [200, 100, 50] and changes == done
    _, changes = changed(encoded(image, icc_profile=lab), 4)
    assert changes == {pixels.UNREADABLE_PROFILE: 1}
    pixels_SSC, changes = changed(encoded(image, icc_profile=wide_gamut(srgb)), 4)
    assert changes == {pixels.CONVERTED: 1} and pixels_SSC[0, 0, 0] != 200


def wide_gamut(srgb: bytes) -> bytes:
    """A profile that is not called sRGB, with red and green swapped."""
    count = struct.unpack(">I", srgb[128:132])[0]
    tags = [srgb[132 + 12 * i : 144 + 12 * i] for i in range(count)]
    swap = {b"rXYZ": b"gXYZ", b"gXYZ": b"rXYZ"}
    table = b"".join(swap.get(tag[:4], tag[:4]) + tag[4:] for tag in tags)
    return (srgb[:132] + table + srgb[132 + 12 * count :]).replace(
        "sRGB".encode("utf-16-be"), "wide".encode("utf-16-be")
    )


def test_the_first_of_several_frames_is_taken() -> None:
    frames = [Image.new("L", (4, 4), value) for value in (10, 200)]
    for kind in ("GIF", "TIFF", "PNG", "WEBP"):
        options = {"lossless": True} if kind == "WEBP" else {}
        content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        pixels_SSC, changes = changed(content, 4)
        assert (pixels_SSC == 10).all() and changes == {pixels.FIRST_FRAME: 1}, kind


def test_what_is_no_image_is_one_sentence() -> None:
    cases = {
        b"no image": "it is in none of the formats",
        b"": "the file is empty",
        encoded(Image.effect_noise((64, 64), 50))[:500]: "",
    }
    for content, reason in cases.items():
        with pytest.raises(UserError, match=rf"image 3 of x cannot be read as an image \(.*{reason}"):
            decoded(content, 4, "image 3 of x")
    with pytest.raises(UserError, match="x is a Git LFS pointer, not the file itself: fetch it"):
        decoded(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", 4, "x")


def test_the_middle_is_cut_out() -> None:
    wide = np.zeros((4, 10, 3), np.uint8)
    wide[:, 3:7] = 200
    assert (fitted(Image.fromarray(wide), 4) == 200).all()
    tall = fitted(Image.fromarray(wide.transpose(1, 0, 2)).resize((40, 100), Image.Resampling.BOX), 4)
    assert tall.shape == (4, 4, 3) and tall[1:3].min() > 180


@pytest.mark.parametrize("shape", [(7, 13), (31, 9), (5, 5), (40, 40), (1, 90), (12, 47)])
@pytest.mark.parametrize("size", [1, 5, 12, 40])
def test_only_what_is_kept_is_computed(shape: tuple[int, int], size: int) -> None:
    """The same pixels as of the whole picture, resized and then cut; grey ones, for the filter overshoots and clips."""
    image = Image.fromarray(np.random.default_rng(0).integers(100, 156, (*shape, 3), np.uint8))
    scaled = [max(size, round(length * size / min(image.size))) for length in image.size]
    left, top = ((length - size) // 2 for length in scaled)
    whole = image if min(image.size) == size else image.resize((scaled[0], scaled[1]), Image.Resampling.LANCZOS)
    expected = np.asarray(whole.crop((left, top, left + size, top + size)))
    np.testing.assert_allclose(fitted(image, size).astype(int), expected.astype(int), atol=1)


# Damage of every kind.


def sources() -> list[bytes]:
    """A small file of every format and kind of pixels."""
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (9, 7, 3), np.uint8))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    made = [encoded(noise, kind, exif=exif) for kind in ("JPEG", "PNG", "WEBP", "TIFF")]
    made += [encoded(noise, kind, icc_profile=profile) for kind in ("JPEG", "PNG", "TIFF")]
    made += [encoded(noise.convert(mode)) for mode in ("1", "L", "P", "LA", "RGBA")]
    made += [encoded(noise, kind) for kind in ("BMP", "PPM", "GIF")]
    made += [encoded(noise, "TIFF", compression=how) for how in ("tiff_lzw", "tiff_adobe_deflate", "packbits")]
    made += [encoded(noise.convert("CMYK"), kind) for kind in ("JPEG", "TIFF")]
    made += [encoded(noise, kind, save_all=True, append_images=[noise]) for kind in ("GIF", "PNG", "WEBP", "TIFF")]
    made += [encoded(Image.fromarray(RAMP * 257), kind) for kind in ("PNG", "TIFF", "PPM")]
    return made


SOURCES = sources()
DAMAGE: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "cut": lambda content, draw: content[: draw.randrange(len(content))],
    "changed bytes": lambda content, draw: scattered(content, draw, draw.randint(1, 8)),
    "a changed header": lambda content, draw: scattered(content[:64], draw, draw.randint(1, 4)) + content[64:],
    "a hole": lambda content, draw: filled(content, draw, b"\0"),
    "a run of ones": lambda content, draw: filled(content, draw, b"\xff"),
    "a part twice": lambda content, draw: content[: (at := draw.randrange(len(content)))] + content[at // 2 :],
    "another's end": lambda content, draw: content[: draw.randrange(len(content))] + draw.choice(SOURCES)[40:],
}


def scattered(content: bytes, draw: random.Random, count: int) -> bytes:
    changed = bytearray(content)
    for _ in range(count):
        changed[draw.randrange(len(changed))] = draw.randrange(256)
    return mended(bytes(changed))


def filled(content: bytes, draw: random.Random, byte: bytes) -> bytes:
    first = draw.randrange(len(content))
    length = min(draw.randint(1, 64), len(content) - first)
    return content[:first] + byte * length + content[first + length :]


def mended(content: bytes) -> bytes:
    """A PNG with the check sums of its chunks put right, which would hide all other damage."""
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        return content
    parts, at = [content[:8]], 8
    while at + 8 <= len(content):
        stop = at + 8 + int.from_bytes(content[at : at + 4], "big")
        parts += [content[at:stop], zlib.crc32(content[at + 4 : stop]).to_bytes(4, "big")]
        at = stop + 4
    return b"".join(parts)


def survives(source: int, kind: str, seed: int) -> None:
    """Pixels, or one sentence."""
    try:
        made = decoded(DAMAGE[kind](SOURCES[source], random.Random(seed)), 5, "x")
    except UserError as error:
        assert str(error).startswith("x ") and "0x7f" not in str(error)
    else:
        assert made.shape == (5, 5, 3) and made.dtype == np.uint8


@pytest.mark.parametrize("kind", ["L", "I;16"])
def test_long_pictures_are_cut_to_what_their_middle_shows(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = np.random.default_rng(0).integers(0, 250, (7 * 31 + 3, 7), np.uint16)
    stored = stored * 256 if kind == "I;16" else stored.astype(np.uint8)
    contents = [encoded(Image.fromarray(array)) for array in (stored, stored.T.copy())]
    cut = [decoded(content, 5, "x") for content in contents]
    monkeypatch.setattr(pixels, "_middle", lambda image: image)
    for content, made in zip(contents, cut, strict=True):
        np.testing.assert_allclose(decoded(content, 5, "x").astype(int), made, atol=3)


@pytest.mark.parametrize("examples", FEW_OR_MANY)
def test_damaged_files_are_pixels_or_one_sentence(examples: int) -> None:
    draws = st.tuples(st.integers(0, len(SOURCES) - 1), st.sampled_from(sorted(DAMAGE)), st.integers(0, 2**32))
    fuzz(400 * examples, draws, lambda draw: survives(*draw))


@pytest.mark.parametrize("examples", FEW_OR_MANY)
def test_any_bytes_are_one_sentence(examples: int) -> None:
    fuzz(50 * examples, st.binary(max_size=200), lambda content: refused(content))


def refused(content: bytes) -> None:
    with pytest.raises(UserError):
        decoded(content, 5, "x")
