"""Pictures from outside: what one expects, or an error that names the picture and what to do."""

import base64
import io
import os
import struct
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps, PngImagePlugin

from dash_export.errors import RequestError
from dash_export.images.sources import FORMATS, MOST_PIXELS, image_files, read_image

SIZE = (64, 32)


def scene(mode: str = "RGB") -> Image.Image:
    """Red above left, green above right, blue below: no two turns of it are alike."""
    image = Image.new("RGB", SIZE, "blue")
    image.paste("red", (0, 0, 32, 16))
    image.paste("lime", (32, 0, 64, 16))
    return image.convert(mode)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    if kind in ("JPEG", "MPO"):
        options = {"quality": 95, "subsampling": 0} | options
    if kind == "WEBP":
        options = {"lossless": True} | options
    image.save(stream, kind, **options)
    return stream.getvalue()


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    parts = [
        struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data)) for tag, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def header(width: int, height: int, bits: int = 8, colour: int = 2) -> tuple[bytes, bytes]:
    return b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)


def close(image: Image.Image, wanted: Image.Image, tolerance: int = 6) -> None:
    assert (image.mode, image.size) == ("RGB", wanted.size)
    assert np.abs(np.asarray(image, int) - np.asarray(wanted.convert("RGB"), int)).max() <= tolerance


@pytest.mark.parametrize("kind", FORMATS)
def test_every_kind_from_every_source(kind: str, tmp_path: Path) -> None:
    data = encoded(scene(), kind)
    path = tmp_path / "x.png"  # the content counts
    path.write_bytes(data)
    url = f"data:image/{kind.lower()};base64,{base64.b64encode(data).decode()}"
    for source in (data, path, str(path), url, Image.open(path)):
        close(read_image(source), scene())


def test_arrays() -> None:
    pixels = np.asarray(scene())
    for source in (pixels, pixels / 255, (pixels / np.float16(255)).astype(np.float16), pixels[:, ::-1][:, ::-1]):
        close(read_image(source), scene(), 0)
    close(read_image(pixels[..., 2]), scene().getchannel("B"), 0)
    close(read_image(np.ones((3, 2))), Image.new("L", (2, 3), 255), 0)


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros((3, 4, 4), np.uint8), r"an array \[3, 4, 4\]; expected \[height, width, 3\] or \[height, width\]"),
        (np.zeros(4, np.uint8), r"an array \[4\]"),
        (np.zeros((0, 4, 3), np.uint8), r"an array \[0, 4, 3\]"),
        (np.zeros((4, 4), np.uint16), "an array of uint16; expected uint8, or floats in 0 to 1"),
        (np.zeros((4, 4), object), "an array of object"),
        (np.full((4, 4), 1.5), "numbers outside of 0 to 1. Divide them"),
        (np.full((4, 4), np.nan), "numbers outside of 0 to 1"),
        (np.zeros((1, MOST_PIXELS + 1), np.uint8), f"has {MOST_PIXELS + 1} x 1 pixels; 1 to {MOST_PIXELS} are read"),
    ],
    ids=lambda value: str(value.shape) if isinstance(value, np.ndarray) else "",
)
def test_arrays_that_are_no_picture(array: np.ndarray[Any, Any], said: str) -> None:
    with pytest.raises(
        RequestError, match=f"^frame 7 (is|holds|has) {said.removeprefix('has ')}|^frame 7 holds {said}"
    ):
        read_image(array, "frame 7")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_the_turn_that_exif_notes_is_made(kind: str, turn: int, tmp_path: Path) -> None:
    """As a camera held upside down writes it."""
    back = {1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}[turn]
    stored = scene()
    exif = stored.getexif()
    exif[0x0112] = back
    stored = ImageOps.exif_transpose(stored)
    exif[0x0112] = turn
    data = encoded(stored, kind, exif=exif)
    close(read_image(data), scene())
    (tmp_path / "x").write_bytes(data)
    with Image.open(tmp_path / "x") as given:
        close(read_image(given), scene())
        assert kind == "TIFF" or given.getexif()[0x0112] == turn  # it was not changed; a TIFF turns itself


def test_what_is_transparent_lies_on_white() -> None:
    clear = scene("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(SIZE))
    wanted = Image.alpha_composite(Image.new("RGBA", SIZE, "white"), clear)
    for kind in ("PNG", "WEBP", "TIFF"):
        close(read_image(encoded(clear, kind)), wanted, 1)
    palette = scene().quantize(8)
    transparent = palette.getpixel((0, 0))
    wanted = scene()
    wanted.paste("white", (0, 0, 32, 16))
    for kind in ("PNG", "GIF"):
        close(read_image(encoded(palette, kind, transparency=transparent)), wanted)
    close(read_image(encoded(scene(), "PNG", transparency=(255, 0, 0))), wanted)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "LAB", "LA", "RGBA"])
def test_every_mode(mode: str) -> None:
    if mode == "LAB":
        turn = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
        image = ImageCms.applyTransform(scene(), turn)
    else:
        image = scene(mode)
    grey = mode in ("1", "L", "LA")
    if mode != "YCbCr":  # Pillow 11 cannot read its own
        close(read_image(encoded(image, "TIFF")), scene(mode) if grey else scene(), 30 if mode == "LAB" else 6)
    if mode in ("L", "CMYK", "YCbCr"):
        close(read_image(encoded(image, "JPEG")), scene("L") if grey else scene())


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_are_scaled_not_clipped(kind: str) -> None:
    values = np.linspace(0, 65535, SIZE[0] * SIZE[1]).astype(np.uint16).reshape(SIZE[1], SIZE[0])
    image = read_image(encoded(Image.fromarray(values), kind))
    close(image, Image.fromarray(np.rint(values / 257).astype(np.uint8)), 0)
    Image.frombytes("I;16B", SIZE, values.astype(">u2").tobytes()).save(big := io.BytesIO(), "TIFF")
    close(read_image(big.getvalue()), image, 0)


def test_16_bit_colours() -> None:
    rows = b"".join(b"\0" + struct.pack(">3H", 65535, 32896, 0) * 2 for _ in range(2))
    data = png(header(2, 2, 16), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    assert np.asarray(read_image(data)).tolist() == [[[255, 128, 0]] * 2] * 2


@pytest.mark.parametrize("mode", ["I", "F"])
def test_32_bits_are_refused(mode: str) -> None:
    with pytest.raises(
        RequestError, match=r"^The picture has 32 bits a pixel, of no known range. Save it with 8 or 16"
    ):
        read_image(encoded(Image.new(mode, SIZE), "TIFF"))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_the_first_picture_of_several(kind: str) -> None:
    """Of an animation, or of a camera's JPEG with a preview in it."""
    more = [Image.new("RGB", SIZE, "black"), Image.new("RGB", SIZE, "white")]
    close(read_image(encoded(scene(), kind, save_all=True, append_images=more)), scene())


def test_one_pixel() -> None:
    for kind in FORMATS:
        assert read_image(encoded(Image.new("RGB", (1, 1), "white"), kind)).getpixel((0, 0)) == (255, 255, 255)


NOT_PICTURES = {
    "photo.png": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
    "page.png": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "empty.jpg": b"",
    "text.jpg": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a",
    "phone.jpg": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
    "vector.tif": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
    "icon.png": None,
    "old.bmp": None,
}


@pytest.mark.parametrize("name", NOT_PICTURES)
def test_what_is_no_picture_of_a_known_kind(name: str, tmp_path: Path) -> None:
    data = NOT_PICTURES[name]
    path = tmp_path / name
    path.write_bytes(encoded(scene(), {"icon": "ICO", "old": "PCX"}[path.stem]) if data is None else data)
    with pytest.raises(
        RequestError, match=r"is no picture that can be read \(it begins with b.*Give PNG, JPEG"
    ) as error:
        read_image(path)
    assert str(error.value).startswith(str(path))
    with pytest.raises(RequestError, match=r"^The picture is no picture that"):
        read_image(path.read_bytes())


@pytest.mark.parametrize("kind", FORMATS)
def test_a_damaged_picture_is_named(kind: str, tmp_path: Path) -> None:
    """Cut in the middle of its pixels."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 90, 3), np.uint8))
    data = encoded(noise, kind)
    path = tmp_path / "mine.png"
    path.write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(RequestError, match=r"is damaged|is no picture") as error:
        read_image(path)
    assert str(error.value).startswith(str(path))


def test_a_bomb_is_refused_before_it_is_decoded() -> None:
    """40,000 x 40,000 pixels in 5 MB (or in 100 bytes, as a header alone says)."""
    whole = zlib.compressobj(9)
    rows = (whole.compress(bytes(40_001 * 100)) + whole.flush(zlib.Z_FULL_FLUSH)) * 400
    bombs = [
        png(header(40_000, 40_000, 8, 0), (b"IDAT", rows), (b"IEND", b"")),
        png(header(60_000, 60_000), (b"IDAT", b"")),
    ]
    bombs += [encoded(Image.new("1", (20_000, 20_000)), "TIFF", compression="group4")]
    bombs += [encoded(Image.new("P", (9000, 9000)), "GIF")]
    for bomb in bombs:
        tracemalloc.start()
        with pytest.raises(RequestError, match=r"^a bomb (is|has) .* pixels.* are read. Give it in another size"):
            read_image(bomb, "a bomb")
        assert tracemalloc.get_traced_memory()[1] < 8 * len(bomb) + (1 << 20)
        tracemalloc.stop()
    with pytest.raises(RequestError, match="has 64 x 32 pixels; 1 to 900 are read"):
        read_image(scene(), most_pixels=900)
    with pytest.raises(RequestError, match="has 64 x 32 pixels"):
        read_image(encoded(scene(), "PNG"), most_pixels=900)


def test_a_text_bomb_in_a_picture() -> None:
    """A comment that decompresses to 100 MB."""
    note = b"note\0\0" + zlib.compress(bytes(100 << 20), 9)
    pixels = zlib.compress(b"\0\1\2\3")
    for where in (1, 2):
        chunks = [header(1, 1), (b"IDAT", pixels), (b"IEND", b"")]
        chunks.insert(where, (b"zTXt", note))
        try:
            assert read_image(png(*chunks)).size == (1, 1)
        except RequestError as error:
            assert "Decompressed data too large" in str(error)  # noqa: PT017
    assert PngImagePlugin.MAX_TEXT_CHUNK <= 1 << 20


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("data:text/html;base64,AAAA", "a data URL that begins with 'data:text/html;base64'; expected data:image/"),
        ("data:image/png,AAAA", "expected data:image/...;base64,"),
        ("data:image/png;base64", "a data URL whose data is|no picture"),
        ("data:image/png;base64,AA*A", "whose data is not base64"),
        ("data:image/png;base64,AAAAA", "whose data is not base64"),
        ("data:image/png;base64,\xe9AAA", "whose data is not base64"),
        ("data:image/png;base64,", "no picture that can be read"),
        ("data:" + "a" * 100_000, "expected data:image/"),
        ("data:image/png;base64," + "A" * (1 << 26), "a data URL of 67108886 characters; at most 67108864"),
        ("data:image/png" + ";a=b" * 20_000 + ";base64,AAAA", "expected data:image/"),
    ],
    ids=range(10),
)
def test_data_urls_that_are_none(url: str, said: str) -> None:
    with pytest.raises(RequestError, match=said) as error:
        read_image(url)
    assert str(error.value).startswith("The picture is ")
    assert len(str(error.value)) < 400


def test_data_urls_as_programs_write_them() -> None:
    text = base64.encodebytes(encoded(scene(), "PNG")).decode()  # with line ends
    for url in (f"data:image/png;base64,{text}", f"DATA:image/PNG;charset=utf-8;BASE64,{text}"):
        close(read_image(url), scene(), 0)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("absent.png", "^absent.png cannot be read: No such file or directory"),
        (Path("absent.png"), "^absent.png cannot be read"),
        (".", "^. cannot be read: "),
        ("a\0b", "cannot be read: (open: )?embedded null"),
        ("x" * 100_000, "^x{300} cannot be read: File name too long"),
        ("https://example.com/a.png", "^https://example.com/a.png is not fetched: download it"),
        ("file:///etc/passwd", "^file:///etc/passwd is not fetched"),
        (3, "^The picture is a int; expected a path, bytes, a data URL, an array or a PIL image"),
        (None, "^The picture is a NoneType"),
        (Path("/dev/zero"), "^/dev/zero cannot be read: it is not a regular file"),
    ],
    ids=range(10),
)
def test_what_cannot_be_read(source: Any, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        read_image(source)


def test_a_pipe_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(RequestError, match="not a regular file"):
        read_image(tmp_path / "x.png")


def test_the_pictures_of_a_folder(tmp_path: Path) -> None:
    for name in ("b.PNG", "a/z.jpg", "a/y/x.tiff", "c.txt", "._b.png", ".cache/d.png", "e.svg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in image_files(tmp_path)] == ["a/y/x.tiff", "a/z.jpg", "b.PNG"]
    hidden = tmp_path / ".cache"
    assert image_files(hidden) == [hidden / "d.png"]


def test_a_folder_without_pictures(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"has no pictures in it. Give a folder with files named \*\.png, "):
        image_files(tmp_path)
    with pytest.raises(RequestError, match="absent is not a folder"):
        image_files(tmp_path / "absent")
