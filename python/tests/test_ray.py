"""Ray's examples with two replicas, one of which is killed under load: no request is lost."""

import contextlib
import os
import pathlib
import signal
import threading
import time

import numpy as np
import pytest
from test_examples import example

if not os.environ.get("PI0_RAY"):
    pytest.skip("needs Ray; PI0_RAY=1 .ci/python runs it", allow_module_level=True)
ray = pytest.importorskip("ray")

from conftest import ROOT  # noqa: E402

CLIENTS, REQUESTS, PORT = 4, 30, 18431


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    # Workers import the examples and the tests by name.
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT / "examples" / "python"), str(ROOT / "python" / "tests"), os.environ.get("PYTHONPATH", "")]
    )
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=200 * 2**20)
    yield ray
    ray.shutdown()



def workers(name):
    """Process ids of live actors of a class, by the titles that Ray gives its processes."""
    found = []
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            title = (folder / "cmdline").read_text(errors="replace")
            dead = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()[0] == "Z"
            if title.startswith("ray::") and name in title and not dead:
                found.append(int(folder.name))
    return found


def observation(rng):
    image = lambda: rng.integers(0, 256, (3, 224, 224), dtype=np.uint8)  # noqa: E731
    cameras = ("cam_high", "cam_left_wrist", "cam_right_wrist")
    return {"state": np.zeros(14), "images": {name: image() for name in cameras}, "prompt": "Transfer cube"}


def test_serve_loses_no_request_when_a_replica_dies(cluster):
    websocket_client_policy = pytest.importorskip("openpi_client.websocket_client_policy")
    from ray import serve

    serving = example("ray_serve")
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    options = {"robot": "aloha", "threads": 1, "steps": 2}
    serve.run(serving.application(str(ROOT / "models" / "tiny"), options, replicas=2, patience=60))
    replies, failures = [], []

    def robot(seed):
        try:
            rng = np.random.default_rng(seed)
            client = websocket_client_policy.WebsocketClientPolicy("127.0.0.1", PORT)
            for _ in range(REQUESTS):
                replies.append(client.infer(observation(rng))["actions"])
        except Exception as error:  # noqa: BLE001
            failures.append(error)

    robots = [threading.Thread(target=robot, args=(seed,)) for seed in range(CLIENTS)]
    [r.start() for r in robots]
    while len(replies) < CLIENTS * REQUESTS // 4:
        assert not failures, failures
        time.sleep(0.01)
    replicas = workers("Network")
    assert len(replicas) == 2, replicas
    os.kill(replicas[0], signal.SIGKILL)
    at = len(replies)
    [r.join() for r in robots]
    assert not failures, failures
    assert len(replies) == CLIENTS * REQUESTS and len(replies) - at > CLIENTS
    assert all(actions.shape == (16, 14) and np.isfinite(actions).all() for actions in replies)
    # A wrong request is refused in words, and nobody else's business.
    client = websocket_client_policy.WebsocketClientPolicy("127.0.0.1", PORT)
    with pytest.raises(RuntimeError, match="state"):
        client.infer({"images": {}, "prompt": "x"})
    # The dead replica is replaced.
    end = time.monotonic() + 60
    while len(workers("Network")) < 2 and time.monotonic() < end:
        time.sleep(0.5)
    assert len(workers("Network")) == 2
    serve.shutdown()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Two short episodes, as lerobot records them."""
    lerobot_dataset = pytest.importorskip("lerobot.datasets.lerobot_dataset", reason="needs lerobot[dataset]")
    root = tmp_path_factory.mktemp("dataset") / "made"
    names = [f"joint_{i}" for i in range(14)]
    features = {
        "observation.images.top": {"dtype": "image", "shape": (48, 64, 3), "names": ["height", "width", "channel"]},
        "observation.state": {"dtype": "float32", "shape": (14,), "names": names},
        "action": {"dtype": "float32", "shape": (14,), "names": names},
    }
    made = lerobot_dataset.LeRobotDataset.create("local/made", 50, features=features, root=root, use_videos=False)
    rng = np.random.default_rng(0)
    for length in (40, 24):
        for _ in range(length):
            made.add_frame(
                {
                    "observation.images.top": rng.integers(0, 256, (48, 64, 3), dtype=np.uint8),
                    "observation.state": rng.normal(size=14).astype(np.float32),
                    "action": rng.normal(size=14).astype(np.float32),
                    "task": "Transfer cube",
                }
            )
        made.save_episode()
    made.finalize()
    return root


def test_evaluation_survives_the_death_of_a_worker(cluster, dataset):
    evaluation = example("ray_evaluate")
    given = {
        "root": str(dataset),
        "options": {"threads": 1, "steps": 2},
        "rename": {"observation.images.top": "observation.images.base_0_rgb"},
        "workers": 2,
        "batch_size": 4,
    }
    model = str(ROOT / "models" / "tiny")
    want = evaluation.evaluate(model, "local/made", **given)
    assert want["frames"] == 64 and want["mean_absolute_error"] > 0 and len(want["by_joint"]) == 14
    assert set(want["by_episode"]) == {0, 1}

    killed = []

    def reap():
        end = time.monotonic() + 120
        while not killed and time.monotonic() < end:
            alive = workers("MapWorker")
            if len(alive) == 2:
                time.sleep(1.0)
                os.kill(alive[0], signal.SIGKILL)
                killed.append(alive[0])
            time.sleep(0.1)

    reaper = threading.Thread(target=reap)
    reaper.start()
    again = evaluation.evaluate(model, "local/made", **given)
    reaper.join()
    assert killed and again == want
