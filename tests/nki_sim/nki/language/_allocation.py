"""Making tensors (nki.language, SDK 2.32 API reference)."""

import gc
from collections.abc import Sequence
from typing import Any

import numpy as np

from nki._dtypes import DType, cast, check_dtype, check_narrow, int64, of_numpy, uint8
from nki._errors import fail, kernel_line, require
from nki._instruction import record, use_name
from nki._layout import MAX_DIMS, as_int
from nki._machine import Core, machine
from nki._memory import (
    BANK_BYTES,
    PARTITIONS,
    PSUM_BANKS,
    WRITTEN,
    Buffer,
    Storage,
    free_bank,
    make_storage,
    psum,
    sbuf,
    shared_hbm,
    usable_sbuf_bytes,
)
from nki._tensor import NkiTensor, whole


def ndarray(
    shape: Sequence[int],
    dtype: Any,
    buffer: Any = sbuf,
    name: str = "",
    address: tuple[int, int] | None = None,
) -> NkiTensor:
    """Make a tensor of undefined contents.

    address: (partition, byte within the partition), on chip only. Two placed tensors may share bytes; a write to one
    undefines them in the other.
    """
    core = machine()
    element = check_dtype("ndarray", dtype, core.generation)
    require(isinstance(buffer, Buffer), "ndarray", "buffer", "be a buffer of nki.language", repr(buffer))
    require(isinstance(shape, (tuple, list)), "ndarray", "shape", "be a tuple", repr(shape))
    sizes = tuple(as_int("ndarray", "shape", n) for n in shape)
    require(bool(sizes) and min(sizes) >= 1, "ndarray", "shape", "have positive sizes", sizes)
    require(isinstance(name, str), "ndarray", "name", "be a string", repr(name))
    small = not buffer.on_chip or (buffer is sbuf and sizes == (1, 1))
    require(small or element is not int64, "ndarray", "shape", "be (1, 1) in SBUF with nl.int64", (sizes, buffer))
    if name:
        use_name(f"tensor {name}", "ndarray")
    record("ndarray", sizes, element, buffer, kernel_line())
    if buffer is shared_hbm:
        require(not core.turns, "ndarray", "buffer", "not be nl.shared_hbm inside a dynamic loop", buffer)
    if buffer is shared_hbm and core.num_cores == 2:
        return whole(_shared(core, element, sizes, name))
    storage = make_storage(buffer, element, sizes, name, kernel_line())
    storage.core, storage.scope = core.core if buffer is not shared_hbm else None, core.turns
    if buffer.on_chip:
        _place(core, storage, address)
    else:
        require(address is None, "ndarray", "address", "be given on chip only", address)
    return whole(storage)


def _shared(core: Core, dtype: DType, shape: tuple[int, ...], name: str) -> Storage:
    """Give the one tensor that both cores make as their n-th in shared HBM."""
    assert core.launch is not None
    at = core.shared
    core.shared += 1
    if at == len(core.launch.shared):
        storage = make_storage(shared_hbm, dtype, shape, name, kernel_line())
        storage.share()
        core.launch.shared.append(storage)
    storage = core.launch.shared[at]
    same = (storage.dtype, storage.shape, storage.name) == (dtype, shape, name)
    rule = f"be those of core {1 - core.core}, {storage.shape} {storage.dtype} {storage.name!r} ({storage.line})"
    require(same, "ndarray", "shape, dtype and name", rule, f"{shape} {dtype} {name!r}")
    return storage


def _place(core: Core, storage: Storage, address: tuple[int, int] | None) -> None:
    """Find room on chip. Tensors that Python has dropped take none."""
    shape, size = storage.shape, storage.free_bytes
    require(2 <= len(shape) <= MAX_DIMS, "ndarray", "shape", f"have 2 to {MAX_DIMS} dimensions on chip", shape)
    require(shape[0] <= PARTITIONS, "ndarray", "shape", f"have at most {PARTITIONS} partitions", shape)
    in_psum = storage.buffer is psum
    room = PSUM_BANKS * BANK_BYTES if in_psum else usable_sbuf_bytes(core.generation)
    what = "PSUM" if in_psum else "SBUF"
    require(size <= room, "ndarray", "shape", f"fit {room} bytes per partition of {what}", f"{size} bytes")
    if address is not None:
        _check_address(storage, address, room)
        storage.address = (int(address[0]), int(address[1]))
        storage.bank = storage.address[1] // BANK_BYTES if in_psum else 0
    elif in_psum:
        bank = free_bank(size, core.live)
        if bank is None:
            gc.collect()
            bank = free_bank(size, core.live)
        if bank is None:
            fail(
                "ndarray",
                "tensor",
                f"find room in {PSUM_BANKS} PSUM banks of {BANK_BYTES} bytes",
                _report(core, storage),
            )
        storage.bank = bank
    elif _used(core) + size > room:
        gc.collect()
        fits = _used(core) + size <= room
        require(fits, "ndarray", "tensor", f"find room in {room} bytes per partition of SBUF", _report(core, storage))
    core.live.add(storage)


def _used(core: Core) -> int:
    """Bytes per partition of SBUF that live tensors take; those that the kernel placed up to the highest of them."""
    free = sum(s.free_bytes for s in core.live if s.buffer is sbuf and s.address is None)
    return free + max((s.address[1] + s.free_bytes for s in core.live if s.buffer is sbuf and s.address), default=0)


def _report(core: Core, wanted: Storage) -> str:
    live = sorted((s for s in core.live if s.buffer is wanted.buffer), key=lambda s: -s.free_bytes)
    largest = ", ".join(f"{s.free_bytes} of {s.line}" for s in live[:4])
    return f"{wanted.free_bytes} bytes beside {sum(s.free_bytes for s in live)} in {len(live)} live tensors: {largest}"


def _check_address(storage: Storage, address: Any, room: int) -> None:
    good = isinstance(address, (tuple, list)) and len(address) == 2
    require(good, "ndarray", "address", "be (partition, byte within the partition)", address)
    partition, byte = (as_int("ndarray", "address", part) for part in address)
    fits = partition >= 0 and partition + storage.partitions <= PARTITIONS
    require(fits, "ndarray", "address", f"keep the tensor within {PARTITIONS} partitions", address)
    step = 32 if storage.partitions <= 32 else 64 if storage.partitions <= 64 else PARTITIONS
    require(partition % step == 0, "ndarray", "address", f"start at a multiple of {step} partitions", address)
    fits = byte >= 0 and byte + storage.free_bytes <= room
    require(fits, "ndarray", "address", f"keep the tensor within {room} bytes of a partition", address)
    small = storage.buffer is psum and storage.free_bytes <= BANK_BYTES
    one_bank = byte // BANK_BYTES == (byte + storage.free_bytes - 1) // BANK_BYTES
    require(
        not small or one_bank, "ndarray", "address", f"keep the tensor within a bank of {BANK_BYTES} bytes", address
    )


def full(shape: Sequence[int], fill_value: Any, dtype: Any, buffer: Any = sbuf, name: str = "") -> NkiTensor:
    """Make a tensor that holds one value."""
    check_narrow("full", "dtype", dtype)
    tensor = ndarray(shape, dtype, buffer, name)
    if buffer is sbuf or buffer is psum:
        from nki.isa import memset

        value = int(fill_value) if tensor.dtype.is_int else float(fill_value)
        memset(dst=tensor, value=value)
    else:
        values = np.full(tensor.shape, fill_value)
        tensor.store(cast(values.astype(np.float32), tensor.dtype, "full"), "full", "tensor")
    return tensor


def zeros(shape: Sequence[int], dtype: Any, buffer: Any = sbuf, name: str = "") -> NkiTensor:
    """Make a tensor of zeros."""
    return full(shape, 0, dtype, buffer, name)


def ones(shape: Sequence[int], dtype: Any, buffer: Any = sbuf, name: str = "") -> NkiTensor:
    """Make a tensor of ones."""
    return full(shape, 1, dtype, buffer, name)


def empty_like(x: NkiTensor, dtype: Any = None, buffer: Any = None, name: str = "") -> NkiTensor:
    """Make a tensor of undefined contents, shaped as another."""
    return ndarray(x.shape, x.dtype if dtype is None else dtype, x.buffer if buffer is None else buffer, name)


def zeros_like(x: NkiTensor, dtype: Any = None, buffer: Any = None, name: str = "") -> NkiTensor:
    """Make a tensor of zeros, shaped as another."""
    return zeros(x.shape, x.dtype if dtype is None else dtype, x.buffer if buffer is None else buffer, name)


def shared_constant(constant: Any) -> NkiTensor:
    """Make a tensor of HBM from a numpy array known at compile time (or from a .npy file of that name)."""
    array = np.load(constant) if isinstance(constant, str) else constant
    good = isinstance(array, np.ndarray) and array.ndim >= 1
    require(good, "shared_constant", "constant", "be a numpy array or the path of one", type(constant).__name__)
    try:
        dtype = of_numpy(array.dtype)
    except TypeError as error:
        fail("shared_constant", "constant", "have a dtype of nki.language", error)
    check_narrow("shared_constant", "constant", dtype)
    require(dtype.name != "float8_e4m3", "shared_constant", "constant", "not be float8_e4m3", dtype)
    tensor = ndarray(array.shape, dtype, shared_hbm)
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    fresh = not tensor.storage.state.any()
    require(
        fresh or np.array_equal(tensor.storage.data, data), "shared_constant", "constant", "be one on both cores", array
    )
    tensor.storage.data[...] = data
    tensor.storage.state[...] = WRITTEN
    return tensor


def shared_identity_matrix(n: int, dtype: Any = uint8, dst: NkiTensor | None = None) -> NkiTensor:
    """Write an identity matrix into `dst` in SBUF; versions disagree where it lies without, so `dst` is required."""
    require(isinstance(dst, NkiTensor), "shared_identity_matrix", "dst", "be given", dst)
    assert dst is not None
    good = dst.shape == (n, n) and dst.buffer is sbuf and dst.dtype is dtype
    require(good, "shared_identity_matrix", "dst", f"be ({n}, {n}) {dtype} in SBUF", dst)
    dst.write(cast(np.eye(n, dtype=np.float32), dst.dtype, "shared_identity_matrix"), "shared_identity_matrix")
    return dst


def is_hbm(buffer: Buffer) -> bool:
    """Whether a buffer is HBM."""
    return not buffer.on_chip


def is_on_chip(buffer: Buffer) -> bool:
    """Whether a buffer is SBUF or PSUM."""
    return buffer.on_chip


def is_psum(buffer: Buffer) -> bool:
    """Whether a buffer is PSUM."""
    return buffer is psum


def is_sbuf(buffer: Buffer) -> bool:
    """Whether a buffer is SBUF."""
    return buffer is sbuf
