"""The shape of the package: imports run one way, along the flow of the data."""

import ast
from pathlib import Path

import llama3v_mlx

PACKAGE = Path(llama3v_mlx.__file__).parent

# Each module may import those before it. The commands come last, and nobody imports them.
ORDER = (
    "image",
    "cpu",
    "siglip",
    "projector",
    "processor",
    "model",
    "checkpoint",
    "shards",
    "features",
    "encoder",
    "engine",
)
COMMANDS = ("generate", "chat", "server", "embed", "search", "train", "synthesize", "evaluate", "convert")


def imports_of(path: Path) -> set[str]:
    """The modules of the package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == (1 if path.parent == PACKAGE else 2):
            found |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
    return found & {path.stem for path in PACKAGE.glob("*.py")}


def test_imports_run_one_way() -> None:
    for i, name in enumerate(ORDER):
        later = imports_of(PACKAGE / f"{name}.py") & {*ORDER[i:], *COMMANDS}
        assert not later, f"{name}.py imports {later}, which come after it"


def test_commands_are_leaves() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert not imports_of(path) & set(COMMANDS), path.name


def test_modules_stay_small() -> None:
    for path in PACKAGE.rglob("*.py"):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= 350, f"{path.name} has {lines} lines and wants to be two"


def test_nothing_is_pickled_or_executed() -> None:
    for path in PACKAGE.rglob("*.py"):
        names = {n.id for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Name)}
        assert not names & {"pickle", "eval", "exec", "torch"}, path.name
        assert "trust_remote_code" not in path.read_text(encoding="utf-8"), path.name
