#!/usr/bin/env python3
"""tokens/fast.json from what make_tokens.py writes, and π0-FAST's prompts into tokens/prompts.json.

    python merge_tokens.py DIR/tokens tokens

Chunks of actions are written once, in `pool`, and a chunk of zeros is the number 0. No dependencies.
"""

import json
import pathlib
import sys


def main(source, target):
    read = lambda name: json.loads((pathlib.Path(source) / name).read_text())  # noqa: E731
    cases, openpi, lerobot = read("cases.json"), read("openpi.json"), read("lerobot.json")
    out = {}
    for name, o in openpi["fast"].items():
        le = lerobot["fast"][name]
        encode, decode, extract = {}, {}, {}
        for k, v in o["encode"].items():
            assert v["codes"] == le["encode"][k]["codes"] and v["decoded"] == le["encode"][k]["decoded"], (name, k)
            chunk = cases["chunks"][name][k.split(".")[0]]
            encode[k] = {"chunk": chunk, "symbols": v["symbols"], "codes": v["codes"], "decoded": v["decoded"]}
        for k, v in o["decode"].items():
            r = le["decode"][k]["decoded"]
            strict, relaxed = (r["strict"], r["relaxed"]) if isinstance(r, dict) else (r, r)
            assert strict == v["decoded"], (name, k)
            decode[k] = {"codes": v["codes"], "strict": strict, "relaxed": relaxed}
            decode[k] |= {"steps": v["steps"]} if "steps" in v else {}
        for k, v in openpi["extract"][name].items():
            r = lerobot["extract"][name][k]
            extract[k] = {
                "tokens": v["tokens"], "codes": v["codes"], "text": v["text"], "openpi": v.get("actions", v.get("error")),
                "lerobot_tokens": r["tokens"], "checked": r.get("actions", r.get("checked")),
                "unchecked": r.get("actions", r.get("unchecked")),
            }  # fmt: skip
        out[name] = {"encode": encode, "decode": decode, "extract": extract}
    pool, index = [], {}

    def zero(x):
        return isinstance(x, float) and x == 0.0

    def share(x):
        if isinstance(x, dict):
            return {k: share(v) for k, v in x.items()}
        if not (isinstance(x, list) and x and isinstance(x[0], list)):
            return x
        value = 0 if all(zero(y) for row in x for y in row) else [[round(y, 9) for y in row] for row in x]
        if value == 0:
            return 0
        key = json.dumps(value)
        if key not in index:
            index[key] = len(pool)
            pool.append(value)
        return {"ref": index[key]}

    shared = share(out)
    text = json.dumps({"pool": pool, "cases": shared}, separators=(",", ":"), ensure_ascii=False)
    (pathlib.Path(target) / "fast.json").write_text(text + "\n")
    prompts = pathlib.Path(target) / "prompts.json"
    rows = json.loads(prompts.read_text())
    for row, a, b in zip(rows, openpi["prompts"], lerobot["prompts"]):
        assert row["name"] == f"{a['prompt']}/{a['state']}" == f"{b['prompt']}/{b['state']}"
        row["openpi"]["pi0_fast"] = a["pi0_fast"]
        row["lerobot"] |= {"pi0_fast": b["pi0_fast"], "pi0_fast_text": b["pi0_fast_text"]}
    lines = (json.dumps(row, separators=(",", ":"), ensure_ascii=False) for row in rows)
    prompts.write_text("[\n" + ",\n".join(lines) + "\n]\n")


main(*sys.argv[1:])
