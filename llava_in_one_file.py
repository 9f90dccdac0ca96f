"""LLaVA ("Visual Instruction Tuning", Liu et al., 2023) in one file: a language model describes images.

A vision model (the "vision tower") turns an image into a grid of feature vectors. One matrix (the projector)
maps each to a vector of the size of a word embedding, an "image token". The prompt has a placeholder for each
image token, and the language model processes image tokens as if they were words. Both models are pretrained
and stay frozen. Only the projector and a small LoRA adapter inside the language model are trained.

    image  --> vision tower --> features --> projector --> image tokens ---+
               frozen           (B, N, C)    trained       (B, N, D)       |  splice
                                                                           v
    prompt --> tokenizer --> input ids --> embedding table --> embeddings (B, L, D)
                             (B, L)        frozen                          |
                                                                           v
                       caption <-- logits <-- language model (frozen, with a trained LoRA adapter)

Shapes: B images in a batch, N image tokens per image, C channels of a feature, L tokens in a sequence, D size
of a word embedding, V tokens in the vocabulary, T tokens that count in the loss. With CLIP ViT-B/16 and
Mistral-7B: N = 196, C = 768, D = 4096, V = 32000. "The package" is llava_simplified, which does the same at
scale and loads the same checkpoints. To train on your own images and captions:

    python llava_in_one_file.py --data records.json --images DIR --language_model DIR --vision_tower DIR
"""

import argparse
import functools
import json
import math
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from transformers import AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_utils import load_state_dict as load_safetensors
from transformers.modeling_utils import safe_save_file as save_safetensors


# ---- 1. Records ----
def read_records(path):
    """Read a JSON list of {"image": "cat.jpg", "instruction": "What is this?", "response": "a cat"}."""
    records = json.loads(Path(path).read_text(encoding="utf-8"))
    for number, record in enumerate(records):
        missing = {"image", "instruction", "response"} - record.keys()
        if missing:
            raise ValueError(f"{path}: record {number} has no {', '.join(sorted(missing))}")
    return records


# ---- 2. Image to tensor ----
def load_image(path, processor):
    """Read an image file into a float32 tensor (3, height, width), the input of the vision tower."""
    # Trap: phones store photos sideways, with an EXIF tag that says how to rotate them.
    image = ImageOps.exif_transpose(Image.open(path)).convert("RGBA")
    # Trap: transparent pixels have a color too, usually black. Put them on white, as browsers do.
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)  # a writable copy
    pixels = pixels.view(image.height, image.width, 3).permute(2, 0, 1)  # (3, height, width)
    # Resize and normalize as in the training of the vision tower. `processor` only tells us how, from
    # preprocessor_config.json. Other values raise no error, but captions get worse.
    size = processor.size
    if size.get("shortest_edge"):  # CLIP: keep the aspect ratio, and cut out the center below
        shorter = min(image.size)
        height = size["shortest_edge"] * image.height // shorter
        width = size["shortest_edge"] * image.width // shorter
    else:  # SigLIP, EfficientNet: stretch the image to a square
        height, width = size["height"], size["width"]
    mode = Image.Resampling(processor.resample).name.lower()  # "bilinear" or "bicubic"
    # Without antialiasing, shrinking would skip most pixels, and edges would become jagged.
    pixels = F.interpolate(pixels[None], (height, width), mode=mode, antialias=True)[0]
    if getattr(processor, "do_center_crop", False):
        rows, columns = processor.crop_size["height"], processor.crop_size["width"]
        top, left = (height - rows) // 2, (width - columns) // 2
        pixels = pixels[:, top : top + rows, left : left + columns]
    mean, std = torch.tensor([processor.image_mean, processor.image_std]).view(2, 3, 1, 1)
    return (pixels.float() / 255 - mean) / std


# ---- 3. Prompt and labels ----
# A training sequence. The label of a token is its id if the model should learn to generate it, else IGNORE:
#
#     input ids   <s>  image image ... image  \n  What  is  this  ?  \n  a  cat  </s>
#     labels       .     .     .         .    .    .    .    .    .  .   a  cat  </s>      "." is IGNORE
#
# Only the answer and its end token count in the loss. Without the end token, captions would never stop. If
# the prompt counted too, the loss would be lower, since prompts are soon memorized, but captions no better.
IGNORE = -100  # the label of a token that does not count in the loss
IMAGE = -200  # the id that stands for an image token; no vocabulary contains it


def encode(tokenizer, text):
    """Return the token ids of a text in the middle of a sequence."""
    # Trap: many tokenizers begin every text with a BOS token ("<s>"), and some with a space. BOS can be turned
    # off. To avoid the space, put some other token before the text, and drop its id.
    return tokenizer(tokenizer.eos_token + text, add_special_tokens=False).input_ids[1:]


def make_prompt(tokenizer, instruction, num_image_tokens):
    """Return the token ids before the answer: one BOS token, the image, the instruction."""
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]  # Qwen has none
    return bos + [IMAGE] * num_image_tokens + encode(tokenizer, f"\n{instruction}\n")


def make_sequence(tokenizer, record, num_image_tokens):
    """Return the input ids and the labels of one record, two lists of the same length L."""
    if not record["response"].strip():
        raise ValueError(f"{record['image']}: the response is empty")
    prompt = make_prompt(tokenizer, record["instruction"], num_image_tokens)
    # Trap: encoded together, the end of the prompt and the beginning of the answer could become one token,
    # which is not there when a caption is generated. So encode the answer separately. Older Llama tokenizers
    # add a space in `encode` too, but not after a newline. So put one before the answer, and drop its ids.
    newline = encode(tokenizer, "\n")
    answer = encode(tokenizer, "\n" + record["response"])[len(newline) :]
    answer = [*answer, tokenizer.eos_token_id]
    return prompt + answer, [IGNORE] * len(prompt) + answer


def collate(sequences, pad_id):
    """Pad sequences on the right: return input ids, labels and attention mask, each (B, L)."""
    ids = [torch.tensor(ids) for ids, _ in sequences]
    labels = [torch.tensor(labels) for _, labels in sequences]
    mask = [torch.ones_like(row) for row in ids]
    pad = functools.partial(nn.utils.rnn.pad_sequence, batch_first=True)
    # Padding on the right shifts no positions. The mask hides it from attention, and IGNORE from the loss.
    return pad(ids, padding_value=pad_id), pad(labels, padding_value=IGNORE), pad(mask)


# ---- 4. The model: vision tower, projector, splice, loss ----
class Llava(nn.Module):
    """A vision tower and a language model, joined by a projector. See `main` for the settings."""

    def __init__(self, settings):
        super().__init__()
        self.settings = settings
        dtype = getattr(torch, settings["dtype"])
        language_model, vision_tower = settings["language_model"], settings["vision_tower"]
        self.tokenizer = AutoTokenizer.from_pretrained(language_model)
        self.language_model = AutoModelForCausalLM.from_pretrained(language_model, dtype=dtype)
        # Compute attention as plain matrix products: the fastest on a CPU for such short sequences.
        self.language_model.set_attn_implementation("eager")
        self.processor = AutoImageProcessor.from_pretrained(vision_tower, backend="pil")
        tower = AutoModel.from_pretrained(vision_tower, dtype=dtype)
        self.vision_tower = getattr(tower, "vision_model", tower)  # CLIP has a model for texts too
        # Freeze both, in eval mode (no dropout). The projector and LoRA, added later, stay trainable.
        self.requires_grad_(False).eval()
        self.projector = None  # see `new_projector`

    @torch.no_grad()
    def encode_images(self, pixels):
        """Run the vision tower: pixels (B, 3, height, width) -> features (B, N, C)."""
        pixels = pixels.to(self.vision_tower.device, self.vision_tower.dtype)
        outputs = self.vision_tower(pixels, output_hidden_states=True)
        # A vision transformer cuts the image into patches (CLIP ViT-B/16: 14 x 14), and each layer returns
        # a vector per patch. LLaVA uses the second-to-last layer: CLIP's last one has lost details.
        layer = self.settings["mm_vision_select_layer"]
        features = outputs.hidden_states[layer]
        if features.dim() == 4:
            # A convolutional network returns maps (B, C, rows, columns): each location becomes a token.
            if layer == -1:  # EfficientNet's hidden states lack its last map
                features = outputs.last_hidden_state
            features = features.flatten(2).transpose(1, 2)
        # Drop tokens before the square grid, such as a CLS token: (B, 1 + 196, C) -> (B, 196, C).
        side = math.isqrt(features.shape[1])  # 14, from 196 or 197
        features = features[:, -(side**2) :]
        pool = self.settings["mm_token_pool"]
        if pool:
            # Average the grid to pool x pool. Fewer tokens are faster, but have fewer details.
            grid = features.transpose(1, 2).unflatten(2, (side, side))  # (B, C, side, side)
            features = F.adaptive_avg_pool2d(grid, pool).flatten(2).transpose(1, 2)
        return features

    def splice(self, input_ids, features):
        """Token ids (B, L) and features (B, N, C) -> the input of the language model (B, L, D)."""
        is_image = input_ids == IMAGE
        # The embedding table has no row -200. Use row 0 instead; it is overwritten below.
        embedding_table = self.language_model.get_input_embeddings()
        embeddings = embedding_table(input_ids.masked_fill(is_image, 0))
        image_tokens = self.projector(features.float())  # (B, N, C) -> (B, N, D)
        # This is where the image enters: its tokens replace the placeholders, in order.
        return embeddings.masked_scatter(is_image[..., None], image_tokens.to(embeddings.dtype))

    def forward(self, input_ids, labels, attention_mask, features):
        """Return the loss of a batch: the mean over the T tokens that have a label."""
        embeddings = self.splice(input_ids, features)
        # `base_model` is transformers' name for a language model without its lm_head, which follows below.
        outputs = self.language_model.base_model(
            inputs_embeds=embeddings, attention_mask=attention_mask, use_cache=False
        )
        # The output at position i predicts the token at i + 1. So the first token of the answer is
        # predicted at the last position of the prompt, and the last output has no target:
        #     input      ...  this  ?   \n   a    cat   </s>
        #     target      .    .    .   a    cat  </s>            (the labels, shifted by one)
        targets = labels[:, 1:]
        in_loss = targets != IGNORE  # (B, L - 1)
        hidden = outputs.last_hidden_state[:, :-1][in_loss]  # (B, L, D) -> (T, D)
        # The lm_head computes a number for each of V tokens. Only T positions need that. The others (over
        # 90% of a sequence with an image) are left out, which saves much time and memory.
        logits = self.language_model.get_output_embeddings()(hidden)  # (T, V)
        return F.cross_entropy(logits.float(), targets[in_loss])  # bfloat16 is too imprecise here


@torch.no_grad()
def new_projector(features, embeddings):
    """Return a projector whose outputs for features (images, N, C) are as large as embeddings (V, D)."""
    # The outputs of a random matrix may be far larger or smaller. Then the first few hundred training steps
    # would do nothing but correct that.
    features, embeddings = features.flatten(0, 1).float(), embeddings.float()
    projector = nn.Linear(features.shape[1], embeddings.shape[1], device=features.device)
    # Standardize the channels, in W and b: W (f - mean) / std + b = (W / std) f + (b - (W / std) mean).
    std = features.std(0)  # (C,)
    typical_std = std.median() if std.median() > 0 else std.mean()  # most channels may be constant
    projector.weight /= std.clamp_min(0.1 * typical_std)  # do not amplify channels that hardly vary
    projector.bias -= projector.weight @ features.mean(0)
    scale = embeddings.std() / projector(features).std()
    projector.weight *= scale
    projector.bias *= scale
    return projector


# ---- 5. LoRA: train two small matrices instead of a large one (Hu et al., 2021) ----
# A linear layer multiplies by a frozen matrix W. LoRA adds the product of two small trained matrices:
#
#     y = W x + (alpha / rank) B A x        W (out, in)    A (rank, in)    B (out, rank)
#
# For 4096 x 4096 and rank 16, A and B have 0.8% as many numbers as W. B starts at zero: at first, y = W x.
class LoraLinear(nn.Module):
    """A frozen linear layer with a trained low-rank update."""

    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.linear = linear
        # Use float32 even if the frozen weights are bfloat16, which would round small updates away.
        self.lora_A = nn.Linear(linear.in_features, rank, bias=False, device=linear.weight.device)
        self.lora_B = nn.Linear(rank, linear.out_features, bias=False, device=linear.weight.device)
        nn.init.zeros_(self.lora_B.weight)
        self.scale = alpha / rank

    def forward(self, x):
        output = self.linear(x)
        update = self.lora_B(self.lora_A(x.float())) * self.scale
        return (output + update).to(output.dtype)


def add_lora(model, rank, alpha):
    """Put LoRA on all linear layers but the lm_head, which is often tied to the embedding table."""
    language_model = model.language_model
    lm_head = language_model.get_output_embeddings()
    names = []
    for name, module in list(language_model.named_modules()):
        if isinstance(module, nn.Linear) and module is not lm_head:
            language_model.set_submodule(name, LoraLinear(module, rank, alpha))
            names.append(name)
    if not names:
        raise ValueError("LoRA needs nn.Linear layers; this language model, like GPT-2, has none")
    # The checkpoint stores the settings with the names of PEFT, the usual library for adapters.
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": names}
    model.adapter_config = config


# ---- 6. Training ----
def make_batches(records, batch_size):
    """Yield batches of records forever, in a new random order in each epoch."""
    while True:
        order = random.sample(records, len(records))
        for start in range(0, len(order), batch_size):
            yield order[start : start + batch_size]


def look_up_features(model, names, folder, feature_cache):
    """Return the features (B, N, C) of image files. Those that are not in the cache are computed."""
    # The tower is frozen, so it returns the same features in every epoch: run it once per image. With CLIP
    # ViT-B/16, a thousand images take 300 MB of memory in bfloat16. For millions, use a disk instead.
    missing = [name for name in names if name not in feature_cache]
    if missing:
        pixels = [load_image(Path(folder) / name, model.processor) for name in missing]
        feature_cache.update(zip(missing, model.encode_images(torch.stack(pixels))))
    return torch.stack([feature_cache[name] for name in names])


def learning_rate(step, steps, warmup, peak):
    """Rise from 0 for `warmup` steps, as the first gradients are unreliable; then fall along a cosine."""
    if step < warmup:
        return peak * step / warmup
    progress = (step - warmup) / (steps - warmup)
    return peak * (1 + math.cos(math.pi * progress)) / 2


def train(model, batches, folder, feature_cache, steps, warmup, peak_rate):
    """Train all parameters that have `requires_grad`, and yield the loss of each step."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    for step, records in zip(range(steps), batches):
        features = look_up_features(model, [r["image"] for r in records], folder, feature_cache)
        sequences = [make_sequence(model.tokenizer, r, features.shape[1]) for r in records]
        tensors = collate(sequences, pad_id=model.tokenizer.eos_token_id)
        loss = model(*(tensor.to(features.device) for tensor in tensors), features)
        # The gradient flows back through all frozen layers. It is kept for LoRA and the projector only.
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)  # one odd batch must not ruin the weights
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, warmup, peak_rate)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


# ---- 7. Save and load what was trained. The frozen models are stored by name only. ----
def adapter_weights(model):
    """Return the LoRA weights with the names of PEFT: ours with the prefix "base_model.model."."""
    weights = model.language_model.state_dict()
    return {f"base_model.model.{name}": w for name, w in weights.items() if "lora_" in name}


def save(model, folder):
    """Write a checkpoint. It loads with `load`, or with `Llava.from_pretrained` of the package."""
    (folder / "adapter").mkdir(parents=True, exist_ok=True)
    save_safetensors(adapter_weights(model), folder / "adapter" / "adapter_model.safetensors")
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(model.adapter_config))
    save_safetensors(model.projector.state_dict(), folder / "projector.safetensors")
    # The package needs all of the following files. `load` needs only the settings in llava.json.
    model.tokenizer.save_pretrained(folder)
    model.processor.save_pretrained(folder)
    config = {"format_version": 2, "architecture": model.settings, "trained": "adapter"}
    (folder / "llava.json").write_text(json.dumps(config, indent=2))


def load(folder):
    """Load a checkpoint of this file, or one of the package with the same choices, on the CPU."""
    config = json.loads((folder / "llava.json").read_text())
    settings = config["architecture"]
    adapter_config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    # The package has more settings. With other values than these, this file would compute something else.
    supported = {"template": "bare", "mm_projector_type": "linear", "image_aspect_ratio": "crop"}
    supported |= {"mm_vision_select_feature": "patch", "bits": 16, "trained_tower": "off"}
    supported |= {"use_rslora": False, "use_dora": False, "rank_pattern": {}, "alpha_pattern": {}}
    found = {**config, **settings, **adapter_config}
    for name, value in supported.items():
        if found.get(name, value) != value:
            raise ValueError(f"{folder}: {name} is {found[name]}; this file supports only {value}")
    model = Llava(settings)
    projector = load_safetensors(folder / "projector.safetensors")
    model.projector = nn.Linear(*reversed(projector["weight"].shape))  # the weight is (D, C)
    model.projector.load_state_dict(projector)
    add_lora(model, adapter_config["r"], adapter_config["lora_alpha"])
    adapter = load_safetensors(folder / "adapter" / "adapter_model.safetensors")
    # Trap: the adapter lacks the frozen weights, so we need `strict=False`, which ignores wrong names too.
    if adapter.keys() != adapter_weights(model).keys():
        raise ValueError(f"{folder}: the adapter does not match {settings['language_model']}")
    adapter = {name.removeprefix("base_model.model."): w for name, w in adapter.items()}
    model.language_model.load_state_dict(adapter, strict=False)
    return model


# ---- 8. Captions ----
# In each layer, a token attends to itself and the tokens before it, through their keys and values. These do
# not change when more tokens follow, so they are computed once and kept in the KV cache:
#
#     pass   input of the language model       KV cache afterward             generated
#     1      <s> image ... image \n ... ? \n   <s> image ... ? \n             a
#     2      a                                 <s> image ... ? \n a           cat
#     3      cat                               <s> image ... ? \n a cat       </s>
#
# The first pass is the only one that processes the image. Each later pass has a single new token as input.
@torch.inference_mode()
def caption(model, path, instruction, temperature=0.0, max_new_tokens=32):
    """Describe an image: greedily (temperature 0: always the most likely token), or by sampling."""
    tokenizer, language_model = model.tokenizer, model.language_model
    features = model.encode_images(load_image(path, model.processor)[None])  # (1, N, C)
    # Use an instruction of the training data, character for character. Others make captions worse.
    prompt = make_prompt(tokenizer, instruction, features.shape[1])
    inputs = model.splice(torch.tensor([prompt], device=features.device), features)  # (1, L, D)
    kv_cache, generated = None, []
    while len(generated) < max_new_tokens:
        # No padding, so no mask. Positions follow from the cache.
        outputs = language_model(inputs_embeds=inputs, past_key_values=kv_cache, use_cache=True)
        kv_cache = outputs.past_key_values
        logits = outputs.logits[0, -1].float()  # (V,), for the next token
        if temperature == 0:
            token = logits.argmax()
        else:
            # A low temperature makes likely tokens even more likely, a high one evens them out.
            token = torch.multinomial((logits / temperature).softmax(-1), 1)
        if token == tokenizer.eos_token_id:
            break
        generated.append(int(token))
        inputs = language_model.get_input_embeddings()(token.view(1, 1))  # (1, 1, D)
    return tokenizer.decode(generated).strip()


# ---- 9. All together ----
def main(argv=None):
    """Train, save a checkpoint (`load` it to caption more later), and caption held-out images."""
    parser = argparse.ArgumentParser(description="Train LLaVA, save it, and caption some images.")
    parser.add_argument("--data", required=True, help="JSON file of records")
    parser.add_argument("--images", required=True, help="folder of the images")
    parser.add_argument("--language_model", required=True, help="folder, or name on the hub")
    parser.add_argument("--vision_tower", required=True, help="folder, or name on the hub")
    parser.add_argument("--output", type=Path, default=Path("output/one-file"))
    parser.add_argument("--layer", type=int, default=-2, help="layer of the vision tower")
    parser.add_argument("--pool", type=int, default=0, help="average to POOL x POOL image tokens")
    parser.add_argument("--dtype", default="bfloat16", help="frozen weights: bfloat16 or float32")
    parser.add_argument("--projector_steps", type=int, default=60, help="steps of stage 1")
    parser.add_argument("--steps", type=int, default=300, help="steps of stage 2")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate")
    args = parser.parse_args(argv)
    records = read_records(args.data)
    random.seed(0)
    random.shuffle(records)
    if len(records) < 9:
        parser.error(f"--data: {args.data} has {len(records)} records; at least 9 are needed")
    held_out, records = records[:8], records[8:]  # no image may be in both
    # The names of the package's checkpoints; some are LLaVA's ("mm" is multimodal).
    settings = {
        "language_model": args.language_model,
        "vision_tower": args.vision_tower,
        "mm_projector_type": "linear",  # one matrix; this file knows no other type
        "mm_vision_select_layer": args.layer,  # -1 is the last one
        "mm_token_pool": args.pool,  # 0 keeps all tokens
        "template": "bare",  # the prompt of `make_prompt`, without roles such as "USER:"
        "instruction": records[0]["instruction"],  # the default of the package's `caption`
        "dtype": args.dtype,  # dtype of the frozen weights
    }
    torch.manual_seed(0)
    model = Llava(settings).to("cuda" if torch.cuda.is_available() else "cpu")
    feature_cache = {}
    names = [record["image"] for record in records[:64]]  # enough for `new_projector`
    features = look_up_features(model, names, args.images, feature_cache)
    model.projector = new_projector(features, model.language_model.get_input_embeddings().weight)
    # Two stages, as in LLaVA: first the projector alone, then also the language model (here by LoRA; the paper
    # trained all of it). Trained from the start, LoRA would only learn to cope with meaningless image tokens.
    batches = make_batches(records, args.batch_size)
    for stage, steps in (("projector", args.projector_steps), ("projector + LoRA", args.steps)):
        if "LoRA" in stage:
            add_lora(model, rank=16, alpha=32)
        losses = train(model, batches, args.images, feature_cache, steps, steps // 20, args.rate)
        for step, loss in enumerate(losses, start=1):  # each iteration trains one step
            if step % 10 == 0:
                print(f"{stage}: step {step} of {steps}, loss {loss:.3f}", flush=True)
    save(model, args.output)
    for record in held_out:
        path, instruction = Path(args.images) / record["image"], record["instruction"]
        print(f"{record['image']}\n    reference: {record['response']}")
        print(f"    greedy:    {caption(model, path, instruction)}")
        print(f"    sampled:   {caption(model, path, instruction, temperature=0.7)}")


if __name__ == "__main__":
    main()
