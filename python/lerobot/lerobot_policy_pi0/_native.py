"""What both policies share: lerobot's policy class around a network of the package `pi0`."""

import json
from pathlib import Path
from typing import Any, NoReturn

import pi0
import torch
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
        chunk = previous[robot] if previous.ndim == 3 else previous
        # lerobot's chunks have the robot's width or the network's.
        chunk = nn.functional.pad(chunk.float().cpu(), (0, self.config.max_action_dim - chunk.shape[-1]))
        inputs.follow(
            chunk[: self.config.chunk_size],
            delay=delay or 0,
            execution_horizon=execution_horizon or rtc.execution_horizon,
            max_guidance_weight=rtc.max_guidance_weight,
            schedule=rtc.prefix_attention_schedule.value,
        )

    def forward(self, *_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError("pi0 runs networks and does not train them: train with lerobot's own pi0 or pi05")


class NativePolicy:
    """Comes before lerobot's policy in the order of resolution, and replaces how the network is made and loaded."""

    def __init__(self, config: Any, *, checkpoint: str | Path | None = None, **_: Any) -> None:
        PreTrainedPolicy.__init__(self, config)
        checkpoint = checkpoint or config.pretrained_path
        if checkpoint is None:
            raise ValueError(f"{self.name} needs a checkpoint: --policy.pretrained_path=DIR")
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
            config = cls.config_of(path)
        policy = cls(config, checkpoint=path)
        policy.eval()
        return policy

    @classmethod
    def config_of(cls, path: Path) -> Any:
        """A checkpoint's configuration as this policy's."""
        import tempfile

        from lerobot.configs import PreTrainedConfig

        given = json.loads((path / "config.json").read_text())
        given["type"] = cls.name
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(given))
            return PreTrainedConfig.from_pretrained(folder)

    def _save_pretrained(self, *_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError("the weights are those of the checkpoint; copy its folder")
