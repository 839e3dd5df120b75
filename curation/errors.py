"""The errors that Seedbed raises, as a tree.

    SeedbedError
    ├── UserError               the user's input or config is wrong: exit status 2, one message, no traceback
    │   ├── ConfigError         a config file or an option: unknown key, wrong type, impossible combination
    │   ├── InputError          input data is missing, empty, unreadable or of the wrong kind
    │   ├── DamagedFileError    a tar or Parquet file cannot be read to its end; ingest rejects it
    │   ├── OutputMismatchError the output folder holds other files, or the work of another config, input or process
    │   ├── RejectBudgetError   more images were rejected than `max_reject_fraction` allows
    │   ├── WeightsError        a checkpoint does not fit the model: keys, shapes, hash, or the file itself
    │   └── DeviceError         a requested device or package is missing on this machine
    ├── TrainingError           the loss or gradients of a training run are not finite: exit status 1
    ├── ShardError              a worker failed on a shard; names the stage and the shard: exit status 1
    └── ImageRejected           (images/decode.py) an image cannot be used; ingest writes it to the rejects

A message states the problem, the value, its location and the remedy.
"""


class SeedbedError(Exception):
    """Any error that Seedbed raises on purpose."""


class UserError(SeedbedError, ValueError):
    """The user's input or config is wrong. Commands print the message and exit with status 2."""


class ConfigError(UserError):
    """A config file or an option is wrong. The message lists every problem, not only the first."""


class InputError(UserError):
    """Input data is missing, empty, unreadable or of the wrong kind."""


class DamagedFileError(UserError):
    """A tar or Parquet file cannot be read to its end. Ingest writes it to the rejects."""


class OutputMismatchError(UserError):
    """The output folder holds other files, or the work of another config, input or running process."""


class RejectBudgetError(UserError):
    """More images were rejected than the stage's `max_reject_fraction` allows."""


class WeightsError(UserError):
    """A checkpoint does not fit the model."""


class DeviceError(UserError):
    """A requested device or package is missing on this machine."""


class TrainingError(SeedbedError):
    """Training cannot continue: its loss or gradients are not finite."""


class ShardError(SeedbedError):
    """A worker failed on one shard. The message names the stage, the shard and the cause."""
