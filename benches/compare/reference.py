#!/usr/bin/env python3
"""One reference implementation, loaded once, that runs inferences on demand: the counterpart of
`pi0 bench --on-demand`.

Prints one JSON line when loaded. Each line read is a JSON object {"inputs": FILE, "compiled": bool, "output": FILE or
null}; the answer is {"seconds": S, "private_bytes": B}. Ends with its input. `compare.py` starts it.
"""

import argparse
import json
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "golden"))
import make_golden


def arch_of(checkpoint):
    """True sizes of a shrunk checkpoint; the published ones otherwise."""
    shrunk = checkpoint / "arch.json"
    if shrunk.exists():
        return json.loads(shrunk.read_text())
    full = make_golden.PRESETS["full"]["arch"]
    pi05 = json.loads((checkpoint / "config.json").read_text()).get("type") == "pi05"
    return full | {"family": "pi05", "max_tokens": 200} if pi05 else full


def load(model, path):
    """Copies tensor by tensor from the mapped file, so that no second copy of the checkpoint is in memory."""
    import torch
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        stored = {name.removeprefix("model."): name for name in file.keys()}
        # Tied: a checkpoint may hold either name.
        stored.setdefault(make_golden.EMBED, stored.get(make_golden.LM_HEAD))
        stored.setdefault(make_golden.LM_HEAD, stored[make_golden.EMBED])
        for name, parameter in model.named_parameters(remove_duplicate=True):
            if name in stored:
                with torch.no_grad():
                    parameter.copy_(file.get_tensor(stored[name]))
            elif not name.endswith("gemma_expert.lm_head.weight"):  # unused, and absent from lerobot's files
                sys.exit(f"{path} lacks {name}")


def private_bytes():
    status = pathlib.Path("/proc/self/status")
    if not status.exists():
        return None
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    return 1024 * sum(int(fields[f].split()[0]) for f in ("RssAnon", "RssShmem"))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("impl", choices=["openpi", "lerobot"])
    p.add_argument("checkout")
    p.add_argument("checkpoint", type=pathlib.Path)
    p.add_argument("--precision", choices=["bfloat16", "float32"], default="bfloat16")
    p.add_argument("--threads", type=int, required=True)
    p.add_argument("--compile-mode", default="default", help="torch.compile's mode")
    o = p.parse_args()

    import torch
    from safetensors.torch import load_file

    torch.set_num_threads(o.threads)
    start = time.perf_counter()
    ref = make_golden.Ref(o.impl, o.checkout, arch_of(o.checkpoint), o.precision)
    load(ref.model, o.checkpoint / "model.safetensors")
    if o.impl == "openpi" and o.precision == "bfloat16":
        torch.set_float32_matmul_precision("high")  # as its constructor does; Ref takes it back for golden data
    eager = ref.model.sample_actions
    compiled = torch.compile(eager, mode=o.compile_mode)
    version = torch.__version__
    print(json.dumps({"seconds": time.perf_counter() - start, "torch": version}), flush=True)
    for line in sys.stdin:
        call = json.loads(line)
        inputs = load_file(call["inputs"])
        ref.model.sample_actions = compiled if call["compiled"] else eager
        with torch.inference_mode(not call["compiled"]), torch.no_grad():
            start = time.perf_counter()
            actions = ref.sample(inputs)
            seconds = time.perf_counter() - start
        if call.get("output"):
            make_golden.save({"actions": actions.float().contiguous()}, call["output"])
        print(json.dumps({"seconds": seconds, "private_bytes": private_bytes()}), flush=True)


if __name__ == "__main__":
    main()
