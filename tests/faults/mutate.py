"""Mutations of JSON, of safetensors files, of plain bytes, and of the files of a folder."""

import copy
import json
import os
import random
import struct
from pathlib import Path
from typing import Any

STRANGE: tuple[Any, ...] = (None, True, False, 0, -1, 1, 2, 3, 7, 10**6, 2**31 - 1, 2**31, 2**63, 10**400, -(2**63))
STRANGE += (0.5, -0.0, 1e308, 1e-320, float("nan"), float("inf"), "", "text", "16", "\0", "\ud800", "\x1b[2J", "a\nb")
STRANGE += ([], {}, [[]], [None], [[[[1]]]], {"a": None}, ["a", 1], [1, 2, 3], "../outside/file", "/etc/hostname")


def mutate_tree(rng: random.Random, root: Any) -> Any:
    """Change one value somewhere in a JSON tree, which is not modified."""
    root = copy.deepcopy(root)
    places = _walk(rng, root)
    if not places:
        return rng.choice(STRANGE)
    parent, key = places[-1]
    value = parent[key]
    match rng.randrange(6):
        case 0:
            del parent[key]
        case 1 if isinstance(value, int | float) and not isinstance(value, bool):
            parent[key] = rng.choice(
                [
                    -value,
                    value + 1,
                    value * 2,
                    value - 1,
                    str(value),
                    value / 3 if abs(value) < 10**300 else 0.1,
                    value * 10**6,
                ]
            )
        case 1 if isinstance(value, str):
            parent[key] = rng.choice([value + "x", value[:-1], [value], {"content": value}, value * 1000])
        case 1 if isinstance(value, list):
            parent[key] = rng.choice([value[:-1], value[::-1], value * 2, [value], dict(enumerate(map(str, value)))])
        case 1 if isinstance(value, dict):
            parent[key] = rng.choice([[*value], [*value.values()], [value], str(value), {**value, "new": 1}])
        case _:
            parent[key] = rng.choice(STRANGE)
    return root


def _walk(rng: random.Random, root: Any) -> list[tuple[Any, Any]]:
    """A random path from the root: (container, key) at each level."""
    places, here = [], root
    while isinstance(here, dict | list) and here and (not places or rng.random() < 0.75):
        key = rng.choice(list(here)) if isinstance(here, dict) else rng.randrange(len(here))
        places.append((here, key))
        here = here[key]
    return places


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """Flip bits, cut, repeat, insert or overwrite; mostly near the beginning, where headers are."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        if not data:
            break
        at = min(int(len(data) * rng.random() ** rng.choice((1, 4, 16))), len(data) - 1)
        match rng.randrange(7):
            case 0 | 1:
                data[at] ^= 1 << rng.randrange(8)
            case 2:
                del data[at:]
            case 3:
                del data[at : at + rng.randrange(1, 16)]
            case 4:
                data[at:at] = rng.randbytes(rng.randrange(1, 16))
            case 5:
                data[at : at + 4] = rng.choice(
                    (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f")
                )
            case _:
                start = rng.randrange(len(data))
                data[at:at] = data[start : start + rng.randrange(1, 4096)]
    return bytes(data)


def mutate_json(rng: random.Random, data: bytes) -> bytes:
    """Change a value of a JSON text, or the text itself."""
    match rng.randrange(12):
        case 0:
            return mutate_bytes(rng, data)
        case 1:
            depth = rng.choice((100, 10**5))
            return data.rstrip()[:-1] + b', "deep": ' + b"[" * depth + b"]" * depth + b"}"
        case 2:
            tree = json.loads(data)
            key = rng.choice(list(tree)) if isinstance(tree, dict) and tree else "a"
            again = json.dumps({key: rng.choice(STRANGE)})[1:-1].encode()
            return data.rstrip()[:-1] + b", " + again + b"}"
        case 3:
            return rng.choice(
                (b"", b"null", b"[]", b"{}", b"1e999", b"\xff\xfe{\0}\0", b"\xef\xbb\xbf" + data, data + data)
            )
        case _:
            tree = json.loads(data)
            for _ in range(rng.choice((1, 1, 1, 2, 3))):
                tree = mutate_tree(rng, tree)
            return json.dumps(tree).encode()


def mutate_safetensors(rng: random.Random, data: bytes) -> bytes:
    """Change the header of a safetensors file or its length, flip bits of tensors, or cut the file."""
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    match rng.randrange(8):
        case 0:
            size = rng.choice((0, 1, length - 1, length + 1, length * 2, 2**31, 2**63, 2**64 - 1))
            return struct.pack("<Q", size) + data[8:]
        case 1:
            return mutate_bytes(rng, data)
        case 2:
            return data[: rng.randrange(len(data))]
        case 3:
            body = mutate_bytes(rng, body)
            text = json.dumps(header).encode()
        case 4:
            text = mutate_json(rng, json.dumps(header).encode())
        case 5:
            name = rng.choice([name for name in header if name != "__metadata__"])
            entry = header[name]
            match rng.randrange(4):
                case 0:
                    entry["dtype"] = rng.choice(
                        ("F64", "F32", "I8", "U32", "BOOL", "F8_E4M3", "C64", "F4", "X", "BF16", "I16")
                    )
                case 1:
                    entry["shape"] = rng.choice(
                        (
                            [],
                            [0],
                            [1, *entry["shape"]],
                            entry["shape"][::-1],
                            [2**40, 2**40],
                            [2**31, 2**33],
                            [-1],
                            [2**63],
                        )
                    )
                case 2:
                    entry["data_offsets"] = rng.choice(
                        ([0, 0], [0, 2**63], entry["data_offsets"][::-1], [-8, 8], [2**40, 2**41], [0, len(body)])
                    )
                case _:
                    header[rng.choice(("../x", "", "\x1b[2J", "model.layers.99999999.weight", name + ".x"))] = (
                        header.pop(name)
                    )
            text = json.dumps(header).encode()
        case 6:
            one, other = (rng.choice([name for name in header if name != "__metadata__"]) for _ in range(2))
            header[one], header[other] = header[other], header[one]
            text = json.dumps(header).encode()
        case _:
            text = json.dumps(mutate_tree(rng, header)).encode()
    return struct.pack("<Q", len(text)) + text + body


def mutate_file(rng: random.Random, path: Path) -> str:
    """Mutate a file by its kind; return a description."""
    data = path.read_bytes()
    if path.suffix in (".json", ".jsonl"):
        mutated = mutate_json(rng, data) if path.suffix == ".json" else mutate_bytes(rng, data)
    elif path.suffix == ".safetensors":
        mutated = mutate_safetensors(rng, data)
    else:
        mutated = mutate_bytes(rng, data)
    path.write_bytes(mutated)
    return path.name


def replace_file(rng: random.Random, path: Path, outside: Path) -> str:
    """Replace a file by something else that has its name: a link out of the folder, a pipe, a folder, nothing."""
    (outside / path.name).write_bytes(path.read_bytes())
    path.unlink()
    kind = rng.choice(("link", "relative link", "loop", "pipe", "folder", "nothing", "device", "empty", "unreadable"))
    match kind:
        case "link":
            path.symlink_to(outside / path.name)
        case "relative link":
            path.symlink_to(os.path.relpath(outside / path.name, path.parent))
        case "loop":
            path.symlink_to(path.name)
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "device":
            path.symlink_to("/dev/zero")
        case "empty":
            path.touch()
        case "unreadable":  # root reads it all the same
            path.write_bytes((outside / path.name).read_bytes())
            path.chmod(0)
    return f"{path.name} replaced: {kind}"
