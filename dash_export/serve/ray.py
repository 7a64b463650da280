"""A bundle in Ray Serve: OpenAI's API in several replicas, on as many machines as the cluster has.

    serve run dash_export.serve.ray:app bundle=/models/my.dash replicas=2

Each request goes to the less busy of two random replicas. Each replica has a cache of prompt prefixes of its own.
"""

# No postponed annotations: Ray turns the command line's texts into AppArguments only where it sees the class itself.
import os
import random

from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica
from starlette.applications import Starlette

from dash_export.runtime import DashRuntime
from dash_export.serve.app import Server
from dash_export.serve.scheduler import ROWS, WAITING, Scheduler


class AppArguments(BaseModel):
    """Arguments of the application. `replicas`: their number; with `most`, Ray scales between the two numbers, so that
    each replica has about `rows` requests (default: ROWS). `cpus`: CPUs and threads of each replica. The API keys are
    in the environment variable DASH_EXPORT_API_KEY, apart by spaces.
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


class EveryNode(FIFOMixin, RequestRouter):  # type: ignore[misc]  # Ray is not there where this is checked
    """Router of requests to the replicas of all nodes. Ray's own asks those of other nodes only when the replicas of
    the address's own node refuse, and these have a long queue.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return two of the replicas, of which Ray takes the less busy one."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # if both refuse, ask again a little later
        return [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]


def app(given: AppArguments) -> Application:
    """Build the Ray Serve application."""
    keys, together = os.environ.get("DASH_EXPORT_API_KEY", "").split(), given.rows or ROWS

    def server() -> Starlette:
        runtime = DashRuntime.load(given.bundle, given.target, threads=given.cpus)
        scheduler = Scheduler(runtime, rows=given.rows, waiting=given.waiting)
        return Server({runtime.bundle.name: scheduler}, keys=keys, deadline=given.deadline).app

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
        request_router_config=RequestRouterConfig(request_router_class=EveryNode),
        **many,
    )
    return deployment.bind()
