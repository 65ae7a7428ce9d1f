#!/bin/bash
# Runs of the frontier on a machine whose calls last ten minutes:
#     sitting.sh first SECONDS OUT pilot|next [--accept]
#     sitting.sh more SECONDS OUT
#     sitting.sh last SECONDS OUT
# TOKENS: folder with GPT-2's tokenizer files; COMMIT: of this code; MINUTES: of the runs; PER_GPU: runs at a
# time; MPS=1: kernels of several runs at the same time on a GPU, through NVIDIA's MPS; COMPILED: archive of
# compiled code; SAVE=1: make one; LATENCY=1: time five schedules first; STARTS=1: time a start last. log_1.txt is
# of LATENCY=1 STARTS=1 SAVE=1, log_2.txt and log_3.txt of COMPILED SAVE=1 PER_GPU=4, all on two GPUs; log_4.txt of
# COMPILED PER_GPU=4 on one.
part=$1 end=$(($(date +%s) + $2)) out=$3 work=/tmp/sync-frontier
shift 3
[ -z "$MPS" ] || export CUDA_MPS_PIPE_DIRECTORY=/tmp/mps CUDA_MPS_LOG_DIRECTORY=/tmp/mps
mkdir -p "$out" $work/frontier
left() { echo $((end - $(date +%s))); }
if [ "$part" = first ]; then
    cp -r "$TOKENS" /tmp/tokens
    export TIKTOKEN_CACHE_DIR=/tmp/tokens
    [ -z "$COMPILED" ] || python3 -m tarfile -e "$COMPILED" $work/frontier
    (time python3 data/python_source/prepare.py --roots=stdlib,site-packages --tokenizer=gpt2 \
        --out=$work/code/data/python_source_gpt2) > "$out/prepare.txt" 2>&1 &
    if [ -n "$LATENCY" ]; then
        timeout 150 torchrun --standalone --nproc_per_node=2 bench.py --mode=decode --batch_sizes=[1] \
            --max_new_tokens=130 --rounds=5 --widths=[768] --tp_allreduce=oneshot,nccl \
            --json="$out/decode2_caat.json" --syncs="[24,4,'mean:1','caat:0.5','caat:0.25']" > "$out/decode.txt" 2>&1
        tail -n 12 "$out/decode.txt"
    fi
    if [ -n "$MPS" ]; then
        mkdir -p /tmp/mps
        # a session of its own outlives this command; no child, as `wait` would wait for it
        (setsid nvidia-cuda-mps-control -f > /tmp/mps/out.txt 2>&1 < /dev/null &)
        sleep 1
        if ! timeout 60 python3 -c "import torch; torch.zeros(1, device='cuda')" ||
            ! pgrep -f nvidia-cuda-mps-server > /dev/null; then
            wait
            cat /tmp/mps/out.txt
            echo "error: MPS does not run here: leave MPS out, and take a smaller PER_GPU" >&2
            exit 2
        fi
    fi
    wait
    tail -n 4 "$out/prepare.txt"
    python3 experiments/frontier_background.py begin "$@" --minutes="$MINUTES" --commit="$COMMIT" \
        --per_gpu="${PER_GPU:-6}" || exit
fi
python3 experiments/frontier_background.py wait "$(left)" --out="$out"
code=$?
if [ "$part" = last ] && [ -n "$STARTS" ] && [ "$(left)" -gt 60 ]; then
    cp -r $work/code/records/sync-frontier/start /tmp/start
    for one in "0 cold /tmp/cold" "1 warm $work/frontier/experiment_logs/compile_cache"; do
        set -- $one
        CUDA_VISIBLE_DEVICES=$1 python3 $work/code/experiments/frontier.py next --cache="$3" --estimate=40 \
            --log_dir=/tmp/start/logs --protocol=/tmp/start/protocol_$2.json --commit="$COMMIT" \
            --minutes="$(python3 -c "print($(left) / 60)")" > "$out/start_$2.txt" 2>&1 &
    done
    wait
    cp /tmp/start/runs*.jsonl "$out"
    for file in "$out"/start_*.txt; do tail -n 3 "$file"; done
fi
if [ "$part" = last ]; then
    (cd $work/frontier && find experiment_logs -name 'run_*.jsonl' | tar czf "$out/run_logs.tgz" -T -)
    [ -z "$SAVE" ] || tar cf - -C $work/frontier experiment_logs/compile_cache |
        xz --lzma2=preset=3,dict=256MiB > "$out/compiled.tar.xz"
    [ -z "$MPS" ] || echo quit | timeout 10 nvidia-cuda-mps-control
    ls -la "$out"
fi
exit $code
