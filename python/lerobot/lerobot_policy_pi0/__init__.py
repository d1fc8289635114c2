"""lerobot policies whose network is computed by the package `pi0`."""

from lerobot_policy_pi0.configuration_pi05_native import Pi05NativeConfig
from lerobot_policy_pi0.configuration_pi0_native import Pi0NativeConfig

__all__ = ["Pi0NativeConfig", "Pi05NativeConfig"]
