#!/usr/bin/env bash
# Train Mistral-7B-Instruct with CLIP ViT-B/16 on Conceptual Captions.
#
#     DATA=data/cc3m GPUS=8 ./finetune.sh --num_train_epochs 2
#
# DATA: folder with train.json, val.json, train/ and val/, as docs/data.md makes them. GPUS: number of GPUs on this machine.
# Further options are passed on to train.py.
set -euo pipefail
cd "$(dirname "$0")"
DATA=${DATA:-data/cc3m}
launcher=(python)
[ "${GPUS:-1}" -gt 1 ] && launcher=(deepspeed --num_gpus "$GPUS")
engine=()
[ "${GPUS:-1}" -gt 1 ] && engine=(--deepspeed ds_configs/config_zero2.json)

"${launcher[@]}" train.py "${engine[@]}" \
    --model_name_or_path mistralai/Mistral-7B-Instruct-v0.1 \
    --vision_tower openai/clip-vit-base-patch16 \
    --train_data_path "$DATA/train.json" \
    --eval_data_path "$DATA/val.json" \
    --train_image_folder "$DATA/train" \
    --val_image_folder "$DATA/val" \
    --mm_vision_select_layer -1 \
    --mm_vision_select_feature patch \
    --mm_use_im_start_end False \
    --mm_use_im_patch_token False \
    --bf16 True \
    --output_dir output/mistral-7b-clip-lora \
    --num_train_epochs 1 \
    --per_device_train_batch_size 16 \
    --per_device_eval_batch_size 4 \
    --gradient_accumulation_steps 1 \
    --learning_rate 2e-4 \
    --weight_decay 0. \
    --warmup_ratio 0.03 \
    --lr_scheduler_type cosine \
    --tf32 True \
    --model_max_length 64 \
    --gradient_checkpointing True \
    --dataloader_num_workers 4 \
    --lazy_preprocess True \
    --lora_enable True \
    --lora_r 64 \
    --lora_alpha 16 \
    --lora_dropout 0.05 \
    --report_to none \
    --logging_steps 10 \
    --evaluation_strategy steps \
    --eval_steps 500 \
    --save_strategy steps \
    --save_steps 500 \
    --save_total_limit 2 \
    "$@"
