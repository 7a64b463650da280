"""`dash-export serve`: bundles behind OpenAI's API."""

import logging
import resource
from contextlib import suppress
from pathlib import Path
from types import FrameType

import click

from dash_export.cli import printable
from dash_export.commands.options import TARGET, TRUSTED, count_option, load_runtime
from dash_export.decision import Setting
from dash_export.errors import OutputError, RequestError
from dash_export.replacing import check_outside_bundles
from dash_export.serve.scheduler import ROWS, WAITING

LOCAL = ("127.0.0.1", "localhost", "::1")


@click.command("serve")
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path))
@TARGET
@TRUSTED
@click.option("--host", default=LOCAL[0], show_default=True, help="Where to listen; another than this machine's own "
              "needs an --api-key, or --no-key.")  # fmt: skip
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535))
@click.option(
    "--rows",
    type=click.IntRange(min=1),
    help=f"Answers of a model that decode together; by default {ROWS}, or as many as the engines take.",
)
@count_option("--waiting", WAITING, "Requests of a model that wait; more are refused with 429.")
@click.option("--budget", type=click.FloatRange(0, 1, min_open=True),
              help="For requests that do not say it, alone; by default what the bundle recommends.")  # fmt: skip
@click.option("--pace", type=click.FloatRange(0.1, 60_000), metavar="MS", help="Milliseconds that a token may take: "
              "requests that do not say how much they skip, skip what that needs.")  # fmt: skip
@click.option("--least", default=0.85, show_default=True, type=click.FloatRange(0.01, 1),
              help="With --pace: the lowest budget that is granted.")  # fmt: skip
@click.option("--api-key", envvar="DASH_EXPORT_API_KEY", help="What clients must send (or DASH_EXPORT_API_KEY).")
@click.option("--no-key", is_flag=True, help="Listen to others without a key.")
@click.option("--cors", multiple=True, metavar="ORIGIN", help="A web page's origin that may ask; repeatable.")
@click.option("--deadline", type=click.IntRange(1, 10**6), help="Seconds a request may take, queue and all.")
@click.option("--drain", default=30, show_default=True, type=click.IntRange(0, 3600),
              help="Seconds that answers may take to end after SIGTERM.")  # fmt: skip
@click.option("--log", "logs", is_flag=True,
              help="Write each answer's times, tokens and layers to stderr, as a line of JSON; no text.")  # fmt: skip
@click.option("--write-triton", type=click.Path(path_type=Path), metavar="DIR",
              help="Serve nothing: write a model repository for Triton.")  # fmt: skip
def command(
    bundles: tuple[Path, ...], target: str | None, trusted_key: Path | None, host: str, port: int, rows: int | None,
    waiting: int, budget: float | None, pace: float | None, least: float, api_key: str | None, no_key: bool,
    cors: tuple[str, ...], deadline: int | None, drain: int, logs: bool, write_triton: Path | None
) -> None:  # fmt: skip
    """Serve BUNDLES under the names of their folders: /v1/chat/completions, /v1/completions, /v1/responses, /v1/models,
    /health, /metrics, /openapi.json, and a page to try it at /. A request for the model `auto` is answered by the first
    of several bundles that has time for it, or else by the last: give the best one first, the fastest one last.
    """
    import uvicorn

    from dash_export.runtime.cpus import available_memory
    from dash_export.serve.app import AUTO, Server
    from dash_export.serve.metrics import log
    from dash_export.serve.scheduler import Scheduler
    from dash_export.serve.triton import write_repository

    if write_triton is not None:
        check_outside_bundles(write_triton / "model")
        if budget or pace or deadline or cors or trusted_key or logs:
            raise RequestError(
                "A model for Triton has none of --budget, --pace, --deadline, --cors, --log and --trusted-key: leave "
                "them out (DASH_EXPORT_TRUSTED_KEY where Triton runs is heeded)."
            )
    elif host not in LOCAL and not (api_key or no_key):
        raise RequestError(f"Others can reach {host}: give an --api-key, or --no-key to let anybody ask.")
    served: dict[str, Scheduler] = {}
    runtimes = [load_runtime(bundle, target, trusted_key=trusted_key) for bundle in bundles]
    memory = available_memory() // 2 // len(bundles)
    alone = None if budget is None else Setting("token", budget=budget)
    for runtime in runtimes:
        name = runtime.bundle.name
        if name in served or name in (".", "..", AUTO) or "@" in name:
            raise RequestError(f"Two bundles are called {name}, or it is no name for a model: rename the folder.")
        bends = len(runtimes) == 1 or runtime.bundle.manifest.policy.has_network  # beside others one may be dense
        served[name] = one = Scheduler(
            runtime, rows=rows, waiting=waiting, alone=alone if bends else None, memory=memory, least=least,
            pace=pace / 1000 if pace is not None and bends else None,
        )  # fmt: skip
        if one.context < (most := runtime.engines.model.max_positions):
            click.echo(
                f"{name}: {one.context} of its {most} positions for each of {one.size} rows (free memory).", err=True
            )
    if write_triton is not None:
        written = write_repository(write_triton, served)
        click.echo(printable(f"Written to {', '.join(map(str, written))}"))
        return
    if logs:
        log.addHandler(logging.StreamHandler())  # stderr, the message alone
        log.setLevel(logging.INFO)
        log.propagate = False
    hosts = LOCAL if host in LOCAL else None
    server = Server(served, key=api_key, origins=cors, hosts=hosts, deadline=deadline, drain=drain)
    raise_open_file_limit()
    config = uvicorn.Config(server.app, host, port, log_level="warning", timeout_graceful_shutdown=drain + 5)
    try:
        socket = config.bind_socket()
    except SystemExit:  # uvicorn has logged why
        raise OutputError(
            f"{host}:{port} cannot be listened to: another program may have it. Choose a --port."
        ) from None
    socket.listen(128)  # clients that connect before the server is up wait
    shown = socket.getsockname()[1]
    address = f"http://{f'[{host}]' if ':' in host else host}:{shown}"
    click.echo(printable(f"Serving {', '.join(served)} at {address}/ (API: {address}/v1)"), err=True)

    class Draining(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            server.drain()
            super().handle_exit(sig, frame)

    Draining(config).run(sockets=[socket])


def raise_open_file_limit() -> None:
    """Raise the limit of open files: idle connections take a file descriptor each."""
    with suppress(OSError, ValueError):  # a system that refuses keeps its limit
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
