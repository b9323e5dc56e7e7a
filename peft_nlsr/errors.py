"""The errors this package raises on purpose: one family, so that a caller can catch all of them or one kind.

Wrong arguments (an unknown choice, a number out of range) are plain ``ValueError``.
"""


class PeftNLSRError(Exception):
    """Base class. The text says what was found, what was expected, where, and what to do next."""


class UnsupportedAdapterError(PeftNLSRError):
    """The adapter uses a PEFT feature whose update cannot be edited safely; the feature and the module are named."""


class IncompatibleError(PeftNLSRError):
    """Two things that must fit do not: adapter and patch, adapter and reference, statistics and adapter."""


class LineageError(IncompatibleError):
    """Entry-wise edits were asked for, but the adapter was not trained from the reference's factors."""


class CorruptFileError(PeftNLSRError):
    """A file is truncated, misses tensors, or holds NaN or infinite values."""


class CalibrationError(PeftNLSRError):
    """The calibration data cannot give statistics: empty, no usable tokens, or a module that never ran."""
