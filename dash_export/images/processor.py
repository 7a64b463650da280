"""A picture as its model expects it: resized, cropped and normalized as the model's `preprocessor_config.json` says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from dash_export.errors import CheckpointError, RequestError
from dash_export.files.typed_json import Within, WrongFieldError, shown, typed
from dash_export.images.sources import Source, name_of, read_image

Pixels = npt.NDArray[np.float32]
_Edge = Annotated[int, Within(1, 4096)]
_MOST_RESIZED = 1 << 24
"""Pixels of a picture before its middle is cut out: a line of 1,000 pixels would become as many squares."""
_CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
_IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
_HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
_ALL = {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
_SQUARE = _ALL | {"size": {"height": 224, "width": 224}, "do_center_crop": False, "crop_size": None}
_MIDDLE = _ALL | {"size": {"shortest_edge": 224}, "do_center_crop": True, "crop_size": 224}
_EXACT = "DINOv3ViTImageProcessor"
_KINDS: dict[str, dict[str, Any]] = {
    "BitImageProcessor": _MIDDLE | _CLIP | {"resample": 3, "default_to_square": False},
    "CLIPImageProcessor": _MIDDLE | _CLIP | {"resample": 3, "default_to_square": False},
    "ViTImageProcessor": _SQUARE | _HALF | {"resample": 2, "default_to_square": True},
    "SiglipImageProcessor": _SQUARE | _HALF | {"resample": 3, "default_to_square": False},
    _EXACT: _SQUARE | _IMAGENET | {"resample": 2, "default_to_square": True},
}
"""Defaults of transformers' classes, where the file is silent."""
_IGNORED = {
    *("image_processor_type", "feature_extractor_type", "processor_class", "_processor_class", "_valid_processor_keys"),
    *("do_convert_rgb", "data_format", "input_data_format", "return_tensors", "device", "disable_grouping"),
}
"""Keys that change nothing here: pictures are RGB, one comes out as [3, height, width]."""


@dataclass(frozen=True)
class _Size:
    height: _Edge | None = None
    width: _Edge | None = None
    shortest_edge: _Edge | None = None


@dataclass(frozen=True)
class _Config:
    do_resize: bool
    size: Any
    resample: Annotated[int, Within(0, 5)]
    default_to_square: bool
    do_center_crop: bool
    crop_size: Any
    do_rescale: bool
    rescale_factor: Annotated[float, Within(1e-6, 1)]
    do_normalize: bool
    image_mean: tuple[float, ...]
    image_std: tuple[Annotated[float, Within(1e-6)], ...]
    do_pad: Literal[False] = False


@dataclass(frozen=True)
class ImageProcessor:
    """Steps of preparing a picture. `resize`: (height, width), (shorter edge,) or (); `crop`: (height, width) of the
    middle, black outside, or (); then (pixel * scale - mean) / std. `exact`: resized in floating point.
    """

    resize: tuple[int, ...]
    resample: int
    crop: tuple[int, ...]
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    exact: bool = False

    @classmethod
    def parse(cls, text: str, name: str = "preprocessor_config.json") -> ImageProcessor:
        """Read the JSON of a `preprocessor_config.json` or `processor_config.json`. Raises CheckpointError, which says
        what is wrong in `name`, or what of it is not supported.
        """
        try:
            data = json.loads(text)
            data = data.get("image_processor", data)
            return _checked(data)
        except (ValueError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{name} is not a JSON object ({error!s:.100}): download it again.") from error
        except WrongFieldError as error:
            raise CheckpointError(f"{name} asks for pictures in a way that is not supported: {error}") from error

    @property
    def size(self) -> tuple[int, int]:
        """The (height, width) of what comes out."""
        height, width = self.crop or self.resize
        return height, width

    def __call__(self, image: Source, name: str = "") -> Pixels:
        """Return a picture as [3, height, width]. Raises RequestError as `read_image` does, and for a picture too long
        and thin to be resized.
        """
        name = name or name_of(image)
        picture = read_image(image, name)
        parts = picture.split() if self.exact else [picture]
        made = np.dstack([np.asarray(self._cut(part, name)) for part in parts])
        scaled = (made * np.float64(self.scale)).astype(np.float32)
        mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        return np.ascontiguousarray(((scaled - mean) / std).transpose(2, 0, 1))

    def batch(self, images: Sequence[Source]) -> Pixels:
        """Return pictures as [n, 3, height, width]."""
        made = np.empty((len(images), 3, *self.size), np.float32)
        for place, image in zip(made, images, strict=True):
            place[...] = self(image)
        return made

    def groups(self, images: Sequence[Source]) -> list[tuple[npt.NDArray[np.intp], Pixels]]:
        """Return (places, pictures) of those that are computed together: all, as all have one size."""
        return [(np.arange(len(images)), self.batch(images))]

    def seen(self, width: int, height: int) -> tuple[float, float, float, float]:
        """Return the part of a picture of this size that comes out: left, top, right and bottom as fractions of it,
        below 0 and above 1 where black is added.
        """
        (width, height), (left, top, right, bottom) = self._frame(width, height)
        return left / width, top / height, right / width, bottom / height

    def _frame(self, width: int, height: int) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
        """Return (width, height) after resizing, and (left, top, right, bottom) of what is cut out then."""
        if self.resize:
            other = int(self.resize[0] * max(width, height) / min(width, height))
            height, width = (*self.resize, other)[:2] if width > height else (other, *self.resize)[-2:]
        high, wide = self.size
        left, top = (width - wide) // 2, (height - high) // 2
        return (width, height), (left, top, left + wide, top + high)

    def _cut(self, picture: Image.Image, name: str) -> Image.Image:
        if self.exact:
            picture = picture.convert("F")
        size, frame = self._frame(*picture.size)
        if self.resize:
            if size[0] * size[1] > _MOST_RESIZED:
                short, long = sorted(picture.size)
                raise RequestError(f"{name} is too long and thin ({long} x {short}): cut out the part that matters.")
            picture = picture.resize(size, Image.Resampling(self.resample))
        return picture.crop(frame)


def _edges(key: str, value: Any, square: bool) -> tuple[int, ...]:
    """Return (height, width), or (shorter edge,)."""
    if isinstance(value, int):
        value = {"height": value, "width": value} if square else {"shortest_edge": value}
    size = typed(_Size, value, key)
    if size.shortest_edge and not (size.height or size.width):
        return (size.shortest_edge,)
    if size.height and size.width and not size.shortest_edge:
        return size.height, size.width
    raise WrongFieldError(f"{key} = {shown(value)}; expected height and width, or shortest_edge.")


def _checked(data: dict[str, Any]) -> ImageProcessor:
    given = data.get("image_processor_type") or data.get("feature_extractor_type")
    kind = str(given).removesuffix("Fast").removesuffix("Pil").replace("FeatureExtractor", "ImageProcessor")
    if kind not in _KINDS:
        raise WrongFieldError(f"image_processor_type = {shown(given)} is not one of {', '.join(_KINDS)}.")
    keys = dict(_KINDS[kind])
    # Versions of transformers differ in whether null is "off" or "as usual": it is read where that is the same.
    keys |= {key: value for key, value in data.items() if key not in _IGNORED and (value is not None or keys.get(key))}
    config = typed(_Config, keys, "it")
    resize = _edges("size", config.size, config.default_to_square) if config.do_resize else ()
    crop = _edges("crop_size", config.crop_size, True) if config.do_center_crop else ()
    if len(crop or resize) != 2:
        raise WrongFieldError("pictures of different sizes come out; expected do_center_crop, or a height and a width.")
    if {len(config.image_mean), len(config.image_std)} != {3}:
        raise WrongFieldError("image_mean and image_std have another number of values than 3.")
    mean, std = (config.image_mean, config.image_std) if config.do_normalize else ((0.0,) * 3, (1.0,) * 3)
    scale = config.rescale_factor if config.do_rescale else 1.0
    return ImageProcessor(resize, config.resample, crop, scale, mean, std, exact=kind == _EXACT)
