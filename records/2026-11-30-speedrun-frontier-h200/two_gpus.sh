# Steps of 2, 4 and 8 sequences on one GPU and on two, with and without lazy_tables, about two minutes:
#   bash two_gpus.sh OUT
# In the repository's root, with data/python_source. OUT gets the logs, whose lines have the time after each step.
set -u
out=$1
mkdir -p "$out"
arm() {  # NAME GPUS PROCESSES LAZY
    CUDA_VISIBLE_DEVICES=$2 torchrun --nproc_per_node="$3" --master_port=$((29500 + RANDOM % 1000)) train_gpt_fast.py \
        config/fast_python_source.py --batch_sizes=[2,4,8,8] --stage_rates=[1,1,1,1] --num_iterations=36 --val_loss_every=0 \
        --val_tokens=65536 --save_checkpoint=False --lazy_tables="$4" --out_dir="out-$1" >"$out/$1.txt" 2>&1
    grep -E "^step:(12|24|36)/|sent|Error" "$out/$1.txt" | sed "s/^/$1: /"
}
arm two-lazy 0,1 2 True
arm two-dense 0,1 2 False
arm one-lazy 0 1 True &
arm one-dense 1 1 False &
wait
