import pytest

from dash_export.errors import CheckpointError
from dash_export.models.registry import decoder_spec, register, supported_model_types


def test_supported_families_are_listed() -> None:
    assert supported_model_types() == ["llama", "qwen2", "qwen3"]


@pytest.mark.parametrize("model_type", ["gpt2", "mixtral", "x" * 10_000])
def test_unknown_family_error_lists_the_supported_ones(model_type: str) -> None:
    with pytest.raises(CheckpointError, match="llama, qwen2, qwen3") as raised:
        decoder_spec({"model_type": model_type})
    assert len(str(raised.value)) < 300


@pytest.mark.parametrize("model_type", [None, 3, ["llama"], {}])
def test_model_type_of_another_type_is_an_error(model_type: object) -> None:
    with pytest.raises(CheckpointError, match="no model_type"):
        decoder_spec({"model_type": model_type})


def test_registering_twice_is_a_programming_error() -> None:
    supported_model_types()
    with pytest.raises(ValueError, match="twice"):
        register("llama")(decoder_spec)
