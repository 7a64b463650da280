"""A SentencePiece vocabulary of a GGUF file (`tokenizer.ggml.model` "llama": Llama 2, Mistral, Gemma, Phi-3) as BPE.

Such a file has scores and no merges. SentencePiece joins the two neighbours whose joint piece has the best score
(bpe_model.cc), so every split of a piece into two other pieces is a merge, in the order of the pieces' scores.
"""

from collections.abc import Mapping, Sequence
from math import isfinite
from operator import itemgetter
from typing import Any

from dash_export.errors import CheckpointError
from dash_export.files.typed_json import shown
from dash_export.models.config import flag
from dash_export.text.text_files import check_vocabulary

SPACE = "\u2581"
MAX_PIECE, MEAN_PIECE = 256, 16
"""Most letters of a piece, and of a piece on average; published vocabularies have up to 93, and 7."""
NORMAL, UNKNOWN, BYTE = 1, 2, 6
"""Token types."""


def spm_parts(metadata: Mapping[str, Any], tokens: Sequence[str], kinds: Sequence[int]) -> dict[str, Any]:
    """Return `normalizer`, `pre_tokenizer`, `decoder` and `model` of a tokenizer.json. Raises CheckpointError."""
    gemma = str(metadata.get("general.architecture")).startswith("gemma")  # Google's own files do not say it
    prefix = flag(metadata, "tokenizer.ggml.add_space_prefix", not gemma)
    begins = [{"type": "Prepend", "prepend": SPACE}] if prefix else []
    ends = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    words = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    unknown = [token for token, kind in zip(tokens, kinds, strict=True) if kind == UNKNOWN]
    if not unknown and sum(kind == BYTE for kind in kinds) < 256:
        raise CheckpointError("the vocabulary has neither a token for what it does not know nor one for every byte")
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*begins, spaces]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [words, {"type": "ByteFallback"}, {"type": "Fuse"}, *ends]},
        "model": {
            "type": "BPE",
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": _merges(metadata, tokens, kinds),
            "unk_token": unknown[0] if unknown else None,
            "fuse_unk": True,
            "byte_fallback": True,
        },
    }


def _merges(metadata: Mapping[str, Any], tokens: Sequence[str], kinds: Sequence[int]) -> list[tuple[str, str]]:
    scores = metadata.get("tokenizer.ggml.scores")
    sound = isinstance(scores, list) and all(isinstance(score, float) and isfinite(score) for score in scores)
    if not sound or not isinstance(scores, list) or len(scores) != len(tokens):
        raise CheckpointError(f"tokenizer.ggml.scores is {shown(scores)}; expected a number per token")
    pieces = {
        token: (-score, token) for token, score, kind in zip(tokens, scores, kinds, strict=True) if kind == NORMAL
    }
    if (longest := max(map(len, pieces), default=0)) > MAX_PIECE:
        raise CheckpointError(f"tokenizer.ggml.tokens has a piece of {longest} letters; {MAX_PIECE} are supported")
    if sum(map(len, pieces)) > MEAN_PIECE * len(tokens):
        raise CheckpointError(
            f"tokenizer.ggml.tokens has pieces of over {MEAN_PIECE} letters on average; it is damaged"
        )
    found: list[tuple[str, str]] = []
    for _, piece in sorted(pieces.values(), key=itemgetter(0)):  # equal scores: in the order of the file
        halves = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        pairs = sorted((pieces[left], pieces[right]) for left, right in halves if left in pieces and right in pieces)
        found += [(left, right) for (_, left), (_, right) in pairs]
        try:
            check_vocabulary(len(tokens), len(found))
        except ValueError as error:
            raise CheckpointError(
                f"tokenizer.ggml.tokens is damaged: pairs of them make one another: {error}"
            ) from error
    return found
