"""Exercise 5: several captions of one image share its prompt.

Task: five captions of one image are usually five sequences, each with its own copy of the image tokens. Compute
the image and the prompt once, and append all captions. Each caption may attend to the prompt and to itself only, and
its positions continue after the prompt. Loss and gradients must be exactly those of separate sequences.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from common import llava, new_model, parse, read_records

# ---- solution ----


def share_prefix(sequences: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    """Join sequences with the same prompt.

    Returns:
        input_ids (1, L), position_ids (1, L), mask (1, 1, L, L), positions (T,) and targets (T,).
    """
    prompt_length = sequences[0][1].count(llava.IGNORE)
    ids = sequences[0][0][:prompt_length]
    branches = [0] * prompt_length  # 0 is the prompt, n the n-th caption
    position_ids = list(range(prompt_length))
    positions: list[int] = []  # where a token is predicted
    targets: list[int] = []
    for number, (sequence, _) in enumerate(sequences, start=1):
        answer = sequence[prompt_length:]
        # The first token of every caption is predicted at the last position of the prompt: labels that are
        # shifted by one could not express that.
        positions.append(prompt_length - 1)
        positions += range(len(ids), len(ids) + len(answer) - 1)
        targets += answer
        ids += answer
        branches += [number] * len(answer)
        position_ids += range(prompt_length, prompt_length + len(answer))

    branch = torch.tensor(branches)
    index = torch.arange(len(ids))
    causal = index[:, None] >= index  # the row attends to the column
    same_branch = branch[:, None] == branch
    key_in_prompt = branch == 0
    return {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.tensor([position_ids]),
        "mask": (causal & (same_branch | key_in_prompt))[None, None],
        "positions": torch.tensor(positions),
        "targets": torch.tensor(targets),
    }


def shared_loss(model, sequences, features: torch.Tensor) -> torch.Tensor:
    """Return the mean loss over all captions of one image, features (1, N, C)."""
    batch = share_prefix(sequences)
    inputs = model.splice(batch["input_ids"], features)
    # The eager attention adds its mask to the scores: 0 where it attends, the lowest number elsewhere.
    mask = torch.zeros(batch["mask"].shape, dtype=inputs.dtype)
    mask = mask.masked_fill(~batch["mask"], torch.finfo(inputs.dtype).min)
    hidden = model.language_model.base_model(
        inputs_embeds=inputs,
        attention_mask=mask,
        position_ids=batch["position_ids"],
        use_cache=False,
    ).last_hidden_state
    logits = model.language_model.get_output_embeddings()(hidden[0, batch["positions"]])
    return F.cross_entropy(logits, batch["targets"])


def main(argv: list[str] | None = None) -> None:
    """Compare loss and gradients with those of separate sequences, in float32."""
    args = parse(argv, __doc__)
    model = new_model(args)
    llava.add_lora(model, rank=16, alpha=32)
    records = read_records(args)
    image = Path(args.images) / records[0]["image"]
    features = model.encode_images(llava.load_image(image, model.processor)[None])
    captions = [record["response"] for record in records[:5]]
    sequences = []
    for caption in captions:
        record = {**records[0], "response": caption}
        sequences.append(llava.make_sequence(model.tokenizer, record, features.shape[1]))

    # The file computes LoRA, projector and loss in float32, so that is how exact the comparison can be.
    model.float()
    features = features.float()
    gradients = {}
    losses = {}
    for name in ("separate", "shared"):
        model.zero_grad()
        if name == "shared":
            loss = shared_loss(model, sequences, features)
        else:
            tensors = llava.collate(sequences, model.tokenizer.eos_token_id)
            loss = model(*tensors, features.repeat(len(sequences), 1, 1))
        loss.backward()
        losses[name] = loss.item()
        trained = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        gradients[name] = torch.cat(trained)
        print(f"{name}: loss {losses[name]:.6f}, norm of the gradient {gradients[name].norm():.6f}")
    length = max(len(ids) for ids, _ in sequences)
    shared_length = len(share_prefix(sequences)["input_ids"][0])
    print(f"positions: {len(sequences) * length} separate, {shared_length} shared")

    assert abs(losses["separate"] - losses["shared"]) < 1e-5
    difference = (gradients["separate"] - gradients["shared"]).norm()
    assert difference < 1e-4 * gradients["separate"].norm()
    assert shared_length < len(sequences) * length


if __name__ == "__main__":
    main()
