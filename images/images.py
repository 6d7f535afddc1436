"""Image files: which ones lie below a folder, what is in them, and whether they are still the same.

Pixels always come as (H, W, 3) uint8, turned as the camera held it (EXIF), in the sRGB order of Pillow:
- values of more than 8 bits are scaled by one range for the whole data set (``PixelScale``), which the
  training pictures decide (``measured``);
- what is transparent is laid on white, but where all is transparent, as in the unused fourth byte of some
  cameras; CMYK, palettes and one-bit images are converted by Pillow;
- of several frames the first is taken, and said so once;
- files of more than MOST_PIXELS are refused before they are decoded."""

import contextlib
import dataclasses
import functools
import glob
import io
import os
import stat
import sys
import warnings
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps

from config import UserError
from shell.files import sha256_of_file

MEASURED = 200  # training pictures, at most, whose values decide what is white
BITS = (8, 10, 12, 14, 16)  # that cameras and files have
UNKNOWN = {"integer": [0, 65535], "float": [0, 1]}  # ranges where the training pictures are of another kind
KINDS = {"f": "float", "i": "integer", "u": "integer"}  # of values, by numpy's name of their kind
MOST_PIXELS = 64_000_000  # decoded and copied once these take some 0.5 GB
# Known to Pillow, and no pictures that it decodes itself: EPS starts Ghostscript, the others have no decoder.
NOT_DECODED = {"EPS", "WMF", "HDF5", "GRIB", "BUFR", "MPEG"}
Image.init()
FORMATS = tuple(name for name in Image.OPEN if name not in NOT_DECODED)
ENDINGS = frozenset(end for end, name in Image.registered_extensions().items() if name in FORMATS)
OVERLAP = 0.25  # of a tile's side that neighbours share, at least: what one cuts lies whole in another
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


def image_files(folder: Path, skipped: Counter, left_out: Container[str] = (), deep=True) -> list[Path]:
    """The image files in a folder and, where ``deep``, its subfolders but those ``left_out`` (lower case),
    sorted. Links are followed, each folder is entered once. skipped: counts the other files, by ending, and
    the subfolders that are not entered. Raises UserError on a folder that cannot be read."""

    def refuse(error: OSError) -> None:
        raise UserError(f"the folder {error.filename} cannot be read ({error.strerror})") from None

    files, entered = [], set()
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(place)
        there = [name for name in folders if not is_hidden(name) and real not in entered]
        folders[:] = [name for name in there if deep and name.lower() not in left_out]
        skipped.update(f"{name}/" for name in there if name not in folders)
        for name in names if real not in entered else ():
            path, ending = os.path.join(place, name), os.path.splitext(name)[1].lower()
            if ending in ENDINGS and not is_hidden(name) and os.path.isfile(path):
                files.append(Path(path))
            elif not is_hidden(name):
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


def find_images(names: list[str]) -> list[Path]:
    """The files that names on a command line stand for, in order: files, images below folders, globs, - for
    lines of standard input. Raises UserError on a name that stands for nothing."""
    files: list[Path] = []
    for name in names:
        path = Path(name)
        if name == "-":
            lines = sys.stdin.buffer.read().splitlines()
            found = [Path(os.fsdecode(line)) for line in lines if line.strip()]
        elif path.exists():
            found = images_below(path) if path.is_dir() else [path]
        else:
            found = sorted(filter(Path.is_file, map(Path, glob.glob(name, recursive=True))))
        if not found:
            raise UserError(f"{name}: expected files, folders, globs, or - and a line each on standard input")
        files += found
    return files


def refuse_among(folder: Path, searched: list[Path], files: list[Path]) -> None:
    """Raise UserError where PNGs written to ``folder`` would replace one of the files, or be taken for a
    picture the next time that the folders ``searched`` are."""
    place, beside = folder.resolve(), {file.parent.resolve() for file in files}
    if place in beside or any(place.is_relative_to(path.resolve()) for path in searched):
        raise UserError(f"expected a folder apart from the pictures in or above it, got {folder}")


def content_hash(path: Path) -> str:
    """A hash of all bytes of a file: 32 hexadecimal digits of its SHA-256; UNREADABLE where it cannot be
    read. Read once in a process as long as size and time of change stay."""
    with contextlib.suppress(OSError):
        found = os.stat(path)
        if stat.S_ISREG(found.st_mode):
            return _hashed(path, found.st_size, found.st_mtime_ns, found.st_ino)
    return UNREADABLE


_hashed = functools.lru_cache(maxsize=1_000_000)(lambda path, *state: sha256_of_file(path)[:32])


# ---------------------------------------------------------------- pixels
@dataclasses.dataclass(eq=False)
class PixelScale:
    """What is black and white in a data set's pictures of more than eight bits. ranges: as far as known,
    {"integer": [0, 4095]}, {"float": [0, 1]}, both or neither."""

    ranges: dict[str, list[float]] = dataclasses.field(default_factory=dict)

    def to_bytes(self, values: np.ndarray) -> np.ndarray:
        """Values of any shape -> uint8, clipped to the range. Raises ValueError where some are not finite."""
        if not np.isfinite(values).all():
            raise ValueError("its values are not finite")
        black, white = (UNKNOWN | self.ranges)[KINDS[values.dtype.kind]]
        scaled = (values.astype(np.float32) - black) * (255 / (white - black))
        return scaled.round().clip(0, 255).astype(np.uint8)


@contextlib.contextmanager
def opened(picture: Any) -> Iterator[Image.Image]:
    """A Pillow image, or an image file by its path, for the block, not decoded yet. Raises UserError, a
    line that names it, where it is no regular file, too large, of no format, or fails in the block."""
    what = f"image {picture}" if isinstance(picture, Path) else "Pillow image"
    try:
        if isinstance(picture, Path) and not stat.S_ISREG(os.stat(picture).st_mode):
            raise ValueError("no regular file")
        is_open = isinstance(picture, Image.Image)
        with (  # a stream: of a path Pillow maps uncompressed pixels in rows of the turned width
            contextlib.nullcontext(picture) if is_open else open(str(picture), "rb") as stream,
            contextlib.nullcontext(picture) if is_open else Image.open(stream, formats=FORMATS) as image,
        ):
            if not 0 < image.width * image.height <= MOST_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels, expected 1 to {MOST_PIXELS:,}")
            yield image
    except (UserError, MemoryError):
        raise
    except FileNotFoundError:
        raise UserError(f"no {what}: there is no such file") from None
    except Exception as error:  # every format fails in its own way on damaged bytes
        reason = str(error).replace(f" <_io.BufferedReader name={str(picture)!r}>", "")  # named once more
        reason = f"{type(error).__name__}: {[*reason.splitlines(), ''][0][:120]}"
        raise UserError(f"unreadable {what} ({reason})") from None


def pixels_of(picture: Any, scale: PixelScale | None = None) -> np.ndarray:
    """A path, a Pillow image or an array, (H, W, 3) or (H, W) uint8 -> (H, W, 3) uint8 (see the top of this
    file). scale: of the data set. Raises UserError on anything else, and on a picture that cannot be read."""
    if isinstance(picture, np.ndarray) and picture.dtype == np.uint8 and picture.size:
        if picture.ndim == 2:
            return np.repeat(picture[..., None], 3, 2)
        if picture.ndim == 3 and picture.shape[2] == 3:
            return picture
    if not isinstance(picture, (str, Path, Image.Image)):
        about = f" {picture.dtype} {picture.shape}" if isinstance(picture, np.ndarray) else ""
        got = type(picture).__name__ + about
        raise UserError(f"expected a path, a Pillow image or an array (H, W[, 3]) of uint8, got {got}")
    with opened(Path(picture) if isinstance(picture, str) else picture) as image:
        if getattr(image, "is_animated", False):
            note_once("of pictures of several frames the first is taken")
        if (values := wide_values(image)) is not None:
            exif = image.info.get("exif")
            image = Image.fromarray((scale or PixelScale()).to_bytes(values))
            image.info = {"exif": exif} if exif else {}
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


def size_of(path: Path) -> tuple[int, int]:
    """Height and width of a file as ``pixels_of`` turns it. Raises UserError."""
    with opened(path) as image:
        if image.format == "TIFF":  # turned already
            return image.size[::-1]
        # PNG's own getexif decodes the whole image where EXIF does not stand before the pixels
        own = image.format == "PNG" and b"eXIf" in path.read_bytes()
        exif = image.getexif() if own else Image.Image.getexif(image)
        sideways = exif.get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        return image.size if sideways else image.size[::-1]


def wide_values(image: Any) -> np.ndarray | None:
    """The values of more than eight bits of a Pillow image, (H, W) or (H, W, 3), whole numbers or floats:
    gray ones, or the colours of a file that is not decoded yet; None of any other, which is not decoded."""
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


def measured(pictures: Sequence[Path | np.ndarray]) -> dict[str, list[float]]:
    """The ranges (``PixelScale``) of a data set with these training pictures, said in a line: MEASURED
    files, evenly spaced, decide by the bits that the file tells or by their values. From 0, or where much is
    negative from the other side of it, to 1.0 (floats; a resized picture may go a little beyond) or BITS."""
    files = list(dict.fromkeys(picture for picture in pictures if isinstance(picture, Path)))
    extremes: dict[str, tuple[float, float]] = {}
    for i in np.linspace(0, len(files) - 1, min(MEASURED, len(files))).astype(int):
        with contextlib.suppress(UserError), opened(files[i]) as image:  # told when its turn comes
            bits = getattr(image, "tag_v2", {}).get(ExifTags.Base.BitsPerSample, (16,))[0]
            if (values := wide_values(image)) is not None and np.isfinite(values).all():
                kind = KINDS[values.dtype.kind]
                least, most = extremes.get(kind, (0, 2**bits - 1 if bits < 16 else 0))
                extremes[kind] = min(least, float(values.min())), max(most, float(values.max()))
    ranges: dict[str, list[float]] = {}
    for kind, (least, most) in extremes.items():
        largest = max(most, -least)
        bits = next((bits for bits in BITS if largest < 2**bits), int(largest).bit_length())
        white = 1 if kind == "float" and largest < 2 else 2**bits - 1
        black = -white if least < -white / 10 else 0
        ranges[kind] = [black, white]
        note(f"pixels of more than 8 bits: {black} is black and {white} white ({least:g} to {most:g} found)")
    return ranges


# ---------------------------------------------------------------- tiles, and back to the whole
class Tile(NamedTuple):
    """Where a tile lies in its picture, in pixels."""

    top: int
    left: int
    height: int
    width: int

    def of(self, pixels: np.ndarray) -> np.ndarray:
        """The part of a picture (H, W, ...) that lies in it."""
        return pixels[self.top : self.top + self.height, self.left : self.left + self.width]


def tiles_of(size: tuple[int, int], side: int) -> list[Tile]:
    """Squares of ``side`` pixels that cover a picture of a size (H, W), evenly spaced, row by row; as high or
    wide as the picture where it is smaller. A side of 0: one tile, the whole picture."""
    sides = np.minimum(side or size, size)
    last = size - sides  # where the lowest and the rightmost begin
    counts = 1 + np.ceil(last / ((1 - OVERLAP) * sides)).astype(int)
    rows, columns = (np.linspace(0, *each).round().astype(int).tolist() for each in zip(last, counts))
    return [Tile(top, left, *sides.tolist()) for top in rows for left in columns]


def whole_scores(scores: np.ndarray, pictures: np.ndarray) -> np.ndarray:
    """The scores of pictures in order from those of their tiles or copies (n), the picture of each given (n):
    the greatest, which a small defect does not share with the rest of its picture."""
    greatest: dict = {}
    for picture, score in zip(pictures, scores):
        greatest[picture] = max(score, greatest.get(picture, score))
    return np.array([*greatest.values()], scores.dtype)


def whole_map(maps: Sequence[np.ndarray], tiles: Sequence[Tile], size: tuple[int, int]) -> np.ndarray:
    """The map (H, W) of a picture from those of its tiles: where they overlap, the greater value."""
    whole = np.full(size, -np.inf, np.float32)
    for values, tile in zip(maps, tiles, strict=True):
        np.maximum(tile.of(whole), values, out=tile.of(whole))
    return whole
