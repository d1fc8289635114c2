"""lerobot's own programs, unmodified, with the plugin's policies: evaluation in a simulator, and the rollout on a robot."""

import json
import os
import shutil
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch and lerobot; .ci/python with PI0_LEROBOT=1 has them")
pytest.importorskip("lerobot_policy_pi0", reason="needs python/lerobot and lerobot")
pytest.importorskip("gym_aloha", reason="needs lerobot[aloha,dataset]")

from conftest import ROOT  # noqa: E402
from sized import checkpoint, sizes  # noqa: E402

# Where lerobot's own policy and ours see the same, step by step. What rounding leaves, the arms' contacts multiply. With
# PI0_EPISODE as many steps are compared, of which the later ones are only told.
STEPS = 48


@pytest.fixture(scope="module", params=["pi0", "pi05"])
def tiny(request, tmp_path_factory):
    """Kind and folder of a tiny checkpoint that lerobot's programs read."""
    folder = tmp_path_factory.mktemp(request.param)
    source = ROOT / "models" / "tiny"
    if request.param == "pi05":
        source = folder / "made"
        subprocess.run([sys.executable, "-m", "pi0", "synth", source, "--model", "pi05"], check=True)
    return request.param, checkpoint(source, folder / "checkpoint")


def options(kind, folder, out, steps):
    return [
        f"--policy.type={kind}",
        f"--policy.pretrained_path={folder}",
        "--policy.device=cpu",
        "--env.type=aloha",
        f"--env.episode_length={steps}",
        "--eval.n_episodes=1",
        "--eval.batch_size=1",
        "--eval.use_async_envs=false",
        '--rename_map={"observation.images.top": "observation.images.base_0_rgb"}',
        f"--output_dir={out}",
    ]


def test_the_command_runs_a_whole_episode(tiny, tmp_path):
    kind, folder = tiny
    program = shutil.which("lerobot-eval", path=os.path.dirname(sys.executable))
    # PI0_EPISODE=400 is the environment's own length.
    steps = int(os.environ.get("PI0_EPISODE", 32))
    done = subprocess.run(
        [program, *options(f"{kind}_native", folder, tmp_path, steps)],
        env={**os.environ, "MUJOCO_GL": os.environ.get("MUJOCO_GL", "egl")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    info = json.loads((tmp_path / "eval_info.json").read_text())
    assert info["overall"]["n_episodes"] == 1


def test_the_example_evaluates(tiny, monkeypatch):
    from test_examples import example

    monkeypatch.setenv("MUJOCO_GL", os.environ.get("MUJOCO_GL", "egl"))
    summary = example("lerobot_eval").main(tiny[1], episodes=2, length=16)
    assert summary["n_episodes"] == 2 and 0 <= summary["pc_success"] <= 100


def actions(monkeypatch, kind, folder, out, steps, more):
    """What `lerobot-eval` has the simulated arms do."""
    from lerobot.scripts import lerobot_eval
    from lerobot.utils.random_utils import set_seed

    kept = []
    run = lerobot_eval.rollout

    def keep(*args, **kw):
        # Making lerobot's own network draws random weights; ours draws none.
        set_seed(1000)
        result = run(*args, **kw)
        kept.append(result["action"][0])
        return result

    monkeypatch.setattr(lerobot_eval, "rollout", keep)
    monkeypatch.setattr(sys, "argv", ["lerobot-eval", *options(kind, folder, out, steps), *more])
    monkeypatch.setenv("MUJOCO_GL", os.environ.get("MUJOCO_GL", "egl"))
    lerobot_eval.main()
    return kept[0]


def test_the_same_seeds_give_the_same_episode(tiny, tmp_path, monkeypatch):
    kind, folder = tiny
    steps = int(os.environ.get("PI0_EPISODE", STEPS))
    native = ["--policy.native_dtype=f32"]
    ours = actions(monkeypatch, f"{kind}_native", folder, tmp_path / "ours", steps, native)
    # lerobot's own policy must be told what the checkpoint says, since `--policy.type` begins from its defaults.
    own = json.loads((folder / "config.json").read_text())
    told = [f"--policy.{name}={json.dumps(own[name])}" for name in ("chunk_size", "n_action_steps", "input_features")]
    with sizes(json.loads((folder / "arch.json").read_text())):
        theirs = actions(
            monkeypatch, kind, folder, tmp_path / "theirs", steps, ["--policy.dtype=float32", *told]
        )
    assert ours.shape == theirs.shape == (steps, 14)
    apart = (ours - theirs).abs().amax(dim=1)
    chunks = [f"{chunk.max():.1e}" for chunk in apart.split(16)]
    print(f"largest difference of an action, chunk by chunk: {', '.join(chunks)}")
    assert apart[:16].max() < 1e-5 * max(1.0, theirs.abs().max())
    assert apart[:STEPS].max() < 1e-3 * max(1.0, theirs.abs().max())


@pytest.mark.parametrize("engine", ["sync", "rtc"])
def test_the_rollout_drives_a_robot(tiny, tmp_path, monkeypatch, engine):
    import still_robot
    from lerobot.scripts import lerobot_rollout
    from lerobot_policy_pi0.__main__ import link

    kind, folder = tiny
    link(folder, tmp_path / "native")
    still_robot.TOLD.clear()
    arguments = [
        f"--policy.path={tmp_path / 'native'}",
        "--robot.type=still_robot",
        "--task=Transfer cube",
        "--duration=3",
        "--fps=20",
        "--device=cpu",
        "--play_sounds=false",
        "--return_to_initial_position=false",
        f"--inference.type={engine}",
        '--rename_map={"observation.images.top": "observation.images.base_0_rgb"}',
    ]
    monkeypatch.setattr(sys, "argv", ["lerobot-rollout", *arguments])
    lerobot_rollout.main()
    assert len(still_robot.TOLD) > 10
    assert all(set(action) == set(still_robot.JOINTS) for action in still_robot.TOLD)
    assert len({action["joint_0.pos"] for action in still_robot.TOLD}) > 5
