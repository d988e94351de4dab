"""Errors a user can cause. Each carries one sentence: what was wrong (with the value) and what to do."""


class SpecgateError(RuntimeError):
    """Base of every error that is the input's fault rather than the program's."""


class UnknownArchitectureError(SpecgateError):
    """The host model's architecture has no adapter, or its implementation is known to be broken."""


class TraceError(SpecgateError):
    """A routing trace is missing, incomplete, corrupted or of another shape than asked for."""


class TextError(SpecgateError):
    """Text to trace or to train on is missing, empty or undecodable."""


class CheckpointError(SpecgateError):
    """A predictor checkpoint is missing, truncated, poisoned or made for other traces."""


class ConfigError(SpecgateError):
    """A configuration value makes no sense."""


class NotApplicableError(ConfigError):
    """A choice makes sense, but not for this trace or without more settings: a sweep passes over it."""


class StoreError(SpecgateError):
    """The expert store met a damaged file, was refused memory, or was used after closing."""


class BudgetError(StoreError):
    """The memory budget holds fewer experts than one layer needs at once."""
