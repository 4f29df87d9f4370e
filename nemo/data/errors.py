"""The one error that data raises at a user; catching it costs no import (ours)."""


class DataError(ValueError):
    """What is wrong with a data set, prepared folder or subset: one line, with what is accepted."""
