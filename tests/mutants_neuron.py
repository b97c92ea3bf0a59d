"""Plant one fault at a time in the NKI kernels and their plans and see the tests catch it: ``make mutants-neuron``.

The kernels run on the simulator. A mutant that no test catches is a hole in the tests: exit status 1.
"""

import sys

from mutants import Mutant
from planting import Planting

CASES = "tests/test_neuron_cases.py::test_"


def attention(case: str) -> tuple[str, ...]:
    """Return the test of a case of attention, simulated for Trainium 2 on one core."""
    return (f"{CASES}attention[trn2-1-{case}]",)


WRITES = (f"{CASES}writes[trn2-1-rows]",)
MOVES = (f"{CASES}copies_gathers_and_merges[trn2-1]",)
# fmt: off
MUTANTS = [
    Mutant("decode's window sees one key more", "plan.py", "begin = (end - min(sizes.sliding_window,",
           "begin = (end - 1 - min(sizes.sliding_window,", attention("decode, window")),
    Mutant("decode's chunk begins one key late", "plan.py", "begin = torch.maximum(begin, position - position %",
           "begin = torch.maximum(begin, 1 + position - position %", attention("decode, chunk")),
    Mutant("wild block ids are followed", "plan.py", " & (block >= 0) & (block < sizes.num_blocks)", "",
           ("tests/test_neuron_plan.py",)),
    Mutant("ALiBi counts from behind the query", "plan.py", "torch.where(used, seen_to - 1, 0)",
           "torch.where(used, seen_to, 0)",
           attention("decode, window")),
    Mutant("partial results of other heads", "plan.py", "* parts + part[:, None]",
           "* parts + 0 * part[:, None]", attention("decode")),
    Mutant("a sum is not rescaled", "merge_kernel.py",
           "nisa.tensor_tensor(dst=self.total, data1=self.total, data2=old, op=nl.multiply)",
           "nisa.tensor_copy(dst=self.total, src=self.total)",
           ("tests/test_neuron_decode.py::test_rows_of_many_chunks_are_merged_in_turns",)),
    Mutant("a sink counted twice", "merge_kernel.py", "nisa.activation(dst=self.total, op=nl.exp, data=sink)",
           "nisa.memset(dst=self.total, value=2.0)", attention("decode, bfloat16")),
    Mutant("a soft cap that does not scale back", "decode_kernel.py", "op0=nl.multiply, operand0=call.soft_cap)",
           "op0=nl.multiply, operand0=1.0)", attention("decode, window")),
    Mutant("keys that are not seen weigh", "decode_kernel.py", "on_true=exponents, on_false=0.0",
           "on_true=exponents, on_false=1.0", attention("decode, chunk")),
    Mutant("the scale of another head", "decode_kernel.py", "call.logit_scales[own, kv_head : kv_head + 1]",
           "call.logit_scales[own, 0:1]", attention("decode, float16")),
    Mutant("a key that is not finite spoils its pair", "decode_kernel.py", "if again and call.pair > 1:",
           "if again and call.pair > 2:", attention("decode")),
    Mutant("causality shows the next key", "plan_varlen.py", "high = torch.where(position >= last, last, position + 1)",
           "high = torch.where(position >= last - 1, last, position + 2)", attention("cache")),
    Mutant("varlen's window sees one key more", "plan_varlen.py", "position - window + 1, 0)", "position - window, 0)",
           attention("window")),
    Mutant("new keys of another sequence", "plan_varlen.py", "new_starts = batch.first_new[seq] +",
           "new_starts = 0 * batch.first_new[seq] +", attention("both")),
    Mutant("row tiles compute too little of the diagonal's step", "plan_varlen.py", "(beyond > computed)",
           "(beyond > computed + STEP_KEYS)", ("tests/test_neuron_plan_varlen.py",)),
    Mutant("packed queries lose their sink", "varlen_kernel.py",
           "self._load_members(self.lowest, call.sinks, members, LEAST)",
           "nisa.memset(dst=self.lowest, value=LEAST)", attention("both")),
    Mutant("slot -1 is written", "cache.py", "(slot_mapping >= 0) &", "(slot_mapping >= -1) &", WRITES),
    Mutant("a copy from block -1", "cache.py", "(src >= 0) & (src < num_blocks)",
           "(src >= -1) & (src < num_blocks)", MOVES),
    Mutant("a slot given twice is written twice", "cache.py", "live & (winner.gather(0, index) == number)", "live",
           ("tests/test_neuron_cache.py::test_a_block_that_is_copied_to_twice_holds_one_source",)),
    Mutant("gather ignores the left padding", "cache.py", "position = position - starts[:, None]",
           "position = position - 0 * starts[:, None]", MOVES),
    Mutant("values of a part without keys count", "merge_states_kernel.py",
           "data2=self._wide(seen, part), op=nl.bitwise_and", "data2=bits, op=nl.bitwise_and", MOVES),
]
# fmt: on

PLANTING = Planting("neuron", {}, seconds=900)

if __name__ == "__main__":
    sys.exit(PLANTING.run(MUTANTS, "Plant one fault at a time in the NKI kernels and see the tests catch it."))
