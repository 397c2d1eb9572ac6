"""Every error Bitknap raises on purpose.

BitknapError                  one line: what, the value, the limit, the remedy
├── InputError (ValueError)   an argument, a text or a name that cannot be used
├── FileError (ValueError)    a file that is missing, truncated, corrupt or of another version
├── ModelError (ValueError)   a model that cannot be walked, read or calibrated
├── DeviceMemoryError         a device's memory does not hold the least that must run on it
├── MismatchError             two things that do not belong together: a plan and another model
└── InfeasibleError           no plan satisfies the limits; says the smallest reachable value
"""

from __future__ import annotations


class BitknapError(Exception):
    """Base of all errors raised on purpose; the CLI prints it as one line and exits with 2."""


class InputError(BitknapError, ValueError):
    """An argument, a text or a name that cannot be used."""


class FileError(BitknapError, ValueError):
    """A file that is missing, truncated, corrupt, or of an unknown version."""


class ModelError(BitknapError, ValueError):
    """A model that cannot be walked, read, or calibrated."""


class DeviceMemoryError(BitknapError):
    """A device's memory does not hold the least that must run on it."""


class MismatchError(BitknapError):
    """Two things that do not belong together, such as a plan and another model."""


class InfeasibleError(BitknapError):
    """No plan satisfies the limits."""


class BitknapWarning(UserWarning):
    """What a caller should know of work that goes on; the CLI prints it as one line."""
