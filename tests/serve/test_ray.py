"""Ray Serve: two replicas on two nodes of this machine. Needs `pip install 'ray[serve]'`, and two minutes."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import pytest

from dash_export import DashRuntime
from tests.commands.helpers import free_port

ASKED: dict[str, Any] = {"model": "tiny", "prompt": "hello", "max_tokens": 60, "temperature": 0}
DENSE: dict[str, Any] = {"dash": {"policy": "dense"}}


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


@pytest.fixture(scope="module")
def address(tiny_root: Path) -> Iterator[str]:
    with on_ray(tiny_root) as found:
        yield found


def test_answers(address: str, tiny_runtime: Callable[..., DashRuntime]) -> None:
    """Whole and streamed, from both replicas at once; a wrong request; the models."""
    runtime = tiny_runtime()
    expected = runtime.generate(runtime.text.encode("hello"), 60, policy="dense").text

    def ask(_: int) -> str:
        reply = httpx.post(f"{address}/v1/completions", json=ASKED | DENSE, timeout=60)
        return str(reply.json()["choices"][0]["text"])

    before = {replica: ticks(replica) for replica in replicas()}
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(ask, range(64))) == {expected}
    spent = [ticks(replica) - begun for replica, begun in before.items()]
    assert len(spent) == 2
    assert min(spent) > 0.3 * max(spent), "one replica did the work of both"
    with httpx.stream("POST", f"{address}/v1/completions", json=ASKED | DENSE | {"stream": True}, timeout=60) as reply:
        lines = [line for line in reply.iter_lines() if line]
    assert len(lines) > 30
    assert lines[-1] == "data: [DONE]"
    assert httpx.post(f"{address}/v1/completions", json=ASKED | {"max_tokens": 0}).status_code == 400
    assert httpx.get(f"{address}/v1/models").json()["data"][0]["id"] == "tiny"


def test_a_replica_is_killed(address: str) -> None:
    """Streams of the other one go on; those of this one end, which their clients see; then there are two again."""
    body = ASKED | DENSE | {"stream": True, "max_tokens": 400}

    def ask(number: int) -> bool:
        """Ask again and again until it is over. Return False when an answer is cut."""
        while not over.is_set():
            lines[number].clear()
            try:
                with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=60) as reply:
                    for line in filter(None, reply.iter_lines()):
                        lines[number].append(line)
            except httpx.TransportError:
                return False
            if lines[number][-1:] != ["data: [DONE]"]:
                return False
        return True

    with ThreadPoolExecutor(8) as pool:  # twice as many as the rows of both
        for _ in range(3):  # one is enough, unless the replica is between two answers
            over, lines, one = Event(), [list[str]() for _ in range(8)], replicas()[0]
            asked = [pool.submit(ask, number) for number in range(8)]
            while sum(map(bool, lines)) < 3:  # one replica has two rows
                time.sleep(0.01)
            os.kill(one, signal.SIGSTOP)  # what it answers now is what stands still while the others end
            over.set()
            before = -1
            while before != (before := sum(map(len, lines))):
                time.sleep(1)
            ended = {number for number in range(8) if asked[number].done()}
            cut = {number for number in range(8) if lines[number]} - ended
            os.kill(one, signal.SIGKILL if cut else signal.SIGCONT)
            whole = {number for number in range(8) if asked[number].result()}
            if cut:
                break
    assert cut, "the replicas do not share the requests"
    assert ended, "those of the other replica"
    assert ended <= whole, "an answer of the other replica was lost"
    assert not cut & whole, "nobody was told that its answer was cut"
    assert httpx.post(f"{address}/v1/completions", json=ASKED | DENSE, timeout=60).status_code == 200


def test_as_many_replicas_as_requests_keep_busy(address: str, tiny_root: Path) -> None:
    """One at first, two when there are more requests than rows."""
    from ray import serve

    from dash_export.serve.ray import AppArguments, app

    serve.delete("dash")
    given = AppArguments(bundle=str(tiny_root), target="cpu-fp32", replicas=1, most=2, rows=2)
    serve.run(app(given), name="dash")
    assert len(replicas()) == 1
    until = time.monotonic() + 120  # Ray looks at the last half minute
    while httpx.get(f"{address}/health").status_code != 200:  # its proxies may still know the application of before
        assert time.monotonic() < until, "the new application does not answer"
    body, most = ASKED | DENSE | {"max_tokens": 400}, 1
    with ThreadPoolExecutor(12) as pool:
        while most < 2:
            assert time.monotonic() < until, "no second replica"
            replies = pool.map(lambda _: httpx.post(f"{address}/v1/completions", json=body, timeout=60), range(12))
            assert {reply.status_code for reply in replies} == {200}
            most = len(replicas())


def replicas() -> list[int]:
    """Processes of this user that are replicas of ours."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if b"ServeReplica:dash" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def ticks(process: int) -> int:
    """Processor time that a process has used, in clock ticks (10 ms)."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])
