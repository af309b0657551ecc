"""The one place that holds the version; read statically at build time, so it imports nothing."""

__version__ = "0.1.0"
