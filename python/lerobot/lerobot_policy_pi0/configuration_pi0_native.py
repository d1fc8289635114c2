"""Configuration of `pi0_native`."""

from dataclasses import dataclass

from lerobot.configs import PreTrainedConfig
from lerobot.policies.pi0.configuration_pi0 import PI0Config


@PreTrainedConfig.register_subclass("pi0_native")
@dataclass
class Pi0NativeConfig(PI0Config):
    """lerobot's own, and where the network runs. `device` stays that of lerobot's tensors; `native_checkpoint` is where the
    weights are, if not at `pretrained_path`."""

    native_device: str = "cpu"
    native_dtype: str | None = None
    native_threads: int | None = None
    native_checkpoint: str | None = None
