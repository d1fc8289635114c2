"""Every mistake that the judge knows, planted in lerobot's own PyTorch π0 and π0.5, is found and named."""

import functools
import inspect
import types

import numpy as np
import pytest
from test_judge import read

import pi0

torch = pytest.importorskip("torch", reason="needs PyTorch and lerobot; .ci/python with PI0_LEROBOT=1 has them")
pytest.importorskip("lerobot.policies.pi0", reason="needs lerobot")

from conftest import ROOT  # noqa: E402
from sized import reference  # noqa: E402
from torch.nn import functional as F  # noqa: E402

# Runs whose robots lack cameras and have prompts of different lengths.
CASES = {"pi0": ("b", "mixed_masks_b2"), "pi05": ("d", "mixed_masks_b2")}


@pytest.fixture(scope="module")
def models():
    return {kind: reference(case) for kind, (case, _) in CASES.items()}


def sample(model, folder, run):
    inputs = {name: torch.from_numpy(np.array(t)) for name, t in read(folder / f"{run}.inputs.safetensors").items()}
    cameras = range(inputs["image_mask"].shape[1])
    state = [inputs["state"].to(next(model.action_in_proj.parameters()).dtype)] if "state" in inputs else []
    return model.sample_actions(
        [inputs[f"image_{c}"] for c in cameras],
        [inputs["image_mask"][:, c].bool() for c in cameras],
        inputs["tokens"],
        inputs["token_mask"].bool(),
        *state,
        noise=inputs["noise"],
    )


def judged(model, kind, only=None):
    case, run = CASES[kind]
    with pi0.record(model) as recorder:
        sample(model, ROOT / "golden" / case, run)
    if only is not None:
        for name in [n for n in recorder if not n.startswith("inputs.") and n not in only]:
            del recorder[name]
    return pi0.judge(ROOT / "golden" / case, recorder)


class Surgeon:
    """Makes mistakes in a module and takes them back."""

    def __init__(self, model, patch):
        self.model, self.patch = model, patch
        self.pair = model.paligemma_with_expert
        self.language = self.pair.paligemma.model.language_model
        self.expert = self.pair.gemma_expert.model
        vision = self.pair.paligemma.model.vision_tower
        self.vision = getattr(vision, "vision_model", vision)
        self.weights = []

    def put(self, weight, value):
        self.weights.append((weight, weight.detach().clone()))
        weight.data.copy_(value.detach().clone())

    def heal(self):
        for weight, value in reversed(self.weights):
            weight.data.copy_(value)

    def around(self, owner, name, make):
        self.patch.setattr(owner, name, make(getattr(owner, name)))

    def forward(self, change, suffix=None):
        """`change` alters the arguments of the towers' calls: of both, or of one."""

        def make(old):
            def forward(**kw):
                is_suffix = kw["inputs_embeds"][0] is None
                if suffix in (None, is_suffix):
                    change(kw)
                return old(**kw)

            return forward

        self.around(self.pair, "forward", make)

    def layers(self):
        return [*self.language.layers, *self.expert.layers]

    def function(self, module_of, name, new):
        """Another function in the place of one of the module where `module_of` is defined."""
        import sys

        self.patch.setattr(sys.modules[type(module_of).__module__], name, new)


def mask_of(kw):
    kw["attention_mask"] = kw["attention_mask"].clone()
    return kw["attention_mask"]


BLOCKED = torch.finfo(torch.float32).min


def image(factor):
    def plant(s):
        s.around(s.pair, "embed_image", lambda old: lambda x: old(x) * factor(s.language.config.hidden_size))

    return plant


def pixels(change):
    return lambda s: s.around(s.pair, "embed_image", lambda old: lambda x: old(change(x)))


def tokens(factor):
    def plant(s):
        width = s.language.config.hidden_size
        s.around(s.pair, "embed_language_tokens", lambda old: lambda x: old(x) * factor(width))

    return plant


def no_masks(s):
    def make(old):
        def embed(*args, **kw):
            embs, pad, attend = old(*args, **kw)
            return embs, torch.ones_like(pad), attend

        return embed

    s.around(s.model, "embed_prefix", make)


def open_attention(s):
    rows = []

    def change(kw):
        mask = mask_of(kw)
        if kw["inputs_embeds"][1] is None:
            rows[:] = [mask.shape[-1]]
        mask[..., : rows[0]] = 0

    s.forward(change)


def suffix_mask(change):
    def plant(s):
        def alter(kw):
            mask = mask_of(kw)
            change(mask, mask.shape[-1] - mask.shape[-2])

        s.forward(alter, suffix=True)

    return plant


def state_sees(mask, prefix):
    mask[:, :, 0, prefix:] = 0


def blind(mask, prefix):
    mask[:, :, 1:, prefix] = BLOCKED


def causal(first):
    def change(mask, prefix):
        rows = mask.shape[-2]
        above = torch.ones(rows, rows, dtype=torch.bool).triu(1)
        above[:first] = False
        mask[..., prefix:].masked_fill_(above, BLOCKED)

    return change


def prefix_causal(s):
    def change(kw):
        mask = mask_of(kw)
        mask.masked_fill_(torch.ones(mask.shape[-2:], dtype=torch.bool).triu(1), BLOCKED)

    s.forward(change, suffix=False)


def positions(change, suffix=True):
    def plant(s):
        def alter(kw):
            mask = kw["attention_mask"]
            kw["position_ids"] = change(kw["position_ids"], mask.shape[-1] - mask.shape[-2])

        s.forward(alter, suffix=suffix)

    return plant


def norms(change):
    def plant(s):
        for tower in (s.language, s.expert):
            inner = [n for layer in tower.layers for n in (layer.input_layernorm, layer.post_attention_layernorm)]
            for norm in (*inner, tower.norm):
                change(s, norm)

    return plant


def minus_one(s, norm):
    if norm.dense is None:
        s.put(norm.weight, norm.weight - 1)


def gone(of):
    """A norm that hands on what comes in."""

    def plant(s):
        for norm in of(s):
            s.around(norm, "forward", lambda old: lambda x, *a, **k: (x, *old(x, *a, **k)[1:]))

    return plant


def vision_gone(s):
    s.around(s.vision.post_layernorm, "forward", lambda old: lambda x: x)


def rotary(turn):
    def plant(s):
        def apply(q, k, cos, sin, unsqueeze_dim=1):
            half = cos.shape[-1] // 2
            cos, sin = cos[..., :half].unsqueeze(unsqueeze_dim), sin[..., :half].unsqueeze(unsqueeze_dim)
            return turn(q, cos, sin), turn(k, cos, sin)

        s.function(s.language.layers[0].self_attn, "apply_rotary_pos_emb", apply)

    return plant


def neighbours(x, cos, sin):
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)


def backwards(x, cos, sin):
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], -1)


def base(s):
    for tower in (s.language, s.expert):
        frequencies = tower.rotary_emb.inv_freq
        s.put(frequencies, 1e6 ** -(torch.arange(len(frequencies)) / len(frequencies)))


def softmax(s):
    def attend(module, q, k, v, mask, scaling, **_):
        k, v = (x.repeat_interleave(module.num_key_value_groups, 1) for x in (k, v))
        logits = q @ k.transpose(2, 3) * scaling + (0 if mask is None else mask)
        weights = F.softmax(logits.bfloat16(), -1).to(q.dtype)
        return (weights @ v).transpose(1, 2).contiguous(), weights

    s.function(s.language.layers[0].self_attn, "eager_attention_forward", attend)


def scaling(change):
    def plant(s):
        for layer in s.layers():
            s.patch.setattr(layer.self_attn, "scaling", change(layer.self_attn.head_dim))

    return plant


def vision_scaling(s):
    for layer in s.vision.encoder.layers:
        s.patch.setattr(layer.self_attn, "scale", 1 / layer.self_attn.head_dim)


def activation(act):
    def plant(s):
        for layer in s.layers():
            s.around(layer.mlp.act_fn, "forward", lambda old: act)

    return plant


def vision_activation(act):
    def plant(s):
        for layer in s.vision.encoder.layers:
            s.around(layer.mlp.activation_fn, "forward", lambda old: act)

    return plant


def vision_position(s):
    weight = s.vision.embeddings.position_embedding.weight
    s.put(weight, torch.zeros_like(weight))


def exchange(of):
    def plant(s):
        for layer in s.layers():
            a, b = of(layer)
            old = a.weight.detach().clone()
            s.put(a.weight, b.weight)
            s.put(b.weight, old)

    return plant


def residual(which):
    """Of the two residuals of a layer one is not added."""

    def plant(s):
        calls = iter(range(10**9))

        def make(old):
            return lambda x, y, gate: old(0 * x if next(calls) % 2 == which else x, y, gate)

        s.function(s.language.layers[0], "_gated_residual", make(gated_residual(s)))

    return plant


def gated_residual(s):
    import sys

    return sys.modules[type(s.language.layers[0]).__module__]._gated_residual


def gates(change):
    def plant(s):
        old = gated_residual(s)
        new = lambda x, y, gate: old(x, y, None if gate is None else change(gate))  # noqa: E731
        s.function(s.language.layers[0], "_gated_residual", new)

    return plant


def modulation(change):
    """Adaptive norms that take scale and shift for what `change` gives; the gate stays."""

    def plant(s):
        def make(norm):
            def forward(x, cond=None):
                scale, shift, gate = norm.dense(cond).unsqueeze(1).chunk(3, -1)
                used, added = change(scale, shift, gate)
                return norm._norm(x) * (1 + used) + added, gate

            return lambda old: forward

        for layer in s.expert.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                s.around(norm, "forward", make(norm))
        s.around(s.expert.norm, "forward", make(s.expert.norm))

    return plant


def read_across(weight):
    """Rows read as columns."""
    return weight.reshape(weight.shape[::-1]).t()


def across(of):
    def plant(s):
        for linear in of(s):
            s.put(linear.weight, read_across(linear.weight))

    return plant


def no_bias(of):
    def plant(s):
        for linear in of(s):
            s.put(linear.bias, torch.zeros_like(linear.bias))

    return plant


def other_order(s):
    a, b = s.model.action_time_mlp_in.weight.chunk(2, 1)
    s.put(s.model.action_time_mlp_in.weight, torch.cat([b, a], 1))


def silu(act):
    def plant(s):
        s.function(s.model, "F", types.SimpleNamespace(silu=act))

    return plant


def suffix_input(name, change):
    """Another value of an argument of `embed_suffix`."""

    def plant(s):
        names = inspect.signature(s.model.embed_suffix)

        def make(old):
            @functools.wraps(old)
            def embed(*args, **kw):
                given = names.bind(*args, **kw).arguments
                given[name] = change(given[name])
                return old(**given)

            return embed

        s.around(s.model, "embed_suffix", make)

    return plant


def euler(factor, clock=lambda time: time):
    def plant(s):
        def integrate(velocity, x, steps, **_):
            for step in range(steps):
                time = torch.full((len(x),), clock(1 - step / steps))
                x = x - factor / steps * velocity(x, time)
            return x

        s.function(s.model, "euler_integrate", integrate)

    return plant


def tanh_gelu(x):
    return F.gelu(x, approximate="tanh")


BOTH = [
    ("image-scale", "divided", image(lambda width: width**-0.5)),
    ("image-scale", "multiplied", image(lambda width: width**0.5)),
    ("token-scale", "not multiplied", tokens(lambda width: width**-0.5)),
    ("token-scale", "twice", tokens(lambda width: width**0.5)),
    ("image-range", "0..1", pixels(lambda x: x / 2 + 0.5)),
    ("image-range", "twice", pixels(lambda x: 2 * x - 1)),
    ("image-channels", "blue", pixels(lambda x: x.flip(1))),
    ("masks-dropped", "counted in the positions", no_masks),
    ("masks-dropped", "the positions are right", open_attention),
    ("prefix-causal", "", prefix_causal),
    ("suffix-positions", "count from 0", positions(lambda p, _: p - p[:, :1])),
    ("suffix-positions", "padded prefix", positions(lambda p, prefix: p - p[:, :1] + prefix)),
    ("suffix-positions", "one too high", positions(lambda p, _: p + 1)),
    ("suffix-positions", "one too low", positions(lambda p, _: p - 1)),
    ("positions", "from 1", positions(lambda p, _: p + 1, suffix=None)),
    ("norm-one", "", norms(minus_one)),
    ("norm-missing", "before attention of the l", gone(lambda s: [n.input_layernorm for n in s.language.layers])),
    ("norm-missing", "before the MLP of the l", gone(lambda s: [n.post_attention_layernorm for n in s.language.layers])),
    ("norm-missing", "before the MLP of the a", gone(lambda s: [n.post_attention_layernorm for n in s.expert.layers])),
    ("norm-missing", "expert's final", gone(lambda s: [s.expert.norm])),
    ("vision-post-norm", "", vision_gone),
    ("rotary", "neighbours", rotary(neighbours)),
    ("rotary", "backwards", rotary(backwards)),
    ("rotary", "not rotated", rotary(lambda x, cos, sin: x)),
    ("rotary", "base", base),
    ("softmax-bf16", "", softmax),
    ("attention-scale", "1 / head_dim", scaling(lambda dim: 1 / dim)),
    ("attention-scale", "not scaled", scaling(lambda dim: 1.0)),
    ("vision-scale", "1 / head_dim", vision_scaling),
    ("gelu", "exact", activation(F.gelu)),
    ("gelu", "SiLU", activation(F.silu)),
    ("vision-gelu", "exact", vision_activation(F.gelu)),
    ("vision-gelu", "SiLU", vision_activation(F.silu)),
    ("vision-position", "", vision_position),
    ("gate-up", "", exchange(lambda layer: (layer.mlp.gate_proj, layer.mlp.up_proj))),
    ("key-value", "", exchange(lambda layer: (layer.self_attn.k_proj, layer.self_attn.v_proj))),
    ("residual", "attention", residual(0)),
    ("residual", "MLP", residual(1)),
    ("transposed", "layers.1.self_attn.out_proj", across(lambda s: [s.vision.encoder.layers[1].self_attn.out_proj])),
    ("transposed", "in every layer", across(lambda s: [n.self_attn.o_proj for n in s.language.layers])),
    ("transposed", "layers.1.mlp.down_proj", across(lambda s: [s.expert.layers[1].mlp.down_proj])),
    ("transposed", "action_in_proj", across(lambda s: [s.model.action_in_proj])),
    ("transposed", "action_out_proj", across(lambda s: [s.model.action_out_proj])),
    ("no-bias", "in any layer", no_bias(lambda s: [n.mlp.fc1 for n in s.vision.encoder.layers])),
    ("no-bias", "action_out_proj", no_bias(lambda s: [s.model.action_out_proj])),
    ("time", "from 0 to 1", suffix_input("timestep", lambda t: 1 - t)),
    ("time", "from 0 to 1", euler(1, lambda time: 1 - time)),
    ("time", "at its end", euler(1, lambda time: time - 0.1)),
    ("euler", "", euler(-1)),
]
PI0 = [
    ("state-sees-actions", "", suffix_mask(state_sees)),
    ("actions-blind", "", suffix_mask(blind)),
    ("suffix-causal", "", suffix_mask(causal(1))),
    ("no-state", "", suffix_input("state", torch.zeros_like)),
    ("action-time-order", "", other_order),
    ("suffix-silu", "GELU", silu(tanh_gelu)),
    ("suffix-silu", "no SiLU", silu(lambda x: x)),
    ("transposed", "state_proj", across(lambda s: [s.model.state_proj])),
    ("no-bias", "action_time_mlp_out", no_bias(lambda s: [s.model.action_time_mlp_out])),
]
PI05 = [
    ("time-silu", "GELU", silu(tanh_gelu)),
    ("time-silu", "no SiLU", silu(lambda x: x)),
    ("adaptive-norm", "1 + scale", modulation(lambda scale, shift, gate: (scale - 1, shift))),
    ("adaptive-norm", "leave out the shift", modulation(lambda scale, shift, gate: (scale, 0 * shift))),
    ("adaptive-norm", "gate for the shift", modulation(lambda scale, shift, gate: (scale, gate))),
    ("adaptive-norm", "shift for the scale", modulation(lambda scale, shift, gate: (shift, scale))),
    ("gate", "no gate", gates(torch.ones_like)),
    ("gate", "1 + gate", gates(lambda gate: 1 + gate)),
    ("transposed", "time_mlp_out", across(lambda s: [s.model.time_mlp_out])),
]
ALL = [("pi0", *p) for p in BOTH + PI0] + [("pi05", *p) for p in BOTH + PI05]


@pytest.mark.parametrize("kind", CASES)
def test_as_lerobot_has_it_nothing_is_found(models, kind):
    verdict = judged(models[kind], kind)
    assert verdict and not verdict.causes and len(verdict.taps) > 50, str(verdict)


@pytest.mark.parametrize("kind, name, words, plant", ALL, ids=["-".join(p[:3]).replace(" ", "_") for p in ALL])
def test_a_mistake_is_named(models, monkeypatch, kind, name, words, plant):
    surgeon = Surgeon(models[kind], monkeypatch)
    try:
        plant(surgeon)
        verdict = judged(models[kind], kind)
    finally:
        surgeon.heal()
    assert not verdict, "the mistake does not show"
    assert [c.name for c in verdict.causes] == [name], str(verdict)
    cause = verdict.causes[0]
    assert any(words in what for what in (cause.what, *cause.alternatives)), str(verdict)
    assert verdict.unexplained is None, str(verdict)


# What tt-metal's π0 leaves out.
GAPS = {
    "masks-dropped": no_masks,
    "suffix-positions": positions(lambda p, _: p - p[:, :1]),
    "state-sees-actions": suffix_mask(state_sees),
}
TOGETHER = [
    ("suffix-positions", "state-sees-actions"),
    ("masks-dropped", "suffix-positions"),
    ("masks-dropped", "state-sees-actions"),
    tuple(GAPS),
]


@pytest.mark.parametrize("names", TOGETHER, ids="+".join)
def test_gaps_of_a_bring_up_are_named_together(models, monkeypatch, names):
    surgeon = Surgeon(models["pi0"], monkeypatch)
    for name in names:
        GAPS[name](surgeon)
    verdict = judged(models["pi0"], "pi0")
    assert not verdict and sorted(c.name for c in verdict.causes) == sorted(names), str(verdict)
    assert verdict.unexplained is None, str(verdict)


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("only", [None, ("prefix.embs", "actions")], ids=["all", "two"])
def test_bf16_gets_no_hint(models, kind, only):
    import copy

    model = copy.deepcopy(models[kind])
    model.paligemma_with_expert.to_bfloat16_for_selected_params("bfloat16")
    verdict = judged(model, kind, only)
    assert verdict.format == "bf16" and verdict and not verdict.causes, str(verdict)
