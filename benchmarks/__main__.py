"""Decode against grouped SDPA on contiguous keys, side by side in one process: ``python -m benchmarks``.

The two are timed in turns and the medians of their times are compared, so that what else the machine does weighs on
both. Block tables are random permutations of the whole pool. Two pools take turns; at the default sizes each is far
larger than the caches of the machine. Both results are checked against the reference before anything is timed.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm

import torch_paged
from torch_paged.cache import allocate_kv_cache
from torch_paged.testing import assert_attention

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
POOLS = 2


def decode_calls(
    args: argparse.Namespace, dtype: torch.dtype
) -> tuple[Callable[[int], Tensor], Callable[[int], Tensor]]:
    """Return the paged and the dense call; both take the number of the pool to read."""
    generator = torch.Generator().manual_seed(args.seed)
    blocks_per_seq = -(-args.context // args.block_size)
    num_blocks = args.batch * blocks_per_seq
    block_tables = torch.randperm(num_blocks, generator=generator).reshape(args.batch, -1).to(torch.int32)
    context_lens = torch.full((args.batch,), args.context, dtype=torch.int32)
    query = torch.randn(args.batch, args.heads, args.head_dim, generator=generator).to(dtype)
    grouped = query.view(args.batch, args.kv_heads, -1, args.head_dim)
    pools, dense = [], []
    for _ in range(POOLS):
        pool = allocate_kv_cache(num_blocks, args.kv_heads, args.block_size, args.head_dim, dtype=dtype).kv_cache
        pool.copy_(torch.randn(pool.shape, generator=generator))
        pools.append(pool)
        key, value = torch_paged.gather_cache(pool, block_tables, context_lens, args.context)
        dense.append((key, value))

    def paged(pool: int) -> Tensor:
        return torch_paged.paged_attention(query, pools[pool], block_tables, context_lens)

    def contiguous(pool: int) -> Tensor:
        return scaled_dot_product_attention(grouped, *dense[pool])

    arguments = {"query": query, "kv_cache": pools[0], "block_tables": block_tables, "context_lens": context_lens}
    for call in (paged, contiguous):
        assert_attention("paged_attention", arguments, call(0).reshape(query.shape))
    return paged, contiguous


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8, help="sequences")
    parser.add_argument("--context", type=int, default=4096, help="tokens of each sequence")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--block-size", type=int, default=16, help="tokens of a block")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bfloat16", "float32"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--repetitions", type=int, default=21)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rows = []
    with torch.inference_mode():
        for name in tqdm(args.dtypes, desc="decode", leave=False):
            calls = decode_calls(args, DTYPES[name])
            num_bytes = 2 * args.batch * args.context * args.kv_heads * args.head_dim * DTYPES[name].itemsize
            for threads in args.threads:
                torch.set_num_threads(threads)
                times: tuple[list[float], list[float]] = ([], [])
                for repetition in range(args.repetitions):
                    for call, taken in zip(calls, times, strict=True):
                        begin = time.perf_counter()
                        call(repetition % POOLS)
                        taken.append(time.perf_counter() - begin)
                paged, dense = (statistics.median(taken) for taken in times)
                rows.append((name, threads, paged, dense, num_bytes / paged / 1e9))
    print(
        f"decode, B {args.batch}, context {args.context}, H {args.heads}, KH {args.kv_heads}, "
        f"D {args.head_dim}, S {args.block_size}"
    )
    print(f"{'dtype':10}{'threads':>8}{'paged ms':>10}{'GB/s':>8}{'SDPA ms':>10}{'ratio':>8}")
    for name, threads, paged, dense, rate in rows:
        print(f"{name:10}{threads:8}{paged * 1e3:10.2f}{rate:8.1f}{dense * 1e3:10.2f}{dense / paged:8.2f}")


if __name__ == "__main__":
    main()
