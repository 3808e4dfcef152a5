"""Numbers that a model's configuration may have."""

import math


def check_numbers(config, counts: tuple[str, ...], factors: tuple[str, ...]) -> None:
    """Raises ValueError for the first field of `config` with a number that no model can have.

    Args:
      counts: fields that hold a whole number of at least 1, or a tuple of them.
      factors: fields that hold a finite number above 0, or None where they may be left out.
    """
    for name in counts:
        value = getattr(config, name)
        if any(item < 1 for item in (value if isinstance(value, tuple) else (value,))):
            raise ValueError(f"{name}={value} must be at least 1.")
    for name in factors:
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name}={value} must be above 0 and finite.")
