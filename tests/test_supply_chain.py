"""What is loaded runs no code, and what CI installs is locked by hashes (docs/supply-chain.md)."""

import ast
import re

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from torch_paged.testing.processes import SOURCE

tomllib = pytest.importorskip("tomllib")  # Python 3.11
LOCK = SOURCE / ".ci/requirements.txt"
FOLDERS = ("torch_paged", "examples", "benchmarks")
UNPICKLING = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
LOADING = {"torch.load", "torch.save", "torch.jit.load", "torch.hub.load", "numpy.load", "np.load", "eval", "exec"}


def offences(code: str) -> list[str]:
    """Return what in a program loads or stores by pickle, or runs text."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.partition(".")[0] in UNPICKLING]
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found += sorted(names & LOADING) + [node.module or ""] * (
                (node.module or "").partition(".")[0] in UNPICKLING
            )
        elif isinstance(node, ast.Call):
            name, given = ast.unparse(node.func), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            unsafe = given.get("trust_remote_code") == "True" or given.get("allow_pickle") == "True"
            model = re.fullmatch(r"\w*(Model|For)\w*\.from_pretrained", name) is not None
            any_file = model and given.get("use_safetensors") != "True"
            found += [name] * (name in LOADING or unsafe or any_file)
    return found


def test_nothing_is_unpickled() -> None:
    found = {path: offences(path.read_text()) for name in FOLDERS for path in (SOURCE / name).rglob("*.py")}
    assert len(found) > 100
    assert {str(path): names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "from torch import load",
        "torch.load(path)",
        "np.load(path, allow_pickle=True)",
        "AutoModelForCausalLM.from_pretrained(path)",
        "AutoModel.from_pretrained(path, use_safetensors=True, trust_remote_code=True)",
        "exec(text)",
    ],
)
def test_what_unpickles_is_noticed(code: str) -> None:
    assert len(offences(code)) == 1


def test_no_file_here_is_for_pickle() -> None:
    pickled = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npy", ".npz"}
    files = [path for name in (*FOLDERS, "tests", "docs") for path in (SOURCE / name).rglob("*")]
    assert not [path for path in files if path.suffix in pickled]


def locked() -> dict[str, str]:
    """Return the version of each distribution in the lock; each has a hash."""
    text = re.sub(r"#.*", "", LOCK.read_text()).replace("\\\n", " ")
    pins: dict[str, str] = {}
    for line in filter(str.strip, text.splitlines()):
        name, version, hashes = re.fullmatch(r"([\w.-]+)==(\S+)((?: +--hash=sha256:[0-9a-f]{64})+) *", line).groups()  # type: ignore[union-attr]
        assert hashes
        pins[canonicalize_name(name)] = version
    return pins


def test_the_lock_holds_what_the_tests_need_and_names_no_host() -> None:
    project = tomllib.loads((SOURCE / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    wanted = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    pins = locked()
    for requirement in map(Requirement, [*wanted, *extras["test"], *extras["transformers"]]):
        version = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"make lock: {requirement} and the lock's {version}"
    [torch] = re.findall(r"^TORCH \?= (\S+)$", (SOURCE / "Makefile").read_text(), re.MULTILINE)
    assert pins["torch"].partition("+")[0] == torch
    assert "://" not in LOCK.read_text()
    assert "index" not in LOCK.read_text()
    assert "LOCK=.ci/requirements.txt" in (SOURCE / ".ci/run").read_text()
