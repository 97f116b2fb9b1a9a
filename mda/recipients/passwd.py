"""The account database, asked so that an error never reads as "no such user"."""

from __future__ import annotations

import errno
import os
import pwd

_BUFFER = 65_536


def find(name: str) -> pwd.struct_passwd | None:
    """The account of exactly that name, or None where there certainly is none.

    Raises OSError where the database could not be asked: a server is down, a file cannot
    be read. Python's pwd says KeyError for that too.
    """
    try:
        return pwd.getpwnam(name)
    except KeyError:
        _raise_lookup_error(name)
        return None


def find_by_uid(uid: int) -> pwd.struct_passwd:
    """The account of a uid that exists, since a process has it; raises OSError."""
    try:
        return pwd.getpwuid(uid)
    except KeyError as error:
        raise OSError(errno.ENOENT, "no account has this uid") from error


def _raise_lookup_error(name: str) -> None:
    """Ask getpwnam_r(3) itself, which returns the error that pwd throws away."""
    # Here, since it costs its import only where a name is not known.
    try:
        import ctypes
    except ImportError as error:
        raise OSError(errno.ENOSYS, "cannot ask the account database") from error
    account = ctypes.create_string_buffer(512)
    strings = ctypes.create_string_buffer(_BUFFER)
    found = ctypes.c_void_p()
    status = ctypes.CDLL(None).getpwnam_r(
        os.fsencode(name), account, strings, ctypes.c_size_t(_BUFFER), ctypes.byref(found)
    )
    if found.value is not None:
        # Known now and not known a moment ago: the database is not well.
        status = errno.EAGAIN
    if status:
        raise OSError(status, os.strerror(status))
