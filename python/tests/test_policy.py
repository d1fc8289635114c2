"""The policy as openpi's programs use it."""

import gc
import os
import shutil
import signal
import threading
import time

import numpy as np
import pytest
from conftest import ROOT
from test_judge import read

import pi0

NOISE = np.random.default_rng(3).normal(size=(16, 32)).astype(np.float32)


def infer(policy, observation, **kw):
    return policy.infer(observation, noise=NOISE, steps=2, **kw)["actions"]


def test_reply_and_metadata_are_openpis(policy, observation):
    reply = policy.infer(observation, steps=1)
    assert reply["actions"].shape == (16, 14) and reply["actions"].dtype == np.float64
    assert reply["policy_timing"]["infer_ms"] > 0
    assert isinstance(policy.metadata, dict)
    assert policy.reset() is None


def kinds(reply):
    return {warning["kind"] for warning in reply.get("pi0/warnings", [])}


def test_the_doctor_looks_at_each_observation(policy, observation, tiny):
    key = "observation.images.base_0_rgb"
    black = {**observation, key: np.zeros((3, 48, 64), np.uint8)}
    good, bad = policy.infer(observation, steps=1), policy.infer(black, steps=1)
    assert kinds(bad) - kinds(good) == {"image_black"}
    (warning,) = [w for w in bad["pi0/warnings"] if w["kind"] == "image_black"]
    assert set(warning) == {"kind", "subject", "text", "remedy"} and "base_0_rgb" in warning["text"]
    # Each alone: the same observation again is not called frozen or repeated, however often.
    assert all(kinds(r) == kinds(good) for r in policy.infer_batch([observation] * 6, steps=1))
    strict = pi0.load(tiny, threads=1, strict=["image_black", "answer_malformed"])
    assert kinds(strict.infer(observation, steps=1)) == kinds(good)
    for call in (strict.infer, lambda o, steps: strict.infer_batch([observation, o], steps=steps)):
        with pytest.raises(pi0.StrictError, match="image_black.*is black"):
            call(black, steps=1)
    with pytest.raises(pi0.OptionError, match="image_blue"):
        pi0.load(tiny, strict=["image_blue"])


@pytest.fixture(scope="module")
def fast(tmp_path_factory):
    """golden/f in the policy of golden/policy_fast, and the observation that it was taught to answer."""
    folder, golden = tmp_path_factory.mktemp("fast"), ROOT / "golden"
    shutil.copytree(golden / "policy_fast", folder, dirs_exist_ok=True)
    (folder / "tokenizer").mkdir(exist_ok=True)
    shutil.copy(golden / "tokens" / "tokenizer.json", folder / "tokenizer")
    for name in ("model.safetensors", "arch.json"):
        shutil.copy(golden / "f" / name, folder)
    seen = read(golden / "policy_fast" / "e2e.safetensors")
    observation = {
        "observation.images.front": seen["raw.image_0"],
        "observation.images.wrist": seen["raw.image_1"],
        "observation.state": seen["raw.state"],
        "task": "Pick up the_red block\n",
    }
    return folder, observation, seen["actions"]


def test_malformed_answers_are_findings_too(fast):
    folder, observation, actions = fast
    policy = pi0.load(folder, threads=1)
    reply = policy.infer(observation)
    np.testing.assert_allclose(reply["actions"], actions.reshape(10, 4), atol=1e-5)
    assert "answer_malformed" not in kinds(reply)
    with pytest.warns(pi0.ObservationWarning, match="no end mark"):
        assert "answer_malformed" in kinds(policy.infer(observation, steps=10))
    strict = pi0.load(folder, threads=1, strict="answer_malformed")
    with pytest.warns(pi0.ObservationWarning), pytest.raises(pi0.StrictError, match="no end mark"):
        strict.infer(observation, steps=10)
    # No actions at all can be read from this one.
    with pytest.raises(pi0.AnswerError, match="Action"):
        policy.postprocess([5.0, 6.0], policy.preprocess(observation))


def test_openpis_broker_takes_it(policy, observation):
    broker = pytest.importorskip("openpi_client.action_chunk_broker")
    broker = broker.ActionChunkBroker(policy, action_horizon=4)
    first = [broker.infer(observation)["actions"] for _ in range(4)]
    assert all(a.shape == (14,) for a in first) and not np.array_equal(first[0], first[1])
    broker.reset()


def test_layers_below_give_the_same(policy, observation):
    inputs = policy.preprocess(observation)
    inputs.noise = NOISE
    chunk = policy.model.sample_actions(inputs, steps=2)
    assert chunk.shape == (1, 16, 32) and chunk.dtype == np.float32
    np.testing.assert_array_equal(policy.postprocess(chunk[0], inputs), infer(policy, observation))
    again = pi0.Inputs(inputs.images, inputs.tokens, inputs.state, inputs.noise)
    np.testing.assert_array_equal(policy.model.sample_actions([again, inputs], steps=2)[0], chunk[0])
    with pytest.raises(pi0.InputError, match="preprocess"):
        policy.postprocess(chunk[0], again)


def test_a_batch_gives_what_single_calls_give(policy, observation):
    alone = policy.infer(observation, seed=5, steps=2)["actions"]
    both = policy.infer_batch([observation, observation], seed=5, steps=2)
    np.testing.assert_allclose(both[0]["actions"], alone, atol=1e-4)
    assert policy.infer_batch([]) == []


def test_strides_and_types_do_not_matter(policy, observation):
    want = infer(policy, observation)
    key = "observation.images.base_0_rgb"
    image = observation[key]
    wide = np.zeros((3, 48, 128), np.uint8)
    wide[:, :, ::2] = image
    for same in (np.asfortranarray(image), wide[:, :, ::2], np.ascontiguousarray(image.transpose(1, 2, 0))):
        np.testing.assert_array_equal(infer(policy, {**observation, key: same}), want)
    state = observation["observation.state"]
    for same in (list(state), tuple(state), state.astype(">f8"), np.repeat(state, 2)[::2]):
        np.testing.assert_array_equal(infer(policy, {**observation, "observation.state": same}), want)
    read_only = image.copy()
    read_only.setflags(write=False)
    np.testing.assert_array_equal(infer(policy, {**observation, key: read_only}), want)


def test_torch_tensors_on_the_host(policy, observation):
    torch = pytest.importorskip("torch")
    tensors = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in observation.items()}
    np.testing.assert_array_equal(infer(policy, tensors), infer(policy, observation))


def test_threads_share_a_policy(policy, observation):
    want = infer(policy, observation)
    results = []

    def work():
        for _ in range(3):
            results.append(infer(policy, observation))

    threads = [threading.Thread(target=work) for _ in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert len(results) == 12 and all(np.array_equal(r, want) for r in results)


def test_the_gil_is_free_while_the_network_runs(policy, observation):
    done = threading.Event()
    thread = threading.Thread(target=lambda: (policy.infer(observation, steps=100), done.set()))
    thread.start()
    ticks = 0
    while not done.is_set():
        time.sleep(0.001)
        ticks += 1
    thread.join()
    assert ticks > 5


def test_ctrl_c_ends_the_wait(policy, observation):
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        # Long enough on any machine: seconds.
        policy.infer_batch([observation] * 32, steps=1000)
    assert policy.infer(observation, steps=1)["actions"].shape == (16, 14)


def test_progress_is_heard_and_may_stop_the_loading(tiny):
    heard = []
    pi0.load(tiny, threads=1, progress=lambda done, total: heard.append((done, total)))
    assert heard and all(a[0] <= b[0] for a, b in zip(heard, heard[1:])) and heard[-1][0] <= heard[-1][1]

    def stop(done, total):
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        pi0.load(tiny, threads=1, progress=stop)


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"device": "abacus"}, pi0.OptionError, "abacus"),
        ({"dtype": "f8"}, pi0.OptionError, "f8"),
        ({"robot": "r2d2"}, pi0.OptionError, "r2d2"),
        ({"no_such_option": 1}, pi0.OptionError, "no-such-option"),
        ({"threads": 0}, pi0.OptionError, "0"),
        ({"tokenizer": "/nowhere"}, pi0.CheckpointError, "nowhere"),
    ],
)
def test_options_are_those_of_the_command_line(tiny, options, error, words):
    with pytest.raises(error, match=words):
        pi0.load(tiny, **options)


def test_a_checkpoint_that_is_none(tmp_path):
    with pytest.raises(pi0.CheckpointError, match="does not exist"):
        pi0.load(tmp_path / "nothing")


def test_whatever_comes_as_an_observation_is_answered_or_refused(policy, observation):
    deep = {}
    deep["self"] = deep
    key = "observation.images.base_0_rgb"
    values = [
        None, True, -1, 10**400, float("nan"), "", "\ud800", b"\xff", [], [[[]]], {}, {1: 2}, deep, object(), 1j,
        np.zeros(0), np.zeros((0, 3, 3), np.uint8), np.zeros((3, 1, 1), np.uint8), np.array(None), np.array("x"),
        np.zeros((3, 4, 4), np.complex64), np.zeros((3, 4, 4), np.int64), np.zeros((3, 4, 4), np.float16),
        np.full((3, 4, 4), np.inf, np.float32), np.broadcast_to(np.uint8(0), (3, 10**6, 10**6)),
        np.zeros((3, 4, 4), "M8[s]"), np.zeros(3, [("a", "f4")]), np.datetime64("2020-01-01"), range(10**7),
        np.zeros([1] * 32), type("Array", (), {"__array__": lambda self, *a, **k: 1 / 0})(), lambda: 0,
        np.zeros((3, 8, 8), ">f8"), memoryview(b"abc"), np.zeros((3, 8, 8), np.uint8)[:, ::-1], np.float32(1),
    ]  # fmt: skip
    for value in values:
        for at in (key, "observation.state", "prompt", "pi0/noise", "rtc/previous", "images", "nobody"):
            try:
                policy.infer({**observation, at: value}, steps=1)
            except pi0.Error:
                pass
        for whole in (value, {at: value for at in observation}):
            with pytest.raises(pi0.Error):
                policy.infer(whole, steps=1)
    for bad in (value for value in values if value is not None):
        with pytest.raises((pi0.Error, TypeError)):
            policy.infer(observation, noise=bad)
        with pytest.raises((pi0.Error, TypeError)):
            policy.model.sample_actions(bad)


def test_nothing_leaks(tiny, policy, observation):
    """PI0_LEAKS=1 runs 10,000 inferences and 200 loads."""
    resource = pytest.importorskip("resource")
    del resource
    full = bool(os.environ.get("PI0_LEAKS"))
    inferences, loads = (10_000, 200) if full else (200, 10)

    def memory():
        gc.collect()
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    for _ in range(50):
        policy.infer(observation, steps=1)
    before = memory()
    for _ in range(inferences):
        policy.infer(observation, steps=1)
    after = memory()
    print(f"{inferences} inferences: {before:.1f} to {after:.1f} MB")
    assert after - before < 8
    for _ in range(5):
        pi0.load(tiny, threads=1)
    time.sleep(0.2)
    before = memory()
    for _ in range(loads):
        pi0.load(tiny, threads=1)
    time.sleep(0.2)
    after = memory()
    print(f"{loads} loads: {before:.1f} to {after:.1f} MB")
    assert after - before < 24
