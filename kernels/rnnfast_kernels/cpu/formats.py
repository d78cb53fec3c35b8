"""The number formats of frozen weights, one row each.

How the numbers of a format are multiplied is in a module of `ir`, which `ir.held` names.
"""

from typing import NamedTuple


class Format(NamedTuple):
    """How weights are stored that are packed beforehand.

    dtype: torch's name of a number's type. array: NumPy's, int16 for the bits of a bfloat16. terms: numbers that take
    the place of one float32 in a panel. largest: of the integers, 0 where weights are floating-point numbers. Integers
    are multiplied by a scale for each row, of the weights and, in the call, of what is multiplied with them; sums are
    int32. most_terms: products of integers that such a sum holds.
    """

    name: str
    dtype: str
    array: str
    terms: int
    largest: int = 0
    most_terms: int = 0

    @property
    def scaled(self) -> bool:
        """Whether rows have scales."""
        return self.largest > 0


FORMATS = {
    each.name: each
    for each in (
        Format("float32", "float32", "float32", terms=1),
        Format("bfloat16", "bfloat16", "int16", terms=2),
        Format("int8", "int8", "int8", terms=4, largest=127, most_terms=1 << 16),
    )
}
