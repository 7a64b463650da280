"""`dash-export serve`: bundles behind OpenAI's API."""

from __future__ import annotations

import gc
import logging
import re
import resource
import signal
import socket
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dash_export.bundle.layout import check_outside_bundles
from dash_export.cli import printable
from dash_export.commands.options import TARGET, TRUSTED, count_option, load_runtime
from dash_export.core.facts import EncoderFacts
from dash_export.core.kinds import Setting
from dash_export.errors import OutputError, RequestError
from dash_export.serve.scheduler import ROWS, WAITING
from dash_export.text.text_files import read_text

if TYPE_CHECKING:
    from dash_export.runtime import DashRuntime
    from dash_export.serve.app import Endpoint
    from dash_export.serve.encoder_server import EncoderServer
    from dash_export.serve.scheduler import Scheduler

LOCAL = ("127.0.0.1", "localhost", "::1")


@click.command("serve")
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path))
@TARGET
@TRUSTED
@click.option("--host", default=LOCAL[0], show_default=True, help="Address to listen on. One that other "
              "machines reach needs --api-key, or --no-key.")  # fmt: skip
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535))
@click.option(
    "--rows",
    type=click.IntRange(min=1),
    help="Answers of a model that decode together, or pictures or texts of a request that an encoder computes "
    f"together; by default {ROWS}, or as many as the engines take.",
)
@count_option("--waiting", WAITING, "Requests of a model that wait; more are refused with 429.")
@click.option("--budget", type=click.FloatRange(0, 1, min_open=True),
              help="Of a request that gives none and decodes alone; by default dense, with drafts.")  # fmt: skip
@click.option("--served-model-name", "names", multiple=True, metavar="NAME",
              help="Instead of the folder's name; once for each bundle, in their order.")  # fmt: skip
@click.option("--ctx-size", type=click.IntRange(min=1), metavar="N",
              help="Most tokens of a prompt and its answer; by default as many as model and memory allow.")  # fmt: skip
@click.option("--api-key", "keys", multiple=True, envvar="DASH_EXPORT_API_KEY",
              help="What clients must send; repeatable (or DASH_EXPORT_API_KEY, several apart by spaces).")  # fmt: skip
@click.option("--api-key-file", type=click.Path(path_type=Path), metavar="FILE", help="Further keys, one a line.")
@click.option("--no-key", is_flag=True, help="Listen to others without a key.")
@click.option("--cors", multiple=True, metavar="ORIGIN", help="A web page's origin that may ask; repeatable.")
@click.option("--ssl-certfile", type=click.Path(path_type=Path), metavar="PEM", help="For https: the certificate.")
@click.option("--ssl-keyfile", type=click.Path(path_type=Path), metavar="PEM",
              help="Its private key, if the certificate's file does not hold it.")  # fmt: skip
@click.option("--connections", type=click.IntRange(min=1), metavar="N",
              help="Connections that an address may have; more are answered with 429.")  # fmt: skip
@click.option("--deadline", type=click.IntRange(1, 10**6), help="Seconds a request may take, queue and all.")
@click.option("--drain", default=30, show_default=True, type=click.IntRange(0, 3600),
              help="Seconds that answers may take to end after SIGTERM.")  # fmt: skip
@click.option("--log", "logs", is_flag=True,
              help="Write each answer's times, tokens and layers to stderr, as a line of JSON; no text.")  # fmt: skip
@click.option("--write-triton", type=click.Path(path_type=Path), metavar="DIR",
              help="Serve nothing: write a model repository for Triton.")  # fmt: skip
def command(
    bundles: tuple[Path, ...], target: str | None, trusted_key: Path | None, host: str, port: int, rows: int | None,
    waiting: int, budget: float | None, names: tuple[str, ...], ctx_size: int | None,
    keys: tuple[str, ...], api_key_file: Path | None, no_key: bool, cors: tuple[str, ...], ssl_certfile: Path | None,
    ssl_keyfile: Path | None, connections: int | None, deadline: int | None, drain: int, logs: bool,
    write_triton: Path | None
) -> None:  # fmt: skip
    """Serve BUNDLES under the names of their folders: /v1/chat/completions, /v1/completions, /v1/responses,
    /v1/embeddings, /v1/models, /health, /metrics, /openapi.json, and a page to try it at /; of encoders /v1/embeddings
    of pictures, with such a page, or of texts.
    """
    from dash_export.serve.app import Server
    from dash_export.serve.door import HttpServer
    from dash_export.serve.metrics import log
    from dash_export.serve.triton import write_repository

    if write_triton is not None:
        check_outside_bundles(write_triton / "model")
        if budget or deadline or cors or trusted_key or logs or ctx_size:
            raise RequestError(
                "A model for Triton has none of --budget, --deadline, --cors, --log, --ctx-size and "
                "--trusted-key: leave them out (DASH_EXPORT_TRUSTED_KEY where Triton runs is heeded)."
            )
    if ssl_keyfile is not None and ssl_certfile is None:
        raise RequestError("--ssl-keyfile is of no use alone: give the --ssl-certfile that it belongs to.")
    keys = known_keys(keys, api_key_file)
    if wrong := [one for one in cors if not re.fullmatch(r"\*|https?://([\w.-]+|\[[\da-f:]+\])(:\d+)?", one)]:
        raise RequestError(f"--cors {wrong[0]} is no web page's origin, which is like https://models.example.")
    if names and len(names) != len(bundles):
        raise RequestError(f"{len(bundles)} bundles have {len(names)} names: give a --served-model-name for each.")
    if write_triton is None and host not in LOCAL and not (keys or no_key):
        raise RequestError(f"Others can reach {host}: give an --api-key, or --no-key to let anybody ask.")
    runtimes = [load_runtime(bundle, target, trusted_key=trusted_key) for bundle in bundles]
    named: dict[str, DashRuntime] = {}
    for runtime, name in zip(runtimes, names or [one.bundle.name for one in runtimes], strict=True):
        if name in named or name in ("", ".", "..") or "@" in name:
            raise RequestError(f"Two bundles are called {name}, or it is no name for a model: --served-model-name.")
        named[name] = runtime
    alone = None if budget is None else Setting("token", budget=budget)
    server: Endpoint[Any]
    given: dict[str, Any] = {"keys": keys, "origins": cors, "deadline": deadline, "drain": drain}
    given["hosts"] = LOCAL if host in LOCAL else None
    if any(isinstance(one.bundle.manifest.model, EncoderFacts) for one in runtimes):
        if ctx_size or write_triton:
            raise RequestError("--ctx-size and --write-triton are of causal LMs: leave them out for an encoder.")
        server = encoder_server(named, rows, waiting, alone, given)
    else:
        served = schedulers(named, rows, waiting, alone, ctx_size)
        if write_triton is not None:
            written = write_repository(write_triton, served)
            click.echo(printable(f"Written to {', '.join(map(str, written))}"))
            return
        server = Server(served, **given)
    if logs:
        log.addHandler(logging.StreamHandler())  # stderr, the message alone
        log.setLevel(logging.INFO)
        log.propagate = False
    raise_open_file_limit()
    try:
        http = HttpServer(server.app, connections, drain, server.drain, ssl_certfile, ssl_keyfile)
    except OSError as error:
        raise RequestError(
            f"{ssl_certfile} and its key cannot be used ({error.strerror or error}): give --ssl-certfile a certificate "
            "in PEM, and --ssl-keyfile the private key that belongs to it."
        ) from None
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family)  # clients that connect before it is up wait
    except OSError as error:
        raise OutputError(
            f"{host}:{port} cannot be listened to: {(error.strerror or str(error)).lower()}. Choose another --port."
        ) from None
    shown = listener.getsockname()[1]
    address = f"http{'s' * (ssl_certfile is not None)}://{f'[{host}]' if ':' in host else host}:{shown}"
    click.echo(printable(f"Serving {', '.join(named)} at {address}/ (API: {address}/v1)"), err=True)
    gc.freeze()  # the models live on: who connects does not wait while they are looked through
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it again when all answers have ended: exit code 0
    http.run(sockets=[listener])


def schedulers(
    named: dict[str, DashRuntime], rows: int | None, waiting: int, alone: Setting | None, ctx_size: int | None
) -> dict[str, Scheduler]:  # fmt: skip
    """Return the queues of causal LMs. Raises RequestError and PolicyError."""
    from dash_export.backends.host.cpus import available_memory
    from dash_export.serve.scheduler import Scheduler

    served, memory = dict[str, Scheduler](), available_memory() // 2 // len(named)
    for name, runtime in named.items():
        if ctx_size is not None and ctx_size > (most := runtime.engines.model.max_positions):
            raise RequestError(f"--ctx-size {ctx_size} is more than the {most} positions of {name}.")
        served[name] = one = Scheduler(
            runtime, rows=rows, waiting=waiting, alone=alone, memory=memory, context=ctx_size
        )
        if one.short:
            said = f"{name}: {one.context} of {ctx_size or runtime.engines.model.max_positions} positions"
            click.echo(f"{said} for each of {one.size} rows (free memory).", err=True)
    return served


def encoder_server(
    named: dict[str, DashRuntime], rows: int | None, waiting: int, alone: Setting | None, given: dict[str, Any]
) -> EncoderServer:
    """Return the server of image encoders or text encoders. Raises RequestError for bundles of several kinds."""
    from dash_export.serve.picture_server import PictureQueue, PictureServer
    from dash_export.serve.text_server import TextQueue, TextServer

    kinds = {"prompt": "a causal LM", "pictures": "an image encoder", "texts": "a text encoder"}
    name, takes = next((name, one.bundle.manifest.model.takes) for name, one in named.items())
    if {one.bundle.manifest.model.takes for one in named.values()} != {takes}:
        raise RequestError(f"{name} is {kinds[takes]}, and others of these bundles are not: serve each kind by a "
                           "command of its own, on another --port.")  # fmt: skip
    queue, server = {"pictures": (PictureQueue, PictureServer), "texts": (TextQueue, TextServer)}[takes]
    queues = {
        name: queue(runtime, batch=rows or ROWS, waiting=waiting, setting=alone) for name, runtime in named.items()
    }
    return server(queues, **given)


def known_keys(keys: tuple[str, ...], file: Path | None) -> tuple[str, ...]:
    """Return all keys, those of a file's lines too. Raises RequestError for one that is empty, or cannot be sent."""
    if file is not None:
        lines = read_text(file, pipe=True).splitlines()
        keys += tuple(line.strip() for line in lines if line.strip()) or ("",)
    if not all(key and key == key.strip() for key in keys):
        raise RequestError("An API key is empty, or begins or ends with a space: give one that clients can send.")
    return keys


def raise_open_file_limit() -> None:
    """Raise the limit of open files: idle connections take a file descriptor each."""
    with suppress(OSError, ValueError):  # a system that refuses keeps its limit
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
