#!/usr/bin/env bash
# Caption the validation images with the model that finetune.sh has trained: three sampled captions per image.
#
#     DATA=data/cc3m MODEL=output/mistral-7b-clip-lora ./predict.sh --output predictions.json
#
# Further options are passed on to predict.py.
set -euo pipefail
cd "$(dirname "$0")"
DATA=${DATA:-data/cc3m}

python predict.py \
    --model-path "${MODEL:-output/mistral-7b-clip-lora}" \
    --data-path "$DATA/val.json" \
    --image-folder "$DATA/val" \
    --temperature 0.2 \
    --top_p 1.0 \
    --num_beams 1 \
    --trials 3 \
    --max-new-tokens 64 \
    --output predictions.json \
    "$@"
