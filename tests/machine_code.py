"""What may be wrong in a kernel that no interpreter shows, seen in what it is compiled to.

In machine code (SASS, as cuobjdump prints it): ptxas 12.8 loses definitions of uniform registers: it takes
them out of a loop and forgets them. Matrix products then read shared memory wherever the register happens to
point, which is an illegal access now and then and a wrong answer else. Such a register is read on some way
through the kernel before it is written.

In PTX: a group of warps that gives back shared memory has one of its threads arrive at the mbarrier, which
says nothing of what the others have read, unless all have met at a barrier of theirs in between.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

NUM_UNIFORM_REGISTERS = 63
PREDICATE = re.compile(r"^@!?U?P\w+\s+")
WRITES = re.compile(r"(U(?!ISETP|PLOP|TMA|BLK|CGABAR|SETMAX)|R2UR|S2UR|CS2UR|REDUX|VOTEU)\w*")
BRANCH = re.compile(r"\bBRA(?:\.\w+)*\b.*?(0x[0-9a-f]+)")
ARRIVES_ALONE = re.compile(r"(?<!cp\.async\.)mbarrier\.arrive\.")
MEETS = re.compile(r"^bar(rier)?\.sync\b")
READS_OR_WRITES_SHARED = re.compile(
    r"(ld|st|atom|red)(\.\w+)*\.shared|[ls][dt]matrix|wgmma\.mma_async|cp\.async\.c[ag]"
)


@dataclass(frozen=True)
class Instruction:
    address: int
    text: str
    written: set[int] = field(default_factory=set)
    read: set[int] = field(default_factory=set)

    @property
    def target(self) -> int | None:
        branch = BRANCH.search(self.text)
        return int(branch[1], 16) if branch else None

    @property
    def falls_through(self) -> bool:
        """Whether the next instruction may follow."""
        if self.target is not None:
            return self.text.startswith("@") or bool(re.search(r"BRA(\.\w+)* !?U?P", self.text))
        return not self.text.startswith(("EXIT", "RET"))


def arrivals_before_all_have_met(ptx: str) -> list[str]:
    """Arrivals of one thread, each with what may come between its group's last barrier and it."""
    found, since_meeting = [], "the kernel's start"
    for line in map(str.strip, ptx.splitlines()):
        if MEETS.match(line):
            since_meeting = ""
        elif ARRIVES_ALONE.search(line):
            if since_meeting:
                found.append(f"{line} after {since_meeting}")
        # Elsewhere may have been jumped from.
        elif line.endswith(":") or READS_OR_WRITES_SHARED.search(line):
            since_meeting = line
    return found


def unwritten_uniform_registers(sass: str) -> list[str]:
    """The instructions that may read a uniform register before any has written it, with its name."""
    instructions = list(_instructions(sass))
    places = {instruction.address: place for place, instruction in enumerate(instructions)}
    unwritten = {0: set(range(NUM_UNIFORM_REGISTERS))}
    to_do = [0]
    while to_do:
        place = to_do.pop()
        instruction = instructions[place]
        left = unwritten[place] - instruction.written
        nexts = [place + 1] if instruction.falls_through and place + 1 < len(instructions) else []
        if instruction.target is not None:
            nexts.append(places[instruction.target])
        for following in nexts:
            known = unwritten.get(following)
            if known is None or not left <= known:
                unwritten[following] = left | (known or set())
                to_do.append(following)
    return [
        f"{instruction.text} reads UR{register}"
        for place, instruction in enumerate(instructions)
        for register in sorted(instruction.read & unwritten.get(place, set()))
    ]


def _instructions(sass: str) -> Iterator[Instruction]:
    for address, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", sass):
        yield Instruction(int(address, 16), text.strip(), *_registers(PREDICATE.sub("", text.strip())))


def _registers(text: str) -> tuple[set[int], set[int]]:
    """The uniform registers that an instruction writes, and those that it reads."""
    operation, _, rest = text.partition(" ")
    writes = WRITES.fullmatch(operation.split(".")[0]) is not None
    operands = rest.split(",")
    is_wide = writes and ".64" in operation
    is_wide_sum = writes and ".WIDE" in operation  # Of a product of narrow factors and a wide number.
    written: set[int] = set()
    read: set[int] = set()
    for place, operand in enumerate(operands):
        for register in map(int, re.findall(r"\bUR(\d+)\b", operand)):
            if "gdesc" in operand:
                # The descriptors of both factors; the first's are not looked at where that is in registers.
                read.update(range(register + (2 if place == 2 else 0), register + 4))
            elif writes and not written and operand.strip().startswith("UR"):
                written.update((register, register + 1) if is_wide or is_wide_sum else (register,))
            elif operation == "UPRMT" and register in written:
                pass  # Bytes that LLVM had no values for either, of a vector with lanes that nobody reads.
            elif operation not in ("MOV", "UP2UR"):  # Kept for later, used or not; some bits of it changed.
                is_pair = is_wide or "desc" in operand or (is_wide_sum and place == len(operands) - 1)
                read.update((register, register + 1) if is_pair else (register,))
    return written, read
