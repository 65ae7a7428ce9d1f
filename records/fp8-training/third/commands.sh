#!/bin/bash
# The commands of the third sitting as they ran, from the repository's root: `lanes` side by side for up to 195 s,
# then timed jobs, each alone. .gpu has tiktoken_cache and nanogpt. The variables SMALL, SMALLB, TOY, ROOTS, LANES
# and END were for a trial at toy size.
OUTS=$1; O=/tmp/s2/out; B=$(date +%s); mkdir -p $O; pack() { tar czf $OUTS/all.tgz.new -C /tmp/s2 --exclude=./text --exclude="*.pt" --exclude="*.safetensors" . && mv $OUTS/all.tgz.new $OUTS/all.tgz; }
export TORCHINDUCTOR_CACHE_DIR=/tmp/cc TIKTOKEN_CACHE_DIR=$PWD/.gpu/tiktoken_cache PYTHONUNBUFFERED=1
XL="--n_layer=48 --n_head=25 --n_embd=1600"
py() { python3 "$@"; }
say() { echo "$(( $(date +%s) - B )) s: $*"; }
f() { n=$1; shift; py -m benchmarks.fused_step --peer=.gpu/nanogpt --out=$O/$n "$@" > $O/$n.log 2>&1; say "$n rc $?"; }
lane() { export TORCHINDUCTOR_COMPILE_THREADS=4 OMP_NUM_THREADS=2; "$@"; }
(while sleep 60; do pack; done) &
L=${LANES:-195}; D="${SMALL:-}"; DB="${SMALLB:-}"; T="${TOY:-}"
lanes() {
(lane; f c-fp8 --phases=compile --contenders=fp8+fp8_head,fp8+fp8_head+graphs --batch_sizes=[64] $D) &
(lane; f c-bf16 --phases=compile --contenders=nanogpt,base --batch_sizes=[64] $D; f c-bias --phases=compile --contenders=nanogpt,base --batch_sizes=[64] --bias=True $D) &
(lane; f c-small --phases=compile --contenders=fp8+fp8_head+graphs,nanogpt,base,graphs --batch_sizes=[12] $D) &
(lane; f c-xl --phases=compile --contenders=fp8+fp8_head --batch_sizes=[8] $XL $D) &
(lane; f c-xlbase --phases=compile --contenders=base --batch_sizes=[8] $XL $D) &
(lane; py bench.py --model_type=distributed_gpt --tp_size=2 --seconds=170 --batch_size=64 --rounds=1 --steps=1 --syncs=[24,12,1] $DB > $O/c-ranks.log 2>&1; say "c-ranks rc $?") &
(lane; py data/python_source/prepare.py --tokenizer=gpt2 --format=shards --out=/tmp/s2/text --roots=${ROOTS:-stdlib,site-packages} > $O/data.log 2>&1; say "data rc $?"
 r() { py experiments/run_nanogpt_experiment.py --config=experiments/configs/fp8/fp8.json --n_runs=$1 --dataset=/tmp/s2/text --log_dir=/tmp/s2/loss-$2 --learning_rate=$2 --min_lr=$3 $4 > $O/loss-$2.log 2>&1; say "loss $2 rc $?"; }
 r 3 0.0006 0.00006 "$T" & r 1 0.024 0.0024 "$T"; wait) &
(lane; X=; python3 -c 'import xdist' 2>/dev/null && X="-n 4"; TRITON_INTERPRET=0 py -m pytest -q -p no:cacheprovider $X tests/scripts/test_cuda_graphs.py tests/kernels/test_fp8.py tests/kernels/test_gelu_cast.py tests/kernels/test_adamw.py tests/kernels/test_kernels.py > $O/tests.log 2>&1; say "tests rc $?"; tail -30 $O/tests.log) &
wait
}
export -f lanes f say py lane; export O B XL L D DB T ROOTS
setsid timeout -k 3 $L bash -c lanes
pkill -f pytest; pkill -f fused_step; pkill -f run_nanogpt; pkill -f train.py; sleep 1
find /tmp/cc -name '*.best_config' -delete
grep -h "val loss .* at step\|runs succeeded" $O/loss-*.log; nvidia-smi --query-gpu=memory.used --format=csv,noheader
left() { echo $(( ${END:-565} - ($(date +%s) - B) )); }
t() { n=$1; lim=$2; shift 2; if [ $(left) -lt 25 ]; then say "$n: no time"; return; fi; m=$(left); [ $lim -lt $m ] && m=$lim
 timeout -k 3 $m "$@" > $O/$n.log 2>&1; say "$n rc $?"; grep -v Warning $O/$n.log | tail -14 | cut -c1-260; }
F="python3 -m benchmarks.fused_step --peer=.gpu/nanogpt"
t fp8-64 130 $F --out=$O/fp8-64 --phases=step,profile --contenders=nanogpt,base,fp8+fp8_head,fp8+fp8_head+adamw,fp8+fp8_head+adamw+graphs --batch_sizes=[64] --seconds=125 $D
t small-12 110 $F --out=$O/small-12 --phases=step --contenders=nanogpt,base,adamw+graphs,fp8+fp8_head+adamw+graphs --batch_sizes=[12] --seconds=105 $D
t xl 150 $F --out=$O/xl --phases=step,profile --contenders=base,fp8+fp8_head --batch_sizes=[8] $XL --seconds=140 --rounds=5 $D
t ranks-2 110 python3 bench.py --model_type=distributed_gpt --tp_size=2 --seconds=105 --json=$O/ranks-2.json --batch_size=64 --rounds=5 --steps=6 --syncs=[24,12,1] $DB
t bias 70 $F --out=$O/bias --phases=step --contenders=nanogpt,base --batch_sizes=[64] --bias=True --seconds=65 --rounds=5 $D
say end
kill %1; pack; ls -la $OUTS
