"""Instructions between the two cores of an LNC."""

from typing import Any

from nki._dtypes import check_narrow
from nki._errors import require
from nki._instruction import instruction
from nki._launch import meet
from nki._machine import machine
from nki._memory import sbuf, shared_hbm
from nki._tensor import NkiTensor
from nki.isa import _enums

GPSIMD_BYTES = {4: 1024, 2: 512, 1: 256}  # per partition, by the size of an element


def _check_lnc(title: str) -> None:
    core = machine()
    require(core.generation >= 3, title, "generation", "be trn2 or later", core.generation)
    require(core.num_cores == 2, title, "cores", "be two, so the LNC degree 2", core.num_cores)


@instruction
def core_barrier(
    data: NkiTensor, cores: tuple[int, int], engine: Any = _enums.engine.gpsimd, name: str | None = None
) -> None:
    """Wait until both cores are here; then each sees what the other did to `data`.

    nki.isa.core_barrier, SDK 2.32 API reference. 2.33 allows it with one core too. No document says that it orders
    accesses to tensors other than `data`: it does not here.
    """
    _check_lnc("core_barrier")
    good = isinstance(data, NkiTensor) and data.buffer is shared_hbm
    require(good, "core_barrier", "data", "be a tensor of nl.shared_hbm", data)
    pair = isinstance(cores, (tuple, list)) and tuple(cores) == (0, 1)
    require(pair, "core_barrier", "cores", "be (0, 1)", cores)
    good = isinstance(engine, _enums.engine) and engine is not _enums.engine.unknown
    require(good, "core_barrier", "engine", "be a member of nisa.engine", engine)
    core = machine()
    meet(core, "core_barrier", (data.storage.line, id(data.storage)))
    data.storage.epochs[core.core] += 1
    core.count("sync")


@instruction
def sendrecv(
    src: NkiTensor,
    dst: NkiTensor,
    send_to_rank: int,
    recv_from_rank: int,
    pipe_id: int,
    dma_engine: Any = _enums.dma_engine.dma,
    name: str | None = None,
) -> None:
    """Send a tile of SBUF to the other core and receive one of the same shape.

    nki.isa.sendrecv, SDK 2.32 API reference.
    """
    title = "sendrecv"
    _check_lnc(title)
    for operand, tensor in (("src", src), ("dst", dst)):
        good = isinstance(tensor, NkiTensor) and tensor.buffer is sbuf and not tensor.is_indirect()
        require(good, title, operand, "be a tensor of SBUF", tensor)
    require(dst.shape == src.shape, title, "dst", f"have src's shape {src.shape}", dst.shape)
    require(dst.dtype is src.dtype, title, "dst", f"have src's dtype {src.dtype}", dst.dtype)
    check_narrow(title, "src", src.dtype)
    require(dst.storage is not src.storage, title, "dst", "be another tensor than src", dst)
    core = machine()
    for operand, rank in (("send_to_rank", send_to_rank), ("recv_from_rank", recv_from_rank)):
        require(rank == 1 - core.core, title, operand, f"be the other core, {1 - core.core}", rank)
    require(type(pipe_id) is int and pipe_id >= 0, title, "pipe_id", "be a number", pipe_id)
    require(
        isinstance(dma_engine, _enums.dma_engine), title, "dma_engine", "be a member of nisa.dma_engine", dma_engine
    )
    size = src.dtype.itemsize
    if dma_engine is _enums.dma_engine.gpsimd_dma:
        limit = GPSIMD_BYTES[size]
        require(src.free * size <= limit, title, "src", f"have at most {limit} bytes per partition", src.free * size)
    values = src.values(title, "src")
    received = meet(core, title, (pipe_id, src.shape, src.dtype, dma_engine), values)
    dst.write(received, title)
    count = src.size
    core.count("dma", elements=count, bytes=count * size, descriptors=src.partitions)
