"""Training batches of the demo world, drawn in processes of their own while the model trains."""

import itertools
import math
import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

from llama3v_mlx.image import tile_image
from llama3v_mlx.tiling import ImageConfig, Tiling, plan_tiles

from . import world


@dataclass(frozen=True)
class ImageBatch:
    """B pictures of one tiling, as numpy arrays."""

    tiling: Tiling
    overviews: np.ndarray  # uint8 (B, h, w, 3)
    slices: np.ndarray | None  # uint8 (B·n, h, w, 3), the slices of a picture together
    patches: list[np.ndarray]  # int32 (B or B·n, patches, 5), see `_patches`
    ink: list[np.ndarray]  # float32 (B or B·n, patches, CELLS²): how much ink is in each cell of a patch
    facts: np.ndarray | None  # int32 (B, 8), see `facts_of`; None: not needed


@dataclass(frozen=True)
class Batch:
    """B conversations about one or two pictures each, or none; L and n are rounded up, for few shapes."""

    images: list[ImageBatch]
    ids: np.ndarray  # int32 (B, L), each image's block written out
    source: np.ndarray  # int32 (B·L,): an embedding comes from this place, or is visual token `source - B·L`
    places: np.ndarray  # int32 (n,): positions to predict
    targets: np.ndarray  # int32 (n,): the next tokens there
    weights: np.ndarray  # float32 (n,): 0 for padding


def split_arrays(batch: Batch) -> tuple[list[np.ndarray], Callable[[list], Batch]]:
    """Split a batch into its arrays and a function that rebuilds it from others, for compiled functions."""
    arrays: list[np.ndarray] = []
    _map_arrays(batch, arrays.append)

    def rebuild(new: list) -> Batch:
        following = iter(new)
        return _map_arrays(batch, lambda _: next(following))

    return arrays, rebuild


def _map_arrays(value, function: Callable[[np.ndarray], object]):
    """Map `function` over the arrays of a structure."""
    if isinstance(value, np.ndarray):
        return function(value)
    if isinstance(value, list):
        return [_map_arrays(item, function) for item in value]
    if is_dataclass(value):
        return replace(value, **{f.name: _map_arrays(getattr(value, f.name), function) for f in fields(value)})
    return value


def draw_batch(
    rng: np.random.Generator,
    size: int,
    config: ImageConfig,
    num_queries: int,
    tokenizer: Tokenizer,
    split: str,
    num_images: int | None = None,
) -> Batch:
    """A batch of `size` conversations; by default one batch in seven about two pictures in turn, a few about none."""
    if num_images is None:
        num_images = int(rng.choice([0, 1, 2], p=[0.02, 0.83, 0.15]))
    if num_images == 0:
        pairs = [[world.TEXT_ONLY[rng.integers(len(world.TEXT_ONLY))]] for _ in range(size)]
        return _batch([], [_conversation(tokenizer, [("", turns)], None) for turns in pairs], tokenizer)
    scenes = [_draw_scenes(rng, size, config, split) for _ in range(num_images)]
    blocks = [image_block(tiling.grid, num_queries) for tiling, _ in scenes]
    system = str(rng.choice(world.SYSTEM_PROMPTS)) if rng.random() < 0.1 else None
    rows = []
    for i in range(size):
        turns = []
        for block, (_, drawn) in zip(blocks, scenes, strict=True):
            questions = [world.ask(rng, drawn[i])[1:] for _ in range(3 if num_images == 1 else 2)]
            turns.append((block, questions))
        rows.append(_conversation(tokenizer, turns, system))
    return _batch([_image_batch(tiling, drawn, config) for tiling, drawn in scenes], rows, tokenizer)


EASY_SIZE = 48


def draw_easy_batch(rng: np.random.Generator, size: int, config: ImageConfig, split: str, plain: float) -> Batch:
    """`size` small square pictures without conversations and without slices, a share of them black on white.

    A tower that has learned the shapes here soon recognizes them in colors, at other aspects, and cut by slices.
    """
    side = 2 * config.scale_resolution
    return _overviews([world.draw_scene(rng, (side, side), split, plain=plain) for _ in range(size)], config)


def draw_pages(rng: np.random.Generator, size: int, config: ImageConfig, split: str) -> Batch:
    """`size` tiles full of digits, of which only the patches are labelled."""
    pages = [world.draw_page(rng, 2 * config.scale_resolution, split) for _ in range(size)]
    easy = _overviews(pages, config)
    return replace(easy, images=[replace(easy.images[0], facts=None)])


def _overviews(scenes: list[world.Scene], config: ImageConfig) -> Batch:
    """Square scenes without conversations and without slices."""
    config = replace(config, max_slice_nums=1)
    nothing = [np.zeros(0, np.int32)] * 5
    return Batch([_image_batch(plan_tiles(*scenes[0].image.size, config), scenes, config)], *nothing)


def image_block(grid: tuple[int, int] | None, num_queries: int) -> str:
    """Text of an image's block in the released prompt."""
    tile = "<image>" + "<unk>" * num_queries + "</image>"
    if grid is None:
        return tile
    columns, rows = grid
    return tile + "<slice>" + "\n".join([tile * columns] * rows) + "</slice>"


class Batches:
    """Batches drawn ahead in a process of its own."""

    def __init__(self, seed: int, **options):
        context = multiprocessing.get_context("spawn")
        self._queue = context.Queue(maxsize=8)
        self._worker = context.Process(target=_work, args=(self._queue, seed, options), daemon=True)
        self._worker.start()

    def __next__(self) -> Batch:
        return self._queue.get()

    def close(self) -> None:
        self._worker.terminate()


POOL, REUSE = 200, 3  # batches kept by a worker, and how often each is used


def _work(queue, seed: int, options: dict) -> None:
    rng = np.random.default_rng(seed)
    tokenizer = Tokenizer.from_file(options.pop("tokenizer_file"))
    easy, pages = options.pop("easy", 0), options.pop("pages", False)
    for i in range(easy):
        queue.put(draw_easy_batch(rng, EASY_SIZE, options["config"], options["split"], min(1, 1.5 * (1 - i / easy))))
    drawers = [lambda: draw_batch(rng, tokenizer=tokenizer, **options)]
    if pages:
        drawers.append(lambda: draw_pages(rng, EASY_SIZE, options["config"], options["split"]))
    pools = [[draw()] for draw in drawers]
    for i in itertools.count():
        # Drawing costs half as much as a training step, so each batch is used more than once.
        if i % REUSE == 0:
            for pool, draw in zip(pools, drawers, strict=True):
                pool.append(draw())
                del pool[:-POOL]
        for pool in pools:
            queue.put(pool[rng.integers(len(pool))])


def _draw_scenes(
    rng: np.random.Generator, size: int, config: ImageConfig, split: str
) -> tuple[Tiling, list[world.Scene]]:
    """Scenes on images of many sizes that share one tiling, so that their tiles make full batches."""
    max_side = 400 if rng.random() < 0.7 else world.MAX_SIDE
    width, height = world.draw_size(rng, max_side)
    tiling = plan_tiles(width, height, config)
    sizes = [(width, height)]
    while len(sizes) < size:
        w, h = world.draw_size(rng, max_side)
        ratio = width / height * math.exp(rng.normal(0, 0.04))
        w, h = round(math.sqrt(w * h * ratio)), round(math.sqrt(w * h / ratio))
        if min(w, h) >= world.MIN_SIDE and max(w, h) <= world.MAX_SIDE and plan_tiles(w, h, config) == tiling:
            sizes.append((w, h))
    return tiling, [world.draw_scene(rng, size, split) for size in sizes]


def _image_batch(tiling: Tiling, scenes: list[world.Scene], config: ImageConfig) -> ImageBatch:
    tiled = [tile_image(scene.image, config).tiles for scene in scenes]
    overviews = np.stack([tiles[0] for tiles in tiled])
    patches = [np.concatenate([_patches(scene, tiling.overview, (1, 1), config.patch_size) for scene in scenes])]
    slices = None
    if tiling.grid:
        slices = np.stack([tile for tiles in tiled for tile in tiles[1:]])
        patches.append(
            np.concatenate([_patches(scene, tiling.cell, tiling.grid, config.patch_size) for scene in scenes])
        )
    ink = [_ink(scenes, tiling.overview, (1, 1), config.patch_size)]
    if tiling.grid:
        ink.append(_ink(scenes, tiling.cell, tiling.grid, config.patch_size))
    facts = np.array([facts_of(scene) for scene in scenes], np.int32)
    return ImageBatch(tiling, overviews, slices, patches, ink, facts)


CELLS = 7  # along each side of a patch


def _ink(scenes: list[world.Scene], cell: tuple[int, int], grid: tuple[int, int], patch: int) -> np.ndarray:
    """Amount of ink in CELLS × CELLS cells of each patch."""
    columns, rows = grid
    w, h = cell[0] // patch, cell[1] // patch
    size = (columns * w * CELLS, rows * h * CELLS)
    maps = np.stack([np.asarray(scene.ink.resize(size, Image.Resampling.BOX), np.float32) / 255 for scene in scenes])
    maps = maps.reshape(-1, rows, h, CELLS, columns, w, CELLS).transpose(0, 1, 4, 2, 5, 3, 6)
    return maps.reshape(-1, h * w, CELLS * CELLS)


# Number of classes of each fact about a scene.
NUM_FACTS = (len(world.SHAPES) + 1, 5, len(world.COLORS), len(world.BACKGROUNDS), 4, 11, 11, 11)


def facts_of(scene: world.Scene) -> list[int]:
    """Facts about a scene as class numbers; the last class of each stands for none."""
    shape = world.SHAPES.index(scene.shape) if scene.shape else len(world.SHAPES)
    number = scene.number or ""
    digits = [int(number[i]) if i < len(number) else 10 for i in range(3)]
    color, background = world.COLORS.index(scene.color), world.BACKGROUNDS.index(scene.background)
    return [shape, scene.count, color, background, len(number), *digits]


def _patches(scene: world.Scene, cell: tuple[int, int], grid: tuple[int, int], patch: int) -> np.ndarray:
    """Labels of each patch: region, color, background, whether a center is in it, the digit's place."""
    columns, rows = grid
    w, h = cell[0] // patch, cell[1] // patch
    size = columns * w, rows * h
    region = np.asarray(scene.regions.resize(size, Image.Resampling.NEAREST), dtype=np.int32)
    place = np.asarray(scene.places.resize(size, Image.Resampling.NEAREST), dtype=np.int32)
    center = np.zeros_like(region)
    for x, y in scene.centers:
        center[min(int(y * rows * h), rows * h - 1), min(int(x * columns * w), columns * w - 1)] = 1
    color = np.full_like(region, world.COLORS.index(scene.color))
    background = np.full_like(region, world.BACKGROUNDS.index(scene.background))
    maps = np.stack([region, color, background, center, place], axis=-1)
    maps = maps.reshape(rows, h, columns, w, 5).swapaxes(1, 2)
    return maps.reshape(rows * columns, h * w, 5)


def _conversation(
    tokenizer: Tokenizer, images: list[tuple[str, list[tuple[str, str]]]], system: str | None
) -> tuple[list[int], list[float]]:
    """Ids of a conversation in the released template, and a mask of the answers."""
    parts = [("<|begin_of_text|>", 0.0)]
    if system:
        parts.append((f"<|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>", 0.0))
    for block, turns in images:
        for i, (question, answer) in enumerate(turns):
            content = f"{block}\n{question}" if block and i == 0 else question
            head = "<|start_header_id|>{}<|end_header_id|>\n\n"
            parts.append((head.format("user") + content + "<|eot_id|>" + head.format("assistant"), 0.0))
            parts.append((f"{answer}<|eot_id|>", 1.0))
    ids, weights = [], []
    for text, weight in parts:
        new = tokenizer.encode(text, add_special_tokens=False).ids
        ids += new
        weights += [weight] * len(new)
    return ids, weights


def _batch(images: list[ImageBatch], rows: list[tuple[list[int], list[float]]], tokenizer: Tokenizer) -> Batch:
    B, L = len(rows), -(-max(len(ids) for ids, _ in rows) // 16) * 16
    ids, wanted = np.zeros((B, L), np.int32), np.zeros((B, L), bool)
    for i, (row, weight) in enumerate(rows):
        ids[i, : len(row)], wanted[i, : len(row)] = row, weight
    source = np.arange(B * L, dtype=np.int32)
    is_image = ids.reshape(-1) == tokenizer.token_to_id("<unk>")
    source[is_image] = B * L + np.arange(is_image.sum())
    targets = np.flatnonzero(wanted)
    weights = np.ones(len(targets), np.float32)
    fill = -len(targets) % 64
    targets, weights = np.pad(targets, (0, fill), constant_values=1), np.pad(weights, (0, fill))
    return Batch(images, ids, source, (targets - 1).astype(np.int32), ids.reshape(-1)[targets], weights)
