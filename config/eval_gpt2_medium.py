# Evaluate OpenAI's GPT-2-medium (350M parameters) on a data set in GPT-2's tokens.
# $ python train.py config/eval_gpt2_medium.py --dataset=shakespeare

init_from = "gpt2-medium"
eval_only = True
batch_size = 8
eval_iters = 500  # 4000 windows of each split, or all of them if a split has fewer
wandb_log = False
