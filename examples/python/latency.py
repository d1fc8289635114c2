"""How long a server of policies takes to answer openpi's own client, and how often it answers: for `pi0 serve`, for a load balancer in
front of several, for ray_serve.py.

    pip install openpi-client==0.1.2 typing_extensions
    pi0 serve models/tiny --robot aloha --steps 1 --default-prompt "Transfer cube" &
    python examples/python/latency.py --port 8000 --clients 4 --requests 200
"""

import argparse
import threading
import time

import numpy as np
from openpi_client.websocket_client_policy import WebsocketClientPolicy


def observation(rng):
    """An ALOHA's: three cameras, 452 kB."""
    cameras = ("cam_high", "cam_left_wrist", "cam_right_wrist")
    images = {name: rng.integers(0, 256, (3, 224, 224), dtype=np.uint8) for name in cameras}
    return {"state": np.zeros(14), "images": images, "prompt": "Transfer cube"}


def measure(host, port, clients, requests):
    """Milliseconds of each request, beyond the network's own time; seconds in all; how many connections were lost."""
    times, lost = [], []
    barrier = threading.Barrier(clients + 1)

    def robot(seed):
        seen = observation(np.random.default_rng(seed))
        client = WebsocketClientPolicy(host, port)
        for _ in range(5):
            client.infer(seen)
        barrier.wait()
        done = 0
        while done < requests:
            start = time.perf_counter()
            try:
                reply = client.infer(seen)
            except Exception:  # noqa: BLE001 a robot's program connects again, and asks again
                lost.append(seed)
                time.sleep(0.2)
                try:
                    client = WebsocketClientPolicy(host, port)
                except Exception:  # noqa: BLE001
                    if len(lost) > 100 * clients:
                        raise
                continue
            took = 1e3 * (time.perf_counter() - start)
            times.append((took, took - reply["policy_timing"]["infer_ms"]))
            done += 1

    robots = [threading.Thread(target=robot, args=(seed,)) for seed in range(clients)]
    [r.start() for r in robots]
    barrier.wait()
    start = time.perf_counter()
    [r.join() for r in robots]
    return np.array(times), time.perf_counter() - start, len(lost)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--requests", type=int, default=200, help="of each client")
    given = parser.parse_args()
    times, seconds, lost = measure(given.host, given.port, given.clients, given.requests)
    for name, column in (("answer", 0), ("without the network", 1)):
        p50, p99 = np.percentile(times[:, column], [50, 99])
        print(f"{name}: median {p50:.2f} ms, p99 {p99:.2f} ms")
    print(f"{len(times) / seconds:.1f} a second, {lost} connections lost")


if __name__ == "__main__":
    main()
