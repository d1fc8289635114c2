"""lerobot's own π0 and π0.5 in the sizes of a small checkpoint, for which lerobot itself has no option."""

import contextlib
import json
import shutil
import sys
import types

import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(ROOT / "golden"))


@contextlib.contextmanager
def sizes(arch):
    """Policies of lerobot's that are made here have these sizes."""
    import make_golden
    from lerobot.policies.pi0 import modeling_pi0
    from lerobot.policies.pi05 import modeling_pi05

    variants = {"gemma_2b": arch["gemma"], "gemma_300m": arch["expert"]}
    with contextlib.ExitStack() as undo:
        for home in (modeling_pi0, modeling_pi05):
            undo.callback(setattr, home, "get_gemma_config", home.get_gemma_config)
            home.get_gemma_config = lambda name: types.SimpleNamespace(**variants[name])
            undo.callback(
                make_golden.patch_sizes(
                    home, "PaliGemmaForConditionalGenerationWithPiGemma", "PiGemmaForCausalLM", arch
                )
            )
        yield


def reference(case):
    """lerobot's module in the sizes of a golden case, with its weights."""
    import make_golden

    arch = json.loads((ROOT / "golden" / case / "arch.json").read_text())
    made = make_golden.Ref("lerobot", "/nowhere", arch)
    weights = make_golden.load_checkpoint(ROOT / "golden" / case / "model.safetensors")
    made.load({name.removeprefix("model."): t for name, t in weights.items()})
    return made.model


# The pose in which gym-aloha begins, by its actions.
HOME = [0, -0.96, 1.16, 0, -0.3, 0, 0.5] * 2


def checkpoint(source, to):
    """A copy whose processors lerobot 0.6 reads: the path of the tokenizer is an option there, and no artifact. Its actions stay
    near the pose in which gym-aloha begins, where the simulation is stable."""
    shutil.copytree(source, to)
    tokenizer = to / "tokenizer"
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    (tokenizer / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **special})
    )
    path = to / "policy_preprocessor.json"
    processor = json.loads(path.read_text())
    for step in processor["steps"]:
        if step.pop("artifacts", None):
            step["config"]["tokenizer_name"] = str(tokenizer)
    path.write_text(json.dumps(processor))
    near = {"mean": 0.0, "std": 0.02, "q01": -0.04, "q99": 0.04}
    for path in to.glob("policy_*.safetensors"):
        stats = load_file(path)
        for name, away in near.items():
            if f"action.{name}" in stats:
                home = 0.0 if name == "std" else torch.tensor(HOME)
                stats[f"action.{name}"] = torch.full((len(HOME),), away) + home
        save_file(stats, path)
    return to
