"""Talks to `pi0 serve` with openpi's own client, unmodified, and checks what comes back.

    pip install openpi-client==0.1.2 typing_extensions "numpy<2"
    pi0 serve CHECKPOINT --robot aloha &
    python openpi_robot.py aloha

Checks an ordinary episode, images of other types and layouts, mistakes, two clients at once, and a client that leaves
while it is served. Ends with an error if anything is wrong. `crates/pi0/tests/acceptance.rs` runs it for each robot.
"""

import argparse
import threading
import time

import numpy as np
from openpi_client import action_chunk_broker, image_tools, msgpack_numpy
from openpi_client import websocket_client_policy
import websockets.sync.client

WIDTH = {"aloha": 14, "droid": 8, "libero": 7}
ROBOTS = list(WIDTH)


def camera(rng: np.random.Generator) -> np.ndarray:
    """A camera's picture, `[224, 224, 3]`, resized as the robots' programs do."""
    return image_tools.resize_with_pad(rng.integers(0, 256, (480, 640, 3), dtype=np.uint8), 224, 224)


def observe(robot: str, rng: np.random.Generator) -> dict:
    """An observation as the robot's own program in openpi sends it."""
    if robot == "aloha":
        cameras = ("cam_high", "cam_left_wrist", "cam_right_wrist")
        images = {name: camera(rng).transpose(2, 0, 1) for name in cameras}
        return {"state": np.zeros(14), "images": images, "prompt": "Transfer cube"}
    if robot == "droid":
        return {
            "observation/exterior_image_1_left": camera(rng),
            "observation/wrist_image_left": camera(rng),
            "observation/joint_position": rng.uniform(-1, 1, 7),
            "observation/gripper_position": rng.uniform(0, 1, 1),
            "prompt": "pick up the fork",
        }
    return {
        "observation/image": camera(rng),
        "observation/wrist_image": camera(rng),
        "observation/state": np.concatenate([rng.uniform(-1, 1, 6), [0.04, -0.04]]),
        "prompt": "put the bowl on the plate",
    }


def cameras_of(observation: dict) -> dict:
    """The dictionary that holds the pictures, and nothing else that is three-dimensional."""
    return observation.get("images", observation)


def change_images(observation: dict, change) -> dict:
    """The observation with each picture changed."""
    def apply(value):
        return change(value) if isinstance(value, np.ndarray) and value.ndim == 3 else value

    if "images" in observation:
        return {**observation, "images": {key: apply(value) for key, value in observation["images"].items()}}
    return {key: apply(value) for key, value in observation.items()}


def expect_error(policy, observation: dict, *words: str) -> None:
    """The observation is refused with a message that has these words; the connection ends."""
    try:
        policy.infer(observation)
    except RuntimeError as error:
        assert all(word in str(error) for word in words), error
    else:
        raise SystemExit(f"no error for {list(observation)}")
    try:
        policy.infer(observation)
    except websockets.exceptions.ConnectionClosedError as closed:
        assert closed.rcvd.code == 1011, closed
    else:
        raise SystemExit("the connection is still open after an error")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("robot", choices=ROBOTS)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--api-key")
    parser.add_argument("--horizon", type=int, help="actions in a chunk, if known")
    args = parser.parse_args()
    rng = np.random.default_rng(0)

    def connect():
        return websocket_client_policy.WebsocketClientPolicy(args.host, args.port, api_key=args.api_key)

    policy = connect()
    metadata = policy.get_server_metadata()
    print("metadata:", metadata)
    if args.robot == "aloha":
        assert metadata in ({}, {"reset_pose": [0, -1.5, 1.5, 0, 0, 0]}), metadata
    observation = observe(args.robot, rng)

    # An ordinary episode.
    reply = policy.infer(observation)
    actions = reply["actions"]
    horizon = args.horizon or len(actions)
    assert actions.shape == (horizon, WIDTH[args.robot]) and np.isfinite(actions).all(), actions.shape
    assert isinstance(reply["policy_timing"]["infer_ms"], float)
    assert isinstance(reply["server_timing"]["infer_ms"], float)
    assert "prev_total_ms" not in reply["server_timing"]
    assert isinstance(policy.infer(observation)["server_timing"]["prev_total_ms"], float)
    broker = action_chunk_broker.ActionChunkBroker(policy, min(10, horizon))
    for _ in range(25):
        assert broker.infer(observation)["actions"].shape == (WIDTH[args.robot],)
    print("an episode: ok")

    # With the noise fixed, observations that mean the same give the same actions.
    def fixed(o):
        noise = np.random.default_rng(1).standard_normal((horizon, 32)).astype(np.float32)
        return policy.infer({**o, "pi0/noise": noise})["actions"]

    wanted = fixed(observation)
    strided = change_images(observation, lambda x: np.repeat(x, 2, axis=-1)[..., ::2])
    assert not next(v for v in cameras_of(strided).values() if getattr(v, "ndim", 0) == 3).flags.c_contiguous
    np.testing.assert_array_equal(fixed(strided), wanted)
    # openpi makes bytes of floats, lerobot does not: equal in the one case, close in the other.
    for dtype in (np.float64, np.float32):
        floats = change_images(observation, lambda x: ((x + 0.5) / 255.5).astype(dtype))
        np.testing.assert_allclose(fixed(floats), wanted, atol=0.05)
    np.testing.assert_array_equal(fixed({**observation, "prompt": observation["prompt"].encode()}), wanted)
    np.testing.assert_array_equal(fixed({**observation, "prompt": np.array(observation["prompt"])}), wanted)
    np.testing.assert_array_equal(fixed({**observation, "episode": 3, "flag": np.True_}), wanted)
    if args.robot == "droid":
        gripper = np.float64(observation["observation/gripper_position"][0])
        np.testing.assert_array_equal(fixed({**observation, "observation/gripper_position": gripper}), wanted)
    if args.robot != "aloha":
        channels_first = change_images(observation, lambda x: x.transpose(2, 0, 1))
        np.testing.assert_array_equal(fixed(channels_first), wanted)
    print("strided, float and transposed images, prompts as bytes: ok")

    # A missing camera: ALOHA's wrist cameras may be, others may not.
    if args.robot == "aloha":
        only = {"cam_high": observation["images"]["cam_high"]}
        assert fixed({**observation, "images": only}).shape == wanted.shape
        expect_error(connect(), {**observation, "images": {}}, "cam_high")
        wrists = {"cam_left_wrist": observation["images"]["cam_left_wrist"]}
        expect_error(connect(), {**observation, "images": wrists}, "cam_high")
    else:
        key = next(key for key, value in observation.items() if "wrist" in key)
        expect_error(connect(), {k: v for k, v in observation.items() if k != key}, key)
    expect_error(connect(), {"state": np.zeros(14)}, "lacks" if args.robot == "aloha" else "observation")
    print("missing cameras and other mistakes: ok")

    # Two clients at once, each with its own connection and its own answers.
    def episode(failures: list) -> None:
        try:
            mine = connect()
            for _ in range(10):
                assert mine.infer(observation)["actions"].shape == wanted.shape
        except Exception as error:  # noqa: BLE001 - told by the main thread
            failures.append(error)

    failures = []
    threads = [threading.Thread(target=episode, args=(failures,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    print("two clients: ok")

    # A client that leaves while it is served, politely or not.
    for polite in (True, False):
        headers = {"Authorization": f"Api-Key {args.api_key}"} if args.api_key else None
        leaver = websockets.sync.client.connect(
            f"ws://{args.host}:{args.port}", compression=None, max_size=None, additional_headers=headers
        )
        leaver.recv()
        leaver.send(msgpack_numpy.packb(observation))
        time.sleep(0.002)
        if polite:
            leaver.close()
        else:
            leaver.socket.shutdown(2)
        assert policy.infer(observation)["actions"].shape == wanted.shape
    print("a client that leaves: ok")


if __name__ == "__main__":
    main()
