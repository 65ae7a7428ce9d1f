# The fast speedrun on one GPU, on tokens of Python source: 850 steps of up to 65,536 tokens, about a minute
# on an H200.
# First: python data/python_source/prepare.py --roots=stdlib,site-packages --tokenizer=gpt2 --format=shards
# Then: python train_gpt_fast.py config/fast_python_source.py

out_dir = "out-fast-python"
dataset = "python_source"

sequence_length = 32768
device_batch_size = 1
batch_sizes = [1, 1, 2, 2]  # sequences of a step
stage_rates = [1.0, 1.0, 1.3, 1.3]
short_windows = [384, 640, 768, 768]
num_iterations = 850
n_layer = 7  # at so few tokens better than 11
table_learning_rate = 0.4  # fewer tokens than FineWeb's, and more passes over a token's row
value_tables = 3
suffix_match = True  # source code repeats itself

val_tokens = 524288
val_loss_every = 100
