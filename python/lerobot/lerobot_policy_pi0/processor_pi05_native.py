"""lerobot's own processors."""

from lerobot.policies.pi05.processor_pi05 import make_pi05_pre_post_processors as make_pi05_native_pre_post_processors

__all__ = ["make_pi05_native_pre_post_processors"]
