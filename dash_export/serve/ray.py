"""A bundle in Ray Serve: OpenAI's API in several replicas, on as many machines as the cluster has.

    serve run dash_export.serve.ray:app bundle=/models/my.dash replicas=2

Ray gives each request to the less busy of two random replicas. Each replica has a cache of prompt prefixes of its own.
"""

# No postponed annotations: Ray turns the command line's texts into AppArguments only where it sees the class itself.
import os

from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve import Application
from starlette.applications import Starlette

from dash_export.runtime import DashRuntime
from dash_export.serve.app import Server
from dash_export.serve.scheduler import ROWS, WAITING, Scheduler


class AppArguments(BaseModel):
    """Arguments of the application. `replicas`: their number; with `most`, Ray scales between the two numbers, so that
    each replica has about `rows` requests (default: ROWS). `cpus`: CPUs and threads of each replica. The API key is in
    the environment variable DASH_EXPORT_API_KEY.
    """

    model_config = ConfigDict(extra="forbid")

    bundle: str
    target: str | None = None
    replicas: int = Field(1, ge=1)
    most: int | None = Field(None, ge=1)
    cpus: int = Field(1, ge=1)
    rows: int | None = Field(None, ge=1)
    waiting: int = Field(WAITING, ge=1)
    deadline: float | None = Field(None, gt=0)


def app(given: AppArguments) -> Application:
    """Build the Ray Serve application."""
    key, together = os.environ.get("DASH_EXPORT_API_KEY") or None, given.rows or ROWS

    def server() -> Starlette:
        runtime = DashRuntime.load(given.bundle, given.target, threads=given.cpus)
        scheduler = Scheduler(runtime, rows=given.rows, waiting=given.waiting)
        return Server({runtime.bundle.name: scheduler}, key=key, deadline=given.deadline).app

    many = {"num_replicas": given.replicas} if given.most is None else {
        "autoscaling_config": {
            "min_replicas": given.replicas, "max_replicas": given.most, "target_ongoing_requests": together,
        }
    }  # fmt: skip
    # One more request than may wait: the scheduler itself answers it with 429.
    deployment = serve.deployment(
        serve.ingress(server)(),
        name="dash",
        max_ongoing_requests=together + given.waiting + 1,
        ray_actor_options={"num_cpus": given.cpus},
        **many,
    )
    return deployment.bind()
