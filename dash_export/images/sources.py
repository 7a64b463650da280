"""Pictures from outside, read without trust: their kind, size and depth are checked before a pixel is decoded."""

from __future__ import annotations

import base64
import re
from contextlib import closing
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from dash_export.errors import RequestError
from dash_export.files.artifacts import open_regular
from dash_export.files.typed_json import shown

Source: TypeAlias = "str | Path | bytes | npt.NDArray[Any] | Image.Image"
"""A path, a data URL, a file's bytes, an array (uint8, or floats in 0..1; [height, width, 3] or [height, width])."""
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
"""Pillow reads 40 more, with code that few files ever tried."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MOST_PIXELS = 1 << 26
"""Bound of a picture. Pillow takes 4 bytes for each; three times as much for a moment where it is transparent."""
MOST_URL = 1 << 26
"""Characters of a data URL."""
_URL = re.compile(r"data:image/[\w.+-]{1,64}(;[\w.=-]{1,64}){0,4};base64", re.IGNORECASE)
_KINDS = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"


def read_image(source: Source, name: str = "", most_pixels: int = MOST_PIXELS) -> Image.Image:
    """Return a picture as upright RGB; `name` is what messages call it, by default its path.

    As transformers' processors do: what is transparent lies on white, CMYK and palettes are converted without a
    profile. The turn that EXIF notes is made; an animation gives its first picture; 16 bits are scaled to 8. The
    kind is what the content says, not the name. Raises RequestError for anything that is not such a picture, and for
    over `most_pixels`.
    """
    name = name or name_of(source)
    if isinstance(source, np.ndarray):
        source = Image.fromarray(_eight_bits(source, name))
    try:
        if isinstance(source, Image.Image):
            _check_size(source, name, most_pixels)
            return _upright(source.copy())
        with closing(_opened(source, name)) as file:
            try:
                with Image.open(file, formats=FORMATS) as image:
                    _check_size(image, name, most_pixels)
                    image.load()
                    return _upright(image)
            except UnidentifiedImageError as error:
                file.seek(0)
                raise RequestError(
                    f"{name} is no picture that can be read (it begins with {file.read(16)!r}). Give {_KINDS}: most "
                    "programs that show it can save it as one."
                ) from error
    except (RequestError, MemoryError):
        raise
    except Image.DecompressionBombError as error:  # Pillow's own bound, of twice as many
        raise RequestError(
            f"{name} is too large: {error!s:.40}; at most {most_pixels} are read. Give it in another size."
        ) from error
    except Exception as error:  # whatever Pillow's readers trip over
        raise RequestError(f"{name} is damaged ({error!s:.100}). Give a whole copy of the picture.") from error


def image_files(folder: Path) -> list[Path]:
    """Return the pictures in a folder and in the folders within, sorted. Hidden ones are left out; links to folders
    are not followed. Raises RequestError where there is none.
    """
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    shown_ones = [path for path in found if not any(part[0] == "." for part in path.relative_to(folder).parts)]
    if files := [path for path in shown_ones if path.is_file()]:
        return files
    what = "has no pictures in it" if folder.is_dir() else "is not a folder"
    raise RequestError(f"{folder} {what}. Give a folder with files named {', '.join(f'*{end}' for end in SUFFIXES)}.")


def name_of(source: Source) -> str:
    """Return what messages call a picture: its path if it has one."""
    path = isinstance(source, Path) or (isinstance(source, str) and not source.startswith("data:"))
    return f"{source!s:.300}" if path else "The picture"


def _opened(source: Any, name: str) -> BinaryIO:
    if isinstance(source, bytes):
        return BytesIO(source)
    if isinstance(source, str) and source[:5].lower() == "data:":
        return BytesIO(_of_url(source, name))
    if isinstance(source, str) and re.match(r"\w+://", source):
        raise RequestError(f"{name} is not fetched: download it, and give the file or its bytes.")
    if not isinstance(source, (str, Path)):
        raise RequestError(
            f"{name} is a {type(source).__name__}; expected a path, bytes, a data URL, an array or a PIL image."
        )
    try:
        return open_regular(Path(source))
    except (OSError, ValueError) as error:  # a NUL byte in the name
        raise RequestError(f"{name} cannot be read: {getattr(error, 'strerror', None) or error}.") from error


def _of_url(url: str, name: str) -> bytes:
    if len(url) > MOST_URL:
        raise RequestError(
            f"{name} is a data URL of {len(url)} characters; at most {MOST_URL} are read. Make it smaller."
        )
    head, _, body = url.partition(",")
    if not _URL.fullmatch(head):
        raise RequestError(f"{name} is a data URL that begins with {shown(head[:50])}; expected data:image/...;base64,")
    try:
        return base64.b64decode("".join(body.split()), validate=True)  # encoders break lines
    except ValueError as error:
        raise RequestError(
            f"{name} is a data URL whose data is not base64 ({error}). Encode its bytes anew."
        ) from error


def _eight_bits(array: npt.NDArray[Any], name: str) -> npt.NDArray[np.uint8]:
    if not array.size or array.ndim not in (2, 3) or array.shape[2:] not in ((), (3,)):
        raise RequestError(f"{name} is an array {list(array.shape)}; expected [height, width, 3] or [height, width].")
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if not np.issubdtype(array.dtype, np.floating):
        raise RequestError(f"{name} is an array of {array.dtype}; expected uint8, or floats in 0 to 1.")
    if not (array.min() >= 0 and array.max() <= 1):  # false for NaN, too
        raise RequestError(f"{name} holds numbers outside of 0 to 1. Divide them by their range, or give uint8.")
    made: npt.NDArray[np.uint8] = np.rint(array * array.dtype.type(255)).astype(np.uint8)
    return made


def _check_size(image: Image.Image, name: str, most: int) -> None:
    width, height = image.size
    if not 0 < width * height <= most:
        raise RequestError(f"{name} has {width} x {height} pixels; 1 to {most} are read. Give it in another size.")
    if image.mode in ("I", "F"):
        raise RequestError(f"{name} has 32 bits a pixel, of no known range. Save it with 8 or 16 bits.")


def _upright(image: Image.Image) -> Image.Image:
    """Turn and convert a loaded picture, which is changed."""
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I;16"):  # convert() would clip all above 255
        image = Image.fromarray(np.rint(np.asarray(image) / np.float32(257)).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
