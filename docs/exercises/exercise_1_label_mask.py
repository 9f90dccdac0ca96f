"""Exercise 1: break the label mask, and see the loss lie.

Task: change `make_sequence` so that the prompt counts in the loss too. Train both models for the same number of steps.
Which one has the lower loss? Which one is better at what it should learn, the answers?
"""

from __future__ import annotations

import argparse
from unittest.mock import patch

import torch
from common import llava, new_model, parse, read_records, train

# ---- solution ----

correct_make_sequence = llava.make_sequence


def broken_make_sequence(tokenizer, record, num_image_tokens):
    """Return labels for all tokens except the image's, which are in no vocabulary."""
    ids, _ = correct_make_sequence(tokenizer, record, num_image_tokens)
    labels = [llava.IGNORE if token == llava.IMAGE else token for token in ids]
    return ids, labels


@torch.no_grad()
def answer_loss(model, args: argparse.Namespace) -> float:
    """Return the loss of the answers alone, with the correct labels."""
    records = read_records(args)[: 2 * args.batch_size]
    features = llava.look_up_features(model, [r["image"] for r in records], args.images, {})
    sequences = [correct_make_sequence(model.tokenizer, r, features.shape[1]) for r in records]
    tensors = llava.collate(sequences, model.tokenizer.eos_token_id)
    return model(*tensors, features).item()


def main(argv: list[str] | None = None) -> None:
    """Train with correct and with broken labels, and compare the losses."""
    args = parse(argv, __doc__)
    reported, answer_losses = {}, {}
    for name, make_sequence in (
        ("correct", correct_make_sequence),
        ("broken", broken_make_sequence),
    ):
        model = new_model(args)
        llava.add_lora(model, rank=16, alpha=32)
        with patch.object(llava, "make_sequence", make_sequence):
            reported[name] = train(model, args)[-1]
        answer_losses[name] = answer_loss(model, args)
        print(
            f"{name} labels: reported loss {reported[name]:.2f}, loss of the answers {answer_losses[name]:.2f}"
        )

    # The broken run reports a lower loss: the prompt is the same in every sample, soon memorized, and part
    # of the average. The loss of its answers is higher than what it reports.
    assert reported["broken"] < reported["correct"]
    assert reported["broken"] < answer_losses["broken"]


if __name__ == "__main__":
    main()
