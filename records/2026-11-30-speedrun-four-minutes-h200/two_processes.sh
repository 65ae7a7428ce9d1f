# Gathers over NCCL, then training with two processes, saved and resumed, with NorMuon and with Muon:
#   CUDA_VISIBLE_DEVICES=0,1 bash records/2026-11-30-speedrun-four-minutes-h200/two_processes.sh
# In the repository's root, with data/python_source.
set -eu
here=$(dirname "$(realpath "$0")")
PYTHONPATH=. torchrun --nproc_per_node=2 --master_port=29571 "$here/gathers.py"
small=(config/fast_python_source.py --n_layer=3 --n_embd=384 --n_head=3 --val_tokens=65536 --val_loss_every=0
    "--batch_sizes=[2,4,4,4]" --out_dir=out-two-processes --seed=1)
for muon_beta2 in 0.9 0; do
    rm -rf out-two-processes
    torchrun --nproc_per_node=2 --master_port=29572 train_gpt_fast.py "${small[@]}" --muon_beta2=$muon_beta2 \
        --num_iterations=20
    torchrun --nproc_per_node=2 --master_port=29573 train_gpt_fast.py "${small[@]}" --muon_beta2=$muon_beta2 \
        --num_iterations=30 --resume=latest
done
rm -rf out-two-processes
