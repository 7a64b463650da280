"""A policy beside what else makes an image encoder faster: token merging (ToMe, arXiv 2210.09461) in torch, and the
dense graph in OpenVINO. Settings take turns on each picture; times are of dense in the same library.

python tools/bench/encoder_peers.py MODEL BUNDLE DIR --budget 0.75,0.55,0.45 --merged 6,10,14
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  as torch's own documentation names it
from common import print_json
from transformers import Dinov2Model

from dash_export import DashRuntime
from dash_export.commands.tables import print_table
from dash_export.core.exits import gap
from dash_export.images.sources import image_files
from dash_export.measure.timing import in_turns
from dash_export.runtime.encoder import Encoder


@torch.inference_mode()
def merging(model: Any, merged: int, pixels: Any) -> Any:
    """Return the pooled vector of one picture while `merged` tokens of each layer go into their likest others: half of
    the tokens, taken by turns, may go, the class token never does, and attention counts a token as often as it holds.
    """
    state, heads = model.embeddings(torch.from_numpy(pixels)), model.config.num_attention_heads
    size = torch.ones(1, state.shape[1], 1)
    for layer in model.encoder.layer:
        normed, own = layer.norm1(state), layer.attention
        queries, keys, values = (
            product(normed).view(1, state.shape[1], heads, -1).transpose(1, 2)
            for product in (own.q_proj, own.k_proj, own.v_proj)
        )
        bias = size.log().view(1, 1, 1, -1).expand(1, heads, queries.shape[2], -1)
        found = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias)
        found = own.o_proj(found.transpose(1, 2).flatten(2))
        state = state + layer.layer_scale1(found)
        if count := min(merged, (state.shape[1] - 1) // 2):
            state, size = joined(state, size, keys.mean(dim=1), count)
        state = state + layer.layer_scale2(layer.mlp(layer.norm2(state)))
    return model.layernorm(state)[:, 0].numpy()


def joined(state: Any, size: Any, keys: Any, count: int) -> tuple[Any, Any]:
    """Return states and sizes after `count` of the even tokens have gone into odd ones, by the cosine of their keys."""
    unit = F.normalize(keys, dim=-1)
    scores = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)
    scores[:, 0] = -torch.inf  # the class token
    best, into = scores.max(dim=-1)
    order = best.argsort(dim=-1, descending=True)[0]
    gone, stay = order[:count], order[count:].sort().values
    even, odd = ((state * size)[:, start::2] for start in (0, 1))
    own, other = size[:, ::2], size[:, 1::2].clone()
    odd = odd.index_add(1, into[0, gone], even[:, gone])
    other = other.index_add(1, into[0, gone], own[:, gone])
    sizes = torch.cat([own[:, stay], other], dim=1)
    return torch.cat([even[:, stay], odd], dim=1) / sizes, sizes


def pooled(encoder: Encoder, pixels: Any) -> Any:
    return encoder.encode(pixels).pooled


@click.command()
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.argument("pictures", type=click.Path(exists=True, path_type=Path))
@click.option("--targets", default="portable,openvino", show_default=True)
@click.option("--budget", default="0.75,0.55,0.45", show_default=True)
@click.option("--merged", default="6,10,14", show_default=True, help="Tokens that each layer merges.")
@click.option("--threads", default=1, show_default=True)
@click.option("--limit", default=100, show_default=True)
def main(
    model: Path, bundle: Path, pictures: Path, targets: str, budget: str, merged: str, threads: int, limit: int
) -> None:
    """Measure time and cosine of each setting on the pictures of a folder."""
    torch.set_num_threads(threads)
    peer = Dinov2Model.from_pretrained(model, attn_implementation="sdpa").eval()

    @torch.inference_mode()
    def dense(pixels: Any) -> Any:
        return peer(torch.from_numpy(pixels)).pooler_output.numpy()

    variants: dict[str, Callable[[Any], Any]] = {"torch": dense, "torch, nothing merged": partial(merging, peer, 0)}
    variants |= {f"torch, ToMe {each}": partial(merging, peer, int(each)) for each in merged.split(",")}
    encoders = list[Encoder]()
    for target in targets.split(","):
        runtime = DashRuntime.load(bundle, target, threads=threads)
        for each in ("", *budget.split(",")):
            encoders.append(runtime.encoder("token", budget=float(each)) if each else runtime.encoder())
            variants[f"{target}, budget {each}" if each else target] = partial(pooled, encoders[-1])
    files = image_files(pictures)
    files = [files[place] for place in np.random.default_rng(0).permutation(len(files))[:limit]]
    seconds = np.zeros((len(files), len(variants)))
    vectors: list[list[Any]] = [[] for _ in variants]
    for place, path in enumerate(files):
        pixels = encoders[0].processor.batch([path])
        for run in variants.values() if place == 0 else ():
            run(pixels)
        for _, index in in_turns(len(variants), 1):
            began = time.perf_counter()
            found = list(variants.values())[index](pixels)
            seconds[place, index] = time.perf_counter() - began
            vectors[index].append(found)
    rows, own = [], 0
    for index, name in enumerate(variants):
        own = index if "," not in name else own
        cosine = 1 - gap(*(np.concatenate(vectors[at]).astype(np.float64) for at in (0, index)))
        figures = (1e3 * np.median(seconds[:, index]), seconds[:, index].sum() / seconds[:, own].sum(),
                   seconds[:, index].sum() / seconds[:, 0].sum(), cosine.mean(), cosine.min())  # fmt: skip
        rows.append((name, *(round(float(figure), 4) for figure in figures)))
    heads = ("ms", "of its dense", "of torch", "cosine", "worst")
    print_table(f"{bundle.name}, {len(files)} pictures, {threads} threads", ("setting",), heads, rows)
    print_json("encoder_peers", {"pictures": len(files), "threads": threads, "rows": rows})


if __name__ == "__main__":
    main()
