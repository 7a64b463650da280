"""Embeddings of pictures over a real server: the forms of vLLM and Infinity, what is told, and hostile bodies."""

import base64
import io
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from dash_export import DashRuntime
from dash_export.core.kinds import Setting
from dash_export.runtime.encoder import Encoder
from dash_export.serve.picture_server import PictureQueue, PictureServer
from dash_export.serve.running import BODY_BYTES
from tests.commands.helpers import refused
from tests.commands.test_serve import served
from tests.listening import listening
from tests.tiny_encoder import encoder_bundle

STATIC = {"policy": "static", "skip": [2, 3, 4]}
Serve = Callable[..., str]


def picture(seed: int, mode: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (42, 50, 3), np.uint8)
    packed = io.BytesIO()
    Image.fromarray(pixels).save(packed, mode)
    return packed.getvalue()


def url(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def blank(width: int, height: int) -> str:
    """A picture of one bit a pixel, which takes few bytes."""
    packed = io.BytesIO()
    Image.new("1", (width, height)).save(packed, "PNG", optimize=True)
    return url(packed.getvalue())


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoder_bundle(tmp_path_factory.mktemp("encoder"), "vit-classes")


@pytest.fixture(scope="module")
def encoders(root: Path) -> DashRuntime:
    return DashRuntime.load(root)


@pytest.fixture
def serve_pictures(encoders: DashRuntime) -> Iterator[Serve]:
    """`serve_pictures(batch=..., keys=...)`: the address of a server of the tiny encoder under the name `tiny`."""
    with ExitStack() as stack:

        def make(waiting: int = 64, **options: Any) -> str:
            queue = PictureQueue(encoders, batch=2, waiting=waiting)
            return stack.enter_context(listening(PictureServer({"tiny": queue}, drain=5.0, **options).app))

        yield make


@pytest.fixture(scope="module")
def http(encoders: DashRuntime) -> Iterator[httpx.Client]:
    app = PictureServer({"tiny": PictureQueue(encoders, batch=2)}).app
    with listening(app) as address, httpx.Client(base_url=address, timeout=30) as made:
        yield made


def unit(vectors: np.ndarray) -> np.ndarray:
    found: np.ndarray = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    return found


def test_infinitys_form_by_openais_client(http: httpx.Client, encoders: DashRuntime) -> None:
    """More pictures than a batch has, in their order, of several kinds; the client asks for base64."""
    files = [picture(1), picture(2, "JPEG"), picture(3), picture(4, "WEBP"), picture(5)]
    client = openai.OpenAI(base_url=f"{http.base_url}/v1", api_key="none", max_retries=0)
    said = client.embeddings.create(
        model="tiny", input=[url(one) for one in files], extra_body={"modality": "image", "dash": STATIC}
    )
    found = encoders.encoder(policy="static", skip=(2, 3, 4))(files)
    np.testing.assert_allclose([one.embedding for one in said.data], unit(found.pooled), atol=1e-4)
    assert [one.index for one in said.data] == [*range(5)]
    tokens = 5 * encoders.bundle.manifest.encoder.tokens
    assert said.usage.prompt_tokens == said.usage.total_tokens == tokens
    told = said.usage.model_extra["dash"]  # type: ignore[index]
    assert told["layers_per_picture"] == 2
    assert told["guarded"] == 0
    assert told["time_of_dense"] == pytest.approx(1 - sum(encoders.cost.cost[1:]) + encoders.cost.exits[1], abs=1e-3)
    each = said.data[3].model_extra["dash"]  # type: ignore[index]
    classes = each.pop("classes")
    assert each == {"skipped_layers": [2, 3, 4], "layers": 5, "guarded": False, "patches": [3, 3], "seen": [0, 0, 1, 1]}
    assert found.probabilities is not None
    order = np.argsort(-found.probabilities[3])
    assert [one["name"] for one in classes] == [found.classes[place] for place in order]
    probabilities = [one["probability"] for one in classes]
    np.testing.assert_allclose(probabilities, found.probabilities[3][order], atol=1e-5)


def test_vllms_form(http: httpx.Client, encoders: DashRuntime) -> None:
    part = {"type": "image_url", "image_url": {"url": url(picture(1)), "detail": "high"}}
    body = {"model": "tiny", "messages": [{"role": "user", "content": [part]}], "encoding_format": "float"}
    said = http.post("/v1/embeddings", json=body).json()
    dense = encoders.encoder()([picture(1)])
    np.testing.assert_allclose(said["data"][0]["embedding"], unit(dense.pooled)[0], atol=1e-5)
    assert said["dash"] == said["usage"]["dash"]
    assert said["dash"]["layers_per_picture"] == 5
    named = http.post("/v1/embeddings", json=body | {"model": "tiny@policy=static,skip=2-4"}).json()
    assert named["dash"]["layers_per_picture"] == 2


def test_a_guarded_picture_is_told_and_dense(
    http: httpx.Client, encoders: DashRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The policy's engine says that the second of two is foreign."""
    engines: Any = encoders._loaded
    sound = engines._launched

    def foreign(engine: Any, state: Any, count: int) -> Any:
        found = sound(engine, state, count)
        if "foreign" in found:
            found["foreign"][:] = np.array([0, np.inf])[:count, None]
        return found

    monkeypatch.setattr(engines, "_launched", foreign)
    body = {"input": [url(picture(1)), url(picture(2))], "dash": {"trade_off": 1e9}}
    said = http.post("/v1/embeddings", json=body).json()
    own, other = said["data"]
    seen = {"patches": [3, 3], "seen": [0, 0, 1, 1]}
    assert all(len(one["dash"].pop("classes")) == 3 for one in (own, other))
    assert own["dash"] == {"skipped_layers": [1, 2, 3, 4], "layers": 5, "guarded": False, **seen}
    assert other["dash"] == {"skipped_layers": [], "layers": 5, "guarded": True, **seen}
    assert (said["dash"]["guarded"], said["dash"]["layers_per_picture"]) == (1, 3)
    dense = encoders.encoder()([picture(2)])
    np.testing.assert_allclose(other["embedding"], unit(dense.pooled)[0], atol=1e-5)


def part(where: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": where}}]}]}


def test_nothing_is_fetched_or_opened(http: httpx.Client, tmp_path: Path) -> None:
    (tmp_path / "own.png").write_bytes(picture(1))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.2)
        own = f"http://127.0.0.1:{listener.getsockname()[1]}/own.png"
        for where in (own, str(tmp_path / "own.png"), f"file://{tmp_path}/own.png", "own.png", "", "data:,x", "hello"):
            for body in ({"input": where}, {"input": [where]}, part(where)):
                reply = http.post("/v1/embeddings", json=body)
                assert reply.status_code == 400, where
                error = reply.json()["error"]
                assert "expected a picture as a data URL" in error["message"]
                assert error["param"].startswith(("input", "messages.0.content.0.image_url.url"))
        with pytest.raises(TimeoutError):
            listener.accept()


def test_hostile_pictures(http: httpx.Client) -> None:
    """Each is told by its number, and what to do. The server answers the next one."""
    whole = picture(1)
    large = blank(4097, 4096)
    assert len(large) < 10_000
    for wrong, expected in (
        (large, "Picture 1 has 4097 x 4096 pixels; 1 to 16777216 are read. Give it in another size."),
        (url(whole[: len(whole) // 2]), "Picture 1 is damaged"),
        (url(whole[:4]), "Picture 1 is no picture that can be read"),
        (url(b"<svg/>", "svg+xml"), "Picture 1 is no picture that can be read"),
        (url(whole)[:-3], "Picture 1 is a data URL whose data is not base64"),
        ("data:image/png,rawdata", "Picture 1 is a data URL that begins with"),
    ):
        reply = http.post("/v1/embeddings", json={"input": [url(whole), wrong]})
        assert reply.status_code == 400, expected
        assert expected in reply.json()["error"]["message"]
    several = [blank(4096, 4096)] * 5
    error = http.post("/v1/embeddings", json={"input": several}).json()["error"]
    assert "Up to picture 4 there are over 67108864 pixels in this request" in error["message"]
    assert http.post("/v1/embeddings", json={"input": url(whole)}).status_code == 200


def test_wrong_bodies(http: httpx.Client) -> None:
    own = url(picture(1))
    two = [{"type": "text", "text": "Represent the image."}, *part(own)["messages"][0]["content"]]
    for wrong, field in (
        ({}, None),
        ({"input": own, **part(own)}, "input"),
        ({"input": []}, "input"),
        ({"input": [blank(8, 8)] * 1025}, "input"),
        ({"input": [5, 7]}, "input.0"),
        ({"messages": [{"role": "user", "content": two}]}, "messages.0.content"),
        ({"messages": part(own)["messages"] * 2}, "messages"),
        ({"messages": [{"role": "user", "content": "hello"}]}, "messages.0.content"),
        ({"input": own, "modality": "audio"}, "modality"),
        ({"input": own, "dimensions": 7}, "dimensions"),
        ({"input": own, "pooling": "mean"}, "pooling"),
    ):
        reply = http.post("/v1/embeddings", json=wrong)
        assert reply.status_code == 400
        assert reply.json()["error"]["param"] == field
    for setting, said in (({"skip": [4, 3]}, None), ({"skip": [3]}, "not whole units"), ({"budget": 7}, "budget")):
        reply = http.post("/v1/embeddings", json={"input": own, "dash": setting})
        assert reply.status_code == (400 if said else 200), reply.text
        assert (said or "") in reply.text
    assert http.post("/v1/embeddings", json={"input": own, "model": "other"}).status_code == 404
    assert http.post("/v1/embeddings", content=b" " * (BODY_BYTES + 1)).status_code == 413


def test_paths_models_health_and_metrics(serve_pictures: Serve) -> None:
    with httpx.Client(base_url=serve_pictures()) as http:
        assert [one["id"] for one in http.get("/v1/models").json()["data"]] == ["tiny"]
        assert http.get("/health").json() == {"status": "ok"}
        http.post("/v1/embeddings", json={"input": [url(picture(1))] * 3, "dash": STATIC})
        http.post("/v1/embeddings", json={"input": url(b"")})
        told = http.get("/metrics").text
        for name, count in (("requests_total{", 2), ("finished_total{", 1), ("failed_total{", 1), ("running{", 0)):
            assert f'dash_export_{name}model="tiny"}} {count}.0' in told
        for layer, state in ((2, "skipped"), (1, "run")):
            assert f'dash_export_layers_total{{layer="{layer}",model="tiny",state="{state}"}} 3.0' in told
        for path in ("/v1/chat/completions", "/tokenize", "/page.js"):
            reply = http.get(path)
            assert reply.status_code == 404
            assert "Known: /v1/embeddings, /health" in reply.json()["error"]["message"]
        paths = {"/v1/embeddings", "/v1/models", "/v1/models/{name}", "/health", "/metrics"}
        assert set(http.get("/openapi.json").json()["paths"]) == paths


def test_keys_queue_and_deadline(serve_pictures: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one request under way and one that waits, a third one is refused at once."""
    body = {"input": [url(picture(1))] * 4}
    keyed = serve_pictures(keys=["secret"])
    assert httpx.post(f"{keyed}/v1/embeddings", json=body).status_code == 401
    address, hurried = serve_pictures(waiting=1), serve_pictures(deadline=0.3)
    sound, began = Encoder.encode, threading.Event()

    def slow(encoder: Encoder, pixels: np.ndarray) -> Any:
        began.set()
        time.sleep(0.4)
        return sound(encoder, pixels)

    monkeypatch.setattr(Encoder, "encode", slow)
    with ThreadPoolExecutor(2) as pool:
        first, second = (pool.submit(httpx.post, f"{address}/v1/embeddings", json=body, timeout=30) for _ in range(2))
        assert began.wait(10)
        time.sleep(0.2)
        third = httpx.post(f"{address}/v1/embeddings", json=body)
        assert third.status_code == 429
        assert "has 1 requests waiting: ask again later" in third.json()["error"]["message"]
        assert {first.result().status_code, second.result().status_code} == {200}
    late = httpx.post(f"{hurried}/v1/embeddings", json=body)
    assert late.status_code == 504
    assert "time that this request had is over" in late.json()["error"]["message"]


def test_who_leaves_is_computed_no_further(encoders: DashRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    passes, sound = [], Encoder.encode
    monkeypatch.setattr(Encoder, "encode", lambda *given: (time.sleep(0.2), passes.append(1), sound(*given))[2])
    queue = PictureQueue(encoders, batch=1)
    with listening(PictureServer({"tiny": queue}, drain=5.0).app) as address:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{address}/v1/embeddings", json={"input": [url(picture(1))] * 20}, timeout=0.5)
        until = time.monotonic() + 10
        while queue.running and time.monotonic() < until:
            time.sleep(0.05)
        assert queue.figures["cancelled"] == 1
        assert len(passes) < 10


def test_it_drains(encoders: DashRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who closes it waits for the answers under way, or fails them when their time is over."""
    sound, began = Encoder.encode, threading.Event()
    monkeypatch.setattr(Encoder, "encode", lambda *given: (began.set(), time.sleep(0.2), sound(*given))[2])
    for seconds, status in ((5.0, 200), (0.0, 504)):
        began.clear()
        queue = PictureQueue(encoders, batch=1)
        with listening(PictureServer({"tiny": queue}).app) as address, ThreadPoolExecutor(1) as pool:
            body = {"input": [url(picture(1))] * 4}
            reply = pool.submit(httpx.post, f"{address}/v1/embeddings", json=body, timeout=30)
            assert began.wait(10)
            assert queue.close(seconds) is (status == 200)
            assert reply.result().status_code == status
            refused_now = httpx.post(f"{address}/v1/embeddings", json=body)
            assert refused_now.status_code == 429
            assert httpx.get(f"{address}/health").status_code == 503


def test_the_setting_of_who_asks_for_none(encoders: DashRuntime) -> None:
    queue = PictureQueue(encoders, setting=Setting("static", skip=(2, 3, 4)))
    with listening(PictureServer({"tiny": queue}, drain=5.0).app) as address:
        said = httpx.post(f"{address}/v1/embeddings", json={"input": url(picture(1))}).json()
    assert said["dash"]["layers_per_picture"] == 2


def test_the_command(root: Path, tiny_root: Path) -> None:
    portable = ("--target", "portable")
    assert "tiny is a causal LM, and others" in refused(
        "serve", tiny_root, root, *portable, "--served-model-name", "tiny", "--served-model-name", "eye"
    )
    for option in (("--ctx-size", "50"), ("--write-triton", root.parent / "triton")):
        assert "are of causal LMs" in refused("serve", root, *portable, *option)
    with served(root, "-m", "dash_export", options=(*portable, "--log")) as (address, process):
        said = httpx.post(f"{address}/v1/embeddings", json={"model": "tiny", "input": url(picture(1))}, timeout=30)
        assert said.status_code == 200
        process.terminate()
        log = process.communicate(timeout=20)[1]
        assert process.returncode == 0
    assert '"operation": "embeddings", "model": "tiny", "ended": "stop", "pictures": 1' in log
