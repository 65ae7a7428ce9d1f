# Settings that all train_python_*sync.py configs share: a GPT of 12 layers and 2.4M parameters on the source
# of Python's standard library, by characters. It trains in minutes on two CPU cores or on a GPU.
# First: python data/python_source/prepare.py

dataset = "python_source"

gradient_accumulation_steps = 1
batch_size = 16
block_size = 128  # characters of context

n_layer = 12
n_head = 4
n_embd = 128

learning_rate = 1e-3
min_lr = 1e-4
max_iters = 1000
lr_decay_iters = 1000
warmup_iters = 100
beta2 = 0.99  # few tokens in an iteration

eval_interval = 250
eval_iters = 40
log_interval = 25
always_save_checkpoint = False  # save only the best

tp_size = 2
compile = False  # compiling would take longer than it saves in so short a run
