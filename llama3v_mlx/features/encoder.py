"""Image and text features from any SigLIP: Google's checkpoints, and the tower of a llama3v checkpoint."""

import hashlib
import json
import os
import string
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from PIL import Image

from ..checkpoint import CONFIG, check_tensors, find_checkpoint, name_of, read_config, read_json, read_tensors
from ..config import SIGLIP_TEXT, VISION, check_heads, one_line
from ..device import on_gpu
from ..fields import CheckpointError, Choice, check_fields, check_object
from ..files import check_file
from ..image import ImageSource, load_image, tile_image
from ..models import linux_cpu
from ..models.released import lay_out
from ..models.siglip import SigLIP, TextConfig, VisionConfig, encode_by_size
from ..tiling import ImageConfig, TiledImage
from .store import FeatureError, Features, FeatureStore, StoreInfo

SIGLIP_TYPES = ("siglip", "siglip_vision_model")
PREPROCESSOR, PROCESSOR, SENTENCEPIECE = "preprocessor_config.json", "processor_config.json", "spiece.model"
# Defaults of keys missing in Google's configs: Hugging Face's, those of the base model.
_BASE_VISION = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_BASE_VISION |= {"image_size": 224, "patch_size": 16}


class ImageEncoder:
    """Image encoder of a checkpoint. `prepare` may run on any thread, `encode` on one only.

    Args:
        name: the checkpoint's name, for display.
        model: a SigLIP, or a Llama3-V, of which the tower is used.
        kind: "pooled" (one row per image), "patch" (a row per patch) or "visual-tokens" (the projector's output).
        image_config: slicing of a Llama3-V; None: images are resized to the tower's square input.
        resample: filter for resizing to the square.
        draft: decode large JPEGs at a smaller scale, which is faster but not exact.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        kind: str,
        image_config: ImageConfig | None,
        resample: Image.Resampling = Image.Resampling.BICUBIC,
        draft: bool = False,
    ):
        self.draft = draft
        self.all_cores = False  # on a Linux CPU: split batches among the cores, when nothing else is being computed
        self.name, self.model, self.kind = name, model, kind
        self.image_config, self.resample = image_config, resample
        self.config = model.vision_tower.config
        self.width = model.args.projector_config["hidden_size"] if kind == "visual-tokens" else self.config.hidden_size
        self._encode = mx.compile(self._rows) if image_config is None else self._rows

    @property
    def dtype(self) -> mx.Dtype:
        """Compute dtype: that of the tower's weights."""
        return self.model.vision_tower.post_layernorm.weight.dtype

    @property
    def tiling(self) -> ImageConfig:
        """Slicing config; a single square for a tower without slicing."""
        return self.image_config or ImageConfig(self.config.image_size, self.config.patch_size, 1, square=True)

    def prepare(self, source: ImageSource) -> TiledImage:
        """Load an image and cut it into uint8 tiles.

        Raises:
            ImageError: see `load_image`.
        """
        if self.image_config is not None:
            return tile_image(source, self.image_config)
        size = (self.config.image_size, self.config.image_size)
        image = load_image(source, size if self.draft else None, self.tiling)
        return TiledImage((np.asarray(image.resize(size, self.resample)),), None)

    def encode(self, images: Sequence[TiledImage]) -> list[Features]:
        """Compute the features of images, unevaluated; tiles of equal size are batched across images."""
        patch = self.config.patch_size
        num_tiles = sum(len(image.tiles) for image in images)
        features = []
        encoded = encode_by_size(images, self._encode_batch, num_tiles)
        for image, rows in zip(images, encoded, strict=True):
            sizes = [(tile.shape[1] // patch, tile.shape[0] // patch) for tile in image.tiles]
            features.append(Features(rows, sizes[0], image.grid, sizes[1] if image.grid else None))
        return features

    def _encode_batch(self, tiles: np.ndarray) -> mx.array:
        if self.all_cores and linux_cpu.applies(self.model.vision_tower.post_layernorm.weight):
            patches = (tiles.shape[1] // self.config.patch_size) * (tiles.shape[2] // self.config.patch_size)
            return linux_cpu.in_streams(self._encode, tiles, most=max(1, 1024 // patches))
        return self._encode(mx.array(tiles))

    def _rows(self, tiles: mx.array) -> mx.array:
        """Features (B, rows, width) of uint8 tiles (B, height, width, 3)."""
        tower = self.model.vision_tower
        x = tower(tiles)
        if self.kind == "pooled":
            return tower.pool(x)[:, None]
        if self.kind == "visual-tokens":
            patch = self.config.patch_size
            return self.model.projector(x, (tiles.shape[1] // patch, tiles.shape[2] // patch))
        return x

    def fingerprint(self) -> str:
        """Hex SHA-256 of everything the features depend on: weights, compute dtype, preprocessing, kind."""
        image = vars(self.image_config) if self.image_config else {"size": self.config.image_size}
        settings = {"kind": self.kind, "dtype": str(self.dtype), "image": image, "resample": int(self.resample)}
        settings["draft"] = self.draft
        version = 1 if self.config.model_type == "siglip_vision_model" else 2  # 2: ids with torch's rounding at ties
        settings |= {"vision": vars(self.config), "version": version}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        parts = {"vision_tower": self.model.vision_tower.parameters()}
        if self.kind == "visual-tokens":
            parts["projector"] = self.model.projector.parameters()
        for name, tensor in sorted(tree_flatten(parts)):
            digest.update(name.encode())
            digest.update(memoryview(np.array(tensor.reshape(-1).view(mx.uint8))))
        return digest.hexdigest()

    def store_info(self, stored: str | None = None) -> StoreInfo:
        """Metadata of a store of these features; `stored` is the dtype of its rows, half precision by default."""
        if stored is None:
            stored = "bfloat16" if self.dtype == mx.bfloat16 else "float16"
        dtype = str(self.dtype).removeprefix("mlx.core.")
        return StoreInfo(self.name, self.kind, self.fingerprint(), self.width, stored, dtype, self.draft)

    def flops(self, tile: tuple[int, int]) -> float:
        """Floating-point operations for a tile of (width, height) pixels; a multiply-add counts as two.

        With N patches of width D, an MLP of width F and L layers: L·(2N·(4D² + 2DF) + 4N²D), plus 2N·3p²·D for
        embedding patches of p² pixels. The pooling head and the projector are counted the same way.
        """
        c = self.config
        D, F, N = c.hidden_size, c.intermediate_size, (tile[0] // c.patch_size) * (tile[1] // c.patch_size)
        total = c.num_hidden_layers * (2 * N * (4 * D * D + 2 * D * F) + 4 * N * N * D)
        total += 2 * N * c.num_channels * c.patch_size**2 * D
        if self.kind == "pooled":
            total += 4 * N * D * D + 4 * D * D + 4 * N * D + 4 * D * F
        if self.kind == "visual-tokens":
            q, W = self.model.projector.config.num_queries, self.width
            total += 2 * N * D * W + 4 * N * W * W + 4 * q * N * W + 6 * q * W * W
        return float(total)


class TextEncoder:
    """Text encoder of a SigLIP, into the embedding space of its images.

    Args:
        folder: the checkpoint, for its tokenizer.
        model: the model loaded from it.

    Raises:
        CheckpointError: if there is no text tower, or no tokenizer.
    """

    EOS = 1  # end-of-text token, also used as padding

    def __init__(self, folder: str | Path, model: SigLIP):
        import sentencepiece  # a dependency of mlx-lm

        if "text_tower" not in model:
            raise CheckpointError(f"{folder}: has no text tower; use a checkpoint of a whole SigLIP")
        path = Path(folder) / SENTENCEPIECE
        if not path.is_file():
            raise CheckpointError(f"{folder}: has no {SENTENCEPIECE}; copy it from the repository of the weights")
        try:
            check_file(path)
            self._pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as e:
            raise CheckpointError(f"{path}: damaged ({one_line(e)}); download it again") from e
        size = model.text_tower.config.vocab_size
        if self._pieces.get_piece_size() > size:
            raise CheckpointError(f"{path}: has {self._pieces.get_piece_size()} pieces, but the model {size}")
        self.model = model

    @staticmethod
    def canonicalize(text: str) -> str:
        """Lower-case a text, and strip punctuation and extra whitespace, as in SigLIP's training."""
        return " ".join(text.lower().translate(str.maketrans("", "", string.punctuation)).split())

    def tokenize(self, texts: Sequence[str]) -> np.ndarray:
        """Token ids, int32 (n, max_position_embeddings), truncated or padded to that length as in training."""
        length = self.model.text_tower.config.max_position_embeddings
        ids = np.full((len(texts), length), self.EOS, np.int32)
        for row, text in zip(ids, texts, strict=True):
            found = self._pieces.encode(self.canonicalize(text))[: length - 1]
            row[: len(found)] = found
        return ids

    def encode(self, texts: Sequence[str]) -> mx.array:
        """Text embeddings (n, projection_size), not normalised."""
        return self.model.text_tower(mx.array(self.tokenize(texts)))


def load_encoder(
    path_or_hf_repo: str | Path,
    kind: str | None = None,
    dtype: mx.Dtype | None = None,
    draft: bool = False,
    revision: str | None = None,
) -> ImageEncoder:
    """Load the image encoder of a checkpoint, downloaded if necessary; llama3v: only tower and projector are read.

    Args:
        path_or_hf_repo: a folder, or a Hub repository such as google/siglip-so400m-patch14-384.
        kind: see `ImageEncoder`; by default "pooled" if the tower has a pooling head, else "patch".
        dtype: compute dtype; by default float32 on a CPU, otherwise float16.
        draft: see `ImageEncoder`; only for Google's checkpoints.

    Raises:
        CheckpointError: if there is no such checkpoint, or it is damaged or of another model.
        ValueError: if the checkpoint has no features of this kind.
    """
    folder = find_checkpoint(path_or_hf_repo, revision)
    name = name_of(path_or_hf_repo)
    if dtype is None:
        dtype = mx.float16 if on_gpu() else mx.float32
    if read_json(folder / CONFIG).get("model_type") in SIGLIP_TYPES:
        model, resample = load_siglip(folder, dtype)
        kind = kind or ("pooled" if model.vision_tower.config.vision_use_head else "patch")
        if kind == "visual-tokens":
            raise ValueError(f"{path_or_hf_repo}: has no projector, so no visual tokens; use --kind pooled or patch")
        if kind == "pooled" and not model.vision_tower.config.vision_use_head:
            raise ValueError(f"{path_or_hf_repo}: has no pooling head; use --kind patch")
        return ImageEncoder(name, model, kind, None, resample, draft)
    if kind == "pooled":
        raise ValueError(
            f"{path_or_hf_repo}: is a Llama3-V, whose tower has no pooled embeddings to search; give a SigLIP, such as "
            "google/siglip-so400m-patch14-384 (or embed with --kind patch or visual-tokens)"
        )
    from ..loading import load_model  # brings mlx-lm, which a SigLIP does not need and takes a second to import

    config = read_config(folder)
    if draft:
        raise ValueError(f"{path_or_hf_repo}: slices are cut from the whole image, so --draft cannot be used")
    model = load_model(folder, config, dtype, lazy=True)
    mx.eval(model.vision_tower.parameters(), model.projector.parameters())
    kind = kind or "patch"
    return ImageEncoder(name, model, kind, ImageConfig(**config["image_config"]))


def load_encoder_of(store: FeatureStore) -> tuple[ImageEncoder, Path]:
    """Load the encoder that a store was made with; return it with the folder of its checkpoint.

    Raises:
        FeatureError: if the checkpoint has changed since.
        CheckpointError: if it no longer exists, or has no such features.
    """
    info = store.info
    try:
        encoder = load_encoder(info.model, info.kind, getattr(mx, info.compute_dtype), info.draft)
    except ValueError as e:
        raise CheckpointError(f"{store.folder}: the model of this store cannot be loaded: {e}") from e
    if encoder.fingerprint() != info.fingerprint:
        raise FeatureError(f"{store.folder}: {info.model} has changed since the store was made; embed again")
    return encoder, find_checkpoint(info.model)


def vision_config(folder: Path) -> VisionConfig:
    """Read the vision tower's config from one of Google's checkpoints.

    Raises:
        CheckpointError: if it is another model.
    """
    config = read_json(folder / CONFIG)
    if config.get("model_type") not in SIGLIP_TYPES:
        raise CheckpointError(f"{folder / CONFIG}: model_type is {config.get('model_type')!r}, not SigLIP's")
    where = f"{folder / CONFIG}: vision_config"
    given = check_fields(where, config.get("vision_config", config), VISION)
    check_heads(where, {**_BASE_VISION, **given})
    try:
        return VisionConfig.from_dict({**_BASE_VISION, **given, "model_type": "siglip_vision_model"})
    except ValueError as e:
        raise CheckpointError(f"{folder / CONFIG}: {e}") from e


def load_siglip(folder: Path, dtype: mx.Dtype) -> tuple[SigLIP, Image.Resampling]:
    """Load Google's two towers (or the vision tower alone), and the resampling filter of its images.

    Raises:
        CheckpointError: if tensors are missing, unknown or of the wrong shape, or the preprocessing is not supported.
    """
    vision, text = vision_config(folder), read_json(folder / CONFIG).get("text_config")
    if text is not None:
        where = f"{folder / CONFIG}: text_config"
        text = check_fields(where, text, SIGLIP_TEXT)
        check_heads(where, {**vars(TextConfig()), **text})
    try:
        model = SigLIP(vision, None if text is None else TextConfig.from_dict(text))
    except (ValueError, ArithmeticError) as e:
        raise CheckpointError(f"{folder / CONFIG}: {e}") from e
    tensors = {}
    for name, tensor in read_tensors(folder).items():
        if not name.endswith("position_ids"):
            tensors.update(lay_out(name, tensor))
    check_tensors(folder, model, tensors)
    model.load_weights(list(tensors.items()))
    model.set_dtype(dtype)
    model.eval()
    mx.eval(model.parameters())

    path = folder / PREPROCESSOR
    images = read_json(path) if os.path.lexists(path) else {}
    if not images and (folder / PROCESSOR).exists():  # transformers 5 saves it there
        path = folder / PROCESSOR
        images = check_object(f"{path}: image_processor", read_json(path).get("image_processor") or {})
    half = [0.5] * 3
    side = model.vision_tower.config.image_size
    size = images.get("size", {"height": side, "width": side})
    if images.get("image_mean", half) != half or images.get("image_std", half) != half:
        raise CheckpointError(f"{path}: image_mean and image_std are not SigLIP's 0.5")
    if size != {"height": side, "width": side}:
        raise CheckpointError(f"{path}: size {size} is not the tower's {side} pixels")
    resample = images.get("resample", Image.Resampling.BICUBIC.value)
    Choice(tuple(filter.value for filter in Image.Resampling)).check(f"{path}: resample", resample)
    return model, Image.Resampling(resample)


def published_tensors(model: SigLIP) -> dict[str, mx.array]:
    """Convert a SigLIP's weights to the names and layouts published by Google, as read by `load_siglip`."""
    tensors = {}
    for name, tensor in tree_flatten(model.parameters()):
        name = name.replace("vision_tower.", "vision_model.").replace("text_tower.", "text_model.")
        tensor = tensor.transpose(0, 3, 1, 2) if tensor.ndim == 4 else tensor
        tensors[name.replace(".in_proj.", ".in_proj_")] = mx.contiguous(tensor)
    return tensors
