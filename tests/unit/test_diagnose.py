"""--diagnose: kernels' rows by name, made-up traces of a GPU and of a CPU, a profiled loop with sleeps in it,
the table. CPU; seconds.

    python -m pytest tests/unit/test_diagnose.py

The names of kernels are those of PyTorch 2.11 on H100 and H200, of ROCm's libraries, and of kernels/.
"""

import gzip
import json
import time
from types import SimpleNamespace

import pytest
import torch
from helpers import settings_error
from torch.profiler import record_function

from nanosync import diagnose, step_profile
from nanosync.diagnose import WARM_UP, check_steps, profiled, switch_of, table
from nanosync.errors import UserError
from nanosync.step_profile import (
    ATTENTION,
    COMMUNICATION,
    COPIES,
    ELEMENTWISE,
    EXPOSED,
    GAPS,
    LOSS,
    NORMS,
    OPTIMIZER,
    OTHER,
    PRODUCTS,
    ROWS,
    WAIT,
    WAITING,
    profile_of,
    row_of,
)

ELEMENT = "void at::native::vectorized_elementwise_kernel<4, at::native::"
KERNELS = [
    ("nvjet_sm90_tst_192x192_64x4_2x1_v_bz_coopB_TNT", PRODUCTS),
    ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_cublas", PRODUCTS),
    ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128_32x3_tn_align8>", PRODUCTS),
    ("void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float>", PRODUCTS),
    ("ampere_sgemm_128x64_nn", PRODUCTS),
    ("void gemv2T_kernel_val<int, int, float, float, float, float, 128, 16, 4, 4, false, true>", PRODUCTS),
    ("Cijk_Alik_Bljk_BBS_BH_Bias_HAS_SAV_UserArgs_MT256x256x64_MI16x16x1", PRODUCTS),
    ("triton_tem_fused_mm_4", PRODUCTS),
    ("_kernel", PRODUCTS),  # kernels/relu_squared.py
    ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4, false>>", ATTENTION),
    ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits>", ATTENTION),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x64_4x1x1_kernel0_0",
     ATTENTION),
    ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel::Params)", ATTENTION),
    ("void softmax_warp_forward<c10::BFloat16, c10::BFloat16, float, 10, false>", ATTENTION),
    ("triton_tem_fused_flex_attention_0", ATTENTION),
    ("_attention_forward_kernel", ATTENTION),  # kernels/interval_attention.py
    ("_backward_kv_kernel", ATTENTION), ("_backward_q_kernel", ATTENTION), ("_delta_kernel_1", ATTENTION),
    ("attn_fwd", ATTENTION), ("bwd_kernel_dk_dv", ATTENTION),
    ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float>", NORMS),
    ("void at::native::(anonymous namespace)::GammaBetaBackwardCUDAKernelTemplate<float, float>", NORMS),
    ("triton_red_fused_native_layer_norm_native_layer_norm_backward_3", NORMS),
    ("triton_per_fused_add_native_layer_norm_view_7", NORMS),
    ("triton_per_fused__to_copy_add_mean_mul_pow_rsqrt_5", NORMS),
    ("triton_per_fused__fused_rms_norm_2", NORMS),
    ("_forward_kernel", NORMS), ("_backward_kernel_0", NORMS), ("_column_sums_kernel", NORMS),
    ("_cross_entropy_kernel", LOSS), ("_weighted_cross_entropy_kernel", LOSS), ("_lse_kernel", LOSS),
    ("_grad_kernel", LOSS),
    ("triton_red_fused__log_softmax_nll_loss_forward_1", LOSS),
    ("void at::native::cunn_SoftMaxForward<4, float, float, float, LogSoftMaxForwardEpilogue>", LOSS),
    ("void at::native::nll_loss_forward_reduce_cuda_kernel_2d<float, float, long>", LOSS),
    ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata<4>, "
     "at::native::(anonymous namespace)::FusedAdamMathFunctor<float, 4>>", OPTIMIZER),
    ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<TensorListMetadata<1>, "
     "at::native::(anonymous namespace)::LpNormFunctor<float, NormType::L2>>", OPTIMIZER),
    ("ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", COMMUNICATION),
    ("ncclKernel_AllGather_RING_LL_Sum_int8_t", COMMUNICATION),
    ("ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL", COMMUNICATION),
    ("_exchange_kernel", COMMUNICATION),
    ("gloo:all_reduce", COMMUNICATION), ("c10d::allreduce_", COMMUNICATION),
    ("Memcpy HtoD (Pinned -> Device)", COPIES), ("Memset (Device)", COPIES),
    ("void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<at::native::"
     "direct_copy_kernel_cuda(at::TensorIteratorBase&)>>", COPIES),
    ("triton_poi_fused__to_copy_t_2", COPIES), ("triton_poi_fused_clone_transpose_view_9", COPIES),
    (ELEMENT + "GeluCUDAKernelImpl(at::TensorIteratorBase&)>", ELEMENTWISE),
    (ELEMENT + "CUDAFunctor_add<c10::BFloat16>>", ELEMENTWISE),
    ("triton_poi_fused__to_copy_gelu_mm_3", ELEMENTWISE),  # casts and GELU before a product
    ("triton_red_fused__to_copy_sum_1", ELEMENTWISE),
    ("graph_0_cpp_fused_add_mul_pow_sigmoid_view_2", ELEMENTWISE),
    ("void at::native::reduce_kernel<512, 1, ReduceOp<float, func_wrapper_t>>", ELEMENTWISE),
    ("aten::mm", PRODUCTS), ("aten::addmm", PRODUCTS), ("aten::linear", PRODUCTS),
    ("aten::_scaled_mm", PRODUCTS),
    ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", ATTENTION),
    ("aten::native_layer_norm", NORMS), ("nanosync::linear_cross_entropy", LOSS),
    ("aten::_fused_adamw_", OPTIMIZER), ("Optimizer.step#AdamW.step", OPTIMIZER),
    ("_adamw_kernel", OPTIMIZER), ("_squares_kernel", OPTIMIZER), ("_norm_kernel", OPTIMIZER),
    ("aten::copy_", COPIES), ("aten::mul", ELEMENTWISE),
    ("autograd::engine::evaluate_function: AddmmBackward0", None), ("CompiledFunctionBackward", None),
    ("Torch-Compiled Region: 0/0", None), ("NativeLayerNormBackward0", None), ("_EagerBackward", None),
    ("nanosync::layer_norm_backward", NORMS), ("void at::native::gelu_backward", ELEMENTWISE),
    ("spin_kernel(long)", OTHER),
]


@pytest.mark.parametrize("name, row", KERNELS)
def test_a_kernel_has_a_row_by_the_words_of_its_name(name, row):
    assert row_of(name) == row


def event(cat, name, begin, end, tid=1, **args):
    return {"ph": "X", "cat": cat, "name": name, "ts": float(begin), "dur": float(end - begin), "pid": 7,
            "tid": tid, "args": args}


def step_mark(number, begin, end):
    return event("user_annotation", f"ProfilerStep#{number}", begin, end)


def launch(correlation, at, tid=1):
    return event("cuda_runtime", "cudaLaunchKernel", at, at + 1, tid, correlation=correlation)


def kernel(name, begin, end, correlation, stream=7, cat="kernel"):
    return event(cat, name, begin, end, stream, correlation=correlation)


def milliseconds(found, *rows):
    """Rows of a profile in ms, all others must be 0; and the rows add up to the step."""
    assert sum(found.seconds.values()) == pytest.approx(found.step)
    assert set(found.seconds) == set(ROWS)
    assert all(found.seconds[row] == 0 for row in ROWS if row not in rows), found.seconds
    return [pytest.approx(1e3 * found.seconds[row]) for row in rows]


def test_rows_of_a_gpu():
    """Two steps of 1000 us: products, a collective behind them and after them, a gap, data that is late."""
    events = []
    for step in range(2):
        t, c = 1000 * step, 100 * step
        events += [step_mark(step, t, t + 1000),
                   event("user_annotation", WAIT, t + 0, t + 100),
                   launch(c + 1, t + 110), launch(c + 2, t + 120), launch(c + 3, t + 130, tid=2),
                   kernel("nvjet_sm90_tst", t + 150, t + 550, c + 1),
                   kernel("ncclDevKernel_AllReduce_Sum_f32_RING_LL", t + 450, t + 650, c + 3, stream=20),
                   kernel("triton_per_fused_native_layer_norm_0", t + 650, t + 750, c + 2),
                   # the optimizer's own products, and what has no word of its own
                   event("user_annotation", "Optimizer.step#Muon.step", t + 700, t + 800),
                   event("cpu_op", "aten::bmm", t + 710, t + 730), launch(c + 4, t + 720),
                   launch(c + 5, t + 740),
                   kernel("nvjet_sm90_tst", t + 800, t + 860, c + 4),
                   kernel(ELEMENT + "CUDAFunctor_add<float>>", t + 860, t + 900, c + 5),
                   event("gpu_user_annotation", "Optimizer.step#Muon.step", t + 800, t + 900, 7)]
    found = profile_of(events)
    assert found.on_device and found.steps == 2 and found.step == pytest.approx(1e-3)
    assert milliseconds(found, PRODUCTS, NORMS, OPTIMIZER, EXPOSED, WAITING, GAPS) == [
        0.4, 0.1, 0.1, 0.1, 0.1, 0.2]
    assert found.hidden == pytest.approx(1e-4)


def test_kernels_at_the_same_time_share_it():
    found = profile_of([step_mark(0, 0, 100), kernel("nvjet", 0, 60, 1), kernel("flash_fwd", 20, 60, 2, 8),
                        kernel("Memcpy HtoD", 40, 100, 3, 9, "gpu_memcpy")])
    assert milliseconds(found, PRODUCTS, ATTENTION, COPIES) == [
        (20 + 10 + 20 / 3) / 1e3, (10 + 20 / 3) / 1e3, (20 / 3 + 40) / 1e3]


def test_a_kernel_without_a_word_belongs_to_the_operator_that_launched_it():
    events = [step_mark(0, 0, 100),
              event("cpu_op", "nanosync::linear_cross_entropy", 0, 30), launch(1, 2), launch(2, 4),
              launch(3, 6),
              event("cpu_op", "aten::scaled_dot_product_attention", 40, 60), launch(4, 45), launch(5, 50),
              event("cpu_op", "aten::embedding_dense_backward", 70, 80, tid=2), launch(6, 72, tid=2)]
    names = [ELEMENT + "exp>", "nvjet", "softmax_warp_forward", "nvjet", ELEMENT + "mul>", "sum_and_scatter"]
    events += [kernel(name, 10 * i, 10 * i + 10, i + 1) for i, name in enumerate(names)]
    assert milliseconds(profile_of(events), LOSS, PRODUCTS, ATTENTION, ELEMENTWISE, GAPS) == [
        0.02, 0.01, 0.02, 0.01, 0.04]


def test_a_gpu_waits_for_data_only_while_nothing_runs():
    events = [step_mark(0, 0, 100), event("user_annotation", WAIT, 10, 60), kernel("nvjet", 0, 40, 1),
              kernel("nvjet", 80, 100, 2)]
    assert milliseconds(profile_of(events), PRODUCTS, WAITING, GAPS) == [0.06, 0.02, 0.02]


def test_kernels_outside_of_the_steps_do_not_count():
    events = [step_mark(3, 100, 200), kernel("nvjet", 0, 90, 1), kernel("nvjet", 90, 120, 2),
              kernel("flash_fwd", 190, 400, 3), kernel("flash_fwd", 300, 400, 4)]
    assert milliseconds(profile_of(events), PRODUCTS, ATTENTION, GAPS) == [0.02, 0.01, 0.07]


def test_rows_of_a_cpu():
    """Operators count by their own time, on the main thread; a collective by what it leaves exposed."""
    events = [step_mark(0, 0, 1000),
              event("user_annotation", WAIT, 0, 100),
              event("cpu_op", "aten::stack", 10, 90, tid=2),  # the thread that loads data
              event("cpu_op", "aten::linear", 100, 300), event("cpu_op", "aten::t", 110, 120),
              event("cpu_op", "aten::addmm", 120, 290),
              event("cpu_op", "autograd::engine::evaluate_function: NativeLayerNormBackward0", 300, 420),
              event("cpu_op", "aten::native_layer_norm_backward", 310, 410),
              event("cpu_op", "_Reduce", 420, 430), event("cpu_op", "c10d::allreduce_", 420, 430),
              event("user_annotation", "gloo:all_reduce", 430, 600, tid=3),
              event("cpu_op", "aten::gelu", 500, 550),
              event("user_annotation", "Optimizer.step#AdamW.step", 700, 900),
              event("cpu_op", "aten::mul", 720, 740), event("cpu_op", "aten::_fused_adamw_", 750, 850)]
    found = profile_of(events)
    assert not found.on_device and found.hidden == pytest.approx(5e-5)
    assert milliseconds(found, WAITING, PRODUCTS, NORMS, EXPOSED, ELEMENTWISE, OPTIMIZER, GAPS) == [
        0.1, 0.2, 0.1, 0.01 + 0.12, 0.05, 0.12, 0.3]


def test_operations_of_products_and_attention():
    q = [2, 4, 64, 16]
    events = [step_mark(0, 0, 1000),
              event("cpu_op", "aten::addmm", 0, 10, **{"Input Dims": [[8], [32, 16], [16, 8], [], []]}),
              event("cpu_op", "aten::mm", 10, 20, tid=2, **{"Input Dims": [[32, 16], [16, 8]]}),
              event("cpu_op", "aten::bmm", 20, 30, **{"Input Dims": [[3, 32, 16], [3, 16, 8]]}),
              event("cpu_op", "nanosync::linear_relu_squared", 30, 40, **{"Input Dims": [[32, 16], [8, 16]]}),
              event("cpu_op", "aten::_scaled_dot_product_flash_attention", 40, 50,
                    **{"Input Dims": [q, q, q, [], []]}),
              event("cpu_op", "aten::_scaled_dot_product_cudnn_attention_backward", 50, 60,
                    **{"Input Dims": [q, q, q, q]}),
              event("user_annotation", "Optimizer.step#Muon.step", 100, 200),  # not of the model
              event("cpu_op", "aten::bmm", 110, 120, **{"Input Dims": [[3, 32, 16], [3, 16, 8]]})]
    found = profile_of(events)
    product, pair = 2 * 32 * 16 * 8, 2 * 4 * 64 * 64 * 16
    assert found.flops == {PRODUCTS: 6 * product, ATTENTION: 2 * pair + 5 * pair}
    assert found.share_of_peak(PRODUCTS, 1e12) == pytest.approx(6 * product / 30e-6 / 1e12)
    assert found.share_of_peak(None, 1e12) == pytest.approx((6 * product + 7 * pair) / 1e-3 / 1e12)
    assert found.share_of_peak(None, None) is None and found.share_of_peak(NORMS, 1e12) is None


def test_a_trace_without_steps():
    with pytest.raises(ValueError, match="no profiled step"):
        profile_of([event("cpu_op", "aten::mm", 0, 1)])


def test_longest_kernels_of_the_row_other_are_named():
    found = profile_of([step_mark(0, 0, 100)] + [kernel(f"odd{i}", 10 * i, 11 * i, i) for i in range(9)])
    assert [name for name, _ in found.others] == ["odd8", "odd7", "odd6", "odd5", "odd4"]
    lines = table(found, dict(compile=True, dtype="auto", batch_size=4), None)
    assert lines[-1] == "  other: odd8 0.01 ms, odd7 0.01 ms, odd6 0.01 ms, odd5 0.00 ms, odd4 0.00 ms"


class ToyRun:
    """The parts of a Run that `profiled` uses."""

    def __init__(self, out_dir, steps, main=True, first=0):
        self.config = dict(diagnose=steps, out_dir=str(out_dir), dtype="float32", compile=False, batch_size=4)
        self.processes = SimpleNamespace(device=torch.device("cpu"), main=main)
        self.environment, self.lines, self.stopped, self.first_step = {"device": "cpu"}, [], None, first
        self.line = self.lines.append

    def iterations(self):
        yield from range(self.first_step, self.first_step + 1000)

    def stop(self, reason):
        self.stopped = reason


def train(run, data=0.0, host=0.0):
    """A loop as in the scripts; return the number of updates. data, host: seconds of sleep in a step."""
    x, updates = torch.randn(100, 100), 0
    for _ in profiled(run):
        if run.stopped:
            break
        with record_function(WAIT):
            time.sleep(data if updates >= 8 else 0.0)
        x = (x @ x).tanh()
        time.sleep(host if updates >= 8 else 0.0)
        updates += 1
    return updates


def profile_in(folder):
    path, = folder.glob("trace_*.json.gz")
    return profile_of(json.loads(gzip.decompress(path.read_bytes()))["traceEvents"])


@pytest.mark.parametrize("first", [0, 40])
def test_sleeps_land_in_their_rows(tmp_path, first):
    """The rows are within 20% of the time that the loop itself measures (a busy machine may interrupt between
    the two clocks, one step more would be 25%), and sleeps are where they were."""
    run = ToyRun(tmp_path, 4, first=first)
    assert train(run, data=0.25, host=0.5) == WARM_UP + 4 and "diagnosis is done" in run.stopped
    found = profile_in(tmp_path)
    measured = float(run.lines[1].split(" ms with it")[0].split()[-1]) / 1e3
    assert found.steps == 4 and sum(found.seconds.values()) == pytest.approx(measured, rel=0.2)
    assert 0.25 <= found.seconds[WAITING] and 0.5 <= found.seconds[GAPS]  # a sleep is never shorter
    assert found.flops[PRODUCTS] == 2 * 100**3 and "host gaps" in run.lines[0]


def test_nothing_is_profiled_without_diagnose_and_on_other_ranks(tmp_path):
    run = ToyRun(tmp_path, 0)
    assert next(iter(profiled(run))) == 0 and not list(tmp_path.iterdir())
    run = ToyRun(tmp_path, 2, main=False)
    assert train(run) == WARM_UP + 2 and run.lines == [] and not list(tmp_path.iterdir())


def test_a_trace_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the trace into"):
        train(ToyRun(tmp_path / "file", 1))


def test_the_table_names_the_peak_and_what_changes_a_row():
    events = [step_mark(0, 0, 1000), kernel("nvjet", 0, 600, 1), kernel("flash_fwd", 600, 800, 2),
              event("cpu_op", "aten::mm", 0, 10, **{"Input Dims": [[1000, 1000], [1000, 300]]})]
    lines = table(profile_of(events), dict(compile=False, dtype="float32", batch_size=4, block_size=8), 2e12)
    assert lines[1].split() == ["products", "0.60", "60.0%", "50.0%", "--dtype=bfloat16"]
    assert lines[2].split() == ["attention", "0.20", "20.0%", "--dtype=bfloat16"]
    assert lines[10].split() == ["host", "gaps", "0.20", "20.0%", "--compile=True"]
    assert lines[12].split() == ["step", "1.00", "100.0%", "30.0%"]


@pytest.mark.parametrize("row, settings, switch", [
    (PRODUCTS, dict(), "a larger --batch_size"),
    (PRODUCTS, dict(device_batch_size=1), "a larger --device_batch_size"),
    (NORMS, dict(use_triton=False), "--use_triton=True"), (NORMS, dict(use_triton=True), ""),
    (OPTIMIZER, dict(use_zero1=False, use_fsdp=False, gradient_accumulation_steps=1),
     "with several processes --use_zero1"),
    (OPTIMIZER, dict(use_zero1=True, use_fsdp=False, gradient_accumulation_steps=1),
     "more --gradient_accumulation_steps: fewer updates for the same tokens"),
    (EXPOSED, dict(tp_processes=2, sync_strategy="spd"), "a --sync_strategy with fewer syncs"),
    (EXPOSED, dict(tp_processes=2, block_types=None), "--block_types with fewer syncs"),
    (EXPOSED, dict(use_fsdp=True, fsdp_reshard_after_forward=True), "--fsdp_reshard_after_forward=False"),
    (EXPOSED, dict(batch_sizes=[1]), "larger --batch_sizes: fewer updates for the same tokens"),
    (ELEMENTWISE, dict(dropout=0.1), "--dropout=0.0"), (ELEMENTWISE, dict(compile=False), "--compile=True"),
    (ATTENTION, dict(long_windows=[1]), "shorter --short_windows, --long_windows"),
    (WAITING, dict(), "a --dataset on a faster disk"), (OTHER, dict(), "")])
def test_the_switch_of_a_row(row, settings, switch):
    config = dict(compile=True, dtype="auto", batch_size=4, optimizer="adamw") | settings
    assert switch_of(row, config, on_device=True) == switch


@pytest.mark.parametrize("script, steps", [("train.py", "max_iters"), ("train_reduced_sync.py", "max_iters"),
                                           ("train_gpt.py", "num_iterations"),
                                           ("train_gpt_fast.py", "num_iterations")])
def test_wrong_values_are_one_line(script, steps):
    assert "diagnose=-1 must be at least 0" in settings_error(script, "--diagnose=-1")
    assert "diagnose=5000 must be at most 1000" in settings_error(script, "--diagnose=5000")
    assert "must be int" in settings_error(script, "--diagnose=all")
    assert settings_error(script, "--diagnose=20") is None
    if steps == "max_iters":
        assert "eval_only trains none" in settings_error(script, "--diagnose=20", "--eval_only")
    check_steps({"diagnose": 20, steps: 130}, 100)
    check_steps({"diagnose": 0, steps: 0}, 0)
    with pytest.raises(UserError, match=f"begins at step 100: use --{steps}=130 or more, not 100"):
        check_steps({"diagnose": 20, steps: 100}, 100)
    with pytest.raises(UserError, match=f"before it: use --{steps}=30 or more, not 5"):
        check_steps({"diagnose": 20, steps: 5}, 0)


def test_mps_has_no_profile(tmp_path):
    config = dict(diagnose=2, out_dir=str(tmp_path), compile=False)
    with pytest.raises(UserError, match="does not see MPS kernels"):
        diagnose.only_diagnose(config, torch.device("mps"))


def test_intervals():
    union = step_profile.merged([(5, 6), (0, 2), (1, 3), (3, 4), (7, 7)])
    assert union == [(0, 4), (5, 6)]
    assert step_profile.overlap(-1, 10, union) == 5 and step_profile.overlap(3.5, 5.5, union) == 1
    assert step_profile.overlap(4, 5, union) == 0 and step_profile.overlap(0, 1, []) == 0
