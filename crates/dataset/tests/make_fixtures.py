"""Makes tests/data: a small dataset with images, as lerobot 0.6.1 writes it (v30), and the same in the layout of 2.1.

    python tests/make_fixtures.py            needs lerobot[dataset]==0.6.1

lerobot 0.6.1 no longer writes 2.1; that layout is written here, file by file.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from lerobot.datasets.lerobot_dataset import LeRobotDataset

DATA = Path(__file__).parent / "data"
LENGTHS = [5, 3]
TASKS = ["pick up the cup", "put it down"]


def picture(episode, frame):
    y, x, c = np.meshgrid(np.arange(6), np.arange(8), np.arange(3), indexing="ij")
    return (100 * episode + 10 * frame + 5 * y + 3 * x + 40 * c).astype(np.uint8)


def main():
    shutil.rmtree(DATA, ignore_errors=True)
    vector = lambda n, names: {"dtype": "float32", "shape": (n,), "names": names}
    features = {
        "observation.state": vector(3, ["a", "b", "c"]),
        "action": vector(2, ["go", "grip"]),
        "observation.images.top": {"dtype": "image", "shape": (6, 8, 3), "names": ["height", "width", "channels"]},
    }
    new = DATA / "v30"
    dataset = LeRobotDataset.create("pi0/fixture", fps=10, root=new, features=features, use_videos=False)
    for episode, length in enumerate(LENGTHS):
        for frame in range(length):
            dataset.add_frame({
                "observation.state": np.array([episode, frame, 0.5], np.float32),
                "action": np.array([frame / 8, episode], np.float32),
                "observation.images.top": picture(episode, frame),
                "task": TASKS[episode],
            })
        dataset.save_episode()
    dataset.finalize()
    shutil.rmtree(new / "images", ignore_errors=True)

    old = DATA / "v21"
    (old / "meta").mkdir(parents=True)
    info = json.loads((new / "meta/info.json").read_text())
    info |= {
        "codebase_version": "v2.1",
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        "chunks_size": 1,
    }
    (old / "meta/info.json").write_text(json.dumps(info, indent=4))
    lines = lambda rows: "".join(json.dumps(row) + "\n" for row in rows)
    (old / "meta/tasks.jsonl").write_text(lines({"task_index": i, "task": t} for i, t in enumerate(TASKS)))
    (old / "meta/episodes.jsonl").write_text(
        lines({"episode_index": i, "tasks": [TASKS[i]], "length": n} for i, n in enumerate(LENGTHS)))
    table = pa.concat_tables(pq.read_table(path) for path in sorted((new / "data").rglob("*.parquet")))
    for episode in range(len(LENGTHS)):
        path = old / f"data/chunk-{episode:03d}/episode_{episode:06d}.parquet"
        path.parent.mkdir(parents=True)
        pq.write_table(table.filter(pa.compute.equal(table["episode_index"], episode)), path)


main()
