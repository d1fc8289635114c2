"""Open-loop evaluation of a policy on a whole dataset of lerobot's, over Ray Data: at every n-th frame, how far are the actions that
the policy gives from those that were recorded?

    pip install ./python "ray[data]" "lerobot[dataset]"
    python examples/python/ray_evaluate.py CHECKPOINT DATASET --workers 4 --every 10 --json result.json

DATASET is a folder or a name that lerobot knows. Images and state go in under the dataset's own names; `--rename A=B` gives one
another name. A worker that dies is replaced, and what it was at is done again.
"""

import argparse
import json
from typing import Any

import numpy as np
import ray


def frames(dataset: str, root: "str | None", horizon: "int | None" = None) -> Any:
    """The dataset, with the next `horizon` actions at each frame."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset, LeRobotDatasetMetadata

    fps = LeRobotDatasetMetadata(dataset, root=root).fps
    ahead = None if horizon is None else {"action": [i / fps for i in range(horizon)]}
    return LeRobotDataset(dataset, root=root, delta_timestamps=ahead)


class Worker:
    """A policy on a device; measures frames."""

    def __init__(
        self, checkpoint: str, options: "dict[str, Any]", dataset: str, root: "str | None", rename: "dict[str, str]"
    ) -> None:
        import pi0

        self.policy = pi0.load(checkpoint, **options)
        self.frames = frames(dataset, root, self.policy.model.config["horizon"])
        self.rename = rename

    def __call__(self, batch: "dict[str, np.ndarray]") -> "dict[str, np.ndarray]":
        rows = [self.frames[int(i)] for i in batch["index"]]
        # The seed of a frame is its number, so that the result does not depend on how frames are spread over workers.
        replies = [
            self.policy.infer(self.observation(row), seed=int(i)) for row, i in zip(rows, batch["index"], strict=True)
        ]
        errors, counts = [], []
        for row, reply in zip(rows, replies, strict=True):
            recorded = row["action"].numpy()
            # Behind the end of an episode nothing was recorded.
            real = ~row["action_is_pad"].numpy()
            error = np.abs(reply["actions"][: len(recorded), : recorded.shape[1]] - recorded)[real]
            errors.append(error.sum(axis=0))
            counts.append(len(error))
        return {
            "index": batch["index"],
            "episode": np.array([int(row["episode_index"]) for row in rows]),
            "error": np.stack(errors),
            "count": np.array(counts),
        }

    def observation(self, row: "dict[str, Any]") -> "dict[str, Any]":
        seen = {self.rename.get(k, k): v for k, v in row.items() if k.startswith("observation.")}
        return {**seen, "prompt": row["task"]}


def evaluate(
    checkpoint: str,
    dataset: str,
    *,
    root: "str | None" = None,
    options: "dict[str, Any] | None" = None,
    rename: "dict[str, str] | None" = None,
    every: int = 1,
    workers: int = 1,
    batch_size: int = 8,
    resources: "dict[str, float] | None" = None,
) -> "dict[str, Any]":
    """Mean absolute errors of the actions: of each joint, of each episode, of all."""
    count = len(frames(dataset, root))
    indices = ray.data.from_items([{"index": i} for i in range(0, count, every)])
    measured = indices.repartition(max(workers, len(range(0, count, every)) // batch_size)).map_batches(
        Worker,
        fn_constructor_args=(checkpoint, options or {}, dataset, root, rename or {}),
        batch_size=batch_size,
        concurrency=workers,
        **(resources or {"num_cpus": 1}),
    )
    rows = sorted(measured.take_all(), key=lambda row: row["index"])
    errors, counts = np.stack([row["error"] for row in rows]), np.array([row["count"] for row in rows])
    episodes = np.array([row["episode"] for row in rows])

    def mean(of: "np.ndarray | slice") -> float:
        return float(errors[of].sum() / (counts[of].sum() * errors.shape[1]))

    return {
        "frames": len(rows),
        "mean_absolute_error": mean(slice(None)),
        "by_joint": (errors.sum(axis=0) / counts.sum()).tolist(),
        "by_episode": {int(e): mean(episodes == e) for e in np.unique(episodes)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("dataset")
    parser.add_argument("--root", help="where the dataset lies, if lerobot's cache does not have it")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype")
    parser.add_argument("--rename", action="append", default=[], metavar="A=B")
    parser.add_argument("--every", type=int, default=1, help="of how many frames one is measured")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--cpus", type=int, default=1, help="of a worker")
    parser.add_argument("--gpus", type=float, default=0, help="of a worker")
    parser.add_argument("--json", help="where to write the result")
    given = parser.parse_args()
    options = {"device": given.device, "dtype": given.dtype}
    if given.device == "cpu":
        options["threads"] = given.cpus
    result = evaluate(
        given.checkpoint,
        given.dataset,
        root=given.root,
        options=options,
        rename=dict(pair.split("=", 1) for pair in given.rename),
        every=given.every,
        workers=given.workers,
        resources={"num_cpus": given.cpus, "num_gpus": given.gpus},
    )
    text = json.dumps(result, indent=1)
    print(text)
    if given.json:
        with open(given.json, "w", encoding="utf-8") as file:
            file.write(text)


if __name__ == "__main__":
    main()
