"""A policy on Ray Serve: openpi's websocket at the ingress, any number of replicas behind it, one a device.

    pip install ./python "ray[serve]" openpi-client
    python examples/python/ray_serve.py models/tiny --robot aloha --max-replicas 4
    python examples/openpi_robot.py aloha             # openpi's own client, unmodified

A replica that dies takes no request with it: the ingress asks another one, since nothing of the reply has been sent yet. No robot
is tied to a replica: with real-time chunking the previous chunk travels with the request (`rtc/previous`).
docs/fleet.md says when this is worth its weight and when `pi0 serve` behind a load balancer is enough.
"""

import argparse
import asyncio
import time
from typing import Any

from fastapi import FastAPI, WebSocket, WebSocketDisconnect
from openpi_client import msgpack_numpy
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import RayServeException

app = FastAPI()


@serve.deployment
class Network:
    """A device with the policy's weights on it. Requests that wait together go through the network together."""

    def __init__(self, checkpoint: str, options: "dict[str, Any]") -> None:
        import pi0

        self.error = pi0.Error
        self.policy = pi0.load(checkpoint, **options)

    def metadata(self) -> "dict[str, Any]":
        return self.policy.metadata

    @serve.batch(max_batch_size=8, batch_wait_timeout_s=0.0)
    async def infer(self, observations: "list[dict]") -> "list[tuple[str, Any]]":
        # The network runs without the interpreter's lock, in a thread of its own.
        return await asyncio.to_thread(self.run, observations)

    def run(self, observations: "list[dict]") -> "list[tuple[str, Any]]":
        try:
            return [("reply", reply) for reply in self.policy.infer_batch(observations)]
        except self.error:
            return [self.run_alone(observation) for observation in observations]

    def run_alone(self, observation: "dict") -> "tuple[str, Any]":
        """So that only the request that is wrong is refused."""
        try:
            return "reply", self.policy.infer(observation)
        except self.error as error:
            return "error", str(error)


@serve.deployment
@serve.ingress(app)
class Ingress:
    """Speaks openpi's protocol with the robots."""

    def __init__(self, network: Any, patience: float) -> None:
        self.network = network
        self.patience = patience

    @app.get("/healthz")
    async def healthz(self) -> str:
        return "OK"

    @app.websocket("/")
    async def robot(self, socket: WebSocket) -> None:
        await socket.accept()
        try:
            await socket.send_bytes(msgpack_numpy.packb(await self.ask("metadata")))
            while True:
                start = time.monotonic()
                try:
                    observation = msgpack_numpy.unpackb(await socket.receive_bytes())
                except (ValueError, TypeError, KeyError) as error:
                    return await self.refuse(socket, f"the message is not msgpack as openpi writes it: {error}")
                kind, answer = await self.ask("infer", observation)
                if kind == "error":
                    return await self.refuse(socket, answer)
                answer["server_timing"] = {"infer_ms": 1e3 * (time.monotonic() - start)}
                await socket.send_bytes(msgpack_numpy.packb(answer))
        except WebSocketDisconnect:
            pass

    async def ask(self, what: str, *given: Any) -> Any:
        """An answer from any replica; from another one if the first dies over it."""
        end = time.monotonic() + self.patience
        while True:
            try:
                return await getattr(self.network, what).remote(*given)
            except (RayActorError, RayServeException):
                if time.monotonic() > end:
                    raise
                await asyncio.sleep(0.05)

    @staticmethod
    async def refuse(socket: WebSocket, why: str) -> None:
        # As openpi's server: the words, then the end.
        await socket.send_text(why)
        await socket.close(1011)


def application(
    checkpoint: str,
    options: "dict[str, Any]",
    *,
    replicas: int = 1,
    max_replicas: "int | None" = None,
    resources: "dict[str, float] | None" = None,
    patience: float = 120.0,
) -> Any:
    """The application: `replicas` networks, more under load up to `max_replicas`, each with `resources` of Ray's to itself."""
    scale: "dict[str, Any]" = {"num_replicas": replicas}
    if max_replicas and max_replicas > replicas:
        # A replica is busy with one batch and has the next one waiting.
        scale = {
            "autoscaling_config": {
                "min_replicas": replicas,
                "max_replicas": max_replicas,
                "target_ongoing_requests": 2,
            }
        }
    network = Network.options(
        ray_actor_options=resources or {"num_cpus": 1}, max_ongoing_requests=16, health_check_period_s=5, **scale
    )
    ingress = Ingress.options(ray_actor_options={"num_cpus": 0}, max_ongoing_requests=1000)
    return ingress.bind(network.bind(checkpoint, options), patience)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--robot", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype")
    parser.add_argument("--default-prompt")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--max-replicas", type=int)
    parser.add_argument("--cpus", type=int, default=1, help="of a replica")
    parser.add_argument("--gpus", type=float, default=0, help="of a replica")
    parser.add_argument("--host", default="0.0.0.0")
    parser.add_argument("--port", type=int, default=8000)
    given = parser.parse_args()
    options = {"robot": given.robot, "device": given.device, "dtype": given.dtype, "default_prompt": given.default_prompt}
    if given.device == "cpu":
        options["threads"] = given.cpus
    serve.start(http_options={"host": given.host, "port": given.port})
    made = application(
        given.checkpoint,
        options,
        replicas=given.replicas,
        max_replicas=given.max_replicas,
        resources={"num_cpus": given.cpus, "num_gpus": given.gpus},
    )
    serve.run(made, blocking=True)


if __name__ == "__main__":
    main()
