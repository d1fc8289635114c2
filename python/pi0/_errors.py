"""The exceptions of pi0. Their texts are those of the command line."""


class Error(Exception):
    """Anything that pi0 refuses or fails at."""


class CheckpointError(Error, ValueError):
    """A checkpoint, or a file beside it, that cannot be read or is not what it should be."""


class OptionError(Error, ValueError):
    """An option that does not exist, or a value that it cannot have."""


class ObservationError(Error, ValueError):
    """An observation that this policy cannot act on: what came, and what was wanted."""


class InputError(Error, ValueError):
    """Model tensors or actions of a wrong shape, type or size."""


class DeviceError(Error, RuntimeError):
    """The device cannot be opened, refused an operation, or failed."""


class NotFiniteError(Error, ArithmeticError):
    """The network's result is NaN or infinite; it must not reach a robot."""


class DumpError(Error, ValueError):
    """A dump that cannot be judged: unreadable, or without what a judgement needs."""


class AnswerError(Error, ArithmeticError):
    """An answer of π0-FAST from which no actions may be read."""


class StrictError(Error, ValueError):
    """A finding of the doctor that `strict=` names: the observation is refused, or its answer withheld."""


class InternalError(Error, RuntimeError):
    """A defect of pi0. Please report it."""


class ObservationWarning(UserWarning):
    """An observation that can be used, but perhaps not as it was meant."""
