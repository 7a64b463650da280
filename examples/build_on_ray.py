"""Build for several targets on a Ray cluster: `python examples/build_on_ray.py /shared/my.dash cpu l4 --address auto`.

Each build is a task of the node that says it has the target (`ray start --address HEAD --resources '{"l4": 1}'`), or of
any node, where none says so: then give one target at a time, for builds beside each other measure wrong costs. All
nodes see the bundle under one path. A task whose node dies is tried again and goes on where it was; a target that is
built already costs its check.
"""

from __future__ import annotations

import argparse
from typing import Any

import ray

from dash_export import DashError, build


@ray.remote(max_retries=3)  # type: ignore[untyped-decorator]
def built(bundle: str, target: str) -> str:
    """Build for one target, and say where, or why not."""
    try:
        made = build(bundle, target)
    except DashError as error:
        return f"{target}: {error}"
    return f"{target}: {len(made.engines)} engines in {made.seconds:.0f} s for {made.device}. {made.cost.disturbed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle")
    parser.add_argument("targets", nargs="+")
    parser.add_argument("--address", help="the cluster's, or auto; by default one of this machine alone")
    parser.add_argument("--cores", type=float, default=2)
    options = parser.parse_args()

    ray.init(address=options.address, log_to_driver=False)
    known = ray.cluster_resources()
    waiting: list[Any] = []
    for target in options.targets:
        where = {target: 1.0} if target in known else {}
        waiting.append(built.options(num_cpus=options.cores, resources=where).remote(options.bundle, target))
    while waiting:
        done, waiting = ray.wait(waiting)
        print(ray.get(done[0]), flush=True)


if __name__ == "__main__":
    main()
