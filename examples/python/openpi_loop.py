"""openpi's loop with a policy of ours in place of openpi's: one inference gives a chunk, the broker hands out its actions.

    pip install ./python openpi-client
    python examples/python/openpi_loop.py
"""

import pathlib

import numpy as np
from openpi_client.action_chunk_broker import ActionChunkBroker

import pi0

ROOT = pathlib.Path(__file__).resolve().parents[2]


def main(steps=20):
    policy = pi0.load(ROOT / "models" / "tiny", default_prompt="Transfer cube", seed=0)
    broker = ActionChunkBroker(policy, action_horizon=10)
    state, rng, actions = np.zeros(14), np.random.default_rng(0), []
    for _ in range(steps):
        observation = {
            "observation.images.base_0_rgb": rng.integers(0, 256, (224, 224, 3), dtype=np.uint8),
            "observation.state": state,
        }
        action = broker.infer(observation)["actions"]
        state = action  # a robot that reaches what it is told
        actions.append(action)
    return np.stack(actions)


if __name__ == "__main__":
    print(main().shape)
