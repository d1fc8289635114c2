"""python -m lerobot_policy_pi0 CHECKPOINT DIR: makes a folder for `--policy.path`, with CHECKPOINT's options and processors under
this plugin's type."""

import argparse
import json
from pathlib import Path

from lerobot_policy_pi0.configuration_pi0_native import Pi0NativeConfig
from lerobot_policy_pi0.configuration_pi05_native import Pi05NativeConfig
from lerobot_policy_pi0._native import config_of

KINDS = {"pi0": Pi0NativeConfig, "pi05": Pi05NativeConfig}


def link(checkpoint: Path, folder: Path) -> None:
    """Makes `folder`: a `config.json` of this plugin's, and links to the processors. The weights stay where they are."""
    kind = json.loads((checkpoint / "config.json").read_text()).get("type")
    if kind not in KINDS:
        raise SystemExit(f"{checkpoint / 'config.json'} has the type {kind!r}, wanted pi0 or pi05")
    folder.mkdir(parents=True)
    for file in checkpoint.iterdir():
        if file.name.startswith("policy_") or file.is_dir():
            (folder / file.name).symlink_to(file.resolve())
    config = config_of(checkpoint, KINDS[kind])
    config.native_checkpoint = str(checkpoint.resolve())
    config._save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lerobot_policy_pi0", description=__doc__.split(": ", 1)[1])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path, help="made; must not exist yet")
    given = parser.parse_args()
    link(given.checkpoint, given.folder)


if __name__ == "__main__":
    main()
