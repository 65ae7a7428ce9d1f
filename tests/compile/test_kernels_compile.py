"""Triton kernels, compiled for GPUs that are not there. Needs Triton, and no interpreter.

    python -m pytest tests/compile/test_kernels_compile.py
"""

import os
import re
import subprocess
import sys

import pytest
import torch
from helpers import KERNEL_DEVICE as DEVICE
from helpers import ROOT

import kernels
from kernels import (
    adamw,
    cross_entropy,
    decode,
    exchange,
    fp8,
    fp8_cast,
    fp8_transpose,
    gelu_cast,
    gelu_mlp,
    interval_attention,
    layer_norm,
    pending_norm,
    qk_rotary,
    qkv_linear,
    relu_squared,
)
from kernels.layer_norm import add_layer_norm

COMPILED = pytest.mark.skipif(kernels.triton is None or kernels.INTERPRETED, reason="no Triton compiler")


@COMPILED
@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_without_a_gpu(capability):
    """All kernels in bf16 at GPT-2's sizes, for A100 and H100: catches what the interpreter lets pass."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    flags = dict(BIAS=True, GELU=True, RESIDUAL=True, ALSO=True, ALSO_ADD=True, ALSO_BIAS=True)
    stream, sums = "*fp32 *fp32 *fp32 *i64 *i32", "fp32" + 9 * " i32"  # see Stream and SplitSums
    halves = [dict(TAKE=t, PUT=t, CUT=cut) for t, cut in ((False, False), (True, False), (True, True))]
    ranks = dict(RANK=1, RANKS=4, SETS=4)
    cases = [
        *((cross_entropy._cross_entropy_kernel, "*bf16 *fp32 *i64 *fp32 *fp8e5 *fp32 i32 i32 i32",
           dict(FACTORS=low, WRITE_GRAD=True, WRITE_LOW=low, LOW=cross_entropy.LOW,
                SMALLEST=cross_entropy.SMALLEST, LANES=4096, UNROLL=8), dict(num_warps=16))
          for low in (False, True)),
        *((cross_entropy._lse_kernel, "*bf16 *fp32 *i64 *fp32 *fp32 i32 i32",
           dict(FACTORS=low, LANES=4096, UNROLL=8), dict(num_warps=16)) for low in (False, True)),
        *((cross_entropy._grad_kernel, "*bf16 *fp32 *i64 *fp32 *fp8e5 *fp32 i32 i32",
           dict(FACTORS=low, WRITE_LOW=low, LANES=4096, UNROLL=8), dict(num_warps=16))
          for low in (False, True)),
        *((cross_entropy._weighted_cross_entropy_kernel, "*bf16 *i64 *fp32 *fp32 i32 i32 fp32 fp32 fp32",
           dict(K=3, BLOCK_K=4, SOFTCAP=unroll == 2, WRITE_GRAD=True, LANES=4096, UNROLL=unroll),
           dict(num_warps=16)) for unroll in (2, 4)),
        *((decode._vector_kernel, f"*fp32 *bf16 *bf16 *bf16 *bf16 *bf16 *fp32 *fp32 {stream} i32 i32 {sums}",
           flags | dict(NORM=True, BETA=True, OWN=2, **half, **ranks, BLOCK_N=16384 // K, BLOCK_K=K), {})
          for half in halves for K in (1024, 2048)),
        (decode._embed_kernel, "*i64 *i64 *bf16 *bf16 *fp32 *i32 i32", dict(COUNT=True, BLOCK=256), {}),
        (decode._draw_kernel, "*fp32 *i64 *fp32 *i64 i32 fp32", dict(BLOCK=256), {}),
        (pending_norm._forward_kernel, "*bf16 *bf16 *bf16 *fp32 *fp32 *bf16 *bf16 *bf16 *fp32 *fp32 i32 i32",
         dict(R=4, PENDING=True, NEW=True, LAST=True, BIAS=True, BLOCK=1024), dict(num_warps=1)),
        (pending_norm._backward_kernel,
         "*bf16 *bf16 *bf16 *bf16 *fp32 *fp32 *fp32 *bf16 *bf16 *fp32 i32 i32",
         dict(R=4, LAST=False, BIAS=True, BLOCK=1024), dict(num_warps=1)),
        (exchange._exchange_kernel, "*fp32 *fp32 *i64 *i32 i32 i32",
         dict(RANK=1, RANKS=4, BLOCK_R=4, BLOCK=256, GATHER=False), dict(num_warps=8)),
        (exchange._put_kernel, "*fp32 *i64 *i32 i32 i32 i32 i32", dict(BLOCK=256, **ranks),
         dict(num_warps=8)),
        (exchange._take_kernel, "*fp32 *i64 *i32 i32 i32 i32 i32 i32 i32", dict(BLOCK=256, **ranks),
         dict(num_warps=8)),
        *((decode._norm_kernel, f"*fp32 *bf16 *bf16 *bf16 {stream} i32 fp32" + 6 * " i32",
           dict(BETA=True, OWN=2, TAKE=half["TAKE"], CUT=half["CUT"], BLOCK_K=1024, **ranks), {})
          for half in halves),
        *((decode._matrix_kernel, "*bf16 *bf16 *bf16 *bf16 *fp32 *fp32 *i64 *i32" + 7 * " i32",
           flags | dict(PUT=half["PUT"], CUT=half["CUT"], K=768, BLOCK_B=32, BLOCK_N=16, BLOCK_K=256) | ranks,
           dict(num_warps=2, num_stages=3)) for half in halves),
        (decode._attention_kernel, "*bf16 *bf16 *i64 *fp32 *i32 *bf16 i32 i32 fp32",
         dict(SPAN=128, D=64, BLOCK_D=64, BLOCK_S=64), {}),
        (interval_attention._delta_kernel, "*bf16 *bf16 *fp32 i32 i32",
         dict(D=128, BLOCK_D=128, BLOCK_M=64), {}),
        (qk_rotary._forward_kernel, "*bf16 *fp32 *fp32 *bf16 *bf16 *bf16 *fp32 i32 i32 i32",
         dict(HALF=64, EPS=qk_rotary.EPS, BLOCK=64, ROWS=qk_rotary.ROWS), {}),
        (qk_rotary._backward_kernel,
         "*bf16 *bf16 *bf16 *bf16 *bf16 *fp32 *fp32 *fp32 *bf16 i32 i32 i32",
         dict(HALF=64, BLOCK=64, ROWS=qk_rotary.ROWS), {}),
    ]
    qkv, heads = "*bf16 *bf16 *bf16", dict(D=128, BLOCK_D=128)
    for name, kernel, types in (
            ("forward", "_attention_forward_kernel", f"{qkv} *i32 *bf16 *fp32 i32 i32"),
            ("backward_kv", "_backward_kv_kernel", f"{qkv} *bf16 *i32 *i32 *fp32 *fp32 *bf16 *bf16 i32 i32"),
            ("backward_q", "_backward_q_kernel", f"{qkv} *bf16 *i32 *fp32 *fp32 *bf16 i32 i32")):
        config = interval_attention.CONFIGS[name]
        constants = heads | {n: config[n] for n in config if n.isupper()}
        constants["scale2" if name == "forward" else "scale"] = 0.1
        cases.append((getattr(interval_attention, kernel), types, constants,
                      {n: config[n] for n in config if n.islower()}))
    for kernel, types, constants, options in cases:
        names = kernel.arg_names
        kinds = dict(zip((n for n in names if n not in constants), types.split()))
        source = ASTSource(kernel, {n: kinds.get(n, "constexpr") for n in names},
                           {(i,): constants[n] for i, n in enumerate(names) if n in constants})
        compiled = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert len(compiled.asm["cubin"]) > 0 and compiled.metadata.shared <= 160 * 1024


@COMPILED
def test_gradient_of_logits_in_fp8_needs_no_exchange():
    """For H100: threads store 16 bytes of bf16 and 8 of FP8 as they have them. An exchange between threads
    through shared memory made the kernel 6 times as slow."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    kernel, names = cross_entropy._cross_entropy_kernel, cross_entropy._cross_entropy_kernel.arg_names
    constants = dict(FACTORS=True, WRITE_GRAD=True, WRITE_LOW=True, LOW=cross_entropy.LOW,
                     SMALLEST=cross_entropy.SMALLEST, LANES=4096, UNROLL=8)
    kinds = dict(zip(names, "*bf16 *fp32 *i64 *fp32 *fp8e5 *fp32 i32 i32 i32".split()))
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n in kinds if n != "ignore_index"}
    source = ASTSource(kernel, {n: kinds.get(n, "constexpr") for n in names},
                       {(names.index(n),): value for n, value in constants.items()}, aligned)
    ptx = compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=16)).asm["ptx"]
    assert ptx.count("st.global.v4.b32") == ptx.count("st.global.v2.b32") == 4
    assert ptx.count("ld.shared") < 10  # of the row's sum


@COMPILED
@pytest.mark.parametrize("K, warps", [(768, 4), (1600, 8)])
def test_joined_gradients_need_no_exchange(K, warps):
    """For H100: loads of 16 bytes, stores of 8."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    kernel, names = fp8_cast._join_cast_kernel, fp8_cast._join_cast_kernel.arg_names
    constants = dict(K=K, LARGEST=57344.0, TINY=fp8.TINY, BLOCK=256 * warps)
    kinds = dict(zip(names, "*bf16 *bf16 *bf16 *fp8e5 *fp32".split()))
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n in kinds}
    source = ASTSource(kernel, {n: kinds.get(n, "constexpr") for n in names},
                       {(names.index(n),): value for n, value in constants.items()}, aligned)
    ptx = compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=warps)).asm["ptx"]
    assert ptx.count("ld.global.v4.b32") == ptx.count("st.global.v2.b32") == 3
    assert "cvt.rn.satfinite.e5m2x2.f32" in ptx and "max.NaN.f32" in ptx and ptx.count("ld.shared") < 4


@COMPILED
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype, C", [("bf16", 127), ("bf16", 768), ("bf16", 4096), ("fp32", 8192),
                                      ("bf16", 16384)])
def test_layer_norm_compiles_without_a_gpu(dtype, C, capability):
    """As `_config` has it, for A100 and H100: fits their memory, and moves 16 bytes at a time where rows are
    multiples of that."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    config = layer_norm._config(C, 2 if dtype == "bf16" else 4, True)
    t = f" *{dtype}"
    cases = [
        (layer_norm._forward_kernel, 2 * t + " *fp32 *fp32" + 2 * t + " *fp32 i32",
         dict(C=C, ADD=True, BIAS=True, EPS=1e-5), config["forward"]),
        (layer_norm._backward_kernel, 3 * t + " *fp32 *fp32" + t + " *fp32 i32",
         dict(C=C, ADD=True, BIAS=True, PAIRED=True), config["backward"]),
        (layer_norm._column_sums_kernel, "*fp32 *fp32 *fp32 i32", dict(C=C), config["sums"]),
    ]
    for kernel, types, constants, options in cases:
        options = dict(options)
        constants = constants | {n: options.pop(n) for n in list(options) if n.isupper()}
        names = kernel.arg_names
        kinds = dict(zip((n for n in names if n not in constants), types.split()))
        aligned = {(names.index(n),): [["tt.divisibility", 16]] for n in kinds if n.endswith("_ptr")}
        source = ASTSource(kernel, {n: kinds.get(n, "constexpr") for n in names},
                           {(i,): constants[n] for i, n in enumerate(names) if n in constants}, aligned)
        compiled = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert len(compiled.asm["cubin"]) > 0 and compiled.metadata.shared <= 99 * 1024
        ptx = compiled.asm["ptx"]
        if C % 8 == 0 and kernel is not layer_norm._column_sums_kernel:
            assert "st.global.v4.b32" in ptx and "st.global.b16" not in ptx and "ld.global.b16" not in ptx


def check_graph() -> None:
    """Run in a process in which PyTorch says at the start that it has a GPU."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    from torch._subclasses.fake_tensor import FakeTensorMode
    from triton.backends.compiler import GPUTarget

    class Driver:
        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

    written = []

    def record(graph, _):
        calls = [n for n in graph.graph.nodes if "triton_kernel_wrapper" in str(n.target)]
        written.append([n.kwargs["tensors_to_clone"] for n in calls])
        return make_boxed_func(graph.forward)

    for module in (kernels.layer_norm, fp8_cast, fp8_transpose, gelu_cast):
        module.usable = lambda x: True
    kernels.triton.runtime.driver._active = Driver()
    backend = aot_autograd(fw_compiler=record, bw_compiler=record)
    with FakeTensorMode():
        x, out = (torch.empty(2, 8, 768, requires_grad=True) for _ in range(2))
        weight, bias = (torch.empty(768, requires_grad=True) for _ in range(2))
        s, y = torch.compile(add_layer_norm, fullgraph=True, backend=backend)(x, out, weight, bias)
        (s.sum() + y.sum()).backward()
    assert written == [[["s_ptr", "y_ptr", "stats_ptr"]],
                       [["grad_x_ptr", "partial_ptr"], ["grad_weight_ptr", "grad_bias_ptr"]]]
    written.clear()
    with FakeTensorMode():
        x = torch.empty(32, 64, dtype=torch.bfloat16, requires_grad=True)
        w_qkv, w_in, w_out = (torch.empty(*s, requires_grad=True) for s in ((192, 64), (128, 64), (64, 128)))

        def function(x, w_qkv, w_in, w_out):
            q, k, v = fp8.split_linear(x, w_qkv, None, 3, True, None, True)
            return gelu_cast.fp8_gelu_mlp(q * k * v, w_in, None, w_out, None, True, None, None, True)

        torch.compile(function, fullgraph=True, backend=backend)(x, w_qkv, w_in, w_out).sum().backward()
    transposes = 2 * [["result_ptr"]]  # of a weight's gradient: the narrow factor and the wide one
    assert written == [[["values_ptr", "scale_ptr"]], [
        ["values_ptr", "scale_ptr"], *transposes, *transposes, ["values_ptr", "scale_ptr"], *transposes]]


@COMPILED
@pytest.mark.skipif(DEVICE == "cuda", reason="pretends to have a GPU")
def test_graph_without_a_gpu():
    """torch.compile makes one graph each way of LayerNorm, and of FP8 with weight gradients. It takes nothing
    but the kernels' results for written: anything else would be copied first."""
    code = """import torch
there, torch.cuda.is_available = torch.cuda.is_available, lambda: True
import kernels.layer_norm
torch.cuda.is_available = there
import test_kernels_compile
test_kernels_compile.check_graph()"""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "compile")])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == 0, done.stderr


@COMPILED
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_relu_squared_compiles_without_a_gpu(direction):
    """For H100 in bf16: what a multiprocessor's shared memory holds, on tensor cores, and a NaN stays one."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    config = relu_squared.CONFIGS[direction]
    sizes = {name: n for name, n in config.items() if name.startswith("BLOCK")}
    M, W, K = sizes.values()
    blocks = dict(a_desc=(M, K), b_desc=(W, K) if direction == "forward" else (K, W), y_desc=(M, W // 2),
                  out_desc=(M, W // 2))
    constants = sizes | dict(H=3072, C=768, PROGRAMS=132, BACKWARD=direction == "backward")
    kinds = dict.fromkeys(constants, "constexpr") | dict(N="i32")
    kinds |= {name: f"tensordesc<bf16[{rows},{columns}]>" for name, (rows, columns) in blocks.items()}
    names = relu_squared._kernel.arg_names
    source = ASTSource(relu_squared._kernel, {name: kinds[name] for name in names},
                       {(names.index(name),): value for name, value in constants.items()})
    compiled = compile(source, target=GPUTarget("cuda", 90, 32),
                       options={name: config[name] for name in ("num_warps", "num_stages")})
    assert compiled.metadata.shared <= 227 * 1024 and "wgmma.mma_async" in compiled.asm["ptx"]
    if direction == "forward":
        assert "max.NaN.f32" in compiled.asm["ptx"] and "max.f32" not in compiled.asm["ptx"]


@COMPILED
@pytest.mark.parametrize("direction, keep, sigmoid, bias", [
    ("forward", "preactivation", "exponential", False), ("backward", "preactivation", "exponential", False),
    ("forward", "derivative", "exponential", True), ("backward", "derivative", "exponential", True),
    ("forward", "derivative8", "tanh", True), ("backward", "derivative8", "tanh", True),
    ("forward", "nothing", "exponential", False)])
def test_gelu_mlp_compiles_without_a_gpu(direction, keep, sigmoid, bias):
    """For H100 in bf16: fits a multiprocessor's shared memory, on tensor cores, without spilled registers."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    config = dict(gelu_mlp.CONFIGS[direction, gelu_mlp.KEEP.index(keep)])
    programs, parts = config.pop("programs", 1), config["PARTS"]
    sizes = {name: n for name, n in config.items() if name.startswith("BLOCK")}
    M, W, K = sizes.values()
    backward, kept = direction == "backward", "u8" if keep == "derivative8" else "bf16"
    blocks = dict(a_desc=("bf16", M, K), b_desc=("bf16", K, W) if backward else ("bf16", W, K),
                  kept_desc=(kept, M, W // parts), out_desc=("bf16", M, W // parts))
    constants = sizes | dict(H=3072, C=768, PROGRAMS=132 * programs, BACKWARD=backward, BIAS=bias,
                             KEEP=gelu_mlp.KEEP.index(keep), SIGMOID=gelu_mlp.SIGMOIDS[sigmoid],
                             CODES=gelu_mlp.CODES, SHIFT=gelu_mlp.SHIFT, PARTS=parts)
    kinds = dict.fromkeys(constants, "constexpr") | dict(N="i32", bias_ptr="*fp32" if backward else "*bf16")
    kinds |= {name: f"tensordesc<{dtype}[{rows},{columns}]>"
              for name, (dtype, rows, columns) in blocks.items()}
    names = gelu_mlp._kernel.arg_names
    source = ASTSource(gelu_mlp._kernel, {name: kinds[name] for name in names},
                       {(names.index(name),): value for name, value in constants.items()})
    compiled = compile(source, target=GPUTarget("cuda", 90, 32),
                       options={name: config[name] for name in ("num_warps", "num_stages")})
    assert compiled.metadata.shared * programs <= 227 * 1024 and "wgmma.mma_async" in compiled.asm["ptx"]
    function = {"exponential": "ex2.approx.ftz.f32", "tanh": "tanh.approx.f32"}[sigmoid]
    assert (function in compiled.asm["ptx"]) == (keep == "preactivation" or not backward)


@COMPILED
def test_qkv_linear_compiles_without_a_gpu():
    """For H100 in bf16: fits a multiprocessor's shared memory, on tensor cores."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    config = qkv_linear.CONFIG
    sizes = {name: n for name, n in config.items() if name.startswith("BLOCK")}
    M, W, K = sizes.values()
    constants = sizes | dict(W=768, C=768, PROGRAMS=132)
    kinds = dict.fromkeys(constants, "constexpr")
    kinds |= dict.fromkeys(("N", "q_place", "k_place", "v_place"), "i32")
    kinds |= dict(grads_desc=f"tensordesc<bf16[{M},1,{K}]>", weight_desc=f"tensordesc<bf16[{K},{W}]>",
                  out_desc=f"tensordesc<bf16[{M},{W // 2}]>")
    names = qkv_linear._kernel.arg_names
    source = ASTSource(qkv_linear._kernel, {name: kinds[name] for name in names},
                       {(names.index(name),): value for name, value in constants.items()})
    compiled = compile(source, target=GPUTarget("cuda", 90, 32),
                       options={name: config[name] for name in ("num_warps", "num_stages")})
    shared = compiled.metadata.shared * config.get("programs", 1)
    assert shared <= 227 * 1024 and "wgmma.mma_async" in compiled.asm["ptx"]


@COMPILED
def test_adamw_compiles_without_a_gpu():
    """For A100 in fp32: addresses from a table are known to be aligned, so that loads are of 16 bytes."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    cases = [
        (adamw._squares_kernel, "*i64 *i32 *fp32 i32", dict(PIECE=adamw.PIECE)),
        (adamw._norm_kernel, "*fp32 *fp32 i32 fp32", dict(PIECE=1024)),
        (adamw._adamw_kernel, "*i64 *i32 *fp32 i32 fp32 fp32",
         dict(BETA1=0.9, BETA2=0.95, LOG2_BETA1=-0.15, LOG2_BETA2=-0.07, EPS=1e-8, PIECE=adamw.PIECE)),
    ]
    for kernel, types, constants in cases:
        names = kernel.arg_names
        kinds = dict(zip((n for n in names if n not in constants), types.split()))
        aligned = {(names.index(n),): [["tt.divisibility", 16]] for n in kinds if n.endswith("_ptr")}
        source = ASTSource(kernel, {n: kinds.get(n, "constexpr") for n in names},
                           {(i,): constants[n] for i, n in enumerate(names) if n in constants}, aligned)
        compiled = compile(source, target=GPUTarget("cuda", 80, 32), options=dict(num_warps=adamw.WARPS))
        if kernel is not adamw._norm_kernel:
            assert "ld.global.v4.b32" in compiled.asm["ptx"]


@COMPILED
def test_weight_casts_compile_without_a_gpu():
    """For H100: FP8 conversions in hardware, and a maximum that keeps a NaN."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    names = fp8._cast_weights_kernel.arg_names
    for write in (False, True):
        constants = dict(WRITE=write, LARGEST=448.0, TINY=fp8.TINY, TILE=fp8.WeightCasts.TILE)
        kinds = dict(zip(names, "*i64 *i32 *i32 *fp8e4nv *fp8e4nv *fp32".split()))
        source = ASTSource(fp8._cast_weights_kernel, {n: kinds.get(n, "constexpr") for n in names},
                           {(names.index(n),): value for n, value in constants.items()})
        ptx = compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=4)).asm["ptx"]
        assert "max.NaN.f32" in ptx and "cvt.rn.satfinite.e4m3x2.f32" in ptx if write else "atom" in ptx


@COMPILED
@pytest.mark.parametrize("kernel, types, tile", [
    ("_transpose_kernel", "*fp8e5 *fp8e5 i32 i32", fp8_transpose.TILE),
    ("_cast_transposed_kernel", "*bf16 *fp32 *fp32 *fp8e5 i32 i32", fp8_transpose.CAST_TILE)])
def test_transposes_compile_without_a_gpu(kernel, types, tile):
    """For H100: loads and stores of 16 bytes, and no exchange of single bytes through shared memory."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    kernel, (rows, columns, warps) = getattr(fp8_transpose, kernel), tile
    kinds = dict(zip(kernel.arg_names, types.split()))
    unknown = "M" if kernel is fp8_transpose._transpose_kernel else None  # the kernel says what divides it
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kinds) if name != unknown}
    source = ASTSource(kernel, {n: kinds.get(n, "constexpr") for n in kernel.arg_names},
                       {(len(kinds),): rows, (len(kinds) + 1,): columns}, aligned)
    code = compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=warps)).asm
    ptx = code["ptx"]
    assert "ld.global.v4.b32" in ptx and "st.global.v4.b32" in ptx and "st.global.b32" not in ptx
    assert "shared.b8" not in ptx and "shared.v4.b8" not in ptx
    assert not re.search(r"muli .*tensor<\w+xi32>", code["ttir"])  # places beyond 2^31, rows times columns


@COMPILED
@pytest.mark.parametrize("backward, store, H", [(False, True, 3072), (True, True, 3072), (False, False, 3072),
                                                (True, False, 3072), (True, False, 6400)])
def test_gelu_with_cast_compiles_without_a_gpu(backward, store, H):
    """For H100 in bf16 at GPT-2's width: loads and stores of 16 bytes, FP8 conversions in hardware, and no
    values in local memory."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    kernel, names = gelu_cast._gelu_cast_kernel, gelu_cast._gelu_cast_kernel.arg_names
    block, warps = (gelu_cast.BLOCK, gelu_cast.WARPS) if store else gelu_cast.row_block(H)
    constants = dict(H=H, BACKWARD=backward, STORE=store, SIGMOID=1, LARGEST=448.0, TINY=fp8.TINY,
                     BLOCK=block)
    kinds = dict(zip(names, ["*bf16", "*bf16", "*bf16", "*fp8e5" if backward else "*fp8e4nv", "*fp32"]))
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n in kinds}
    source = ASTSource(kernel, {n: kinds.get(n, "constexpr") for n in names},
                       {(names.index(n),): value for n, value in constants.items()}, aligned)
    compiled = compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=warps))
    ptx = compiled.asm["ptx"]
    assert "ld.global.v4.b32" in ptx and ("st.global.v4.b32" if store else "st.global.v2.b32") in ptx
    assert "max.NaN.f32" in ptx and ptx.count("ld.shared") < 4 + 4 * store  # of the row's largest entry
    assert ("cvt.rn.satfinite.e5m2x2.f32" if backward else "cvt.rn.satfinite.e4m3x2.f32") in ptx
    assert ".local" not in ptx
