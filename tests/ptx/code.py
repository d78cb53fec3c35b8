"""PTX as Triton's compiler writes it, taken apart: one kernel's parameters, registers and instructions."""

import re
from typing import NamedTuple

NAMED_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+([%\w]+)<(\d+)>")
SINGLE_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+([^<]+)$")


class Address(NamedTuple):
    """[base + offset], where base is a register or the name of a parameter or of shared memory."""

    base: str
    offset: int


class Instruction(NamedTuple):
    """opcode: its parts between dots; guard: a predicate and whether it has to hold, or None; place: file and line."""

    opcode: tuple[str, ...]
    guard: tuple[str, bool] | None
    operands: tuple
    place: str


class Code(NamedTuple):
    """parameters: names and bytes, in order; registers: kind by name; labels: where the instruction behind one is."""

    parameters: dict[str, int]
    registers: dict[str, str]
    instructions: list[Instruction]
    labels: dict[str, int]


def parse(ptx: str) -> Code:
    """Take a module with one kernel apart."""
    files = dict(re.findall(r'\.file\s+(\d+)\s+"(?:[^"]*/)?([^"/]+)"', ptx))
    ptx = re.sub(r"//.*", "", ptx)
    head, body = re.split(r"\.entry", ptx, maxsplit=1)[1].split("{", 1)
    parameters = {name: int(bits) // 8 for bits, name in re.findall(r"\.param\s+\.[a-z](\d+)[^,)]*?(\w+)\s*[,)]", head)}
    code = Code(parameters, {}, [], {})
    place = ""
    for statement in statements(body):
        if statement.startswith(".loc"):
            number, line = statement.split()[1:3]
            place = f"{files[number]}:{line}"
        elif statement.startswith(".reg"):
            code.registers.update(declared(statement))
        elif statement.endswith(":"):
            code.labels[statement[:-1]] = len(code.instructions)
        elif not statement.startswith((".pragma", "{", "}")):
            code.instructions.append(instruction(statement, place))
    return code


def statements(body: str):
    """The statements of a function up to its end: directives and labels, a line each, and all that ends in `;`."""
    depth, waiting = 1, ""
    for line in body.splitlines():
        line = line.strip()
        if not waiting and (line.startswith(".loc") or re.fullmatch(r"[$\w]+:", line)):
            yield line
            continue
        if not waiting and line in ("{", "}"):
            depth += 1 if line == "{" else -1
            if depth == 0:
                return
            continue
        *complete, waiting = (waiting + " " + line).split(";")
        # A block within braces has no scope of its own here.
        yield from filter(None, (part.strip().lstrip("{} ") for part in complete))
        waiting = waiting.strip()


def declared(statement: str) -> dict[str, str]:
    """The registers of a declaration: `.reg .b32 %r<9>` or `.reg .pred p, q`."""
    numbered = NAMED_REGISTERS.match(statement)
    if numbered:
        kind, name, count = numbered.groups()
        return {f"{name}{n}": kind for n in range(int(count))}
    single = SINGLE_REGISTERS.match(statement)
    assert single, statement
    return {name.strip(): single[1] for name in single[2].split(",")}


def instruction(statement: str, place: str) -> Instruction:
    found = re.match(r"(?:@(!?)([%\w]+)\s+)?([a-z][\w.:]*)\s*(.*)$", statement, re.DOTALL)
    assert found, statement
    negated, predicate, opcode, operands = found.groups()
    guard = (predicate, not negated) if predicate else None
    return Instruction(tuple(re.split(r"\.|::", opcode)), guard, tuple(map(operand, separate(operands))), place)


def separate(operands: str) -> list[str]:
    """Split at commas outside of braces and brackets."""
    return [part.strip() for part in re.split(r",(?![^{]*\})(?![^\[]*\])", operands) if part.strip()]


def operand(text: str):
    """A name or number as it stands, a vector as a tuple of them, or an address."""
    if text.startswith("{"):
        return tuple(part.strip() for part in text[1:-1].split(","))
    if text.startswith("["):
        base, _, offset = re.sub(r"\s", "", text[1:-1]).partition("+")
        return Address(base, int(offset or 0))
    return text
