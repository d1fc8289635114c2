"""The policy `pi0_native`."""

from lerobot.policies.pi0.modeling_pi0 import PI0Policy

from lerobot_policy_pi0._native import NativePolicy
from lerobot_policy_pi0.configuration_pi0_native import Pi0NativeConfig


class Pi0NativePolicy(NativePolicy, PI0Policy):
    """lerobot's policy with its queues and images, over another network."""

    config_class = Pi0NativeConfig
    name = "pi0_native"
