"""lerobot's own evaluation in a simulator, gym-aloha's cube, with the network run here in place of PyTorch's.

    pip install ./python ./python/lerobot "lerobot[pi,aloha,dataset]==0.6.1"
    MUJOCO_GL=egl python examples/python/lerobot_eval.py CHECKPOINT --episodes 10 --dtype bf16

CHECKPOINT is a folder of lerobot's, of `pi0` or `pi05`. But for the plugin's name of the policy, this is `lerobot-eval` as everybody runs
it. The environment has one camera, which the policy gets under the name of its first.
"""

import argparse
import json
import pathlib
import sys
import tempfile


def arguments(checkpoint, out, episodes=1, length=400, dtype=None):
    """What `lerobot-eval` is told."""
    config = json.loads((pathlib.Path(checkpoint) / "config.json").read_text())
    camera = next(name for name in config["input_features"] if name.startswith("observation.images."))
    given = [
        f"--policy.type={config['type']}_native",
        f"--policy.pretrained_path={checkpoint}",
        "--policy.device=cpu",
        "--env.type=aloha",
        f"--env.episode_length={length}",
        f"--eval.n_episodes={episodes}",
        "--eval.batch_size=1",
        "--eval.use_async_envs=false",
        f"--rename_map={json.dumps({'observation.images.top': camera})}",
        f"--output_dir={out}",
    ]
    return given + ([f"--policy.native_dtype={dtype}"] if dtype else [])


def main(checkpoint, **more):
    """lerobot's summary of the episodes."""
    from lerobot.scripts import lerobot_eval

    with tempfile.TemporaryDirectory() as out:
        old, sys.argv = sys.argv, ["lerobot-eval", *arguments(checkpoint, out, **more)]
        try:
            lerobot_eval.main()
        finally:
            sys.argv = old
        return json.loads((pathlib.Path(out) / "eval_info.json").read_text())["overall"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split(",")[0])
    parser.add_argument("checkpoint", type=pathlib.Path)
    parser.add_argument("--episodes", type=int, default=1)
    parser.add_argument("--length", type=int, default=400, help="steps of an episode")
    parser.add_argument("--dtype", help="f32, bf16 or int8")
    print(json.dumps(main(**vars(parser.parse_args())), indent=2))
