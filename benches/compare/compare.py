#!/usr/bin/env python3
"""pi0 against openpi's PyTorch and lerobot's pi0 or pi0.5: same checkpoint, same inputs, one machine, alternately.

Every program is loaded and warm before the clock starts; then they take turns, one inference each, so that a change of
the machine's speed hits all of them. Reports seconds, ratios, private memory and the distance of the actions from f32.
See README.md for the environments.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "golden"))
import make_golden
from reference import arch_of

# The same limit for PyTorch's matrix products; what it computes outside oneDNN may use more.
ONEDNN_ISA = {
    "avx2": "AVX2",
    "avx2-vnni": "AVX2_VNNI",
    "avx512": "AVX512_CORE",
    "avx512-vnni": "AVX512_CORE_VNNI",
    "avx512-bf16": "AVX512_CORE_BF16",
    "amx": "AVX512_CORE_AMX",
}


class Worker:
    """A program that runs one inference for each line it is sent."""

    def __init__(self, command, environment=None):
        self.command = [str(c) for c in command]
        self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)

    def read(self):
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{' '.join(self.command)} ended with {self.process.wait()}")
        return line.strip()

    def ask(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.read()

    def close(self):
        self.process.stdin.close()
        self.process.stdout.read()
        if self.process.wait() != 0:
            sys.exit(f"{' '.join(self.command)} failed")


class Ours:
    def __init__(self, o, case, dtype):
        self.name, self.output = f"pi0 {dtype}", o.out / f"{case}.pi0-{dtype}.safetensors"
        self.json = o.out / f"{case}.pi0-{dtype}.json"
        self.worker = Worker(
            [o.pi0, "bench", o.checkpoint, "--dtype", dtype, "--threads", o.threads, "--inputs", inputs_of(o, case)]
            + ["--golden", golden_of(o, case), "--output", self.output, "--json", self.json, "--on-demand"]
            + (["--isa", o.isa] if o.isa else [])
        )
        assert self.worker.read() == "ready"

    def run(self):
        return float(self.worker.ask(""))

    def close(self):
        self.worker.close()
        report = json.loads(self.json.read_text())
        self.memory = report["memory_running"]


class Reference:
    """Eager and compiled forms share one process and its weights."""

    def __init__(self, o, impl, precision="bfloat16"):
        python, checkout = (o.openpi_python, o.openpi) if impl == "openpi" else (o.lerobot_python, o.lerobot)
        command = [python, HERE / "reference.py", impl, checkout, o.checkpoint, "--precision", precision]
        environment = os.environ | ({"ONEDNN_MAX_CPU_ISA": ONEDNN_ISA[o.isa]} if o.isa else {})
        self.worker = Worker(command + ["--threads", o.threads, "--compile-mode", o.compile_mode], environment)
        self.versions = json.loads(self.worker.read())

    def ask(self, inputs, compiled=False, output=None):
        call = {"inputs": str(inputs), "compiled": compiled, "output": str(output) if output else None}
        return json.loads(self.worker.ask(json.dumps(call)))


class Form:
    """One form of a reference on one case."""

    def __init__(self, o, case, reference, name, compiled):
        self.name, self.reference, self.compiled, self.inputs = name, reference, compiled, inputs_of(o, case)
        self.output = o.out / f"{case}.{name.replace(' ', '-')}.safetensors"
        self.warm_up()

    def warm_up(self):
        """Twice: the first call compiles."""
        for _ in range(2):
            self.memory = self.reference.ask(self.inputs, self.compiled, self.output)["private_bytes"]

    def run(self):
        return self.reference.ask(self.inputs, self.compiled)["seconds"]

    def close(self):
        pass


def inputs_of(o, case):
    return o.out / f"{case}.inputs.safetensors"


def golden_of(o, case):
    return o.out / f"{case}.golden.safetensors"


def write_inputs(o, case):
    """CAMERAS:TOKENS, such as 3:20."""
    cameras, tokens = map(int, case.split(":"))
    run = make_golden.run(case, [[int(c < cameras) for c in range(3)]], 1, [tokens])
    make_golden.save(make_golden.make_inputs(arch_of(o.checkpoint), run, 0), inputs_of(o, case))


def write_goldens(o):
    """f32 actions: openpi's own, or pi0's with every operation checked against the scalar reference."""
    missing = [case for case in o.cases if not golden_of(o, case).exists()]
    if not missing:
        return
    if o.golden == "openpi":
        reference = Reference(o, "openpi", "float32")
        for case in missing:
            reference.ask(inputs_of(o, case), output=golden_of(o, case))
        return reference.worker.close()
    for case in missing:
        command = [o.pi0, "bench", o.checkpoint, "--dtype", "f32", "--threads", o.threads, "--repeat", 1]
        command += ["--inputs", inputs_of(o, case), "--output", golden_of(o, case)]
        subprocess.run([str(c) for c in command], check=True)


def distance(path, golden):
    """Mean and largest absolute difference, and correlation."""
    from safetensors.numpy import load_file

    got, want = (load_file(p)["actions"].astype("float64").ravel() for p in (path, golden))
    error = abs(got - want)
    spread = lambda x: x - x.mean()
    pcc = (spread(got) * spread(want)).sum() / ((spread(got) ** 2).sum() * (spread(want) ** 2).sum()) ** 0.5
    return {"mean": error.mean(), "max": error.max(), "pcc": pcc}


def measure(o, case, systems):
    """Alternates, starting each round with another system."""
    if o.wait:
        input(f"{case}: loaded and warm; press Enter when the machine is quiet ")
    seconds = {s.name: [] for s in systems}
    for i in range(o.rounds):
        for s in systems[i % len(systems) :] + systems[: i % len(systems)]:
            seconds[s.name].append(s.run())
            print(f"  {case} {s.name}: {seconds[s.name][-1]:.3f} s", file=sys.stderr, flush=True)
    if o.wait:
        print("measured", flush=True)
    for s in systems:
        s.close()
    rows = []
    for s in systems:
        times = seconds[s.name]
        row = {"case": case, "system": s.name, "seconds": times, "median": statistics.median(times), "min": min(times)}
        rows.append(row | {"private_bytes": s.memory, "error": distance(s.output, golden_of(o, case))})
    return rows


def table(rows):
    print(f"{'case':6} {'system':18} {'min s':>8} {'median':>8} {'ratio':>7} {'GiB':>6} {'mean err':>9} {'max err':>9} {'pcc':>9}")
    for r in rows:
        ours = next((x for x in rows if x["case"] == r["case"] and x["group"] == r["group"] and x["system"] == "pi0 bf16"), r)
        ratio = r["median"] / ours["median"]
        memory = f"{r['private_bytes'] / 2**30:6.2f}" if r["private_bytes"] else "     ?"
        e = r["error"]
        print(f"{r['case']:6} {r['system']:18} {r['min']:8.3f} {r['median']:8.3f} {ratio:6.2f}x {memory} {e['mean']:9.5f} {e['max']:9.5f} {e['pcc']:9.6f}")
    print("ratio: time over that of pi0 bf16, measured in turns with it; errors: actions against f32")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("checkpoint", type=pathlib.Path, help="directory that all systems load")
    p.add_argument("--pi0", default="target/release/pi0")
    p.add_argument("--openpi", help="checkout of openpi")
    p.add_argument("--openpi-python", help="python of its environment")
    p.add_argument("--lerobot", help="checkout of lerobot")
    p.add_argument("--lerobot-python", help="python of its environment")
    p.add_argument("--out", type=pathlib.Path, required=True, help="folder for inputs, actions and results")
    p.add_argument("--cases", nargs="+", default=["3:20", "2:12"], help="cameras:tokens")
    p.add_argument("--dtypes", nargs="+", default=["bf16", "int8"], choices=["f32", "bf16", "int8"])
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--threads", type=int, required=True, help="threads of every system")
    p.add_argument("--isa", choices=list(ONEDNN_ISA), help="instruction set that all systems may use at most, to stand in for an older processor")
    p.add_argument("--compile-mode", default="default", help="torch.compile's mode for openpi; none to leave it out")
    p.add_argument("--golden", choices=["openpi", "pi0"], default="openpi", help="whose f32 actions; openpi's take 14 GB")
    p.add_argument("--wait", action="store_true", help="wait for Enter before each group of timed runs")
    o = p.parse_args()
    o.out.mkdir(parents=True, exist_ok=True)
    for case in o.cases:
        write_inputs(o, case)
    write_goldens(o)
    rows = []
    for impl in ("openpi", "lerobot"):
        if not getattr(o, impl):
            continue
        forms = [(f"{impl} eager", False)]
        if impl == "openpi" and o.compile_mode != "none":
            forms.append((f"{impl} compiled", True))
        reference = Reference(o, impl)
        for case in o.cases:
            systems = [Form(o, case, reference, name, compiled) for name, compiled in forms]
            # lerobot's programs and ours together would not fit where openpi's do.
            systems = [Ours(o, case, d) for d in (o.dtypes if impl == "openpi" else ["bf16"])] + systems
            rows += [r | {"group": impl, "versions": reference.versions} for r in measure(o, case, systems)]
            (o.out / "results.json").write_text(json.dumps(rows, indent=1) + "\n")
        reference.worker.close()
    table(rows)


if __name__ == "__main__":
    main()
