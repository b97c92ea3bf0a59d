"""torch.compile, torch.export and AOTInductor: one graph, no recompile as contexts grow, no copy of the cache."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code

import torch_paged

# torch's own compiler uses what torch deprecates.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec:FutureWarning"),
]

BATCH, HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE, NUM_BLOCKS = 3, 4, 2, 32, 4, 24


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch.compiler.reset()
    with torch.no_grad():
        yield
    torch.compiler.reset()


def decode_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_cache: Tensor,
    slots: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
) -> Tensor:
    torch_paged.reshape_and_cache(key * 2, value, kv_cache, slots)
    return torch_paged.paged_attention(query, kv_cache, block_tables, context_lens, sliding_window=9) + 1


def varlen_step(
    query: Tensor,
    kv_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> Tensor:
    return torch_paged.flash_attn_varlen(
        query * 2,
        cu_seqlens_q=cu_seqlens_q,
        kv_cache=kv_cache,
        block_tables=block_tables,
        context_lens=context_lens,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        causal=True,
    )


def empty_cache() -> tuple[Tensor, Tensor]:
    """An empty cache, and tables that own its blocks in a shuffled order."""
    blocks = torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(0)).to(torch.int32)
    return torch.zeros(2, NUM_BLOCKS, KV_HEADS, BLOCK_SIZE, HEAD_DIM), blocks.reshape(BATCH, -1)


def step_arguments(step: int, block_tables: Tensor, batch: int = BATCH) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(step)
    query = torch.randn(batch, HEADS, HEAD_DIM, generator=generator)
    key, value = torch.randn(2, batch, KV_HEADS, HEAD_DIM, generator=generator)
    slots = block_tables[:batch, step // BLOCK_SIZE].long() * BLOCK_SIZE + step % BLOCK_SIZE
    return query, key, value, slots, block_tables[:batch], torch.full((batch,), step + 1, dtype=torch.int32)


def run_steps(function: Callable[..., Tensor], steps: range) -> tuple[list[Tensor], Tensor]:
    kv_cache, block_tables = empty_cache()
    outs = []
    for step in steps:
        query, key, value, slots, tables, lens = step_arguments(step, block_tables)
        outs.append(function(query, key, value, kv_cache, slots, tables, lens))
    return outs, kv_cache


@pytest.mark.parametrize("compiler", ["inductor", "aot_eager"])
def test_decode_is_one_graph_and_never_recompiles_as_contexts_grow(compiler: str) -> None:
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(decode_step, fullgraph=True, backend=counter)
    steps = range(NUM_BLOCKS // BATCH * BLOCK_SIZE)
    with torch._dynamo.config.patch(error_on_recompile=True):
        outs, kv_cache = run_steps(compiled, steps)
    expected, expected_cache = run_steps(decode_step, steps)
    assert counter.frame_count == 1
    assert torch.equal(kv_cache, expected_cache)
    for out, wanted in zip(outs, expected, strict=True):
        assert torch.equal(out, wanted)


def test_generated_code_writes_the_cache_in_place() -> None:
    kv_cache, block_tables = empty_cache()
    query, key, value, slots, tables, lens = step_arguments(0, block_tables)
    compiled = torch.compile(decode_step, fullgraph=True)
    _, (code,) = run_and_get_code(compiled, query, key, value, kv_cache, slots, tables, lens)
    (call,) = re.findall(r"def call\(.*?^(?=def )", code, re.DOTALL | re.MULTILINE)
    cache_name = re.search(r"reshape_and_cache\.default\(\w+, \w+, (\w+),", call)
    assert cache_name is not None
    assert re.search(rf"paged_attention\.default\(\w+, {cache_name[1]},", call)
    allocations = re.findall(r"empty_strided_cpu\((\([^)]*\))", call)
    assert allocations, "the code allocates nothing: the pattern is out of date"
    assert str(tuple(kv_cache.shape)) not in allocations
    assert "copy_" not in call
    assert "clone" not in call
    assert kv_cache.any()


def test_batch_size_is_dynamic() -> None:
    compiled = torch.compile(decode_step, fullgraph=True, backend="aot_eager", dynamic=True)
    kv_cache, block_tables = empty_cache()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (3, 2):
            query, key, value, slots, tables, lens = step_arguments(1, block_tables, batch)
            expected = decode_step(query, key, value, kv_cache.clone(), slots, tables, lens)
            assert torch.equal(compiled(query, key, value, kv_cache, slots, tables, lens), expected)


def test_max_seqlen_compiles_at_most_twice() -> None:
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(varlen_step, fullgraph=True, backend=counter)
    kv_cache, block_tables = empty_cache()
    kv_cache.normal_(generator=torch.Generator().manual_seed(3))
    query = torch.randn(9, HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(4))
    for length in (5, 11, 17, 29):
        lens = torch.tensor([length, 3, length - 2], dtype=torch.int32)
        cu_seqlens_q = torch.tensor([0, 4, 6, 9], dtype=torch.int32)
        arguments = (query, kv_cache, block_tables, lens, cu_seqlens_q, 4 + length, length)
        assert torch.equal(compiled(*arguments), varlen_step(*arguments))
    assert counter.frame_count <= 2


def test_compile_rejects_what_eager_rejects() -> None:
    kv_cache, block_tables = empty_cache()
    query, key, value, slots, tables, lens = step_arguments(0, block_tables)
    wrong = (query[:, :3], key, value, kv_cache, slots, tables, lens)
    with pytest.raises(ValueError) as eager:
        decode_step(*wrong)
    with pytest.raises(RuntimeError, match=re.escape(str(eager.value))):
        torch.compile(decode_step, fullgraph=True, backend="aot_eager")(*wrong)


class DecodeStep(torch.nn.Module):
    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, slots: Tensor, tables: Tensor, lens: Tensor
    ) -> Tensor:
        return decode_step(query, key, value, kv_cache, slots, tables, lens)


def test_export_and_ahead_of_time_package(tmp_path: Path) -> None:
    kv_cache, block_tables = empty_cache()
    query, key, value, slots, tables, lens = step_arguments(0, block_tables)
    program = torch.export.export(DecodeStep(), (query, key, value, kv_cache, slots, tables, lens))
    targets = {str(node.target) for node in program.graph.nodes}
    assert {"paged.reshape_and_cache.default", "paged.paged_attention.default"} <= targets
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "step.pt2"))
    steps = range(6)
    expected, expected_cache = run_steps(decode_step, steps)
    for function in (program.module(), torch._inductor.aoti_load_package(package)):
        outs, written = run_steps(function, steps)
        assert torch.equal(written, expected_cache)
        for out, wanted in zip(outs, expected, strict=True):
            assert torch.equal(out, wanted)


def test_a_compiled_decode_passes_its_arguments_by_position() -> None:
    query, kv_cache = torch.randn(1, HEADS, HEAD_DIM), torch.randn(2, NUM_BLOCKS, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    block_tables, context_lens = torch.tensor([[3, 5]], dtype=torch.int32), torch.tensor([6], dtype=torch.int32)
    compiled = torch.compile(torch_paged.paged_attention, fullgraph=True)
    out, [code] = run_and_get_code(compiled, query, kv_cache, block_tables, context_lens)
    assert "paged_attention.default(" in code
    assert "softmax_scale=" not in code
    assert torch.equal(out, torch_paged.paged_attention(query, kv_cache, block_tables, context_lens))
    with pytest.raises(Exception, match="value_dim must be given when the values are lanes of the keys"):
        compiled(query, kv_cache[:1], block_tables, context_lens)
