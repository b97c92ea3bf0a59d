"""Instructions on registers (SDK 2.32 API reference) and on scalars (SDK 2.33); they take no name."""

import math

import numpy as np

from nki._dtypes import int32, int64
from nki._errors import require
from nki._instruction import instruction
from nki._layout import as_int
from nki._machine import machine
from nki._register import NkiScalar, VirtualRegister
from nki._tensor import NkiTensor


@instruction
def register_alloc(x: int | None = None) -> VirtualRegister:
    """Make a register, with a value or without.

    nki.isa.register_alloc, SDK 2.32 API reference; a tensor is loaded with register_load instead (0.3.0).
    """
    return VirtualRegister(None if x is None else as_int("register_alloc", "x", x))


def _check(title: str, operand: str, register: VirtualRegister) -> None:
    what = type(register).__name__
    if isinstance(register, NkiScalar):
        what = "a scalar, which the index of a loop is where no bound is a register"
    require(isinstance(register, VirtualRegister), title, operand, "be a register", what)


def _check_element(title: str, operand: str, tensor: NkiTensor) -> None:
    require(isinstance(tensor, NkiTensor), title, operand, "be a tensor", type(tensor).__name__)
    require(math.prod(tensor.shape) == 1, title, operand, "have one element", tensor.shape)
    require(tensor.buffer.name != "psum", title, operand, "be in HBM or SBUF", tensor)
    rule = "be int32, uint32 or a smaller integer: no document says how a register holds others"
    require(tensor.dtype.is_int and tensor.dtype.itemsize <= 4, title, operand, rule, tensor.dtype)


@instruction
def register_load(dst: VirtualRegister, src: NkiTensor) -> None:
    """Load a one-element tensor. nki.isa.register_load, SDK 2.32 API reference."""
    _check("register_load", "dst", dst)
    dst.check_writable("register_load")
    _check_element("register_load", "src", src)
    dst.load(int(src.values("register_load", "src").reshape(())[()]), "register_load")
    machine().count("sync", elements=1, bytes=4)


@instruction
def register_store(dst: NkiTensor, src: VirtualRegister) -> None:
    """Store a register in a one-element tensor. nki.isa.register_store, SDK 2.32 API reference."""
    _check("register_store", "src", src)
    _check_element("register_store", "dst", dst)
    value = src.read("register_store", "src")
    require(dst.dtype.itemsize == 4, "register_store", "dst", "be int32 or uint32", dst.dtype)
    dst.write(np.array([[value & 0xFFFFFFFF]], np.uint32).view(dst.dtype.numpy), "register_store")
    machine().count("sync", elements=1, bytes=4)


@instruction
def register_move(dst: VirtualRegister, src: VirtualRegister) -> None:
    """Copy a register.

    nki.isa.register_move, SDK 2.32 API reference, which takes an integer too; another guide does not: allocate one.
    """
    _check("register_move", "dst", dst)
    dst.check_writable("register_move")
    _check("register_move", "src", src)
    dst.load(src.read("register_move", "src"), "register_move")
    machine().count("sync", elements=1)


def _check_scalar_tile(title: str, operand: str, tensor: NkiTensor) -> None:
    require(isinstance(tensor, NkiTensor), title, operand, "be a tensor", type(tensor).__name__)
    require(tensor.shape == (1, 1), title, operand, "be a 1x1 tensor", tensor.shape)
    require(tensor.buffer.name != "psum", title, operand, "be in HBM or SBUF", tensor)
    require(tensor.dtype in (int32, int64), title, operand, "be nl.int32 or nl.int64", tensor.dtype)


@instruction
def scalar_load(src: NkiTensor) -> NkiScalar:
    """Load a scalar of the width of a 1x1 tensor. nki.isa.scalar_load, SDK 2.33 API reference; not in 0.6."""
    _check_scalar_tile("scalar_load", "src", src)
    machine().count("sync", elements=1, bytes=src.dtype.itemsize)
    return NkiScalar.make(int(src.values("scalar_load", "src")[0, 0]), src.dtype)


@instruction
def scalar_store(dst: NkiTensor, value: NkiScalar) -> None:
    """Store a scalar in a 1x1 tensor of its width. nki.isa.scalar_store, SDK 2.33 API reference; not in 0.6."""
    rule = "be a scalar: use memset for a number"
    require(isinstance(value, NkiScalar), "scalar_store", "value", rule, type(value).__name__)
    _check_scalar_tile("scalar_store", "dst", dst)
    require(dst.dtype is value.dtype, "scalar_store", "dst", f"have the width of the value, {value.dtype}", dst.dtype)
    dst.write(np.array([[value.read("scalar_store", "value")]], dst.dtype.numpy), "scalar_store")
    machine().count("sync", elements=1, bytes=dst.dtype.itemsize)
