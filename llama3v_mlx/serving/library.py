"""The library of a server: searches by text and image, and its pictures as JPEGs, by id.

An id is the SHA-256 of a picture's file. Only what the index has of files in the folder is served, while they are
unchanged, and only as pixels: no metadata leaves the machine's disk, and no path is ever taken from a request.
"""

import contextlib
import io
import os
import re
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from ..cli import CACHE
from ..features.grammar import Filters, QueryError, Term, parse_query
from ..features.library import Library
from ..features.query import combine, match_probability
from ..features.sources import encode_path, file_of
from ..features.store import FeatureError
from ..files import find_path, printable
from ..image import ImageError, ImageSource, expand, image_sha256, load_image
from ..tiling import ImageConfig
from .checks import RequestError, bad
from .embeddings import Embedder
from .indexer import Indexer
from .requests import LibrarySearchRequest, Limits
from .thumbnails import Thumbnails

SIDE = {"thumbnail": 320, "image": 2048}  # most pixels
QUALITY = {"thumbnail": 80, "image": 90}
THUMBNAIL_BYTES = 256 * 10**6  # on disk
UPDATE_SECONDS = 600.0  # after which a search starts an update


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Raise the errors of an index as a RequestError."""
    try:
        yield
    except (FeatureError, OSError) as e:
        raise RequestError(503, f"the library's index cannot be used: {printable(str(e))}", "library_error") from e


class ServedLibrary:
    """A folder of pictures, its index, and the updates of it. Methods may be called from any thread.

    Args:
        folder: the folder.
        index: folder of the index, by default one in the cache; see `Library`.
        embedder: computes the embeddings of queries.

    Raises:
        ValueError: if the folder does not exist.
        CheckpointError: if the model has no text tower.
        FeatureError: if the index is that of another model, or damaged.
    """

    def __init__(self, folder: str | Path, index: str | Path | None, embedder: Embedder):
        if isinstance(embedder.texts, Exception):
            raise embedder.texts
        self.library = Library(folder, embedder.model, index, embedder.encoder)
        self.name = printable(os.path.basename(self.library.folder) or self.library.folder)
        self.indexer = Indexer(self.library.folder, embedder.model, os.path.abspath(self.library.index))
        self._embedder = embedder
        self._probability = match_probability(embedder.encoder.model)
        self._thumbnails = Thumbnails(CACHE / "thumbnails", THUMBNAIL_BYTES)
        self._ranking = threading.Lock()
        self._decoding = threading.Lock()  # one large picture in memory at a time; chats have a lock of their own

    def status(self) -> dict:
        """Return the state of the library and of its updates.

        Raises:
            RequestError: if the index cannot be read.
        """
        with _explained():
            pictures, broken = self.library.counts()
        indexer = self.indexer
        progress = indexer.progress
        error = indexer.error
        if not os.path.isdir(self.library.folder):
            error = "the folder does not exist at the moment"
        return {
            "object": "library",
            "name": self.name,
            "pictures": pictures,
            "broken": broken,
            "updating": indexer.running,
            "progress": progress and {"read": progress[0], "total": progress[1]},
            "changes": indexer.changes,
            "notes": list(map(printable, indexer.notes)),
            "error": error and printable(error),
        }

    def search(self, request: LibrarySearchRequest, limits: Limits, timeout: float) -> list[dict]:
        """Return the pictures that match best, best first.

        Raises:
            RequestError: if the query cannot be understood, or the folder no longer exists.
        """
        terms = self._terms(request)
        filters = Filters(request.after, request.before, self._subfolder(request.folder))
        if not os.path.isdir(self.library.folder):
            raise RequestError(503, f"the folder {self.name} does not exist at the moment", "library_gone")
        if self.indexer.ended is not None and time.monotonic() - self.indexer.ended > UPDATE_SECONDS:
            self.indexer.start()
        rows, _ = self._embedder.embed([term.image or term.text for term in terms], limits, timeout, "image")
        try:
            query = combine(terms, rows)
        except QueryError as e:
            raise bad("query", str(e)) from e
        with self._ranking, _explained():
            found = self.library.rank(query, request.top, filters)
        is_text = len(terms) == 1 and terms[0].text is not None
        return [
            {
                "id": match.sha256.hex(),
                "name": printable(os.path.relpath(match.path, self.library.folder)),
                "cosine": match.cosine,
                "probability": self._probability(match.cosine) if is_text else None,
                **self._facts(match.sha256, match.path),
            }
            for match in found
            if self._is_inside(match.path)
        ]

    def jpeg(self, kind: str, id: str) -> bytes:
        """Return a picture, upright and at most `SIDE[kind]` pixels wide and high.

        Raises:
            RequestError: if the library has no such picture now.
        """
        path = None
        if re.fullmatch(r"[0-9a-f]{64}", id):
            with _explained():
                path = next(filter(self._is_inside, self.library.current(bytes.fromhex(id))), None)
        if path is None:
            raise RequestError(404, "the library has no such picture, or its file has changed", "no_picture")
        if kind == "thumbnail":
            return self._thumbnails.get(id, lambda: self._encode(kind, id, path))
        return self._encode(kind, id, path)

    def _encode(self, kind: str, id: str, path: str) -> bytes:
        size = SIDE[kind], SIDE[kind]
        try:
            source = _source(path)
            if image_sha256(source, self.library.encoder.tiling).hex() != id:
                raise ImageError("changed while it was read")
            with self._decoding:
                image = load_image(source, draft=size, config=ImageConfig(SIDE[kind], max_slice_nums=1))
                image.thumbnail(size)
            file = io.BytesIO()
            image.save(file, "JPEG", quality=QUALITY[kind])
        except (OSError, ImageError) as e:
            raise RequestError(404, "the picture's file cannot be read", "no_picture") from e
        return file.getvalue()

    def _terms(self, request: LibrarySearchRequest) -> list[Term]:
        """Terms of a query, whose images are data: URIs."""
        query = (request.query or "").strip()
        try:
            terms = parse_query(query, lambda _: None) if query else []  # no text names a file of this machine
        except QueryError as e:
            raise bad("query", str(e)) from e
        if request.image is not None:
            if request.image[:5].lower() != "data:":
                raise bad("image", "must be a data: URI", "invalid_image")
            terms.append(Term(None, request.image))
        if not terms:
            raise bad("query", "is missing, and so is image", "missing_field")
        return terms

    def _subfolder(self, name: str | None) -> str | None:
        if name is None:
            return None
        folder = os.path.normpath(os.path.join(self.library.folder, name))
        if os.path.isabs(name) or os.path.commonpath([folder, self.library.folder]) != self.library.folder:
            raise bad("folder", "must be a folder in the library, relative to it")
        return os.fspath(find_path(folder))

    def _is_inside(self, path: str) -> bool:
        """Return True if a file is in the folder, and not a link out of it."""
        folder = self.library.folder
        return os.path.commonpath([os.path.realpath(file_of(path)), folder]) == folder

    def _facts(self, sha256: bytes, path: str) -> dict:
        """Local date, bytes of the file, and pixels: of a picture its own, of a page those it is shown with."""
        # All columns: an index on a read-only disk may lack the last ones.
        query = "SELECT * FROM files WHERE sha256 = ? AND path = ? ORDER BY id DESC LIMIT 1"
        found = self.library.store.database.rows(query, (sha256, encode_path(path)))
        if not found:  # an update has just removed it
            return dict.fromkeys(("date", "bytes", "width", "height"))
        _, _, _, size, mtime, _, _, taken, *pixels = found[0]
        is_sized = len(pixels) == 2 and all(isinstance(side, int) and side > 0 for side in pixels)
        width, height = pixels if is_sized else (None, None)
        if is_sized and file_of(path) != path:
            width, height = (max(1, round(side * SIDE["image"] / max(pixels))) for side in pixels)
        date = None
        with contextlib.suppress(ValueError, OverflowError, OSError):
            date = datetime.fromtimestamp(mtime / 1e9) if taken is None else datetime.fromtimestamp(taken, UTC)
        return {
            "date": date and date.strftime("%Y-%m-%dT%H:%M:%S"),
            "bytes": size,
            "width": width,
            "height": height,
        }


def _source(path: str) -> ImageSource:
    """Return the bytes of a picture, or the page of a PDF."""
    if file_of(path) == path:
        return Path(path).read_bytes()
    (page,) = expand(path)
    return page
