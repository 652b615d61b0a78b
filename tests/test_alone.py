"""Drafts in the server: the batch's tokens in fewer passes, wherever an answer joins the batch or leaves it."""

from collections.abc import Callable, Iterator

import mlx.core as mx
import numpy as np
import pytest
from test_drafting import SCHEMA, frozen
from test_engine import GREEDY, LIMITS, NEVER_ENDS, rest, said, submit
from test_server import STARS, STARS_ANSWER, image

from llama3v_mlx.drafting.drafters import NGrams
from llama3v_mlx.sampling import Sampling
from llama3v_mlx.schema import Schemas
from llama3v_mlx.serving.alone import Alone
from llama3v_mlx.serving.batch import Settings
from llama3v_mlx.serving.checks import RequestError, parse
from llama3v_mlx.serving.decoding import Decoding
from llama3v_mlx.serving.engine import Engine
from llama3v_mlx.serving.jobs import Job, Token
from llama3v_mlx.serving.prefix_cache import PrefixCache
from llama3v_mlx.serving.prompts import BLOCK, chat_prompt
from llama3v_mlx.serving.requests import ChatRequest

QUESTION = "Who are you?"
ANSWER = "I am a small demo of Llama3-V. I know shapes, colors and handwritten numbers."
SAMPLED = {"sampling": Sampling(temperature=2.0, top_p=1.0, top_k=0), "seed": 4, "max_tokens": 24}
SETTINGS = {
    "greedy": {},
    "penalties": {
        "sampling": Sampling(0, repetition_penalty=1.3),
        "presence_penalty": 1.0,
        "frequency_penalty": 0.5,
        "logit_bias": NEVER_ENDS,
        "max_tokens": 40,
    },
    "seed": SAMPLED,
    "seed and bias": {**SAMPLED, "logit_bias": NEVER_ENDS, "presence_penalty": 0.3},
}


@pytest.fixture(scope="module")
def engine(demo) -> Iterator[Engine]:
    engine = Engine(*demo, PrefixCache(10**8), clock=frozen)
    yield engine
    engine.stop()


@pytest.fixture
def passes(demo, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(answers, tokens) of each decoding pass through Llama."""
    model = type(demo[0])
    call, shapes = model.__call__, []

    def forward(self, inputs, cache=None, input_embeddings=None):
        if input_embeddings is None:
            shapes.append(inputs.shape)
        return call(self, inputs, cache, input_embeddings)

    monkeypatch.setattr(model, "__call__", forward)
    return shapes


def job_of(demo, *turns: str | list, **settings) -> Job:
    """Turns of user and assistant by turns; by default a question that was answered before."""
    turns = turns or (QUESTION, ANSWER, QUESTION)
    messages = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(turns)]
    settings = {"max_tokens": 100, "sampling": Sampling(**GREEDY), **settings}
    prompt = chat_prompt(parse(ChatRequest, {"messages": messages}), demo[1], LIMITS)
    return Job(prompt, Settings(**settings))


def ask(engine: Engine, demo, *turns: str | list, **settings) -> list[Token]:
    return rest(submit(engine, demo[1], job_of(demo, *turns, **settings)))


def in_batch(engine: Engine, demo, *turns: str | list, **settings) -> list[Token]:
    """The answer of mlx-lm's batch, without drafts."""
    with pytest.MonkeyPatch.context() as patch:
        step = Decoding.next
        patch.setattr(Decoding, "next", lambda self, alone: step(self, False))
        return ask(engine, demo, *turns, **settings)


def after_pass(number: int, call: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Call on the worker after a pass, before its tokens are taken."""
    step, count = Decoding.next, 0

    def counted(self, alone):
        nonlocal count
        responses = step(self, alone)
        count += 1
        if count == number:
            call()
        return responses

    monkeypatch.setattr(Decoding, "next", counted)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_the_tokens_are_the_batchs(demo, engine: Engine, passes, settings: dict) -> None:
    expected = in_batch(engine, demo, **settings)
    assert {tokens for _, tokens in passes} == {1}
    passes.clear()
    assert ask(engine, demo, **settings) == expected
    assert max(tokens for _, tokens in passes) > 1 and {answers for answers, _ in passes} == {1}


def test_a_repeated_question_takes_fewer_passes(demo, engine: Engine, passes) -> None:
    shown = [image(STARS), {"type": "text", "text": "What is this image?"}]
    for turns, answer in (((QUESTION, ANSWER, QUESTION), ANSWER), ((shown, STARS_ANSWER, *shown[1:]), STARS_ANSWER)):
        turns = turns[:2] + (turns[2] if isinstance(turns[2], str) else [turns[2]],)
        tokens = in_batch(engine, demo, *turns)
        plain = len(passes)
        passes.clear()
        assert said(ask(engine, demo, *turns)) == said(tokens) == answer
        assert len(passes) <= (plain + 1) / 3
        passes.clear()


def test_logprobs(demo, engine: Engine) -> None:
    expected, drafted = in_batch(engine, demo, num_logprobs=3), ask(engine, demo, num_logprobs=3)
    for theirs, ours in zip(expected, drafted, strict=True):
        assert ours.logprob.token == theirs.logprob.token and len(ours.top_logprobs) == 3
        found, values = ([each.logprob for each in (t.logprob, *t.top_logprobs)] for t in (ours, theirs))
        np.testing.assert_allclose(found, values, atol=1e-3)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("number", [1, 2, 4])
def test_another_request_comes_and_goes(
    demo, engine: Engine, passes, settings: dict, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer joins the batch after any pass, and leaves it; no token is lost, doubled or another one."""
    other = {"max_tokens": 3 + number}
    expected = in_batch(engine, demo, **settings), in_batch(engine, demo, "Hello", **other)
    passes.clear()
    second = job_of(demo, "Hello", **other)
    after_pass(number, lambda: engine.submit(second), monkeypatch)
    assert (ask(engine, demo, **settings), rest(second)) == expected
    assert (2, 1) in passes


def test_drafts_go_on_when_the_other_answer_has_ended(demo, engine: Engine, passes, monkeypatch) -> None:
    second = job_of(demo, "Hello", max_tokens=2)
    after_pass(1, lambda: engine.submit(second), monkeypatch)
    first = ask(engine, demo)
    rest(second)
    assert said(first) == ANSWER
    last = len(passes) - passes[::-1].index((2, 1))
    assert max(tokens for _, tokens in passes[last:]) > 1


def test_an_answer_that_began_in_the_batch(demo, engine: Engine, passes) -> None:
    """Two are read together; the shorter one ends first."""
    settings = SETTINGS["penalties"]
    expected = in_batch(engine, demo, **settings), in_batch(engine, demo, "Hello", max_tokens=4)
    passes.clear()
    first, second = job_of(demo, **settings), job_of(demo, "Hello", max_tokens=4)

    def both() -> Iterator[None]:
        engine.submit(first)
        engine.submit(second)
        yield

    engine.run(both())  # on the worker, so that it receives both at once
    assert (rest(first), rest(second)) == expected
    assert (2, 1) in passes and max(tokens for _, tokens in passes) > 1


def test_another_request_is_read_within_a_pass(demo, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    second = job_of(demo, "What can you do?", max_tokens=2)
    read, step = Engine._read, Decoding.next

    def reading(self, job):
        for _ in read(self, job):
            if job is second:
                log.append("piece")
            yield

    def stepping(self, alone):
        log.append("pass")
        if len(log) == 2:
            engine.submit(second)
        return step(self, alone)

    monkeypatch.setattr(Engine, "_read", reading)
    monkeypatch.setattr(Decoding, "next", stepping)
    assert said(ask(engine, demo)) == ANSWER
    rest(second)
    assert log[:3] == ["pass", "pass", "piece"]


def test_one_that_waits_for_a_place_does_not_end_the_drafts(demo, passes, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is begun as soon as there is a place."""
    engine = Engine(*demo, PrefixCache(10**8), concurrency=1, clock=frozen)
    second = job_of(demo)
    after_pass(1, lambda: engine.submit(second), monkeypatch)
    assert said(ask(engine, demo)) == said(rest(second)) == ANSWER
    assert len(passes) <= 2 * 8 and max(tokens for _, tokens in passes) == 8
    engine.stop()


@pytest.mark.parametrize("stop", ["colors and", "V", " I know shapes, c"])
def test_a_stop_text_inside_a_block(demo, engine: Engine, stop: str) -> None:
    expected = in_batch(engine, demo, stops=(stop,))
    assert ask(engine, demo, stops=(stop,)) == expected
    assert said(expected) == ANSWER[: ANSWER.index(stop)]
    assert said(ask(engine, demo)) == ANSWER


def test_the_prefix_cache_holds_the_same(demo, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the last token of all ends a block."""
    end = -len(job_of(demo).prompt.ids) % BLOCK
    for most in (1, 2, 5, end - 1, end, end + 1, 100):
        caches, answers = [], []
        for way in (in_batch, ask):
            caches.append(PrefixCache(10**8))
            monkeypatch.setattr(engine, "_prefixes", caches[-1])
            answers.append(way(engine, demo, max_tokens=most))
        assert answers[0] == answers[1] and len(answers[0]) == min(most, 26)
        held = [cache._blocks for cache in caches]
        assert held[0].keys() == held[1].keys()
        for key, array in held[0].items():
            assert array.shape == held[1][key].shape and mx.allclose(array, held[1][key], atol=1e-3)


def test_cancelling_inside_a_block(demo, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    job, take = job_of(demo), Engine._take

    def taken(self, answer, response):
        take(self, answer, response)
        if answer.job is job and len(answer.tokens) == 8:
            engine.cancel(job)

    monkeypatch.setattr(Engine, "_take", taken)
    submit(engine, demo[1], job)
    tokens = [job.events.get(timeout=30) for _ in range(8)]
    assert said(ask(engine, demo)) == ANSWER and ANSWER.startswith(said(tokens))
    assert job.events.empty()


def test_a_failure_fails_one_answer(demo, engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    decoding = engine._decoding
    with monkeypatch.context() as patch:
        patch.setattr(NGrams, "draft", lambda *args: 1 / 0)
        failed = submit(engine, demo[1], job_of(demo))
        assert said([failed.events.get(timeout=30)]) == "I"
        assert isinstance(error := failed.events.get(timeout=30), RequestError) and error.status == 500
    assert said(ask(engine, demo)) == ANSWER
    second, step = job_of(demo, "Hello", max_tokens=4), Alone.next
    after_pass(2, lambda: engine.submit(second), monkeypatch)
    monkeypatch.setattr(Alone, "next", lambda self, last: 1 / 0 if last else step(self, last))
    failed = submit(engine, demo[1], job_of(demo))
    assert len(rest(second)) == 4
    events = []
    while not failed.events.empty():
        events.append(failed.events.get())
    assert isinstance(events[-1], RequestError) and engine._decoding is decoding


def test_several_answers_of_a_prompt(demo, engine: Engine, passes) -> None:
    expected = in_batch(engine, demo, choices=2, **SAMPLED)
    passes.clear()
    assert ask(engine, demo, choices=2, **SAMPLED) == expected
    assert {tokens for _, tokens in passes} == {1}


def test_a_schema(demo, engine: Engine, passes, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llguidance")
    model, processor = demo
    matcher = Schemas(processor.tokenizer, model.language_model.args.vocab_size).matcher(SCHEMA)
    for settings in ({}, SAMPLED):
        settings = {**settings, "matcher": matcher}
        expected = in_batch(engine, demo, "Hello", **settings)
        passes.clear()
        assert ask(engine, demo, "Hello", **settings) == expected
        assert len(passes) < len(expected) / 2
        for number in (1, 2):
            second = job_of(demo, "Hello", max_tokens=5)
            with monkeypatch.context() as patch:
                after_pass(number, lambda second=second: engine.submit(second), patch)
                assert ask(engine, demo, "Hello", **settings) == expected
                assert len(rest(second)) == 5
