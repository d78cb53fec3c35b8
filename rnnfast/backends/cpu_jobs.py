"""One layer as jobs for the Numba kernels: tensors in, records of raw addresses out, and the order of the phases.

forward     pack the weights; run every slice of every direction through all steps
backward    pack the weights; run every slice back; then the products that give the gradients by x and the weights
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch
from rnnfast_kernels.cells import CELLS
from rnnfast_kernels.cpu import compiled, gradients, loops, plan, pool, products, tasks
from rnnfast_kernels.cpu.job import Record, address
from rnnfast_kernels.cpu.target import widest_panel
from torch import Tensor

from rnnfast.backends import Gradients, Layer, Needs, Result, Weights

DTYPE_NAMES = {torch.float32: "float32", torch.float64: "float64"}


def pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def steps_and_starts(layer: Layer) -> tuple[int, Tensor | None, Tensor | None]:
    """Number of steps; the valid rows of each step; the index of each step's first row, in the packed layout."""
    sizes = layer.batch_sizes
    if sizes is None:
        return layer.x.shape[0], None, None
    sizes = sizes.contiguous()
    if layer.x.dim() == 3:
        return layer.x.shape[0], sizes, None
    return sizes.shape[0], sizes, sizes.cumsum(0) - sizes


class Call:
    """A layer's sizes, contiguous tensors and the fields that all of its jobs share."""

    def __init__(self, layer: Layer):
        self.layer = layer
        self.cell = CELLS[layer.cell]
        self.steps, self.sizes, self.starts = steps_and_starts(layer)
        x = layer.x
        self.x = x if x.shape[-1] == 1 or x.stride(-1) == 1 else x.contiguous()
        self.hx = tuple(initial.contiguous() for initial in layer.hx)
        self.weights = [Weights(*(w if w is None else w.contiguous() for w in each)) for each in layer.weights]
        self.resets = None if layer.resets is None else layer.resets.contiguous()
        directions, batch, width = self.hx[0].shape
        self.lead = (*x.shape[:-1], directions)
        self.projected = layer.weights[0].w_hr is not None
        hidden = layer.weights[0].w_hh.shape[0] // self.cell.gates
        self.shape = plan.Shape(
            cell=layer.cell,
            dtype=DTYPE_NAMES[x.dtype],
            steps=self.steps,
            batch=batch,
            rows=x.shape[:-1].numel(),
            inputs=x.shape[-1],
            hidden=hidden,
            width=width,
            directions=directions,
        )
        self.item = x.element_size()
        self.target = self.shape.target
        self.kernel = compiled.kernel(self.shape.cell, self.shape.dtype)
        self.threads = torch.get_num_threads()
        # Records and buffers whose addresses are in use.
        self.alive: list = []

    def record(self, layout: Record, /, **fields: int) -> int:
        """Lay out a record that lives as long as the call, and return its address."""
        packed = layout.pack(**fields)
        self.alive.append(packed)
        return address(packed)

    def buffer(self, size: int) -> int:
        """Reserve scratch memory for as long as the call lasts, with a vector's margin."""
        memory = torch.empty(size + 128, dtype=torch.uint8)
        self.alive.append(memory)
        return memory.data_ptr()

    def run(self, task: int, jobs: Sequence[int], work: int) -> None:
        """Have the kernel do a task for every record, side by side if the work is worth it."""
        pool.run(partial(self.kernel, task), jobs, plan.threads_for(work, self.threads))

    def slice_fields(self, direction: int, first: int, last: int) -> dict[str, int]:
        """Fields of a `LAYER` record that say which rows and steps a job has, and where its inputs are."""
        shape, item = self.shape, self.item
        strides = self.x.stride()
        hx = self.hx
        width_row, hidden_row = shape.width * item, shape.hidden * item
        offset = direction * shape.batch + first
        fields = {
            "steps": shape.steps,
            "batch": shape.batch,
            "first_row": first,
            "rows": last - first,
            "reverse": self.layer.reverse[direction],
            "sizes": pointer(self.sizes),
            "starts": pointer(self.starts),
            "resets": pointer(self.resets),
            "inputs": shape.inputs,
            "hidden": shape.hidden,
            "width": shape.width,
            "x": self.x.data_ptr(),
            "x_row": strides[-2] * item,
            "x_step": strides[0] * item,
            "h_first": hx[0].data_ptr() + offset * width_row,
            "h_first_row": width_row,
        }
        if shape.extra:
            fields |= {"extra_first": hx[1].data_ptr() + offset * hidden_row, "extra_first_row": hidden_row}
        return fields

    def state_fields(self, direction: int, h: Tensor, extra: Tensor | None, gates: Tensor | None, full: Tensor | None):
        """Fields for what the forward loop leaves for every step."""
        shape, item = self.shape, self.item
        fields = {
            "h": h.data_ptr() + direction * shape.width * item,
            "h_row": shape.directions * shape.width * item,
        }
        hidden_row = shape.directions * shape.hidden * item
        if extra is not None:
            fields |= {"extra": extra.data_ptr() + direction * shape.hidden * item, "extra_row": hidden_row}
        if full is not None:
            fields |= {"full": full.data_ptr() + direction * shape.hidden * item, "full_row": hidden_row}
        if gates is not None:
            row = self.cell.saved * shape.hidden * item
            fields |= {
                "gates": gates.data_ptr() + direction * row,
                "gates_row": shape.directions * row,
                "gate_step": shape.hidden * item,
                "keep": 1,
            }
        return fields

    def work_fields(self, rows: int, chunk: int) -> dict[str, int]:
        """Scratch of a time loop."""
        shape, vector = self.shape, self.target.vector
        hidden_row = self.target.padded(shape.hidden) * self.item
        width_row = self.target.padded(shape.width) * self.item
        places = max(rows * chunk, rows)
        return {
            "tile": self.buffer(self.target.accumulators * vector),
            "places": self.buffer(8 * places),
            "goals": self.buffer(8 * places),
            "h_work": self.buffer(2 * rows * width_row + hidden_row),
            "extra_work": self.buffer(shape.extra * rows * hidden_row) if shape.extra else 0,
            "full_work": self.buffer(rows * hidden_row) if self.projected else 0,
        }

    def pack(self, weights: Sequence[dict[str, int]]) -> list[int]:
        """Pack weights, split over threads, and return their panels."""
        shape = self.shape
        jobs, panels, work = [], [], 0
        for fields in weights:
            gates = shape.gates if fields["kind"] == products.GATE_COLUMNS else 1
            size = plan.panel_bytes(self.target, fields["units"], fields["depth"]) * gates
            panels.append(self.buffer(size))
            work += size
            blocks = -(-fields["units"] // self.target.lanes)
            widest = widest_panel(gates)
            cuts = [min(blocks, cut * widest) for cut in plan.even_cuts(-(-blocks // widest), self.threads)]
            for first, last in pairwise(cuts):
                if first < last:
                    places = self.buffer(8 * fields["depth"]) if fields["kind"] == products.PLAIN_ROWS else 0
                    parts = {"panels": panels[-1], "first": first, "last": last, "places": places}
                    jobs.append(self.record(products.PACK, **fields, **parts))
        self.run(tasks.PACK_WEIGHT, jobs, work)
        return panels

    def columns(self, weight: Tensor, bias: Tensor | None) -> dict[str, int]:
        """A weight [gates * units, depth] to pack for a product with the gates side by side."""
        units = weight.shape[0] // self.shape.gates
        return {
            "kind": products.GATE_COLUMNS,
            "weight": weight.data_ptr(),
            "bias": pointer(bias),
            "units": units,
            "depth": weight.shape[1],
        }

    def rows(self, weight: Tensor) -> dict[str, int]:
        """A weight [depth, units] to pack as it is."""
        return {
            "kind": products.PLAIN_ROWS,
            "weight": weight.data_ptr(),
            "weight_row": weight.shape[1] * self.item,
            "units": weight.shape[1],
            "depth": weight.shape[0],
        }


def run_forward(layer: Layer, *, save: bool, keep_extra: bool) -> Result:
    call = Call(layer)
    shape, cell, x = call.shape, call.cell, call.x
    h = x.new_empty(*call.lead, shape.width)
    extra = x.new_empty(*call.lead, shape.hidden) if shape.extra and keep_extra else None
    gates = x.new_empty(*call.lead, cell.saved * shape.hidden) if save and cell.saved else None
    full = x.new_empty(*call.lead, shape.hidden) if save and call.projected else None
    finals = tuple(torch.empty_like(initial, memory_format=torch.contiguous_format) for initial in call.hx)

    panels = call.pack([fields for weights in call.weights for fields in forward_weights(call, weights)])
    each = len(panels) // shape.directions
    cuts = plan.row_cuts(shape, call.threads)
    jobs = []
    for direction in range(shape.directions):
        shared = call.state_fields(direction, h, extra, gates, full)
        shared |= dict(zip(("w_ih", "w_hh", "w_hr"), panels[direction * each :], strict=False))
        if not call.projected:
            shared["w_hr"] = 0
        for first, last in pairwise(cuts):
            chunk = plan.chunk_steps(shape, last - first)
            fields = shared | call.slice_fields(direction, first, last) | call.work_fields(last - first, chunk)
            fields |= final_fields(call, direction, first, finals) | {"chunk": chunk}
            if gates is None:
                fields |= gate_work(call, last - first, chunk)
            jobs.append(call.record(loops.LAYER, **fields))
    call.run(tasks.FORWARD, jobs, shape.rows * shape.row_work * shape.directions)
    states = (h,) if not shape.extra else (h, x.new_empty(0) if extra is None else extra)
    return Result(states, finals, tuple(each for each in (gates, full) if each is not None))


def forward_weights(call: Call, weights: Weights) -> list[dict[str, int]]:
    fields = [call.columns(weights.w_ih, weights.b_ih), call.columns(weights.w_hh, weights.b_hh)]
    if weights.w_hr is not None:
        projection = {"kind": products.PLAIN_COLUMNS, "weight": weights.w_hr.data_ptr(), "units": call.shape.width}
        fields.append(projection | {"depth": call.shape.hidden})
    return fields


def final_fields(call: Call, direction: int, first: int, finals: Sequence[Tensor]) -> dict[str, int]:
    offset = (direction * call.shape.batch + first) * call.item
    fields = {"h_final": finals[0].data_ptr() + offset * call.shape.width}
    if call.shape.extra:
        fields["extra_final"] = finals[1].data_ptr() + offset * call.shape.hidden
    return fields


def gate_work(call: Call, rows: int, chunk: int) -> dict[str, int]:
    """Scratch for the gates of a chunk of steps, where they are not kept."""
    gate = call.target.padded(call.shape.hidden) * call.item
    row = call.shape.gates * gate
    return {"gates": call.buffer(rows * chunk * row), "gates_row": row, "gate_step": gate}


def run_backward(
    layer: Layer,
    states: tuple[Tensor, ...],
    saved: tuple[Tensor, ...],
    dstates: tuple[Tensor | None, ...],
    dfinals: tuple[Tensor | None, ...],
    needs: Needs,
    groups: int,
) -> Gradients:
    call = Call(layer)
    shape, cell, x = call.shape, call.cell, call.x
    kept = list(saved)
    gates = kept.pop(0).contiguous() if cell.saved else None
    full = kept.pop(0).contiguous() if call.projected else None
    h, *extra = (state.contiguous() for state in states)
    dh, *dextra = (each if each is None else each.contiguous() for each in dstates)
    dfinals = tuple(each if each is None else each.contiguous() for each in dfinals)
    dx_gates = x.new_empty(*call.lead, cell.gates * shape.hidden)
    du_gates = dx_gates if cell.one_gradient else torch.empty_like(dx_gates)
    dh_total = torch.empty_like(h) if call.projected else None
    dhx = tuple(torch.empty_like(initial) for initial in call.hx)

    work = shape.rows * shape.row_work * shape.directions
    zeros = torch.zeros(call.target.padded(max(shape.hidden, shape.width)) + 16, dtype=x.dtype)
    panels = call.pack(
        [call.rows(w) for weights in call.weights for w in (weights.w_hh, weights.w_hr) if w is not None]
    )
    each = len(panels) // shape.directions
    cuts = plan.row_cuts(shape, call.threads)
    jobs, whole = [], []
    for direction in range(shape.directions):
        shared = call.state_fields(direction, h, extra[0] if extra else None, gates, full)
        shared |= gradient_fields(call, direction, dh, dextra[0] if dextra else None, dx_gates, du_gates, dh_total)
        shared |= dict(zip(("w_hh", "w_hr"), panels[direction * each :], strict=False)) | {"zeros": zeros.data_ptr()}
        if not call.projected:
            shared["w_hr"] = 0
        whole.append(call.record(loops.LAYER, **shared, **call.slice_fields(direction, 0, shape.batch)))
        for first, last in pairwise(cuts):
            fields = shared | call.slice_fields(direction, first, last) | call.work_fields(last - first, 1)
            fields |= final_gradient_fields(call, direction, first, dfinals, dhx)
            jobs.append(call.record(loops.LAYER, **fields))
    call.run(tasks.BACKWARD, jobs, work)

    dx = input_gradient(call, dx_gates) if needs.x else None
    weights = tuple(Weights(None, None, None, None, None) for _ in call.weights)
    if needs.weights:
        weights = weight_gradients(call, whole, dx_gates, du_gates, dh_total, full, groups)
    return Gradients(dx, dhx if needs.hx else (None,) * len(dhx), weights)


def gradient_fields(call: Call, direction: int, dh, dextra, dx_gates, du_gates, dh_total) -> dict[str, int]:
    shape, item = call.shape, call.item
    width, hidden = shape.width * item, shape.hidden * item
    fields = {
        "dx_gates": dx_gates.data_ptr() + direction * shape.gates * hidden,
        "du_gates": du_gates.data_ptr() + direction * shape.gates * hidden,
        "dgates_row": shape.directions * shape.gates * hidden,
        "dh_row": shape.directions * width,
        "dextra_row": shape.directions * hidden,
        "dh_total_row": shape.directions * width,
    }
    if dh is not None:
        fields["dh"] = dh.data_ptr() + direction * width
    if dextra is not None:
        fields["dextra"] = dextra.data_ptr() + direction * hidden
    if dh_total is not None:
        fields["dh_total"] = dh_total.data_ptr() + direction * width
    return fields


def final_gradient_fields(call: Call, direction: int, first: int, dfinals, dhx) -> dict[str, int]:
    offset = (direction * call.shape.batch + first) * call.item
    widths = (call.shape.width, call.shape.hidden)
    names = (("dh_final", "dh_first"), ("dextra_final", "dextra_first"))
    fields = {}
    for (final, start), width, dfinal, dfirst in zip(names, widths, dfinals, dhx, strict=False):
        fields[start] = dfirst.data_ptr() + offset * width
        if dfinal is not None:
            fields[final] = dfinal.data_ptr() + offset * width
    return fields


def input_gradient(call: Call, dx_gates: Tensor) -> Tensor:
    """dx = the sum over directions of dx_gates W_ih."""
    shape, item = call.shape, call.item
    dx = call.x.new_empty(call.x.shape)
    depth = shape.gates * shape.hidden
    panels = call.pack([call.rows(weights.w_ih) for weights in call.weights])
    tile_bytes = call.target.accumulators * call.target.vector
    chunk = plan.product_chunk(call.target, depth)
    cuts = plan.even_cuts(shape.rows, call.threads)
    jobs = []
    for first, last in pairwise(cuts):
        jobs.append(
            call.record(
                gradients.PRODUCT,
                rows=last - first,
                depth=depth,
                units=shape.inputs,
                parts=shape.directions,
                left=dx_gates.data_ptr() + first * shape.directions * depth * item,
                left_row=shape.directions * depth * item,
                left_part=depth * item,
                panels=panels[0],
                panels_part=panels[-1] - panels[0] if shape.directions > 1 else 0,
                out=dx.data_ptr() + first * shape.inputs * item,
                out_row=shape.inputs * item,
                tile=call.buffer(tile_bytes),
                places=call.buffer(8 * chunk),
                goals=call.buffer(8 * chunk),
                chunk=chunk,
            )
        )
    call.run(tasks.ROWS_PRODUCT, jobs, shape.rows * depth * shape.inputs * shape.directions)
    return dx


def weight_gradients(call: Call, whole, dx_gates, du_gates, dh_total, full, groups: int) -> tuple[Weights, ...]:
    """Sums of outer products over all rows, group by group."""
    shape = call.shape
    jobs: list[int] = []
    results = []
    for direction, weights in enumerate(call.weights):
        biased = weights.b_ih is not None
        place = (whole[direction], direction)
        w_ih, b_ih = outer(call, jobs, place, dx_gates, shape.inputs, gradients.INPUTS, groups, biased)
        twice = biased and not call.cell.one_gradient
        w_hh, b_hh = outer(call, jobs, place, du_gates, shape.width, gradients.ENTERING, groups, twice)
        w_hr = None
        if full is not None:
            w_hr, _ = outer(call, jobs, place, dh_total, shape.hidden, gradients.GIVEN, groups, False, full)
        results.append((w_ih, w_hh, b_ih, b_hh, w_hr))
    call.run(tasks.OUTER_PRODUCT, jobs, shape.rows * shape.row_work * shape.directions)
    return tuple(
        Weights(w_ih, w_hh, b_ih, b_ih.clone() if b_hh is None and b_ih is not None else b_hh, w_hr)
        for w_ih, w_hh, b_ih, b_hh, w_hr in results
    )


def outer(
    call: Call,
    jobs: list[int],
    place: tuple[int, int],
    left: Tensor,
    units: int,
    right: int,
    groups: int,
    biased: bool,
    given: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Add the jobs of one weight's gradient, and return it and its bias's, which they will fill."""
    layer, direction = place
    target, item = call.target, call.item
    directions, columns = left.shape[-2:]
    weight = left.new_empty(groups, columns, units)
    bias = left.new_empty(groups, columns) if biased else None
    cuts = [cut * target.lanes for cut in plan.even_cuts(-(-columns // target.lanes), call.threads)]
    block = plan.OUTER_BLOCK
    for group in range(groups):
        for first, last in pairwise(cuts):
            if first == last:
                continue
            fields = {
                "layer": layer,
                "right": right,
                "group": group,
                "groups": groups,
                "left": left.data_ptr() + direction * columns * item,
                "left_row": directions * columns * item,
                "columns": columns,
                "first": first,
                "last": min(last, columns),
                "units": units,
                "out": weight[group].data_ptr(),
                "bias": 0 if bias is None else bias[group].data_ptr(),
                "block": block,
                "tile": call.buffer(target.accumulators * target.vector),
                "places": call.buffer(16 * target.lanes),
                "left_places": call.buffer(8 * block),
                "right_places": call.buffer(8 * block),
                "panels": call.buffer(plan.panel_bytes(target, units, block)),
                "strip": call.buffer(block * target.vector),
            }
            if given is not None:
                row = given.shape[-1] * item
                fields |= {"right_base": given.data_ptr() + direction * row, "right_row": given.shape[-2] * row}
            jobs.append(call.record(gradients.OUTER, **fields))
    if groups == 1:
        return weight[0], None if bias is None else bias[0]
    return weight, bias
