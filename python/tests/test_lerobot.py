"""The lerobot plugin against lerobot's own policies."""

import json
import types

import numpy as np
import pytest
from test_judge import read

torch = pytest.importorskip("torch", reason="needs PyTorch and lerobot; .ci/python with PI0_LEROBOT=1 has them")
plugin = pytest.importorskip("lerobot_policy_pi0", reason="needs python/lerobot and lerobot")

from conftest import ROOT  # noqa: E402
from sized import sizes  # noqa: E402

CASES = {"pi0": "b", "pi05": "d"}
IMAGES = [f"observation.images.{name}_rgb" for name in ("base_0", "left_wrist_0", "right_wrist_0")]


@pytest.fixture(scope="module", params=CASES)
def policies(request):
    """lerobot's policy and ours over the checkpoint of a golden case, with one configuration."""
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.policies.factory import get_policy_class, make_policy_config

    kind = request.param
    folder = ROOT / "golden" / CASES[kind]
    arch = json.loads((folder / "arch.json").read_text())
    side = arch["vision"]["image_size"]
    images = {name: PolicyFeature(FeatureType.VISUAL, (3, side, side)) for name in IMAGES}
    options = {
        "input_features": {**images, "observation.state": PolicyFeature(FeatureType.STATE, (14,))},
        "output_features": {"action": PolicyFeature(FeatureType.ACTION, (14,))},
        "image_resolution": (side, side),
        "chunk_size": arch["horizon"],
        "n_action_steps": 5,
        "device": "cpu",
        "dtype": "float32",
    }
    native = get_policy_class(f"{kind}_native").from_pretrained(
        folder, config=make_policy_config(f"{kind}_native", native_dtype="f32", **options)
    )
    with sizes(arch):
        own = get_policy_class(kind).from_pretrained(folder, config=make_policy_config(kind, **options))
    own.eval()
    return own, native


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    image = lambda: torch.from_numpy(rng.random((2, 3, 40, 70), dtype=np.float32))  # noqa: E731
    mask = torch.ones(2, 48, dtype=torch.bool)
    mask[1, 9:] = False
    return {
        IMAGES[0]: image(),
        IMAGES[2]: image(),
        "observation.state": torch.from_numpy(rng.normal(size=(2, 14)).astype(np.float32)),
        "observation.language.tokens": torch.from_numpy(rng.integers(0, 320, (2, 48))),
        "observation.language.attention_mask": mask,
    }


def close(a, b, tolerance=1e-5):
    return a.shape == b.shape and (a - b).abs().max() < tolerance * max(1.0, a.abs().max())


def test_the_same_seed_gives_lerobots_actions(policies, batch):
    chunks = []
    for policy in policies:
        torch.manual_seed(7)
        chunks.append(policy.predict_action_chunk(batch))
    assert chunks[0].shape == (2, policies[0].config.chunk_size, 14) and close(*chunks)


def test_actions_are_queued_as_lerobots(policies, batch):
    actions = []
    for policy in policies:
        torch.manual_seed(3)
        policy.reset()
        actions.append(torch.stack([policy.select_action(batch) for _ in range(7)]))
    assert actions[0].shape == (7, 2, 14) and not torch.equal(actions[1][4], actions[1][5])
    assert close(*actions)


def test_guided_real_time_chunking(policies, batch):
    from lerobot.policies.rtc.configuration_rtc import RTCConfig

    previous = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1))
    given = {"inference_delay": 3, "prev_chunk_left_over": previous, "execution_horizon": 8}
    chunks = []
    for policy in policies:
        policy.config.rtc_config = RTCConfig(execution_horizon=8)
        try:
            policy.init_rtc_processor()
            torch.manual_seed(7)
            chunks.append(policy.predict_action_chunk(batch, **given))
        finally:
            policy.config.rtc_config = policy.rtc_processor = policy.model.rtc_processor = None
    torch.manual_seed(7)
    assert (chunks[1] - policies[1].predict_action_chunk(batch)).abs().max() > 1e-2
    assert close(*chunks, 1e-4)


def test_trained_real_time_chunking(policies):
    """As lerobot 0.6.2 and later have it; its result is in the golden case."""
    _, native = policies
    if native.name != "pi05_native":
        pytest.skip("π0 has none")
    folder = ROOT / "golden" / CASES["pi05"]
    inputs = {n: torch.from_numpy(np.array(t)) for n, t in read(folder / "rtc_trained_b1.inputs.safetensors").items()}
    want = torch.from_numpy(np.array(read(folder / "rtc_trained_b1.outputs.safetensors")["actions"]))
    native.config.rtc_config = types.SimpleNamespace(enabled=True, mode="trained", execution_horizon=10)
    try:
        got = native.model.sample_actions(
            [inputs[f"image_{c}"] for c in range(3)],
            [inputs["image_mask"][:, c].bool() for c in range(3)],
            inputs["tokens"],
            inputs["token_mask"].bool(),
            noise=inputs["noise"],
            inference_delay=3,
            prev_chunk_left_over=inputs["prev_chunk"],
        )
    finally:
        native.config.rtc_config = None
    assert close(want, got)


@pytest.mark.parametrize("kind, folder, chunk", [("pi0", "tiny", 16), ("pi05", "demo-pi05", 8)])
def test_a_config_of_lerobots_becomes_ours(kind, folder, chunk):
    from lerobot.policies.factory import get_policy_class
    from lerobot_policy_pi0._native import config_of

    policy_class = get_policy_class(f"{kind}_native")
    config = config_of(ROOT / "models" / folder, policy_class.config_class)
    assert config.type == f"{kind}_native" and config.chunk_size == chunk
    policy = policy_class.from_pretrained(ROOT / "models" / folder)
    assert policy.supports_rtc() and policy.model.has_state == (kind == "pi0")
    with pytest.raises(NotImplementedError, match="train"):
        policy.model()


def test_the_other_kind_of_checkpoint_is_refused():
    from lerobot.policies.factory import get_policy_class
    from lerobot_policy_pi0._native import config_of

    with pytest.raises(ValueError, match="checkpoint of pi05"):
        config = config_of(ROOT / "models" / "tiny", plugin.Pi0NativeConfig)
        get_policy_class("pi0_native").from_pretrained(ROOT / "models" / "demo-pi05", config=config)
