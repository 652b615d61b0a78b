"""Visual tokens cached in a feature store, for generate, chat and server."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from ..image import ImageSource, image_sha256
from ..models.llama3v import Model
from ..tiling import ImageConfig, TiledImage
from .encoder import ImageEncoder
from .store import STORE, FeatureError, Features, FeatureStore
from .writer import FeatureWriter


class FeatureCache:
    """Cache of a Llama3-V's visual tokens in a feature store; missing images are encoded and added.

    Args:
        folder: a store of visual tokens or patch features of this model; created if it does not exist.
        model: the model that encodes images.
        image_config: slicing of the images.
        name: the checkpoint's name, for display.
        by_fingerprint: `folder` has stores of visual tokens of several models, named by their fingerprints.

    Raises:
        FeatureError: if the folder is not a store, or one of another model, kind or preprocessing.
    """

    def __init__(
        self, folder: str | Path, model: Model, image_config: ImageConfig, name: str, by_fingerprint: bool = False
    ):
        kind, stored = "visual-tokens", None
        if (Path(folder) / STORE).is_file():
            info = FeatureStore(folder).info
            kind, stored = info.kind, info.dtype
            if kind == "pooled":
                raise FeatureError(f"{folder}: holds pooled embeddings; Llama3-V needs visual-tokens or patch features")
        self.encoder = ImageEncoder(name, model, kind, image_config)
        info = self.encoder.store_info(stored)
        self.store = FeatureStore.create(Path(folder) / info.fingerprint[:32] if by_fingerprint else folder, info)
        model.release_vision()  # the fingerprint has read all its weights

    def tile(self, source: ImageSource) -> TiledImage:
        """Cut an image into tiles; a stored image is not decoded, and only its grid is returned."""
        sha256 = image_sha256(source, self.encoder.tiling)
        if sha256 is None:
            return self.encoder.prepare(source)
        return self.stored(sha256) or replace(self.encoder.prepare(source), sha256=sha256)

    def stored(self, sha256: bytes) -> TiledImage | None:
        """Return a stored image without tiles, or None."""
        return TiledImage((), self.store.grid(sha256), sha256) if sha256 in self.store else None

    def encode(self, images: Sequence[TiledImage]) -> list[mx.array]:
        """Look up or compute the visual tokens of images from `tile`: (tiles·num_queries, hidden_size) each."""
        new = [image for image in images if image.tiles]
        computed = dict(zip(map(id, new), self.encoder.encode(new), strict=True))
        keep = {image.sha256: computed[id(image)] for image in new if image.sha256}
        if keep:
            with FeatureWriter(self.store) as writer:
                writer.add(list(keep.items()))
        found = [computed[id(image)] if image.tiles else self.store.get(image.sha256) for image in images]
        rows = [self._project(features) for features in found]
        mx.eval(rows)
        self.encoder.model.release_vision()
        return rows

    def _project(self, features: Features) -> mx.array:
        rows = features.rows.astype(self.encoder.dtype)
        if self.encoder.kind == "visual-tokens":
            return rows
        (w, h), end = features.overview, features.overview[0] * features.overview[1]
        tokens = [self.encoder.model.projector(rows[None, :end], (h, w))]
        if features.grid:
            w, h = features.cell
            tokens.append(self.encoder.model.projector(rows[end:].reshape(-1, w * h, rows.shape[1]), (h, w)))
        return mx.concatenate([y.reshape(-1, y.shape[-1]) for y in tokens])
