"""Errors a user can act on. The command line prints their message without a traceback and exits with code 1."""


class DashError(Exception):
    """Base of every error this package raises on purpose. The message says what was wrong, what was expected and how to
    fix it.
    """


class CheckpointError(DashError):
    """The model (Hugging Face folder, hub id or GGUF file) cannot be read or is not supported."""


class BundleError(DashError):
    """The bundle on disk is missing, unfinished, changed, newer than this program or unsafe to open."""


class OutputError(DashError):
    """The output cannot be written or replaced: something that is not this program's, or a link, lies in its place."""


class BusyError(OutputError):
    """Another process or thread writes the same output."""


class NewerBundleError(BundleError):
    """The bundle was written by a newer program."""


class StaleBuildError(BundleError):
    """The engines of a build were made from an earlier export than the one in the bundle."""


class RecipeError(DashError):
    """A target's recipe is unknown, or it has a key or a value that is not allowed."""


class BackendError(DashError):
    """The backend a target needs is not installed or refuses an engine."""


NOT_NUMBERS = (
    "The engines gave logits that are not numbers: activations may have overflowed. Build with other --weights, or a "
    'recipe of your own with activations = "bf16" and "bf16" for every "fp16" of its [weights].'
)


class PolicyError(DashError):
    """A skip policy, trade-off, budget or action list does not fit this bundle."""


class ContextLengthError(DashError):
    """The prompt and the tokens asked for do not fit the model's context."""


class RequestError(DashError):
    """A prompt, message list, picture or sampling setting cannot be used."""


BAD_GRAPH = (KeyError, ValueError, TypeError, AttributeError, IndexError, AssertionError, OverflowError, RuntimeError)
"""Errors raised by code that works on a graph which this program did not write, even where its hash is right."""
