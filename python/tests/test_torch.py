"""`pi0.record` on the PyTorch modules of lerobot, openpi and Transformers."""

import json
import os

import numpy as np
import pytest
from test_judge import read

import pi0

torch = pytest.importorskip("torch", reason="needs PyTorch; .ci/python with PI0_LEROBOT=1 has it")

from conftest import ROOT  # noqa: E402

RUN = "mixed_masks_b2"


@pytest.fixture(scope="module", params=["b", "d"])
def lerobot(request):
    """Case and module."""
    pytest.importorskip("lerobot.policies.pi0", reason="needs lerobot")
    from sized import reference

    return request.param, reference(request.param)


def sample(case, model):
    from test_planted import sample

    return sample(model, ROOT / "golden" / case, RUN)


def test_hooks_leave_nothing_behind(lerobot):
    case, model = lerobot
    before = sample(case, model)
    with pi0.record(model) as recorder:
        assert torch.equal(before, sample(case, model))
    assert len(recorder) > 100 and torch.equal(before, sample(case, model))
    assert not {"denoise_step", "sample_actions", "embed_prefix"} & vars(model).keys()
    assert not any(module._forward_hooks for module in model.modules())


def test_the_last_of_several_inferences_stays(lerobot):
    case, model = lerobot
    with pi0.record(model, source="twice") as recorder:
        first = sample(case, model)
        names = set(recorder)
        sample(case, model)
    assert set(recorder) == names and recorder.source == "twice"
    np.testing.assert_array_equal(recorder["actions"], first)


def test_compiled_modules_are_heard(lerobot, monkeypatch):
    case, model = lerobot
    monkeypatch.setattr(model, "sample_actions", torch.compile(model.sample_actions))
    with pi0.record(model) as recorder:
        sample(case, model)
    assert pi0.judge(ROOT / "golden" / case, recorder)


@pytest.mark.parametrize("case", ["b", "d"])
def test_openpis_own_is_right(case):
    """PI0_OPENPI is a checkout of openpi; its patched Transformers must be there."""
    checkout = os.environ.get("PI0_OPENPI")
    if not checkout:
        pytest.skip("needs openpi; PI0_OPENPI=CHECKOUT names it")
    import sys

    sys.path.insert(0, str(ROOT / "golden"))
    import make_golden

    folder = ROOT / "golden" / case
    ref = make_golden.Ref("openpi", checkout, json.loads((folder / "arch.json").read_text()))
    # openpi adds the times up in f32, lerobot, whose the case is, does not.
    ref.exact_time = True
    ref.load(make_golden.load_checkpoint(folder / "model.safetensors"))
    inputs = {n: torch.from_numpy(np.array(t)) for n, t in read(folder / f"{RUN}.inputs.safetensors").items()}
    with pi0.record(ref.model) as recorder:
        ref.sample(inputs)
    verdict = pi0.judge(folder, recorder)
    assert len(verdict.taps) > 100 and verdict.first is None and not verdict.causes, str(verdict)


def test_transformers_own_is_right(tmp_path):
    transformers = pytest.importorskip("transformers.models.pi0", reason="needs Transformers 5.4 or later")
    tower = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16}
    text = {**tower, "num_key_value_heads": 1, "vocab_size": 200, "model_type": "gemma"}
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "patch_size": 14,
        "image_size": 28,
        "vision_use_head": False,
    }
    config = transformers.PI0Config(
        vlm_config={
            "model_type": "paligemma",
            "text_config": text,
            "vision_config": vision,
            "projection_dim": 64,
            "image_token_id": 200,
        },
        dit_config={**text, "hidden_size": 40},
        chunk_size=6,
        num_inference_steps=3,
    )
    torch.manual_seed(0)
    model = transformers.PI0ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    sizes = ("width", "mlp_dim", "depth", "num_heads", "num_kv_heads", "head_dim")
    arch = {
        "vision": {k: v for k, v in vision.items() if k not in ("model_type", "vision_use_head")},
        "gemma": dict(zip(sizes, (64, 96, 2, 4, 1, 16), strict=True)),
        "expert": dict(zip(sizes, (40, 96, 2, 4, 1, 16), strict=True)),
        "vocab_size": 200,
        "action_dim": 32,
        "state_dim": 32,
        "horizon": 6,
        "max_tokens": 8,
        "num_steps": 3,
    }
    (tmp_path / "arch.json").write_text(json.dumps(arch))
    (tmp_path / "config.json").write_text(json.dumps({"type": "pi0", "chunk_size": 6, "num_inference_steps": 3}))
    patches = torch.full((2, 2 * 4), 200)
    given = {
        "state": torch.randn(2, 32),
        "input_ids": torch.cat([patches, torch.randint(1, 200, (2, 5))], 1),
        "pixel_values": torch.rand(2, 2, 3, 28, 28) * 2 - 1,
        "pixel_attention_mask": torch.ones(2, 2, dtype=torch.bool),
        "attention_mask": torch.ones(2, 13, dtype=torch.long),
        "noise": torch.randn(2, 6, 32),
    }
    given["attention_mask"][1, 11:] = 0
    with pi0.record(model) as recorder:
        model.sample_actions(**given)
    verdict = pi0.judge(tmp_path, recorder)
    assert verdict and len(verdict.taps) > 30, str(verdict)
