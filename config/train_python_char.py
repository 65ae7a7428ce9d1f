# A character-level GPT on the Python standard library's own source: what `make demo` trains.
# 0.8M parameters, a few minutes on two CPU cores; seconds on a GPU.

out_dir = "out-python-char"
dataset = "python_source"

eval_interval = 250
eval_iters = 20
log_interval = 25
always_save_checkpoint = False  # save only the best
wandb_project = "python-char"
wandb_run_name = "mini-gpt"

gradient_accumulation_steps = 1
batch_size = 16
block_size = 128  # characters of context

n_layer = 4
n_head = 4
n_embd = 128

learning_rate = 2e-3  # small networks can go higher
max_iters = 2000
lr_decay_iters = 2000
min_lr = 2e-4
beta2 = 0.99  # few tokens in an iteration
warmup_iters = 100

compile = False  # compiling would take longer than it saves in so short a run
