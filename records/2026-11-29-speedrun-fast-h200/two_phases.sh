# Factors, then the frontier with what they showed, in one sitting: bash two_phases.sh PEERS OUT SECONDS GPUS
# In the repository's root, after `patch -p1 < candidates_2.patch` of this folder, with TIKTOKEN_CACHE_DIR set.
# PEERS: see frontier_queue.py. OUT: folder of the results, which are appended as runs end.
set -u
peers=$1 out=$2 seconds=$3 gpus=$4
here=$(dirname "$(realpath "$0")")
began=$(date +%s)
left() { echo $((seconds - $(date +%s) + began)); }
mkdir -p "$out" && touch "$out/runs_6.jsonl"
python "$here/time_candidates.py" config/fast_python_source.py --device=cuda:$((gpus - 1)) >"$out/times.txt" 2>&1 &
ls data/python_source/*_train_*.bin >/dev/null 2>&1 || python data/python_source/prepare.py \
    --roots=stdlib,site-packages --tokenizer=gpt2 --format=shards >"$out/prepare.txt" 2>&1
wait
tail -5 "$out/times.txt"
echo "data after $(($(date +%s) - began)) s"
python "$here/factors.py" effects "$here/factors_6.json" /dev/null "$out/defaults.json" >/dev/null 2>&1
{
    # the newest record's kernels compile for minutes, beside the first runs
    python "$here/frontier_queue.py" "$out/defaults.json" "$peers" data/python_source | head -1 |
        sed 's/num_scheduled_iterations=457/num_scheduled_iterations=30/; s/newest-1-1/newest-smoke/; s/true/false/'
    python "$here/factors.py" queue "$here/factors_6.json"
} >"$out/queue_6.jsonl"
python "$here/run_queue.py" "$out/queue_6.jsonl" "$out/runs_6.jsonl" --gpus="$gpus" --at_once=5 \
    --seconds=$(($(left) < 800 ? $(left) : 800)) --logs="$out/logs_6"
python "$here/factors.py" effects "$here/factors_6.json" "$out/runs_6.jsonl" "$out/chosen.json" >"$out/effects.txt" 2>&1
cat "$out/effects.txt" "$out/chosen.json"
python "$here/frontier_queue.py" "$out/chosen.json" "$peers" data/python_source >"$out/queue_7.jsonl"
python "$here/run_queue.py" "$out/queue_7.jsonl" "$out/runs_7.jsonl" --gpus="$gpus" --at_once=6 \
    --seconds="$(left)" --logs="$out/logs_7"
