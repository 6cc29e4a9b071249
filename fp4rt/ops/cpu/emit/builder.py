"""How LLVM vector code is written and named: a builder, loops, and functions that Numba code can call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fp4rt.ops.cpu.runtime import TIER

LANES = 16 if TIER == "avx512" else 8
ROWS = 4  # rows that one call of dot_rows or tile computes

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
FLOAT = ir.FloatType()
FLOATS = ir.VectorType(FLOAT, LANES)
INTS = ir.VectorType(I32, LANES)


def i64(value: int) -> ir.Constant:
    return ir.Constant(I64, value)


def splat(kind: ir.Type, value: float | int | Sequence, lanes: int = LANES) -> ir.Constant:
    """A vector constant of one value, or of the values given; integers as their signed value."""
    values = list(value) if isinstance(value, (list, tuple, np.ndarray)) else [value] * lanes
    if isinstance(kind, ir.IntType):
        values = [v - (1 << kind.width) if v >= 1 << (kind.width - 1) else v for v in values]
    else:
        values = [float(v) for v in values]
    return ir.Constant(ir.VectorType(kind, len(values)), [ir.Constant(kind, v) for v in values])


class Builder(ir.IRBuilder):
    """IRBuilder with addresses as int64."""

    def at(self, address: ir.Value, kind: ir.Type) -> ir.Value:
        return self.inttoptr(address, kind.as_pointer())

    def get(self, address: ir.Value, kind: ir.Type = FLOATS, offset: int = 0) -> ir.Value:
        value = super().load(self.at(self.add(address, i64(offset)), kind))
        value.align = 1
        return value

    def put(self, value: ir.Value, address: ir.Value, offset: int = 0) -> None:
        super().store(value, self.at(self.add(address, i64(offset)), value.type)).align = 1

    def intrinsic(self, name: str, result: ir.Type, *args: ir.Value) -> ir.Value:
        function = self.module.globals.get(name) or ir.Function(
            self.module, ir.FunctionType(result, [a.type for a in args]), name)
        return self.call(function, args)

    def muladd(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        """a * b + c, fused where the processor can."""
        return self.intrinsic(f"llvm.fmuladd.v{a.type.count}f32", a.type, a, b, c)

    def prefetch(self, address: ir.Value) -> None:
        self.intrinsic("llvm.prefetch.p0", ir.VoidType(), self.at(address, I8), *(
            ir.Constant(I32, flag) for flag in (0, 0, 1)))  # read, used once, data

    def minimum(self, a: ir.Value, b: ir.Value) -> ir.Value:
        return self.select(self.icmp_signed("<", a, b), a, b)

    def spread(self, value: ir.Value) -> ir.Value:
        """A vector of one float32 in all lanes."""
        one = self.insert_element(splat(FLOAT, 0.0), value, ir.Constant(I32, 0))
        return self.pick(one, one, [0] * LANES)

    def pick(self, a: ir.Value, b: ir.Value, indices: Sequence[int]) -> ir.Value:
        return self.shuffle_vector(a, b, splat(I32, list(indices)))


_MODULE = ir.Module("fp4rt")  # filled by `assembly`; cached code is loaded without emitting anything
ENTRIES: dict[str, tuple[int, Callable[..., None]]] = {}


def function(name: str, count: int, emit: Callable[..., None]) -> ir.Function:
    """The function `name` of `count` int64 arguments, emitted the first time it is asked for."""
    if name in _MODULE.globals:
        return _MODULE.globals[name]
    made = ir.Function(_MODULE, ir.FunctionType(ir.VoidType(), [I64] * count), name)
    builder = Builder(made.append_basic_block("entry"))
    emit(builder, *made.args)
    builder.ret_void()
    return made


def entry(name: str, count: int, emit: Callable[..., None]):
    """A Numba intrinsic of `count` int64 arguments: a call of the machine code that `emit` stands for."""
    name = f"fp4rt_{name}"
    ENTRIES[name] = count, emit

    def typer(context, *args):
        def generate(target, builder, signature, values):
            function = builder.module.globals.get(name) or ir.Function(
                builder.module, ir.FunctionType(ir.VoidType(), [I64] * count), name)
            builder.call(function, values)
            return target.get_dummy_value()

        return types.void(*[types.int64] * count), generate

    positional = inspect.Parameter.POSITIONAL_OR_KEYWORD  # Numba reads the arity from the signature
    typer.__signature__ = inspect.Signature(
        [inspect.Parameter(each, positional) for each in ("context", *(f"a{i}" for i in range(count)))])
    typer.__name__ = typer.__qualname__ = name
    return intrinsic(typer)


def assembly() -> str:
    """All entries as LLVM assembly."""
    for name, (count, emit) in ENTRIES.items():
        function(name, count, emit)
    return str(_MODULE)


def loop(b: Builder, count: ir.Value, addresses: list[ir.Value], steps: Sequence[ir.Value | int],
          state: list[ir.Value], body: Callable[[list[ir.Value], list[ir.Value]], list[ir.Value]]) -> list[ir.Value]:
    """body(addresses, state) -> state, count (at least 1) times; addresses advance by their steps."""
    before = b.block
    again, done = (b.function.append_basic_block(name) for name in ("loop", "done"))
    b.branch(again)
    b.position_at_end(again)
    initial = [count, *addresses, *state]
    phis = [b.phi(value.type) for value in initial]
    for phi, value in zip(phis, initial):
        phi.add_incoming(value, before)
    split = 1 + len(addresses)
    state = body(phis[1:split], phis[split:])
    steps = [step if isinstance(step, ir.Value) else i64(step) for step in steps]
    following = [b.sub(phis[0], i64(1)), *(b.add(a, s) for a, s in zip(phis[1:split], steps)), *state]
    for phi, value in zip(phis, following):
        phi.add_incoming(value, b.block)
    b.cbranch(b.icmp_signed(">", following[0], i64(0)), again, done)
    b.position_at_end(done)
    return state
