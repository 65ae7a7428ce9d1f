# Seven factors, then the frontier with what they showed, in one sitting:
#   bash two_phases.sh PEERS OUT SECONDS GPUS [CHOSEN]
# In the repository's root, after `patch -p1 < candidates_3.patch` of this folder, with TIKTOKEN_CACHE_DIR set.
# PEERS: see frontier_queue.py. OUT: folder of the results, which are appended as runs end. CHOSEN: chosen.json of
# an earlier first phase, which then does not run again.
set -u
peers=$1 out=$2 seconds=$3 gpus=$4
here=$(dirname "$(realpath "$0")")
tools=$here/../2026-11-29-speedrun-fast-h200
began=$(date +%s)
left() { echo $((seconds - $(date +%s) + began)); }
mkdir -p "$out" && touch "$out/runs_7.jsonl"
# what matches cost; where they do not compile, the search for them is left out of the compilation
( timeout 200 python "$here/time_matches.py" config/fast_python_source.py >"$out/times.txt" 2>&1 || {
    sed -i 's/^def suffix_matches/@torch.compiler.disable\n&/' nanosync/ngram_features.py
    timeout 100 python "$here/time_matches.py" config/fast_python_source.py >"$out/times_not_compiled.txt" 2>&1; } ) &
ls data/python_source/*_train_*.bin >/dev/null 2>&1 || python data/python_source/prepare.py \
    --roots=stdlib,site-packages --tokenizer=gpt2 --format=shards >"$out/prepare.txt" 2>&1
wait  # for the times
echo "data after $(($(date +%s) - began)) s"
echo '{}' >"$out/none.json"
python "$here/frontier_queue.py" "$out/none.json" "$peers" data/python_source >"$out/queue_all.jsonl"
# the newest record's kernels compile for minutes, beside the first runs, which therefore compile with few threads
sed -n '1s/num_scheduled_iterations=457/num_scheduled_iterations=30/; 1s/newest-1-4/newest-smoke/; 1s/true/false/; 1p' \
    "$out/queue_all.jsonl" >"$out/queue_smoke.jsonl"
python "$tools/run_queue.py" "$out/queue_smoke.jsonl" "$out/runs_smoke.jsonl" --gpus=1 --at_once=1 \
    --seconds=$(($(left) < 640 ? $(left) : 640)) --logs="$out/logs_smoke" &
if [ $# -gt 4 ]; then
    cp "$5" "$out/chosen.json" && touch "$out/effects.txt"
else
    python "$tools/factors.py" queue "$here/factors_7.json" >"$out/queue_7.jsonl"
    TORCHINDUCTOR_COMPILE_THREADS=3 python "$tools/run_queue.py" "$out/queue_7.jsonl" "$out/runs_7.jsonl" --gpus="$gpus" \
        --at_once=5 --seconds=$(($(left) < 620 ? $(left) : 620)) --logs="$out/logs_7"
    python "$tools/factors.py" effects "$here/factors_7.json" "$out/runs_7.jsonl" "$out/chosen.json" >"$out/effects.txt" 2>&1
fi
cat "$out/effects.txt" "$out/chosen.json"
wait  # for the compilation
echo "frontier after $(($(date +%s) - began)) s"
python "$here/frontier_queue.py" "$out/chosen.json" "$peers" data/python_source >"$out/queue_8.jsonl"
TORCHINDUCTOR_COMPILE_THREADS=4 python "$tools/run_queue.py" "$out/queue_8.jsonl" "$out/runs_8.jsonl" --gpus="$gpus" \
    --at_once=4 --seconds="$(left)" --logs="$out/logs_8"
