"""What is fuzzed: every reader of something that comes from outside, each with small sound files to begin with."""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path

import click
import numpy as np
from PIL import Image

from dash_export import DashRuntime
from dash_export.backends.onnxruntime.ort_engine import OrtEngine, session_options
from dash_export.building import build
from dash_export.building.exporting import export
from dash_export.building.graph_runs import graph_run
from dash_export.bundle.bundle import Bundle
from dash_export.bundle.layout import BUILD, MANIFEST
from dash_export.bundle.policy_file import load_policy
from dash_export.bundle.recipe import load_recipe
from dash_export.commands.options import AMOUNTS, BUDGETS, KINDS, LAYERS
from dash_export.commands.run import read_prompts as read_plain_prompts
from dash_export.errors import BAD_GRAPH
from dash_export.graphs.lower.surgery import load_graph
from dash_export.images.processor import ImageProcessor
from dash_export.images.sources import read_image
from dash_export.models import open_checkpoint, row_blocks
from dash_export.models.config import FAMILIES, decoder_spec
from dash_export.models.readers.weights import read_json
from dash_export.text.chats import read_prompts
from dash_export.text.tokenizer import Text
from tests.forged import rehash, reseal
from tests.fuzz import mutators
from tests.fuzz.mutators import Mutator

MESSAGES = [{"role": "user", "content": "Hello, <|im_start|> 12\n"}, {"role": "assistant", "content": "hé"}]
MODEL, SHARDED, BUNDLE = "model", "sharded", "tiny.dash"
BUILT = f"{BUNDLE}/engines/cpu-fp32"


def make_seeds(folder: Path) -> None:
    """Write a folder of sound files: a model in three forms, a policy, a bundle with its builds, lines, a template."""
    from transformers import AutoConfig

    from dash_export.bundle.policy_file import save_policy
    from tests.models.helpers import DIMENSIONS, write_gguf
    from tests.tiny import save_model, tiny_bundle, tiny_policy

    small = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    small |= {"vocab_size": 260}
    tied = small | {"num_hidden_layers": 1, "tie_word_embeddings": True}
    model = save_model(folder / MODEL, **tied)
    (folder / MODEL / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>", "chat_template": "{{ 1 }}"}')
    (folder / "families").mkdir()
    for family in FAMILIES:
        AutoConfig.for_model(family, **DIMENSIONS).to_json_file(folder / "families" / f"{family}.json", use_diff=False)
    save_model(folder / SHARDED, **tied)
    model.save_pretrained(folder / SHARDED, max_shard_size="20KB")
    (folder / SHARDED / "model.safetensors").unlink(missing_ok=True)
    write_gguf(folder / "a.gguf", model, quantize="Q8_0")
    qwen = save_model(folder / "qwen2", "qwen2", **tied)
    write_gguf(folder / "b.gguf", qwen, pre="qwen2", metadata={"general.alignment": 32, "tokenizer.ggml.scores": [0.5]})
    gemma = save_model(folder / "gemma2", "gemma2", **tied, head_dim=16, query_pre_attn_scalar=16, sliding_window=9)
    letters = ["<unk>", "<s>", "</s>", *(chr(ord("a") + place) for place in range(26)), "\u2581", "he", "\u2581he"]
    spm = {"model": "llama", "tokens": letters, "scores": [-float(place) for place in range(len(letters))]}
    spm |= {"token_type": [2, 3, 3, *[1] * (len(letters) - 3)], "bos_token_id": 1, "eos_token_id": 2}
    spm_keys = {f"tokenizer.ggml.{key}": value for key, value in spm.items()}
    write_gguf(folder / "c.gguf", gemma, metadata=spm_keys, remove=("tokenizer.ggml.merges",))
    phi = save_model(folder / "phi3", "phi3", **(tied | {"tie_word_embeddings": False}), pad_token_id=0)
    factors = {f"rope_factors_{name}.weight": np.ones(8, np.float32) for name in ("long", "short")}
    write_gguf(folder / "d.gguf", phi, extra_tensors=factors)
    large = save_model(folder / "large", **(tied | {"hidden_size": 256, "intermediate_size": 256}))
    (folder / "k").mkdir()
    for kind in ("Q4_K", "Q5_K", "Q6_K"):
        write_gguf(folder / "k" / f"{kind}.gguf", large, quantize=kind)
    shutil.move(export(folder / "k" / "Q4_K.gguf", folder / "stored.dash").path("onnx"), folder / "stored")
    bundle = Bundle.open(tiny_bundle(folder / "made", "cpu", "portable", form="linear", **small, num_hidden_layers=5))
    shutil.move(bundle.root, folder / BUNDLE)
    checkpoint = open_checkpoint(folder / "made" / "model")
    save_policy(folder / "policy.safetensors", tiny_policy(checkpoint, "linear"), checkpoint.spec, {})
    shutil.copytree(Path(__file__).parents[2] / "engines", folder / "engines")


@dataclass(frozen=True)
class Parser:
    """`seeds(folder)` gives sound inputs; `run(folder, data)` reads one in a folder that is its own, a copy of the
    seeds'; `deep(folder)` follows for one in `every` that was accepted: what takes longer.
    """

    mutator: Mutator
    seeds: Callable[[Path], Sequence[bytes]]
    run: Callable[[Path, bytes], object]
    deep: Callable[[Path], object] | None = None
    every: int = 8


def _files(*names: str) -> Callable[[Path], list[bytes]]:
    return lambda folder: [path.read_bytes() for name in names for path in sorted(folder.glob(name))]


def _written(name: str, read: Callable[[Path], object], *copies: str) -> Callable[[Path, bytes], object]:
    """Put the input at `name` in the folder (and at `copies`), then `read` that file."""

    def run(folder: Path, data: bytes) -> object:
        for each in (name, *copies):
            (folder / each).write_bytes(data)
        return read(folder / name)

    return run


def _weights(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    for weight in checkpoint.weights.values():
        for _ in row_blocks(weight):
            pass


def _family(path: Path) -> None:
    """The config of any family, without weights."""
    spec = decoder_spec(read_json(path)[1])
    if spec.num_layers < 100:
        assert all(len(shape) for shape in spec.weight_shapes().values())


def _text(folder: Path) -> None:
    text = Text(folder)
    text.decode(text.encode(MESSAGES[0]["content"]))


def _chat(folder: Path) -> None:
    """A process for each template."""
    Text(folder / BUNDLE).chat(MESSAGES)


def _model_and_text(path: Path) -> None:
    """As export reads it, then as the runtime does."""
    open_checkpoint(path.parent)
    _text(path.parents[1] / BUNDLE)


def _record(path: Path) -> None:
    """A build's record, of this bundle whenever it was made."""
    key = json.loads((path.parents[2] / MANIFEST).read_text())["key"].encode()
    path.write_bytes(re.sub(rb'"bundle_key": "[0-9a-f]{32}"', b'"bundle_key": "' + key + b'"', path.read_bytes()))
    reseal(path.parents[2])
    _opened(path.parents[2])


def _opened(folder: Path) -> None:
    bundle = Bundle.open(folder)
    for target in ("cpu-fp32", "portable"):
        bundle.load_build(target)


def _generated(folder: Path, verify: bool = False) -> None:
    runtime = DashRuntime.load(folder / BUNDLE, "cpu-fp32", verify=verify)
    runtime.generate([1, 2, 3], 2, trade_off=1.0)
    runtime.score([1, 2, 3, 4], trade_off=1e9)  # whose rows differ


def _manifest(path: Path) -> None:
    """A manifest, sealed anew: a forger has the whole bundle."""
    with suppress(ValueError, TypeError, AttributeError, RecursionError):  # not even JSON
        reseal(path.parent)
    _opened(path.parent)


def _rebuilt(folder: Path) -> None:
    copy = folder / "rebuilt.dash"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder / BUNDLE, copy, ignore=shutil.ignore_patterns("engines"))
    build(copy, "cpu", weights="fp32")


def _graph(path: Path) -> None:
    load_graph(path)
    graph_run(path)


def _restored(path: Path) -> None:
    """Every weight, as a lowering takes it; `build` makes a BundleError of what that may raise."""
    for value in load_graph(path).graph.initializers.values():
        with suppress(*BAD_GRAPH):
            if value.const_value is not None:
                value.const_value.numpy()


def _engine(path: Path) -> None:
    OrtEngine(path, session_options())


def _onnx(name: str, read: Callable[[Path], object], deep: Callable[[Path], object], every: int) -> Parser:
    """An .onnx file of the bundle."""

    def after(folder: Path) -> None:
        rehash(folder / BUNDLE, name)
        deep(folder)

    return Parser(mutators.in_onnx, _files(f"{BUNDLE}/{name}"), _written(f"{BUNDLE}/{name}", read), after, every)


def _string(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _chosen(_: Path, data: bytes) -> None:
    """Accepted where one of the options that take a list accepts it."""
    refused: list[Exception] = []
    for kind in (LAYERS, AMOUNTS, BUDGETS, KINDS):
        try:
            kind.convert(_string(data), None, None)
        except click.UsageError as error:
            refused.append(error)
    if len(refused) == 4:
        raise refused[0]


def _policy(path: Path) -> object:
    return load_policy(path, open_checkpoint(path.parent / "made" / "model").spec)


def _lines(path: Path) -> None:
    read_plain_prompts(path)
    read_prompts(path)


LINES = b"""{"prompt": "a"}
{"turns": ["b", "c"]}
{"messages": [{"role": "user", "content": "d"}, {"role": "assistant", "content": "e"}]}
"""
PROCESSORS = [
    b'{"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 256}, "crop_size": 224, "resample": 3}',
    b'{"image_processor": {"image_processor_type": "DINOv3ViTImageProcessorFast", "do_center_crop": null, "size": 9}}',
    b'{"feature_extractor_type": "ViTFeatureExtractor", "image_mean": [0, 0.5, 1], "image_std": [1, 2, 3]}',
]
URL = b"data:image/gif;base64,R0lGODlhAQABAIAAAP///wAAACwAAAAAAQABAAACAkQBADs="
TEMPLATES = [
    b"{% for m in messages %}{{ m['role'] + '\\n' + m.content | trim }}{% if not loop.last %}, {% endif %}{% endfor %}",
    b"{% set ns = namespace(a=1) %}{% for i in range(3) %}{% set ns.a = ns.a + 2 * i %}{% endfor %}{{ ns.a | tojson }}",
    b"{% macro f(x, y=3) %}{{ x | join('-') | replace('a', 'b') }}{% endmacro %}{{ f(messages | map('length')) }}",
    b"{% generation %}{{ raise_exception('no') if messages | length > 9 else strftime_now('%Y') }}{% endgeneration %}",
]
LISTS = [b"2-5,9", b"0.9,0.85", b"static,token,dense", b"1, 3-4 ,7", b"1e-3"]


def _pictures(_: Path) -> list[bytes]:
    """Every kind and mode: palettes, transparency, 16 bits, a turn by EXIF, several frames."""
    image = Image.effect_noise((24, 17), 90)
    exif = image.getexif()
    exif[0x0112] = 6
    made = [("PNG", "P"), ("PNG", "RGBA"), ("PNG", "I;16"), ("JPEG", "RGB"), ("JPEG", "CMYK"), ("WEBP", "RGBA")]
    made += [("BMP", "RGB"), ("GIF", "P"), ("TIFF", "RGB"), ("TIFF", "1")]
    files = [BytesIO() for _ in made]
    for file, (kind, mode) in zip(files, made, strict=True):
        more = {"save_all": True, "append_images": [image]} if kind in ("GIF", "WEBP") else {}
        more |= {"exif": exif} if kind in ("PNG", "JPEG", "WEBP", "TIFF") else {}
        more |= {"compression": "tiff_lzw"} if (kind, mode) == ("TIFF", "RGB") else {}
        turned = image.convert("RGB").convert(mode) if mode != "I;16" else Image.new(mode, (9, 7), 1000)
        turned.save(file, kind, **more)
    return [file.getvalue() for file in files]


def _picture(source: bytes | str) -> None:
    """With fewer pixels than the memory that an input may take."""
    read_image(source, most_pixels=1 << 21)


def _model_file(mutator: Mutator, name: str) -> Parser:
    """A file of the model's folder, read with its weights."""
    return Parser(mutator, _files(name), _written(name, lambda path: _weights(path.parent)))


def _text_file(mutator: Mutator, every: int, seeds: Callable[[Path], Sequence[bytes]], *names: str) -> Parser:
    """A file of the model's text, as export reads it and as the runtime does."""
    copies = [f"{folder}/{name}" for folder in (MODEL, BUNDLE) for name in names]
    return Parser(mutator, seeds, _written(copies[0], _model_and_text, *copies[1:]), _chat, every)


_run_verified = partial(_generated, verify=True)
PARSERS = {
    "gguf": Parser(mutators.in_gguf, _files("*.gguf"), _written("in.gguf", _weights)),
    "k_quants": Parser(mutators.in_gguf, _files("k/*.gguf"), _written("in.gguf", _weights)),
    "config": _model_file(mutators.in_json, f"{MODEL}/config.json"),
    "families": Parser(mutators.in_json, _files("families/*.json"), _written("mine.json", _family)),
    "weights": _model_file(mutators.in_safetensors, f"{MODEL}/model.safetensors"),
    "index": _model_file(mutators.in_json, f"{SHARDED}/model.safetensors.index.json"),
    "tokenizer": _text_file(mutators.in_json, 64, _files(f"{MODEL}/tokenizer.json"), "tokenizer.json"),
    "text_config": _text_file(
        mutators.in_json,
        64,
        _files(f"{MODEL}/tokenizer_config.json", f"{MODEL}/generation_config.json"),
        *("tokenizer_config.json", "generation_config.json"),
    ),
    "template": _text_file(
        mutators.in_text,
        4,
        lambda folder: [*TEMPLATES, (folder / MODEL / "chat_template.jinja").read_bytes()],
        "chat_template.jinja",
    ),
    "recipe": Parser(
        mutators.in_text, _files("engines/*.toml"), _written("mine.toml", lambda path: load_recipe(str(path)))
    ),
    "policy": Parser(mutators.in_safetensors, _files("policy.safetensors"), _written("mine.safetensors", _policy)),
    "manifest": Parser(
        mutators.in_json, _files(f"{BUNDLE}/{MANIFEST}"), _written(f"{BUNDLE}/{MANIFEST}", _manifest), _generated
    ),
    "build": Parser(mutators.in_json, _files(f"{BUILT}/{BUILD}"), _written(f"{BUILT}/{BUILD}", _record), _generated),
    "graph": _onnx("onnx/bypass_02-03.onnx", _graph, _rebuilt, 64),
    "policy_graph": _onnx("onnx/policy.onnx", _graph, _rebuilt, 64),
    "stored": Parser(mutators.in_onnx, _files("stored/layer_00.onnx"), _written("stored/layer_00.onnx", _restored)),
    "engine": _onnx("engines/cpu-fp32/bypass_02-03.onnx", _engine, _run_verified, 8),
    "first_engine": _onnx("engines/cpu-fp32/layers_00-01.onnx", _engine, _run_verified, 8),
    "mixed_engine": _onnx("engines/cpu-fp32/mixed_02-03.onnx", _engine, _run_verified, 8),
    "prompts": Parser(mutators.in_text, lambda _: [LINES], _written("mine.jsonl", _lines)),
    "picture": Parser(mutators.in_picture, _pictures, lambda _, data: _picture(data)),
    "data_url": Parser(mutators.in_text, lambda _: [URL], lambda _, data: _picture(_string(data))),
    "processor": Parser(mutators.in_json, lambda _: PROCESSORS, lambda _, data: ImageProcessor.parse(_string(data))),
    "lists": Parser(mutators.in_text, lambda _: LISTS, _chosen),
}


def preloaded(folder: Path) -> None:
    """Import what parsers import late, before the workers are forked."""
    _weights(folder / "a.gguf")
    _weights(folder / MODEL)
