"""The layout of the package: imports run one way, along the flow of the data."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import llama3v_mlx

PACKAGE = Path(llama3v_mlx.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# A module or subpackage may import from itself and from the rows above it.
LAYERS = (
    ("device", "formats"),
    ("llama3v_mlx",),
    ("locks",),
    ("files", "tiling"),
    ("hub",),
    ("pdf",),
    ("image",),
    ("fields",),
    ("sampling", "prompt_tokens"),
    ("prompt",),
    ("models",),
    ("config",),
    ("tokenizer",),
    ("checkpoint",),
    ("loading",),
    ("schema",),
    ("drafting",),
    ("memory",),
    ("cli",),
    ("features",),
    ("generation",),
    ("conversation", "rerank", "sheet"),
    ("training",),
    ("serving", "conversion", "evaluation"),
    ("answers", "batch_generate"),
    ("demo", "terminal"),
    ("selftest", "ask_folder", "ask_found"),
    ("generate", "chat", "server", "embed", "search", "train", "convert", "synthesize", "evaluate", "doctor"),
    ("__main__",),
)
LAYER = {name: i for i, names in enumerate(LAYERS) for name in names}


def top(path: Path) -> str:
    """The module or subpackage directly below the package that a file belongs to."""
    name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "llama3v_mlx" if name == "__init__" else name


def imports_of(path: Path) -> Iterator[str]:
    """The modules and subpackages directly below the package that a file imports, anywhere in it."""
    package = ["llama3v_mlx", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            names = [[*base, alias.name] for alias in node.names]
        else:
            continue
        for name in names:
            if name[0] == "llama3v_mlx":
                yield name[1] if len(name) > 1 and name[1] in LAYER else "llama3v_mlx"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    own = top(path)
    for name in imports_of(path):
        assert name == own or LAYER[name] < LAYER[own], f"{own} imports {name}"


def test_every_module_has_a_layer() -> None:
    assert {top(path) for path in FILES} == set(LAYER)


def test_nothing_is_pickled_or_executed() -> None:
    for path in FILES:
        names = {n.id for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Name)}
        assert not names & {"pickle", "eval", "exec", "torch"}, path.name
        assert "trust_remote_code" not in path.read_text(encoding="utf-8"), path.name
