"""Pictures are prepared as transformers' own processors do it, in every configuration of its five classes."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from dash_export.errors import CheckpointError, DashError, RequestError
from dash_export.images.processor import ImageProcessor

CLASSES: dict[str, Any] = {
    "BitImageProcessor": BitImageProcessorPil,
    "CLIPImageProcessor": CLIPImageProcessorPil,
    "SiglipImageProcessor": SiglipImageProcessorPil,
    "ViTImageProcessor": ViTImageProcessorPil,
}
SIZES = [(1, 1), (2, 3), (97, 64), (64, 97), (224, 224), (225, 300), (401, 333), (17, 300)]
"""Width and height."""
MODES = ["RGB", "L", "RGBA", "LA", "P", "CMYK", "1"]
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
STEPS = dict.fromkeys(("do_normalize", "do_resize"), True)
DINOV2 = {
    "image_processor_type": "BitImageProcessor", "do_center_crop": True, "do_convert_rgb": True, "do_rescale": True,
    "crop_size": {"height": 224, "width": 224}, "size": {"shortest_edge": 256}, "resample": 3,
    "rescale_factor": 0.00392156862745098, **STEPS, **IMAGENET,
}  # fmt: skip
DINOV3 = {
    **dict.fromkeys(("crop_size", "device", "disable_grouping", "do_center_crop", "do_convert_rgb", "return_tensors")),
    "image_processor_type": "DINOv3ViTImageProcessorFast", "data_format": "channels_first", "input_data_format": None,
    "default_to_square": True, "do_rescale": True, "size": {"height": 224, "width": 224}, "resample": 2,
    "rescale_factor": 0.00392156862745098, **STEPS, **IMAGENET,
}  # fmt: skip
OPENAI_CLIP = {
    "feature_extractor_type": "CLIPFeatureExtractor", "crop_size": 224, "size": 224, "do_center_crop": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3, **STEPS,
}  # fmt: skip
"""The files of facebook/dinov2-small, facebook/dinov3-vits16-pretrain-lvd1689m and openai/clip-vit-base-patch32."""
CHANGES: list[dict[str, Any]] = [
    {},
    {"size": 100, "crop_size": 90},
    {"size": {"height": 70, "width": 112}, "crop_size": {"height": 64, "width": 101}, "do_center_crop": True},
    {"size": {"shortest_edge": 61}, "crop_size": 90, "do_center_crop": True, "resample": 1},
    {"size": {"height": 98, "width": 98}, "do_center_crop": False, "resample": 0},
    {"do_resize": False, "do_center_crop": True, "crop_size": {"height": 63, "width": 120}},
    {"do_rescale": False, "image_mean": [127.5, 120.0, 110.0], "image_std": [50.0, 60.0, 70.0]},
    {"rescale_factor": 1 / 127.5, "image_mean": [0.0, 1.0, 2.0], "image_std": [1.0, 2.0, 0.5]},
    {"do_normalize": False, "resample": 4},
    {"size": {"height": 98, "width": 98}, "do_center_crop": False, "resample": 5, "do_convert_rgb": True},
]


def picture(size: tuple[int, int], mode: str = "RGB", seed: int = 0) -> Image.Image:
    """A picture with edges and noise."""
    rng, (width, height) = np.random.default_rng([seed, *size]), size
    coarse = rng.integers(0, 256, (height // 20 + 1, width // 20 + 1, 4), np.uint8)
    pixels = np.kron(coarse, np.ones((20, 20, 1), np.uint8))[:height, :width]
    noisy = np.clip(pixels + rng.normal(0, 20, pixels.shape), 0, 255).astype(np.uint8)
    image = Image.fromarray(noisy, "RGBA")
    return image if mode == "RGBA" else image.convert("LA" if mode == "LA" else "RGB").convert(mode)


def config_of(kind: str, change: dict[str, Any]) -> dict[str, Any]:
    return json.loads(CLASSES[kind]().to_json_string()) | change


def theirs(config: dict[str, Any], image: Image.Image) -> np.ndarray[Any, Any]:
    kind = str(config.get("image_processor_type") or config["feature_extractor_type"])
    processor = CLASSES[kind.replace("FeatureExtractor", "ImageProcessor")].from_dict(config)
    return np.asarray(processor(image, do_convert_rgb=True, return_tensors="np")["pixel_values"][0])


def compare(config: dict[str, Any], image: Image.Image) -> None:
    """Equal within 1/255 of a pixel's range, whatever it is scaled to."""
    processor = ImageProcessor.parse(json.dumps(config))
    found, wanted = processor(image), theirs(config, image)
    assert found.dtype == np.float32
    assert found.shape == wanted.shape == (3, *processor.size)
    step = processor.scale / np.array(processor.std)[:, None, None]
    assert (np.abs(found - wanted) <= 1.001 * step).all()
    assert np.abs(found - wanted).max() < 1e-5  # in fact the same


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: "-".join(change) or "defaults")
@pytest.mark.parametrize("kind", CLASSES)
def test_pictures_are_those_of_transformers(kind: str, change: dict[str, Any]) -> None:
    config = config_of(kind, change)
    if "Siglip" in kind and change.get("size") == 100:
        config["do_center_crop"] = True  # a number is its shorter edge
    for size in SIZES:
        compare(config, picture(size))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", CLASSES)
def test_all_modes(kind: str, mode: str) -> None:
    compare(config_of(kind, {}), picture((90, 61), mode))


@pytest.mark.parametrize("config", [DINOV2, OPENAI_CLIP], ids=["dinov2", "clip"])
def test_published_files(config: dict[str, Any]) -> None:
    for size in SIZES:
        compare(config, picture(size))


@pytest.mark.parametrize("kind", CLASSES)
def test_silent_files(kind: str) -> None:
    for given in (kind, f"{kind}Fast"):
        assert ImageProcessor.parse(json.dumps({"image_processor_type": given})) == ImageProcessor.parse(
            json.dumps(config_of(kind, {}))
        )


@pytest.mark.parametrize("resample", [2, 3])
def test_dinov3_is_resized_in_floating_point(resample: int) -> None:
    """As torch does it, which its processor asks for; that one needs torchvision."""
    modes = {2: "bilinear", 3: "bicubic"}
    processor = ImageProcessor.parse(json.dumps(DINOV3 | {"resample": resample}))
    mean, std = (torch.tensor(DINOV3[name])[:, None, None] for name in ("image_mean", "image_std"))
    for size in SIZES:
        pixels = torch.from_numpy(np.array(picture(size))).permute(2, 0, 1)[None] / 255
        made = torch.nn.functional.interpolate(pixels, (224, 224), mode=modes[resample], antialias=True)
        found = processor(picture(size))
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, ((made[0] - mean) / std).numpy(), atol=1e-3)  # rounded to 8 bits, 0.02


def test_a_batch_is_its_pictures() -> None:
    processor = ImageProcessor.parse(json.dumps(DINOV2))
    images = [picture((90, 61)), np.asarray(picture((30, 50))), picture((300, 200), "L")]
    made = processor.batch(images)
    assert made.shape == (3, 3, 224, 224)
    for each, image in zip(made, images, strict=True):
        np.testing.assert_array_equal(each, processor(image))
    assert processor.batch([]).shape == (0, 3, 224, 224)


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (64, 64)])
@pytest.mark.parametrize(
    "sizes",
    [{"size": {"shortest_edge": 256}, "crop_size": 224}, {"size": {"height": 70, "width": 112}, "crop_size": 60},
     {"size": {"shortest_edge": 80}, "crop_size": {"height": 90, "width": 70}}, {"do_resize": False, "crop_size": 60}],
)  # fmt: skip
def test_the_part_that_is_seen(sizes: dict[str, Any], size: tuple[int, int]) -> None:
    """A picture whose red and green tell where a pixel lies, from 0 to 1."""
    (width, height), off = size, {"do_normalize": False, "resample": 2}
    across, down = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    pixels = (255 * np.dstack([across, down, np.ones_like(across)])).round().astype(np.uint8)
    config = {"image_processor_type": "BitImageProcessor", "do_center_crop": True, **off, **sizes}
    processor = ImageProcessor.parse(json.dumps(config))
    red, green, blue = processor(Image.fromarray(pixels))
    left, top, right, bottom = processor.seen(width, height)
    for values, inside, begin, end in ((red[30], blue[30], left, right), (green[:, 30], blue[:, 30], top, bottom)):
        expected = begin + (np.arange(len(values)) + 0.5) * (end - begin) / len(values)
        np.testing.assert_array_equal(inside > 0.5, (expected > 0) & (expected < 1))
        there = (expected > 0.02) & (expected < 0.98)  # resizing has less to go by at an edge
        np.testing.assert_allclose(values[there], expected[there], atol=0.01)


def test_a_picture_too_thin_to_resize() -> None:
    processor = ImageProcessor.parse(json.dumps(DINOV2))
    processor(picture((250, 1)))
    with pytest.raises(RequestError, match=r"mine\.png is too long and thin \(2000000 x 1\): cut out"):
        processor(Image.new("RGB", (1, 2_000_000)), "mine.png")


def test_the_processor_of_a_processor_config() -> None:
    inside = {"image_processor": DINOV2, "processor_class": "X"}
    assert ImageProcessor.parse(json.dumps(inside)) == ImageProcessor.parse(json.dumps(DINOV2))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"image_processor_type": "ViltImageProcessor"},
            "image_processor_type = 'ViltImageProcessor' is not one of Bit",
        ),
        ({"image_processor_type": None}, "image_processor_type = None is not one of"),
        ({"do_thumbnail": True}, "unknown 'do_thumbnail'"),
        ({"do_pad": True}, "do_pad = True is not one of False"),
        ({"size": {"longest_edge": 224}}, "size: unknown 'longest_edge'. Known: height, width, shortest_edge"),
        ({"size": {"height": 224}}, "size = {'height': 224}; expected height and width, or shortest_edge"),
        ({"size": {"shortest_edge": 10**6}}, "is outside 1 to 4096"),
        ({"size": None}, "size must be"),
        ({"do_center_crop": None}, "do_center_crop must be bool, got None"),
        ({"do_center_crop": False}, "pictures of different sizes come out; expected do_center_crop, or a height"),
        ({"do_resize": False, "do_center_crop": False}, "pictures of different sizes come out"),
        ({"resample": 6}, "resample = 6 is outside 0 to 5"),
        ({"rescale_factor": 0}, "rescale_factor = 0.0 is outside"),
        ({"image_mean": [0.5]}, "image_mean and image_std have another number of values than 3"),
        ({"image_std": [0.5, 0.0, 0.5]}, r"image_std\[1\] = 0.0 is outside"),
        ({"image_mean": "x"}, "image_mean must be a list"),
    ],
)
def test_what_is_not_supported_is_named(change: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=said) as error:
        ImageProcessor.parse(json.dumps(DINOV2 | change), "my/preprocessor_config.json")
    assert "my/preprocessor_config.json asks for pictures in a way that is not supported" in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "3", "{", "[" * 5000, '{"image_processor": 3}', "\ud800"])
def test_no_json(text: str) -> None:
    with pytest.raises(DashError, match="mine is not a JSON object"):
        ImageProcessor.parse(text, "mine")
