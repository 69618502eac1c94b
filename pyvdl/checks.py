"""Checks of arguments, whose errors name the argument and what is wanted."""

from __future__ import annotations

import numbers

import numpy as np


def whole(name: str, value: object, least: int, most: int = (1 << 31) - 1) -> int:
    """`value` as an int; NumPy's integers pass, floats and truth values do not."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be a whole number, not {value!r}")
    number = int(value)
    if number < least:
        raise ValueError(f"{name} must be at least {least}, not {number}")
    if number > most:
        raise ValueError(f"{name} must be at most {most}, not {number}")
    return number


def real(name: str, value: object) -> float:
    """`value` as a float; whole numbers pass, truth values do not."""
    if type(value) is float:  # of the numbers that millions of clips bring
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, not {value!r}")
    return float(value)


def has_length(value: object, length: int) -> bool:
    return isinstance(value, tuple | list | np.ndarray) and len(value) == length


def choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, not {value!r}")
