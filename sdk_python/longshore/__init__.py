"""Longshore's SDK: one call that device, edge or core answers."""

__version__ = "0.1.0"
