"""π0, the robot policy, on the hardware at hand.

`load` opens a checkpoint as a policy that openpi's and lerobot's programs take; `record`, `Recorder` and `judge` tell whether
any other implementation computes the same network, and where it departs. `docs/python.md` is the manual.
"""

from pi0._errors import (
    AnswerError,
    CheckpointError,
    DeviceError,
    DumpError,
    Error,
    InputError,
    InternalError,
    NotFiniteError,
    ObservationError,
    ObservationWarning,
    OptionError,
    StrictError,
)
from pi0._judge import Verdict, judge
from pi0._load import load
from pi0._native import Inputs, Model, Policy, __version__
from pi0._recorder import Recorder
from pi0._torch import record

__all__ = [
    "AnswerError",
    "CheckpointError",
    "DeviceError",
    "DumpError",
    "Error",
    "InputError",
    "Inputs",
    "InternalError",
    "Model",
    "NotFiniteError",
    "ObservationError",
    "ObservationWarning",
    "OptionError",
    "Policy",
    "Recorder",
    "StrictError",
    "Verdict",
    "__version__",
    "judge",
    "load",
    "record",
]
