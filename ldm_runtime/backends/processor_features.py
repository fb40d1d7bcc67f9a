"""What this processor can do, as the system says."""

import platform
import re
from pathlib import Path

_CPU_INFO = Path("/proc/cpuinfo")
_X86 = frozenset({"x86_64", "amd64", "i386", "i686"})
#: Flags of x86 processors that add four products of 8 bits to a sum of 32 bits.
_WHOLE_SUMS = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})


def why_not_int8(cpu_info: Path = _CPU_INFO, machine: str | None = None) -> str | None:
    """Say why networks in 8 bits are not run here.

    An x86 processor without VNNI adds two products of 8 bits in 16, where sums of large ones are
    cut off: images differ by 3 dB more, and are no faster. Source: "Saturation (overflow) issue" in
    OpenVINO's guide to low precision; and `ldm verify` with oneDNN held to AVX-512 without VNNI.

    Args:
        cpu_info: What Linux says of the processors.
        machine: Kind of the machine; None is this one's.
    """
    if (machine or platform.machine()).lower() not in _X86:
        return None
    try:
        found = re.search(r"^flags\s*:(.*)$", cpu_info.read_text(), re.MULTILINE)
    except OSError:  # not Linux: it is not known
        return None
    if found is None or _WHOLE_SUMS.intersection(found[1].split()):
        return None
    return (
        "this processor has no VNNI, so sums in 8 bits are cut off and no faster; leave out "
        "--precision int8"
    )
