"""The tiny π0 and π0.5: their sizes, their vocabularies, and openpi's own class built with them.

openpi is imported from a checkout that you name; nothing of it is copied here.
"""

import contextlib
import math
import pathlib
import sys
import types

CAMERAS = ("base_0_rgb", "left_wrist_0_rgb")
WORDS = (
    "<pad> <eos> <bos> <unk> \n touch put the in bowl red green blue yellow purple block disc cross wedge"
).split(" ")
# π0.5 also reads its state: the frame of its prompt, and one word for each bin (-1 is below the first).
BINS = 256
WORDS_PI05 = WORDS + "task : , state ; action".split(" ") + [str(i) for i in range(-1, BINS)]


def gemma(width, mlp_dim, depth):
    """openpi's training forward reshapes to 8 heads whatever the configuration says."""
    return {"width": width, "mlp_dim": mlp_dim, "depth": depth, "num_heads": 8, "num_kv_heads": 1, "head_dim": 32}


ARCH = {
    "vision": {
        "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
        "image_size": 56, "patch_size": 14,
    },
    "gemma": gemma(128, 384, 3),
    "expert": gemma(96, 256, 3),
    "vocab_size": len(WORDS),
    "action_dim": 4,
    "state_dim": 4,
    "horizon": 8,
    "max_tokens": 12,
    "num_steps": 10,
}  # fmt: skip
ARCHS = {"pi0": ARCH, "pi05": ARCH | {"vocab_size": len(WORDS_PI05), "max_tokens": 32}}


def words(kind):
    return {"pi0": WORDS, "pi05": WORDS_PI05}[kind]


def tokenizer_json(kind="pi0"):
    """A word-level vocabulary in Hugging Face's format: words, newlines and punctuation, spaces dropped; for π0.5 a
    negative number is a word too."""
    special = [
        {"id": i, "content": w, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        for i, w in enumerate(WORDS[:4])
    ]
    pattern = {"Regex": {"pi0": r"\w+|\n|[^\w\s]", "pi05": r"-?\d+|\w+|\n|[^\w\s]"}[kind]}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special,
        "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": {"type": "Split", "pattern": pattern, "behavior": "Removed", "invert": True},
        "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": {w: i for i, w in enumerate(words(kind))}, "unk_token": "<unk>"},
    }  # fmt: skip


def tokenize(instruction, kind="pi0"):
    """BOS, the words, a newline: π0's prompt. π0.5's is `Task: {instruction}, State: {bins};\\nAction: `, where the bin of
    dimension d is -1 - d, to be replaced by `with_state`."""
    known = {w: i for i, w in enumerate(words(kind))}
    ids = [known.get(w, known["<unk>"]) for w in instruction.lower().split()]
    if kind == "pi0":
        return [known["<bos>"], *ids, known["\n"]]
    holes = [-1 - d for d in range(ARCH["state_dim"])]
    before, between, after = ([known[w] for w in part] for part in (("<bos>", "task", ":"), (",", "state", ":"), (";", "\n", "action", ":")))
    return [*before, *ids, *between, *holes, *after]


def with_state(tokens, state):
    """Puts the bins of a normalized state [B, D] into prompts [B, L] of `tokenize`."""
    import torch

    edges = torch.linspace(-1, 1, BINS + 1)[:-1]
    ids = torch.bucketize(state.contiguous(), edges, right=True) - 1 + WORDS_PI05.index("0")
    tokens = tokens.clone()
    for d in range(state.shape[1]):
        tokens[tokens == -1 - d] = ids[:, d]
    return tokens


@contextlib.contextmanager
def replaced(obj, **values):
    saved = {k: getattr(obj, k) for k in values}
    for k, v in values.items():
        setattr(obj, k, v)
    try:
        yield
    finally:
        for k, v in saved.items():
            setattr(obj, k, v)


def build(openpi, kind="pi0"):
    """openpi's PI0Pytorch with these sizes: the class reads variants by name and fixes the rest, so both are put in
    its way while it constructs."""
    arch = ARCHS[kind]
    sys.path.insert(0, str(pathlib.Path(openpi) / "src"))
    import openpi.models.gemma as variants
    import openpi.models_pytorch.gemma_pytorch as towers
    import openpi.models_pytorch.pi0_pytorch as pi0

    named = {"gemma_2b": types.SimpleNamespace(**arch["gemma"]), "gemma_300m": types.SimpleNamespace(**arch["expert"])}
    vlm, expert = towers.PaliGemmaForConditionalGeneration, towers.GemmaForCausalLM

    def make_vlm(config):
        for k, v in arch["vision"].items():
            setattr(config.vision_config, k, v)
        config.vision_config.projection_dim = config.projection_dim = config.hidden_size = arch["gemma"]["width"]
        config.text_config.vocab_size = arch["vocab_size"]
        return vlm(config=config)

    def make_expert(config):
        config.vocab_size = arch["vocab_size"]
        return expert(config=config)

    config = types.SimpleNamespace(
        paligemma_variant="gemma_2b", action_expert_variant="gemma_300m", dtype="float32", pi05=kind == "pi05",
        action_dim=arch["action_dim"], action_horizon=arch["horizon"], pytorch_compile_mode=None,
    )  # fmt: skip
    with (
        replaced(variants, get_config=named.__getitem__),
        replaced(towers, PaliGemmaForConditionalGeneration=make_vlm, GemmaForCausalLM=make_expert),
    ):
        model = pi0.PI0Pytorch(config)
    # The observation comes ready: resizing, augmentation and key names are this program's business.
    model._preprocess_observation = lambda observation, train=True: observation
    model.paligemma_with_expert.paligemma.model.language_model.config._attn_implementation = "eager"
    model.paligemma_with_expert.gemma_expert.model.config._attn_implementation = "eager"
    return model


def initialize(model):
    """Unit-scale activations. The references' own initial values suit widths in the thousands."""
    import torch

    for name, p in model.named_parameters():
        leaf = name.rsplit(".", 2)[-2]
        with torch.no_grad():
            if leaf == "dense":  # of an adaptive norm: no scale, no shift, a gate of one
                p.zero_()
                if name.endswith("bias"):
                    p[-p.shape[0] // 3 :] = 1.0
            elif "norm" in leaf:
                vision = "vision_tower" in name
                p.fill_(1.0 if vision and name.endswith("weight") else 0.0)
            elif name.endswith("bias"):
                p.zero_()
            elif leaf == "position_embedding":
                p.normal_(std=0.3)
            elif leaf in ("embed_tokens", "lm_head"):
                p.normal_(std=p.shape[1] ** -0.5)
            else:
                gain = {"o_proj": 0.5, "out_proj": 0.5, "fc2": 0.5, "down_proj": 0.5, "action_out_proj": 0.1}.get(leaf, 1.0)
                p.normal_(std=gain / math.sqrt(math.prod(p.shape[1:])))


def inherit(model, checkpoint):
    """Begins a π0.5 with what a trained π0 knows: all that both have, the words at their places in the larger
    vocabulary, and the scales of the expert's norms as the biases of the adaptive ones. Bins begin like their neighbours:
    sines of several lengths. Returns the names of the parameters that were inherited whole."""
    import torch
    from safetensors.torch import load_file

    saved = {k.removeprefix("model."): v.float() for k, v in load_file(checkpoint / "model.safetensors").items()}
    inherited = []
    with torch.no_grad():
        for name, p in model.named_parameters():
            old = saved.get(name)
            norm = saved.get(name.replace(".dense.bias", ".weight"))
            if name.endswith((".embed_tokens.weight", ".lm_head.weight")) and "gemma_expert" not in name:
                old = saved["paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"]
                first, width = WORDS_PI05.index("-1"), p.shape[1]
                p[: len(old)] = old
                at = torch.arange(len(p) - first)[:, None] / BINS
                waves = math.pi * 2 ** torch.linspace(-1, 6, width // 2)[None]
                p[first:] = torch.cat([torch.sin(at * waves), torch.cos(at * waves)], 1) * (2 / width) ** 0.5
            elif name.endswith(".dense.bias") and norm is not None:
                p[: len(norm)] = norm
            elif old is not None and old.shape == p.shape and not name.startswith("action_in_proj"):
                p.copy_(old)
                inherited.append(name)
    return inherited
