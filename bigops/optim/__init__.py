"""Optimizers: torch's own classes with a faster step; state dicts are interchangeable."""

from .adam import Adam, AdamW
from .sgd import SGD

__all__ = ["SGD", "Adam", "AdamW"]
