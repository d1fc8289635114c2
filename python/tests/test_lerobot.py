"""The lerobot plugin against lerobot's own policy."""

import numpy as np
import pytest
from test_torch import reference, sample  # noqa: F401

torch = pytest.importorskip("torch", reason="needs PyTorch and lerobot; .ci/python with PI0_LEROBOT=1 has them")
plugin = pytest.importorskip("lerobot_policy_pi0", reason="needs python/lerobot and lerobot")


@pytest.fixture(scope="module")
def policies(reference, tmp_path_factory):  # noqa: F811
    """lerobot's policy and ours over the checkpoint of golden case b, with one configuration."""
    from conftest import ROOT
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.policies.factory import get_policy_class
    from lerobot.policies.pi0.modeling_pi0 import PI0Policy

    features = {f"observation.images.{c}": PolicyFeature(FeatureType.VISUAL, (3, 56, 56)) for c in ("a", "b", "c")}
    features["observation.state"] = PolicyFeature(FeatureType.STATE, (14,))
    config = plugin.Pi0NativeConfig(
        input_features=features,
        output_features={"action": PolicyFeature(FeatureType.ACTION, (14,))},
        image_resolution=(56, 56),
        n_action_steps=5,
        device="cpu",
        native_dtype="f32",
    )
    native = get_policy_class("pi0_native").from_pretrained(ROOT / "golden/b", config=config)
    own = PI0Policy.__new__(PI0Policy)
    torch.nn.Module.__init__(own)
    own.config, own.model, own.rtc_processor = config, reference, None
    reference.config.chunk_size = config.chunk_size
    reference.config.rtc_config = None
    own.reset()
    return own, native


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    image = lambda: torch.from_numpy(rng.random((2, 3, 40, 70), dtype=np.float32))  # noqa: E731
    mask = torch.ones(2, 48, dtype=torch.bool)
    mask[1, 9:] = False
    return {
        "observation.images.a": image(),
        "observation.images.c": image(),
        "observation.state": torch.from_numpy(rng.normal(size=(2, 14)).astype(np.float32)),
        "observation.language.tokens": torch.from_numpy(rng.integers(0, 320, (2, 48))),
        "observation.language.attention_mask": mask,
    }


def test_the_same_seed_gives_lerobots_actions(policies, batch):
    chunks = []
    for policy in policies:
        torch.manual_seed(7)
        chunks.append(policy.predict_action_chunk(batch))
    assert chunks[0].shape == (2, 50, 14)
    assert (chunks[0] - chunks[1]).abs().max() < 1e-5 * max(1.0, chunks[0].abs().max())


def test_actions_are_queued_as_lerobots(policies, batch):
    actions = []
    for policy in policies:
        torch.manual_seed(3)
        policy.reset()
        actions.append(torch.stack([policy.select_action(batch) for _ in range(7)]))
    assert actions[0].shape == (7, 2, 14) and not torch.equal(actions[1][4], actions[1][5])
    assert (actions[0] - actions[1]).abs().max() < 1e-5 * max(1.0, actions[0].abs().max())


def test_real_time_chunking(policies, batch):
    from lerobot.policies.rtc.configuration_rtc import RTCConfig

    own, native = policies
    previous = torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(1))
    own.config.rtc_config = own.model.config.rtc_config = RTCConfig(execution_horizon=10)
    try:
        chunks = []
        for policy in policies:
            policy.init_rtc_processor()
            torch.manual_seed(7)
            chunks.append(
                policy.predict_action_chunk(
                    batch, inference_delay=3, prev_chunk_left_over=previous, execution_horizon=10
                )
            )
    finally:
        own.config.rtc_config = own.model.config.rtc_config = None
        for policy in policies:
            policy.rtc_processor = policy.model.rtc_processor = None
    torch.manual_seed(7)
    assert (chunks[1] - native.predict_action_chunk(batch)).abs().max() > 1e-2
    assert (chunks[0] - chunks[1]).abs().max() < 1e-4 * max(1.0, chunks[0].abs().max())


def test_a_config_of_lerobots_becomes_ours():
    from conftest import ROOT
    from lerobot_policy_pi0.modeling_pi0_native import Pi0NativePolicy

    config = Pi0NativePolicy.config_of(ROOT / "models/tiny")
    assert config.type == "pi0_native" and config.chunk_size == 16
    policy = Pi0NativePolicy.from_pretrained(ROOT / "models/tiny")
    assert policy.supports_rtc() and policy.model.has_state
    with pytest.raises(NotImplementedError, match="train"):
        policy.model()
