"""Configuration of `pi05_native`."""

from dataclasses import dataclass

from lerobot.configs import PreTrainedConfig
from lerobot.policies.pi05.configuration_pi05 import PI05Config


@PreTrainedConfig.register_subclass("pi05_native")
@dataclass
class Pi05NativeConfig(PI05Config):
    """lerobot's own, and where the network runs. `device` stays that of lerobot's tensors; `native_checkpoint` is where the
    weights are, if not at `pretrained_path`."""

    native_device: str = "cpu"
    native_dtype: str | None = None
    native_threads: int | None = None
    native_checkpoint: str | None = None
