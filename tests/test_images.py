"""Image files: every mode and format to the right pixels, which files are found, and which are refused."""

import os
import struct
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, write_image
from PIL import ExifTags, Image, ImageFile

from config import UserError
from detector import pictures
from images import images
from images.pixel_scale import PixelScale

GENERATOR = np.random.RandomState(0)
PIXELS = np.full((5, 4, 3), 90, np.uint8)
RAMP = np.linspace(0, 65535, 20).round().astype(np.uint16).reshape(4, 5)


@pytest.fixture(autouse=True)
def not_told():
    images._frames_told[0] = False


def saved(path: Path, image, **options) -> np.ndarray:
    """What is read of an image (Pillow's, or an array) that was saved to a path."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(path, **options)
    return images.read_image(path)


# ---------------------------------------------------------------- modes
@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "LA", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    pixels = saved(tmp_path / ("a.jpg" if mode == "CMYK" else "a.png"), Image.fromarray(PIXELS).convert(mode))
    assert pixels.shape == (5, 4, 3) and pixels.dtype == np.uint8


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_sixteen_bits_are_scaled(tmp_path, ending):
    pixels = saved(tmp_path / f"a.{ending}", RAMP)
    assert (pixels == np.round(RAMP / 257).astype(np.uint8)[..., None]).all()
    assert pixels.min() == 0 and pixels.max() == 255 and len(np.unique(pixels)) == 20


def test_big_endian_sixteen_bits(tmp_path):
    image = Image.frombytes("I;16B", (5, 4), RAMP.astype(">u2").tobytes())
    image.save(tmp_path / "a.tif")
    wanted = np.round(RAMP / 257).astype(np.uint8)
    assert (images.read_image(tmp_path / "a.tif")[..., 1] == wanted).all()


GRAIN = GENERATOR.randint(0, 256, (6, 9))
GRAIN[0, :2] = 0, 255


def in_set(folder: Path, *pictures: np.ndarray) -> tuple[list[np.ndarray], PixelScale]:
    """What is read of pictures that are the training pictures of a data set, and its scale."""
    names = [folder / f"{i}.tif" for i in range(len(pictures))]
    for name, picture in zip(names, pictures):
        Image.fromarray(picture).save(name)
    scale = PixelScale(measure=lambda: images.measured(names))
    return [images.read_image(name, scale)[..., 0] for name in names], scale


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.float32])
def test_the_same_grain_in_any_number_of_bits(tmp_path, capsys, bits, kind):
    """Of a 16-bit file, of whole numbers, of floats: the scale is the data set's, and said."""
    (pixels,), scale = in_set(tmp_path, (GRAIN * (2**bits - 1) / 255).round().astype(kind))
    assert (pixels == GRAIN).all() and scale.clipped == 0
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


@pytest.mark.parametrize(
    "values, wanted",
    [
        (np.array([[-100, 0, 255]], np.int32), [78, 128, 255]),
        (np.array([[0, 2**30, 2**31 - 1]], np.int32), [0, 128, 255]),
        (np.array([[-1, 0, 1]], np.float32), [0, 128, 255]),
        (np.array([[-0.01, 0.2, 1.2]], np.float32), [0, 51, 255]),
    ],
)
def test_wide_grays(tmp_path, values, wanted):
    """Signed, 32 bits, a little beyond."""
    (pixels,), _ = in_set(tmp_path, values)
    assert pixels[0].tolist() == wanted


def test_what_exceeds_the_scale_is_clipped_and_counted(tmp_path):
    _, scale = in_set(tmp_path, (GRAIN * 16).astype(np.uint16))
    later = saved(tmp_path / "later.png", np.array([[0, 4095, 4096, 65535]], np.uint16))
    assert later[0, :, 0].tolist() == [0, 16, 16, 255], "no set, no scale: that of the file"
    for _ in range(2):
        pixels = images.read_image(tmp_path / "later.png", scale)
    assert pixels[0, :, 0].tolist() == [0, 255, 255, 255]
    assert scale.beyond().startswith("2 pictures with pixels beyond [0, 4095]")
    assert PixelScale(scale.ranges).beyond() == ""


def test_a_set_of_eight_bits_is_not_decoded(tmp_path, monkeypatch, capsys):
    for name in ("a.png", "b.jpg"):
        Image.fromarray(PIXELS).save(tmp_path / name)
    monkeypatch.setattr(Image.Image, "load", None)
    monkeypatch.setattr(ImageFile.ImageFile, "load", None)
    assert images.measured(sorted(tmp_path.iterdir())) == {} and capsys.readouterr().err == ""


def png(pixels: np.ndarray, exif: bytes = b"") -> bytes:
    """A PNG of 16 bits a colour, which Pillow does not write: (H, W, 3), or 4 with transparency."""
    height, width, colours = pixels.shape
    head = struct.pack(">IIBBBBB", width, height, 16, {3: 2, 4: 6}[colours], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"eXIf", exif), (b"IEND", b"")]
    packed = [struct.pack(">I", len(p)) + n + p + struct.pack(">I", zlib.crc32(n + p)) for n, p in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def tiff(
    pixels: bytes, width: int, bits: int, photometric: int = 1, colours: int = 1, compression: int = 1
) -> bytes:
    """A TIFF of one row in little-endian order, of any number of bits."""
    tags = {
        256: width,
        257: 1,
        258: bits,
        259: compression,
        262: photometric,
        273: 8,
        277: colours,
        278: 1,
        279: len(pixels),
    }
    after, counts = 8 + len(pixels), dict.fromkeys(tags, 1)
    if colours > 1:  # their bits are elsewhere
        tags[258], counts[258] = after, colours
    fields = b"".join(struct.pack("<HHII", tag, 3, counts[tag], value) for tag, value in tags.items())
    each = struct.pack(f"<{colours}H", *[bits] * colours)
    head = struct.pack("<4sI", b"II*\0", after + len(each))
    return head + pixels + each + struct.pack("<H", len(tags)) + fields + bytes(4)


def test_twelve_bits_of_colour(tmp_path):
    """All of them are read, of a file and of Pillow's image, and the picture is turned as any other."""
    colours = np.stack([GRAIN, 255 - GRAIN, GRAIN // 2], -1)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3
    stored, path = (colours * (4095 / 255)).round().astype(np.uint16), tmp_path / "a.png"
    path.write_bytes(png(stored[::-1, ::-1], exif.tobytes().removeprefix(b"Exif\0\0")))
    scale = PixelScale(measure=lambda: images.measured([path]))
    assert (images.read_image(path, scale) == colours).all() and scale.ranges == {"integer": [0, 4095]}
    with Image.open(path) as opened:
        assert (images.pixels_of(opened, scale) == colours).all()
    path.write_bytes(path.read_bytes()[:80])
    with pytest.raises(UserError, match="a.png"):
        images.read_image(path, scale)
    (tmp_path / "b.tif").write_bytes(tiff(stored[0].astype("<u2").tobytes(), 9, 16, 2, 3))
    assert (images.read_image(tmp_path / "b.tif", scale) == colours[0]).all()
    packed = zlib.compress(stored[0].astype("<u2").tobytes())
    (tmp_path / "c.tif").write_bytes(tiff(packed, 9, 16, 2, 3, compression=8))
    assert (images.read_image(tmp_path / "c.tif", scale) == colours[0]).all()


def test_colours_of_which_the_upper_bits_are_read_are_told(tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(png(np.full((2, 2, 4), 4095)))
    assert images.measured([tmp_path / "a.png"]) == {}
    assert "of the 16 bits a colour of" in capsys.readouterr().err


def test_a_tiff_that_tells_its_bits(tmp_path):
    """Twelve, though 256 is its largest value."""
    (tmp_path / "a.tif").write_bytes(tiff(b"\x10\0\0\0", 2, 12))
    scale = PixelScale(measure=lambda: images.measured([tmp_path / "a.tif"]))
    assert scale.ranges == {"integer": [0, 4095]}
    assert images.read_image(tmp_path / "a.tif", scale)[0, :, 0].tolist() == [16, 0]


def test_values_that_are_not_finite(tmp_path):
    Image.fromarray(np.array([[1, np.nan]], np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match="a.tif.*not finite"):
        images.read_image(tmp_path / "a.tif")


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
    assert saved(tmp_path / "d.png", palette)[0].tolist() == [[9, 8, 7], [30, 60, 90]]
    keyed = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    assert saved(tmp_path / "e.png", keyed, transparency=(1, 2, 3))[0].tolist() == [[255] * 3, [4, 5, 6]]


def test_a_picture_that_is_transparent_everywhere_is_opaque(tmp_path):
    """A camera's unused fourth byte: white would hide all of it."""
    bgrx = np.dstack([GENERATOR.randint(0, 256, (4, 5, 3)), np.zeros((4, 5))]).astype(np.uint8)
    assert (saved(tmp_path / "a.png", bgrx) == bgrx[..., :3]).all()
    assert (images.pixels_of(Image.fromarray(bgrx)) == bgrx[..., :3]).all()


def test_cmyk(tmp_path):
    """Cyan ink takes red away, in a JPEG (whose CMYK is stored inverted) as in a TIFF."""
    cyan = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    for name in ("a.tif", "a.jpg"):
        assert np.abs(saved(tmp_path / name, cyan)[4, 4].astype(int) - (0, 255, 255)).max() <= 3


TURNED = np.arange(24, dtype=np.uint8).reshape(2, 4, 3) * 10
STORED = {  # EXIF orientation -> what a camera stores of TURNED
    1: TURNED,
    2: TURNED[:, ::-1],
    3: TURNED[::-1, ::-1],
    4: TURNED[::-1],
    5: TURNED.transpose(1, 0, 2),
    6: np.rot90(TURNED),
    7: np.rot90(TURNED, 2).transpose(1, 0, 2),
    8: np.rot90(TURNED, -1),
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("ending", ["png", "tif", "webp"])
def test_exif_orientation(tmp_path, orientation, ending):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    options = {"lossless": True} if ending == "webp" else {}
    pixels = np.ascontiguousarray(STORED[orientation])
    assert (saved(tmp_path / f"a.{ending}", pixels, exif=exif, **options) == TURNED).all()
    with Image.open(tmp_path / f"a.{ending}") as opened:
        assert (images.pixels_of(opened) == TURNED).all()
        assert (images.pixels_of(opened) == TURNED).all(), "the picture itself is left as it is"


def test_exif_of_a_sixteen_bit_png(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    wanted = np.round(RAMP / 257).astype(np.uint8)
    assert (
        saved(tmp_path / "a.png", np.ascontiguousarray(np.rot90(RAMP)), exif=exif)[..., 0] == wanted
    ).all()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_leaves_the_pixels(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "a.png", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\0\1")
    assert (images.read_image(tmp_path / "a.png") == PIXELS).all()


@pytest.mark.parametrize(
    "picture",
    [
        None,
        7,
        b"a.png",
        torch.zeros(4, 5, 3, dtype=torch.uint8),
        np.full((4, 5, 3), np.nan),
        np.zeros((4, 5, 3), np.float32),
        np.zeros((4, 5, 3), bool),
        np.zeros((3, 4, 5), np.uint8),
        np.zeros((0, 5, 3), np.uint8),
        [[0, 1], [2, 3]],
        Image.fromarray(np.full((4, 5), np.nan, np.float32)),
        Image.new("RGB", (0, 0)),
    ],
    ids=lambda picture: f"{type(picture).__name__}-{getattr(picture, 'dtype', '')}",
)
def test_what_is_no_picture_is_refused_in_one_line(picture):
    with pytest.raises(UserError, match="Pillow image") as told:
        images.pixels_of(picture)
    assert "\n" not in str(told.value)


def test_one_picture_or_several():
    array = np.zeros((4, 5, 3), np.uint8)
    for one in ("a.png", Path("a.png"), b"a.png", None, 7, array, array[..., 0], torch.zeros(2, 4, 5, 3)):
        assert not pictures.are_several(one)
    for several in ([array], (), iter(["a.png"]), np.stack([array] * 2)):
        assert pictures.are_several(several)


def test_a_pillow_image_whose_file_is_cut(tmp_path):
    noise = GENERATOR.randint(0, 256, (64, 64, 3)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:4000])
    with Image.open(tmp_path / "a.png") as opened, pytest.raises(UserError, match="unreadable Pillow image"):
        images.pixels_of(opened)


# ---------------------------------------------------------------- formats
@pytest.mark.parametrize("ending", ["gif", "jfif", "jp2", "avif", "webp", "bmp", "tiff", "ppm", "tga", "JPG"])
def test_formats(tmp_path, ending):
    assert np.abs(saved(tmp_path / f"a.{ending}", PIXELS).astype(int) - 90).max() <= 2
    assert images.images_below(tmp_path) == [tmp_path / f"a.{ending}"]


@pytest.mark.parametrize("ending", ["gif", "webp", "png", "tif"])
def test_first_frame_is_taken_and_said_once(tmp_path, capsys, ending):
    frames = [Image.new("RGB", (6, 6), (shade, shade, shade)) for shade in (10, 250)]
    for name in "ab":
        path = tmp_path / f"{name}.{ending}"
        frames[0].save(path, save_all=True, append_images=frames[1:])
        assert np.abs(images.read_image(path).astype(int) - 10).max() <= 2
    assert capsys.readouterr().err.count("several frames") == 1


def test_an_image_of_one_frame_says_nothing(tmp_path, capsys):
    saved(tmp_path / "a.gif", PIXELS)
    assert capsys.readouterr().err == ""


def test_no_program_is_started_for_an_image(tmp_path, monkeypatch):
    """PostScript would be given to Ghostscript, whatever the file is called."""
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n" * 3)
    monkeypatch.setattr(subprocess, "Popen", None)
    with pytest.raises(UserError, match="a.png"):
        images.read_image(tmp_path / "a.png")
    assert ".eps" not in images.extensions() and ".pdf" not in images.extensions()


# ---------------------------------------------------------------- refused
@pytest.mark.parametrize("content", [b"", b"this is no image", None])
def test_unreadable_image_is_named(tmp_path, content):
    write_image(tmp_path / "broken.png", PIXELS)
    path = tmp_path / "broken.png"
    path.write_bytes(path.read_bytes()[:-40] if content is None else content)
    with pytest.raises(UserError, match="broken.png"):
        images.read_image(path)


@pytest.mark.parametrize("ending", ["jpg", "png", "gif", "bmp", "tif", "webp", "jp2", "avif", "ppm"])
def test_truncated_files_are_refused(tmp_path, ending):
    """Cut anywhere in its first nine tenths, no file gives pixels (gray ones, for instance)."""
    noise = GENERATOR.randint(0, 256, (64, 64, 3)).astype(np.uint8)
    whole = tmp_path / f"whole.{ending}"
    saved(whole, noise)
    content = whole.read_bytes()
    cut = tmp_path / f"cut.{ending}"
    for share in np.linspace(0.02, 0.9, 12):
        cut.write_bytes(content[: int(share * len(content))])
        with pytest.raises(UserError, match="cut"):
            images.read_image(cut)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "ending", ["jpg", "png", "gif", "bmp", "tif", "webp", "jp2", "avif", "ppm", "tga", "ico"]
)
def test_damaged_files_are_read_or_refused(tmp_path, ending):
    """A few wrong bytes, in the header as in the pixels: an image or one line, whatever the decoder
    raises."""
    path = tmp_path / f"a.{ending}"
    saved(path, GENERATOR.randint(0, 256, (40, 40, 3)).astype(np.uint8))
    content, refused = path.read_bytes(), 0
    for _ in range(60):
        damaged = bytearray(content)
        for place in (GENERATOR.randint(len(content)), GENERATOR.randint(64)):
            damaged[place] = GENERATOR.randint(256)
        path.write_bytes(damaged)
        try:
            pixels = images.read_image(path)
            assert pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.dtype == np.uint8
        except UserError as mistake:
            assert f"a.{ending}" in str(mistake) and "\n" not in str(mistake)
            refused += 1
    assert refused, "some of the damage is noticed"


def bomb(path: Path, side: int, **options) -> Path:
    Image.new("L", (side, side), 77).save(path, **options)
    return path


def test_too_many_pixels(tmp_path, monkeypatch):
    """A JPEG is read small, other files and progressive JPEGs are refused before they are decoded."""
    monkeypatch.setattr(images, "MOST_PIXELS", 100 * 100)
    assert images.read_image(bomb(tmp_path / "a.jpg", 100)).shape == (100, 100, 3)
    for side, got in ((101, 51), (201, 51), (400, 100), (800, 100)):
        pixels = images.read_image(bomb(tmp_path / "a.jpg", side))
        assert pixels.shape == (got, got, 3) and (np.abs(pixels.astype(int) - 77) <= 1).all()
    several = {"format": "MPO", "save_all": True, "append_images": [Image.new("L", (9, 9))]}
    assert images.read_image(bomb(tmp_path / "phone.jpg", 400, **several)).shape == (100, 100, 3)
    for path in (
        bomb(tmp_path / "b.jpg", 801),
        bomb(tmp_path / "c.jpg", 101, progressive=True),
        bomb(tmp_path / "d.png", 101),
    ):
        monkeypatch.setattr(images, "to_rgb", None)
        with pytest.raises(UserError, match=rf"{path.name}.*pixels"):
            images.read_image(path)


def test_a_jpeg_may_have_more_pixels_than_pillow_opens(tmp_path, monkeypatch):
    """As of a phone of 200 megapixels; other files of so many are refused, as before."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50 * 50)
    for name in ("a.jpg", "b.png"):
        bomb(tmp_path / name, 100)
    assert images.read_image(tmp_path / "a.jpg").shape == (100, 100, 3)
    assert images.size_of(tmp_path / "a.jpg") == (100, 100)
    with pytest.raises(UserError, match="b.png.*DecompressionBombError"):
        images.read_image(tmp_path / "b.png")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to read the memory from")
@pytest.mark.slow
def test_a_bomb_takes_bounded_memory(tmp_path):
    """170 million pixels in half a megabyte: refused as PNG, read at an eighth or so as JPEG."""
    for name in ("a.png", "a.jpg"):
        bomb(tmp_path / name, 13_000)
    code = "import sys\nfrom images import images\n"
    code += "for name in sys.argv[1:]:\n try: print(images.read_image(name).shape)\n"
    code += " except Exception as error: print(type(error).__name__)\n"
    code += "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    command = [sys.executable, "-c", code, str(tmp_path / "a.png"), str(tmp_path / "a.jpg")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    refused, read, kilobytes = done.stdout.splitlines()
    assert (refused, read, done.stderr) == ("UserError", "(6500, 6500, 3)", "")
    assert int(kilobytes) < 700_000, "the whole picture takes 3.2 GB"


def test_a_pipe_is_no_image(tmp_path):
    """Neither finding nor reading waits for the other end."""
    write_image(tmp_path / "a.png", PIXELS)
    os.mkfifo(tmp_path / "b.jpg")
    counted = Counter()
    assert images.images_below(tmp_path, counted) == [tmp_path / "a.png"] and counted == {
        "no regular file": 1
    }
    with pytest.raises(UserError, match="b.jpg.*no regular file"):
        images.read_image(tmp_path / "b.jpg")
    assert images.content_hash(tmp_path / "b.jpg") == "unreadable"


# ---------------------------------------------------------------- which files
def test_what_is_found(tmp_path, capsys):
    for name in (
        "b/2.png",
        "a/1.JPEG",
        "c/.3.png",
        ".ipynb_checkpoints/4.png",
        "__MACOSX/5.png",
        ".git/6.png",
    ):
        write_image(tmp_path / name, PIXELS)
    for name in ("b/notes.txt", "b/more.txt", "a/table.csv", "README"):
        (tmp_path / name).write_text("no image")
    assert images.images_below(tmp_path) == [tmp_path / "a/1.JPEG", tmp_path / "b/2.png"]
    told = capsys.readouterr().err
    assert "4 files that are no images" in told and ".txt 2" in told and told.count("\n") == 1


def test_links(tmp_path):
    """A folder that is linked twice is searched once; a link to itself is no image."""
    write_image(tmp_path / "elsewhere/1.png", PIXELS)
    (tmp_path / "set").mkdir()
    for name in ("linked", "again"):
        (tmp_path / "set" / name).symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set/self.png").symlink_to("self.png")
    counted = Counter()
    assert [p.name for p in images.images_below(tmp_path / "set", counted)] == ["1.png"]
    assert counted == {"no regular file": 1}


def test_link_loops_end(tmp_path):
    write_image(tmp_path / "a/1.png", PIXELS)
    (tmp_path / "a/loop").symlink_to(tmp_path / "a")
    assert images.images_below(tmp_path) == [tmp_path / "a/1.png"]


def test_a_folder_that_cannot_be_read(tmp_path, monkeypatch):
    """Pictures must not go missing silently (root may read anything, so the refusal is made up)."""
    write_image(tmp_path / "a/1.png", PIXELS)
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refusing(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(UserError, match="closed cannot be read.*Permission denied"):
        images.images_below(tmp_path)


def test_no_images(tmp_path):
    (tmp_path / "a.docx").write_text("no image")
    with pytest.raises(UserError, match="no images in .*there are 1 files.*docx 1"):
        images.images_below(tmp_path)


# ---------------------------------------------------------------- the same files?
@pytest.mark.parametrize("size", [100, 200_000])
def test_content_hash(tmp_path, size):
    """Any other byte is noticed, at once and with the same size; place and time are not."""
    content = bytearray(GENERATOR.bytes(size))
    path, copy = tmp_path / "a.png", tmp_path / "deep.png"
    path.write_bytes(content)
    before = images.content_hash(path)
    copy.write_bytes(content)
    os.utime(copy, (1, 1))
    assert images.content_hash(copy) == before and len(before) == 32
    for place in (0, size // 2, size - 1):
        changed = bytearray(content)
        changed[place] ^= 1
        copy.write_bytes(changed)
        assert images.content_hash(copy) != before
    assert images.content_hash(tmp_path / "absent") == "unreadable"
