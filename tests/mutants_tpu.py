"""Plant one fault at a time in the TPU kernels and see the tests catch it: ``make mutants-tpu``.

The kernels are interpreted. A mutant that no test catches is a hole in the tests: exit status 1.
"""

import sys

from mutants import Mutant
from planting import Planting

DECODE, KNOWN = "tests/test_tpu_decode.py::test_", "tests/test_tpu_known_bugs.py::test_"
COPIES = (f"{DECODE}copies_of_many_blocks_at_once_and_as_late_as_they_may",)
WINDOW = (f"{KNOWN}a_window_ends_where_it_says",)
FLOAT = (f"{DECODE}generic_interpreter",)
VARLEN = "tests/test_tpu_varlen.py::test_"
SEMANTICS = "tests/test_semantics.py::test_line"
PACKED = (f"{VARLEN}copies_and_races[both-on_wait]",)
# fmt: off
MUTANTS = [
    Mutant("a full buffer is not awaited", "pages.py",
           "pltpu.make_async_copy(buffer.at[slot], buffer.at[slot], self.semaphores.at[slot]).wait()", "pass", COPIES),
    Mutant("the last page of a block is not awaited", "pages.py",
           "jnp.where(count == self.pages_per_block, 0, count), wait_page, 0)",
           "jnp.where(count == self.pages_per_block, 0, count - 1), wait_page, 0)", COPIES),
    Mutant("prefetch into the buffer in use", "pages.py", "self.num_buffers - self.in_use, fill, 0)",
           "self.num_buffers, fill, 0)", COPIES),
    Mutant("the blocks of a group are overwritten", "decode_kernel.py", "in_use=plan.members", "in_use=1",
           (f"{DECODE}short_sequences_are_multiplied_several_at_a_time",)),
    Mutant("values of stale slots stay", "pages.py",
           "buffer[slot, j, 1] = jnp.where(kept, values, jnp.zeros_like(values))",
           "buffer[slot, j, 1] = values", (f"{KNOWN}stale_slots_hold_nan",)),
    Mutant("wild block ids are followed", "pages.py", "return jnp.where(unusable, -1, block_tables).reshape(-1)",
           "return block_tables.reshape(-1)",
           (f"{DECODE}block_ids_outside_of_the_cache_hold_no_keys_and_lengths_end_with_the_table",)),
    Mutant("the first page of a window is page 0", "pages.py", "return item, self.base(first_page), end_page, unusable",
           "return item, jnp.zeros_like(item), end_page, unusable", WINDOW),
    Mutant("decode's window sees one key more", "decode_kernel.py", "begin = jnp.maximum(begin, end - min(plan.window,",
           "begin = jnp.maximum(begin, end - 1 - min(plan.window,", WINDOW),
    Mutant("decode's window sees one key less", "decode_kernel.py", "begin = jnp.maximum(begin, end - min(plan.window,",
           "begin = jnp.maximum(begin, end + 1 - min(plan.window,", WINDOW),
    Mutant("decode's row sum is not rescaled", "decode_kernel.py", "totals[of.member, head] * factor + total",
           "totals[of.member, head] + total", COPIES),
    Mutant("decode rounds float32 to bfloat16", "decode_kernel.py",
           "rows.reshape(plan.tile_keys, plan.stored_dim).astype(plan.query_dtype)",
           "rows.reshape(plan.tile_keys, plan.stored_dim).astype(jnp.bfloat16).astype(plan.query_dtype)", FLOAT),
    Mutant("ALiBi counts from behind the query", "decode_kernel.py", "(of.end - 1 - position)", "(of.end - position)",
           (f"{DECODE}options[alibi_cap]",)),
    Mutant("the keys' scale for values", "decode_kernel.py", 'return self.refs["scales"][side, first + head]',
           'return self.refs["scales"][0, first + head]', (f"{DECODE}options[e4m3]",)),
    Mutant("a sink counted twice", "logits.py", "with_sink = total * kept + jnp.exp(sinks - top)",
           "with_sink = total * kept + 2.0 * jnp.exp(sinks - top)", (f"{DECODE}options[window]",)),
    Mutant("a soft cap that does not scale back", "logits.py", "logits = soft_cap * jnp.tanh(logits / soft_cap)",
           "logits = jnp.tanh(logits / soft_cap)", (f"{DECODE}options[alibi_cap]",)),
    Mutant("causality shows the next key", "varlen_kernel.py", "return first, own, own",
           "return first, own + 1, own", PACKED),
    Mutant("varlen's window sees one key more", "varlen_kernel.py", "else own - (static.window - 1)",
           "else own - static.window", (f"{VARLEN}options_and_order[int8_per_token]",)),
    Mutant("a tile misses its last key", "tiles.py", "jnp.max(jnp.where(sees, high, least), axis=1) + 1, 0)",
           "jnp.max(jnp.where(sees, high, least), axis=1), 0)", PACKED),
    Mutant("a tile writes rows of its neighbour", "varlen_kernel.py", "r.out_buffer.at[slot, pl.ds(row + done, run)]",
           "r.out_buffer.at[slot, pl.ds(done, run)]", PACKED),
    Mutant("varlen reads the next head's logits", "varlen_kernel.py", "self._absorb(keys, 2 * i + 1, 1)",
           "self._absorb(keys, 2 * i + 1, 0)", (f"{VARLEN}each_of_four_kv_heads_takes_its_own_logits",)),
    Mutant("logits go to base 2 before the maximum leaves", "varlen_kernel.py",
           "weights = jnp.exp2((logits - jnp.concatenate([maximum] * (size // LANES), axis=1)) * unit)",
           "weights = jnp.exp2(logits * unit - jnp.concatenate([maximum * unit] * (size // LANES), axis=1))",
           (f"{SEMANTICS}[tpu-10_what_logits_have_in_common_costs_no_accuracy[cache-None]-float32]",)),
    Mutant("a scale that float32 takes for 0 is multiplied last", "varlen_kernel.py",
           "if plain and 2.0**-64 < self.softmax_scale < 2.0**64", "if plain",
           (f"{VARLEN}a_scale_below_the_range_of_float32_weighs_all_keys_alike",)),
    Mutant("all buffers share one semaphore", "decode_kernel.py", 'refs["semaphores"],',
           'type("One", (), {"at": type("At", (), {"__getitem__": lambda *_: refs["semaphores"].at[0]})()})(),',
           (f"{KNOWN}a_buffer_is_read_only_after_its_own_copies_have_landed",)),
    Mutant("a merged part that is no number is hidden", "merge.py", "jnp.where(total[..., None] == 0, 0.0,",
           "jnp.where(~(total[..., None] > 0), 0.0,",
           ("tests/test_merge_attention_states.py::test_a_part_that_is_no_number_shows",)),
    Mutant("decode forgets the chunk", "decode_kernel.py", "begin = jnp.maximum(begin, position - lax.rem(",
           "begin = jnp.maximum(begin, 0 * lax.rem(",
           (f"{DECODE}a_chunk_begins_within_a_page",)),
    Mutant("slot -1 written to the last block", "cache.py", "inside = (slot >= 0) & (slot <",
           "inside = (slot >= -1) & (slot <", ("tests/test_reshape_and_cache.py",)),
    Mutant("gather ignores the left padding", "cache.py", "(0 if starts is None else starts[:, None])", "0",
           ("tests/test_gather_cache.py",)),
]
# fmt: on

PLANTING = Planting("tpu", {"JAX_PLATFORMS": "cpu", "TORCH_PAGED_TPU_INTERPRET": "1"}, seconds=300)

if __name__ == "__main__":
    sys.exit(PLANTING.run(MUTANTS, "Plant one fault at a time in the TPU kernels and see the tests catch it."))
