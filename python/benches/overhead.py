"""What `policy.infer` takes beside the network: its wall time in Python less `policy_timing.infer_ms`, which Rust measures.

    python python/benches/overhead.py                  # models/tiny, three images of 224 x 224, 1000 calls
    python python/benches/overhead.py MODEL --calls 200

The package must be a release build (`pip install ./python`). Exits with 1 where the median is not below a millisecond.
"""

import argparse
import pathlib
import statistics
import sys
import time

import numpy as np

import pi0

CAMERAS = ["base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"]


def observations(count):
    """Different ones, so that no picture stands still."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        images = {f"observation.images.{c}": rng.integers(0, 256, (224, 224, 3), dtype=np.uint8) for c in CAMERAS}
        yield {**images, "observation.state": rng.normal(size=14) * 0.1, "prompt": "Transfer cube"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tiny = pathlib.Path(__file__).resolve().parents[2] / "models" / "tiny"
    parser.add_argument("model", nargs="?", default=tiny)
    parser.add_argument("--calls", type=int, default=1000)
    options = parser.parse_args()
    policy = pi0.load(options.model, seed=1)
    some = list(observations(8))
    beside, inside, prepare = [], [], []
    for i in range(options.calls + 20):
        observation = some[i % len(some)]
        start = time.perf_counter()
        reply = policy.infer(observation)
        took = 1e3 * (time.perf_counter() - start)
        network = reply["policy_timing"]["infer_ms"]
        start = time.perf_counter()
        policy.preprocess(observation)
        prepared = 1e3 * (time.perf_counter() - start)
        # The first ones fill caches.
        if i >= 20:
            beside.append(took - network)
            inside.append(network)
            prepare.append(prepared)
    median, p99 = statistics.median(beside), statistics.quantiles(beside, n=100)[98]
    print(f"{options.calls} calls: the network {statistics.median(inside):.3f} ms (median)")
    print(f"all beside it: median {median:.3f} ms, p99 {p99:.3f}; of it preparing the observation {statistics.median(prepare):.3f}")
    sys.exit(median >= 1.0)


if __name__ == "__main__":
    main()
