"""The arithmetic of PTX, on arrays with an entry per thread: from an opcode to a function and the types it takes.

Rounding is to nearest even throughout. What hardware approximates (ex2.approx, rcp.approx) is computed exactly.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
LETTERS = {"b": "u", "u": "u", "s": "i", "f": "f"}
COMPARISONS = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
# Types without a dtype: bytes of their bits.
PACKED = {"bf16": 2, "bf16x2": 4, "f16x2": 4, "f32x2": 8, "u16x2": 4, "s16x2": 4}
ROUNDINGS = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


class Unknown(Exception):
    """An instruction, or a form of one, that the machine does not run, because no compiled kernel has had it so far."""


class Operation(NamedTuple):
    """What an opcode computes: a function of arrays, the types of its operands, and that of its result."""

    function: Callable
    operands: tuple[str, ...]
    result: str


def dtype_of(kind: str) -> np.dtype:
    """The dtype in which values of a PTX type are computed; bf16 has none, and is held in its bits."""
    if kind == "pred":
        return np.dtype(bool)
    if kind in PACKED:
        return np.dtype(BITS[PACKED[kind]])
    return np.dtype(f"{LETTERS[kind[0]]}{int(kind[1:]) // 8}")


def register_dtype(declared: str) -> np.dtype:
    """The dtype in which a register is kept: the bits of whatever type stands in it."""
    return np.dtype(bool if declared == "pred" else BITS[int(declared[1:]) // 8])


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bf16(x: np.ndarray) -> np.ndarray:
    bits = x.view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def flush(x: np.ndarray) -> np.ndarray:
    """Zero for a subnormal float32."""
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def double(kind: str) -> str:
    return f"{kind[0]}{2 * int(kind[1:])}"


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c, rounded once: the product is exact in twice the width."""
    wide = np.float64 if a.dtype == np.float32 else np.longdouble
    return (a.astype(wide) * b + c).astype(a.dtype)


def divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Towards zero."""
    quotient = np.abs(a.astype(np.int64)) // np.maximum(np.abs(b.astype(np.int64)), 1)
    return (quotient * np.sign(a.astype(np.int64)) * np.sign(b.astype(np.int64))).astype(a.dtype)


def remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a - divide(a, b) * b


def high_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of values of 32 bits at most."""
    wide = np.int64 if a.dtype.kind == "i" else np.uint64
    return (a.astype(wide) * b.astype(wide) >> wide(8 * a.dtype.itemsize)).astype(a.dtype)


def shift(ufunc: Callable) -> Callable:
    """A shift by any number of bits: 0 or the sign remain where it is too large."""

    def shifted(a: np.ndarray, amount: np.ndarray) -> np.ndarray:
        most = a.dtype.itemsize * 8 - 1
        result = ufunc(a, np.minimum(amount, most).astype(a.dtype))
        return result if a.dtype.kind == "i" else np.where(amount > most, a.dtype.type(0), result)

    return shifted


def extract(a: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
    """The bits of a field, with its sign for a signed type."""
    width = a.dtype.itemsize * 8
    up = (width - np.minimum(position + length, width)).astype(a.dtype)
    return np.where(length == 0, 0, (a << up) >> (width - np.minimum(length, width)).astype(a.dtype))


def permute_bytes(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros(np.broadcast(both, selector).shape, np.uint32)
    for byte in range(4):
        choice = selector >> np.uint32(4 * byte) & np.uint32(0xF)
        value = (both >> (choice & np.uint32(7)).astype(np.uint64) * np.uint64(8) & np.uint64(0xFF)).astype(np.uint32)
        value = np.where(choice & np.uint32(8), np.where(value & np.uint32(0x80), 0xFF, 0), value).astype(np.uint32)
        result |= value << np.uint32(8 * byte)
    return result


def look_up(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    """lop3: every bit by a table of eight."""
    result = a & 0
    for entry in range(8):
        chosen = (a if entry & 4 else ~a) & (b if entry & 2 else ~b) & (c if entry & 1 else ~c)
        result = result | np.where(table >> np.uint32(entry) & np.uint32(1), chosen, np.uint32(0))
    return result


def pack(convert: Callable) -> Callable:
    """Two values in one register, the first of them in its upper half."""
    return lambda high, low: convert(high).astype(np.uint32) << 16 | convert(low)


def to_f16(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float16).view(np.uint16)


# Operations of one type throughout: a function of as many operands as it has arguments.
UNARY = {
    "mov": lambda a: a, "neg": np.negative, "abs": np.abs, "not": np.invert, "ex2": np.exp2, "rcp": np.reciprocal,
    "sqrt": np.sqrt,
}  # fmt: skip
BINARY = {
    "add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and,
    "or": np.bitwise_or, "xor": np.bitwise_xor, "rem": remainder,
}  # fmt: skip
FLOAT_BINARY = {"min": np.fmin, "max": np.fmax, "mul": np.multiply, "div": np.divide}


def operation(opcode: tuple[str, ...]) -> Operation:
    """What an opcode computes; raises Unknown."""
    name, kind = opcode[0], opcode[-1]
    if name in ("setp", "selp", "cvt"):
        return {"setp": comparison, "selp": selection, "cvt": conversion}[name](opcode)
    if name in ("add", "sub", "fma") and opcode[-2] == "f32":
        return of_mixed(operation(opcode[:-1]), kind)
    if kind in ("f32x2", "u16x2", "s16x2"):
        return of_pairs(operation((*opcode[:-1], kind[:3])), kind)
    if name in ("shl", "shr"):
        return Operation(shift(np.left_shift if name == "shl" else np.right_shift), (kind, "u32"), kind)
    if name == "bfe":
        return Operation(extract, (kind, "u32", "u32"), kind)
    if name == "prmt":
        return Operation(permute_bytes, (kind,) * 3, kind)
    if name == "lop3":
        return Operation(look_up, (kind,) * 4, kind)
    if name in ("mul", "mad") and kind[0] != "f":
        return integer_product(opcode)
    if name in ("fma", "mad"):
        function, count = fma, 3
    elif name in UNARY:
        function, count = UNARY[name], 1
    elif kind[0] == "f" and name in FLOAT_BINARY:
        function, count = FLOAT_BINARY[name], 2
    elif name == "div":
        function, count = divide, 2
    elif name in BINARY:
        function, count = BINARY[name], 2
    else:
        raise Unknown(".".join(opcode))
    if "ftz" in opcode:
        function = flushed(function)
    return Operation(function, (kind,) * count, kind)


def of_mixed(single: Operation, kind: str) -> Operation:
    """An operation in float32 whose operands but the last are narrower."""
    widen = conversion(("cvt", "f32", kind)).function

    def mixed(*operands: np.ndarray) -> np.ndarray:
        return single.function(*map(widen, operands[:-1]), operands[-1])

    return Operation(mixed, (kind,) * (len(single.operands) - 1) + ("f32",), "f32")


def of_pairs(single: Operation, kind: str) -> Operation:
    """An operation on two values of a type at once."""
    one, two = dtype_of(single.result), dtype_of(kind)

    def both(*operands: np.ndarray) -> np.ndarray:
        pairs = (np.ascontiguousarray(x)[:, None].view(one) for x in operands)
        return np.ascontiguousarray(single.function(*pairs)).view(two)[:, 0]

    return Operation(both, (kind,) * len(single.operands), kind)


def flushed(function: Callable) -> Callable:
    return lambda *operands: flush(function(*map(flush, operands)))


def integer_product(opcode: tuple[str, ...]) -> Operation:
    """mul and mad: the lower half, the upper half, or all of a product, and for mad a sum with it."""
    name, part, kind = opcode
    result = double(kind) if part == "wide" else kind
    to = dtype_of(result)
    multiply = high_product if part == "hi" else lambda a, b: a.astype(to) * b.astype(to)
    if name == "mul":
        return Operation(multiply, (kind, kind), result)
    return Operation(lambda a, b, c: multiply(a, b) + c, (kind, kind, result), result)


def comparison(opcode: tuple[str, ...]) -> Operation:
    """Those that end in u are true of NaN."""
    how, kind = opcode[1], opcode[-1]
    if how in COMPARISONS:
        ordered = COMPARISONS[how]
        if kind[0] == "f" and how == "ne":
            return Operation(lambda a, b: (a != b) & ~np.isnan(a) & ~np.isnan(b), (kind, kind), "pred")
        return Operation(ordered, (kind, kind), "pred")
    if how in ("nan", "num"):
        wanted = how == "nan"
        return Operation(lambda a, b: (np.isnan(a) | np.isnan(b)) == wanted, (kind, kind), "pred")
    unordered = COMPARISONS[how[:-1]]
    return Operation(lambda a, b: unordered(a, b) | np.isnan(a) | np.isnan(b), (kind, kind), "pred")


def packed_comparison(opcode: tuple[str, ...]) -> tuple[Callable, Callable]:
    """Of two halves of a register each: the comparisons of the lower ones and of the upper ones."""
    to_float = from_bf16 if opcode[-1] == "bf16x2" else lambda bits: bits.view(np.float16)
    compare = comparison((*opcode[:-1], "f32")).function

    def of_halves(shift: int) -> Callable:
        def half(x: np.ndarray) -> np.ndarray:
            return to_float((x >> np.uint32(shift)).astype(np.uint16))

        return lambda a, b: compare(half(a), half(b))

    return of_halves(0), of_halves(16)


def selection(opcode: tuple[str, ...]) -> Operation:
    kind = opcode[-1]
    return Operation(lambda a, b, which: np.where(which, a, b), (kind, kind, "pred"), kind)


def conversion(opcode: tuple[str, ...]) -> Operation:
    to, source = opcode[-2:]
    if to in ("bf16x2", "f16x2"):
        return Operation(pack(to_bf16 if to == "bf16x2" else to_f16), (source, source), to)
    if to == "bf16":
        function = to_bf16 if source == "f32" else None
    elif source == "bf16":
        function = from_bf16 if to == "f32" else None
    else:
        rounding = ROUNDINGS.get(next((part for part in opcode if part in ROUNDINGS), ""), lambda a: a)
        function = lambda a: rounding(a).astype(dtype_of(to))  # noqa: E731
    if function is None or "sat" in opcode or "rna" in opcode:
        raise Unknown(".".join(opcode))
    return Operation(function, (source,), to)
