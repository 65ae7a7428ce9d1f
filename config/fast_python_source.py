# The fast speedrun on one GPU, on tokens of Python source: 566 steps of up to 98,304 tokens, about a minute
# on an H200. In two minutes: --n_layer=9 --num_iterations=975, in four: --n_layer=9 --num_iterations=1950.
# First: python data/python_source/prepare.py --roots=stdlib,site-packages --tokenizer=gpt2 --format=shards
# Then: python train_gpt_fast.py config/fast_python_source.py

out_dir = "out-fast-python"
dataset = "python_source_gpt2"

sequence_length = 32768
device_batch_size = 1
batch_sizes = [1, 2, 3, 3]  # sequences of a step
num_iterations = 566
n_layer = 7  # at so few tokens better than 11
table_learning_rate = 0.4  # fewer tokens than FineWeb's, and more passes over a token's row
value_tables = 5
trigram = True
lazy_tables = True
suffix_match = True  # source code repeats itself

val_tokens = 524288
val_loss_every = 100
