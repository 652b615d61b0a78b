"""The worker between HTTP and mlx-lm's batch, and what it relies on in mlx-lm: the contract of `serving/batch.py`."""

import queue
from collections.abc import Iterator, Sequence

import mlx.core as mx
import numpy as np
import pytest
from test_server import STARS, STARS_ANSWER, chat, image

from llama3v_mlx import stream_generate
from llama3v_mlx.demo import IMAGES
from llama3v_mlx.generation import Sampling
from llama3v_mlx.serving import batch as mlx_lm
from llama3v_mlx.serving import engine as engines
from llama3v_mlx.serving.batch import Settings
from llama3v_mlx.serving.checks import parse
from llama3v_mlx.serving.engine import Engine
from llama3v_mlx.serving.jobs import Job, NeedImages, StopText, Token
from llama3v_mlx.serving.prefix_cache import PrefixCache
from llama3v_mlx.serving.prompts import RequestPrompt, chat_prompt
from llama3v_mlx.serving.requests import ChatRequest, Limits

GREEDY = {"temperature": 0, "repetition_penalty": 1}
LIMITS = Limits(512, 2048, 28)
NEVER_ENDS = {491: -100.0, 499: -100.0}


@pytest.fixture
def engine(demo) -> Iterator[Engine]:
    engine = Engine(*demo, PrefixCache(10**8))
    yield engine
    engine.stop()


def job_of(processor, *parts, **settings) -> Job:
    request = parse(ChatRequest, chat(*parts))
    settings = {"max_tokens": 100, "sampling": Sampling(**GREEDY), **settings}
    return Job(chat_prompt(request, processor, LIMITS), Settings(**settings))


def submit(engine: Engine, processor, job: Job) -> Job:
    """Begin a job whose images the engine asks for."""
    engine.submit(job)
    if job.prompt.images:
        need = job.events.get(timeout=30)
        if not isinstance(need, NeedImages):
            job.events.put(need)
            return job
        job.tiles = {i: job.prompt.images[i].tile(processor) for i in need.indices}
        engine.submit(job)
    return job


def rest(job: Job) -> list[Token]:
    tokens = []
    while not tokens or tokens[-1].finish_reason is None:
        event = job.events.get(timeout=30)
        assert isinstance(event, Token), event
        tokens.append(event)
    return tokens


def said(tokens: Sequence[Token]) -> str:
    return "".join(token.text for token in tokens)


class TestMLXLM:
    def test_caches_filled_before_join_a_batch(self, demo) -> None:
        """Prompts of unequal length, read with embeddings into caches of their own: the tokens are `generate`'s."""
        model, processor = demo
        asked = [("What is this image?", image) for image in sorted(IMAGES.glob("[!.]*"))] + [("Hello", None)]
        expected = [[r.token for r in stream_generate(*demo, text, path, **GREEDY)] for text, path in asked]
        batch = mlx_lm.new_batch(model, processor.tokenizer.eos_token_ids, 8)
        caches, last = [], []
        for text, path in asked:
            prompt = processor.encode(text, [] if path is None else [path])
            caches.append(mlx_lm.new_caches(model))
            embeddings = model.embed_inputs(mx.array(prompt.ids[:-1]), prompt.images)[None]
            model(mx.zeros(embeddings.shape[:2], mx.int32), caches[-1], embeddings)
            last.append(prompt.ids[-1:])
        uids = batch.insert(last, max_tokens=[50] * len(last), caches=caches)
        tokens = {uid: [] for uid in uids}
        kept = {}
        while len(kept) < len(uids):
            for response in batch.next()[1]:
                tokens[response.uid].append(response.token)
                if response.finish_reason:
                    kept[response.uid] = response
        batch.close()
        assert [tokens[uid] for uid in uids] == expected
        # What the prefix cache stores: keys and values of the prompt and of all tokens, the last one included.
        for uid, cache in zip(uids, caches, strict=True):
            length = cache[0].size()
            whole = kept[uid].prompt_cache
            assert whole[0].size() == length + 1 + len(tokens[uid]) and kept[uid].finish_reason == "stop"
            difference = mlx_lm.held(whole, 0, length) - mlx_lm.held(cache, 0, length)
            assert mx.abs(difference).max().item() == 0

    def test_held_and_new_caches(self, demo) -> None:
        model, _ = demo
        caches = mlx_lm.new_caches(model)
        model(mx.array([[1, 2, 3, 4]]), caches)
        again = mlx_lm.new_caches(model, mlx_lm.held(caches, 0, 3))
        assert again[0].size() == 3
        logits = model(mx.array([[4]]), again)
        fresh = mlx_lm.new_caches(model)
        np.testing.assert_allclose(logits[0, -1], model(mx.array([[1, 2, 3, 4]]), fresh)[0, -1], atol=1e-3)

    def test_processors_see_the_prompts_last_token_first(self, demo) -> None:
        model, processor = demo
        seen = []
        batch = mlx_lm.new_batch(model, processor.tokenizer.eos_token_ids, 2)
        caches = mlx_lm.new_caches(model)
        model(mx.array([[490, 3]]), caches)
        batch.insert(
            [[457]],
            max_tokens=[3],
            caches=[caches],
            logits_processors=[[lambda tokens, logits: seen.append(np.array(tokens).tolist()) or logits]],
        )
        tokens = []
        while len(tokens) < 3:
            tokens += [response.token for response in batch.next()[1]]
        batch.close()
        assert seen[:3] == [[457], [457, tokens[0]], [457, *tokens[:2]]]


class TestStopText:
    @pytest.mark.parametrize(
        "stops, pieces, certain, found",
        [
            ((), ["a", "b"], ["a", "b"], False),
            (("cd",), ["ab", "c", "x", "y"], ["ab", "", "cx", "y"], False),
            (("cd",), ["abc", "de"], ["ab", ""], True),
            (("cd", "bc"), ["abcd"], ["a"], True),
            (("aab",), ["a", "a", "a", "b"], ["", "", "a", ""], True),
            (("xyz",), ["ax", "y"], ["a", "xy"], False),
        ],
    )
    def test_feed(self, stops, pieces, certain, found) -> None:
        matcher = StopText(stops)
        fed = [matcher.feed(piece, i == len(pieces) - 1) for i, piece in enumerate(pieces)]
        assert [text for text, _ in fed] == certain and fed[-1][1] == found


class TestEngine:
    def test_a_step_of_all_answers_after_every_piece_of_reading(self, demo, engine: Engine, monkeypatch) -> None:
        """While one is answered, another's image is read a layer of a tile at a time, and its prompt in small steps."""
        model, processor = demo
        log = []
        monkeypatch.setattr(engines, "SLICE", 0.0)
        engine._piece = engines.LEAST_TOKENS
        running = submit(engine, processor, job_of(processor, "Hello", max_tokens=1500, logit_bias=NEVER_ENDS))
        running.events.get(timeout=30)
        read, step = Engine._read, engine._decoding.next

        def logged_read(self, job):
            for _ in read(self, job):
                log.append("piece")
                yield

        monkeypatch.setattr(Engine, "_read", logged_read)
        monkeypatch.setattr(engine._decoding, "next", lambda alone: log.append("step") or step(alone))
        job = submit(engine, processor, job_of(processor, image(STARS), "What is this image?"))
        assert said(rest(job)) == STARS_ANSWER
        engine.cancel(running)
        pieces = log.count("piece")
        of_prompt = -(-(len(job.prompt.ids) - 1) // engines.LEAST_TOKENS)
        assert pieces == 5 * (model.vision_tower.config.num_hidden_layers + 2) + of_prompt
        assert "piece piece" not in " ".join(log)

    @pytest.mark.parametrize(
        "fixed, token, piece", [(0.9, 0.01, 16), (0.5, 0.05, 10), (0.1, 0.02, 43), (0.9, 1.0, 4), (0.1, 0.001, 512)]
    )
    def test_a_piece_of_a_prompt_takes_about_a_step(
        self, engine: Engine, monkeypatch: pytest.MonkeyPatch, fixed: float, token: float, piece: int
    ) -> None:
        """Whatever a pass over the weights and a token cost, in steps, within the bounds of a piece."""
        monkeypatch.setattr(engines, "SLICE", 1.0)
        engine._step_times.append(1.0)
        for _ in range(50):
            engine._fit_piece(fixed + token * engine._piece)
        assert engine._piece == piece

    def test_a_cancelled_job_gets_no_more_than_a_token(self, demo, engine: Engine) -> None:
        _, processor = demo
        job = submit(engine, processor, job_of(processor, "Hello", max_tokens=1500, logit_bias=NEVER_ENDS))
        for _ in range(3):
            job.events.get(timeout=30)
        before = job.events.qsize()
        engine.cancel(job)
        rest(submit(engine, processor, job_of(processor, "Hello")))
        assert job.events.qsize() - before <= 2  # the one under way, and one between the count and the cancelling
        assert not engine._answers

    @pytest.mark.parametrize("stage", ["parked", "waiting"])
    def test_a_job_cancelled_before_it_is_answered(self, demo, engine: Engine, stage: str) -> None:
        _, processor = demo
        jobs = [job_of(processor, image(STARS), "What is this image?", choices=16) for _ in range(2)]
        for job in jobs:
            engine.submit(job)
        assert isinstance(jobs[0].events.get(timeout=30), NeedImages)
        for job in jobs[:1] if stage == "parked" else jobs:
            engine.cancel(job)
        if stage == "parked":  # its place is the other's
            assert isinstance(jobs[1].events.get(timeout=30), NeedImages)
            engine.cancel(jobs[1])
        assert said(rest(submit(engine, processor, job_of(processor, "Hello")))).startswith("Hello!")
        with pytest.raises(queue.Empty):
            jobs[1].events.get(block=False)

    def test_one_token(self, demo, engine: Engine) -> None:
        """A prompt of one token has nothing to be read before."""
        settings = Settings(3, Sampling(**GREEDY))
        job = Job(RequestPrompt([490]), settings)
        engine.submit(job)
        assert len(rest(job)) == 3

    def test_stop_fails_what_is_not_done(self, demo) -> None:
        _, processor = demo
        engine = Engine(*demo, PrefixCache(10**8))
        job = submit(engine, processor, job_of(processor, "Hello", max_tokens=1900, logit_bias=NEVER_ENDS))
        job.events.get(timeout=30)
        engine.stop()
        events = []
        while not job.events.empty():
            events.append(job.events.get())
        assert events[-1].status == 503
