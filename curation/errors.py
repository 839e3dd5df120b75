"""The errors that Seedbed raises, drawn once.

    SeedbedError
    ├── UserError               the user's input or config is wrong: exit status 2, one message, no traceback
    │   ├── ConfigError         a config file or an option: unknown key, wrong type, impossible combination
    │   ├── InputError          data that is missing, empty, unreadable or of the wrong kind
    │   ├── DamagedFileError    a tar or Parquet file that cannot be read to its end; ingest rejects it
    │   ├── OutputMismatchError the output folder holds the work of another config or input, or of a run that goes on
    │   ├── RejectBudgetError   more images were rejected than `max_reject_fraction` allows
    │   ├── WeightsError        a checkpoint does not fit the model: keys, shapes, hash, or the file itself
    │   └── DeviceError         a device or package was asked for that is not here
    ├── TrainingError           the numbers of a training run are not finite any more: exit status 1
    ├── ShardError              a worker failed on a shard; names the stage and the shard: exit status 1
    └── images.ImageRejected    one image cannot be used; ingest turns it into a row of the rejects

A message says what is wrong, the value found, where, and what to do.
"""


class SeedbedError(Exception):
    """Any error that Seedbed raises on purpose."""


class UserError(SeedbedError, ValueError):
    """The user's input or config is wrong. Commands print the message and exit with status 2."""


class ConfigError(UserError):
    """A config file or an option is wrong. The message lists every problem found, not only the first."""


class InputError(UserError):
    """Input data is missing, empty, unreadable or of the wrong kind."""


class DamagedFileError(UserError):
    """A tar or Parquet file cannot be read to its end. Ingest turns it into a row of the rejects table."""


class OutputMismatchError(UserError):
    """The output folder holds the work of another config or of other inputs, or of a run that goes on."""


class RejectBudgetError(UserError):
    """More images were rejected than the stage's `max_reject_fraction` allows."""


class WeightsError(UserError):
    """A checkpoint does not fit the model."""


class DeviceError(UserError):
    """A device or a package was asked for that this machine does not have."""


class TrainingError(SeedbedError):
    """Training cannot go on: its numbers are not finite any more."""


class ShardError(SeedbedError):
    """A worker failed on one shard. The message names the stage, the shard and the cause."""
