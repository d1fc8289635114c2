"""`load`: a checkpoint as a policy."""

import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, Sequence
from typing import Any

from pi0 import _native


def load(
    model: "str | os.PathLike[str]",
    *,
    device: str = "cpu",
    dtype: "str | None" = None,
    robot: str = "auto",
    default_prompt: "str | None" = None,
    steps: "int | None" = None,
    seed: "int | None" = None,
    strict: "Sequence[str]" = (),
    progress: "bool | Callable[[int, int], object]" = False,
    **options: Any,
) -> _native.Policy:
    """Loads a checkpoint onto a device.

    Every option of the command line that concerns a policy or a device is one here, under the same name: `tokenizer=`,
    `config=`, `asset_id=`, `threads=`, `isa=` and so on (`pi0 serve --help` lists them).

    `strict` names findings of the doctor (`docs/doctor.md`) that are a `StrictError`; others stand in the reply under
    `pi0/warnings`.

    `progress=True` writes how much is loaded to standard error; a function is called with bytes done and bytes in all.
    """
    given = dict(
        options, device=device, dtype=dtype, robot=robot, default_prompt=default_prompt, steps=steps, seed=seed
    )
    given["strict"] = strict if isinstance(strict, str) else ",".join(strict) or None
    if device == "tensix":
        _name_simulator_helper()
    return _native.load([os.fspath(model), *flags(given)], _reporter(progress))


def flags(options: "dict[str, Any]") -> "list[str]":
    """Options as the command line spells them."""
    args = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if value is None or value is False:
            continue
        if value is True:
            args.append(flag)
        elif name == "grid" and isinstance(value, tuple):
            args.append(f"{flag}={'x'.join(map(str, value))}")
        elif isinstance(value, (list, tuple)):
            args.append(f"{flag}={','.join(map(str, value))}")
        else:
            args.append(f"{flag}={os.fspath(value) if isinstance(value, os.PathLike) else value}")
    return args


def _reporter(progress: "bool | Callable[[int, int], object]") -> "Callable[[int, int], object] | None":
    if callable(progress):
        return progress
    if not progress:
        return None

    def show(done: int, total: int) -> None:
        end = "\n" if done >= total else ""
        print(f"\rloading {done / 1e9:.2f} of {total / 1e9:.2f} GB", end=end, file=sys.stderr, flush=True)

    return show


def _name_simulator_helper() -> None:
    """The simulator of Tenstorrent's chip runs in a process of its own, for which the script `pi0` serves."""
    if "PI0_TTSIM_HELPER" not in os.environ:
        beside = os.path.join(sysconfig.get_path("scripts"), "pi0")
        script = beside if os.path.isfile(beside) else shutil.which("pi0")
        if script:
            os.environ["PI0_TTSIM_HELPER"] = script
