"""Hints in errors about settings: the form of a value by its type, and their names in other programs."""

import re
from collections.abc import Collection

# Setting, or several of which a script has one, and its names in other training programs
ELSEWHERE = (
    ("device_batch_size batch_size", "mini_batch_size micro_batch_size minibatch_size B batch_size_per_gpu "
                                     "per_device_train_batch_size train_batch_size_per_gpu"),
    ("gradient_accumulation_steps batch_size", "total_batch_size global_batch_size effective_batch_size "
     "train_batch_size grad_accum_steps grad_accumulation_steps accumulation_steps accumulate_grad_batches"),
    ("block_size sequence_length", "seq_len seq_length max_seq_len max_seq_length context_length ctx_len "
                                   "n_ctx n_positions T sequence_length block_size"),
    ("max_iters num_iterations", "max_steps num_steps total_steps train_steps training_steps n_steps steps "
                                 "iterations num_iters epochs num_epochs num_train_epochs max_iters "
                                 "num_iterations"),
    ("warmup_iters", "warmup_steps num_warmup_steps warmup"),
    ("lr_decay_iters warmdown_iters", "lr_decay_steps decay_steps cooldown_iters warmdown_steps"),
    ("learning_rate", "lr max_lr base_lr peak_lr"),
    ("min_lr", "lr_min min_learning_rate final_lr"),
    ("grad_clip", "max_grad_norm clip_grad_norm grad_norm_clip gradient_clip_val gradient_clipping max_norm"),
    ("weight_decay", "wd l2"),
    ("n_layer", "n_layers num_layers num_hidden_layers depth layers"),
    ("n_head", "n_heads num_heads num_attention_heads heads"),
    ("n_embd", "d_model hidden_size dim model_dim embed_dim n_embed embedding_dim"),
    ("eval_interval val_loss_every", "eval_every eval_freq val_interval val_every eval_interval"),
    ("eval_iters val_tokens", "eval_steps val_steps eval_batches val_batches"),
    ("log_interval", "log_every log_freq logging_steps print_every"),
    ("checkpoint_interval", "save_interval save_every save_steps save_freq checkpoint_every ckpt_interval"),
    ("keep_checkpoints", "save_total_limit max_checkpoints keep_last_n"),
    ("out_dir", "output_dir save_dir checkpoint_dir checkpoints_dir ckpt_dir log_dir logdir output"),
    ("resume out_dir", "resume_from resume_from_checkpoint load_checkpoint checkpoint ckpt checkpoint_path"),
    ("init_from", "model_name model_name_or_path pretrained model"),
    ("dataset", "data data_dir data_path train_data input_bin data_root"),
    ("use_tensorboard", "tensorboard tb"),
    ("wandb_log", "wandb use_wandb"),
    ("use_fsdp", "fsdp"),
    ("use_zero1", "zero zero1 use_zero zero_stage"),
    ("use_triton", "triton use_triton_kernels use_triton_layernorm"),
    ("activation_checkpointing", "gradient_checkpointing use_checkpointing checkpoint_activations"),
    ("tp_size", "tensor_parallel_size tensor_model_parallel_size tp tp_degree"),
    ("fp8", "float8 use_fp8 fp8_training enable_fp8 fp8_linear"),
    ("dtype", "precision mixed_precision amp fp16 bf16 use_amp"),
    ("compile", "torch_compile use_compile"),
    ("cuda_graphs", "use_cuda_graphs cudagraphs cuda_graph"),
    ("seed", "random_seed manual_seed"),
    ("start", "prompt text"),
    ("max_new_tokens", "max_tokens max_length n_tokens"),
    ("num_samples", "n_samples num_return_sequences"),
)
LAUNCHER = ("nproc_per_node", "n_gpus", "num_gpus", "ngpus", "world_size", "num_processes")


def name_here(name: str, settings: Collection[str]) -> str:
    """Return the setting that has this name in other programs, '' if none is known."""
    for here, elsewhere in ELSEWHERE:
        if name.lower() in elsewhere.lower().split():
            return next((setting for setting in here.split() if setting in settings and setting != name), "")
    return ""


def form(name: str, types: Collection[type], value, on_command_line: bool) -> str:
    """Return the end of an error about a value of a wrong type: how to write the value, or ''.

    types: types that the setting may have.
    """
    written = ""
    if list in types:
        written = _list(name, value)
    elif bool in types and str(value).lower() in ("0", "1", "0.0", "1.0", "yes", "no", "on", "off", "y", "n"):
        written = str(str(value).lower() in ("1", "1.0", "yes", "on", "y"))
    elif {int, float} & set(types) and isinstance(value, str):
        if number := re.fullmatch(r"(\d+)([kKmM])", value.strip()):
            written = f"{int(number[1]) * (1000 if number[2] in 'kK' else 10**6):_}"
    elif {int, float} & set(types) and isinstance(value, list) and len(value) > 1:  # of 10,000
        return ": write ten thousand as 10_000 or 1e4"
    if not written:
        return ""
    quote = '"' if list in types else ""
    return f": write --{name}={quote}{written}{quote}" if on_command_line else f": write {name} = {written}"


def _list(name: str, value) -> str:
    """Return a list literal for a value that is none: a word, words with commas, or a list without quotes."""
    if type(value) in (int, float):
        return f"[{value!r}]"
    if name != "block_types":  # the other lists hold numbers
        return ""
    if not isinstance(value, str) or not re.fullmatch(r"[\w \[\]*+,]{1,200}", value):
        return ""
    if value.startswith("["):
        return re.sub(r"[A-Za-z_]\w*", r"'\g<0>'", value)
    words = [word.strip() for word in value.split(",") if word.strip()]
    return f"['{words[0]}']*12" if len(words) == 1 else str(words)
