"""Image files: which ones lie below a folder, what is in them, and whether they are still the same.

Pixels always come as (H, W, 3) uint8, turned as the camera held it (EXIF), in the sRGB order of Pillow:

- values of more than 8 bits are scaled by one range for the whole data set (images/pixel_scale.py), which
  the training pictures decide (``measured``);
- what is transparent is laid on white, but where all is transparent, as in the unused fourth byte of some
  cameras; CMYK, palettes and one-bit images are converted by Pillow;
- of several frames the first is taken, and said so once;
- files of more than MOST_PIXELS are refused before they are decoded."""

import contextlib
import functools
import hashlib
import io
import os
import stat
import sys
import warnings
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from itertools import filterfalse
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from config import UserError
from images.pixel_scale import PixelScale, kind_of, range_for

MEASURED = 200  # training pictures, at most, whose values decide what is white
BITS_PER_SAMPLE = 258  # a TIFF's tag
MOST_PIXELS = 64_000_000  # decoded and copied once these take some 0.5 GB
# Known to Pillow, and no pictures that it decodes itself: EPS starts Ghostscript, the others have no decoder.
NOT_DECODED = {"EPS", "WMF", "HDF5", "GRIB", "BUFR", "MPEG"}
ORIENTATION = 0x0112  # EXIF: how to turn the stored image
SIDEWAYS = (5, 6, 7, 8)  # the turns that change height for width
UNREADABLE = "unreadable"  # in place of the hash of a file that cannot be read

# What Pillow warns of is not the user's to mend: many pixels (MOST_PIXELS is lower), damaged EXIF data.
warnings.filterwarnings("ignore", module=r"PIL\.")


def note(text: str) -> None:
    """A line for the user on stderr: stdout may be a table."""
    print(f"note: {text}", file=sys.stderr, flush=True)


note_once = functools.cache(note)  # a run reads its data set several times


# ---------------------------------------------------------------- which files
@functools.cache
def formats() -> tuple[str, ...]:
    """The formats that the installed Pillow decodes."""
    Image.init()
    return tuple(name for name in Image.OPEN if name not in NOT_DECODED)


@functools.cache
def extensions() -> frozenset[str]:
    """The endings of these formats, with dot and in lower case."""
    known = set(formats())
    return frozenset(end for end, name in Image.registered_extensions().items() if name in known)


def is_hidden(name: str) -> bool:
    """Whether a file or folder is passed over without a word: __MACOSX is what a Mac's zip adds."""
    return name.startswith(".") or name == "__MACOSX"


def images_below(folder: Path, skipped: Counter | None = None, left_out: Container[str] = ()) -> list[Path]:
    """``find_below``; raises UserError where there are no images, too. skipped: counts the other files;
    without it they are told here."""
    counted: Counter = Counter() if skipped is None else skipped
    files = find_below(folder, counted, left_out)
    if not files:
        others = f"; there are {tell_skipped(counted)}" if counted else ""
        raise UserError(f"no images in {folder}{others}; expected files such as .png, .jpg, .tif or .webp")
    if skipped is None and counted:
        note(f"passed over in {folder}: {tell_skipped(counted)}")
    return files


def find_below(
    folder: Path, counted: Counter, left_out: Container[str] = (), deep: bool = True
) -> list[Path]:
    """The image files in a folder and, where ``deep``, its subfolders, sorted. Links are followed, each
    folder is entered once. Raises UserError on a folder that cannot be read.

    counted: counts, by ending, the other files. left_out: names of subfolders, in small letters, that are
    counted and not entered."""
    files, entered = [], set()
    for place, folders, names in os.walk(folder, onerror=_refuse, followlinks=True):
        found = os.stat(place)
        if (found.st_dev, found.st_ino) in entered:
            folders.clear()
            continue
        entered.add((found.st_dev, found.st_ino))
        counted.update(f"{name}/" for name in folders if name.lower() in left_out)
        folders[:] = [n for n in folders if deep and not is_hidden(n) and n.lower() not in left_out]
        for name in names:
            path, ending = os.path.join(place, name), os.path.splitext(name)[1].lower()
            if is_hidden(name):
                continue
            if ending in extensions() and os.path.isfile(path):
                files.append(Path(path))
            else:
                counted["no regular file" if ending in extensions() else ending or "without ending"] += 1
    return sorted(files)


def listed(folder: Path) -> tuple[list[str], list[str]]:
    """The names of the folders in a folder and those of its files, sorted, but for what is hidden. Raises
    UserError when it cannot be read."""
    _, folders, files = next(os.walk(folder, onerror=_refuse))
    return sorted(filterfalse(is_hidden, folders)), sorted(filterfalse(is_hidden, files))


def _refuse(error: OSError) -> None:
    raise UserError(
        f"the folder {error.filename} cannot be read ({error.strerror}); allow it, or take it out"
    ) from None


def tell_skipped(skipped: Counter) -> str:
    """As in "3 files or folders that are no images (.txt 2, .csv 1)"."""
    named = ", ".join(f"{reason} {count}" for reason, count in skipped.most_common(6))
    return f"{sum(skipped.values())} files or folders that are no images ({named})"


# ---------------------------------------------------------------- the same files?
def content_hash(path: Path) -> str:
    """A hash of all bytes of a file: 32 hexadecimal digits of its SHA-256; UNREADABLE where it cannot be
    read. Read once in a process as long as size and time of change stay."""
    with contextlib.suppress(OSError):
        found = os.stat(path)
        if stat.S_ISREG(found.st_mode):
            return _hashed(os.fspath(path), found.st_size, found.st_mtime_ns, found.st_ino)
    return UNREADABLE


@functools.lru_cache(maxsize=1_000_000)
def _hashed(path: str, size: int, changed: int, inode: int) -> str:
    with open(path, "rb", buffering=0) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:32]


# ---------------------------------------------------------------- pixels
def read_image(path: Path, scale: PixelScale | None = None) -> np.ndarray:
    """An image file as (H, W, 3) uint8 (see the top of this file). scale: of its data set. Raises UserError
    that names it when it cannot be read."""
    with opened(path) as image:
        if getattr(image, "is_animated", False):
            note_once("of pictures of several frames the first is taken")
        return of_pillow(image, scale)


def pixels_of(picture: Any, scale: PixelScale | None = None) -> np.ndarray:
    """A path, a Pillow image or an array, (H, W, 3) or (H, W) uint8 -> (H, W, 3) uint8, a Pillow image turned
    as its file would be. scale: of the data set. Raises UserError on anything else, and on a picture that
    cannot be read."""
    if isinstance(picture, (str, Path)):
        return read_image(Path(picture), scale)
    if isinstance(picture, Image.Image):
        with readable(picture):  # of a file, perhaps, which is read only now
            return of_pillow(picture, scale)
    if isinstance(picture, np.ndarray) and picture.dtype == np.uint8 and picture.size:
        if picture.ndim == 2:
            return np.repeat(picture[..., None], 3, 2)
        if picture.ndim == 3 and picture.shape[2] == 3:
            return picture
    about = f" {picture.dtype} {picture.shape}" if isinstance(picture, np.ndarray) else ""
    raise UserError(
        f"expected a path, a Pillow image or an array (H, W, 3) or (H, W) of uint8, got "
        f"{type(picture).__name__}{about}"
    )


@contextlib.contextmanager
def readable(picture: Path | Image.Image) -> Iterator[None]:
    """Whatever fails in the block is a UserError in one line that names the picture."""
    what = f"image {picture}" if isinstance(picture, Path) else "Pillow image"
    try:
        yield
    except (UserError, MemoryError):
        raise
    except FileNotFoundError:
        raise UserError(f"no {what}: there is no such file") from None
    except Exception as error:  # every format fails in its own way on damaged bytes
        reason = f"{type(error).__name__}: {[*str(error).splitlines(), ''][0][:120]}"
        reason = reason.replace(f" {str(picture)!r}", "")  # Pillow names the file once more
        raise UserError(f"unreadable {what} ({reason})") from None


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """An image file, for the block, not decoded yet. Raises UserError where it is absent, no regular file, of
    more than MOST_PIXELS or of no format, and on what fails in the block (``readable``)."""
    with readable(path):
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("no regular file")
        with Image.open(path, formats=formats()) as image:
            if image.width * image.height > MOST_PIXELS:
                size = f"{image.width} x {image.height} pixels"
                raise ValueError(f"{size}, more than the {MOST_PIXELS // 10**6} million taken")
            yield image


def size_of(path: Path) -> tuple[int, int]:
    """Height and width of an image file as ``read_image`` turns it, from its head alone. Raises UserError
    when that cannot be read."""
    with opened(path) as image:
        # PNG's own getexif decodes the whole image; a TIFF's size is turned already
        exif = {} if image.format == "TIFF" else Image.Image.getexif(image)
        width, height = image.size
        return (width, height) if exif.get(ORIENTATION, 1) in SIDEWAYS else (height, width)


def of_pillow(image: Image.Image, scale: PixelScale | None = None) -> np.ndarray:
    """The pixels of a Pillow image, opened or loaded, (H, W, 3) uint8. Raises ValueError on one without
    pixels or not finite, and what Pillow raises on damaged bytes."""
    if not image.width * image.height:
        raise ValueError("no pixels")
    if is_wide(image):
        values, info = wide_values(image), image.info
        image = Image.fromarray((scale or PixelScale()).to_bytes(values))
        image.info = {"exif": info["exif"]} if "exif" in info else {}
    image.load()
    try:
        image = ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception:  # EXIF data are damaged in many ways; the pixels are not
        pass
    return np.asarray(to_rgb(image))


def to_rgb(image: Image.Image) -> Image.Image:
    """A Pillow image of eight bits in any mode -> RGB."""
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layer = image.convert("RGBA")
        if layer.getchannel("A").getextrema() == (0, 0):
            return layer.convert("RGB")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


# ---------------------------------------------------------------- more than eight bits
def is_wide(image: Image.Image) -> bool:
    """Whether an image has values of more than eight bits that ``wide_values`` reads: gray ones, floats, and
    the colours of a file that is not decoded yet."""
    return image.mode == "F" or image.mode.startswith("I") or stored_as(image).startswith("RGB;16")


def stored_as(image: Image.Image) -> str:
    """What Pillow calls the form of the pixels in a file that is not decoded yet; "" of any other image."""
    args = next((tile[3] for tile in getattr(image, "tile", ())), "")
    raw = args[0] if isinstance(args, tuple) and args else args
    return raw if isinstance(raw, str) else ""


def wide_values(image: Any) -> np.ndarray:
    """Those values, (H, W) or (H, W, 3), whole numbers or floats. Raises what Pillow raises on damaged
    bytes."""
    if image.mode != "RGB":
        return np.asarray(image)
    # Pillow has the upper byte of a colour only, and takes the lower one for it if told the other byte order.
    raw = stored_as(image)
    swapped = raw[:-1] + ("L" if raw.endswith("B") else "B")
    image.fp.seek(0)
    lower: Any = Image.open(io.BytesIO(image.fp.read()), formats=[image.format])
    with lower:
        lower.tile = [
            tile._replace(args=swapped if isinstance(tile.args, str) else (swapped, *tile.args[1:]))
            for tile in lower.tile
        ]
        return np.asarray(image).astype(np.uint16) << 8 | np.asarray(lower)


def measured(files: Sequence[Path]) -> dict[str, list[float]]:
    """The ranges (``PixelScale``) of a data set with these training pictures: of MEASURED of them, evenly
    spaced, those of more than eight bits decide, by the bits that the file tells or their values; said in a
    line. Of the others the head alone is read."""
    extremes: dict[str, tuple[float, float]] = {}
    for i in np.linspace(0, len(files) - 1, min(MEASURED, len(files))).astype(int):
        with contextlib.suppress(Exception), opened(files[i]) as image:  # told when its turn comes
            if is_wide(image):
                bits = getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE, (16,))[0]
                values = wide_values(image)
                least, most = extremes.get(kind_of(values), (0, 2**bits - 1 if bits < 16 else 0))
                extremes[kind_of(values)] = min(least, values.min()), max(most, values.max())
            elif ";16" in stored_as(image):
                note_once("of 16 bits a colour the upper 8 are read; save such files without transparency")
    ranges = {kind: range_for(float(least), float(most), kind) for kind, (least, most) in extremes.items()}
    for kind, (black, white) in ranges.items():
        found = "{:g} to {:g}".format(*map(float, extremes[kind]))
        note(
            f"pixels of more than 8 bits: {black} is black and {white} white in all pictures ({found} found)"
        )
    return ranges
