"""What both policies share: lerobot's policy class around a network of the package `pi0`."""

import json
import tempfile
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, NoReturn

import pi0
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.common.flow_matching import sample_noise
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor, nn


class NativeModel(nn.Module):
    """Has the interface of lerobot's `PI0Pytorch` and `PI05Pytorch` as far as policies use it."""

    def __init__(self, config: Any, model: pi0.Model, has_state: bool) -> None:
        super().__init__()
        self.config = config
        self.rtc_processor = None
        self.has_state = has_state
        self._model = model
        # Policies ask for the device of their parameters.
        self.register_parameter("place", nn.Parameter(torch.zeros(()), requires_grad=False))

    def sample_actions(
        self,
        images: list[Tensor],
        image_masks: list[Tensor],
        tokens: Tensor,
        token_masks: Tensor,
        state: Tensor | None = None,
        noise: Tensor | None = None,
        num_steps: int | None = None,
        inference_delay: int | None = None,
        prev_chunk_left_over: Tensor | None = None,
        execution_horizon: int | None = None,
    ) -> Tensor:
        """Actions `[B, chunk_size, max_action_dim]`; noise is drawn as lerobot draws it."""
        robots = tokens.shape[0]
        if noise is None:
            noise = sample_noise((robots, self.config.chunk_size, self.config.max_action_dim), tokens.device)
        batch = []
        for b in range(robots):
            inputs = pi0.Inputs(
                [image[b].float().cpu() if mask[b] else None for image, mask in zip(images, image_masks, strict=True)],
                tokens[b][token_masks[b].bool()].cpu(),
                state[b].float().cpu() if self.has_state else None,
                noise[b].float().cpu(),
            )
            self._follow(inputs, b, inference_delay, prev_chunk_left_over, execution_horizon)
            batch.append(inputs)
        actions = self._model.sample_actions(batch, steps=num_steps or self.config.num_inference_steps)
        return torch.from_numpy(actions).to(tokens.device)

    def _follow(
        self,
        inputs: pi0.Inputs,
        robot: int,
        delay: int | None,
        previous: Tensor | None,
        execution_horizon: int | None,
    ) -> None:
        rtc = self.config.rtc_config
        if rtc is None or not rtc.enabled or previous is None:
            return
        chunk = previous if previous.ndim == 2 else previous[robot if previous.shape[0] > 1 else 0]
        # lerobot's chunks have the robot's width or the network's.
        chunk = nn.functional.pad(chunk.float().cpu(), (0, self.config.max_action_dim - chunk.shape[-1]))
        chunk = chunk[: self.config.chunk_size]
        # lerobot has this mode since 0.6.2; before, all chunking is guided.
        if getattr(rtc, "mode", "guided") == "trained":
            if delay:
                inputs.continue_from(chunk, delay)
            return
        inputs.follow(
            chunk,
            delay=delay or 0,
            execution_horizon=execution_horizon or rtc.execution_horizon,
            max_guidance_weight=rtc.max_guidance_weight,
            schedule=rtc.prefix_attention_schedule.value,
        )

    def forward(self, *_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError("pi0 runs networks and does not train them: train with lerobot's own pi0 or pi05")


def config_of(path: Path, config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    """What a checkpoint's `config.json` says, as another kind of configuration."""
    given = json.loads((path / "config.json").read_text())
    # A later lerobot writes options that this one lacks. Whether the network can do what they ask is checked when it is loaded.
    known = {field.name for field in fields(config_class)}
    given = {name: value for name, value in given.items() if name in known}
    given["type"] = config_class.get_choice_name(config_class)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(given))
        return PreTrainedConfig.from_pretrained(folder)


def adopt(config: Any, path: Path) -> None:
    """With `--policy.type` lerobot fills a configuration with its own defaults and with the cameras of the environment. Where
    nothing else was asked for, the checkpoint knows better; with `--policy.path` it was asked already."""
    file = path / "config.json"
    if not file.is_file() or json.loads(file.read_text()).get("type") == config.type:
        return
    its = config_of(path, type(config))
    for field in fields(config):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if field.name not in ("device", "output_features") and getattr(config, field.name) == default:
            setattr(config, field.name, getattr(its, field.name))
    # Which image goes to which place is for the checkpoint to say, and for --rename_map.
    config.input_features = its.input_features or config.input_features


class NativePolicy:
    """Comes before lerobot's policy in the order of resolution, and replaces how the network is made and loaded."""

    def __init__(self, config: Any, *, checkpoint: str | Path | None = None, **_: Any) -> None:
        PreTrainedPolicy.__init__(self, config)
        checkpoint = config.native_checkpoint or checkpoint or config.pretrained_path
        if checkpoint is None:
            raise ValueError(f"{self.name} needs a checkpoint: --policy.pretrained_path=DIR")
        adopt(config, Path(checkpoint))
        config.validate_features()
        options = {"dtype": config.native_dtype, "threads": config.native_threads}
        policy = pi0.load(checkpoint, device=config.native_device, robot="none", **options)
        sizes = policy.model.config
        if sizes["kind"] + "_native" != self.name:
            raise ValueError(f"{checkpoint} is a checkpoint of {sizes['kind']}, and this policy is {self.name}")
        for name, size in (
            ("chunk_size", "horizon"),
            ("max_action_dim", "action_dim"),
            ("max_state_dim", "state_dim"),
        ):
            setattr(config, name, sizes[size])
        config.image_resolution = (sizes["image_size"],) * 2
        config.n_action_steps = min(config.n_action_steps, config.chunk_size)
        self.rtc_processor = None
        self.model = NativeModel(config, policy.model, has_state=sizes["kind"] == "pi0")
        self.init_rtc_processor()
        self.reset()

    @classmethod
    def from_pretrained(cls, pretrained_name_or_path: str | Path, *, config: Any = None, **_: Any) -> "NativePolicy":
        """Loads a checkpoint of lerobot's `pi0` or `pi05`, or of this policy."""
        path = Path(pretrained_name_or_path)
        if config is None:
            config = config_of(path, cls.config_class)
        policy = cls(config, checkpoint=path)
        policy.eval()
        return policy

    def _save_pretrained(self, *_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError("the weights are those of the checkpoint; copy its folder")
