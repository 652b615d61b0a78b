"""The prefix cache: what is found again, in memory and on disk, and how it stays within its bounds."""

import hashlib
import os
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from llama3v_mlx.serving.images import RequestImage
from llama3v_mlx.serving.prefix_cache import PrefixCache, fingerprint
from llama3v_mlx.serving.prompts import BLOCK, PlannedImage, RequestPrompt
from llama3v_mlx.tiling import Tiling

TOKEN_BYTES = 2 * 2 * 1 * 1 * 3 * 4  # layers, keys and values, batch, heads, head_dim, float32


def held(start: int, end: int) -> mx.array:
    """Keys and values that tell their place: (layers, 2, 1, heads, tokens, head_dim)."""
    places = mx.arange(start, end, dtype=mx.float32)[:, None]
    return mx.broadcast_to(places, (2, 2, 1, 1, end - start, 3)) + 0


def places(array: mx.array) -> list[int]:
    return np.array(array[0, 0, 0, 0, :, 0]).astype(int).tolist()


def picture(data: bytes, grid: tuple[int, int] | None = None) -> PlannedImage:
    return PlannedImage(RequestImage(data, (9, 9), "here"), Tiling((56, 56), grid, (56, 56)), None)


def with_image(data: bytes, text: int, grid: tuple[int, int] | None = None) -> RequestPrompt:
    """Five ids, an image of 40 tokens, and some text."""
    ids = [1, 2, 3, 4, 5, *[0] * 40, *range(100, 100 + text)]
    return RequestPrompt(ids, (picture(data, grid),), ((5, 45),))


def test_blocks() -> None:
    """An image is one block, which ends with the image; the rest is cut into full blocks."""
    prompt = with_image(b"a", 20)
    assert [(block.start, block.end) for block in prompt.blocks()] == [(0, 5), (5, 45), (45, 45 + BLOCK)]
    assert [block.end for block in prompt.blocks(range(12))] == [5, 45, 45 + BLOCK, 45 + 2 * BLOCK]
    digests = [block.digest for block in prompt.blocks()]
    assert [block.digest for block in with_image(b"a", 40).blocks()][:3] == digests
    for other in (with_image(b"b", 20), with_image(b"a", 20, (2, 1))):
        assert [block.digest for block in other.blocks()][0] == digests[0]
        assert not {block.digest for block in other.blocks()[1:]} & set(digests)


def test_adjacent_images_and_images_at_the_start() -> None:
    images = picture(b"a"), picture(b"b")
    blocks = RequestPrompt([0] * 20, images, ((0, 10), (10, 20))).blocks()
    assert [(block.start, block.end) for block in blocks] == [(0, 10), (10, 20)]


def test_the_longest_beginning_is_found() -> None:
    cache = PrefixCache(10**6)
    blocks = with_image(b"a", 40).blocks()
    assert cache.fetch(blocks, 1000) == (0, None)
    cache.store(blocks, held)
    assert cache.fetch(with_image(b"b", 40).blocks(), 1000)[0] == 5
    length, found = cache.fetch(with_image(b"a", 25).blocks(), 1000)
    assert length == 45 + BLOCK and places(found) == list(range(length))
    assert cache.fetch(blocks, 45 + BLOCK - 1)[0] == 45
    assert cache.fetch(blocks, 44)[0] == 5


def test_memory_is_bounded() -> None:
    """What was used last stays, and never without its beginning."""
    cache = PrefixCache(100 * TOKEN_BYTES)
    first, second = with_image(b"a", 2).blocks(), with_image(b"b", 2).blocks()
    cache.store(first, held)
    cache.store(second, held)
    assert cache.nbytes == 85 * TOKEN_BYTES
    cache.fetch(first, 1000)
    cache.store(with_image(b"c", 2).blocks(), held)
    assert cache.nbytes <= 100 * TOKEN_BYTES
    assert cache.fetch(first, 1000)[0] == 45 and cache.fetch(second, 1000)[0] == 5
    cache.store(RequestPrompt([7] * 200).blocks(), held)
    assert cache.nbytes <= 100 * TOKEN_BYTES
    tiny = PrefixCache(TOKEN_BYTES)
    tiny.store(first, held)
    assert tiny.nbytes == 0


def saved(cache: PrefixCache) -> PrefixCache:
    while cache.save_one():
        pass
    return cache


def test_a_restart(tmp_path: Path) -> None:
    blocks = with_image(b"a", 40).blocks()
    first = PrefixCache(10**6, tmp_path, "model")
    first.store(blocks, held)
    saved(first)
    (tmp_path / "model" / "x.partial").write_bytes(b"left by a kill")
    again = PrefixCache(10**6, tmp_path, "model")
    length, found = again.fetch(blocks, 1000)
    assert length == blocks[-1].end and places(found) == list(range(length))
    assert not list(tmp_path.glob("*/*.partial"))
    again.store(blocks, held)
    assert not again.save_one(), "what is in the folder is not written again"
    assert PrefixCache(10**6, tmp_path, "other model").fetch(blocks, 1000) == (0, None)


@pytest.mark.parametrize(
    "damage", ["flipped", "cut", "empty", "foreign", "header", "shape", "integers", "pipe", "link"]
)
def test_a_damaged_file_is_dropped(tmp_path: Path, damage: str) -> None:
    """And never believed: not its keys and values, nor what its header says."""
    blocks = with_image(b"a", 40).blocks()
    first = PrefixCache(10**6, tmp_path, "model")
    first.store(blocks, held)
    saved(first)
    (path,) = tmp_path.glob(f"model/{blocks[1].digest}-*")
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[-7] ^= 1
    elif damage == "header":
        data[:8] = (2**63).to_bytes(8, "little")
    elif damage == "foreign":
        data = bytearray(next(tmp_path.glob(f"model/{blocks[2].digest}-*")).read_bytes())
    path.write_bytes(bytes(data[: {"cut": 50, "empty": 0}.get(damage, len(data))]))
    if damage in ("shape", "integers"):  # under the name of its new contents
        array = mx.zeros((2, 2, 1, 1, 40, 4)) if damage == "shape" else mx.zeros((2, 2, 1, 1, 40, 3), mx.int32)
        path.unlink()
        mx.save_safetensors(str(path), {"held": array})
        path = path.rename(path.with_stem(f"{blocks[1].digest}-{hashlib.sha256(path.read_bytes()).hexdigest()}"))
    elif damage == "link":
        path.rename(tmp_path / "outside")
        path.symlink_to(tmp_path / "outside")
    elif damage == "pipe":
        path.unlink()
        os.mkfifo(path)
    again = PrefixCache(10**6, tmp_path, "model", shape=(2, 1, 3))
    assert again.fetch(blocks, 1000)[0] == 5 and not path.exists()
    again.store(blocks, held)
    assert again.fetch(blocks, 1000)[0] == blocks[-1].end


def test_the_folder_is_bounded(tmp_path: Path) -> None:
    """The files of other models count, and go first."""
    other = PrefixCache(10**6, tmp_path, "other")
    other.store(RequestPrompt([3] * 64).blocks(), held)
    saved(other)
    size = other.folder_bytes
    assert size == sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    cache = PrefixCache(10**6, tmp_path, "model", max_folder_bytes=size)
    for i in range(10):
        cache.store(RequestPrompt([i] * 64).blocks(), held)
        saved(cache)
        assert sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors")) <= size
    assert not list(tmp_path.glob("other/*"))
    assert PrefixCache(10**6, tmp_path, "model").fetch(RequestPrompt([9] * 64).blocks(), 1000)[0] == 64
    smaller = PrefixCache(10**6, tmp_path, "model", max_folder_bytes=size // 2)
    assert smaller.folder_bytes <= size // 2
    none = PrefixCache(10**6, tmp_path, "model", max_folder_bytes=10)
    none.store(RequestPrompt([3] * 64).blocks(), held)
    saved(none)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_what_leaves_the_memory_is_saved_first(tmp_path: Path) -> None:
    cache = PrefixCache(50 * TOKEN_BYTES, tmp_path, "model")
    first = with_image(b"a", 2).blocks()
    cache.store(first, held)
    cache.store(with_image(b"b", 2).blocks(), held)
    assert cache.fetch(first, 1000)[0] == 45


def test_a_full_disk_costs_no_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    def full(*args):
        raise OSError(28, "No space left on device")

    cache = PrefixCache(10**6, tmp_path, "model")
    blocks = with_image(b"a", 40).blocks()
    cache.store(blocks, held)
    monkeypatch.setattr(Path, "write_bytes", full)
    saved(cache)
    assert "No space left" in caplog.text and cache.fetch(blocks, 1000)[0] == blocks[-1].end
    cache.store(with_image(b"b", 40).blocks(), held)
    assert not cache.save_one()


def test_the_fingerprint(demo) -> None:
    """Of every weight and of the settings: a file of another model is never read."""
    model, _ = demo
    own = fingerprint(model, "settings")
    assert own == fingerprint(model, "settings") != fingerprint(model, "others")
    weight = model.language_model.lm_head.weight
    try:
        model.language_model.lm_head.weight = weight.at[0, 0].add(1e-3)
        assert fingerprint(model, "settings") != own
    finally:
        model.language_model.lm_head.weight = weight
