#!/bin/bash
# A machine with two GPUs whose calls last ten minutes: sitting.sh first SECONDS OUT pilot|next, then sitting.sh more
# SECONDS OUT, then sitting.sh last SECONDS OUT. Data, latency of five schedules, runs of the frontier, start times.
# TOKENS: folder with GPT-2's tokenizer files; COMMIT: of this code; MINUTES: of the runs.
part=$1 end=$(($(date +%s) + $2)) out=$3 plan=$4 work=/tmp/sync-frontier
mkdir -p "$out" $work
left() { echo $((end - $(date +%s))); }
if [ "$part" = first ]; then
    cp -r "$TOKENS" /tmp/tokens
    export TIKTOKEN_CACHE_DIR=/tmp/tokens
    (time python3 data/python_source/prepare.py --roots=stdlib,site-packages --tokenizer=gpt2 \
        --out=$work/code/data/python_source_gpt2) > "$out/prepare.txt" 2>&1 &
    if [ "$plan" = pilot ]; then
        timeout 150 torchrun --standalone --nproc_per_node=2 bench.py --mode=decode --batch_sizes=[1] \
            --max_new_tokens=130 --rounds=5 --widths=[768] --tp_allreduce=oneshot,nccl --json="$out/decode2_caat.json" \
            --syncs="[24,4,'mean:1','caat:0.5','caat:0.25']" > "$out/decode.txt" 2>&1
        tail -20 "$out/decode.txt"
    fi
    wait
    tail -4 "$out/prepare.txt"
    python3 experiments/frontier_background.py begin "$plan" --minutes="$MINUTES" --commit="$COMMIT" || exit
fi
python3 experiments/frontier_background.py wait "$(left)" --out="$out"
if [ "$part" = last ] && [ "$(left)" -gt 60 ]; then
    cp -r $work/code/records/sync-frontier/start /tmp/start
    for one in "0 cold /tmp/cold" "1 warm $work/frontier/experiment_logs/compile_cache"; do
        set -- $one
        CUDA_VISIBLE_DEVICES=$1 python3 $work/code/experiments/frontier.py next --cache="$3" --log_dir=/tmp/start/logs \
            --protocol=/tmp/start/protocol_$2.json --minutes="$(python3 -c "print($(left) / 60)")" --estimate=40 \
            --commit="$COMMIT" > "$out/start_$2.txt" 2>&1 &
    done
    wait
    cp /tmp/start/runs*.jsonl "$out"
    tail -3 "$out"/start_*.txt
fi
