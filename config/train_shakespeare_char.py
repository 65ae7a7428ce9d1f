# A character-level GPT on tiny Shakespeare: 10.7M parameters, about a minute on a recent GPU.
# First: python data/shakespeare_char/prepare.py
# On a CPU add --device=cpu --compile=False, and make the model smaller as README shows.

out_dir = "out-shakespeare-char"
dataset = "shakespeare_char"

eval_interval = 250  # often: the model overfits from about iteration 2000 on
eval_iters = 200
log_interval = 10
always_save_checkpoint = False  # save only the best
wandb_project = "shakespeare-char"
wandb_run_name = "mini-gpt"

gradient_accumulation_steps = 1
batch_size = 64
block_size = 256  # characters of context

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2

learning_rate = 1e-3  # small networks can go higher
max_iters = 5000
lr_decay_iters = 5000
min_lr = 1e-4
beta2 = 0.99  # few tokens in an iteration
warmup_iters = 100
