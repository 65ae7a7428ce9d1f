# What was run on 2 x H100 (but for pieces.py and mlp.py), from the repository's root; PEER: train_gpt2.py of modded-nanogpt's record of
# 2024-10-14. Given as one list here; it was run in three parts, on three machines (README.md).
set -e
PEER=$1
python data/python_source/prepare.py --roots=stdlib,site-packages --tokenizer=gpt2 --format=shards
ours="--dataset=python_source --val_tokens=262144 --device_batch_size=64"

# two GPUs, 128 sequences each
torchrun --standalone --nproc_per_node=2 train_gpt.py $ours --batch_size=256 --num_iterations=50 --warmdown_iters=0 \
    --val_loss_every=0 --save_checkpoint=False --out_dir=out-two-gpus

# stage A
stage_a() { # variant parallel
    python experiments/run_nanogpt_experiment.py --config experiments/configs/stage_a_screening/$1_screening.json \
        --n_runs 2 --parallel $2 $ours
}
for variant in baseline palm depth_warm; do
    stage_a $variant 2
done
CUDA_VISIBLE_DEVICES=0 stage_a curriculum 1
python experiments/compare_experiments.py experiment_logs/{baseline,palm,curriculum,depth_warm}_screening_*

# the peer and ours, one run a GPU
data="--input_bin=$PWD/data/python_source/python_source_train_*.bin --input_val_bin=$PWD/data/python_source/python_source_val_*.bin"
record() { # GPU seed [settings]
    CUDA_VISIBLE_DEVICES=$1 torchrun --standalone --nproc_per_node=1 records/2026-11-25-speedrun-h100/run_record.py "$PEER" \
        --seed=$2 $data --batch_size=128 --num_iterations=500 --warmdown_iters=1 --val_loss_every=50 --val_tokens=262144 "${@:3}"
}
ours() { # GPU seed
    CUDA_VISIBLE_DEVICES=$1 torchrun --standalone --nproc_per_node=1 train_gpt.py $ours --seed=$2 --batch_size=128 \
        --num_iterations=500 --warmdown_iters=0 --val_loss_every=50 --save_checkpoint=False --out_dir=out-ours-$2
}
record 1 1 --num_iterations=2 --val_loss_every=1 --val_tokens=65536 # compiles, with nothing else on that GPU
(record 1 42; record 1 43; ours 1 42; ours 1 43) &
(record 0 44; ours 0 44) &
wait

# on the second machine: the peer without its coordinate descent tuning
for seed in 42 43; do
    record $((seed - 42)) $seed --coordinate_descent_tuning=False &
done
wait
