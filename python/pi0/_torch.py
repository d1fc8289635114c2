"""`record`: hooks into the PyTorch modules of openpi, lerobot and Transformers."""

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

from pi0._errors import DumpError
from pi0._recorder import Recorder


@contextlib.contextmanager
def record(module: Any, *, source: "str | None" = None) -> "Iterator[Recorder]":
    """Writes down one inference of a PyTorch π0 or π0.5 under the golden names.

        with pi0.record(policy) as recorder:
            policy.predict_action_chunk(batch)  # or module.sample_actions(...)
        verdict = pi0.judge(checkpoint, recorder)

    `module` is lerobot's policy or its `model`, openpi's `PI0Pytorch`, or Transformers' `PI0ForConditionalGeneration`. Of
    several inferences the last one stays. Nothing of the module is changed when the block ends.
    """
    core = getattr(module, "model", module) if hasattr(module, "predict_action_chunk") else module
    if hasattr(core, "paligemma_with_expert"):
        hooks: _Hooks = _Openpi(core)
    elif hasattr(core, "embed_action_time"):
        hooks = _Transformers(core)
    else:
        raise DumpError(
            f"{type(module).__name__} is no π0 that is known: wanted openpi's or lerobot's PI0Pytorch, lerobot's policy, or "
            "Transformers' PI0ForConditionalGeneration; for others fill a pi0.Recorder"
        )
    recorder = hooks.recorder
    recorder.source = source or f"{type(module).__module__}.{type(module).__name__}"
    recorder.format = _format(core)
    with hooks:
        yield recorder


def _format(core: Any) -> str:
    """Where a module rounds: by the format of most of its parameters."""
    counts: "dict[str, int]" = {}
    for parameter in core.parameters():
        counts[str(parameter.dtype)] = counts.get(str(parameter.dtype), 0) + parameter.numel()
    most = max(counts, key=counts.__getitem__, default="torch.float32")
    return "bf16" if most in ("torch.bfloat16", "torch.float16") else "f32"


class _Hooks:
    """Forward hooks and wrapped methods, undone at the end."""

    def __init__(self, core: Any) -> None:
        self.core = core
        self.recorder = Recorder()
        self.step = -1
        self.calls: "dict[str, int]" = {}
        self.undo = contextlib.ExitStack()

    def put(self, name: str, value: Any) -> None:
        if isinstance(value, (tuple, list)):
            value = value[0]
        if hasattr(value, "last_hidden_state"):
            value = value.last_hidden_state
        self.recorder[name] = value

    def hook(self, module: Any, name: str, *, per_camera: bool = False, first_step: bool = False) -> None:
        def heard(_module: Any, _args: Any, out: Any) -> None:
            if first_step and self.step != 0:
                return
            key = name
            if per_camera:
                camera = self.calls.get(name, 0)
                self.calls[name] = camera + 1
                key = name.format(camera)
            self.put(key, out)

        self.undo.callback(module.register_forward_hook(heard).remove)

    def wrap(self, owner: Any, name: str, make: "Callable[[Callable[..., Any]], Callable[..., Any]]") -> None:
        """Replaces a method of an instance, or a function of a module."""
        old = getattr(owner, name)
        own = name in vars(owner)
        setattr(owner, name, make(old))
        self.undo.callback(lambda: setattr(owner, name, old) if own else delattr(owner, name))

    def hook_vision(self, vision: Any, projector: Any, per_camera: bool = True) -> None:
        name = "vision.cam{}."
        self.hook(vision.embeddings.patch_embedding, name + "patch_conv", per_camera=per_camera)
        self.hook(vision.embeddings, name + "embeddings", per_camera=per_camera)
        for i, layer in enumerate(vision.encoder.layers):
            self.hook(layer.layer_norm1, name + f"layer{i}.ln1", per_camera=per_camera)
            self.hook(layer.self_attn, name + f"layer{i}.attn", per_camera=per_camera)
            self.hook(layer.layer_norm2, name + f"layer{i}.ln2", per_camera=per_camera)
            self.hook(layer.mlp, name + f"layer{i}.mlp", per_camera=per_camera)
            self.hook(layer, name + f"layer{i}.out", per_camera=per_camera)
        self.hook(vision.post_layernorm, name + "post_ln", per_camera=per_camera)
        self.hook(projector, name + "projector", per_camera=per_camera)

    def hook_gemma(self, name: str, tower: Any, first_step: bool) -> None:
        for i, layer in enumerate(tower.layers):
            for norm, key in ((layer.input_layernorm, "ln1"), (layer.post_attention_layernorm, "ln2")):
                self.hook(norm, f"{name}.layer{i}.{key}", first_step=first_step)
                self.hook_modulation(norm, f"{name}.layer{i}.{key}")
            self.hook(layer.self_attn, f"{name}.layer{i}.attn", first_step=first_step)
            self.hook(layer.mlp, f"{name}.layer{i}.mlp", first_step=first_step)
            self.hook(layer, f"{name}.layer{i}.out", first_step=first_step)
        self.hook(tower.norm, f"{name}.norm", first_step=first_step)
        self.hook_modulation(tower.norm, f"{name}.norm")

    def hook_modulation(self, norm: Any, name: str) -> None:
        """Scale, shift and gate of π0.5's adaptive norms."""
        dense = getattr(norm, "dense", None)
        if dense is None:
            return

        def heard(_module: Any, _args: Any, out: Any) -> None:
            if self.step == 0:
                for part, value in zip(("scale", "shift", "gate"), out.chunk(3, -1)):
                    self.put(f"{name}.{part}", value)

        self.undo.callback(dense.register_forward_hook(heard).remove)

    def start(self) -> None:
        """A new inference: what was heard of an earlier one goes."""
        self.recorder.clear()
        self.calls.clear()
        self.step = -1

    def entered(self, x_t: Any) -> None:
        """Another step begins at `x_t`, where the one before ended."""
        if self.step > 0:
            self.put(f"step{self.step - 1}.x_next", x_t)

    def finish(self, actions: Any) -> None:
        """The last step is done."""
        self.recorder.num_steps = self.step + 1
        if self.step >= 0:
            self.put(f"step{self.step}.x_next", actions)
        self.put("actions", actions)

    def __enter__(self) -> "_Hooks":
        # Compiled functions would run past the hooks.
        stance = getattr(sys.modules["torch"].compiler, "set_stance", None)  # since PyTorch 2.6
        if stance is not None:
            self.undo.enter_context(stance("force_eager"))
        self.install()
        return self

    def install(self) -> None:
        raise NotImplementedError

    def __exit__(self, *_: Any) -> None:
        self.undo.close()


class _Openpi(_Hooks):
    """openpi's `PI0Pytorch`, and lerobot's, which is its port."""

    def install(self) -> None:
        core = self.core
        pair = core.paligemma_with_expert
        paligemma = pair.paligemma.model
        vision = paligemma.vision_tower
        self.hook_vision(getattr(vision, "vision_model", vision), paligemma.multi_modal_projector)
        self.hook_gemma("prefix", paligemma.language_model, first_step=False)
        self.hook_gemma("suffix", pair.gemma_expert.model, first_step=True)
        if hasattr(core, "state_proj"):
            self.hook(core.state_proj, "suffix.state_emb", first_step=True)
        self.hook(core.action_in_proj, "suffix.action_emb", first_step=True)
        mlp = "action_time_mlp" if hasattr(core, "action_time_mlp_in") else "time_mlp"
        self.hook(getattr(core, f"{mlp}_in"), "suffix.time_mlp_in", first_step=True)
        self.hook(getattr(core, f"{mlp}_out"), "suffix.time_mlp_out", first_step=True)
        self.wrap(core, "embed_prefix", self.embed_prefix)
        self.wrap(core, "embed_suffix", self.embed_suffix)
        self.wrap(core, "denoise_step", self.denoise_step)
        self.wrap(pair, "forward", self.forward)
        self.wrap(core, "sample_actions", self.sample_actions)
        home = sys.modules[type(core).__module__]
        if hasattr(home, "create_sinusoidal_pos_embedding"):
            self.wrap(home, "create_sinusoidal_pos_embedding", self.time_embedding)

    def sample_actions(self, old: "Callable[..., Any]") -> "Callable[..., Any]":
        def sample(*args: Any, **kw: Any) -> Any:
            self.start()
            actions = old(*args, **kw)
            if "inputs.noise" in self.recorder:
                self.finish(actions)
            return actions

        return sample

    def embed_prefix(self, old: "Callable[..., Any]") -> "Callable[..., Any]":
        def embed(images: Any, image_masks: Any, tokens: Any, token_masks: Any) -> Any:
            self.recorder.inputs(
                images=images,
                image_masks=list(image_masks),
                tokens=tokens,
                token_masks=token_masks,
            )
            embs, pad, attend = old(images, image_masks, tokens, token_masks)
            self.put("prefix.embs", embs)
            self.put("prefix.pad_mask", pad)
            return embs, pad, attend

        return embed

    def embed_suffix(self, old: "Callable[..., Any]") -> "Callable[..., Any]":
        names = inspect.signature(old)

        def embed(*args: Any, **kw: Any) -> Any:
            given = names.bind(*args, **kw).arguments
            if self.step == 0:
                if given.get("state") is not None and hasattr(self.core, "state_proj"):
                    self.put("inputs.state", given["state"])
                self.put("inputs.noise", given.get("noisy_actions", given.get("x_t")))
            out = old(*args, **kw)
            if self.step == 0:
                self.put("suffix.embs", out[0])
            if out[3] is not None:
                self.put(f"step{self.step}.cond", out[3])
            return out

        return embed

    def denoise_step(self, old: "Callable[..., Any]") -> "Callable[..., Any]":
        names = inspect.signature(old)

        def step(*args: Any, **kw: Any) -> Any:
            self.step += 1
            given = names.bind(*args, **kw).arguments
            self.put(f"step{self.step}.time", given["timestep"])
            self.entered(given["x_t"])
            velocity = old(*args, **kw)
            self.put(f"step{self.step}.v_t", velocity)
            return velocity

        return step

    def forward(self, old: "Callable[..., Any]") -> "Callable[..., Any]":
        def run(**kw: Any) -> Any:
            first = kw["inputs_embeds"][1] is None
            positions = kw.get("position_ids")
            if first:
                if positions is not None:
                    self.put("prefix.positions", positions)
                out = old(**kw)
                for i, (keys, values) in enumerate(_layers_of(out[1])):
                    self.put(f"prefix.layer{i}.k_cache", keys)
                    self.put(f"prefix.layer{i}.v_cache", values)
                return out
            if self.step == 0:
                if positions is not None:
                    self.put("suffix.positions", positions)
                if kw.get("attention_mask") is not None:
                    self.put("suffix.attend", kw["attention_mask"][:, 0] == 0)
            return old(**kw)

        return run

    def time_embedding(self, old: "Callable[..., Any]") -> "Callable[..., Any]":
        def embed(*args: Any, **kw: Any) -> Any:
            out = old(*args, **kw)
            if self.step >= 0:
                self.put(f"step{self.step}.time_emb", out)
            return out

        return embed


def _layers_of(cache: Any) -> "Iterator[tuple[Any, Any]]":
    """Keys and values of a cache of Transformers, old or new."""
    layers = getattr(cache, "layers", None)
    if layers is not None:
        for layer in layers:
            yield layer.keys, layer.values
        return
    for layer in cache or ():
        yield layer[0], layer[1]


class _Transformers(_Hooks):
    """Transformers' `PI0ForConditionalGeneration`."""

    def install(self) -> None:
        core = self.core
        vlm, expert, embed = core.model.vlm, core.model.dit, core.embed_action_time
        # All cameras go through the tower at once, so only what is behind it is told apart.
        self.hook_gemma("prefix", vlm.language_model, first_step=False)
        self.hook_gemma("suffix", expert, first_step=True)
        self.hook(embed.state_proj, "suffix.state_emb", first_step=True)
        self.hook(embed.action_in_proj, "suffix.action_emb", first_step=True)
        self.hook(embed.action_time_mlp_in, "suffix.time_mlp_in", first_step=True)
        self.hook(embed.action_time_mlp_out, "suffix.time_mlp_out", first_step=True)
        self.hook(embed, "suffix.embs", first_step=True)
        self.wrap(core, "sample_actions", self.sample_actions)
        self.wrap(core, "forward", self.forward)
        self.wrap(core.model, "embed_prefix", self.embed_prefix)

    def sample_actions(self, old: "Callable[..., Any]") -> "Callable[..., Any]":
        names = inspect.signature(old)

        def sample(*args: Any, **kw: Any) -> Any:
            self.start()
            given = names.bind(*args, **kw).arguments
            pixels, ids = given["pixel_values"], given["input_ids"]
            mask, pixel_mask = given.get("attention_mask"), given.get("pixel_attention_mask")
            if pixels.ndim == 4:
                pixels = pixels[:, None]
            cameras = pixels.shape[1]
            # The prompt stands behind the places that the images take.
            text = ids != self.core.config.vlm_config.image_token_id
            width = int(text.sum(dim=1).max())
            self.recorder.inputs(
                images=[pixels[:, c] for c in range(cameras)],
                image_masks=None if pixel_mask is None else pixel_mask.reshape(len(ids), -1)[:, :cameras],
                tokens=ids[:, -width:],
                token_masks=None if mask is None else mask[:, -width:],
            )
            self.put("inputs.state", given["state"])
            actions = old(*args, **kw)
            if "inputs.noise" in self.recorder:
                self.finish(actions)
            return actions

        return sample

    def embed_prefix(self, old: "Callable[..., Any]") -> "Callable[..., Any]":
        def embed(*args: Any, **kw: Any) -> Any:
            out = old(*args, **kw)
            self.put("prefix.embs", out)
            return out

        return embed

    def forward(self, old: "Callable[..., Any]") -> "Callable[..., Any]":
        def run(*args: Any, **kw: Any) -> Any:
            self.step += 1
            if self.step == 0:
                self.put("inputs.noise", kw["noise"])
            self.entered(kw["noise"])
            self.put(f"step{self.step}.time", kw["timestep"])
            out = old(*args, **kw)
            self.put(f"step{self.step}.v_t", out.logits)
            return out

        return run
