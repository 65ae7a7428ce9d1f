#!/bin/bash
# measure.py on a machine whose calls last minutes, in its background:
#     sitting.sh begin SECONDS OUT [options of measure.py]
#     sitting.sh wait SECONDS OUT
# Each prints what is new for SECONDS or until all has ended, and leaves jobs.json and results.tgz in OUT. INPUTS:
# folder with tiktoken_cache, nanogpt/model.py and, if it is there, a wheel of torchao in whl. BEFORE: results.tgz of
# an earlier machine, whose jobs are not repeated.
part=$1 end=$(($(date +%s) + $2)) out=$3 work=/tmp/fp8-training
shift 3
mkdir -p "$out" $work/results
if [ "$part" = begin ]; then
    cp -r "$INPUTS" $work/inputs
    mkdir $work/code
    tar c --exclude=./.venv --exclude=./.git . | tar x -C $work/code
    [ -z "$BEFORE" ] || tar xzf "$BEFORE" -C $work/results
    for wheel in $work/inputs/whl/*.whl; do
        [ ! -e "$wheel" ] || python3 -m pip install -q --no-index --no-deps --target $work/site "$wheel" || exit
    done
    export PYTHONPATH=$work/site TIKTOKEN_CACHE_DIR=$work/inputs/tiktoken_cache
    cd $work/code || exit
    setsid python3 records/fp8-training/measure.py --out=$work/results --peer=$work/inputs/nanogpt "$@" \
        > $work/log.txt 2>&1 < /dev/null &
    echo $! > $work/pid
fi
tail -n "+$(($(cat $work/printed 2>/dev/null || echo 0) + 1))" --pid="$(cat $work/pid)" -f $work/log.txt &
while [ "$(date +%s)" -lt $end ] && kill -0 "$(cat $work/pid)" 2>/dev/null; do sleep 1; done
sleep 2
kill $! 2>/dev/null
wc -l < $work/log.txt > $work/printed
cp $work/results/jobs.json $work/log.txt "$out" 2>/dev/null
tar czf "$out/results.tgz" -C $work/results --exclude=./text --exclude='*.pt' --exclude='*.safetensors' .
ls -la "$out"
