"""Choose a token from next-token logits: penalties, temperature, top-k, top-p, and one draw per sequence."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from transformers.generation import LogitsProcessor, logits_process

from llava_simplified.data.device_copy import to_device
from llava_simplified.model.generation_options import GenerationOptions
from llava_simplified.prompt import IMAGE_INDEX

# Every sequence has its own random numbers. The seed of their generator is computed only from values that
# identify the sequence. So the tokens of a sequence do not depend on the other sequences in the batch, on
# their order, or on when the sequence joined the batch:
#
#     seed of the request -----+
#     hash of prompt, images --+--> SHA-256 --> torch.Generator of this sequence --> one number per step
#     index of the sample -----+


def prompt_hashes(
    prompts: Sequence[Sequence[int]],
    pixel_values: torch.Tensor | Sequence[torch.Tensor] | None,
) -> list[bytes]:
    """Return a hash of the token ids and images of each prompt. It does not depend on the other prompts.

    Args:
        prompts: Token ids, one IMAGE_INDEX per image.
        pixel_values: uint8 (images, 3, height, width), the images of all prompts in order.
    """
    hashes: list[bytes] = []
    # Share one iterator: each prompt consumes as many images as it has placeholders.
    images = iter(()) if pixel_values is None else iter(pixel_values)
    for prompt in prompts:
        ids = list(prompt)
        digest = hashlib.sha256(repr(ids).encode())
        for image in islice(images, ids.count(IMAGE_INDEX)):
            digest.update(image.cpu().numpy().tobytes())
        hashes.append(digest.digest())
    return hashes


def random_numbers(seed: int | None, prompt_hash: bytes, sample: int) -> Iterator[float]:
    """Return an endless iterator over the random numbers of one sequence, from [0, 1), one per token.

    They are drawn on the host, so they are the same on all devices. On a GPU, separate generators would need
    one kernel launch per sequence and token.

    Args:
        seed: Seed of the request; None draws a seed from torch's global generator.
        prompt_hash: Hash of the prompt and its images, see `prompt_hashes`.
        sample: Index of the sequence among those of the same prompt.
    """
    if seed is None:
        # Draw from torch's global CPU generator, so that `torch.manual_seed` makes this reproducible.
        seed = int(torch.randint(2**62, ()))
    digest = hashlib.sha256(prompt_hash + f"|{seed}|{sample}".encode()).digest()
    number = int.from_bytes(digest[:8], "big")
    generator = torch.Generator()
    # Shift by one bit, since `manual_seed` does not accept all unsigned 64-bit numbers.
    generator.manual_seed(number >> 1)
    return _draw_numbers(generator)


def _draw_numbers(generator: torch.Generator) -> Iterator[float]:
    while True:
        # Draw a block of numbers, because a call takes as long as drawing hundreds of numbers.
        yield from torch.rand(64, generator=generator).tolist()


def process_logits(
    logits: torch.Tensor,
    generated_ids: Sequence[Sequence[int]],
    options: GenerationOptions,
) -> torch.Tensor:
    """Apply repetition penalty, temperature, top-k and top-p, in the order of Transformers.

    Args:
        logits: float32 (rows, vocabulary).
        generated_ids: Token ids that each row has generated so far. All rows must have the same length.
        options: The options, which apply to all rows.

    Returns:
        (rows, vocabulary), -inf for excluded tokens.
    """
    processors: list[LogitsProcessor] = []
    if options.repetition_penalty != 1:
        penalty = float(options.repetition_penalty)
        processors.append(logits_process.RepetitionPenaltyLogitsProcessor(penalty))
    if options.temperature > 0:
        processors.append(logits_process.TemperatureLogitsWarper(float(options.temperature)))
        if options.top_k:
            processors.append(logits_process.TopKLogitsWarper(options.top_k))
        if options.top_p < 1:
            processors.append(logits_process.TopPLogitsWarper(options.top_p))
    # Only the repetition penalty reads the generated tokens.
    ids = torch.empty(len(logits), 0, dtype=torch.long, device=logits.device)
    if options.repetition_penalty != 1:
        ids = to_device(torch.tensor(generated_ids, dtype=torch.long), logits.device)
    for processor in processors:
        logits = processor(ids, logits)
    return logits


def draw(logits: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Draw one token per row, with the row's own random number.

    `torch.multinomial` cannot be used, since it uses one generator for all rows. Instead, each row gets the
    first token at which the cumulative distribution exceeds the row's random number.

    Args:
        logits: (rows, vocabulary).
        numbers: (rows,), from [0, 1).

    Returns:
        Token ids (rows,).
    """
    cumulative = logits.softmax(-1).cumsum(-1)
    # Divide by the last sum. It may be below 1 because of rounding, and a larger random number would get no token.
    cumulative = cumulative / cumulative[:, -1:]
    return torch.searchsorted(cumulative, numbers[:, None], right=True)[:, 0]
