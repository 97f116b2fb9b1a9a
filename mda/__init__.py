"""A local delivery agent and the terminal message service of RFC 821."""

__version__ = "0.1.0"
