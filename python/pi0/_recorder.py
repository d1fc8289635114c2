"""`Recorder`: what an implementation computes, written down under the golden names."""

import json
import os
import struct
from collections.abc import Iterator, MutableMapping
from typing import Any

import numpy as np

from pi0._errors import DumpError

_TYPES = {
    "float32": "F32",
    "float16": "F16",
    "float64": "F64",
    "int64": "I64",
    "int32": "I32",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
    "uint32": "U32",
}

FORMATS = ("f32", "bf16", "tf32", "int8")


def to_numpy(value: Any) -> np.ndarray:
    """Anything that holds numbers, as an array of numpy: torch (bf16 too, from any device), JAX, TTNN by its torch tensor."""
    if hasattr(value, "detach"):  # torch, without importing it
        value = value.detach()
        if str(value.dtype) == "torch.bfloat16":
            value = value.float()
        value = value.cpu().numpy()
    array = np.asarray(value)
    if array.dtype.kind == "V" or str(array.dtype) == "bfloat16":  # ml_dtypes
        array = array.astype(np.float32)
    if array.dtype.kind == "u" and array.dtype.itemsize not in (1, 4):
        array = array.astype(np.int64)
    if array.dtype == np.int16:
        array = array.astype(np.int32)
    if str(array.dtype) not in _TYPES:
        raise DumpError(f"an array of {array.dtype} cannot be recorded; give real or whole numbers")
    return array


class Recorder(MutableMapping):
    """Intermediates of one inference, by name: `recorder["prefix.layer3.attn"] = array`.

    `docs/python.md` lists the names, their shapes and what the reference means by each. Record the inputs with `inputs`,
    what ran where with `ran`, and hand the recorder, or the file that `save` writes, to `judge`.
    """

    def __init__(
        self, *, format: "str | None" = None, num_steps: "int | None" = None, source: "str | None" = None
    ) -> None:
        if format is not None and format not in FORMATS:
            raise DumpError(f"format is {format!r}, wanted one of {', '.join(FORMATS)}")
        self.format = format
        self.num_steps = num_steps
        self.source = source
        self._arrays: "dict[str, np.ndarray]" = {}
        self._records: "list[dict[str, Any]]" = []

    def __setitem__(self, name: str, value: Any) -> None:
        if not isinstance(name, str) or not name:
            raise DumpError(f"a name is a string such as 'prefix.layer3.attn', got {name!r}")
        array = to_numpy(value)
        # A copy: the implementation may reuse its memory.
        self._arrays[name] = np.array(array, order="C", copy=True)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[name]

    def __delitem__(self, name: str) -> None:
        del self._arrays[name]

    def __iter__(self) -> "Iterator[str]":
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __repr__(self) -> str:
        return f"Recorder({len(self)} arrays, format={self.format!r})"

    def inputs(
        self,
        *,
        images: Any,
        tokens: Any,
        state: Any = None,
        noise: Any = None,
        image_masks: Any = None,
        token_masks: Any = None,
    ) -> None:
        """What goes into the network.

        `images`: for each camera `[B, 3, H, W]` in -1..1 (padding included); `image_masks`: for each camera `[B]`, or
        `[B, cameras]`; `tokens`, `token_masks`: `[B, L]`; `state`: `[B, state_dim]`; `noise`: `[B, horizon, action_dim]`.
        """
        images = list(images)
        for i, image in enumerate(images):
            self[f"inputs.image_{i}"] = image
        self["inputs.tokens"] = tokens
        robots = 1 if self["inputs.tokens"].ndim < 2 else self["inputs.tokens"].shape[0]
        if image_masks is None:
            image_masks = np.ones((robots, len(images)), np.uint8)
        elif isinstance(image_masks, (list, tuple)):
            masks = [to_numpy(mask).reshape(robots) for mask in image_masks]
            image_masks = np.stack(masks, axis=1) if masks else np.ones((robots, 0), np.uint8)
        self["inputs.image_mask"] = to_numpy(image_masks).astype(np.uint8)
        if token_masks is not None:
            self["inputs.token_mask"] = to_numpy(token_masks).astype(np.uint8)
        if state is not None:
            self["inputs.state"] = state
        if noise is not None:
            self["inputs.noise"] = noise

    def ran(
        self,
        op: str,
        module: str,
        place: str = "device",
        *,
        seconds: float = 0.0,
        transfer_seconds: float = 0.0,
        transfer_bytes: int = 0,
        bytes: int = 0,
        flop: int = 0,
    ) -> None:
        """Notes that an operation (`linear`, `attention`, `rope`, …) of `module` (`prefix.layer3`, or the name of an
        intermediate) ran on the `device` or on the `host`. Feeds the verdict's column, coverage and roadmap."""
        if place not in ("device", "host"):
            raise DumpError(f"place is {place!r}, wanted 'device' or 'host'")
        self._records.append(
            {
                "op": op,
                "module": module,
                "place": place,
                "seconds": float(seconds),
                "transfer_seconds": float(transfer_seconds),
                "transfer_bytes": int(transfer_bytes),
                "bytes": int(bytes),
                "flop": int(flop),
            }
        )

    def save(self, path: "str | os.PathLike[str]") -> None:
        """Writes a safetensors file that `judge` and `pi0 check MODEL --against FILE` read."""
        meta = {"made_by": "pi0.Recorder"}
        if self.format is not None:
            meta["format"] = self.format
        if self.num_steps is not None:
            meta["num_steps"] = str(int(self.num_steps))
        if self.source is not None:
            meta["source"] = str(self.source)
        if self._records:
            meta["records"] = json.dumps(self._records)
        header: "dict[str, Any]" = {"__metadata__": meta}
        start = 0
        for name, array in self._arrays.items():
            header[name] = {
                "dtype": _TYPES[str(array.dtype)],
                "shape": list(array.shape),
                "data_offsets": [start, start + array.nbytes],
            }
            start += array.nbytes
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(path, "wb") as file:
            file.write(struct.pack("<Q", len(text)))
            file.write(text)
            for array in self._arrays.values():
                file.write(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
