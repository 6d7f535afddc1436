"""Image files: which ones lie below a folder, what is in them, and whether they are still the same.

Pixels always come as (H, W, 3) uint8, turned as the camera held it (EXIF), in the sRGB order of Pillow:

- values of more than 8 bits are scaled by one range for the whole data set (images/pixel_scale.py), which
  the training pictures decide (``measured``);
- what is transparent is laid on white, but where all is transparent, as in the unused fourth byte of some
  cameras; CMYK, palettes and one-bit images are converted by Pillow;
- of several frames the first is taken, and said so once;
- a JPEG of more than MOST_PIXELS is decoded at a half, a quarter or an eighth of its size; any other file
  of so many pixels is refused before it is decoded, and so is a progressive JPEG, which is decoded whole
  first."""

import contextlib
import functools
import hashlib
import io
import os
import stat
import sys
import warnings
from collections import Counter
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, JpegImagePlugin

from config import UserError
from images.pixel_scale import PixelScale, kind_of, range_for

MEASURED = 200  # training pictures, at most, whose values decide what is white
BITS_PER_SAMPLE = 258  # a TIFF's tag
MOST_PIXELS = 64_000_000  # decoded and copied once these take some 0.5 GB
# Known to Pillow, and no pictures that it decodes itself: EPS starts Ghostscript, the others have no decoder.
NOT_DECODED = {"EPS", "WMF", "HDF5", "GRIB", "BUFR", "MPEG"}
ORIENTATION = 0x0112  # EXIF: how to turn the stored image
SIDEWAYS = (5, 6, 7, 8)  # the turns that change height for width
NOT_SEARCHED = "__MACOSX"  # what a Mac's zip adds; names that start with a dot are not searched either

# What Pillow warns of is not the user's to mend: many pixels (MOST_PIXELS is lower), damaged EXIF data.
warnings.filterwarnings("ignore", module=r"PIL\.")
_frames_told = [False]  # whether it was said: once in a process


def note(text: str) -> None:
    """A line for the user on stderr: stdout may be a table."""
    print(f"note: {text}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------- which files
@functools.cache
def formats() -> tuple[str, ...]:
    """The formats that the installed Pillow decodes."""
    Image.init()
    return tuple(name for name in Image.OPEN if name not in NOT_DECODED)


@functools.cache
def extensions() -> frozenset[str]:
    """The endings, with dot and in lower case, of the formats that the installed Pillow decodes."""
    known = set(formats())
    return frozenset(end for end, name in Image.registered_extensions().items() if name in known)


def images_below(folder: Path, skipped: Counter | None = None, left_out: Container[str] = ()) -> list[Path]:
    """The image files in a folder and its subfolders, sorted. Raises UserError when there are none, and on a
    folder that cannot be read.

    Hidden files and folders and __MACOSX are passed over; links are followed, each folder is entered once.
    skipped: counts, by ending, the other files that are no images; without it they are told here. left_out:
    names of subfolders, in small letters, that are not entered."""
    counted: Counter = Counter() if skipped is None else skipped
    files = searched_whole(folder, counted, left_out)
    if not files:
        others = f"; there are {tell_skipped(counted)}" if counted else ""
        raise UserError(f"no images in {folder}{others}; expected files such as .png, .jpg, .tif or .webp")
    if skipped is None and counted:
        note(f"passed over in {folder}: {tell_skipped(counted)}")
    return files


def searched_whole(folder: Path, counted: Counter, left_out: Container[str] = ()) -> list[Path]:
    """``images_below``, of none an empty list; ``counted`` counts the other files, nothing is told."""
    files, folders, entered = [], [os.fspath(folder)], set()
    while folders:
        place = folders.pop()
        found = os.stat(place)
        if (found.st_dev, found.st_ino) in entered:
            continue
        entered.add((found.st_dev, found.st_ino))
        for entry in searched(place):
            if is_folder(entry):
                if entry.name.lower() in left_out:
                    counted[f"{entry.name}/"] += 1
                else:
                    folders.append(entry.path)
            elif reason := why_skipped(entry):
                counted[reason] += 1
            else:
                files.append(Path(entry.path))
    return sorted(files)


def searched(folder: str | Path) -> list[os.DirEntry]:
    """What lies in a folder, sorted, but for hidden names and __MACOSX. Raises UserError when it cannot be
    read."""
    try:
        with os.scandir(folder) as entries:
            kept = [e for e in entries if not e.name.startswith(".") and e.name != NOT_SEARCHED]
    except OSError as error:
        raise UserError(
            f"the folder {folder} cannot be read ({error.strerror}); allow it, or take it out"
        ) from None
    return sorted(kept, key=lambda entry: entry.name)


def is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that points to itself
        return False


def why_skipped(entry: os.DirEntry) -> str | None:
    """What a file is that is no image; None for an image."""
    ending = os.path.splitext(entry.name)[1].lower()
    if ending not in extensions():
        return ending or "without ending"
    try:
        return None if entry.is_file() else "no regular file"
    except OSError:  # a link that points to itself
        return "no regular file"


def tell_skipped(skipped: Counter) -> str:
    """As in "3 files that are no images (.txt 2, .csv 1)"."""
    listed = ", ".join(f"{reason} {count}" for reason, count in skipped.most_common(6))
    more = ", ..." if len(skipped) > 6 else ""
    what = "files or folders" if any(reason.endswith("/") for reason in skipped) else "files"
    return f"{sum(skipped.values())} {what} that are no images ({listed}{more})"


# ---------------------------------------------------------------- the same files?
UNREADABLE = "unreadable"


def content_hash(path: Path) -> str:
    """A hash of all bytes of a file: 32 hexadecimal digits of its SHA-256; "unreadable" where it cannot be
    read.

    Every changed byte changes it; names, places and times do not. Read once in a process as long as size
    and time of change stay. The 60,000 CIFAR-10 files (52 MB, in the system's cache) take 0.7 s of one
    core, 0.2 s when asked again; finding them takes 0.9 s. Large files pass at 2.1 GB a second and core."""
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            return UNREADABLE
        return _hashed(os.fspath(path), found.st_size, found.st_mtime_ns, found.st_ino)
    except OSError:
        return UNREADABLE


@functools.lru_cache(maxsize=1_000_000)
def _hashed(path: str, size: int, changed: int, inode: int) -> str:
    with open(path, "rb", buffering=0) as stream:
        if size > 1 << 16:
            return hashlib.file_digest(stream, "sha256").hexdigest()[:32]
        return hashlib.sha256(stream.read()).hexdigest()[:32]


# ---------------------------------------------------------------- pixels
def read_image(path: Path, scale: PixelScale | None = None) -> np.ndarray:
    """An image file as (H, W, 3) uint8 (see the top of this file). scale: of its data set. Raises UserError
    that names it when it cannot be read."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("no regular file")
        with opened(path) as image:
            return _decoded(image, path, scale)
    except MemoryError:
        raise
    except FileNotFoundError:
        raise UserError(f"no image {path}: there is no such file") from None
    except Exception as error:  # every format fails in its own way on damaged bytes
        reason = str(error).replace(repr(str(path)), "it").replace(str(path), "it")
        raise UserError(
            f"unreadable image {path} ({_kind_and_reason(error, reason)}); repair it or take it out of the "
            f"folder"
        ) from None


def pixels_of(picture: Any, scale: PixelScale | None = None) -> np.ndarray:
    """A path, a Pillow image or an array, (H, W, 3) or (H, W) uint8 -> (H, W, 3) uint8, a Pillow image turned
    as its file would be. scale: of the data set. Raises UserError on anything else, and on a picture that
    cannot be read."""
    if isinstance(picture, (str, Path)):
        return read_image(Path(picture), scale)
    if isinstance(picture, Image.Image):
        try:
            return of_pillow(picture, scale)
        except MemoryError:
            raise
        except Exception as error:  # as of a file, which may be read only now
            told = _kind_and_reason(error, str(error))
            raise UserError(f"unreadable Pillow image ({told}); open it again, or repair it") from None
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


def _kind_and_reason(error: Exception, reason: str) -> str:
    return f"{type(error).__name__}: {reason.splitlines()[0][:120] if reason else ''}"


def opened(path: Path) -> Image.Image:
    """An image file, opened. A JPEG may have more pixels than Pillow opens by itself: ``bounded`` looks to
    that."""
    try:
        return Image.open(path, formats=formats())
    except Image.DecompressionBombError:
        with contextlib.suppress(SyntaxError):  # no JPEG
            return JpegImagePlugin.JpegImageFile(path)
        raise


def size_of(path: Path) -> tuple[int, int]:
    """Height and width of an image file as ``read_image`` turns it, from its head alone. Raises UserError
    when that cannot be read."""
    try:
        with opened(path) as image:
            # PNG's own getexif decodes the whole image; a TIFF's size is turned already
            exif = {} if image.format == "TIFF" else Image.Image.getexif(image)
            width, height = image.size
            return (width, height) if exif.get(ORIENTATION, 1) in SIDEWAYS else (height, width)
    except Exception as error:  # every format fails in its own way on damaged bytes
        raise UserError(f"unreadable image {path} ({type(error).__name__})") from None


def _decoded(image: Image.Image, path: Path, scale: PixelScale | None) -> np.ndarray:
    """The pixels of an opened file, (H, W, 3) uint8. Raises as ``of_pillow`` does."""
    if getattr(image, "is_animated", False) and not _frames_told[0]:
        _frames_told[0] = True
        note(f"{path} has several frames; the first is taken, of other such files too")
    return of_pillow(image, scale)


def of_pillow(image: Image.Image, scale: PixelScale | None = None) -> np.ndarray:
    """The pixels of a Pillow image, opened or loaded, (H, W, 3) uint8. Raises ValueError on one that is too
    large or not finite, and what Pillow raises on damaged bytes."""
    bounded(image)
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


def bounded(image: Image.Image) -> None:
    """Make an opened file decode to at most MOST_PIXELS, or raise ValueError; so too on one of none."""
    width, height = image.size
    if not width * height:
        raise ValueError("no pixels")
    if width * height <= MOST_PIXELS:
        return
    scale = next((s for s in (2, 4, 8) if width * height <= MOST_PIXELS * s * s), None)
    if image.format in ("JPEG", "MPO") and scale and not image.info.get("progressive"):
        image.draft(None, (width // scale, height // scale))
    if image.size[0] * image.size[1] > MOST_PIXELS:
        raise ValueError(f"{width} x {height} pixels, more than the {MOST_PIXELS // 10**6} million taken")


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
    coarse = []
    for i in np.linspace(0, len(files) - 1, min(MEASURED, len(files))).astype(int):
        with contextlib.suppress(Exception), opened(files[i]) as image:  # told when its turn comes
            if is_wide(image):
                bounded(image)
                bits = getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE, (16,))[0]
                values = wide_values(image)
                least, most = extremes.get(kind_of(values), (0, 2**bits - 1 if bits < 16 else 0))
                extremes[kind_of(values)] = min(least, values.min()), max(most, values.max())
            elif ";16" in stored_as(image):
                coarse.append(files[i])
    ranges = {kind: range_for(float(least), float(most), kind) for kind, (least, most) in extremes.items()}
    for kind, (black, white) in ranges.items():
        found = "{:g} to {:g}".format(*map(float, extremes[kind]))
        note(
            f"pixels of more than 8 bits: {black} is black and {white} white in every picture ({found} found)"
        )
    if coarse:
        note(f"of the 16 bits a colour of {coarse[0]} the upper 8 are read; save them without transparency")
    return ranges
