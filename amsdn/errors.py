"""The one kind of error that a user of AMSDN is meant to read."""


class InputError(ValueError):
    """Something handed to AMSDN cannot be used.

    The message is one line that says what is wrong, where, and what to do about it. The command line
    prints it on stderr without a traceback and exits with code 2.
    """


class ThreatViolation(RuntimeError):
    """An attack returned an image outside its threat model: a bug in the attack, never clipped away."""
