"""Images in mlx-lm's prefix cache and so in its batches, which know of tokens alone.

An image's tokens get ids drawn from its hash; what the model makes of them is put into the cache under those ids before
the request joins a batch, which then has text left to read.
"""

import itertools

import mlx.core as mx
import numpy as np

from ..models.llama3v import Model


def cache_key(prompt: list[int], image_ids: list[int], vocab_size: int) -> list[int]:
    """A prompt's ids with each image's tokens drawn from its hash: of the vocabulary, and no other image's.

    Args:
        prompt: the ids.
        image_ids: the same, but for an image's tokens, which are a negative number of its own.
        vocab_size: ids are below it, for mlx-lm may look them up.
    """
    key = list(prompt)
    for image, places in itertools.groupby(range(len(prompt)), key=image_ids.__getitem__):
        if image < 0:
            run = list(places)
            key[run[0] : run[-1] + 1] = np.random.default_rng(-image).integers(0, vocab_size, len(run)).tolist()
    return key


def read_images(model: Model, name: object, prefixes, prompt: list[int], key: list[int], vision, step: int) -> int:
    """Have a prompt in the cache up to the end of its last image.

    Args:
        model: what reads.
        name: the model's key in the cache.
        prefixes: mlx-lm's prompt cache.
        prompt: the ids, of which an image's are all its placeholder.
        key: what `cache_key` has made of them.
        vision: mlx-lm's description of the prompt's images.
        step: tokens that are read at once.

    Returns:
        How many tokens were in the cache before.
    """
    is_image = [token < 0 for token in vision.cache_key]
    end = len(key) - is_image[::-1].index(True)
    cache, rest = prefixes.fetch_nearest_cache(name, key)
    cached = len(key) - len(rest)
    if cached >= end:
        return cached
    if cache is None or (is_image[cached - 1] and is_image[cached]):  # the beginning of an image is another one's
        cache, cached = model.make_cache(), 0
    images = vision.pixel_values[sum(start < cached for start in vision.starts) :]
    rows = model.embed_inputs(mx.array(prompt[cached:end]), images)[None]
    for start in range(0, rows.shape[1], step):
        part = rows[:, start : start + step]
        model(mx.zeros(part.shape[:2], mx.int32), cache, part)
        mx.eval([layer.state for layer in cache])
    prefixes.insert_cache(name, key[:end], cache, cache_type="user")
    return cached
