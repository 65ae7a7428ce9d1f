#!/bin/bash
# Seeds 3 to 106 on the machine of the fourth sitting, after sitting.sh: four runners side by side on one GPU,
# ended after SECONDS.
#     more_seeds.sh SECONDS OUT "bf16 fp8_weights"
end=$(($(date +%s) + $1)) out=$(realpath -m "$2") work=/tmp/fp8-training
mkdir -p "$out"
cd $work/code || exit 2
export PYTHONPATH=$work/site TIKTOKEN_CACHE_DIR=$work/inputs/tiktoken_cache PYTHONUNBUFFERED=1 OMP_NUM_THREADS=2
export TORCHINDUCTOR_CACHE_DIR=$work/results/compiled TORCHINDUCTOR_COMPILE_THREADS=4
for arm in $3; do
    for seed in 3 103; do
        sed "s/\"base_seed\": 1,/\"base_seed\": $seed,/; s/quality_$arm\"/quality_${arm}_$seed\"/" \
            experiments/configs/fp8/$arm.json > /tmp/${arm}_$seed.json
        setsid python3 experiments/run_nanogpt_experiment.py --config=/tmp/${arm}_$seed.json --n_runs=20 \
            --dataset=$work/results/text --log_dir=$work/results/loss-more --learning_rate=0.0006 --min_lr=0.00006 \
            > $work/results/more_${arm}_$seed.log 2>&1 < /dev/null &
        pids="$pids -$!"
    done
done
while [ "$(date +%s)" -lt $end ]; do sleep 1; done
tar czf "$out/results.tgz" -C $work/results --exclude=./text --exclude=./compiled --exclude='*.pt' \
    --exclude='*.safetensors' .
kill -- $pids
