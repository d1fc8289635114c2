#!/usr/bin/env python3
"""Shrink golden outputs for the repository: drop tensors that repeat a module already covered.

    python trim.py CASE/RUN.outputs.safetensors 'REGEX' ...

removes every tensor whose name matches one of the regular expressions, in place. No dependencies.
"""

import json
import re
import struct
import sys


def main(path, patterns):
    data = open(path, "rb").read()
    (size,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    kept, out = {}, bytearray()
    for name in sorted(header):
        if name == "__metadata__" or any(re.fullmatch(p, name) for p in patterns):
            continue
        begin, end = header[name]["data_offsets"]
        kept[name] = header[name] | {"data_offsets": [len(out), len(out) + end - begin]}
        out += body[begin:end]
    text = json.dumps(kept, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    open(path, "wb").write(struct.pack("<Q", len(text)) + text + out)
    print(f"{path}: {len(kept)} of {len(header)} tensors, {len(data)} -> {8 + len(text) + len(out)} bytes")


main(sys.argv[1], sys.argv[2:])
