#!/bin/bash
# The commands of the fifth sitting, from the repository's root:
#     commands.sh kernels|beside|step RESULTS NANOGPT
# kernels and beside on one machine; during beside, five runs of ../../sync-frontier/tier_2 shared its GPU. step on
# another, where nothing ran beside what it times.
set -e
part=$1 out=$2 peer=$3 weights=fp8+fp8_head+weight_gradients
case $part in
kernels) python3 records/fp8-training/measure.py --out="$out" --parts=kernels --seconds=260 ;;
beside)
    python3 records/fp8-training/measure.py --out="$out" --parts=data,tests --seconds=900 &
    until grep -q '"data": {' "$out/jobs.json"; do sleep 1; done
    for rate in 0.096 0.192; do
        for arm in bf16 fp8_weights; do
            python3 experiments/run_nanogpt_experiment.py --config=experiments/configs/fp8/$arm.json --n_runs=1 \
                --dataset="$out/text" --log_dir="$out/loss-$rate" --learning_rate=$rate \
                --min_lr="$(python3 -c "print($rate / 10)")" &
        done
    done
    wait ;;
step)
    python3 records/fp8-training/time_transposes.py "$out/transposes.json"
    export TORCHINDUCTOR_CACHE_DIR=$out/compiled
    for one in nanogpt $weights $weights+graphs base; do
        python3 -m benchmarks.fused_step --peer="$peer" --out="$out/$one" --phases=compile --batch_sizes=[64] \
            --contenders=$one &
    done
    TRITON_INTERPRET=0 python3 -m pytest -q -n 3 tests/kernels/test_{fp8_transpose,fp8,gelu_cast,qkv_linear}.py \
        tests/kernels/test_{relu_squared,qk_rotary,lazy_rows,layer_norm}.py &
    wait
    find "$out/compiled" -name '*.best_config' -delete
    python3 -m benchmarks.fused_step --peer="$peer" --out="$out/step" --phases=step,profile --batch_sizes=[64] \
        --contenders=nanogpt,$weights,$weights+graphs,base --seconds=133 ;;
esac
