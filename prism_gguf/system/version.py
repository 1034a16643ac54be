"""The version of this package: in results, in new files, and in the wheel."""

__version__ = "0.1.0"
