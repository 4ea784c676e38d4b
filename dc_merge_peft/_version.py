"""The version, in one place that nothing else has to be imported for."""

__version__ = "0.1.0"
"""The version of this library, which every output records."""
