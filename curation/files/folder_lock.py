"""Locks on folders, so that only one run at a time writes an output."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator

from fsspec.implementations.local import LocalFileSystem

from curation.errors import OutputMismatchError
from curation.files.paths import filesystem


@contextlib.contextmanager
def locked(folder: str) -> Iterator[None]:
    """Lock a local folder against other processes during the block. The lock ends with the process at the latest.

    Raises BlockingIOError while another process holds the lock, and another OSError where folders have no locks.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def sole_writer(folder: str) -> Iterator[None]:
    """Keep other runs from writing `folder` during the block. Raises OutputMismatchError while another run writes it.

    This works on a disk of this machine only: network drives and object stores have no locks for folders. A killed run
    leaves nothing locked.
    """
    fs, inner = filesystem(folder)
    with contextlib.ExitStack() as stack:
        if isinstance(fs, LocalFileSystem) and not os.path.isfile(inner):
            os.makedirs(inner, exist_ok=True)
            try:
                stack.enter_context(locked(inner))
            except BlockingIOError:
                raise OutputMismatchError(
                    f"Another run is writing '{folder}'. Wait until it is done, stop it, or give another --output."
                ) from None
            except OSError as error:
                if error.errno not in (errno.EBADF, errno.ENOLCK, errno.EOPNOTSUPP):  # these come from network drives
                    raise
        yield
