"""The planted faults still find the code that they change, and the tests that are to catch them."""

import mutants
import mutants_neuron
import mutants_tpu
import pytest

FAULTS = [
    pytest.param(folder, mutant, id=f"{folder}: {mutant.name}")
    for folder, faults in (
        ("csrc_shims/cpu", mutants.MUTANTS),
        ("torch_paged/backends/tpu", mutants_tpu.MUTANTS),
        ("torch_paged/backends/neuron", mutants_neuron.MUTANTS),
    )
    for mutant in faults
]


@pytest.mark.parametrize(("folder", "mutant"), FAULTS)
def test_a_fault_finds_its_place(folder: str, mutant: mutants.Mutant) -> None:
    source = (mutants.ROOT / folder / mutant.file).read_text()
    assert source.count(mutant.old) == 1
    assert mutant.new != mutant.old
    for test in mutant.tests:
        assert (mutants.ROOT / test.partition("::")[0]).exists()
