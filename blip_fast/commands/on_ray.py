"""The server as a Ray Serve application, for several machines (`deploy/ray_serve.yaml`)."""

from __future__ import annotations

from typing import Any

from ray import serve  # pyright: ignore[reportMissingImports]

from blip_fast.commands.serve import settings_from
from blip_fast.serve.app import make_app
from blip_fast.serve.service import Service

SHUTDOWN = 75  # seconds that a replica gets to finish its requests: longer than a request may take


def build(arguments: dict[str, Any]) -> Any:
    """An application whose replicas are servers as of `blip-fast serve`, each with its own workers.

    Ray's proxies handle HTTP and distribute the requests. A replica refuses what the server refuses; while it
    loads its model, it refuses everything with `not_ready`.

    Args:
        arguments: `serve`, a list of the command's options; `replicas`, their maximum (default 1); `gpus` and
            `cpus` per replica (default 0 and 1).

    Raises:
        ValueError: the options do not fit, or there is no API key, which is required because Ray's proxies
            listen on the network.
    """
    settings = settings_from([str(option) for option in arguments["serve"]])
    if settings.api_key is None:
        raise ValueError("Ray's proxies let the network in: set the environment's BLIP_FAST_API_KEY")
    return serve.deployment(
        serve.ingress(lambda: make_app(Service(settings)))(), name="blip-fast",
        max_ongoing_requests=settings.limits.queue,
        autoscaling_config={"min_replicas": 1, "max_replicas": int(arguments.get("replicas", 1))},
        ray_actor_options={"num_gpus": arguments.get("gpus", 0), "num_cpus": arguments.get("cpus", 1)},
        graceful_shutdown_timeout_s=SHUTDOWN).bind()
