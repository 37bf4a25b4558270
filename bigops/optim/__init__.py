"""Optimizers: torch's own classes with a faster step; state dicts are interchangeable."""

from .adam import Adam, AdamW

__all__ = ["Adam", "AdamW"]
