"""The one exception that jrope raises for bad input."""


class JropeError(ValueError):
    """Bad input: the message says what was got, what was wanted and what to do."""
