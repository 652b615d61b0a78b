"""Broken images and PDFs of every format that is read, and files in image folders that are no images."""

import importlib
import io
import os
import random
import socket
import struct
from collections.abc import Callable
from pathlib import Path

from .harness import RESIDENT, Task, command, complaint, run_batch, run_child
from .material import QUESTION, Material
from .mutate import mutate_bytes

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "AVIF", "HEIF", "JPEG2000", "TGA", "PDF")
SUFFIXES = {"JPEG": "jpg", "TIFF": "tif", "HEIF": "heic", "JPEG2000": "jp2"}
NUMBERS = (0, 1, 2, 255, 256, 65535, 32767, 9000, 10**5, 2**31 - 1, 2**31, 2**32 - 1, 89_000_000)
COMMANDS = ("images:folder", "images:list", "images:generate", "images:chat")
BATCHED = dict.fromkeys((f"images:{name}" for name in FORMATS), 50)  # cases per child
KINDS = (*BATCHED, *COMMANDS)


def make_images(folder: Path) -> None:
    """Write several images of each format, in many modes and compressions, with EXIF and ICC data where possible."""
    from PIL import Image, ImageCms

    from llama3v_mlx.image import _register_heif

    _register_heif()
    base = Image.effect_mandelbrot((70, 50), (-3, -2.5, 2, 2.5), 9).convert("RGB")
    exif = Image.Exif()
    exif[274], exif[270] = 6, "a description"
    extra = {"exif": exif.tobytes(), "icc_profile": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()}
    wanted: dict[str, list[tuple[str, dict]]] = {
        "JPEG": [
            ("RGB", extra),
            ("L", {}),
            ("CMYK", extra),
            ("RGB", {"progressive": True}),
            ("RGB", {"subsampling": 2}),
        ],
        "PNG": [(mode, extra) for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "I;16")],
        "GIF": [("P", {"save_all": True, "append_images": [base.rotate(90)]}), ("L", {}), ("P", {"transparency": 1})],
        "BMP": [("RGB", {}), ("L", {}), ("P", {}), ("1", {}), ("RGBA", {})],
        "PPM": [("RGB", {}), ("L", {}), ("1", {}), ("I;16", {}), ("F", {})],
        "WEBP": [("RGB", extra), ("RGBA", {"lossless": True}), ("RGB", {"save_all": True, "append_images": [base]})],
        "TIFF": [
            (m, {"compression": c}) for m in ("RGB", "CMYK", "1") for c in ("raw", "tiff_lzw", "tiff_adobe_deflate")
        ]
        + [("F", {}), ("I;16", {}), ("LA", {}), ("LAB", {}), ("RGB", {"compression": "jpeg"}), ("RGB", extra)],
        "AVIF": [("RGB", extra), ("RGBA", {})],
        "HEIF": [("RGB", extra), ("RGBA", {}), ("L", {})],
        "JPEG2000": [("RGB", {}), ("RGBA", {"irreversible": True}), ("L", {}), ("I;16", {})],
        "TGA": [("RGB", {}), ("RGBA", {"compression": "tga_rle"}), ("L", {}), ("P", {})],
        "PDF": [("RGB", {}), ("1", {}), ("RGB", {"save_all": True, "append_images": [base, base]})],
    }
    for kind, variants in wanted.items():
        (folder / kind).mkdir(parents=True)
        for i, (mode, options) in enumerate(variants):
            image = base.convert("L").convert(mode) if mode in ("I;16", "F") else _convert(base, mode)
            image.save(folder / kind / f"{i}.{SUFFIXES.get(kind, kind.lower())}", kind, **options)


def _convert(base, mode: str):
    from PIL import ImageCms

    if mode != "LAB":
        return base.convert(mode)
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    return ImageCms.applyTransform(base, ImageCms.buildTransform(*profiles, "RGB", "LAB"))


def mutate_image(rng: random.Random, data: bytes) -> bytes:
    """Change bytes, or numbers among the first bytes, where formats keep sizes and counts."""
    if rng.random() < 0.5:
        return mutate_bytes(rng, data)
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        kind = rng.choice(("<H", ">H", "<I", ">I"))
        size = struct.calcsize(kind)
        at = rng.randrange(max(1, min(len(changed) - size, rng.choice((32, 200, len(changed))))))
        changed[at : at + size] = struct.pack(kind, rng.choice(NUMBERS) % 256**size)
    return bytes(changed)


def case(kind: str, number: int, material: Material, place: Path) -> tuple[str, str | None]:
    """Run a command on odd files, or files that are no images; see `checkpoints.cases`."""
    return _command_case(kind, random.Random(f"{kind} {number}"), material, place)


def cases(kind: str, numbers: range, material: Material, place: Path) -> list[tuple[str, str | None]]:
    """Mutate an image for each number, and cut it into tiles; in one child, because a fork costs ten times an image."""
    paths = []
    for number in numbers:
        rng = random.Random(f"{kind} {number}")
        source = rng.choice(sorted((material / "formats" / kind.partition(":")[2]).iterdir()))
        paths.append(place / f"{number}-{source.name}")
        paths[-1].write_bytes(mutate_image(rng, source.read_bytes()))
    ended = run_batch([Task(_tile(path), place) for path in paths], place)
    return [(p.name, complaint(e, (str(p),), resident=2 * RESIDENT)) for p, e in zip(paths, ended, strict=True)]


def _tile(path: Path) -> Callable[[], None]:
    def look() -> None:
        from llama3v_mlx.image import expand, image_sha256, image_size, tile_image
        from llama3v_mlx.tiling import ImageConfig

        config = ImageConfig(scale_resolution=56)  # small tiles, because decoding is to be tried, not resizing
        for page in expand(path)[:3]:
            tiled = tile_image(page, config)
            assert all(t.shape[2] == 3 and t.shape[0] % 14 == 0 for t in tiled.tiles), "tiles of a wrong size"
            image_sha256(page, config=config)
            image_size(page, config=config)

    return lambda: importlib.import_module("llama3v_mlx.cli").run(look)


def odd_file(rng: random.Random, material: Material, folder: Path, outside: Path) -> bytes:
    """Make one file that is hard to read or to print in a folder; return its name."""
    suffix = rng.choice((b".png", b".jpg", b".tif", b".pdf", b".tar", b".PNG"))
    stem = rng.choice((b"a", b"new\nline", b"\xff\xfe", b"\x1b[2J\x1b]0;title\x07", b"cr\rover", "\u202egnp".encode()))
    name = stem + str(rng.randrange(10**9)).encode() + suffix
    path = os.fsencode(folder) + b"/" + name
    good = rng.choice(sorted((material / "formats" / "PNG").iterdir())).read_bytes()
    match rng.randrange(10):
        case 0:
            os.mkfifo(path)
        case 1:
            os.symlink(rng.choice((b"/dev/zero", b"/dev/random", b"/dev/tty", b"/dev/full", b"/proc/self/mem")), path)
        case 2:
            os.symlink(name, path)
        case 3:
            os.symlink(b"..", path)
        case 4:
            os.mkdir(path)
        case 5:
            with socket.socket(socket.AF_UNIX) as unix:
                here = os.getcwd()
                os.chdir(folder)  # names of sockets are short
                unix.bind(name)
                os.chdir(here)
        case 6:
            os.symlink(rng.choice((b"nowhere", b"/proc/self/environ", b"/proc/kmsg", b"/sys/kernel/notes")), path)
        case 7:
            Path(os.fsdecode(path)).write_bytes(mutate_image(rng, good))
        case 8:
            Path(os.fsdecode(path)).write_bytes(b"")
        case _:
            Path(os.fsdecode(path)).write_bytes(good)
    return name


def _command_case(kind: str, rng: random.Random, material: Material, place: Path) -> tuple[str, str | None]:
    folder, outside = place / "images", place / "outside"
    folder.mkdir()
    outside.mkdir()
    names = [odd_file(rng, material, folder, outside) for _ in range(rng.randrange(1, 5))]
    path = os.fsdecode(os.path.join(os.fsencode(folder), names[0]))
    if kind == "images:generate":
        ended = run_child(command("generate", "--model", material / "mlx", "--image", path, *QUESTION), place)
        return repr(names[0]), complaint(ended)
    if kind == "images:chat":
        action = command("chat", "--model", material / "mlx", "--max-tokens", 2, "--temp", 0, "--force")
        ended = run_child(action, place, os.fsencode(f"/image '{path}'\n/images\nWhat?\n"))
        return repr(names[0]), complaint(ended) if ended.errors.count("error: ") < 2 else None
    given: list[str] = [str(folder)]
    if kind == "images:list":
        given = [str(_listing(rng, material, place, names))]
    action = command("embed", *given, "--model", material / "siglip", "--out", place / "store", "--batch-size", 4)
    ended = run_child(action, place)
    problem = complaint(ended)
    listed = "failed: " in ended.errors and "error: " not in ended.errors.replace("failed: ", "")
    if problem and problem.startswith("exit status 1, 0 error lines") and listed:
        problem = None  # bad images are listed, the others embedded
    return ", ".join(map(repr, names)), problem


def _listing(rng: random.Random, material: Material, place: Path, names: list[bytes]) -> Path:
    """Write a list or an archive of images, broken at times."""
    import json
    import tarfile

    kind = rng.choice(("txt", "jsonl", "tar"))
    path = place / f"list.{kind}"
    if kind == "tar":
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=rng.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT))) as tar:
            tar.add(material / "images", "images")
            for name in names:
                odd = tarfile.TarInfo(rng.choice(("../../x.png", "/etc/x.png", "\x1b[2J.png", "a\nb.png")))
                odd.type = rng.choice(
                    (tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE)
                )
                odd.linkname = os.fsdecode(name)
                tar.addfile(odd)
        data = buffer.getvalue()
    else:
        lines = [os.path.join(b"images", name) for name in names] + [str(material / "images" / "a.png").encode()]
        if kind == "jsonl":
            lines = [json.dumps({"path": line.decode(errors="surrogateescape")}).encode() for line in lines]
        data = b"\n".join(lines) + b"\n"
    path.write_bytes(mutate_bytes(rng, data) if rng.random() < 0.6 else data)
    return path
