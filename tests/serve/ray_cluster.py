"""Ray Serve on two nodes of this machine. Needs `pip install 'ray[serve]'`."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path

import pytest

from tests.commands.helpers import free_port


@contextmanager
def on_ray(bundle: Path) -> Iterator[str]:
    """The address of two replicas, one on each node, that serve the build `cpu-fp32`."""
    ray = pytest.importorskip("ray", reason="pip install 'ray[serve]'")
    from ray import serve
    from ray.cluster_utils import Cluster

    from dash_export.serve.ray import AppArguments, app

    assert signature(app).parameters["given"].annotation is AppArguments, "`serve run` would hand it a dict"
    port = free_port()
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")  # 5 are too few beside other work
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        # one proxy: two would share the port here, and Ray ends that of a node that has no replica any more
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        serve.run(app(AppArguments(bundle=str(bundle), target="cpu-fp32", replicas=2, rows=2)), name="dash")
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()
        cluster.shutdown()
