"""mlx-lm's `stream_generate` with drafts."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import GenerationResponse, generation_stream, wired_limit
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .drafters import Drafter
from .verify import drafted_steps


def stream_generate(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prompt: mx.array,
    drafters: Sequence[Drafter],
    max_tokens: int = 256,
    **kwargs: Any,
) -> Iterator[tuple[GenerationResponse, int]]:
    """Stream an answer like mlx-lm's `stream_generate`.

    Args:
        model: Llama3-V or a Llama.
        tokenizer: mlx-lm's wrapped tokenizer.
        prompt: ids (L,).
        drafters: asked in turn.
        max_tokens: maximum number of tokens; -1: no limit.
        kwargs: see `drafted_steps`.

    Yields:
        mlx-lm's response for each token, and the number of passes through Llama up to it.
    """
    detokenizer, ends = tokenizer.detokenizer, tokenizer.eos_token_ids
    steps = drafted_steps(prompt, model, drafters, max_tokens=max_tokens, eos=ends, **kwargs)
    with wired_limit(model, [generation_stream]):
        tic = time.perf_counter()
        for n, step in enumerate(steps, 1):
            if n == 1:
                prompt_tps = prompt.size / (time.perf_counter() - tic)
                tic = time.perf_counter()
            finish_reason = "stop" if step.token in ends else "length" if n == max_tokens else None
            if finish_reason != "stop":
                detokenizer.add_token(step.token)
            if finish_reason is not None:
                detokenizer.finalize()
            response = GenerationResponse(
                text=detokenizer.last_segment,
                token=step.token,
                logprobs=step.logprobs,
                from_draft=step.from_draft,
                prompt_tokens=prompt.size,
                prompt_tps=prompt_tps,
                generation_tokens=n,
                generation_tps=n / (time.perf_counter() - tic),
                peak_memory=mx.get_peak_memory() / 1e9,
                finish_reason=finish_reason,
            )
            yield response, step.passes
            if finish_reason is not None:
                return
