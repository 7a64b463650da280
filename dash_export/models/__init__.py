"""Checkpoint in, a spec and named weights out: the only package that knows model files and model families."""

import re
from pathlib import Path

from dash_export.errors import CheckpointError
from dash_export.models.spec import AnyCheckpoint, Checkpoint, DecoderSpec, EncoderCheckpoint, Weight, row_blocks

__all__ = [
    "AnyCheckpoint",
    "Checkpoint",
    "DecoderSpec",
    "EncoderCheckpoint",
    "Weight",
    "open_checkpoint",
    "open_model",
    "row_blocks",
]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Open a causal LM, as `open_model` does. Raises CheckpointError for an encoder, too."""
    found = open_model(source)
    if not isinstance(found, Checkpoint):
        raise CheckpointError(
            f"{source} is an encoder of {found.spec.takes} ({found.spec.model_type}); a causal LM is expected here"
        )
    return found


def open_model(source: str | Path) -> AnyCheckpoint:
    """Open a Hugging Face folder, a `.gguf` file or a hub id (`org/name`); weights stay on disk until they are read.

    A path that exists on disk wins over a hub id of the same spelling. The fingerprint hashes every byte of the
    weights, so opening takes as long as reading the files once. Raises CheckpointError for anything missing,
    unsupported or corrupt.
    """
    try:
        path = Path(source).expanduser()
        if path.is_dir() and str(source):  # "" (an unset variable) is not the current folder
            from dash_export.models.readers.huggingface import open_folder

            return open_folder(path)
        if path.is_file():
            from dash_export.models.readers.gguf import open_gguf

            return open_gguf(path)
        if isinstance(source, str) and _HUB_ID.fullmatch(source) and not source.endswith(".gguf"):
            from dash_export.models.readers.huggingface import open_hub

            return open_hub(source)
    except (OSError, ValueError, RuntimeError) as error:  # no permission, a NUL byte in the name, `~nobody`
        raise CheckpointError(f"cannot read the model {str(source)!r}: {error}") from error
    raise CheckpointError(
        f"no such model: {str(source)!r} is neither a folder with config.json, nor a .gguf file, "
        "nor a Hugging Face hub id like 'HuggingFaceTB/SmolLM2-135M-Instruct'"
    )
