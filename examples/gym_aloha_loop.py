"""A closed loop: the ALOHA of gym-aloha in simulation, driven by `pi0 serve` through openpi's client and runtime.

    pip install openpi-client==0.1.2 typing_extensions "numpy<2" gym-aloha==0.1.5
    pi0 serve pi0_aloha_sim --default-prompt "Transfer cube" &
    MUJOCO_GL=egl python gym_aloha_loop.py --steps 400

Prints the highest reward of each episode (4 is success). With random weights the arms wander: that shows the loop, not
skill. `crates/pi0/tests/acceptance.rs` runs a few steps of it.
"""

import argparse

import gym_aloha  # noqa: F401 - registers the environments
import gymnasium
import numpy as np
from openpi_client import action_chunk_broker, image_tools, websocket_client_policy
from openpi_client.runtime import environment, runtime, subscriber
from openpi_client.runtime.agents import policy_agent


class AlohaEnvironment(environment.Environment):
    """As in openpi's `examples/aloha_sim`: one camera from above, the prompt is the server's."""

    def __init__(self, task: str, seed: int) -> None:
        self._gym = gymnasium.make(task, obs_type="pixels_agent_pos")
        self._rng = np.random.default_rng(seed)
        self._observation, self._done, self.best = None, True, 0.0

    def reset(self) -> None:
        observation, _ = self._gym.reset(seed=int(self._rng.integers(2**32 - 1)))
        self._observation, self._done, self.best = self._convert(observation), False, 0.0

    def is_episode_complete(self) -> bool:
        return self._done

    def get_observation(self) -> dict:
        return self._observation

    def apply_action(self, action: dict) -> None:
        observation, reward, terminated, truncated, _ = self._gym.step(action["actions"])
        self._observation, self._done = self._convert(observation), terminated or truncated
        self.best = max(self.best, float(reward))

    @staticmethod
    def _convert(observation: dict) -> dict:
        image = image_tools.convert_to_uint8(image_tools.resize_with_pad(observation["pixels"]["top"], 224, 224))
        return {"state": observation["agent_pos"], "images": {"cam_high": image.transpose(2, 0, 1)}}


class Reporter(subscriber.Subscriber):
    """Counts steps and tells how an episode ended."""

    def __init__(self, env: AlohaEnvironment) -> None:
        self._env, self._steps = env, 0

    def on_episode_start(self) -> None:
        self._steps = 0

    def on_step(self, observation: dict, action: dict) -> None:
        assert action["actions"].shape == (14,) and np.isfinite(action["actions"]).all()
        self._steps += 1

    def on_episode_end(self) -> None:
        print(f"episode: {self._steps} steps, best reward {self._env.best}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--task", default="gym_aloha/AlohaTransferCube-v0")
    parser.add_argument("--steps", type=int, default=400, help="of each episode")
    parser.add_argument("--episodes", type=int, default=1)
    parser.add_argument("--horizon", type=int, default=10, help="actions executed of each chunk")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    env = AlohaEnvironment(args.task, args.seed)
    policy = websocket_client_policy.WebsocketClientPolicy(args.host, args.port)
    broker = action_chunk_broker.ActionChunkBroker(policy, args.horizon)
    runtime.Runtime(
        environment=env,
        agent=policy_agent.PolicyAgent(broker),
        subscribers=[Reporter(env)],
        max_hz=50,
        num_episodes=args.episodes,
        max_episode_steps=args.steps,
    ).run()


if __name__ == "__main__":
    main()
