"""The errors a person sees: one line each that says what, found, rule and remedy. Entry points exit with code
2 on them."""

from __future__ import annotations

from typing import Self


class AgffError(Exception):
    """Something the person can mend; its text stands alone, without a traceback."""

    on_all_ranks = False
    """True when every rank raises the same error, so that one of them says it for all."""

    def shared(self) -> Self:
        """This error, raised by all ranks together."""
        self.on_all_ranks = True
        return self


class ConfigError(AgffError):
    """The configuration cannot run: an unknown, contradictory or out-of-range setting."""


class DataError(AgffError):
    """A data set, shard or sample is not what it must be; the text starts with its address."""


class StorageError(AgffError):
    """Bytes cannot be had now: network, disk, permission. No sample's fault: the run stops, no other sample
    is drawn."""


class TrainingError(AgffError):
    """Training cannot go on: the gradients stay not finite, or the memory is too small."""


class CheckpointError(AgffError):
    """A run folder, checkpoint or release is missing, half written or belongs to something else."""
