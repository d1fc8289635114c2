"""The policy `pi05_native`."""

from lerobot.policies.pi05.modeling_pi05 import PI05Policy

from lerobot_policy_pi0._native import NativePolicy
from lerobot_policy_pi0.configuration_pi05_native import Pi05NativeConfig


class Pi05NativePolicy(NativePolicy, PI05Policy):
    """lerobot's policy with its queues and images, over another network."""

    config_class = Pi05NativeConfig
    name = "pi05_native"
