"""Every family of models in every way to generate. ``docs/huggingface_support.md`` is the table of what happened.

``make test-transformers ARGS=--write-support-table`` writes the tables of the installed versions anew.
"""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from flow_models import NEW_TOKENS, ROWS, Models, NotApplicable, models_of
from support_table import Table, read_tables, write_table
from transformers import CompileConfig
from transformers_flows import FLOWS, Flow, Result, teacher_forced

from torch_paged.integrations.transformers import patch_report
from torch_paged.integrations.transformers.block_group import BlockGroup
from torch_paged.integrations.transformers.paged_layer import PagedLayer
from torch_paged.testing.compare import assert_close

DOCUMENT = Path(__file__).parent.parent / "docs" / "huggingface_support.md"
NEWEST = "5.23.0"
WORKS = "yes"
FAILED = "failed"
LARGEST_SHARE_OF_ERROR = {torch.int8: 0.1, torch.float8_e4m3fn: 0.5}
"""Of the logits' standard deviation: random weights make far more of a rounding than trained ones do."""

LARGEST_REFERENCE_SHARE = 0.1
"""Of a result's root mean square: the tolerance rule would accept anything beside a wrong reference."""

TABLE = Table(transformers.__version__)


def attempt(flow: Flow, family: str, *, patched: bool = False) -> Result | Exception:
    """Return the result of a flow, or what it raised."""
    try:
        return flow.run(models_of(family, flow.dtype, patched=patched))
    except AssertionError:
        raise
    except Exception as error:
        return error


def one_line(error: Exception) -> str:
    """Return an exception as a note for the table."""
    return (
        f"the unpatched model raises {type(error).__name__}: {str(error).strip().splitlines()[0].split('. ')[0][:200]}"
    )


def expected_logits(flow: Flow, family: str, name: str, plain: Result) -> torch.Tensor | None:
    """Return a result in float64; in float32 or None where the model of this version cannot run in float64."""
    for default in (torch.float32, torch.float64):  # some models make their masks in the default dtype
        models = models_of(family, flow.dtype, reference=True)
        torch.set_default_dtype(default)
        try:
            return reference_by(flow, models, name, plain)
        except RuntimeError:
            continue
        finally:
            torch.set_default_dtype(torch.float32)
    if flow.expected is None and flow.dtype is torch.float32:
        return None
    models = models_of(family, flow.dtype)
    models.model.float()
    return reference_by(flow, models, name, plain).double()


def reference_by(flow: Flow, models: Models, name: str, plain: Result) -> torch.Tensor:
    """Return what a result should be, by the given models."""
    expected = flow.run(models)[name] if flow.expected is None else flow.expected(models, plain)
    difference = (expected.double() - plain[name].double()).pow(2).mean().sqrt()
    assert difference <= LARGEST_REFERENCE_SHARE * expected.double().pow(2).mean().sqrt(), (
        "the reference is another model"
    )
    return expected


def compare(flow: Flow, family: str) -> str:
    """Run a flow on an unpatched and on a patched model, and compare what they return."""
    plain = attempt(flow, family)
    if isinstance(plain, NotApplicable):
        return str(plain)
    if isinstance(plain, Exception):
        return one_line(plain)
    actual = attempt(flow, family, patched=True)
    if isinstance(actual, Exception):
        raise actual
    for name, result in actual.items():
        if result.is_floating_point():
            expected = expected_logits(flow, family, name, plain)
            if expected is None:
                assert torch.equal(result.argmax(-1), plain[name].argmax(-1)), name
            else:
                assert_close(result, expected, plain[name])
        else:
            assert torch.equal(result, plain[name]), name
    return WORKS


def way(models: Models) -> str:
    """Return how a patched model's attention reads its cache."""
    report = patch_report(models.model)
    assert report is not None
    return report.way


def quantised(family: str, dtype: torch.dtype) -> str:
    """Compare the logits of a quantised cache with those of an unquantised one."""
    exact = teacher_forced(models_of(family, patched=True))["logits"]
    rounded = teacher_forced(models_of(family, patched=True), dtype=dtype)["logits"]
    share = (rounded - exact).pow(2).mean().sqrt() / exact.std()
    assert 0 < share < LARGEST_SHARE_OF_ERROR[dtype], f"the error is {share:.3g} of the logits' standard deviation"
    return WORKS


def compiled(family: str) -> str:
    """Compile the decode step inside of generate: one graph, for two prompts and caches."""
    models = models_of(family, patched=True)
    report = patch_report(models.model)
    assert report is not None
    kept = [layer for layer in report.layers if isinstance(layer, str) and layer != "DummyLayer"]
    if report.way == "gathered" or kept:
        return "a model that is not paged in all its layers is not compiled"
    if not models.cache(max_cache_length=8).is_compileable:
        return "the model does not take the masks that generate makes for a compiled step"
    prompts = (models.inputs, models.shorter())
    expected = [models.tokens(**inputs) for inputs in prompts]
    config = CompileConfig(fullgraph=True, backend="eager", mode="default", dynamic=False)
    vars(config)["_compile_all_devices"] = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    try:
        with torch._dynamo.config.patch(error_on_recompile=True):
            actual = [models.tokens(**inputs, compile_config=config) for inputs in prompts]
    except Exception as error:
        if "must be the handle" in str(error):
            return "refused: the model moves keys that its layers share, where a tracer loses the handle"
        if "must mark the padding" in str(error):
            return "refused: the model makes a mask of ones where generate gives it none"
        with pytest.raises(Exception, match=r"."):
            models_of(family).tokens(compile_config=config, cache_implementation="static")
        return "the unpatched model cannot be compiled either, with a static cache"
    assert all(torch.equal(a["tokens"], e["tokens"]) for a, e in zip(actual, expected, strict=True))
    if not torch._dynamo.utils.counters["stats"]["unique_graphs"]:
        return "generate runs this model eagerly"
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    return WORKS


def attentions(family: str) -> str:
    """Ask for the weights, which the ops do not return."""
    models = models_of(family, patched=True)
    if way(models) == "gathered":
        return "the model's own attention returns them"
    with pytest.raises(NotImplementedError, match="output_attentions"):
        models.forward(models.ids, output_attentions=True)
    return WORKS


def lost_handle(family: str) -> str:
    """Copy the keys on their way from the cache to the attention function."""
    models = models_of(family, patched=True)
    if way(models) == "gathered":
        return "keys are dense: there is no handle to lose"
    update = PagedLayer.update

    def lose(layer: PagedLayer, *args: object, **kwargs: object) -> tuple[torch.Tensor, ...]:
        return tuple(handle.clone() for handle in update(layer, *args, **kwargs))  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PagedLayer, "update", lose)
        with pytest.raises(RuntimeError, match=r"must be the handle|got lost"):
            models.forward(models.ids, past_key_values=models.cache())
    return WORKS


def swapped_block(family: str) -> str:
    """Let the last block of one row be another row's: that row's tokens change, and no other's."""
    expected = models_of(family, patched=True).tokens()["tokens"][:, -NEW_TOKENS:]
    write_tables = BlockGroup.write_tables

    def swap(group: BlockGroup) -> None:
        write_tables(group)
        tables = group.block_tables
        used = int((tables[1] >= 0).nonzero().max())
        tables[1, used] = tables[0, int((tables[0] >= 0).nonzero().max())]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockGroup, "write_tables", swap)
        actual = models_of(family, patched=True).tokens()["tokens"][:, -NEW_TOKENS:]
    assert not torch.equal(actual[1], expected[1])
    assert all(torch.equal(actual[row], expected[row]) for row in range(len(actual)) if row != 1)
    return WORKS


CASES: dict[str, Callable[[str], str]] = {
    **{flow.title: lambda family, flow=flow: compare(flow, family) for flow in FLOWS},  # type: ignore[misc]
    "int8 cache": lambda family: quantised(family, torch.int8),
    "fp8 cache": lambda family: quantised(family, torch.float8_e4m3fn),
    "compiled": compiled,
    "attentions refused": attentions,
    "lost handle raises": lost_handle,
    "swapped block caught": swapped_block,
}


@pytest.mark.transformers_matrix
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("family", "title"), [(family, title) for family in ROWS for title in CASES])
def test_a_model_in_a_flow(family: str, title: str) -> None:
    TABLE.set(family, title, FAILED)
    TABLE.set(family, title, CASES[title](family))


@pytest.mark.transformers_matrix
def test_the_table_is_what_happened(pytestconfig: pytest.Config) -> None:
    for family in TABLE.rows:
        TABLE.set(family, "layers", way(models_of(family, patched=True)))
    if pytestconfig.getoption("--write-support-table"):
        write_table(DOCUMENT, TABLE, list(ROWS))
    committed = read_tables(DOCUMENT.read_text()).get(TABLE.version)
    assert committed is not None, f"no table of transformers {TABLE.version}: run with --write-support-table"
    for family, cells in TABLE.rows.items():
        for title, cell in cells.items():
            assert committed[family][title] == cell, f"{family}, {title}: run with --write-support-table"


def test_the_committed_table_is_complete() -> None:
    tables = read_tables(DOCUMENT.read_text())
    assert NEWEST in tables
    assert set(tables.get(TABLE.version, ROWS)) == set(ROWS)
    for version, rows in tables.items():
        assert set(rows) <= set(tables[NEWEST]), version
        for family, cells in rows.items():
            assert set(cells) == {"layers", *CASES}, (version, family)
            assert FAILED not in cells.values(), (version, family)


def test_the_makefile_names_the_versions_of_the_tables() -> None:
    makefile = (DOCUMENT.parent.parent / "Makefile").read_text()
    versions = re.search(r"^TRANSFORMERS \?= (.+)$", makefile, re.MULTILINE)
    assert versions is not None
    assert set(versions[1].split()) == set(read_tables(DOCUMENT.read_text()))
