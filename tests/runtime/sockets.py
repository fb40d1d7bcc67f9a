"""Processes in which nothing, native code included, can open an internet socket.

The kernel either kills such a process at once, or lets it go on without the socket: urllib3 opens
one when it is imported, to see whether there is IPv6.
"""

import ctypes
import errno
import platform
import struct
import subprocess
import sys
from pathlib import Path

#: Number of the system call `socket` by processor.
SOCKET_CALLS = {"x86_64": 41, "aarch64": 198}
_SET_NO_NEW_PRIVILEGES, _SET_SECCOMP, _MODE_FILTER = 38, 22, 2
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_KILL_PROCESS, _ALLOW = 0x80000000, 0x7FFF0000
_PERMISSION_DENIED = 0x00050000 | errno.EACCES


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))


def run_without_sockets(code, *arguments, environment):
    """Run Python code in a new process that is killed when it opens an internet socket."""
    start = "from tests.runtime.sockets import forbid_sockets; forbid_sockets()"
    return subprocess.run(
        [sys.executable, "-c", f"{start}\n{code}", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=Path(__file__).parents[2],
        timeout=120,
    )


def can_forbid_sockets():
    """Return whether this is a Linux on a processor whose number of the system call is known."""
    return sys.platform == "linux" and platform.machine() in SOCKET_CALLS


def forbid_sockets(*, kill=True):
    """Let no socket of IPv4 or IPv6 be opened in this process and its children; for good.

    Args:
        kill: Whether the kernel kills a process that tries, or says that permission is denied.
    """
    instructions = (
        (_LOAD, 0, 0, 0),  # the number of the system call
        (_JUMP_IF_EQUAL, 0, 4, SOCKET_CALLS[platform.machine()]),
        (_LOAD, 0, 0, 16),  # its first argument, the family
        (_JUMP_IF_EQUAL, 1, 0, 2),
        (_JUMP_IF_EQUAL, 0, 1, 10),
        (_RETURN, 0, 0, _KILL_PROCESS if kill else _PERMISSION_DENIED),
        (_RETURN, 0, 0, _ALLOW),
    )
    packed = ctypes.create_string_buffer(
        b"".join(struct.pack("HBBI", *each) for each in instructions)
    )
    program = _Program(len(instructions), ctypes.addressof(packed))
    library = ctypes.CDLL(None, use_errno=True)
    assert library.prctl(_SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0) == 0
    assert library.prctl(_SET_SECCOMP, _MODE_FILTER, ctypes.byref(program), 0, 0) == 0
