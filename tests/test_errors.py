"""Every error that a user can provoke is provoked, and listed in docs/errors.md as it reads."""

import functools
from pathlib import Path

import pytest
from error_sources import UNREACHABLE, Source, cpp_texts, python_sources
from error_table import PAGE, Error, Group, Said, page
from errors_of_backends import DEVICES
from errors_of_building import BUILDING
from errors_of_caches import ALLOCATOR, CACHES
from errors_of_calls import CALLS
from errors_of_import import IMPORT
from errors_of_ops import RULES, break_rule
from errors_of_packing import PACKED
from errors_of_paged_cache import CACHE
from errors_of_patching import PATCHING
from errors_of_tools import EXPLAIN, JUDGING, MASKS

from torch_paged.testing.bad_input import STATIC, VALUES

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # of kinds of tensors that torch is giving up
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]
GROUPS = (RULES, CALLS, BUILDING, IMPORT, DEVICES, ALLOCATOR, CACHES, MASKS, EXPLAIN, PATCHING, CACHE, PACKED, JUDGING)
ERRORS = [error for group in GROUPS for error in group.errors]


@functools.cache
def provoked() -> tuple[Said, ...]:
    return tuple(said for error in ERRORS for said in error.said())


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.text)
def test_an_error_is_provoked_and_reads_as_listed(error: Error) -> None:
    assert error.provoke
    for said in error.said():
        if said.text == "No module named 'jax'":
            pytest.skip(said.text)
        assert said.kind == error.kind, said
        assert error.matches(said.text), said.text


def test_the_page_lists_what_is_provoked(pytestconfig: pytest.Config) -> None:
    if pytestconfig.getoption("--write-errors"):
        PAGE.write_text(page(GROUPS))
    assert PAGE.read_text() == page(GROUPS), "run python -m pytest tests/test_errors.py --write-errors"


def test_every_sentence_of_a_rule_is_listed() -> None:
    for broken in (*STATIC, *VALUES):
        with pytest.raises(ValueError) as caught:
            break_rule(broken)
        assert any(error.matches(str(caught.value)) for error in RULES.errors), str(caught.value)


def unprovoked(sources: list[Source], said: tuple[Said, ...]) -> list[str]:
    return [
        f"{source.file}:{source.lines[0]}: {source.code}"
        for source in sources
        if source.code not in UNREACHABLE and not source.is_provoked(said)
    ]


def test_every_error_in_the_sources_is_provoked() -> None:
    pytest.importorskip("jax")
    sources = list(python_sources())
    assert unprovoked(sources, provoked()) == []
    assert UNREACHABLE.keys() <= {source.code for source in sources}


def test_every_text_of_the_checks_in_cpp_is_provoked() -> None:
    texts = "\n".join(said.text for said in provoked())
    assert [(file, text) for file, text in cpp_texts() if text not in texts] == []


def test_an_error_that_is_not_listed_is_seen(tmp_path: Path) -> None:
    (tmp_path / "new.py").write_text(
        "def why_off():\n    return 'the moon is full'\n\n"
        "def call(x):\n    later(ValueError(f'call: x is {x}'))\n    raise ValueError('call: no')\n"
    )
    found = unprovoked(list(python_sources(tmp_path)), provoked())
    assert [line.partition(": ")[2] for line in found] == [
        "ValueError('call: no')",
        "return 'the moon is full'",
        "ValueError(f'call: x is {x}')",
    ]


def test_every_throw_in_cpp_is_seen(tmp_path: Path) -> None:
    (tmp_path / "new.h").write_text(
        '#include <new>\n// may throw; "not this"\nthrow;\nthrow std::bad_alloc();\n'
        'throw Raised(type,\n  "torch_paged: no luck");\nfail(op, "key", "be a key; or", got);\n'
    )
    assert [text for _, text in cpp_texts(tmp_path)] == ["torch_paged: no luck", "be a key; or"]


@pytest.mark.parametrize(
    ("text", "said", "matches"),
    [
        ("f: <argument> must be <rule>, got None", "f: x must be given, got None", True),
        ("f: <argument> must be <rule>, got None", "f: x must be given, got 1", False),
        ("f: <argument> must be 1", "f: x and y must be 1", False),
        ("f: lies in [0, <n>)", "f: lies in [0, 7)", True),
        ("f: lies in [0, <n>)", "g: lies in [0, 7)", False),
    ],
)
def test_words_in_brackets_stand_for_values(text: str, said: str, matches: bool) -> None:
    error = Error("ValueError", text, "", "", ())
    assert error.matches(said) == matches
    assert text in page([Group("group", (error,))])
