# Times, the design and the frontier in one sitting:
#   bash sitting.sh PEERS SMALL OUT SECONDS GPUS [CHOSEN]
# In the repository's root, after `patch -p1 < triples.patch` of this folder, with TIKTOKEN_CACHE_DIR set.
# PEERS: see plan.py. SMALL: a data set of at least 20M tokens of Python source, for the times while the tokens
# are made. OUT: folder of the results, which are appended as runs end. CHOSEN: chosen.json of an earlier design.
set -u
peers=$1 small=$2 out=$3 seconds=$4 gpus=$5
here=$(dirname "$(realpath "$0")")
tools=$here/../2026-11-29-speedrun-fast-h200
began=$(date +%s)
left() { echo $((seconds - $(date +%s) + began)); }
runs() {  # NAME AT_ONCE SECONDS GPUS
    python "$tools/run_queue.py" "$out/queue_$1.jsonl" "$out/runs_$1.jsonl" --gpus="$4" --at_once="$2" \
        --seconds="$(($(left) < $3 ? $(left) : $3))" --logs="$out/logs_$1"
}
mkdir -p "$out" && touch "$out/runs_design.jsonl"
# the newest record's kernels compile for ten minutes, beside the times and the design, with few threads for others
python "$here/plan.py" compile "$peers" "$small" >"$out/queue_compile.jsonl"
runs compile 1 900 1 & compile=$!
export TORCHINDUCTOR_COMPILE_THREADS=4
python "$here/plan.py" times "$small" >"$out/queue_times.jsonl"
runs times 1 115 1 & times=$!
# read the files of the source once, many at a time, in case a new machine is slow to read one after the other
python -c "import sysconfig; print(*{sysconfig.get_path(name) for name in ('stdlib', 'purelib')}, sep='\n')" |
    xargs -I{} find {} -name '*.py' -print0 | xargs -0 -P 64 -n 64 cat >/dev/null
echo "files after $(($(date +%s) - began)) s"
ls data/python_source/*_train_*.bin >/dev/null 2>&1 || python data/python_source/prepare.py \
    --roots=stdlib,site-packages --tokenizer=gpt2 --format=shards >"$out/prepare.txt" 2>&1
echo "data after $(($(date +%s) - began)) s"
wait $times
if [ $# -gt 5 ]; then
    cp "$6" "$out/chosen.json"
else
    python "$here/plan.py" design >"$out/queue_design.jsonl"
    runs design 5 620 "$gpus"
    python "$here/plan.py" choose "$out/runs_design.jsonl" "$out/chosen.json"
    pkill -f "run_queue.py $out/queue_compile"  # what it has compiled stays
fi
wait $compile
cat "$out/chosen.json"
echo "frontier after $(($(date +%s) - began)) s"
python "$here/plan.py" frontier "$out/chosen.json" "$peers" >"$out/queue_frontier.jsonl"
runs frontier 4 "$seconds" "$gpus"
