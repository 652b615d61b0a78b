"""Judge found images with Llama3-V by their stored visual tokens, and answer a question about those that match."""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from .features.lookup import FeatureCache
from .features.sources import read_named
from .generation import generate
from .image import ImageError, ImageSource
from .models.llama3v import Model
from .prompt import Processor, Prompt

YES, NO = ("Yes", "yes", "YES", " Yes", " yes"), ("No", "no", "NO", " No", " no")
IMAGE_PROMPT = "What is this image?"
CAPTION, YES_NO = "caption", "yes-no"
MATCH = 0.5  # least match of an image that shows a text


@dataclass(frozen=True)
class Judge:
    """Llama3-V as the judge of whether an image shows what a text says.

    With `YES_NO`, a match is the probability of "yes" against "no", the first token of the answer to the question
    whether the image shows the text. With `CAPTION`, for a model that only describes, it is the geometric mean of the
    probabilities of the text's tokens as the answer to "What is this image?".
    """

    model: Model
    processor: Processor
    features: FeatureCache  # visual tokens, so that an image is encoded once for all questions
    by: str = YES_NO

    def match(self, image: ImageSource, text: str) -> float:
        """Match of an image with a text, from 0 to 1.

        Raises:
            ImageError: if the image is unusable.
            ValueError: if image and text are longer than the context.
        """
        if self.by == YES_NO:
            logprobs = self._logprobs(self._prompt(image, f'Does this image show "{text}"? Answer yes or no.'), [])[0]
            yes, no = self._first_tokens(YES), self._first_tokens(NO)
            # In a small vocabulary both may begin with the same token, which then says nothing.
            yes, no = (mx.logsumexp(logprobs[mx.array(sorted(tokens))]) for tokens in (yes - no, no - yes))
            return mx.sigmoid(yes - no).item()
        # A description begins with a capital letter.
        answer = self.processor.tokenizer.encode(text[:1].upper() + text[1:], add_special_tokens=False)
        logprobs = self._logprobs(self._prompt(image, IMAGE_PROMPT), answer[:-1])
        return mx.exp(mx.take_along_axis(logprobs, mx.array(answer)[:, None], axis=-1).mean()).item()

    def answer(self, image: ImageSource, question: str, max_tokens: int = 256) -> str:
        """Answer a question about an image, greedily."""
        return self._generate(self._prompt(image, question), max_tokens)

    def summarize(self, answers: Sequence[str], question: str, max_tokens: int = 256) -> str:
        """Answer a question from the answers about single images, which the text cites as [1], [2], ….

        Llama3-V was trained on one image a question, so images are asked one by one and only text is combined.
        """
        notes = "\n".join(f"[{i}] {answer}" for i, answer in enumerate(answers, 1))
        prompt = f"Notes about photos:\n{notes}\n\n{question}\nAnswer in one sentence from these notes only, and cite "
        prompt += "the notes used by their numbers in brackets."
        return self._generate(prompt, max_tokens)

    def _generate(self, prompt: str | Prompt, max_tokens: int) -> str:
        options = {"temperature": 0, "repetition_penalty": 1, "max_tokens": max_tokens}
        return generate(self.model, self.processor, prompt, features=self.features, **options)

    def _prompt(self, image: ImageSource, text: str) -> Prompt:
        processor = dataclasses.replace(self.processor, tiler=self.features.tile)
        return processor.encode([{"role": "user", "content": [{"type": "image", "image": image}, text]}])

    def _logprobs(self, prompt: Prompt, answer: Sequence[int]) -> mx.array:
        """Log-probabilities (1 + len(answer), vocab_size) of the token after a prompt and after each of an answer."""
        length, context = len(prompt.ids) + len(answer), self.model.language_model.args.max_position_embeddings
        if context and length > context:
            raise ValueError(f"an image and the text take {length} tokens; the context has {context}")
        grids = [image.grid for image in prompt.images]
        embeddings = self.model.splice(mx.array(prompt.ids), grids, self.features.encode(prompt.images))
        cache = self.model.make_cache()
        if length > 1:  # the logits of all but the last positions are never evaluated
            self.model(mx.array(prompt.ids[:-1])[None], cache, embeddings[None, :-1])
            mx.eval([layer.state for layer in cache])
        logits = self.model(mx.array([prompt.ids[-1], *answer])[None], cache)[0].astype(mx.float32)
        return logits - mx.logsumexp(logits, axis=-1, keepdims=True)

    def _first_tokens(self, words: Sequence[str]) -> set[int]:
        encode = self.processor.tokenizer.encode
        return {encode(word, add_special_tokens=False)[0] for word in words}


def judge_all(judge: Judge, names: Iterable[str], text: str) -> dict[str, float]:
    """Judge images by name; return the match of each, best first, without those that are unusable by now.

    Args:
        judge: the model.
        names: paths, or names of images in archives, see `read_named`.
        text: what an image has to show.
    """
    matches = {}
    for name in names:
        try:
            matches[name] = judge.match(read_named(name), text)
        except (OSError, ImageError):  # deleted or damaged since it was embedded
            continue
    return dict(sorted(matches.items(), key=lambda item: -item[1]))
