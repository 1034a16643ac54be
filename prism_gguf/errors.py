"""What can go wrong, said in one line: what was wrong, where, and what to do about it."""

from __future__ import annotations


class PrismGgufError(Exception):
    """Base of every error that this package raises on purpose."""


class InvalidModelError(PrismGgufError):
    """A file or checkpoint that cannot be read as a causal language model."""


class IncompatibleModelsError(PrismGgufError):
    """A reference and a candidate that cannot be compared (vocabulary, tokenizer, hidden width)."""


class InvalidTextError(PrismGgufError):
    """Evaluation text that is missing, unreadable or too short."""


class RuntimeFailureError(PrismGgufError):
    """A model that was loaded but did not run: a failed decode, undefined hidden states, a crashed process."""


class UndefinedMetricError(PrismGgufError):
    """A quantity that has no value for the given data, such as the similarity to an all-zero matrix."""


class InvalidCaptureError(PrismGgufError):
    """A capture that is none, is damaged, or whose model has gone."""


class InvalidGateError(PrismGgufError):
    """A limit that names no number of the result, or cannot be read."""


class InvalidProfileError(PrismGgufError):
    """A quantization profile that names unknown types or misses required keys."""


class InvalidRecipeError(PrismGgufError):
    """A recipe that cannot be read, or that llama.cpp cannot follow for this base."""


class InvalidImatrixError(PrismGgufError):
    """An importance matrix that is none, is damaged, or belongs to another model."""


class InvalidOutputError(PrismGgufError):
    """A file that exists already, or cannot be written where it should be."""


class InvalidBudgetError(PrismGgufError):
    """A size that cannot be read."""


class OverBudgetError(PrismGgufError):
    """A file that was not made because it would be too large."""


class InvalidSensitivityError(PrismGgufError):
    """A sensitivity file that is none, or belongs to another model."""


class MissingPackageError(PrismGgufError, ImportError):
    """A package that is asked for only where it is used, and is not installed."""


class InfeasibleBudgetError(PrismGgufError):
    """A budget that no choice of types keeps; the message names the smallest feasible one."""


class InvalidAdapterError(PrismGgufError):
    """A LoRA adapter that cannot be read, or belongs to another model."""


class InvalidResultError(PrismGgufError):
    """A stored result cannot be read, or results cannot be put together."""
