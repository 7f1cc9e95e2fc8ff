"""What a kernel or an operator is for: matrix products, attention, copies. By its name, and by what it was launched in."""

from __future__ import annotations

GEMM, BMM, ATTENTION, ELEMENTWISE = "GEMM", "bmm", "attention", "element-wise"
NORMALISATION, INDEXING, COPIES, HOST, OTHER = "norm, softmax, sum", "indexing", "copies", "host / launch gap", "other"

CATEGORIES = (GEMM, BMM, ATTENTION, ELEMENTWISE, NORMALISATION, INDEXING, COPIES, OTHER, HOST)
"""In the order in which charts and tables have them. HOST is the time in which nothing computes: Python, dispatch, views and
allocations, and on a GPU all the time without a kernel on it. OTHER is what no rule below knows."""

_OPS = {
    GEMM: "mm addmm addmv mv addr dot vdot ger _int_mm _scaled_mm _grouped_mm mkldnn_linear _mkl_linear _addmm_activation "
    "convolution_overrideable mkldnn_convolution thnn_conv2d slow_conv2d_forward _slow_conv2d_forward cudnn_convolution "
    "_weight_int4pack_mm _weight_int8pack_mm",
    BMM: "bmm baddbmm sgmv_add",
    ATTENTION: "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention _flash_attention_forward "
    "_scaled_dot_product_efficient_attention _efficient_attention_forward _scaled_dot_product_cudnn_attention "
    "_scaled_dot_product_attention_math _scaled_dot_product_attention_math_for_mps",
    ELEMENTWISE: "add sub rsub mul div true_divide neg abs pow sqrt rsqrt exp log log1p expm1 tanh sigmoid gelu silu relu clamp "
    "clamp_min clamp_max maximum minimum where masked_fill eq ne lt le gt ge logical_and logical_or logical_not bitwise_and "
    "bitwise_or bitwise_not sin cos addcmul addcdiv lerp floor ceil round trunc reciprocal sign erf leaky_relu hardtanh elu "
    "softplus remainder fmod floor_divide isnan isinf isfinite square native_dropout dropout threshold_backward gelu_backward",
    NORMALISATION: "native_layer_norm _fused_rms_norm rms_norm native_batch_norm native_group_norm _softmax _log_softmax "
    "sum mean max min amax amin argmax argmin prod var std var_mean norm linalg_vector_norm logsumexp any all cumsum cumprod topk "
    "sort multinomial _safe_softmax native_layer_norm_backward _softmax_backward_data",
    INDEXING: "index index_select index_put _index_put_impl index_copy index_add index_fill gather scatter scatter_add embedding "
    "take masked_select masked_scatter nonzero embedding_dense_backward",
    COPIES: "copy clone contiguous cat stack fill zero zeros ones full full_like zeros_like ones_like arange tril triu repeat roll "
    "flip constant_pad_nd _to_copy _copy_from repeat_interleave eye linspace scalar_tensor lift_fresh",
    HOST: "linear matmul einsum layer_norm group_norm batch_norm softmax log_softmax scaled_dot_product_attention to reshape view "
    "_reshape_alias _unsafe_view as_strided transpose t permute expand expand_as slice select narrow split split_with_sizes chunk "
    "unbind unsqueeze squeeze flatten unflatten movedim swapaxes numpy_T alias detach empty empty_like empty_strided new_empty "
    "new_empty_strided new_zeros new_ones new_full resize resize_as set item _local_scalar_dense is_nonzero result_type "
    "resolve_conj resolve_neg view_as broadcast_to conv1d conv2d convolution _convolution atleast_1d diagonal real "
    "numel size stride storage_offset is_same_size record_stream cumsum_out _has_compatible_shallow_copy_type",
}
_CATEGORY_OF_OP = {name: category for category, names in _OPS.items() for name in names.split()}

# Parts of names, the first that is found decides. Other libraries' operators, and kernels whose operator is not known.
_PARTS = (
    (COPIES, ("memcpy", "memset", "memory copy", "copy_kernel", "catarray", "direct_copy", "fillfunctor", "arange", "_copy_")),
    (ATTENTION, ("flash", "fmha", "attention", "mem_eff")),
    (BMM, ("_shrink_kernel", "_expand_kernel", "sgmv", "bmm", "batched_gemm", "batched_gemv")),
    (NORMALISATION, ("softmax", "layer_norm", "layernorm", "rmsnorm", "rms_norm", "reduce", "norm_kernel", "argmax", "scan")),
    (
        GEMM,
        (
            "gemm", "gemv", "nvjet", "cutlass", "xmma", "wgmma", "_mm", "mm_", "matmul", "splitk", "linear", "cublas", "cijk_",
            "dot_", "_decode_kernel", "_sum_parts_kernel", "_modulate_kernel", "flora::decode", "flora::modulate", "conv",
        ),
    ),
    (INDEXING, ("index", "gather", "scatter", "embedding")),
    (ELEMENTWISE, ("elementwise", "vectorized", "unrolled", "pointwise", "quant", "gelu", "silu", "foreach", "triton_poi")),
)  # fmt: skip


def category_of_op(name: str) -> str:
    """The category of an operator's own time, such as of `aten::addmm`. What only calls others counts as HOST."""
    namespace, colons, own = name.rpartition("::")
    if not colons or namespace.startswith("autograd"):
        return HOST  # a function of autograd, or a range of somebody's: around operators
    if namespace in ("aten", "flora", "mkl", "mkldnn", "prims"):
        found = _CATEGORY_OF_OP.get(own) or _CATEGORY_OF_OP.get(own.rstrip("_"))
        if found is not None:
            return found
    return _by_parts(name)


def category_of_kernel(name: str, category_of_launcher: str | None) -> str:
    """The category of what ran on a GPU. category_of_launcher: that of the operator it was launched by, which knows best; None
    where that is not known, as in a CUDA graph."""
    by_name = _by_parts(name)
    if category_of_launcher in (None, HOST, OTHER) or (by_name == COPIES and name[:3] == "Mem"):
        return by_name
    return category_of_launcher


def _by_parts(name: str) -> str:
    lower = name.lower()
    return next((category for category, parts in _PARTS if any(part in lower for part in parts)), OTHER)
