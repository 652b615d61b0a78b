"""The embed command on real files: stored and skipped files, failures and interruption."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from itertools import islice
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import odd_character, tolerance
from PIL import Image

from llama3v_mlx import device
from llama3v_mlx.demo import CHECKPOINT, IMAGES, SIGLIP
from llama3v_mlx.embed import best_batch_size, main, note_parts, table
from llama3v_mlx.features.encoder import load_encoder
from llama3v_mlx.features.pipeline import Pipeline
from llama3v_mlx.features.repair import verify
from llama3v_mlx.features.sources import count_sources, find_sources
from llama3v_mlx.features.store import FeatureStore
from llama3v_mlx.features.writer import FeatureWriter
from llama3v_mlx.image import tile_image


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Nine pictures of several sizes in two folders, two of them identical, and files that are not pictures."""
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    for i in range(8):
        pixels = np.random.default_rng(i).integers(0, 256, (40 + 30 * i, 200 - 10 * i, 3), dtype=np.uint8)
        name = f"sub/{i}.jpg" if i % 3 == 0 else f"{i}.png"
        Image.fromarray(pixels).save(folder / name)
    shutil.copy(folder / "1.png", folder / "twin.png")
    (folder / "notes.md").write_text("not an image, and not called one")
    return folder


def figures(capsys, *args: str | Path) -> dict:
    main([*map(str, args), "--json", "--batch-size", "4"])
    return json.loads(capsys.readouterr().out)


def test_sources_are_counted_without_reading(photos: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "some.tar", "w") as archive:
        archive.add(photos, "photos")
    (tmp_path / "list.txt").write_text("photos/1.png\n\nphotos/none.png\n")
    paths = [str(tmp_path / name) for name in ("photos", "some.tar", "list.txt", "gone", "photos/1.png")]
    assert count_sources(paths) == 9 + 9 + 2 + 0 + 1
    assert count_sources([str(photos / "[12].png"), str(tmp_path / "**" / "1.png")]) == 2 + 1


@pytest.mark.parametrize("kind", ["patch", "visual-tokens"])
def test_slices_of_a_llama3v_checkpoint(photos: Path, tmp_path: Path, capsys, demo, kind: str) -> None:
    args = ("--model", CHECKPOINT, "--kind", kind, "--store-dtype", "float32")
    found = figures(capsys, photos, "--out", tmp_path / "store", *args)
    assert (found["new"], found["known"], found["failed"], found["rows"]) == (8, 1, 0, 8)

    store, model = FeatureStore(tmp_path / "store"), demo[0]
    tower, config = model.vision_tower, demo[1].image_config
    names = dict(store.names())
    assert len(list(store.names())) == 9
    for sha256, features in store:
        image = tile_image(names[sha256], config)
        tiles = [tower(mx.array(tile[None]).astype(mx.uint8))[0].astype(mx.float32) for tile in image.tiles]
        if kind == "visual-tokens":
            tiles = [model.encode_image([image])[0]]
        expected = np.array(mx.concatenate(tiles))
        # Batches of another size sum in another order.
        np.testing.assert_allclose(np.array(features.rows), expected, atol=2e-4 * np.abs(expected).max())
        assert features.grid == image.grid


def test_siglip_pooled(photos: Path, tmp_path: Path, capsys, siglip: Path) -> None:
    found = figures(capsys, photos, "--out", tmp_path / "store", "--model", siglip, "--store-dtype", "float32")
    assert (found["kind"], found["new"]) == ("pooled", 8)
    encoder, store = load_encoder(siglip, dtype=mx.float32), FeatureStore(tmp_path / "store")
    dtype = getattr(mx, store.info.compute_dtype)
    for sha256, name in store.names():
        pixels = np.asarray(Image.open(name).convert("RGB").resize((56, 56), Image.Resampling.BICUBIC))
        tower = encoder.model.vision_tower
        expected = np.array(tower.pool(tower(mx.array(pixels[None]))))
        found = np.array(store.get(sha256).rows)
        np.testing.assert_allclose(found, expected, atol=tolerance(dtype, np.abs(expected).max()))


def test_what_is_known_is_not_computed_again(photos: Path, tmp_path: Path, capsys, siglip: Path) -> None:
    common = ("--out", tmp_path / "store", "--model", siglip)
    assert figures(capsys, photos, *common, "--limit", "3")["new"] == 3
    assert figures(capsys, photos, *common)["new"] == 5
    shutil.move(photos, tmp_path / "elsewhere")
    found = figures(capsys, tmp_path / "elsewhere", *common)
    assert (found["new"], found["known"], found["rows"]) == (0, 9, 8)
    main([*map(str, (tmp_path / "elsewhere", *common))])
    known, skipped = capsys.readouterr().out.splitlines()  # nothing was measured, and no speeds are printed
    assert known == f"0 images embedded, 9 already stored, 0 failed; {tmp_path / 'store'} has 8"


def test_lists_and_archives(photos: Path, tmp_path: Path, capsys, siglip: Path) -> None:
    (tmp_path / "list.txt").write_text("photos/1.png\n\nphotos/sub/0.jpg\n")
    lines = [{"path": "photos/2.png"}, {"image": ["photos/4.png", "photos/5.png"]}]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        archive.add(photos / "7.png", "0001.png")
        archive.add(photos / "notes.md", "0001.txt")
    paths = [tmp_path / "list.txt", tmp_path / "list.jsonl", tmp_path / "shard.tar"]
    assert figures(capsys, *paths, "--out", tmp_path / "store", "--model", siglip)["new"] == 6
    assert str(tmp_path / "shard.tar/0001.png") in dict(FeatureStore(tmp_path / "store").names()).values()


def test_export(photos: Path, tmp_path: Path, capsys, siglip: Path) -> None:
    main([str(photos), "--out", str(tmp_path / "store"), "--model", str(siglip), "--export", str(tmp_path / "export")])
    rows = np.load(tmp_path / "export" / "embeddings.npy")
    index = [json.loads(line) for line in (tmp_path / "export" / "index.jsonl").read_text().splitlines()]
    store = FeatureStore(tmp_path / "store")
    assert rows.shape == (8, 32) and rows.dtype == np.float32
    for entry in index:
        stored = store.get(bytes.fromhex(entry["sha256"])).rows.astype(mx.float32)
        np.testing.assert_array_equal(rows[entry["row"]], np.array(stored)[0])
        assert Path(entry["path"]).exists()
    (twins,) = (entry["paths"] for entry in index if "paths" in entry)
    assert sorted(Path(path).name for path in twins) == ["1.png", "twin.png"]


def test_two_exports_at_once(photos: Path, tmp_path: Path, siglip: Path, monkeypatch, capsys) -> None:
    """The second writes while the first does, and neither takes the other's half file for its own."""
    args = ["--out", str(tmp_path / "store"), "--export", str(tmp_path / "export")]
    main([str(photos), *args, "--model", str(siglip), "--batch-size", "8"])
    wanted = [(tmp_path / "export" / name).read_bytes() for name in ("embeddings.npy", "index.jsonl")]
    matrix = FeatureStore.matrix

    def interrupted(store: FeatureStore):
        yield from islice(matrix(store), 1)
        monkeypatch.setattr(FeatureStore, "matrix", matrix)
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: 1)  # another process's
            main(args)
        yield from islice(matrix(store), 1, None)

    monkeypatch.setattr(FeatureStore, "matrix", interrupted)
    main(args)
    assert [(tmp_path / "export" / name).read_bytes() for name in ("embeddings.npy", "index.jsonl")] == wanted
    assert len(os.listdir(tmp_path / "export")) == 2


def test_a_name_of_a_store_is_printed_harmlessly() -> None:
    figures = dict.fromkeys(("new", "known", "failed", "rows", "images_per_second", "tflops", "batch_size"), 0)
    assert "a\\x1b[2J has 0" in table({**figures, "store": "a\x1b[2J", "stage_seconds": {}, "seconds": 0})


def test_export_to_a_full_disk(tmp_path: Path, photos: Path, siglip: Path, run_main) -> None:
    """Files are limited to 1160 bytes, enough for the matrix but not the index, or to 300, too few for either."""
    store, folder = tmp_path / "store", tmp_path / "export"
    main([str(photos), "--out", str(store), "--model", str(siglip), "--batch-size", "8"])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (1160, 300):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            done = run_main("llama3v_mlx.embed", "--out", store, "--export", folder)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("error: ") and done.stderr.endswith(f"{folder}: File too large\n")
        assert not folder.exists()


def test_bad_images_are_listed_and_the_rest_goes_on(photos: Path, tmp_path: Path, capsys, siglip: Path) -> None:
    (photos / "empty.png").write_bytes(b"")
    (photos / "cut.png").write_bytes((photos / "7.png").read_bytes()[:500])
    with pytest.raises(SystemExit) as end:
        figures(capsys, photos, photos / "gone.txt" / "x.jpg", "--out", tmp_path / "store", "--model", siglip)
    assert end.value.code == 1
    with pytest.raises(SystemExit) as end:
        figures(capsys, photos, "--out", tmp_path / "store", "--model", siglip)
    assert end.value.code == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["failed"] == 2
    assert "empty.png: the file is empty" in captured.err and "cut.png: the image is damaged" in captured.err
    assert len(FeatureStore(tmp_path / "store")) == 8


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: (f / "none").mkdir(), "none: no images found"),
        (lambda f: (f / "none").write_bytes(b""), "the file is empty"),
        (lambda f: None, "none: no such file or folder"),
    ],
)
def test_nothing_to_embed(tmp_path: Path, capsys, siglip: Path, make, message: str) -> None:
    make(tmp_path)
    with pytest.raises(SystemExit) as end:
        main([str(tmp_path / "none"), "--out", str(tmp_path / "store"), "--model", str(siglip)])
    assert end.value.code == 1
    assert message in capsys.readouterr().err


def test_no_images_no_store(tmp_path: Path, capsys) -> None:
    for name in ("empty", "none"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(SystemExit):
            main([str(tmp_path / name), "--out", str(tmp_path / "store"), "--export", str(tmp_path / "export")])
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {tmp_path / name}: no ")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


@pytest.mark.parametrize("command", ["export", "verify"])
@pytest.mark.parametrize("store", ["none", "empty", "file"])
def test_no_store_to_export_or_verify(tmp_path: Path, run_main, command: str, store: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("something else")
    folder = tmp_path / store
    args = ["--out", folder, "--export", tmp_path / "export"] if command == "export" else ["--verify", folder]
    done = run_main("llama3v_mlx.embed", *args)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {folder}: not a feature store")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file"]


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["--out", "store"],
        ["--export", "export"],
        ["photos"],
        ["photos", "--out", "store", "--limit", "0"],
        ["photos", "--out", "store", "--workers", "0"],
        ["photos", "--verify", "store"],
        ["--out", "store", "--verify", "store"],
    ],
)
def test_usage(args: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as end:
        main(args)
    assert end.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("llama3v embed: error: ")


@pytest.mark.parametrize(
    "found",
    [
        b"",
        b'{"cpu2/mlx',
        b"\xff\xfe\x00",
        b"7",
        b"[1, 2]",
        b"[" * 100_000,
        "8",
        None,
        True,
        -4,
        0,
        3,
        10**9,
        8.0,
        {"size": 8},
    ],
)
def test_damaged_batch_sizes_are_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, siglip: Path, found
) -> None:
    """The whole file is damaged, or only the value for this device and model."""
    path = tmp_path / "cache" / "batch_sizes.json"
    monkeypatch.setattr("llama3v_mlx.embed.BATCH_SIZES_FILE", path)
    monkeypatch.setattr("llama3v_mlx.embed.BATCH_SIZES", (2,))
    encoder = load_encoder(siglip)
    assert best_batch_size(encoder) == 2
    right = path.read_bytes()
    (key,) = json.loads(right)
    path.write_bytes(found if isinstance(found, bytes) else json.dumps({key: found}).encode())
    assert best_batch_size(encoder) == 2
    assert path.read_bytes() == right and [p.name for p in path.parent.iterdir()] == [path.name]


def test_batch_sizes_that_cannot_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, siglip: Path) -> None:
    """The file's path is a folder, or its parent is a file."""
    monkeypatch.setattr("llama3v_mlx.embed.BATCH_SIZES", (2,))
    encoder = load_encoder(siglip)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "folder", tmp_path / "file" / "batch_sizes.json"):
        monkeypatch.setattr("llama3v_mlx.embed.BATCH_SIZES_FILE", path)
        assert best_batch_size(encoder) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_an_archive_cut_short(photos: Path, tmp_path: Path, capsys, siglip: Path) -> None:
    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        for name in ("1.png", "2.png", "7.png"):
            archive.add(photos / name, name)
    data = (tmp_path / "shard.tar").read_bytes()
    (tmp_path / "shard.tar").write_bytes(data[: len(data) // 2])
    with pytest.raises(SystemExit):
        main([str(tmp_path / "shard.tar"), "--out", str(tmp_path / "store"), "--model", str(siglip)])
    assert "shard.tar: not a tar archive, or truncated" in capsys.readouterr().err
    assert len(FeatureStore(tmp_path / "store")) >= 1


def test_another_model_is_refused(photos: Path, tmp_path: Path, capsys, siglip: Path) -> None:
    figures(capsys, photos, "--out", tmp_path / "store", "--model", siglip)
    for changes in (["--dtype", "bfloat16"], ["--kind", "patch"], ["--draft"], ["--model", str(CHECKPOINT)]):
        with pytest.raises(SystemExit):
            main([str(photos), "--out", str(tmp_path / "store"), "--model", str(siglip), *changes])
        assert "use another folder" in capsys.readouterr().err
    assert len(FeatureStore(tmp_path / "store")) == 8


def test_draft_is_close(tmp_path: Path, capsys, siglip: Path) -> None:
    picture = Image.open(IMAGES / "two-red-stars.jpg").resize((1600, 1200))
    picture.save(tmp_path / "big.jpg", quality=95)
    exact, draft = (load_encoder(siglip, draft=draft).prepare(tmp_path / "big.jpg").tiles[0] for draft in (False, True))
    assert exact.shape == draft.shape == (56, 56, 3)
    assert not np.array_equal(exact, draft)
    assert np.abs(exact.astype(int) - draft).mean() < 3


def test_two_ranks_share_the_work(photos: Path, tmp_path: Path, siglip: Path, run_ranks) -> None:
    args = ["-m", "llama3v_mlx.embed", photos, "--out", tmp_path / "store", "--model", siglip]
    args += ["--export", tmp_path / "export"]
    first, second = run_ranks(*args, "--json", "--batch-size", "2")
    found = json.loads(first)
    assert second == ""
    assert (found["new"], found["known"], found["rows"]) == (8, 1, 8)
    assert len(list((tmp_path / "store").glob("shard-*.safetensors"))) == 2
    assert len(list(FeatureStore(tmp_path / "store").names())) == 9
    assert np.load(tmp_path / "export" / "embeddings.npy").shape == (8, 32)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_parts_are_merged(photos: Path, tmp_path: Path, capsys, siglip: Path, dtype: str) -> None:
    parts = [tmp_path / "one", tmp_path / "two"]
    options = ("--model", siglip, "--store-dtype", dtype)
    for i, part in enumerate(parts):
        figures(capsys, *sorted(photos.rglob("*.*g"))[i::2], photos / "sub" / "0.jpg", "--out", part, *options)
    for _ in range(2):
        main(["--merge", *map(str, parts), "--out", str(tmp_path / "merged")])
        assert capsys.readouterr().out == f"{tmp_path / 'merged'}: 8 entries\n"
    merged = FeatureStore(tmp_path / "merged")
    for store in map(FeatureStore, parts):
        assert set(store.files_where("1")) <= set(merged.files_where("1"))
        for sha256, features in store:
            assert np.array_equal(np.array(merged.get(sha256).rows), np.array(features.rows))
    size = "SELECT DISTINCT path, width, height FROM files WHERE path LIKE '%/0.%'"
    assert merged.database.rows(size) == FeatureStore(parts[0]).database.rows(size)
    assert verify(tmp_path / "merged").lost == []
    found = figures(capsys, photos, "--out", tmp_path / "merged", *options)
    assert (found["new"], found["known"]) == (0, 9)
    with pytest.raises(SystemExit):
        main(["--merge", str(parts[0]), str(tmp_path / "nowhere"), "--out", str(tmp_path / "new")])
    assert "nowhere: not a feature store" in capsys.readouterr().err
    figures(capsys, photos / "1.png", "--out", tmp_path / "other", "--model", SIGLIP)
    with pytest.raises(SystemExit):
        main(["--merge", str(parts[0]), str(tmp_path / "other"), "--out", str(tmp_path / "new")])
    assert "other: was made with another model" in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_ranks_with_disks_of_their_own_are_told_to_merge(tmp_path: Path, capsys, monkeypatch) -> None:
    class Group:
        size, rank = lambda self: 2, lambda self: 0

    files = [tmp_path / name / "store.json" for name in ("one", "two")]
    for i, file in enumerate(files):
        file.parent.mkdir()
        file.touch()
        os.utime(file, ns=(i, 10**18 + i))
    gathered = []
    monkeypatch.setattr(mx.distributed, "all_gather", lambda x, **_: gathered.append(x) or mx.concatenate(gathered))
    for file in (files[0], files[0]):
        note_parts(Group(), file.parent)
    assert capsys.readouterr().err == ""
    note_parts(Group(), files[1].parent)
    assert "wrote to 2 disks" in capsys.readouterr().err


def test_ctrl_c_keeps_what_was_done(tmp_path: Path, siglip: Path) -> None:
    """Interrupt while some batches are stored and the 13th image blocks, so that the moment is deterministic."""
    (tmp_path / "photos").mkdir()
    for i in range(20):
        Image.new("RGB", (60, 60), (i, 0, 0)).save(tmp_path / "photos" / f"{i:02}.png")
    code = """
import sys
from llama3v_mlx.embed import main
from llama3v_mlx.features.encoder import ImageEncoder
prepare, prepared = ImageEncoder.prepare, []
def prepare_or_wait(self, image):
    prepared.append(image)
    if len(prepared) > 12:
        sys.stdin.read()
    return prepare(self, image)
ImageEncoder.prepare = prepare_or_wait
main(sys.argv[1:])
"""
    args = [sys.executable, "-c", code, tmp_path / "photos", "--out", tmp_path / "store", "--model", siglip]
    args += ["--batch-size", "2", "--workers", "1"]
    process = subprocess.Popen(args, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not ((tmp_path / "store" / "store.json").exists() and len(FeatureStore(tmp_path / "store"))):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)  # closes stdin, which unblocks the 13th image
    assert process.returncode == 130 and "Traceback" not in errors
    assert 0 < len(FeatureStore(tmp_path / "store")) < 20
    assert not list((tmp_path / "store").glob("*.open"))


def test_no_batch_waits_for_the_next_one(photos: Path, tmp_path: Path, monkeypatch) -> None:
    """The tower gets its next batch before the last one is stored, and storing uses another stream."""
    encoder = load_encoder(SIGLIP)
    store = FeatureStore.create(tmp_path / "store", encoder.store_info())
    calls = []

    def on_stream(name: str, function):
        def called(*args):
            calls.append((name, str(mx.default_stream(mx.default_device()))))
            return function(*args)

        return called

    monkeypatch.setattr(encoder, "encode", on_stream("encode", encoder.encode))
    monkeypatch.setattr(mx, "async_eval", on_stream("start", mx.async_eval))
    monkeypatch.setattr(mx, "eval", on_stream("wait", mx.eval))
    monkeypatch.setattr(mx, "isfinite", on_stream("check", mx.isfinite))
    with FeatureWriter(store) as writer:
        Pipeline(encoder, writer, 2, 1, lambda report: None).run(find_sources([str(photos)]))
    names = [name for name, _ in calls]
    batch, stored = ["encode", "start"], ["wait", *["check"] * 2]
    assert names == batch + 3 * (batch + stored) + stored
    tower = {stream for name, stream in calls if name == "encode"}
    assert len(tower) == 1
    assert not tower & {stream for name, stream in calls if name == "check"}


def test_the_command_measures_no_peak(photos: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    """Measuring the peak would take 4 s and 0.9 GB, even for a single picture."""
    monkeypatch.setattr(device, "matmul_peak", None)
    found = figures(capsys, photos, "--out", tmp_path / "store")
    assert found["tflops"] > 0 and "share_of_peak" not in found


def test_what_is_no_file_is_listed_and_not_waited_for(tmp_path: Path, siglip: Path, capsys) -> None:
    """A pipe, a device, a loop of links, and names that a terminal would obey or cannot be printed."""
    folder = tmp_path / "images"
    folder.mkdir()
    os.mkfifo(folder / "pipe.png")
    (folder / "device.png").symlink_to("/dev/zero")
    (folder / "loop.png").symlink_to("loop.png")
    for name in ("clear\x1b[2J.png", "new\nline.png", f"{odd_character(tmp_path)}.png"):
        (folder / name).write_bytes(b"no image")
    shutil.copy(IMAGES / "42.png", folder)
    with pytest.raises(SystemExit) as stop:
        main([str(folder), "--out", str(tmp_path / "store"), "--model", str(siglip), "--batch-size", "4"])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("failed: ")]
    assert stop.value.code == 1 and len(lines) == 6 and all(line.isprintable() for line in lines)
    assert sum("not a regular file" in line for line in lines) == 2
    assert len(FeatureStore(tmp_path / "store")) == 1


def test_a_disk_that_fails_is_named(photos: Path, tmp_path: Path, siglip: Path, monkeypatch, capsys) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    main([str(photos), "--out", str(tmp_path / "store"), "--model", str(siglip), "--batch-size", "4", "--limit", "1"])
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(SystemExit) as stop:
        main([str(photos), "--out", str(tmp_path / "store"), "--model", str(siglip), "--batch-size", "4"])
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 1 and error.startswith("error: ") and str(tmp_path / "store") in error


@pytest.mark.parametrize("line", ['{"image": 3}', '{"path": ["a.png", {}]}', "[" * 10**5])
def test_a_line_of_a_list_that_names_no_image(tmp_path: Path, line: str) -> None:
    (tmp_path / "list.jsonl").write_text(line)
    with pytest.raises(ValueError, match="list.jsonl:1: must be a JSON object"):
        list(find_sources([str(tmp_path / "list.jsonl")]))


@pytest.mark.parametrize("name", ["list.txt", "list.jsonl"])
def test_lists_of_other_systems(tmp_path: Path, name: str) -> None:
    """With a byte order mark, and with a name that is not UTF-8, which a disk of Linux may have."""
    line = b'{"image": "\xe9.png"}' if name.endswith("l") else b"\xe9.png"
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + line + b"\r\n")
    assert [source.name for source in find_sources([str(tmp_path / name)])] == [
        os.fsdecode(bytes(tmp_path) + b"/\xe9.png")
    ]
