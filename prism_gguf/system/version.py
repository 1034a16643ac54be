"""The version of this package: in results, in files that were made, and in the wheel."""

__version__ = "0.1.0"
