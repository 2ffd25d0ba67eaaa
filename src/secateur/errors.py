"""The one family of errors that Secateur raises on purpose.

Every message says what was expected, what was found, where (module path or file) and what to do next, so that
the command line can print it on one line and stop.
"""


class SecateurError(Exception):
    """Base of all errors a user can cause or mend."""


class SourceError(SecateurError):
    """A model could not be found, opened or recognised."""


class DataError(SecateurError):
    """Images or texts are missing, unreadable or too few."""


class AnatomyError(SecateurError):
    """A model could not be traced, or a group does not exist or cannot be cut."""


class BudgetError(SecateurError):
    """A budget is malformed or cannot be reached."""


class PlanError(SecateurError):
    """A plan is malformed, or belongs to another model."""


class ArtifactError(SecateurError):
    """A saved folder is damaged, unsafe or cannot be written."""


class RegistryError(SecateurError):
    """A name is not registered, or is registered twice."""


class SecateurWarning(UserWarning):
    """Something a user should know that does not stop the work; the command line prints it as a note."""


def reason(error: BaseException) -> str:
    """The first line of what other code says went wrong."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text[:160]}" if text else type(error).__name__
