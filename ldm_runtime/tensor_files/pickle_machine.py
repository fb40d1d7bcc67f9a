"""The stack machine that a pickle programs: its registers, and its limits.

`pickle_reader.py` holds the instructions. They touch the registers through these methods, which
keep every read inside the pickle and every pop inside the innermost open collection.
"""

from collections.abc import Container
from dataclasses import dataclass

from ldm_runtime.tensor_files.errors import CutOffError, FormatError
from ldm_runtime.tensor_files.torch_records import Name, StorageRecord

MAX_LINE_BYTES = 1024  # names of globals, integers in decimal
_EMPTY = object()  # a slot of the memo in which nothing was kept


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """The limits of a pickle; the defaults are some twenty times what Stable Diffusion 1 needs.

    Attributes:
        max_bytes: Size of the pickle.
        max_opcodes: Opcodes run.
        max_stack: Values on the stack at once.
        max_open_marks: Collections begun and not finished: how deep brackets nest.
        max_memo_index: Highest slot of the memo, the table of values to be referred to again.
        max_string_bytes: Length of one string.
        max_tensors: Tensors and parameters rebuilt.
        max_globals: Different globals named.
    """

    max_bytes: int = 32 << 20
    max_opcodes: int = 2_000_000
    max_stack: int = 1 << 18
    max_open_marks: int = 1000
    max_memo_index: int = 1_000_000
    max_string_bytes: int = 16 << 20
    max_tensors: int = 50_000
    max_globals: int = 1000


class Machine:
    """The stack machine: registers and the few ways to touch them that keep the limits."""

    __slots__ = (
        "data",
        "globals",
        "limits",
        "marks",
        "memo",
        "num_memoized",
        "num_tensors",
        "position",
        "refused",
        "stack",
        "storages",
    )

    def __init__(self, data: bytes, limits: Limits, refused: Container[str] = ()) -> None:
        self.data = data
        self.limits = limits
        self.refused = refused  # names, or modules all of whose names are refused
        self.position = 0
        self.stack: list[object] = []
        self.marks: list[int] = []  # heights of the stack
        self.memo: list[object] = []  # values by slot; not a dict, whose keys could collide
        self.num_memoized = 0
        self.globals: set[Name] = set()
        self.storages: dict[str, StorageRecord] = {}
        self.num_tensors = 0
        if len(data) > limits.max_bytes:
            raise self.fault(f"{len(data)} bytes, more than the {limits.max_bytes} allowed")

    def fault(self, text: str) -> FormatError:
        """An error that says where in the pickle it arose."""
        return FormatError(f"{text} (at byte {self.position} of the pickle)")

    def cut_off(self, text: str) -> CutOffError:
        """The error of a pickle that ends before its last opcode."""
        return CutOffError(str(self.fault(text)))

    def take(self, count: int) -> bytes:
        """The next `count` bytes of the pickle."""
        start = self.position
        left = len(self.data) - start
        if count > left:
            raise self.cut_off(f"an opcode wants {count} bytes and {left} are left")
        self.position = start + count
        return self.data[start : self.position]

    def number(self, width: int) -> int:
        """The next `width` bytes as a little-endian unsigned integer."""
        return int.from_bytes(self.take(width), "little")

    def counted(self, width: int, limit: int) -> bytes:
        """Bytes that follow their own number, itself `width` bytes wide."""
        count = self.number(width)
        if count > limit:
            raise self.fault(f"a value of {count} bytes, more than the {limit} allowed")
        return self.take(count)

    def line(self) -> str:
        """The text up to the next newline, which is skipped."""
        end = self.data.find(b"\n", self.position, self.position + MAX_LINE_BYTES)
        if end < 0:
            is_cut = len(self.data) - self.position < MAX_LINE_BYTES
            raise (self.cut_off if is_cut else self.fault)("a line of text has no end")
        text = self.take(end - self.position)
        self.position = end + 1
        return self.text(text)

    def text(self, raw: bytes) -> str:
        """Decode UTF-8 as Python's pickler encodes it, lone surrogates included."""
        try:
            return raw.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError as error:
            raise self.fault(f"a string is not UTF-8 ({error.reason})") from error

    def top(self) -> object:
        """The value on top of the stack, above the latest mark."""
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise self.fault("an opcode wants a value and the stack has none")
        return self.stack[-1]

    def pop(self) -> object:
        """Take the value on top off the stack."""
        value = self.top()
        self.stack.pop()
        return value

    def memoize(self, slot: int) -> None:
        """Keep the value on top of the stack in a slot of the memo."""
        value = self.top()
        self.memo.extend([_EMPTY] * (slot + 1 - len(self.memo)))
        self.num_memoized += self.memo[slot] is _EMPTY
        self.memo[slot] = value

    def recall(self, slot: int) -> object:
        """The value that is kept in a slot of the memo."""
        value = self.memo[slot] if slot < len(self.memo) else _EMPTY
        if value is _EMPTY:
            raise self.fault(f"memo slot {slot} is empty")
        return value

    def pop_to_mark(self) -> list[object]:
        """Take everything above the latest mark, and the mark, off the stack."""
        if not self.marks:
            raise self.fault("an opcode wants a mark and there is none")
        height = self.marks.pop()
        values = self.stack[height:]
        del self.stack[height:]
        return values

    def pop_tuple(self) -> tuple[object, ...]:
        """Take a tuple, the arguments of a call, off the stack."""
        value = self.pop()
        if not isinstance(value, tuple):
            raise self.fault(f"arguments are a {type(value).__name__}, not a tuple")
        return value
