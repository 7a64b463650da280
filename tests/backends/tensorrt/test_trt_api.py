"""No name of TensorRT is guessed: every call is in the bindings that are installed, and in those of other versions.

What the bindings of TensorRT 10.3 to 11.4 know is recorded in tests/data/tensorrt_names.json: those packages load only
beside a full TensorRT.
"""

import json
from unittest.mock import Mock

import pytest

from dash_export.backends.tensorrt import trt_api
from dash_export.errors import BackendError
from tests.backends.bindings import check_names, used
from tests.conftest import DATA

rtx = pytest.importorskip("tensorrt_rtx", reason="needs the RTX builder: pip install 'dash-export[rtx]' (Linux x86-64)")

RECORDED = json.loads((DATA / "tensorrt_names.json").read_text())
RTX_ONLY = {
    *("num_compute_capabilities", "set_compute_capability", "ComputeCapability", "BuilderFlag", "set_flag", "EAGER"),
    *("REQUIRE_USER_ALLOCATION", "create_runtime_config", "create_runtime_cache", "set_runtime_cache", "LAZY"),
    *("set_execution_context_allocation_strategy", "dynamic_shapes_kernel_specialization_strategy"),
    "DynamicShapesKernelSpecializationStrategy",
}
SINCE_11 = {"add_attention_v2", "key_value_lengths", "AttentionNormalizationOp", "CausalMaskKind", "mask"}
"""Asked for only where `add_attention_v2` is there."""
OF_ATTENTIONS = {"IAttentionInputLayer", "attention", "decomposable"}
"""Asked only of the layers of attentions, which came with them."""
# variable in trt_api.py -> the class of the bindings it holds
CLASSES = {
    "trt": rtx,
    "builder": rtx.Builder,
    "network": rtx.INetworkDefinition,
    "parser": rtx.OnnxParser,
    "config": rtx.IBuilderConfig,
    "profile": rtx.IOptimizationProfile,
    "layer": rtx.ILayer,
    "begin": rtx.IAttentionInputLayer,
    "strategies": rtx.DynamicShapesKernelSpecializationStrategy,
    "attention": rtx.IAttention,
    "tensor": rtx.ITensor,
    "cached": rtx.ITimingCache,
    "engine": rtx.ICudaEngine,
    "runtime_config": rtx.IRuntimeConfig,
}


def test_every_name_is_in_the_installed_bindings() -> None:
    asked = used(trt_api, CLASSES)
    assert {("builder", "build_serialized_network"), ("config", "max_aux_streams")} <= asked
    check_names(asked, CLASSES)


@pytest.mark.parametrize("version", RECORDED["absent"])
def test_every_name_is_in_other_versions(version: str) -> None:
    names = {name for _, chain in used(trt_api, CLASSES) for name in chain.split(".") if not name.startswith("__")}
    assert names - RTX_ONLY <= set(RECORDED["names"]) | {"serialize"}, "record the new names too"
    missing = names & set(RECORDED["absent"][version])
    assert missing <= RTX_ONLY | SINCE_11 | OF_ATTENTIONS
    assert not missing & SINCE_11 or "add_attention_v2" in missing


def test_what_the_dialects_are_for() -> None:
    """The portable dialect needs the KV cache update: PORTABLE_SINCE is the first version that has it."""
    with_update = [version for version, absent in RECORDED["absent"].items() if "add_kv_cache_update" not in absent]
    first = min(tuple(int(part) for part in version.split(".")[:2]) for version in with_update)
    assert first == trt_api.PORTABLE_SINCE
    assert "STRONGLY_TYPED" not in {name for absent in RECORDED["absent"].values() for name in absent}


def test_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt_api, "import_module", Mock(side_effect=ImportError("No module named 'tensorrt'")))
    with pytest.raises(BackendError, match=r"pip install 'dash-export\[tensorrt\]'"):
        trt_api.Toolkit("tensorrt")


def test_errors_of_one_compilation_do_not_stay(caplog: pytest.LogCaptureFixture) -> None:
    toolkit = trt_api.load_toolkit("tensorrt_rtx")
    with toolkit.logger.collected() as outer, toolkit.logger.collected() as inner:
        toolkit.logger.log(rtx.ILogger.Severity.ERROR, "one")
        toolkit.logger.log(rtx.ILogger.Severity.INFO, "two")
    toolkit.logger.log(rtx.ILogger.Severity.ERROR, "three")
    assert outer == inner == ["one"]
    assert caplog.messages == ["three"], "what nobody collects"
