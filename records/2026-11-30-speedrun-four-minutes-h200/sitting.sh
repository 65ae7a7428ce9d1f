# All runs in one sitting on two GPUs:
#   bash sitting.sh PEERS SMALL OUT SECONDS
# In the root of a copy of the repository that nothing else changes, with TIKTOKEN_CACHE_DIR set. PEERS and SMALL:
# see ../2026-11-30-speedrun-frontier-h200. OUT: folder of the results, which are appended as runs end.
set -u
peers=$1 small=$2 out=$3 seconds=$4
here=$(dirname "$(realpath "$0")")
tools=$here/../2026-11-29-speedrun-fast-h200
began=$(date +%s)
left() { echo $((seconds - $(date +%s) + began)); }
runs() {  # NAME AT_ONCE SECONDS
    python "$tools/run_queue.py" "$out/queue_$1.jsonl" "$out/runs_$1.jsonl" --gpus=2 --at_once="$2" \
        --seconds="$3" --logs="$out/logs_$1"
}
mkdir -p "$out" && touch "$out/runs_times.jsonl" "$out/runs_runs.jsonl"
python "$here/plan.py" times "$small" >"$out/queue_times.jsonl"
runs times 1 150 & times=$!
# read the files of the source once, many at a time, in case a new machine is slow to read one after the other
python -c "import sysconfig; print(*{sysconfig.get_path(name) for name in ('stdlib', 'purelib')}, sep='\n')" |
    xargs -I{} find {} -name '*.py' -print0 | xargs -0 -P 64 -n 64 cat >/dev/null
echo "files after $(($(date +%s) - began)) s"
ls data/python_source/*_train_*.bin >/dev/null 2>&1 || python data/python_source/prepare.py \
    --roots=stdlib,site-packages --tokenizer=gpt2 --format=shards >"$out/prepare.txt" 2>&1
echo "data after $(($(date +%s) - began)) s"
wait $times
echo "runs after $(($(date +%s) - began)) s"
python "$here/plan.py" runs "$out/runs_times.jsonl" "$peers" "$out/logs_runs" "$out/runs_runs.jsonl" \
    >"$out/queue_runs.jsonl"
runs runs 6 "$(left)"
