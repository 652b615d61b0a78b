"""Soak test of the server: many concurrent clients, good and bad; answers must be right and memory flat.

    python benchmarks/soak.py                    # 8,000 requests of 8 clients to a server with the demo
    python benchmarks/soak.py --clients 1,4,8    # the same questions about images, for requests per second
    python benchmarks/soak.py --clients 8 --against ../old   # requests per second beside another checkout's server
    python benchmarks/soak.py --url http://127.0.0.1:8080 --requests 100

A wrong answer is one that differs from what the same question got when it was asked alone. The last line is one JSON
object with all figures.
"""

import argparse
import base64
import contextlib
import http.client
import json
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from embed import machine, say  # isort: skip

from llama3v_mlx.demo import IMAGES
from llama3v_mlx.evaluate import served

QUESTIONS = ("What is this image?", "What color is the background?", "How many shapes are there?")
TEXTS = ("Hello", "Who are you?", "What can you do?")
CHAT = "/v1/chat/completions"


class Client:
    """Requests of every kind; each returns whether it was answered correctly."""

    def __init__(self, host: str, port: int):
        self.host, self.port = host, port
        self.uris = [f"data:image/png;base64,{base64.b64encode(p.read_bytes()).decode()}" for p in IMAGES.glob("[!.]*")]
        self.expected: dict[tuple, str] = {}

    def post(self, body: bytes) -> tuple[int, str]:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=120)
        with contextlib.closing(connection):
            connection.request("POST", CHAT, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read().decode()

    def ask(self, image: int | None, text: str, **options) -> tuple[int, str]:
        parts = [] if image is None else [{"type": "image_url", "image_url": {"url": self.uris[image]}}]
        content = [*parts, {"type": "text", "text": text}]
        body = {"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 30, **options}
        return self.post(json.dumps(body).encode())

    def answer(self, image: int | None, text: str) -> str:
        status, said = self.ask(image, text)
        return json.loads(said)["choices"][0]["message"]["content"] if status == 200 else f"HTTP {status}: {said[:200]}"

    def learn(self) -> None:
        """Ask everything once, serially."""
        asked = [(i, text) for i in range(len(self.uris)) for text in QUESTIONS] + [(None, text) for text in TEXTS]
        self.expected = {question: self.answer(*question) for question in asked}

    def image(self, rng: random.Random) -> bool:
        question = rng.randrange(len(self.uris)), rng.choice(QUESTIONS)
        return self.answer(*question) == self.expected[question]

    def text(self, rng: random.Random) -> bool:
        question = None, rng.choice(TEXTS)
        return self.answer(*question) == self.expected[question]

    def stream(self, rng: random.Random) -> bool:
        question = rng.randrange(len(self.uris)), rng.choice(QUESTIONS)
        _, said = self.ask(*question, stream=True)
        events = [json.loads(line[6:]) for line in said.splitlines() if line.startswith("data: {")]
        text = "".join(event["choices"][0]["delta"].get("content") or "" for event in events if event.get("choices"))
        return text == self.expected[question]

    def broken(self, rng: random.Random) -> bool:
        bodies = (
            b"{",
            b"[]",
            b'{"messages": []}',
            b'{"messages": [{"role": "robot", "content": "x"}]}',
            b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc"}}]}]}',
            b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,x"}}]}]}',
            json.dumps({"messages": [{"role": "user", "content": "red " * 5000}]}).encode(),
        )
        status, said = self.post(rng.choice(bodies))
        return status == 400 and "Traceback" not in said and bool(json.loads(said)["error"]["message"])

    def head(self, version: str, length: int) -> bytes:
        lines = [f"POST {CHAT} {version}", f"Host: {self.host}:{self.port}", "Content-Type: application/json"]
        return "\r\n".join([*lines, f"Content-Length: {length}", "", ""]).encode()

    def slow(self, rng: random.Random) -> bool:
        """Send a body in small pieces."""
        body = json.dumps({"messages": [{"role": "user", "content": "Hello"}], "temperature": 0}).encode()
        with socket.create_connection((self.host, self.port), timeout=120) as s:
            s.sendall(self.head("HTTP/1.0", len(body)))
            for i in range(0, len(body), 16):
                s.sendall(body[i : i + 16])
                time.sleep(0.02)
            said = b"".join(iter(lambda: s.recv(1 << 16), b""))
        return json.dumps(self.expected[None, "Hello"]).encode()[1:-1] in said

    def gone(self, rng: random.Random) -> bool:
        """Disconnect before the answer, or in the middle of the request."""
        body = json.dumps({"messages": [{"role": "user", "content": "Hello"}], "stream": True}).encode()
        sent = body[: rng.choice((len(body), len(body) // 2))]
        with socket.create_connection((self.host, self.port), timeout=120) as s:
            s.sendall(self.head("HTTP/1.1", len(body)) + sent)
            time.sleep(0.05 * rng.random())
        return True


KINDS: dict[str, tuple[int, Callable]] = {  # how often, in a hundred
    "image": (40, Client.image),
    "text": (20, Client.text),
    "stream": (15, Client.stream),
    "broken": (15, Client.broken),
    "slow": (5, Client.slow),
    "gone": (5, Client.gone),
}


def resident(process: subprocess.Popen | None) -> float | None:
    """Resident memory of a process in MB; None if unknown."""
    if process is None or shutil.which("ps") is None:  # as in a small container
        return None
    said = subprocess.run(["ps", "-o", "rss=", "-p", str(process.pid)], capture_output=True, text=True).stdout.strip()
    return int(said) / 1024 if said else None


def left_over(process: subprocess.Popen | None) -> dict[str, int]:
    """Numbers of threads and open files of a process; empty without /proc."""
    folder = Path(f"/proc/{process.pid}") if process else None
    if folder is None or not folder.exists():
        return {}
    return {"threads": len(list((folder / "task").iterdir())), "files": len(list((folder / "fd").iterdir()))}


def soak(
    client: Client, process: subprocess.Popen | None, said: Sequence[str], requests: int, clients: int, seed: int
) -> dict:
    """Send mixed requests from many clients; return wrong answers and memory over time."""
    rng = random.Random(seed)
    names = rng.choices(list(KINDS), [share for share, _ in KINDS.values()], k=requests)
    wrong: Counter[str] = Counter()
    memory = []
    before = left_over(process)
    start = time.perf_counter()

    def one(numbered: tuple[int, str]) -> None:
        i, name = numbered
        try:
            good = KINDS[name][1](client, random.Random(seed + i))
        except Exception as e:
            say(f"  {name}: {type(e).__name__}: {e}")
            good = False
        wrong[name] += not good
        if i % max(1, requests // 200) == 0:
            memory.append(resident(process))

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(one, enumerate(names)))
    seconds = time.perf_counter() - start
    traceback = any("Traceback" in line for line in said) if process else None
    figures = {"requests": Counter(names), "wrong": {k: v for k, v in wrong.items() if v}, "seconds": seconds}
    figures |= {"traceback": traceback, "memory_mb": memory}
    for _ in range(100):  # clients that left are noticed a moment later
        after = left_over(process)
        if all(after[name] <= before[name] for name in after):
            break
        time.sleep(0.1)
    figures |= {"before": before, "after": after}
    say(f"{requests} requests of {clients} clients in {seconds:.0f} s: {wrong.total()} wrong, traceback: {traceback}")
    if process and None not in memory:
        # Single samples differ by the images that are just being read; their median shows a leak.
        third, fourth = (statistics.median(memory[len(memory) * i // 4 :][: len(memory) // 4]) for i in (2, 3))
        figures |= {"third_quarter_mb": third, "fourth_quarter_mb": fourth}
        say(
            f"memory: {memory[0]:.0f} MB at first, {min(memory):.0f} to {max(memory):.0f} MB; median of the third "
            f"quarter {third:.1f}, of the fourth {fourth:.1f} MB ({fourth / third - 1:+.1%})"
        )
        say(f"before: {before}; after: {after}")
    return figures


def throughput(client: Client, clients: list[int], requests: int) -> list[dict]:
    """Requests per second of questions about images, for each number of clients."""
    rows = []
    for count in clients:
        asked = [(i % len(client.uris), QUESTIONS[i % len(QUESTIONS)]) for i in range(requests)]
        times = []

        def one(question: tuple[int, str], times: list = times) -> bool:
            start = time.perf_counter()
            right = client.answer(*question) == client.expected[question]
            times.append(time.perf_counter() - start)
            return right

        start = time.perf_counter()
        with ThreadPoolExecutor(count) as pool:
            right = sum(pool.map(one, asked))
        rate = requests / (time.perf_counter() - start)
        rows.append({"clients": count, "requests_per_second": rate, "median_seconds": statistics.median(times)})
        faster = rate / rows[0]["requests_per_second"]
        say(f"{count} clients: {rate:.2f} requests/s, {faster:.2f}x; {right} of {requests} right")
    return rows


def beside(client: Client, other: Client, clients: int, requests: int, rounds: int = 5) -> dict:
    """Requests per second of two servers measured in turn, so that other load affects both."""
    rates: dict[str, list[float]] = {"ours": [], "other": []}
    for _ in range(rounds):
        for name, one in (("ours", client), ("other", other)):
            rates[name].append(throughput(one, [clients], requests)[0]["requests_per_second"])
    figures = {name: statistics.median(values) for name, values in rates.items()}
    ours, theirs = figures["ours"], figures["other"]
    say(f"medians: {ours:.1f} and {theirs:.1f} requests/s: {ours / theirs:.2f}x")
    return {**figures, "rates": rates}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="address of a running server (default: one is started with the demo)")
    parser.add_argument("--against", metavar="DIR", help="another checkout, to measure its server in turn")
    parser.add_argument("--requests", type=int, default=8000, help="(default: 8000)")
    parser.add_argument("--clients", default="8", help="at once; several numbers measure throughput (default: 8)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    clients = [int(n) for n in args.clients.split(",")]
    with contextlib.ExitStack() as stack:
        if args.url:
            parts = urllib.parse.urlsplit(args.url)
            host, port, process, said = parts.hostname, parts.port or 80, None, []
        else:
            process, port, said = stack.enter_context(served("llama3v_mlx.server"))
            host = "127.0.0.1"
        client = Client(host, port)
        client.learn()
        result = {"benchmark": "soak", "machine": machine()}
        if args.against:
            env = {**os.environ, "PYTHONPATH": args.against}
            _, other_port, _ = stack.enter_context(served("llama3v_mlx.server", cwd=args.against, env=env))
            other = Client(host, other_port)
            other.learn()
            result["against"] = beside(client, other, clients[0], args.requests)
        elif len(clients) > 1:
            result["throughput"] = throughput(client, clients, args.requests)
        else:
            result["soak"] = soak(client, process, said, args.requests, clients[0], args.seed)
    print(json.dumps(result))
    if "soak" in result and (result["soak"]["wrong"] or result["soak"]["traceback"]):
        sys.exit(1)


if __name__ == "__main__":
    main()
