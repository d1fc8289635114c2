"""`judge`: is an implementation of π0 right, and if not, why?"""

import json
import os
import tempfile
from dataclasses import dataclass, field
from typing import Any

from pi0 import _native
from pi0._recorder import Recorder


@dataclass(frozen=True)
class Cause:
    """A known mistake that makes a difference vanish when it is made on the reference."""

    name: str
    what: str
    at: str
    before: float
    after: float
    alternatives: "tuple[str, ...]" = ()
    within_tolerance: bool = False


@dataclass(frozen=True)
class Tap:
    """One intermediate against the reference's."""

    name: str
    passed: bool
    pcc: "float | None"
    relative_l2: "float | None"
    max_abs: "float | None"
    tolerance: float
    error: "str | None" = None
    place: "str | None" = None
    explained_l2: "float | None" = None


@dataclass(frozen=True)
class Verdict:
    """What `judge` found. `print` it for the table; `causes` has what explains the differences."""

    passed: bool
    first: "str | None"
    taps: "tuple[Tap, ...]"
    causes: "tuple[Cause, ...]"
    unexplained: "str | None"
    notes: "tuple[str, ...]"
    format: str
    coverage: "dict[str, Any] | None" = None
    json: str = field(default="", repr=False)
    _text: str = field(default="", repr=False)
    _html: str = field(default="", repr=False)

    def __bool__(self) -> bool:
        return self.passed

    def __str__(self) -> str:
        return self._text

    def __getitem__(self, name: str) -> Tap:
        for tap in self.taps:
            if tap.name == name:
                return tap
        raise KeyError(name)

    def html(self, path: "str | os.PathLike[str]") -> None:
        """Writes the verdict as one self-contained page."""
        with open(path, "w", encoding="utf-8") as file:
            file.write(self._html)


def judge(
    checkpoint: "str | os.PathLike[str]",
    dump: "str | os.PathLike[str] | Recorder",
    *,
    format: "str | None" = None,
) -> Verdict:
    """Compares a dump, or what a recorder holds, with the reference on the same inputs.

    `format` is where the implementation rounds (f32, bf16, tf32, int8) and sets the tolerances; by default what the dump
    says, else bf16.
    """
    if isinstance(dump, Recorder):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "dump.safetensors")
            dump.save(path)
            return judge(checkpoint, path, format=format)
    text, table, page = _native.judge(os.fspath(checkpoint), os.fspath(dump), format)
    found = json.loads(text)
    taps = tuple(
        Tap(
            t["name"],
            t["passed"],
            t["pcc"],
            t["relative_l2"],
            t["max_abs"],
            t["bound"],
            t["error"],
            t["place"],
            t["explained_l2"],
        )
        for t in found["taps"]
    )
    causes = tuple(
        Cause(c["name"], c["what"], c["at"], c["before"], c["after"], tuple(c["or"]), c["within_tolerance"])
        for c in found["causes"]
    )
    return Verdict(
        found["passed"],
        found["first"],
        taps,
        causes,
        found["unexplained"],
        tuple(found["notes"]),
        found["format"],
        found["coverage"],
        text,
        table,
        page,
    )
