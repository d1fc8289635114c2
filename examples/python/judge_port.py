"""Judging a port of π0 as one judges a TTNN or JAX implementation: a recorder is filled by hand, then `pi0.judge` says what
is wrong. The port here is plain numpy, for the golden case b, and has two mistakes planted in it:

    python examples/python/judge_port.py            # finds both
    python examples/python/judge_port.py --right    # finds nothing
"""

import argparse
import json
import pathlib

import numpy as np

import pi0

ROOT = pathlib.Path(__file__).resolve().parents[2]
P = "paligemma_with_expert."
LANGUAGE, EXPERT = P + "paligemma.model.language_model.", P + "gemma_expert.model."
VISION = P + "paligemma.model.vision_tower.vision_model."


def read(path):
    """The tensors of a safetensors file, without the prefix that lerobot writes."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__", None)
    types = {"F32": np.float32, "I64": np.int64, "U8": np.uint8}

    def tensor(entry):
        start, end = (8 + size + at for at in entry["data_offsets"])
        return np.frombuffer(data[start:end], types[entry["dtype"]]).reshape(entry["shape"])

    return {name.removeprefix("model."): tensor(entry) for name, entry in header.items()}


class Port:
    """One robot's π0. What a port would do on its device, numpy does here."""

    def __init__(self, folder, mistakes=()):
        self.w = read(folder / "model.safetensors")
        self.arch = json.loads((folder / "arch.json").read_text())
        self.mistakes = mistakes

    def linear(self, x, name):
        y = x @ self.w[name + ".weight"].T
        return y + self.w[name + ".bias"] if name + ".bias" in self.w else y

    def layer_norm(self, x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * self.w[name + ".weight"] + self.w[name + ".bias"]

    def rms_norm(self, x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * (1 + self.w[name + ".weight"])

    @staticmethod
    def gelu(x):
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    @staticmethod
    def heads(x, dim):
        return x.reshape(len(x), -1, dim).swapaxes(0, 1)

    @staticmethod
    def attention(q, k, v, mask=None):
        logits = q @ k.swapaxes(1, 2) * q.shape[-1] ** -0.5
        if mask is not None:
            logits = np.where(mask, logits, -np.inf)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        out = weights / weights.sum(-1, keepdims=True) @ v
        return out.swapaxes(0, 1).reshape(q.shape[1], -1)

    @staticmethod
    def rotate(x, positions):
        half = x.shape[-1] // 2
        angle = positions[:, None] / 10000.0 ** (np.arange(half) / half)
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)

    def vision(self, image):
        v = self.arch["vision"]
        p, side, dim = v["patch_size"], v["image_size"] // v["patch_size"], v["hidden_size"] // v["num_attention_heads"]
        patches = image.reshape(3, side, p, side, p).transpose(1, 3, 0, 2, 4).reshape(side * side, -1)
        kernel = self.w[VISION + "embeddings.patch_embedding.weight"]
        x = patches @ kernel.reshape(len(kernel), -1).T + self.w[VISION + "embeddings.patch_embedding.bias"]
        x = x + self.w[VISION + "embeddings.position_embedding.weight"]
        for i in range(v["num_hidden_layers"]):
            name = f"{VISION}encoder.layers.{i}."
            y = self.layer_norm(x, name + "layer_norm1")
            q, k, u = (self.heads(self.linear(y, f"{name}self_attn.{n}_proj"), dim) for n in "qkv")
            x = x + self.linear(self.attention(q, k, u), name + "self_attn.out_proj")
            y = self.layer_norm(x, name + "layer_norm2")
            x = x + self.linear(self.gelu(self.linear(y, name + "mlp.fc1")), name + "mlp.fc2")
        x = self.linear(self.layer_norm(x, VISION + "post_layernorm"), P + "paligemma.model.multi_modal_projector.linear")
        return x / np.sqrt(x.shape[-1]) if "image-scale" in self.mistakes else x

    def layer(self, x, name, positions, cached=None, mask=None):
        dim = self.arch["gemma"]["head_dim"]
        y = self.rms_norm(x, name + "input_layernorm")
        q, k, v = (self.heads(self.linear(y, f"{name}self_attn.{n}_proj"), dim) for n in "qkv")
        q, k = self.rotate(q, positions), self.rotate(k, positions)
        if cached is not None:
            k, v = np.concatenate([cached[0], k], 1), np.concatenate([cached[1], v], 1)
        x = x + self.linear(self.attention(q, k, v, mask), name + "self_attn.o_proj")
        y = self.rms_norm(x, name + "post_attention_layernorm")
        y = self.gelu(self.linear(y, name + "mlp.gate_proj")) * self.linear(y, name + "mlp.up_proj")
        return x + self.linear(y, name + "mlp.down_proj"), (k, v)

    def sample_actions(self, images, tokens, state, noise, recorder):
        width = self.arch["gemma"]["width"]
        embedded = self.w[LANGUAGE + "embed_tokens.weight"][tokens] * np.sqrt(width)
        x = np.concatenate([*(self.vision(image) for image in images), embedded])
        recorder["prefix.embs"] = x
        count, cache = len(x), []
        for i in range(self.arch["gemma"]["depth"]):
            x, kv = self.layer(x, f"{LANGUAGE}layers.{i}.", np.arange(count))
            cache.append(kv)
            recorder[f"prefix.layer{i}.out"] = x
        x_t, steps = noise, self.arch["num_steps"]
        for step in range(steps):
            v_t = self.velocity(x_t, 1 - step / steps, state, cache, count, recorder if step == 0 else {})
            recorder[f"step{step}.v_t"] = v_t
            x_t = x_t - v_t / steps
        recorder["actions"] = x_t
        return x_t

    def velocity(self, x_t, time, state, cache, count, taps):
        half = self.arch["expert"]["width"] // 2
        period = 4e-3 * (4.0 / 4e-3) ** (np.arange(half) / (half - 1))
        angle = time * 2 * np.pi / period
        embedded = np.tile(np.concatenate([np.sin(angle), np.cos(angle)]), (len(x_t), 1))
        h = self.linear(np.concatenate([self.linear(x_t, "action_in_proj"), embedded], 1), "action_time_mlp_in")
        h = self.linear(h / (1 + np.exp(-h)), "action_time_mlp_out")
        x = np.concatenate([self.linear(state[None], "state_proj"), h])
        taps["suffix.embs"] = x
        mask = np.ones((len(x), count + len(x)), bool)
        mask[0, count + 1 :] = False
        positions = np.arange(len(x)) + (0 if "suffix-positions" in self.mistakes else count)
        for i, cached in enumerate(cache):
            x, _ = self.layer(x, f"{EXPERT}layers.{i}.", positions, cached, mask)
            taps[f"suffix.layer{i}.out"] = x
        return self.linear(self.rms_norm(x, EXPERT + "norm")[1:], "action_out_proj")


def main(mistakes=("image-scale", "suffix-positions")):
    folder = ROOT / "golden" / "b"
    port = Port(folder, mistakes)
    rng = np.random.default_rng(0)
    side, arch = port.arch["vision"]["image_size"], port.arch
    images = rng.uniform(-1, 1, (2, 3, side, side)).astype(np.float32)
    tokens = rng.integers(2, arch["vocab_size"], 9)
    state = rng.normal(size=arch["state_dim"])
    noise = rng.normal(size=(arch["horizon"], arch["action_dim"]))

    recorder = pi0.Recorder(format="f32", num_steps=arch["num_steps"], source="a port in numpy")
    recorder.inputs(images=images, tokens=tokens[None], state=state[None], noise=noise[None])
    port.sample_actions(images, tokens, state, noise, recorder)
    verdict = pi0.judge(folder, recorder)
    print(verdict)
    return verdict


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--right", action="store_true", help="without the mistakes")
    main(() if parser.parse_args().right else ("image-scale", "suffix-positions"))
