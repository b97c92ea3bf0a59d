"""Calls as an enemy makes them: drawn cases with corrupted arguments, each tensor in a guarded buffer of its own."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torch_paged.testing import CopyCase, GatherCase, MergeCase, WriteCase, build
from torch_paged.testing.combinations import FACTORS, draw_case
from torch_paged.testing.tensors import LAYOUTS, storage_of

GUARD_BYTES = 4096
POISON = 0xFF  # NaN in every floating dtype, -1 in every integer
WRITTEN = {
    "reshape_and_cache": ("kv_cache",),
    "quantize_and_cache": ("kv_cache", "kv_scales"),
    "copy_blocks": ("kv_cache", "kv_scales"),
}
"""Op -> the arguments that it writes."""

_SMALL = FACTORS | {
    "contexts": ("short",) * 15 + ("split",),
    "head_dim": (16, 1, 3, 8, 40) * 3 + (64, 128),
    "heads": ((2, 4), (2, 1), (1, 8), (3, 3)),
    "block_size": (16, 1, 3, 4),
}
_STORAGE = [(dtype, rank) for dtype in (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2) for rank in (1, 2)]
_CACHE_DTYPES = (*FACTORS["dtype"], torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
_DTYPES = tuple(value for value in vars(torch).values() if isinstance(value, torch.dtype))
_ODD_INTS = (0, -1, 1, 2, -2, 7, 2**31 - 1, 2**31, -(2**31), 2**32, 2**62, 2**63 - 1, -(2**63))
_ODD_REALS = (0.0, -0.0, 1.0, -1.0, 1e-46, 1e-40, 1e-38, 1e38, 1e39, 1e308, 5e-324)
_NOT_REALS = (float("nan"), float("inf"), float("-inf"))
_NEGATED = (torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64)
_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # dtypes that torch can index
_OPTIONS = {
    "max_seqlen_q": _ODD_INTS,
    "max_seqlen_k": _ODD_INTS,
    "max_len": (-1, 0, 1, 2, 40, 2**14, 2**40, 2**62, 2**63 - 1, -(2**63)),  # what lies between fills a memory
    "sliding_window": (None, *_ODD_INTS),
    "attention_chunk": (None, *_ODD_INTS),
    "value_dim": (None, *_ODD_INTS),
    "softmax_scale": (None, *_ODD_REALS, *_NOT_REALS),
    "logits_soft_cap": (*_ODD_REALS, *_NOT_REALS),
    "causal": (False, True),
}
_WRONG_TYPES = ("text", 2**63, 1.5, None, [1, 2], object)


Change = Callable[["HostileCall", random.Random], str]
"""Corrupts a call, and returns how in words; nothing where it left the call as it was."""


@dataclass
class HostileCall:
    """One call: the op, its arguments by schema name, and what was done to them.

    Attributes:
        op: schema name without overload.
        arguments: all of them.
        corruptions: what was done, in words.
        buffers: the memory of the tensors, guards included, as bytes.
        overlapping: whether what is written overlaps itself or what is read: its values are then unspecified.
    """

    op: str
    arguments: dict[str, Any]
    corruptions: list[str] = field(default_factory=list)
    buffers: list[Tensor] = field(default_factory=list)
    overlapping: bool = False

    @property
    def written(self) -> tuple[str, ...]:
        """The arguments that the op writes."""
        return WRITTEN.get(self.op, ())

    def tensors(self) -> list[str]:
        """Return the names of the arguments that are tensors."""
        return [name for name, value in self.arguments.items() if isinstance(value, Tensor)]


def draw_call(rng: random.Random, corrupt: bool = True) -> HostileCall:
    """Draw a valid call of any op, and up to four corruptions of it."""
    case = _draw_case(rng)
    ops = {CopyCase: "copy_blocks", GatherCase: "gather_cache", MergeCase: "merge_attention_states"}
    call = HostileCall(ops.get(type(case)) or case.op, build(case, rng.randrange(1000)))
    for _ in range(rng.choice((0, 1, 1, 1, 2, 2, 4)) if corrupt else 0):
        change(call, rng, _IN_MEMORY)
    isolate(call)
    if corrupt and rng.random() < 0.12:
        change(call, rng, _IN_KIND)
    return call


def change(call: HostileCall, rng: random.Random, changes: Sequence[Change]) -> None:
    """Corrupt a call once, and note how."""
    done = rng.choice(changes)(call, rng) if call.tensors() else ""
    if done:
        call.corruptions.append(done)


def isolate(call: HostileCall) -> None:
    """Move every storage into a buffer of its own, with poison on both sides of what the views span; keep aliases."""
    spans: dict[int, tuple[Tensor, int, int]] = {}  # storage -> its bytes, first and end of those in use
    for name in call.tensors():
        tensor = call.arguments[name]
        storage = storage_of(tensor)
        steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        begin = tensor.storage_offset() * tensor.itemsize if tensor.numel() else 0
        end = begin + (steps + 1) * tensor.itemsize if tensor.numel() else 0
        _, first, last = spans.get(_storage(tensor), (storage, begin, end))
        spans[_storage(tensor)] = storage, min(first, begin), max(last, end)
    moved = {}
    for key, (storage, first, last) in spans.items():
        buffer = torch.full((storage.numel() + 2 * GUARD_BYTES,), POISON, dtype=torch.uint8)
        buffer[GUARD_BYTES + first : GUARD_BYTES + last] = storage[first:last]
        moved[key] = buffer
    for name in call.tensors():
        old = call.arguments[name]
        shift = GUARD_BYTES // old.itemsize
        view = torch.empty(0, dtype=old.dtype)
        view.set_(moved[_storage(old)].untyped_storage(), old.storage_offset() + shift, old.shape, old.stride())
        call.arguments[name] = view
    call.buffers = list(moved.values())


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _draw_case(rng: random.Random) -> Any:
    kind = rng.choices(("attention", "write", "copy", "gather", "merge"), (10, 4, 2, 3, 1))[0]
    dtype = rng.choice(FACTORS["dtype"])
    heads, size, dim = rng.choice((1, 2, 3)), rng.choice((1, 3, 4, 16)), rng.choice((1, 3, 8, 16, 40))
    layout, latent = rng.choice(LAYOUTS), rng.random() < 0.25
    cache_dtype, rank = rng.choice([(None, None), (None, None), *_STORAGE])
    if kind == "attention":
        return draw_case(rng, "hostile", _SMALL)
    if kind == "write":
        if rng.random() < 0.4:
            cache_dtype, rank = rng.choice(_STORAGE)[0], 4
        return WriteCase(
            "hostile",
            num_tokens=min(rng.choice((0, 1, 2, 9)), 5 * size),
            skipped_tokens=rng.choice((0, 0, 1, 3)),
            num_kv_heads=heads,
            head_dim=dim,
            value_dim=rng.choice((None, max(1, dim - 3))),
            stored_dim=rng.choice((None, dim + 5)),
            block_size=size,
            dtype=dtype,
            cache_dtype=cache_dtype,
            scales_rank=rank,
            latent=latent,
            layout=layout,
            fused_rows=rng.random() < 0.3,
            slot_dtype=rng.choice((torch.int64, torch.int32)),
            magnitude=rng.choice((1.0, 0.0, 1e-30, 1e30)),
        )
    if kind == "merge":
        return MergeCase(
            "hostile",
            parts=rng.choice((1, 2, 5)),
            tokens=rng.choice((0, 1, 7)),
            num_heads=heads,
            head_dim=dim,
            dtype=dtype,
            sinks=rng.random() < 0.5,
            empty=rng.random() < 0.5,
        )
    shape: dict[str, Any] = {
        "num_kv_heads": heads,
        "stored_dim": dim,
        "block_size": size,
        "cache_dtype": cache_dtype or dtype,
        "scales_rank": rank if rank is None else rng.choice((1, 2, 4)),
        "latent": latent,
        "layout": layout,
    }
    if kind == "copy":
        blocks = rng.sample(range(6), 6)
        count = rng.choice((0, 1, 2, 5))
        pairs = zip(rng.choices(range(-1, 6), k=count), blocks, strict=False)
        return CopyCase("hostile", pairs=tuple(pairs), id_dtype=rng.choice((torch.int64, torch.int32)), **shape)
    lens = tuple(rng.choices((0, 1, 5, 17), k=rng.choice((1, 2, 4))))
    shape |= {"left_padded": rng.random() < 0.5, "missing_entries": rng.random() < 0.3}
    return GatherCase("hostile", context_lens=lens, extra_columns=rng.choice((0, 1, 5)), **shape)


def _pick(call: HostileCall, rng: random.Random) -> tuple[str, Tensor]:
    name = rng.choice(call.tensors())
    return name, call.arguments[name]


def _put(call: HostileCall, name: str, value: Any, how: str) -> str:
    call.arguments[name] = value
    return f"{name} {how}"


def _dtype(call: HostileCall, rng: random.Random) -> str:
    name, tensor = _pick(call, rng)
    dtype = rng.choice(_DTYPES)
    try:
        return _put(call, name, tensor.to(dtype), f"to {dtype}")
    except (RuntimeError, NotImplementedError, TypeError):  # a dtype that torch does not convert to
        return ""


def _rank(call: HostileCall, rng: random.Random) -> str:
    name, tensor = _pick(call, rng)
    others = [tensor[None], tensor.flatten(), tensor.new_zeros(()), tensor[..., None]]
    if tensor.dim() and tensor.size(0):
        others.append(tensor[0])
    other = rng.choice(others)
    return _put(call, name, other, f"of shape {tuple(other.shape)}")


def _size(call: HostileCall, rng: random.Random) -> str:
    name, tensor = _pick(call, rng)
    if not tensor.dim():
        return ""
    axis = rng.randrange(tensor.dim())
    size = rng.choice((0, 1, max(tensor.size(axis) - 1, 0), tensor.size(axis) + 1, 2 * tensor.size(axis)))
    if size <= tensor.size(axis):
        other = tensor.narrow(axis, 0, size)
    elif tensor.numel():
        index = torch.arange(size) % tensor.size(axis)
        bits = tensor.view(_SAME_SIZE[tensor.itemsize]) if tensor.itemsize in _SAME_SIZE else tensor
        other = bits.index_select(axis, index).view(tensor.dtype)
    else:
        return ""
    return _put(call, name, other, f"with {size} of axis {axis}")


def _strides(call: HostileCall, rng: random.Random) -> str:
    name, tensor = _pick(call, rng)
    if not tensor.dim() or not tensor.numel():
        return ""
    axis = rng.randrange(tensor.dim())
    how = rng.choice(("stretched", "transposed", "expanded", "overlapping", "offset"))
    if how == "stretched":
        other = torch.stack([tensor, tensor], -1)[..., 0]
    elif how == "transposed":
        other = tensor.transpose(axis, -1).contiguous().transpose(axis, -1)
    elif how == "expanded":
        other = tensor.narrow(axis, 0, 1).expand(tensor.shape)
    elif how == "offset":
        other = torch.stack([tensor, tensor])[1]
    else:
        strides = list(tensor.contiguous().stride())
        strides[axis] = rng.choice((1, max(1, strides[axis] - 1)))
        other = tensor.contiguous().as_strided(tensor.shape, strides)
    if name in call.written and how in ("expanded", "overlapping"):
        call.overlapping = True
    return _put(call, name, other, f"{how} along axis {axis}")


def _values(call: HostileCall, rng: random.Random) -> str:
    name, tensor = _pick(call, rng)
    if not tensor.numel() or tensor.dtype == torch.bool or tensor.is_complex() or tensor.itemsize == 1:
        return ""
    tensor = tensor.clone()
    wild: tuple[Any, ...] = (*_ODD_REALS, *_NOT_REALS)
    if not tensor.is_floating_point():
        limits = torch.iinfo(tensor.dtype)
        near = [call.arguments[other].size(0) for other in call.tensors() if call.arguments[other].dim()]
        cache = call.arguments.get("kv_cache")
        if isinstance(cache, Tensor) and cache.dim() == 5:
            near += [cache.size(1), cache.size(1) * cache.size(3), cache.size(1) * cache.size(3) - 1]
        wild = tuple(value for value in (*_ODD_INTS, *near, 2**40) if limits.min <= value <= limits.max)
    for _ in range(rng.choice((1, 1, 2, 5))):
        index = tuple(rng.randrange(size) for size in tensor.shape)
        tensor[index] = torch.tensor(rng.choice(wild)).to(tensor.dtype)
    return _put(call, name, tensor, "holds wild values")


def _repeated(call: HostileCall, rng: random.Random) -> str:
    """Send two tokens to one slot, or two copies to one block."""
    names = [name for name in ("slot_mapping", "dst_blocks", "block_tables") if name in call.tensors()]
    if not names:
        return ""
    name = rng.choice(names)
    ids = call.arguments[name].clone()
    if ids.dim() == 0 or ids.numel() < 2:
        return ""
    ids[(-1,) * ids.dim()] = ids[(0,) * ids.dim()]
    return _put(call, name, ids, "repeats a value")


def _option(call: HostileCall, rng: random.Random) -> str:
    names = [name for name in _OPTIONS if name in call.arguments]
    if not names:
        return ""
    name = rng.choice(names)
    value = rng.choice(_OPTIONS[name])
    return _put(call, name, value, f"= {value}")


def _presence(call: HostileCall, rng: random.Random) -> str:
    name = rng.choice([name for name in call.arguments if name not in _OPTIONS])
    if call.arguments[name] is not None:
        return _put(call, name, None, "left out")
    rank = rng.choice((1, 2, 3))
    return _put(call, name, torch.ones((2,) * rank), f"given with rank {rank}")


def _type(call: HostileCall, rng: random.Random) -> str:
    name = rng.choice(list(call.arguments))
    value = rng.choice(_WRONG_TYPES)
    return _put(call, name, value, f"= {value!r}")


def _alias(call: HostileCall, rng: random.Random) -> str:
    """Let what is read be a view of the cache."""
    cache = call.arguments.get("kv_cache")
    name = rng.choice([name for name in ("query", "key", "value", "kv_scales") if name in call.arguments] or [""])
    rows = call.arguments.get(name)
    if not isinstance(cache, Tensor) or not isinstance(rows, Tensor) or name in call.written:
        return ""
    if cache.dtype != rows.dtype or cache.numel() < rows.numel() or not rows.numel() or not cache.is_contiguous():
        return ""
    call.overlapping |= bool(call.written)
    return _put(call, name, cache.view(-1)[: rows.numel()].view(rows.shape), "is a view of kv_cache")


def _alias_index(call: HostileCall, rng: random.Random) -> str:
    """Let an index tensor lie in the memory of the cache, with its values."""
    cache = call.arguments.get("kv_cache")
    names = [name for name in call.tensors() if call.arguments[name].dtype in (torch.int32, torch.int64)]
    if not isinstance(cache, Tensor) or cache.dtype not in _CACHE_DTYPES or not cache.is_contiguous() or not names:
        return ""
    name = rng.choice(names)
    index = call.arguments[name]
    begin = cache.storage_offset() * cache.itemsize
    if not 0 < index.nbytes <= cache.nbytes or begin % index.itemsize:
        return ""
    view = storage_of(cache)[begin : begin + index.nbytes].view(index.dtype).view(index.shape)
    return _put(call, name, view.copy_(index), "lies in kv_cache")


def _kind(call: HostileCall, rng: random.Random) -> str:
    name, tensor = _pick(call, rng)
    kind = rng.choice(("meta", "gradient", "gradient", "sparse", "mkldnn", "negated", "quantized"))
    try:
        if kind == "gradient":
            return _put(call, name, tensor.detach().requires_grad_(), "requires a gradient")
        if kind == "negated":
            if tensor.dtype not in _NEGATED:  # torch copies what has the bit, and negates the copy
                return ""
            return _put(call, name, torch._neg_view(tensor), "has the negative bit")
        if kind == "quantized":
            return _put(call, name, torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8), "is quantized")
        if kind == "meta":
            return _put(call, name, tensor.to("meta"), "is meta")
        return _put(call, name, tensor.to_sparse() if kind == "sparse" else tensor.to_mkldnn(), f"is {kind}")
    except (RuntimeError, NotImplementedError):  # a dtype or shape that torch does not make of this kind
        return ""


_IN_MEMORY = (
    *(_dtype, _rank, _size, _size, _strides, _strides, _strides),
    *(_values, _values, _values, _values, _repeated, _option, _option, _option, _presence, _alias, _alias_index),
)
_IN_KIND = (_kind, _kind, _kind, _type)


def compiled_changes(rng: random.Random) -> Sequence[Change]:
    """Return the corruptions of a graph's arguments: mostly values, since another kind of argument is compiled anew."""
    return (_dtype, _rank, _size, _strides, _option) if rng.random() < 0.04 else (_values, _values, _values, _repeated)
