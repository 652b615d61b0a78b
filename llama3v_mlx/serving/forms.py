"""Answers in the formats of OpenAI's API, whole and in chunks."""

import uuid
from collections.abc import Iterator

from .jobs import Job, Logprob, Token


class Form:
    """Answer in OpenAI's format."""

    kind = chunk_kind = prefix = ""
    name, created = "", 0

    def __init__(self, request):
        self.request = request
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"

    def head(self, kind: str) -> dict:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.name}


class Chat(Form):
    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def choice(self, index: int, tokens: list[Token]) -> dict:
        message = {"role": "assistant", "content": "".join(token.text for token in tokens), "refusal": None}
        finish = tokens[-1].finish_reason
        return {"index": index, "message": message, "logprobs": self._logprobs(tokens), "finish_reason": finish}

    def chunks(self, token: Token, first: bool) -> Iterator[dict]:
        """Chunks of a token: the role comes with the first one, the finish reason in a chunk of its own."""
        start = {"role": "assistant"} if first else {}
        if first or token.text or token.logprob:
            delta = start | {"content": token.text}
            logprobs = self._logprobs([token])
            yield {"index": token.choice, "delta": delta, "logprobs": logprobs, "finish_reason": None}
        if token.finish_reason:
            yield {"index": token.choice, "delta": {}, "logprobs": None, "finish_reason": token.finish_reason}

    def _logprobs(self, tokens: list[Token]) -> dict | None:
        if not self.request.logprobs:
            return None
        content = [
            {**_as_json(token.logprob), "top_logprobs": list(map(_as_json, token.top_logprobs))} for token in tokens
        ]
        return {"content": content, "refusal": None}


class Completion(Form):
    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def __init__(self, request):
        super().__init__(request)
        self._offsets: dict[int, int] = {}  # characters of each choice so far

    def choice(self, index: int, tokens: list[Token]) -> dict:
        text = "".join(token.text for token in tokens)
        finish = tokens[-1].finish_reason
        return {"index": index, "text": text, "logprobs": self._logprobs(tokens), "finish_reason": finish}

    def chunks(self, token: Token, first: bool) -> Iterator[dict]:
        if token.text or token.finish_reason or token.logprob:
            yield self.choice(token.choice, [token])

    def _logprobs(self, tokens: list[Token]) -> dict | None:
        if self.request.logprobs is None:
            return None
        found = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token in tokens:
            offset = self._offsets.get(token.choice, 0)
            self._offsets[token.choice] = offset + len(token.text)
            found["tokens"].append(token.logprob.text)
            found["token_logprobs"].append(token.logprob.logprob)
            found["top_logprobs"].append({each.text: each.logprob for each in token.top_logprobs})
            found["text_offset"].append(offset)
        return found


def _as_json(logprob: Logprob) -> dict:
    whole = "\ufffd" not in logprob.text
    of_bytes = list(logprob.text.encode()) if whole else None
    return {"id": logprob.token, "token": logprob.text, "logprob": logprob.logprob, "bytes": of_bytes}


def usage_of(job: Job, completion_tokens: int) -> dict:
    prompt_tokens = len(job.prompt.ids)
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    usage["total_tokens"] = prompt_tokens + completion_tokens
    return usage | {"prompt_tokens_details": {"cached_tokens": job.cached}}
