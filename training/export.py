#!/usr/bin/env python3
"""Writes a training run as a lerobot checkpoint: bfloat16 weights, sizes, processors with statistics, tokenizer.

    python export.py RUN CHECKPOINT
"""

import json
import pathlib
import shutil
import sys

import torch
from safetensors.torch import save_file

import tiny

FEATURES = {
    **{f"observation.images.{c}": {"type": "VISUAL", "shape": [3] + [tiny.ARCH["vision"]["image_size"]] * 2} for c in tiny.CAMERAS},
    "observation.state": {"type": "STATE", "shape": [tiny.ARCH["state_dim"]]},
}
ACTION = {"action": {"type": "ACTION", "shape": [tiny.ARCH["action_dim"]]}}
NORM_MAPS = {
    "pi0": {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"},
    "pi05": {"VISUAL": "IDENTITY", "STATE": "QUANTILES", "ACTION": "QUANTILES"},
}
# Names of the two numbers that a run keeps of each quantity.
STATISTICS = {"pi0": ("mean", "std"), "pi05": ("q01", "q99")}


def config(kind):
    a = tiny.ARCHS[kind]
    common = {
        "type": kind, "input_features": FEATURES, "output_features": ACTION, "normalization_mapping": NORM_MAPS[kind],
        "paligemma_variant": "gemma_2b", "action_expert_variant": "gemma_300m", "dtype": "bfloat16",
        "chunk_size": a["horizon"], "n_action_steps": a["horizon"] // 2,
        "max_state_dim": a["state_dim"], "max_action_dim": a["action_dim"],
        "num_inference_steps": a["num_steps"], "min_period": 4e-3, "max_period": 4.0,
        "image_resolution": [a["vision"]["image_size"]] * 2, "empty_cameras": 0, "tokenizer_max_length": a["max_tokens"],
    }  # fmt: skip
    pi05 = {
        "n_obs_steps": 1, "use_relative_actions": False, "rtc_training_max_delay": 0,
        "use_visual_memory": False, "use_proprioceptive_memory": False,
    }  # fmt: skip
    return common | (pi05 if kind == "pi05" else {})


def processors(kind):
    """lerobot's steps, in its order; returns the two files' content and the statistics' names."""
    normalized = {"pi0": 6, "pi05": 3}[kind]
    before, after = (
        f"policy_{p}processor_step_{i}_{n}_processor.safetensors"
        for p, i, n in (("pre", normalized, "normalizer"), ("post", 0, "unnormalizer"))
    )
    tokens = {
        "max_length": tiny.ARCHS[kind]["max_tokens"], "task_key": "task", "padding_side": "right", "padding": "max_length",
        "truncation": True,
    }  # fmt: skip
    start = [
        {"registry_name": "rename_observations_processor", "config": {"rename_map": {}}},
        {"registry_name": "to_batch_processor", "config": {}},
    ]
    relative = {"registry_name": "relative_actions_processor", "config": {"enabled": False, "exclude_joints": [], "action_names": None}}
    normalizer = {"registry_name": "normalizer_processor", "state_file": before, "config": {"eps": 1e-8, "features": FEATURES | ACTION, "norm_map": NORM_MAPS[kind]}}
    tokenizer = {"registry_name": "tokenizer_processor", "artifacts": {"tokenizer_name": "tokenizer"}, "config": tokens}
    device = {"registry_name": "device_processor", "config": {"device": "cpu", "float_dtype": None}}
    if kind == "pi0":
        pre = [*start, {"registry_name": "pi0_new_line_processor", "config": {}}, tokenizer, device, relative, normalizer]
    else:  # the state is written into the prompt once it is normalized
        prompt = {"registry_name": "pi05_prepare_state_tokenizer_processor_step", "config": {}}
        pre = [*start, relative, normalizer, prompt, tokenizer, device]
    assert pre[normalized] is normalizer
    post = [
        {"registry_name": "unnormalizer_processor", "state_file": after, "config": {"eps": 1e-8, "features": ACTION, "norm_map": NORM_MAPS[kind]}},
        {"registry_name": "absolute_actions_processor", "config": {"enabled": False}},
        device,
    ]
    named = {"policy_preprocessor": pre, "policy_postprocessor": post}
    return {k: {"name": k, "steps": v} for k, v in named.items()}, (before, after)


def main(run, out):
    out.mkdir(parents=True, exist_ok=True)
    saved = torch.load(run / "state.pt", map_location="cpu", weights_only=True)
    kind = saved.get("kind", "pi0")  # runs from before there was a choice are of π0
    # The language model's output head is tied to the embedding; the action expert's reads a vocabulary it never sees.
    weights = {f"model.{k}": v.to(torch.bfloat16).contiguous() for k, v in saved["ema"].items() if "lm_head" not in k}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    files, statistics = processors(kind)
    stats = {
        f"{key}.{part}": tensor.float().contiguous()
        for key, name in (("observation.state", "state"), ("action", "action"))
        for part, tensor in zip(STATISTICS[kind], saved["stats"][name], strict=True)
    }
    for name in statistics:
        save_file(stats, out / name)
    (out / "tokenizer").mkdir(exist_ok=True)
    arch = tiny.ARCHS[kind] if kind == "pi0" else {"family": kind} | tiny.ARCHS[kind]
    files |= {"config": config(kind), "arch": arch, "tokenizer/tokenizer": tiny.tokenizer_json(kind)}
    for name, content in files.items():
        (out / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    for f in out.glob("*.safetensors"):
        f.chmod(0o644)
    shutil.copy(run / "log.jsonl", out / "training.jsonl")
    count = sum(v.numel() for v in weights.values())
    print(f"step {saved['step']}: {count} parameters, {(out / 'model.safetensors').stat().st_size} bytes")


if __name__ == "__main__":
    main(*map(pathlib.Path, sys.argv[1:3]))
