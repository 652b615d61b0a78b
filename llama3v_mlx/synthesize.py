"""Have a teacher model write conversations about captioned images: `llama3v synthesize --teacher MODEL_OR_URL`.

The teacher is any text model of mlx-lm, which is given the captions as in LLaVA, or an OpenAI-compatible server, which
can be sent the images too. Its output is checked row by row. A second run continues where the first one stopped.
"""

import argparse
import base64
import contextlib
import hashlib
import json
import mimetypes
import os
import re
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

from .cli import note_slow_cpu, positive, run, share_or_more
from .files import printable, writing
from .locks import open_locked

KINDS = {
    "conversation": (
        "Write a conversation of three to five turns between a person who asks about the image and an assistant who "
        "sees it. Ask what the captions answer for certain: what is there, how many, which colors, where, what happens."
    ),
    "detail": "Write one question that asks for a full description of the image, and a detailed description in answer.",
    "reasoning": (
        "Write one question about the image that takes thought to answer (why, how, what will happen, what follows), "
        "and an answer that reasons step by step from what is seen."
    ),
}
FORMAT = (
    "Below are captions of one image. {task} Speak of the image itself, as if you saw it: never mention the captions. "
    "Say nothing that they do not support. Write each question on a line that begins with 'Question:' and each answer "
    "on one that begins with 'Answer:', and nothing else.\n\n{captions}"
)
# Answers that mention their source read as if nobody saw the image.
TELLTALE = re.compile(r"\bcaptions?\b|\bprovided (text|description)", re.IGNORECASE)
MAX_WORDS = {"question": 60, "answer": 400}
MARK = "<image>"  # stands for the image in a turn
TRIES, TIMEOUT = 3, 300.0  # attempts at a request to a server; seconds

Row = dict
Task = tuple[str, str, Row]  # id, kind, row of captions


class Rejected(ValueError):
    """Raised when a teacher's output is unusable."""


def captions_of(row: Row) -> list[str]:
    captions = row.get("captions", row.get("caption"))
    return [captions] if isinstance(captions, str) else captions


def prompt_of(kind: str, row: Row) -> str:
    captions = "\n".join(f"- {caption.strip()}" for caption in captions_of(row))
    return FORMAT.format(task=KINDS[kind], captions=captions)


def conversation_of(kind: str, text: str, finished: bool) -> list[dict]:
    """Parse a teacher's output into turns in LLaVA's format.

    Raises:
        Rejected: if turns do not alternate, are empty or too long, have an image mark, or mention captions.
    """
    if not finished:
        raise Rejected("cut off by --max-tokens")
    parts = re.split(r"^\s*\**(Question|Answer)\**:\**", text.strip(), flags=re.MULTILINE)
    roles, values = [role.lower() for role in parts[1::2]], [value.strip() for value in parts[2::2]]
    if not roles or parts[0].strip() or roles != ["question", "answer"] * (len(roles) // 2):
        raise Rejected("questions and answers do not alternate")
    if kind != "conversation" and len(roles) != 2:
        raise Rejected("more than one question")
    for role, value in zip(roles, values, strict=True):
        if not value:
            raise Rejected(f"an empty {role}")
        if len(value.split()) > MAX_WORDS[role]:
            raise Rejected(f"a {role} of more than {MAX_WORDS[role]} words")
        if MARK in value:
            raise Rejected(f"a {role} with {MARK}")
        if TELLTALE.search(value):
            raise Rejected("mentions the captions")
    if len(set(values[::2])) < len(values[::2]):
        raise Rejected("a repeated question")
    names = {"question": "human", "answer": "gpt"}
    turns = [{"from": names[role], "value": value} for role, value in zip(roles, values, strict=True)]
    turns[0]["value"] = f"{MARK}\n{turns[0]['value']}"
    return turns


class LocalTeacher:
    """Text model of mlx-lm, run in batches."""

    def __init__(self, name: str, max_tokens: int, temperature: float):
        from mlx_lm import load
        from mlx_lm.sample_utils import make_sampler

        from .checkpoint import CONFIG
        from .config import older_rope, read_json
        from .hub import download

        folder = Path(name).expanduser()
        config = read_json((folder if folder.is_dir() else download(name, None, [CONFIG])) / CONFIG)
        path = str(folder) if folder.is_dir() else name
        self.model, self.tokenizer = load(path, model_config=older_rope(config))
        self.options = {"max_tokens": max_tokens, "sampler": make_sampler(temperature, top_p=0.95)}
        self.max_tokens = max_tokens

    def write(self, tasks: list[Task]) -> list[tuple[str, bool]]:
        """Texts of the tasks, each with whether it is complete."""
        from mlx_lm import batch_generate

        messages = [[{"role": "user", "content": prompt_of(kind, row)}] for _, kind, row in tasks]
        prompts = [self.tokenizer.apply_chat_template(m, add_generation_prompt=True) for m in messages]
        response = batch_generate(self.model, self.tokenizer, prompts, return_token_ids=True, **self.options)
        lengths = [len(ids) for ids in response.token_ids]
        return [(text, n < self.max_tokens) for text, n in zip(response.texts, lengths, strict=True)]


class RemoteTeacher:
    """OpenAI-compatible server, sent several requests at once."""

    def __init__(self, url: str, model: str | None, key: str | None, images: Path | None, **options):
        self.url, self.key, self.images, self.options = url.rstrip("/"), key, images, options
        self.model = model or self._ask("/models")["data"][0]["id"]

    def write(self, tasks: list[Task]) -> list[tuple[str, bool]]:
        with ThreadPoolExecutor(len(tasks)) as pool:
            return list(pool.map(self._write, tasks))

    def _write(self, task: Task) -> tuple[str, bool]:
        _, kind, row = task
        content: str | list = prompt_of(kind, row)
        if self.images is not None:
            data = base64.b64encode((self.images / row["image"]).read_bytes()).decode()
            media_type = mimetypes.guess_type(row["image"])[0] or "image/jpeg"
            image = {"type": "image_url", "image_url": {"url": f"data:{media_type};base64,{data}"}}
            content = [image, {"type": "text", "text": content}]
        body = {"model": self.model, "messages": [{"role": "user", "content": content}], **self.options}
        choice = self._ask("/chat/completions", body)["choices"][0]
        return choice["message"]["content"] or "", choice["finish_reason"] == "stop"

    def _ask(self, path: str, body: dict | None = None) -> dict:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        data = None if body is None else json.dumps(body).encode()
        for left in reversed(range(TRIES)):
            try:
                request = urllib.request.Request(self.url + path, data, headers)
                with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
                    return json.load(response)
            except urllib.error.HTTPError as e:
                said = e.read(500).decode(errors="replace")
                if left == 0 or (e.code < 500 and e.code != 429):
                    raise ValueError(f"{self.url}{path}: HTTP {e.code}: {said}") from e
            except (OSError, ValueError) as e:
                if left == 0:
                    raise ValueError(f"{self.url}{path}: {getattr(e, 'reason', e)}") from e  # a URLError's is plain
            time.sleep(2.0 ** (TRIES - left))


def read_captions(path: Path, kinds: list[str], count: int | None) -> Iterator[Task]:
    """Yield a task for every kind of every row, for at most `count` rows.

    Raises:
        ValueError: if a row has no image or no captions.
    """
    with path.open("rb") as file:
        for number, line in enumerate(islice(filter(bytes.strip, file), count), 1):
            try:
                row = json.loads(line)
                captions = captions_of(row)
                "".join(captions).encode()  # a lone surrogate is no text
                good = isinstance(row["image"], str) and captions
            except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
                good = False
            if not good:
                raise ValueError(f'{path}, row {number}: is not {{"image": path, "captions": [text, …]}}')
            for kind in kinds:
                yield f"{row.get('id', row['image'])}-{kind}", kind, row


def synthesize(args: argparse.Namespace) -> None:
    """Request missing conversations, check them, append them."""
    note_slow_cpu()
    tasks = list(read_captions(Path(args.captions), args.kinds, args.n))
    out = Path(args.out)
    with _locked(out):
        written, counts = _append_missing(tasks, out, args)
    existed = len(tasks) - written - counts.total()
    print(f"{printable(str(out))}: {written} rows written, {existed} existed already, {counts.total()} rejected")
    for reason, count in counts.most_common():
        print(f"  {count} {printable(reason)}")


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Lock the output against other runs; if this one fails before its first row, leave no new file."""
    is_new = not out.exists()
    with open_locked(out) as file:
        try:
            yield
        except BaseException:
            if is_new and not os.fstat(file.fileno()).st_size:
                os.unlink(os.path.realpath(out))
            raise


def _append_missing(tasks: list[Task], out: Path, args: argparse.Namespace) -> tuple[int, Counter[str]]:
    """Return the number of rows written, and the counts of rejected ones by reason."""
    from tqdm import tqdm

    rejects = out.with_suffix(".rejected.jsonl")
    kept = list(_kept(out, ("id", "image", "conversations")))
    done = {row["id"] for row in [*kept, *_kept(rejects, ("id",))]}
    known = {_digest(row) for row in kept}
    waiting = [task for task in tasks if task[0] not in done]
    counts: Counter[str] = Counter()
    written = 0
    teacher = make_teacher(args) if waiting else None
    with (
        writing(out),
        out.open("a", encoding="utf-8", errors="backslashreplace") as good,
        rejects.open("a", encoding="utf-8", errors="backslashreplace") as bad,
        tqdm(total=len(waiting), unit="row", disable=None) as bar,
    ):
        for start in range(0, len(waiting), args.batch_size):
            batch = waiting[start : start + args.batch_size]
            for (name, kind, row), (text, finished) in zip(batch, teacher.write(batch), strict=True):
                try:
                    new = {"id": name, "image": row["image"], "conversations": conversation_of(kind, text, finished)}
                    if (digest := _digest(new)) in known:
                        raise Rejected("a duplicate conversation")
                    known.add(digest)
                    good.write(json.dumps(new, ensure_ascii=False) + "\n")
                    written += 1
                except Rejected as e:
                    counts[str(e)] += 1
                    bad.write(json.dumps({"id": name, "reason": str(e), "text": text}, ensure_ascii=False) + "\n")
            good.flush()
            bad.flush()
            bar.update(len(batch))
    return written, counts


def make_teacher(args: argparse.Namespace) -> LocalTeacher | RemoteTeacher:
    if not re.match(r"https?://", args.teacher):
        return LocalTeacher(args.teacher, args.max_tokens, args.temp)
    key = os.environ.get(args.api_key_env) if args.api_key_env else None
    images = Path(args.image_folder) if args.image_folder else None
    options = {"max_tokens": args.max_tokens, "temperature": args.temp}
    return RemoteTeacher(args.teacher, args.teacher_model, key, images, **options)


def _kept(path: Path, keys: tuple[str, ...]) -> Iterator[Row]:
    """Rows of an earlier run, which have these keys. A last line cut short by a kill is truncated.

    Raises:
        ValueError: if another line is damaged.
    """
    if not path.exists():
        return
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(path, len(whole))
    for number, line in enumerate(whole.split(b"\n")[:-1], 1):
        try:
            row = json.loads(line)
            good = isinstance(row["id"], str) and all(key in row for key in keys)
        except (ValueError, KeyError, TypeError, RecursionError):
            good = False
        if not good:
            raise ValueError(f"{path}:{number}: is not a row of synthesize; remove the line, and it is written again")
        yield row


def _digest(row: Row) -> bytes:
    return hashlib.sha256(json.dumps([row["image"], row["conversations"]]).encode()).digest()


def _kinds(text: str) -> list[str]:
    kinds = text.split(",")
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: must be among {', '.join(KINDS)}")
    return kinds


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="llama3v synthesize",
        usage="llama3v synthesize --teacher MODEL --captions FILE --out FILE [options]",
        description="Have a teacher model write conversations about captioned images, as training data.",
    )
    parser.add_argument(
        "--teacher", required=True, help="folder or Hub repository of an mlx-lm model, or http(s)://.../v1"
    )
    parser.add_argument("--captions", required=True, help='.jsonl of {"image": path, "captions": [text, ...]}')
    parser.add_argument("--out", required=True, help=".jsonl file to write or to continue")
    parser.add_argument(
        "--kinds", type=_kinds, default=list(KINDS), help=f"kinds of conversation (default: {','.join(KINDS)})"
    )
    parser.add_argument("-n", type=positive, help="rows of captions to use (default: all)")
    parser.add_argument("--batch-size", type=positive, default=16, help="requests at once (default: 16)")
    parser.add_argument("--max-tokens", type=positive, default=1024, help="length of a conversation (default: 1024)")
    parser.add_argument("--temp", "--temperature", type=share_or_more, default=0.7, help="temperature (default: 0.7)")
    server = parser.add_argument_group("server")
    server.add_argument("--teacher-model", help="model name on the server (default: its first)")
    server.add_argument("--api-key-env", metavar="NAME", help="environment variable with the server's key")
    server.add_argument("--image-folder", metavar="DIR", help="send the images too; folder that their paths start from")
    parser.add_argument("--debug", action="store_true", help="show tracebacks and warnings")
    args = parser.parse_args(argv)
    run(lambda: synthesize(args), args.debug, awake=True)


if __name__ == "__main__":
    main()
