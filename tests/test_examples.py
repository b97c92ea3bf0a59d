"""Every example runs as a user runs it, and the demo fails when it should."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from torch_paged.integrations.transformers.block_group import BlockGroup

EXAMPLES = Path(__file__).parent.parent / "examples"
CHECKPOINT = EXAMPLES / "checkpoints" / "stdlib-llama-2m"
TINY: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def run(script: str, *arguments: str, status: int = 0) -> str:
    """Run an example in a process of its own and return what it printed."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *arguments],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "OMP_NUM_THREADS": "2", "COLUMNS": "160", "PYTHONPATH": str(EXAMPLES.parent)},
        check=False,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout if status == 0 else done.stderr


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import an example, whose file name is no identifier."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> Any:
    return load("02_generate", monkeypatch)


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch) -> Any:
    return load("stdlib_source", monkeypatch)


def corrupt_a_block_id(monkeypatch: pytest.MonkeyPatch) -> None:
    write_tables = BlockGroup.write_tables

    def corrupt(group: BlockGroup) -> None:
        write_tables(group)
        group.block_tables[1, 0] = (group.block_tables[1, 0] + 1) % group.num_blocks

    monkeypatch.setattr(BlockGroup, "write_tables", corrupt)


def save_with_tokenizer(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(CHECKPOINT).save_pretrained(folder)
    return folder


def test_decode_step() -> None:
    assert re.search(r"largest difference to scaled_dot_product_attention: \d\.\de-0[67]", run("01_decode_step.py"))


def test_compile_and_export(tmp_path: Path) -> None:
    printed = run("03_compile_and_export.py", "--out", str(tmp_path / "step.pt2"))
    for way in ("compiled", "exported", "packaged"):
        assert f"{way}: largest difference to eager" in printed
    assert (tmp_path / "step.pt2").stat().st_size > 0


def test_training_writes_a_checkpoint_that_loads(tmp_path: Path) -> None:
    printed = run("04_train_tiny_model.py", "--steps", "3", "--max-windows", "2", "--out", str(tmp_path / "model"))
    assert "step 3: held-out perplexity per token" in printed
    model = LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    ids = tokenizer("def f(x):\n    return x\n", return_tensors="pt", return_token_type_ids=False)
    assert model(**ids).logits.isfinite().all()
    assert tokenizer.decode(ids["input_ids"][0]) == "def f(x):\n    return x\n"
    assert "--steps 3 --seed 0" in (tmp_path / "model" / "README.md").read_text()


def test_demo_prints_what_it_promises() -> None:
    printed = run("02_generate.py", "--max-new-tokens", "24")
    for part in ("validation perplexity", "stated bound", "tokens/s", "cache bytes", "def ", "tokens equal: yes"):
        assert part in printed
    speeds = re.findall(r"^│ (unpatched|torch_paged) +│ +([\d.]+)", printed, re.MULTILINE)
    assert [name for name, _ in speeds] == ["unpatched", "torch_paged"]


def test_compiled_demo() -> None:
    assert "tokens equal: yes" in run("02_generate.py", "--max-new-tokens", "24", "--compile")


def test_batch_generation() -> None:
    printed = run("06_batch_generation.py", "--max-new-tokens", "12")
    assert "failed: [2]; tokens of the others equal to generate(): yes" in printed
    assert "this processor never works" in printed


def test_batch_generation_with_few_blocks() -> None:
    printed = run("06_batch_generation.py", "--num-blocks", "16", "--max-new-tokens", "24")
    assert "tokens of the others equal to generate(): yes" in printed
    assert any(int(count) for count in re.findall(r"│ +\d+ +│ +24 +│ +(\d+)", printed))


def test_shared_prefix() -> None:
    printed = run("07_shared_prefix.py", "--max-new-tokens", "8")
    assert "tokens equal: yes" in printed
    reused = [int(count) for count in re.findall(r"│ [a-z ]+ │ \d+ +│ (\d+)", printed)]
    assert reused[0] == 0
    assert 4500 < reused[1] < reused[2]


def test_demo_takes_another_checkpoint(demo: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    folder = save_with_tokenizer(Qwen3ForCausalLM(Qwen3Config(**TINY)), tmp_path / "qwen3")
    assert demo.main(["--model", str(folder), "--max-new-tokens", "4"]) == 0
    assert "Qwen3ForCausalLM" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_demo_in_half_precision(demo: Any, dtype: str) -> None:
    assert demo.main(["--dtype", dtype, "--max-new-tokens", "8"]) == 0


def test_demo_fails_on_a_corrupt_block_id(
    demo: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    corrupt_a_block_id(monkeypatch)
    assert demo.main(["--max-new-tokens", "16"]) == 1
    assert "tokens equal: no" in capsys.readouterr().out


def test_demo_fails_on_a_bad_perplexity(demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "CHECKPOINT_PERPLEXITY_BELOW", 1.0)
    assert demo.main(["--max-new-tokens", "1"]) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_rounding_tie_is_accepted_in_half_precision_only(
    demo: Any, dtype: torch.dtype, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TINY)).eval().to(dtype)
    ids = torch.tensor([[5, 6, 7]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected, actual = torch.tensor([[8, 9]]), torch.tensor([[8, 10]])
    assert not demo.compare(model, inputs, expected, actual)
    assert "not a rounding tie" in capsys.readouterr().out
    prefix = torch.cat([ids, expected[:, :1]], 1)
    best, other = model(prefix).logits[0, -1].topk(2).indices
    model.lm_head.weight.data[other] = model.lm_head.weight.data[best]
    assert demo.compare(model, inputs, expected, actual) == (dtype != torch.float32)
    printed = capsys.readouterr().out
    assert "differs from token 1 of 2 on: a rounding tie of the unpatched model" in printed
    assert ("tokens equal: no" if dtype == torch.float32 else "tokens equal: but for ties") in printed


def one_sentence(demo: Any, capsys: pytest.CaptureFixture[str], folder: Path) -> str:
    capsys.readouterr()  # saving a model shows its progress
    assert demo.main(["--model", str(folder)]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("02_generate: ")
    assert printed.count("\n") == 1
    return printed


def test_the_help_says_when_tokens_may_differ(demo: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        demo.main(["--help"])
    assert "rounding tie" in " ".join(capsys.readouterr().out.split())


def test_a_wrong_path_gets_one_sentence(demo: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "--model must be a folder with a HuggingFace checkpoint" in one_sentence(demo, capsys, tmp_path / "nothing")
    assert "--model must be a folder" in run("02_generate.py", "--model", str(tmp_path / "nothing"), status=2)


def test_a_broken_checkpoint_gets_one_sentence(demo: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    assert "cannot be loaded" in one_sentence(demo, capsys, tmp_path)
    (tmp_path / "config.json").write_text((CHECKPOINT / "config.json").read_text())
    assert "cannot be loaded" in one_sentence(demo, capsys, tmp_path)


def test_a_checkpoint_that_only_pickle_reads_gets_one_sentence(
    demo: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = shutil.copytree(CHECKPOINT, tmp_path / "pickled")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert "cannot be loaded: Error no file named model.safetensors" in one_sentence(demo, capsys, folder)


def test_an_unsupported_model_gets_one_sentence(demo: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    mamba = MambaForCausalLM(MambaConfig(vocab_size=2048, hidden_size=32, num_hidden_layers=1, state_size=4))
    folder = save_with_tokenizer(mamba, tmp_path / "mamba")
    assert "no layer of mamba has keys to page" in one_sentence(demo, capsys, folder)


def test_models_of_many_kinds_are_patched() -> None:
    printed = run("05_patch_any_model.py")
    for way in ("4 paged", "2 paged (window 8)", "4 latent", "4 gathered"):
        assert way in " ".join(printed.split()).replace("│ │ ", "")
    assert "different" not in printed


def test_patching_says_when_tokens_differ(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    example = load("05_patch_any_model", monkeypatch)
    corrupt_a_block_id(monkeypatch)
    assert example.main(["llama"]) == 1
    assert "different" in capsys.readouterr().out


def test_prompts_are_held_out_and_ragged(source: Any) -> None:
    assert all(source.is_held_out(name) for name, _ in source.PROMPTS)
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    lengths = [len(ids) for ids in tokenizer(source.held_out_prompts())["input_ids"]]
    assert len(set(lengths)) == len(lengths) >= 4
    training = {name for name, _ in source.stdlib_files() if not source.is_held_out(name)}
    assert training.isdisjoint(name for name, _ in source.PROMPTS)
    assert len(training) > 300


def test_checkpoint_is_as_small_as_promised() -> None:
    config = LlamaConfig.from_pretrained(CHECKPOINT)
    assert config.num_key_value_heads == 2
    assert config.num_attention_heads == 6
    weights = load_file(CHECKPOINT / "model.safetensors")
    assert sum(weight.numel() for weight in weights.values()) <= 2_400_000
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert (CHECKPOINT / "model.safetensors").stat().st_size <= 5_000_000
    readme = (CHECKPOINT / "README.md").read_text()
    for part in ("04_train_tiny_model.py", "--seed", "Python 3", "held-out perplexity per token"):
        assert part in readme
