"""lerobot's own processors."""

from lerobot.policies.pi0.processor_pi0 import make_pi0_pre_post_processors as make_pi0_native_pre_post_processors

__all__ = ["make_pi0_native_pre_post_processors"]
