"""A dataset written by lerobot 0.6.1, and an evaluation of it in Python, for tests/evaluate.rs.

    python lerobot_dataset.py write RAW OUT      RAW/episode_*.safetensors to a dataset with videos
    python lerobot_dataset.py evaluate DATASET URL EVERY JSON
        reads DATASET with lerobot, asks the server at URL (`pi0 serve --seed 0`) for every chunk, and writes errors

Needs lerobot[dataset]==0.6.1, websocket-client, msgpack, safetensors.
"""

import json
import sys
from pathlib import Path

import numpy as np

CAMERAS = {"top": "observation.images.base_0_rgb", "wrist": "observation.images.left_wrist_0_rgb"}
NAMES = ["x", "y", "z", "opening"]


def write(raw, out):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset
    from safetensors import safe_open

    vector = {"dtype": "float32", "shape": (4,), "names": NAMES}
    image = {"dtype": "video", "shape": (56, 56, 3), "names": ["height", "width", "channels"]}
    features = {"observation.state": vector, "action": vector} | {key: image for key in CAMERAS.values()}
    dataset = LeRobotDataset.create("pi0/demo", fps=10, root=out, features=features, use_videos=True)
    for path in sorted(Path(raw).glob("episode_*.safetensors")):
        with safe_open(path, "np") as file:
            tensors = {name: file.get_tensor(name) for name in ("top", "wrist", "state", "actions")}
            task = file.metadata()["task"]
        for i in range(len(tensors["state"])):
            frame = {"observation.state": tensors["state"][i], "action": tensors["actions"][i], "task": task}
            dataset.add_frame(frame | {key: tensors[name][i] for name, key in CAMERAS.items()})
        dataset.save_episode()
    dataset.finalize()


def array(x):
    return {b"__ndarray__": True, b"data": x.tobytes(), b"dtype": x.dtype.str, b"shape": list(x.shape)}


def evaluate(root, url, every, out):
    import msgpack
    import websocket
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    dataset = LeRobotDataset("pi0/demo", root=root)
    numbers = dataset.hf_dataset.with_format("numpy")
    actions = np.stack([numbers[i]["action"] for i in range(len(numbers))]).astype(np.float64)
    episodes = np.array([int(numbers[i]["episode_index"]) for i in range(len(numbers))])
    socket = websocket.create_connection(url, max_size=None)
    socket.recv()
    width = actions.shape[1]
    errors = {e: [] for e in sorted(set(episodes))}
    for e in errors:
        (at,) = np.nonzero(episodes == e)
        for start in at[::every]:
            item = dataset[int(start)]
            picture = lambda key: (item[key].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
            observation = {key: array(picture(key)) for key in CAMERAS.values()}
            observation["observation.state"] = array(item["observation.state"].numpy())
            observation["prompt"] = item["task"]
            socket.send_binary(msgpack.packb(observation))
            reply = msgpack.unpackb(socket.recv(), raw=False, strict_map_key=False)["actions"]
            reply = {k if isinstance(k, str) else k.decode(): v for k, v in reply.items()}
            chunk = np.frombuffer(reply["data"], reply["dtype"]).reshape(reply["shape"]).astype(np.float64)
            recorded = actions[start : at[-1] + 1][: len(chunk)]
            errors[e].append(chunk[: len(recorded)] - recorded)
    every_row = np.concatenate([row for e in errors for row in errors[e]])
    longest = max(len(x) for e in errors for x in errors[e])
    steps = [np.concatenate([x[t] for e in errors for x in errors[e] if len(x) > t]) for t in range(longest)]
    result = {
        "chunks": sum(len(e) for e in errors.values()),
        "dimensions": [[np.abs(every_row[:, d]).mean(), np.sqrt((every_row[:, d] ** 2).mean())] for d in range(width)],
        "deviations": actions.std(axis=0).tolist(),
        "steps": [np.abs(s).mean() for s in steps],
        "episodes": [np.abs(np.concatenate(errors[e])).mean() for e in errors],
    }
    Path(out).write_text(json.dumps(result))


if __name__ == "__main__":
    command, *rest = sys.argv[1:]
    if command == "write":
        write(*rest)
    else:
        evaluate(rest[0], rest[1], int(rest[2]), rest[3])
