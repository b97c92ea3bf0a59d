"""Instructions on registers (SDK 2.32 API reference); they take no name."""

import math

import numpy as np

from nki._errors import require
from nki._instruction import instruction
from nki._layout import as_int
from nki._machine import machine
from nki._register import VirtualRegister
from nki._tensor import NkiTensor


@instruction
def register_alloc(x: int | None = None) -> VirtualRegister:
    """Make a register, with a value or without.

    nki.isa.register_alloc, SDK 2.32 API reference; a tensor is loaded with register_load instead (0.3.0).
    """
    return VirtualRegister(None if x is None else as_int("register_alloc", "x", x))


def _check(title: str, operand: str, register: VirtualRegister) -> None:
    require(isinstance(register, VirtualRegister), title, operand, "be a register", type(register).__name__)


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
