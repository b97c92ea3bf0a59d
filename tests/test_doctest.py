"""The examples in the documentation run."""

import doctest
import importlib
import re
from pathlib import Path

import pytest

import torch_paged
from torch_paged.backends.table import support_table
from torch_paged.testing.processes import SOURCE, run_python

FUNCTIONS = (
    *("paged_attention", "flash_attn_varlen", "reshape_and_cache", "quantize_and_cache"),
    *("merge_attention_states", "copy_blocks", "gather_cache", "explain"),
)
PACKAGE = Path(torch_paged.__file__).parent
MODULES = [
    ".".join(("torch_paged", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
    for path in sorted(PACKAGE.rglob("*.py"))
    if ">>> " in path.read_text()
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_public_function_has_an_example_and_the_sections(name: str) -> None:
    text = getattr(torch_paged, name).__doc__
    assert doctest.DocTestParser().get_examples(text), f"{name} has no example"
    sections = re.findall(r"^    ([A-Z]\w+):$", text, re.MULTILINE)
    order = ["Dimensions", "Args", "Returns", "Mask", "Raises", "Source", "Example"]
    assert sections == [section for section in order if section in sections]
    assert {"Args", "Returns", "Raises", "Example"} <= set(sections)


def test_the_example_of_the_readme_runs() -> None:
    text = Path(SOURCE, "README.md").read_text()
    [example] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(example.splitlines()) <= 20
    [expected] = re.findall(r"print\(.*\)  # (.*)", example)
    assert run_python(example).stdout.strip() == expected


def test_the_table_of_the_readme_is_current() -> None:
    text = Path(SOURCE, "README.md").read_text()
    [table] = re.findall(r"<!-- support -->\n(.*?)\n<!-- /support -->", text, re.DOTALL)
    assert table == support_table(), "paste the output of `python -m torch_paged.backends.table`"
