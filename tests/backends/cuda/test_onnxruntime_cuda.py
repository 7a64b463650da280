"""ONNX Runtime's CUDA provider, with the CPU's kernels in the place of CUDA's, on the stand-in's streams."""

import pytest

from dash_export.core.rule import DENSE
from tests.backends.cuda.conftest import Host, MakeOnCard
from tests.backends.cuda.test_order import one_token


@pytest.mark.parametrize("first", ["main", "beside", 0])
@pytest.mark.parametrize("dispatch", ["sync", "overlapped"])
def test_decodes_as_the_cpu_does(dispatch: str, first: str | int, host: Host, on_card: MakeOnCard) -> None:
    made = on_card("ort", dispatch, first)
    assert not host.differs(made)
    assert not host.differs(made, DENSE)
    assert not made.card.recorded


@pytest.mark.parametrize(("dispatch", "stream"), [("sync", "main"), ("overlapped", "beside"), ("device", "beside")])
def test_sessions_wait_for_nothing(dispatch: str, stream: str, host: Host, on_card: MakeOnCard) -> None:
    """Only the host does, for the decision and for the end; the policy's session has its own stream."""
    log = one_token(on_card("ort", dispatch), host)
    assert [call for call in log if call[0] == "host"] == [("host", "wait", "decided"), ("host", "synchronize", "main")]
    runs = [(own, of) for own, what, of in log if what == "run"]
    assert len(runs) == 6
    assert (stream, "policy") in runs
