#!/usr/bin/env python3
"""Trains the tiny π0 or π0.5 with openpi's PyTorch class and its flow-matching loss.

    cargo run --release -p pi0-demo --example record -- data/train-1.safetensors 40000 1     # seeds 1, 2, ...
    cargo run --release -p pi0-demo --example record -- data/val.safetensors 2000 1000
    python train.py --openpi OPENPI --data data --out run

Stops and goes on where it was when started again with the same --out. Several processes share the work when started
with `torchrun --nproc-per-node N train.py ...`; --batch is for each. See README.md for the environment.
"""

import argparse
import copy
import json
import math
import os
import pathlib
import time

import numpy as np
import torch
from safetensors import safe_open

import tiny


class Data:
    """Samples of one or more recordings, in memory."""

    def __init__(self, paths, kind="pi0", stats=None):
        self.kind = kind
        parts = {k: [] for k in ("top", "wrist", "state", "actions", "kinds", "places", "tokens")}
        length = tiny.ARCHS[kind]["max_tokens"]
        for path in paths:
            with safe_open(path, "pt") as f:
                tokens = [tiny.tokenize(t, kind) for t in json.loads(f.metadata()["instructions"])]
                table = torch.tensor([t + [0] * (length - len(t)) for t in tokens])
                for k in list(parts)[:-1]:
                    parts[k].append(f.get_tensor(k))
                parts["tokens"].append(table[f.get_tensor("instruction").long()])
        for k, v in parts.items():
            setattr(self, k, torch.cat(v))
        self.length = int((self.tokens != 0).sum(1).max())  # columns that are padding everywhere cost time
        if stats is None:
            flat = {"state": self.state, "action": self.actions.flatten(0, 1)}
            stats = {name: self.describe(values) for name, values in flat.items()}
        self.stats = stats

    def describe(self, values):
        """What π0 normalizes with, mean and deviation; what π0.5 does, the quantiles at 1 % and 99 %."""
        if self.kind == "pi0":
            return values.mean(0), values.std(0)
        values = values.sort(0).values
        return tuple(values[round(q * (len(values) - 1))] for q in (0.01, 0.99))

    def normalize(self, name, values):
        low, high = self.stats[name]
        return (values - low) / high if self.kind == "pi0" else 2 * (values - low) / (high - low) - 1

    def unnormalize(self, name, values):
        low, high = self.stats[name]
        return values * high + low if self.kind == "pi0" else (values + 1) / 2 * (high - low) + low

    def __len__(self):
        return len(self.state)

    def batch(self, index, device):
        """-> what the reference calls an observation, and normalized actions [B, T, A]."""
        images = [(x[index].to(device).permute(0, 3, 1, 2).float() / 127.5 - 1) for x in (self.top, self.wrist)]
        state, actions = self.normalize("state", self.state[index]), self.normalize("action", self.actions[index])
        tokens = self.tokens[index, : self.length]
        if self.kind == "pi05":
            tokens = tiny.with_state(tokens, state)
        tokens, state, actions = tokens.to(device), state.to(device), actions.to(device)
        present = torch.ones(len(index), dtype=torch.bool, device=device)
        return (images, [present] * len(images), tokens, tokens != 0, state), actions


class Pointing(torch.nn.Module):
    """What PaliGemma learned before it became part of π0: to say what a picture shows, and where. Three linear heads
    that read the prefix while it trains and are thrown away then.

    `named`: which kinds have their centre in a patch, from the picture's tokens before they met the words.
    `meant`, `offset`: which patch of a picture holds the target, and where in it, from the same tokens as they enter
    the last layer, which makes the keys and values that the expert reads.
    """

    KINDS = 20

    def __init__(self, model):
        super().__init__()
        vision, width = tiny.ARCH["vision"], tiny.ARCH["gemma"]["width"]
        self.side = vision["image_size"] // vision["patch_size"]
        self.named = torch.nn.Linear(width, self.KINDS)
        self.meant = torch.nn.Linear(width, 1)
        self.offset = torch.nn.Linear(width, 2)
        self.hidden = None
        last = model.paligemma_with_expert.paligemma.model.language_model.layers[-1]
        last.register_forward_pre_hook(self.keep, with_kwargs=True)

    def keep(self, _layer, args, kwargs):
        self.hidden = args[0] if args else kwargs["hidden_states"]

    def forward(self, embs, kinds, places):
        """embs [B, tokens, W]: the prefix before the language model; kinds [B, 3]; places [B, 2, 3, 2]."""
        b, cameras, objects, _ = places.shape
        patches = self.side**2
        seen = ((places >= 0) & (places < 1)).all(-1)
        cell = (places * self.side).floor()
        patch = (cell[..., 1] * self.side + cell[..., 0]).clamp(0, patches - 1).long()  # [B, 2, 3]
        features = embs[:, : cameras * patches].view(b, cameras, patches, -1)
        labels = torch.zeros(b, cameras, patches, self.KINDS, device=embs.device)
        batch = torch.arange(b, device=embs.device)[:, None, None].expand_as(patch)
        camera = torch.arange(cameras, device=embs.device)[None, :, None].expand_as(patch)
        kind = kinds.long()[:, None, :].expand_as(patch)
        labels[batch[seen], camera[seen], patch[seen], kind[seen]] = 1.0
        named = torch.nn.functional.binary_cross_entropy_with_logits(self.named(features), labels, reduction="none")
        named = named.sum((1, 2, 3)).mean() / objects
        hidden = self.hidden[:, : cameras * patches].view(b, cameras, patches, -1)
        visible, target = seen[..., 0], patch[..., 0]
        logits = self.meant(hidden).squeeze(-1)
        meant = torch.nn.functional.cross_entropy(logits[visible], target[visible])
        inside = (places * self.side - cell)[:, :, 0] - 0.5
        at = self.offset(hidden).gather(2, target[..., None, None].expand(-1, -1, 1, 2)).squeeze(2)
        offset = (at - inside)[visible].square().mean()
        right = (logits.argmax(-1) == target) & visible
        self.right = right.sum(0) / visible.sum(0)  # of each camera
        return named + meant + 2 * offset


def loss_of(model, observation, actions, draws, pointing=None, truth=None):
    """openpi's loss, with several draws of noise and time for each observation, and the loss of pointing if asked.

    The prefix sees neither, so its keys and values serve all draws: same mathematics as `model.forward`, for less.
    """
    images, image_masks, tokens, token_masks, state = observation
    from openpi.models_pytorch.pi0_pytorch import make_att_2d_masks

    embs, pad, att = model.embed_prefix(images, image_masks, tokens, token_masks)
    mask = model._prepare_attention_masks_4d(make_att_2d_masks(pad, att))
    _, cache = model.paligemma_with_expert.forward(
        attention_mask=mask, position_ids=torch.cumsum(pad, dim=1) - 1, past_key_values=None,
        inputs_embeds=[embs, None], use_cache=True,
    )  # fmt: skip
    pointed = pointing(embs, *truth) if pointing else embs.new_zeros(())
    cache.batch_repeat_interleave(draws)
    actions = actions.repeat_interleave(draws, 0)
    noise = model.sample_noise(actions.shape, actions.device)
    t = model.sample_time(len(actions), actions.device)
    x_t = t[:, None, None] * noise + (1 - t[:, None, None]) * actions
    v_t = model.denoise_step(state.repeat_interleave(draws, 0), pad.repeat_interleave(draws, 0), cache, x_t, t)
    return torch.nn.functional.mse_loss(noise - actions, v_t), pointed


def one_key_head(module, query, key, value, mask, scaling, dropout=0.0, **_):
    """The reference's eager attention where all query heads share one key head: no copies of the keys."""
    b, h, n, d = query.shape
    assert key.shape[1] == 1 and dropout == 0.0
    scores = (query.reshape(b, h * n, d) * scaling) @ key[:, 0].transpose(1, 2)
    scores = torch.softmax(scores.view(b, h, n, -1) + mask[..., : key.shape[2]], -1).to(value.dtype)
    out = (scores.view(b, h * n, -1) @ value[:, 0]).view(b, h, n, d)
    return out.transpose(1, 2).contiguous(), None


def hurry(model, data, device):
    """Leaves out work without effect, and checks that neither this nor the shared prefix changes the loss."""
    from transformers.models.gemma import modeling_gemma

    observation, actions = data.batch(torch.arange(8), device)
    with torch.no_grad():
        torch.manual_seed(0)
        theirs = model.forward(observation, actions).mean().item()
        modeling_gemma.eager_attention_forward = one_key_head
        # Nobody reads the language model's output, only its keys and values.
        model.paligemma_with_expert.paligemma.model.language_model.layers[-1].mlp.forward = lambda x: x
        torch.manual_seed(0)
        ours = loss_of(model, observation, actions, 1)[0].item()
    assert abs(ours - theirs) < 1e-4 * theirs, (ours, theirs)
    print(f"loss with a shared prefix {ours:.6f}, of the reference's forward {theirs:.6f}")


@torch.no_grad()
def sample(model, observation, noise, steps=10):
    """As the reference's sample_actions, with the cache of one prefix."""
    model._preprocess_observation = lambda o, train=True: o
    return model.sample_actions(noise.device, _Obs(observation), noise=noise, num_steps=steps)


class _Obs(tuple):
    """A tuple that also answers to `.state`, which sample_actions reads for the batch size."""

    @property
    def state(self):
        return self[4]


def validate(model, data, device):
    """Mean absolute error of sampled chunks: of the first half, in millimetres, and how often the fingers are told
    rightly."""
    errors, right = [], []
    for start in range(0, len(data), 500):
        observation, actions = data.batch(torch.arange(start, min(start + 500, len(data))), device)
        noise = torch.randn(actions.shape, generator=torch.Generator().manual_seed(start)).to(device)
        got, want = (data.unnormalize("action", x.cpu()) for x in (sample(model, observation, noise), actions))
        errors.append((got - want)[:, :4, :3].abs().mean((1, 2)))
        right.append(((got[..., 3] > 0.03) == (want[..., 3] > 0.03)).float().mean(1))
    return torch.cat(errors).mean().item() * 1e3, torch.cat(right).mean().item()


def confused(data):
    """The same samples, each with the state of the next."""
    other = copy.copy(data)
    other.state = data.state.roll(-1, 0)
    return other


def share(parameters, progress):
    """Averages gradients, and how far the run is, over all processes. Returns the latter."""
    if not torch.distributed.is_initialized():
        return progress
    grads = [x.grad for x in parameters if x.grad is not None]
    flat = torch.cat([g.flatten() for g in grads] + [torch.tensor([progress], device=grads[0].device)])
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    *parts, progress = flat.split([g.numel() for g in grads] + [1])
    for g, part in zip(grads, parts, strict=True):
        g.copy_(part.view_as(g))
    return progress.item()


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--openpi", required=True, help="checkout of openpi")
    p.add_argument("--data", type=pathlib.Path, required=True, help="folder with train-*.safetensors and val.safetensors")
    p.add_argument("--out", type=pathlib.Path, required=True)
    p.add_argument("--model", choices=tiny.ARCHS, default="pi0")
    p.add_argument("--init", type=pathlib.Path, help="checkpoint of the trained π0 that a π0.5 begins with")
    p.add_argument("--freeze-vision", action="store_true", help="leave the vision tower as it was inherited")
    p.add_argument("--start", type=pathlib.Path, help="state.pt of another run to begin with, on a new schedule")
    p.add_argument("--steps", type=int, default=20000)
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--draws", type=int, default=4, help="draws of noise and time for each observation")
    p.add_argument("--lr", type=float, default=1e-3)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--ema", type=float, default=0.999)
    p.add_argument("--threads", type=int, default=0)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--pointing", type=float, default=0.3, help="weight of the loss of naming and pointing")
    p.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    p.add_argument("--compile", action="store_true")
    p.add_argument("--every", type=int, default=1000, help="steps between validations and checkpoints")
    p.add_argument("--minutes", type=float, default=math.inf, help="the learning rate falls to zero by then, if sooner")
    o = p.parse_args()
    if o.threads:
        torch.set_num_threads(o.threads)
    o.out.mkdir(parents=True, exist_ok=True)
    rank = int(os.environ.get("RANK", 0))
    if "RANK" in os.environ:
        torch.distributed.init_process_group("gloo")
    torch.manual_seed(o.seed)

    if o.init and o.model != "pi05":
        p.error("--init is for --model pi05")
    if o.freeze_vision and not o.init:
        p.error("--freeze-vision needs --init: a vision tower of random weights sees nothing")
    model = tiny.build(o.openpi, o.model)
    tiny.initialize(model)
    inherited = set(tiny.inherit(model, o.init) if o.init else [])
    if o.freeze_vision:
        model.paligemma_with_expert.paligemma.model.vision_tower.requires_grad_(False)
    model.to(o.device).eval()  # train mode only adds gradient checkpointing
    data = Data(sorted(o.data.glob("train-*.safetensors")), o.model)
    val = Data([o.data / "val.safetensors"], o.model, data.stats)
    val.length = data.length
    count = sum(x.numel() for x in model.parameters())
    print(f"{count} parameters, {len(data)} samples, {o.device}, {torch.get_num_threads()} threads")
    ema = copy.deepcopy(model)
    hurry(model, val, o.device)
    pointing = Pointing(model).to(o.device)

    named = [(n, x) for n, x in [*model.named_parameters(), *pointing.named_parameters()] if x.requires_grad]
    trained = [x for _, x in named]
    groups = []
    for old in (False, True):  # what was learned before is changed at half the rate
        some = [x for n, x in named if (n in inherited) == old]
        for matrix in (True, False) if some else ():
            group = [x for x in some if (x.ndim > 1) == matrix]
            groups.append({"params": group, "weight_decay": 0.01 if matrix else 0.0, "share": 0.5 if old else 1.0})
    optimizer = torch.optim.AdamW(groups, lr=o.lr, betas=(0.9, 0.98), fused=True)
    state_file, log_file = o.out / "state.pt", o.out / "log.jsonl"
    step, spent = 0, 0.0
    source = state_file if state_file.exists() else o.start
    if source:
        saved = torch.load(source, map_location=o.device, weights_only=True)
        model.load_state_dict(saved["model"], strict=False)
        ema.load_state_dict(saved["ema"], strict=False)
        pointing.load_state_dict(saved["pointing"])
        optimizer.load_state_dict(saved["optimizer"])
        data.stats = val.stats = saved["stats"]
        if source == state_file:
            step, spent = saved["step"], saved["spent"]
        print(f"goes on from {source} at step {saved['step']}")
    torch.manual_seed(o.seed + step + 1_000_003 * rank)
    run = torch.compile(loss_of) if o.compile else loss_of

    pairs = list(zip(ema.parameters(), model.parameters(), strict=True))
    losses, began, was = [], time.time(), spent
    while True:
        spent = was + time.time() - began
        index = torch.randint(len(data), (o.batch,))
        observation, actions = data.batch(index, o.device)
        truth = data.kinds[index].to(o.device), data.places[index].to(o.device)
        with torch.autocast(o.device.split(":")[0], torch.bfloat16, enabled=o.bf16):
            loss, pointed = run(model, observation, actions, o.draws, pointing, truth)
        (loss + o.pointing * pointed).backward()
        progress = share(trained, max(step / o.steps, spent / 60 / o.minutes))
        rate = o.lr * min(1, (step + 1) / 300) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1, progress))))
        for g in optimizer.param_groups:
            g["lr"] = rate * g["share"]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        with torch.no_grad():
            d = min(o.ema, (1 + step) / (10 + step))
            torch._foreach_lerp_([e for e, _ in pairs], [m for _, m in pairs], 1 - d)
        losses.append([loss.item(), pointed.item(), *pointing.right.tolist()])
        done = progress >= 1
        if rank == 0 and step % 100 == 0:
            loss, pointed, top, wrist = np.nanmean(losses[-100:], 0)
            print(
                f"step {step} loss {loss:.4f} pointing {pointed:.4f}, right {top:.1%} top {wrist:.1%} wrist "
                f"lr {rate:.2e} {spent:.0f} s",
                flush=True,
            )
        if rank == 0 and (step % o.every == 0 or done):
            error, fingers = validate(ema, val, o.device)
            loss, pointed, top, wrist = (round(float(x), 4) for x in np.nanmean(losses[-o.every :], 0))
            line = {
                "step": step, "loss": loss, "pointing": pointed, "points_top": top, "points_wrist": wrist, "lr": rate,
                "val_mm": error, "val_fingers": fingers, "seconds": spent,
            }  # fmt: skip
            if o.model == "pi05":  # whether it reads its state
                line["val_mm_another_state"] = validate(ema, confused(val), o.device)[0]
            print(json.dumps(line), flush=True)
            with log_file.open("a") as f:
                f.write(json.dumps(line) + "\n")
            state = {
                "model": model.state_dict(), "ema": ema.state_dict(), "pointing": pointing.state_dict(),
                "optimizer": optimizer.state_dict(), "step": step, "spent": spent, "stats": data.stats,
                "kind": o.model,
            }  # fmt: skip
            torch.save(state, o.out / "state.tmp")
            (o.out / "state.tmp").replace(state_file)
        if done:
            return


if __name__ == "__main__":
    main()
