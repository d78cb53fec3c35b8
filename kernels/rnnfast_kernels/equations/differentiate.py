"""Derivatives of expression graphs, and the choice of what a forward pass keeps for them."""

import math
from collections.abc import Iterable, Mapping, Sequence

from rnnfast_kernels.equations.graph import Node, ordered
from rnnfast_kernels.equations.operations import EXPENSIVE, OPERATIONS

# What computing a value again may cost, rather than keep it: one exponential and a few additions.
AFFORDABLE = EXPENSIVE + 4


def partial(node: Node, place: int, d: Node) -> Node | None:
    """Return d times the derivative of a node by one of its operands, None for 0."""
    return OPERATIONS[node.op].partials(d, node, *node.operands)[place]


def gradient(results: Sequence[Node], seeds: Sequence[Node], leaves: Iterable[Node]) -> dict[Node, Node]:
    """Return the gradient by each leaf that has one, where `seeds` are those by the results."""
    found: dict[Node, Node] = {}
    for node, seed in zip(results, seeds, strict=True):
        found[node] = found[node] + seed if node in found else seed
    for node in reversed(ordered(results)):
        if node not in found:
            continue
        for place, operand in enumerate(node.operands):
            if operand.number is not None:
                continue
            term = partial(node, place, found[node])
            if term is not None:
                found[operand] = found[operand] + term if operand in found else term
    return {leaf: found[leaf] for leaf in leaves if leaf in found}


def tangent(results: Sequence[Node], tangents: Mapping[Node, Node]) -> list[Node | None]:
    """Return the tangent of each result, None for 0. tangents: of leaves, and of other nodes where they are given."""
    found: dict[Node, Node | None] = dict(tangents)
    for node in ordered(results, known=found):
        total = None
        for place, operand in enumerate(node.operands):
            along = found.get(operand)
            if along is None:
                continue
            term = partial(node, place, along)
            if term is not None:
                total = term if total is None else total + term
        found[node] = total
    return [found[result] for result in results]


def residuals(wanted: Sequence[Node | None], forward: Sequence[Node], free: Iterable[Node]) -> list[Node]:
    """Return the forward values that must be kept so that the wanted expressions can be computed from them.

    forward: the nodes of the forward pass. free: those that are there without being kept: states, parameters, signals.
    What costs little to compute from what is there is computed again.
    """
    there = set(free)
    inside = set(forward)
    reached = ordered(wanted, known=inside)
    named = {operand for node in reached for operand in node.operands if operand in inside}
    named |= {node for node in wanted if node in inside}
    kept: list[Node] = []
    for node in forward:
        if node in named and budget_left(AFFORDABLE, node, there) < 0:
            kept.append(node)
            there.add(node)
    return sorted(kept, key=lambda node: (node.op == "leaf", node.order))


def budget_left(budget: float, node: Node, there: set[Node]) -> float:
    """Return what is left of a budget after computing a node from those that are there; below 0, it is too small.

    Whatever is used several times counts each time. The search ends with the budget, so that it stays short.
    """
    if node in there or node.op == "number":
        return budget
    if node.op == "leaf":
        return -math.inf
    budget -= OPERATIONS[node.op].cost
    for operand in node.operands[:1] if node.op == "surrogate" else node.operands:
        if budget < 0:
            break
        budget = budget_left(budget, operand, there)
    return budget
