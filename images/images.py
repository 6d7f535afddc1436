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
Image.init()
FORMATS = tuple(name for name in Image.OPEN if name not in NOT_DECODED)
ENDINGS = frozenset(end for end, name in Image.registered_extensions().items() if name in FORMATS)
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
def is_hidden(name: str) -> bool:
    """Whether a file or folder is passed over without a word: __MACOSX is what a Mac's zip adds."""
    return name.startswith(".") or name == "__MACOSX"


def image_files(
    folder: Path, skipped: Counter, left_out: Container[str] = (), deep: bool = True
) -> list[Path]:
    """The image files in a folder and, where ``deep``, its subfolders but those ``left_out`` (names in small
    letters), sorted. Links are followed, each folder is entered once. Raises UserError on a folder that
    cannot be read. skipped: counts the other files, by ending, and the subfolders that are not entered."""
    files, entered = [], set()
    for place, folders, names in os.walk(folder, onerror=_refuse, followlinks=True):
        real = os.path.realpath(place)
        there = [name for name in folders if not is_hidden(name) and real not in entered]
        folders[:] = [name for name in there if deep and name.lower() not in left_out]
        skipped.update(f"{name}/" for name in there if name not in folders)
        for name in names if real not in entered else ():
            path, ending = os.path.join(place, name), os.path.splitext(name)[1].lower()
            if is_hidden(name):
                continue
            if ending in ENDINGS and os.path.isfile(path):
                files.append(Path(path))
            else:
                skipped["no regular file" if ending in ENDINGS else ending or "without ending"] += 1
        entered.add(real)
    return sorted(files)


def images_below(folder: Path, skipped: Counter | None = None, left_out: Container[str] = ()) -> list[Path]:
    """``image_files`` below a folder; raises UserError where there are none, too. What is passed over is
    told, where there are some only without ``skipped``."""
    counted: Counter = Counter() if skipped is None else skipped
    files = image_files(folder, counted, left_out)
    if skipped is None or not files:
        tell_skipped(folder, counted)
    if not files:
        raise UserError(f"no images in {folder}; expected files such as .png, .jpg, .tif or .webp")
    return files


def tell_skipped(folder: Path, skipped: Counter) -> None:
    """As in "passed over in x: 3 files or folders (.txt 2, .csv 1)"; nothing where nothing was."""
    named = ", ".join(f"{reason} {count}" for reason, count in skipped.most_common(6))
    if skipped:
        note_once(f"passed over in {folder}: {sum(skipped.values())} files or folders ({named})")


def _refuse(error: OSError) -> None:
    told = f"the folder {error.filename} cannot be read ({error.strerror}); allow it, or take it out"
    raise UserError(told) from None


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
@contextlib.contextmanager
def opened(picture: Any) -> Iterator[Image.Image]:
    """A Pillow image, or an image file by its path, for the block, not decoded yet. Raises UserError in one
    line that names it, where it is absent, no regular file, of more than MOST_PIXELS or of no format, and on
    whatever fails in the block."""
    what = f"image {picture}" if isinstance(picture, Path) else "Pillow image"
    try:
        if isinstance(picture, Path) and not stat.S_ISREG(os.stat(picture).st_mode):
            raise ValueError("no regular file")
        is_open = isinstance(picture, Image.Image)
        with contextlib.nullcontext(picture) if is_open else Image.open(picture, formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                size = f"{image.width} x {image.height} pixels"
                raise ValueError(f"{size}, more than the {MOST_PIXELS // 10**6} million taken")
            yield image
    except (UserError, MemoryError):
        raise
    except FileNotFoundError:
        raise UserError(f"no {what}: there is no such file") from None
    except Exception as error:  # every format fails in its own way on damaged bytes
        reason = f"{type(error).__name__}: {[*str(error).splitlines(), ''][0][:120]}"
        reason = reason.replace(f" {str(picture)!r}", "")  # Pillow names the file once more
        raise UserError(f"unreadable {what} ({reason})") from None


def pixels_of(picture: Any, scale: PixelScale | None = None) -> np.ndarray:
    """A path, a Pillow image or an array, (H, W, 3) or (H, W) uint8 -> (H, W, 3) uint8 (see the top of this
    file). scale: of the data set. Raises UserError on anything else, and on a picture that cannot be read."""
    if isinstance(picture, (str, Path, Image.Image)):
        with opened(Path(picture) if isinstance(picture, str) else picture) as image:
            return of_pillow(image, scale or PixelScale())
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


def size_of(path: Path) -> tuple[int, int]:
    """Height and width of an image file as ``pixels_of`` turns it, from its head alone. Raises UserError when
    that cannot be read."""
    with opened(path) as image:
        # PNG's own getexif decodes the whole image; a TIFF's size is turned already
        exif = {} if image.format == "TIFF" else Image.Image.getexif(image)
        width, height = image.size
        return (width, height) if exif.get(ORIENTATION, 1) in SIDEWAYS else (height, width)


def of_pillow(image: Image.Image, scale: PixelScale) -> np.ndarray:
    """The pixels of a Pillow image, opened or loaded, (H, W, 3) uint8. Raises ValueError on one without
    pixels or not finite, and what Pillow raises on damaged bytes."""
    if not image.width * image.height:
        raise ValueError("no pixels")
    if getattr(image, "is_animated", False):
        note_once("of pictures of several frames the first is taken")
    if (values := wide_values(image)) is not None:
        info, image = image.info, Image.fromarray(scale.to_bytes(values))
        image.info = {"exif": info["exif"]} if "exif" in info else {}
    image.load()
    try:
        image = ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception:  # EXIF data are damaged in many ways; the pixels are not
        pass
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (0, 0):
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))


# ---------------------------------------------------------------- more than eight bits
def wide_values(image: Any) -> np.ndarray | None:
    """The values of more than eight bits of a Pillow image, (H, W) or (H, W, 3), whole numbers or floats:
    gray ones, or the colours of a file that is not decoded yet; None of any other, which is not decoded.
    Raises what Pillow raises on damaged bytes."""
    if image.mode == "F" or image.mode.startswith("I"):
        return np.asarray(image)
    stored = next((tile[3] for tile in getattr(image, "tile", ())), "")  # how the file has its pixels
    stored = stored[0] if isinstance(stored, tuple) and stored else stored
    if not isinstance(stored, str) or not stored.startswith("RGB;16"):
        return None
    # Pillow has the upper byte of a colour only, and takes the lower one for it if told the other byte order.
    swapped = stored[:-1] + ("L" if stored.endswith("B") else "B")
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
        with contextlib.suppress(UserError), opened(files[i]) as image:  # told when its turn comes
            bits = getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE, (16,))[0]
            if (values := wide_values(image)) is not None and np.isfinite(values).all():
                least, most = extremes.get(kind_of(values), (0, 2**bits - 1 if bits < 16 else 0))
                extremes[kind_of(values)] = min(least, values.min()), max(most, values.max())
    ranges = {kind: range_for(float(least), float(most), kind) for kind, (least, most) in extremes.items()}
    for kind, (black, white) in ranges.items():
        found = "{:g} to {:g}".format(*map(float, extremes[kind]))
        told = f"{black} is black and {white} white in all pictures ({found} found)"
        note(f"pixels of more than 8 bits: {told}")
    return ranges
