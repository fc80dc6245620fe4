"""Errors that the user can mend, as distinct from faults of this package."""


class UserError(ValueError):
    """Something that the user asked for cannot be done; the message says what was found and what to do."""


class MissingPackageError(UserError, ImportError):
    """An optional package is missing; the message says how to install it."""
