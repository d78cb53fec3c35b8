"""How a kernel receives its arguments: one address, of a record of int64 fields.

A record keeps the cost of a call at that of one argument. `Record` names fields; `record.pack` builds one in Python,
`record.reader` gives the function that a kernel reads it through.
"""

from array import array


class Record:
    """A list of field names."""

    def __init__(self, *names: str):
        self.names = names

    def pack(self, **values: int) -> array:
        """Lay the values out in order; those not given are 0. The record lives as long as the result."""
        unknown = values.keys() - set(self.names)
        if unknown:
            raise TypeError(f"no such fields: {sorted(unknown)}")
        return array("q", [values.get(name, 0) for name in self.names])

    def reader(self):
        """The function that turns a record's address into the record."""
        import numpy as np
        from numba import from_dtype, types
        from numba.extending import intrinsic

        kind = from_dtype(np.dtype([(name, np.int64) for name in self.names]))

        @intrinsic
        def record_at(typing, address):
            def lower(context, builder, sig, args):
                return builder.inttoptr(args[0], context.get_value_type(kind))

            return kind(types.int64), lower

        return record_at


def address(record: array) -> int:
    return record.buffer_info()[0]
