"""Exercise 4: pool tokens without losing anything.

Task: averaging 2 x 2 neighboring tokens loses three quarters of the numbers. Concatenate their channels instead
(SmolVLM and InternVL call this "pixel shuffle"): a quarter of the tokens, each with four times the channels. Why does this
cost almost no time, although no number is lost?
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from common import llava, new_model, parse, read_records, train

# ---- solution ----


class ShuffledLlava(llava.Llava):
    """A Llava whose image tokens are squares of 2 x 2 patches."""

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, height, width) -> features (B, N / 4, 4 C)."""
        features = super().encode_images(pixels)
        side = math.isqrt(features.shape[1])
        grid = features.transpose(1, 2).unflatten(2, (side, side))  # (B, C, side, side)
        # An odd side (7 x 7) gets one more row and column of zeros.
        grid = F.pad(grid, (0, side % 2, 0, side % 2))
        # Each square of 2 x 2 locations becomes one location with four times the channels.
        return F.pixel_unshuffle(grid, 2).flatten(2).transpose(1, 2)


def main(argv: list[str] | None = None) -> None:
    """Compare shapes and losses with and without the shuffle."""
    args = parse(argv, __doc__)
    plain, shuffled = new_model(args), new_model(args, ShuffledLlava)
    names = [record["image"] for record in read_records(args)[:2]]
    before = llava.look_up_features(plain, names, args.images, {})
    after = llava.look_up_features(shuffled, names, args.images, {})
    print(f"features {tuple(before.shape)} -> {tuple(after.shape)}")
    assert after.shape[1] == math.ceil(math.isqrt(before.shape[1]) / 2) ** 2
    assert after.shape[2] == 4 * before.shape[2]
    # The mean over the four parts is what averaging would have kept: everything else is new.
    side = math.isqrt(before.shape[1])
    if side % 2 == 0:
        grid = before.transpose(1, 2).unflatten(2, (side, side)).float()
        averaged = F.avg_pool2d(grid, 2).flatten(2).transpose(1, 2)
        parts = after.float().unflatten(2, (before.shape[2], 4))
        torch.testing.assert_close(parts.mean(3), averaged, atol=1e-2, rtol=1e-2)

    # Time goes into the language model, whose sequences are shorter. The projector is wider, but it is one matrix.
    for name, model in (("plain", plain), ("shuffled", shuffled)):
        losses = train(model, args)
        print(f"{name}: loss {losses[0]:.2f} at the beginning, {losses[-1]:.2f} at the end")
        assert losses[-1] < losses[0]


if __name__ == "__main__":
    main()
