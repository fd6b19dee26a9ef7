"""One check that the layers share."""

from pondera.errors import BadInput


def require_counts(who: str, **values: object) -> None:
    """Raise BadInput unless every value is a whole number of at least 1.

    >>> require_counts("Layer", in_features=3)
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise BadInput(f"{who} needs {name} of at least 1, a whole number, got {value!r}")
