"""lerobot's own PyTorch π0 under `pi0.record`: right as it is, and wrong in the ways that people get it wrong."""

import sys

import numpy as np
import pytest
from test_judge import RUN, read

import pi0

torch = pytest.importorskip("torch", reason="needs PyTorch and lerobot; .ci/python with PI0_LEROBOT=1 has them")
pytest.importorskip("lerobot.policies.pi0", reason="needs lerobot")


@pytest.fixture(scope="module")
def reference():
    """lerobot's module in the sizes of the golden case b, with its weights."""
    from conftest import ROOT

    sys.path.insert(0, str(ROOT / "golden"))
    import json

    import make_golden

    arch = json.loads((ROOT / "golden/b/arch.json").read_text())
    made = make_golden.Ref("lerobot", "/nowhere", arch)
    weights = make_golden.load_checkpoint(ROOT / "golden/b/model.safetensors")
    weights = weights[0] if isinstance(weights, tuple) else weights
    made.load({name.removeprefix("model."): t for name, t in weights.items()})
    return made.model


def sample(model, golden):
    inputs = {name: torch.from_numpy(np.array(t)) for name, t in read(golden / f"{RUN}.inputs.safetensors").items()}
    cameras = range(inputs["image_mask"].shape[1])
    dtype = next(model.action_in_proj.parameters()).dtype
    return model.sample_actions(
        [inputs[f"image_{c}"] for c in cameras],
        [inputs["image_mask"][:, c].bool() for c in cameras],
        inputs["tokens"],
        inputs["token_mask"].bool(),
        inputs["state"].to(dtype),
        noise=inputs["noise"],
    )


def judged(model, golden):
    with pi0.record(model) as recorder:
        sample(model, golden)
    return pi0.judge(golden, recorder)


def test_lerobots_own_is_right(reference, golden):
    verdict = judged(reference, golden)
    assert verdict and len(verdict.taps) > 50, str(verdict)


def test_hooks_leave_nothing_behind(reference, golden):
    before = sample(reference, golden)
    judged(reference, golden)
    assert "denoise_step" not in vars(reference) and "sample_actions" not in vars(reference)
    assert torch.equal(before, sample(reference, golden))


@pytest.fixture
def put(request):
    """Overwrites a weight until the test is over."""

    def put(weight, value):
        old = weight.detach().clone()
        request.addfinalizer(lambda: weight.data.copy_(old))
        weight.data.copy_(value.detach().clone())

    return put


def patched(monkeypatch, owner, name, make):
    monkeypatch.setattr(owner, name, make(getattr(owner, name)))


def test_image_rows_divided(reference, golden, monkeypatch):
    patched(
        monkeypatch,
        reference.paligemma_with_expert,
        "embed_image",
        lambda old: lambda image: old(image) / 96**0.5,
    )
    verdict = judged(reference, golden)
    assert [c.name for c in verdict.causes] == ["image-scale"], str(verdict)


def test_suffix_positions_from_zero(reference, golden, monkeypatch):
    pair = reference.paligemma_with_expert

    def make(old):
        def forward(**kw):
            if kw["inputs_embeds"][0] is None:
                positions = kw["position_ids"]
                kw["position_ids"] = positions - positions[:, :1]
            return old(**kw)

        return forward

    patched(monkeypatch, pair, "forward", make)
    verdict = judged(reference, golden)
    assert [c.name for c in verdict.causes] == ["suffix-positions"], str(verdict)


def test_a_transposed_weight(reference, golden, put):
    layer = reference.paligemma_with_expert.paligemma.model.vision_tower
    layer = getattr(layer, "vision_model", layer).encoder.layers[1].self_attn.out_proj
    put(layer.weight, layer.weight.t())
    verdict = judged(reference, golden)
    assert [c.name for c in verdict.causes] == ["transposed"] and "layers.1" in verdict.causes[0].what, str(verdict)


def test_norms_without_one(reference, golden, put):
    expert = reference.paligemma_with_expert.gemma_expert.model
    for layer in expert.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            put(norm.weight, norm.weight - 1)
    put(expert.norm.weight, expert.norm.weight - 1)
    verdict = judged(reference, golden)
    assert verdict.causes[0].name == "norm-one", str(verdict)


def test_a_right_one_in_bf16_gets_no_hint(reference, golden):
    import copy

    model = copy.deepcopy(reference)
    model.paligemma_with_expert.to_bfloat16_for_selected_params("bfloat16")
    verdict = judged(model, golden)
    assert verdict.format == "bf16" and verdict and not verdict.causes, str(verdict)
