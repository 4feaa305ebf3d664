"""The errors a person sees: one line each that says what, found, rule and remedy. Entry points exit with code 2 on them."""


class AgffError(Exception):
    """Something the person can mend; its text stands alone, without a traceback."""


class ConfigError(AgffError):
    """The configuration cannot run: an unknown, contradictory or out-of-range setting."""


class DataError(AgffError):
    """A data set, shard or sample is not what it must be; the text starts with its address."""


class CheckpointError(AgffError):
    """A run folder, checkpoint or release is missing, half written or belongs to something else."""
