"""Image files: every mode and format to the right pixels, which files are found, and which are refused."""

import os
import struct
import subprocess
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PIXELS, tree
from PIL import ExifTags, Image, ImageFile

from config import UserError
from images import images

GENERATOR = np.random.RandomState(0)
NOISE = GENERATOR.randint(0, 256, (64, 64, 3)).astype(np.uint8)
GRAIN = GENERATOR.randint(0, 256, (6, 9))
GRAIN[0, :2] = 0, 255


def saved(path: Path, image, **options) -> np.ndarray:
    """What is read of an image (Pillow's, or an array) that was saved to a path."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(path, **options)
    return images.pixels_of(path)


# ---------------------------------------------------------------- eight bits
@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "LA", "RGB", "CMYK", "1"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    image = Image.fromarray(PIXELS).convert(mode)
    pixels = saved(tmp_path / "a.tif", image)
    assert (pixels == np.asarray(image.convert("RGB"))).all() and pixels.shape == PIXELS.shape


def test_transparent_is_white(tmp_path):
    """Clear, half clear and opaque red, in every mode that can say so."""
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[..., 0], rgba[0, :, 3] = 200, (0, 128, 255)
    assert saved(tmp_path / "a.png", rgba)[0].tolist() == [[255] * 3, [227, 127, 127], [200, 0, 0]]
    gray = Image.merge("LA", (Image.new("L", (2, 1), 40), Image.fromarray(np.array([[0, 255]], np.uint8))))
    assert saved(tmp_path / "b.png", gray)[0].tolist() == [[255] * 3, [40] * 3]
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([9, 8, 7, 30, 60, 90])
    assert saved(tmp_path / "c.png", palette, transparency=0)[0].tolist() == [[255] * 3, [30, 60, 90]]
    bgrx = np.dstack([PIXELS, np.zeros((5, 4), np.uint8)])
    assert (saved(tmp_path / "d.png", bgrx) == PIXELS).all(), "everywhere: a camera's unused fourth byte"


TURNED = np.arange(24, dtype=np.uint8).reshape(2, 4, 3) * 10
STORED = {  # EXIF orientation -> what a camera stores of TURNED
    1: TURNED,
    3: TURNED[::-1, ::-1],
    5: TURNED.transpose(1, 0, 2),
    6: np.rot90(TURNED),
    8: np.rot90(TURNED, -1),
}


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation(tmp_path, orientation):
    """Of a file and of Pillow's image."""
    pixels = np.ascontiguousarray(STORED[orientation])
    for ending in ("png", "tif"):
        assert (saved(tmp_path / f"a.{ending}", pixels, exif=turned(orientation)) == TURNED).all()
        with Image.open(tmp_path / f"a.{ending}") as opened:
            assert (images.pixels_of(opened) == TURNED).all()
    gray = saved(tmp_path / "gray.tif", pixels[..., 0].copy(), exif=turned(orientation))
    assert (gray == TURNED[..., :1]).all()
    late = png(pixels.astype(np.uint16) * 257, turned(orientation).tobytes().removeprefix(b"Exif\0\0"))
    (tmp_path / "late.png").write_bytes(late)
    for path in tmp_path.iterdir():
        assert images.size_of(path) == images.pixels_of(path).shape[:2] == TURNED.shape[:2], path


# ---------------------------------------------------------------- more than eight bits
def in_set(folder: Path, *several: np.ndarray) -> tuple[list[np.ndarray], images.PixelScale]:
    """What is read of pictures that are the training pictures of a data set, and its scale."""
    names = [folder / f"{i}.tif" for i in range(len(several))]
    for name, picture in zip(names, several):
        Image.fromarray(picture).save(name)
    scale = images.PixelScale(images.measured(names))
    return [images.pixels_of(name, scale)[..., 0] for name in names], scale


@pytest.mark.parametrize("bits", [8, 12, 16])  # of a file of 16
@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.float32])
def test_the_same_grain_in_any_number_of_bits(tmp_path, capsys, bits, kind):
    """Of a 16-bit file, of whole numbers, of floats: the scale is the data set's, and said."""
    (pixels,), _ = in_set(tmp_path, (GRAIN * (2**bits - 1) / 255).round().astype(kind))
    assert (pixels == GRAIN).all()
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and f"0 is black and {2**bits - 1} white" in told


def test_the_scale_is_that_of_the_set_and_not_of_the_picture(tmp_path):
    """A dark picture stays dark; one pixel a little beyond 1.0 makes none black."""
    bright = (GRAIN / 255).astype(np.float32)
    beyond = bright.copy()
    beyond[0, 1] = 1.0001
    (first, second, dark), scale = in_set(tmp_path, bright, beyond, bright / 4)
    assert (first == GRAIN).all() and (second == GRAIN).all()
    assert (dark == np.round(GRAIN / 4)).all() and scale.ranges == {"float": [0, 1]}
    (signed,), _ = in_set(tmp_path, np.array([[-100, 0, 255]], np.int32))
    assert signed[0].tolist() == [78, 128, 255], "as far below 0 as above"


def test_a_picture_that_is_not_finite_decides_no_scale(tmp_path):
    for name, value in (("a", np.inf), ("b", 0.5)):
        Image.fromarray(np.full((4, 5), value, np.float32)).save(tmp_path / f"{name}.tif")
    assert images.measured([tmp_path / "a.tif", tmp_path / "b.tif"]) == {"float": [0, 1]}


def test_what_exceeds_the_scale_is_clipped(tmp_path):
    _, scale = in_set(tmp_path, (GRAIN * 16).astype(np.uint16))
    later = saved(tmp_path / "later.png", np.array([[0, 4095, 4096, 65535]], np.uint16))
    assert later[0, :, 0].tolist() == [0, 16, 16, 255], "no set, no scale: that of the file"
    pixels = images.pixels_of(tmp_path / "later.png", scale)
    assert pixels[0, :, 0].tolist() == [0, 255, 255, 255]


def png(pixels: np.ndarray, exif: bytes = b"") -> bytes:
    """A PNG of 16 bits a colour, which Pillow does not write: (H, W, 3), or 4 with transparency."""
    height, width, colours = pixels.shape
    head = struct.pack(">IIBBBBB", width, height, 16, {3: 2, 4: 6}[colours], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"eXIf", exif), (b"IEND", b"")]
    packed = [struct.pack(">I", len(p)) + n + p + struct.pack(">I", zlib.crc32(n + p)) for n, p in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def test_twelve_bits_of_colour(tmp_path):
    """All of them are read, of a file and of Pillow's image, and the picture is turned as any other."""
    colours = np.stack([GRAIN, 255 - GRAIN, GRAIN // 2], -1)
    stored, path = (colours * (4095 / 255)).round().astype(np.uint16), tmp_path / "a.png"
    path.write_bytes(png(stored[::-1, ::-1], turned(3).tobytes().removeprefix(b"Exif\0\0")))
    scale = images.PixelScale(images.measured([path]))
    assert (images.pixels_of(path, scale) == colours).all() and scale.ranges == {"integer": [0, 4095]}
    with Image.open(path) as opened:
        assert (images.pixels_of(opened, scale) == colours).all()


def test_a_tiff_that_tells_its_bits(tmp_path):
    """Twelve, though 256 is its largest value."""
    tags = {256: 2, 257: 1, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: 4}
    fields = b"".join(struct.pack("<HHII", tag, 3, 1, value) for tag, value in tags.items())
    content = struct.pack("<4sI4sH", b"II*\0", 12, b"\x10\0\0\0", len(tags)) + fields + bytes(4)
    (tmp_path / "a.tif").write_bytes(content)
    assert images.measured([tmp_path / "a.tif"]) == {"integer": [0, 4095]}


# ---------------------------------------------------------------- what is no picture
@pytest.mark.parametrize(
    "picture",
    [torch.zeros(4, 5, 3, dtype=torch.uint8), np.zeros((4, 5, 3), np.float32), np.zeros((3, 4, 5), np.uint8)]
    + [Image.fromarray(np.full((4, 5), np.nan, np.float32))],
    ids=["tensor", "floats", "planes", "not finite"],
)
def test_what_is_no_picture_is_refused_in_one_line(picture):
    with pytest.raises(UserError, match="Pillow image") as told:
        images.pixels_of(picture)
    assert "\n" not in str(told.value)


# ---------------------------------------------------------------- formats
def test_formats(tmp_path):
    for ending in ("gif", "jfif", "jp2", "avif", "webp", "bmp", "tiff", "ppm", "tga", "JPG"):
        assert np.abs(saved(tmp_path / f"a.{ending}", PIXELS).astype(int) - 90).max() <= 2
    assert len(images.images_below(tmp_path)) == 10


def test_first_frame_is_taken_and_said_once(tmp_path, capsys):
    frames = [Image.new("RGB", (6, 6), (shade, shade, shade)) for shade in (10, 250)]
    saved(tmp_path / "one.gif", frames[0])
    assert capsys.readouterr().err == ""
    for ending in ("gif", "webp", "png", "tif"):
        pixels = saved(tmp_path / f"a.{ending}", frames[0], save_all=True, append_images=frames[1:])
        assert np.abs(pixels.astype(int) - 10).max() <= 2
    assert capsys.readouterr().err.count("several frames") == 1


def test_no_program_is_started_for_an_image(tmp_path, monkeypatch):
    """PostScript would be given to Ghostscript, whatever the file is called."""
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n" * 3)
    monkeypatch.setattr(subprocess, "Popen", None)
    with pytest.raises(UserError, match="a.png"):
        images.pixels_of(tmp_path / "a.png")
    assert not {".eps", ".pdf"} & images.ENDINGS


# ---------------------------------------------------------------- refused
@pytest.mark.parametrize("ending", ["jpg", "png", "gif", "bmp", "tif", "webp", "jp2", "avif", "ppm"])
def test_truncated_files_are_refused_by_name(tmp_path, ending):
    """Cut anywhere in its first nine tenths, no file gives pixels (gray ones, for instance)."""
    path = tmp_path / f"cut.{ending}"
    saved(path, NOISE)
    content = path.read_bytes()
    for share in (0, 0.02, 0.3, 0.6, 0.9):
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(UserError, match="cut"):
            images.pixels_of(path)


def test_too_many_pixels_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    saved(tmp_path / "a.png", Image.new("L", (101, 100)))
    monkeypatch.setattr(images, "MOST_PIXELS", 100 * 100)
    monkeypatch.setattr(ImageFile.ImageFile, "load", None)
    with pytest.raises(UserError, match="a.png.*101 x 100 pixels"):
        images.pixels_of(tmp_path / "a.png")


# ---------------------------------------------------------------- which files
def test_what_is_found(tmp_path, capsys):
    hidden = ("c/.3.png", ".ipynb_checkpoints/4.png", "__MACOSX/5.png")
    tree(tmp_path, "b/2.png", "a/1.JPEG", *hidden)
    for name in ("b/notes.txt", "b/more.txt", "a/table.csv", "README"):
        (tmp_path / name).write_text("no image")
    assert images.images_below(tmp_path) == [tmp_path / "a/1.JPEG", tmp_path / "b/2.png"]
    told = capsys.readouterr().err
    assert "4 files or folders (" in told and ".txt 2" in told and told.count("\n") == 1
    with pytest.raises(UserError, match="no images in "):
        images.images_below(tmp_path, left_out=("a", "b", "c"))
    told = capsys.readouterr().err
    assert "4 files or folders (" in told and "a/ 1" in told and "without ending 1" in told


def test_links_and_pipes(tmp_path):
    """A folder that is linked twice is searched once, also into itself; what is no file is no image. Neither
    finding nor reading waits for a pipe's other end."""
    tree(tmp_path / "elsewhere", "1.png")
    (tmp_path / "set").mkdir()
    for link in ("elsewhere/loop", "set/linked", "set/again"):
        (tmp_path / link).symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set/self.png").symlink_to("self.png")
    os.mkfifo(pipe := tmp_path / "set/b.jpg")
    counted = Counter()
    assert [p.name for p in images.images_below(tmp_path / "set", counted)] == ["1.png"]
    assert counted == {"no regular file": 2}
    with pytest.raises(UserError, match="b.jpg.*no regular file"):
        images.pixels_of(pipe)
    assert images.content_hash(pipe) == "unreadable"


def test_content_hash(tmp_path):
    """Any other byte is noticed, at once and with the same size; place and time are not."""
    content, path, copy = GENERATOR.bytes(200_000), tmp_path / "a.png", tmp_path / "deep.png"
    for each in (path, copy):
        each.write_bytes(content)
    os.utime(copy, (1, 1))
    before = images.content_hash(path)
    assert images.content_hash(copy) == before and len(before) == 32
    for place in (0, 100_000, 199_999):
        copy.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert images.content_hash(copy) != before
    assert images.content_hash(tmp_path / "absent") == "unreadable"
