#!/bin/bash
# measure.py on a machine whose calls last minutes, in its background:
#     sitting.sh begin SECONDS OUT [options of measure.py]
#     sitting.sh wait SECONDS OUT
# Each prints what is new for SECONDS or until all has ended, and leaves jobs.json, log.txt, results.tgz in OUT.
# INPUTS: folder with tiktoken_cache, nanogpt/model.py and, if it is there, a wheel of torchao in whl.
# BEFORE: results.tgz of an earlier machine, whose jobs are not repeated.
part=$1 end=$(($(date +%s) + $2)) out=$(realpath -m "$3") work=/tmp/fp8-training
shift 3
is_running() { kill -0 "$(cat $work/pid)" 2> /dev/null; }
mkdir -p "$out" $work/results || exit 2
if [ "$part" = begin ]; then
    if [ ! -e "$INPUTS/nanogpt/model.py" ]; then
        echo "error: INPUTS must name a folder with nanogpt/model.py and tiktoken_cache" >&2
        exit 2
    fi
    if [ -e $work/pid ] && is_running; then
        echo "error: measure.py is running: use sitting.sh wait" >&2
        exit 2
    fi
    rm -rf $work/inputs $work/code $work/site
    mkdir $work/code && cp -r "$INPUTS" $work/inputs || exit 2
    tar cf - --exclude=./.venv --exclude=./.git . | tar xf - -C $work/code || exit 2
    [ -z "$BEFORE" ] || tar xzf "$BEFORE" -C $work/results || exit 2
    for wheel in $work/inputs/whl/*.whl; do
        [ -e "$wheel" ] || continue
        python3 -m pip install -q --no-index --no-deps --target $work/site "$wheel" || exit 2
    done
    export PYTHONPATH=$work/site TIKTOKEN_CACHE_DIR=$work/inputs/tiktoken_cache
    cd $work/code || exit 2
    setsid python3 records/fp8-training/measure.py --out=$work/results --peer=$work/inputs/nanogpt "$@" \
        > $work/log.txt 2>&1 < /dev/null &
    echo $! > $work/pid
    echo 0 > $work/printed
fi
tail -n "+$(($(cat $work/printed) + 1))" -f $work/log.txt &
while [ "$(date +%s)" -lt $end ] && is_running; do sleep 1; done
sleep 2
wc -l < $work/log.txt > $work/printed
kill $!
cp $work/log.txt "$out"
[ ! -e $work/results/jobs.json ] || cp $work/results/jobs.json "$out"
tar czf "$out/results.tgz" -C $work/results --exclude=./text --exclude=./compiled --exclude='*.pt' \
    --exclude='*.safetensors' .
